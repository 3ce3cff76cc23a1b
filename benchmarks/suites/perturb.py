"""What SAM and CrAM do outside of their passes: perturb and restore all parameters; compress them in between.

Ours, through the optimizers that users call, against torch's multi-tensor ops with persistent copies, and against
CrAM's published way of compressing: magnitudes joined, a sorted top-k, a mask scattered. The base optimizer's step
is left out of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import shapes, verify
from benchmarks.harness import Case, Device, Side, Subject, WrongResult
from benchmarks.rivals_select import joined
from wcr_fast.optim import SAM, CrAM
from wcr_fast.torch_path.cuts import num_keep

RHO = 0.05
SPARSITIES = (0.5, 0.9)


def lists(device: Device, *, quick: bool) -> list[tuple[str, torch.dtype]]:
    """Return (list, dtype) of every case."""
    if device.name == "cpu" or quick:
        name = "tiny" if device.name == "cpu" and quick else "resnet18"
        return [(name, dtype) for dtype in (torch.float32, torch.bfloat16)]
    nets = [(net, torch.float32) for net in ("resnet50", "gpt2", "resnet18", "vit_b16")]
    return [nets[0], ("llama_1b", torch.bfloat16), *nets[1:]]


def cases(device: Device, *, quick: bool) -> Iterator[Case]:
    """Yield for each list the way there and back, and compressions."""
    for name, dtype in lists(device, quick=quick):
        listed = shapes.LISTS[name]()
        count = shapes.values_of(listed)
        head = (str(dtype).removeprefix("torch."), len(listed), count)
        sides = tuple(there_and_back(listed, dtype, device))
        yield Case(name, "SAM, there and back", *head, 3 * count * dtype.itemsize, sides)
        pruned = shapes.weights_of(listed)
        head, count = (head[0], len(pruned), shapes.values_of(pruned)), shapes.values_of(pruned)
        for sparsity in SPARSITIES:
            sides = tuple(compressions(pruned, dtype, device, sparsity))
            yield Case(name, f"CrAM, {sparsity:.0%} to zero", *head, count * dtype.itemsize, sides)


def _params(listed: Sequence[shapes.Shape], dtype: torch.dtype, device: Device, seed: int) -> list[Tensor]:
    params = shapes.balanced(listed, dtype=dtype, device=device.torch_device, seed=seed)
    gradients = shapes.balanced(listed, dtype=dtype, device=device.torch_device, seed=seed + 1000)
    for p, g in zip(params, gradients, strict=True):
        p.requires_grad_().grad = g
    return params


def there_and_back(listed: Sequence[shapes.Shape], dtype: torch.dtype, device: Device) -> Iterator[Side]:
    """Yield the ways; at least: the gradient twice, the weight, its copy and both once more to write, and back."""
    count = shapes.values_of(listed)
    for label, bind, ours in (("ours", _ours, True), ("_foreach", _Foreach, False)):

        def build(copies: int, bind: Callable[[list[Tensor]], _Foreach] = bind) -> Subject:
            made = [_params(listed, dtype, device, seed) for seed in range(copies)]
            movers = [bind(params) for params in made]

            def call(i: int) -> None:
                movers[i].first_step()
                movers[i].restore()

            return Subject(call, lambda: _check_way(made[0], movers[0]))

        yield Side(label, build, ours, 7 * dtype.itemsize * count, 3 * dtype.itemsize * count)


def _ours(params: list[Tensor]) -> SAM:
    return SAM(params, torch.optim.SGD, lr=0.1, rho=RHO)


class _Foreach:
    """SAM's moves by torch's multi-tensor ops; on a GPU without a wait for the norm."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.saved = [torch.empty_like(p) for p in params]

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [p.grad for p in self.params]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float())
        scale = RHO / (norm + 1e-12)
        torch._foreach_copy_(self.saved, self.params)
        if norm.device.type == "cpu":
            torch._foreach_add_(self.params, grads, alpha=scale.item())
        else:
            torch._foreach_add_(self.params, torch._foreach_mul(grads, scale))

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self.params, self.saved)


def _check_way(params: list[Tensor], mover: SAM | _Foreach) -> None:
    before = [p.detach().clone() for p in params]
    length = sum((p.grad.double() ** 2).sum() for p in params).sqrt()
    mover.first_step()
    for i in verify.sample([p.numel() for p in params]):
        want = before[i].double() + RHO * params[i].grad.double() / length
        # torch rounds the product of 16-bit numbers before it adds
        error = (params[i].detach().double() - want).abs().max() / want.abs().max()
        if not error < 2 * torch.finfo(params[i].dtype).eps:
            raise WrongResult(f"parameter {i} is off by {error:.1e} of its largest value")
    mover.restore()
    if not all(torch.equal(p, b) for p, b in zip(params, before, strict=True)):
        raise WrongResult("not restored")


def compressions(listed: Sequence[shapes.Shape], dtype: torch.dtype, device: Device, sparsity: float) -> Iterator[Side]:
    """Yield the ways; at least, weights are read twice and written once."""
    count = shapes.values_of(listed)
    for label, bind, ours in (("ours", _compress, True), ("cat + sorted topk + scatter", _published, False)):

        def build(copies: int, bind: Callable[[list[Tensor], float], Callable[[], None]] = bind) -> Subject:
            dense = [shapes.balanced(listed, dtype=dtype, device=device.torch_device, seed=s) for s in range(copies)]
            params = [[torch.empty_like(w).requires_grad_() for w in ws] for ws in dense]
            calls = [bind(ps, sparsity) for ps in params]

            def prepare(i: int) -> None:
                with torch.no_grad():
                    torch._foreach_copy_(params[i], dense[i])

            def check() -> None:
                prepare(0)
                calls[0]()
                _check_zeros(dense[0], params[0], sparsity)

            return Subject(lambda i: calls[i](), check, prepare)

        yield Side(label, build, ours, 3 * dtype.itemsize * count, (2 if ours else 8) * dtype.itemsize * count)


def _compress(params: list[Tensor], sparsity: float) -> Callable[[], None]:
    optimizer = CrAM(params, torch.optim.SGD, lr=0.1, sparsities=sparsity)
    gradients = {p: p for p in params}
    return lambda: optimizer._compress(sparsity, gradients)


@torch.no_grad()
def _topk_and_scatter(params: list[Tensor], sparsity: float) -> None:
    magnitudes = joined(params)
    kept = magnitudes.topk(num_keep(sparsity, magnitudes.numel())).indices
    mask = torch.zeros_like(magnitudes).scatter_(0, kept, 1.0)
    for p, part in zip(params, mask.split([p.numel() for p in params]), strict=True):
        p.mul_(part.view_as(p))


def _published(params: list[Tensor], sparsity: float) -> Callable[[], None]:
    return lambda: _topk_and_scatter(params, sparsity)


def _check_zeros(dense: list[Tensor], params: list[Tensor], sparsity: float) -> None:
    """Any of the smallest may go where several are equal: counts and values are compared, not places."""
    total = sum(w.numel() for w in dense)
    keep = num_keep(sparsity, total)
    kept = sum(int(p.count_nonzero()) for p in params)
    if kept != keep:
        raise WrongResult(f"{kept} of {total} weights stay, not {keep}")
    threshold = joined(dense).topk(keep).values[-1]
    for w, p in zip(dense, params, strict=True):
        stays = p != 0
        if (w.abs()[stays] < threshold).any() or (w.abs()[~stays] > threshold).any():
            raise WrongResult("other weights stay than the largest")
        if not torch.equal(w[stays], p.detach()[stays]):
            raise WrongResult("a weight that stays has another value")
