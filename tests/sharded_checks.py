"""What every rank of a gloo group does for test_sharded.py: each check returns figures, or fails."""

import copy
import os
import traceback
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import wcr_fast
from wcr_fast.ops.moments import stats_of

STEPS = 20


class Net(nn.Module):
    """Shards of unequal size on 2 and 4 ranks, of none at all on the last, a tied weight, biases and a norm."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Linear(6, 7)
        self.middle = nn.Linear(7, 7)
        self.norm = nn.LayerNorm(7)
        self.tied = nn.Linear(7, 7)
        self.tied.weight = self.middle.weight
        self.narrow = nn.Linear(7, 3)
        self.last = nn.Linear(3, 1)
        self.to(dtype)

    def forward(self, x):
        x = self.norm(torch.tanh(self.middle(torch.tanh(self.first(x)))))
        return self.last(torch.tanh(self.narrow(torch.tanh(self.tied(x)))))


def sharded(dtype, mesh=None):
    model = Net(dtype)
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def data(dtype, whole):
    torch.manual_seed(11)
    x, y = torch.randn(16, 6, dtype=dtype), torch.randn(16, 1, dtype=dtype)
    if whole:
        return x, y
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return x.chunk(ranks)[rank], y.chunk(ranks)[rank]


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def apart(model, other):
    """Return the largest difference between two models' parameters, in units of the largest weight."""
    pairs = [(full(p), full(q)) for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    return max((p - q).abs().max().item() / q.abs().max().item() for p, q in pairs)


def train(model, optimizer, whole=False, steps=STEPS, before=None):
    x, y = data(next(model.parameters()).dtype, whole)
    for step in range(steps):
        if before is not None:
            before(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def same_everywhere(*tensors):
    """Return whether all ranks hold the same bits."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [t.detach().numpy().tobytes() for t in tensors])
    return all(other == everyone[0] for other in everyone)


def make(kind, model, penalty, **kept):
    """Return a fused optimizer with a penalty, a regularizer's class built on the model or a name."""
    penalty = penalty(model) if callable(penalty) else penalty
    if kind == "sgd":
        return wcr_fast.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, penalty=penalty, lam=1e-4, **kept)
    return wcr_fast.optim.AdamW(model.parameters(), lr=2e-3, penalty=penalty, lam=1e-4, **kept)


def optimizers(dtype):
    """Fused steps on FSDP2 against one process: the largest difference per optimizer and penalty."""
    found = {}
    for kind, penalty in (("sgd", wcr_fast.WCR), ("adamw", "wcr"), ("adamw", wcr_fast.HoyerSquare)):
        model, plain = sharded(dtype), Net(dtype)
        optimizer = make(kind, model, penalty)
        train(model, optimizer)
        train(plain, make(kind, plain, penalty), whole=True)
        found[kind, type(optimizer.penalty).__name__] = apart(model, plain)
        for p in model.parameters():
            arrays = {name: array for name, array in optimizer.state[p].items() if name != "step"}
            assert arrays
            assert all(isinstance(a, DTensor) and a.placements == p.placements for a in arrays.values())
            if kind == "adamw":
                assert optimizer.state[p]["step"].item() == STEPS
        params = [w.current() for w in optimizer.penalty._choice.weights]
        assert same_everywhere(stats_of(params, 1e-8)[0][:2])  # the pivots below are each rank's own
    return found


def attached(dtype):
    """A penalty attached to torch's own AdamW on FSDP2, or added by hand, against one process."""
    model, plain, by_hand = sharded(dtype), Net(dtype), sharded(dtype)
    for net, whole in ((model, False), (plain, True)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
        wcr_fast.WCR(net, lam=1e-4).attach(optimizer)
        train(net, optimizer, whole)
    optimizer, penalty = torch.optim.AdamW(by_hand.parameters(), lr=2e-3), wcr_fast.WCR(by_hand, lam=1e-4)
    x, y = data(dtype, False)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (by_hand(x) - y).square().mean().backward()
        with torch.no_grad():  # leaves the root's weights gathered
            by_hand(x)
        penalty.add_grad_()
        optimizer.step()
        by_hand.reshard()
    assert apart(by_hand, model) == 0.0
    return {"attach": apart(model, plain)}


def in_the_loss(dtype):
    """lam * psi in the loss, computed before the forward pass or after it, against one process."""
    model, plain, found = sharded(dtype), Net(dtype), {}
    reg, ref = wcr_fast.WCR(model, lam=1e-3), wcr_fast.WCR(plain, lam=1e-3)
    want = ref()
    found["value"] = abs(reg().item() / want.item() - 1)
    assert same_everywhere(reg())
    want.backward()
    reg().backward()
    weights = zip(reg.weights.values(), ref.weights.values(), strict=True)
    found["gradient"] = max((full(p.grad) - q.grad).abs().max().item() / q.grad.abs().max().item() for p, q in weights)
    for net, penalty, whole in ((model, reg, False), (plain, ref, True)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        x, y = data(dtype, whole)
        for step in range(STEPS):
            optimizer.zero_grad()
            early = penalty() if step % 2 else 0.0
            loss = (net(x) - y).square().mean()
            (loss + (early if step % 2 else penalty())).backward()
            optimizer.step()
    found["training"] = apart(model, plain)
    return found


def sums(dtype):
    """A sum of penalties with two r, in the loss and added by hand, and one in a fused step, against one process."""
    model, plain, found = sharded(dtype), Net(dtype), {}
    reg, ref = (
        wcr_fast.WCR(net, 1e-3)
        + wcr_fast.L1(net.first, 1e-2)
        + wcr_fast.FromMoments(net, lambda m, v, n, N: n * v, 1.0)
        for net in (model, plain)
    )
    want = ref()
    found["value"] = abs(reg().item() / want.item() - 1)
    want.backward()
    for way in ("loss", "by hand"):
        model.zero_grad()
        reg().backward() if way == "loss" else reg.add_grad_()
        pairs = [(full(p.grad), q.grad) for p, q in zip(reg.weights.values(), ref.weights.values(), strict=True)]
        found[way] = max((p - q).abs().max().item() / q.abs().max().item() for p, q in pairs)
    for net in (model, plain):
        net.zero_grad()
        penalty = wcr_fast.HoyerSquare(net, 1e-3) + wcr_fast.L1(net.first, 1e-3)
        train(net, wcr_fast.optim.SGD(net.parameters(), lr=0.02, penalty=penalty), whole=net is plain)
    found["fused"] = apart(model, plain)
    return found


def on_weights(dtype):
    """L1 on the weights themselves, beside torch's SGD, against one process; groups that lie on several ranks."""
    found = {}
    for mode in ("proximal", "decoupled"):
        model, plain = sharded(dtype), Net(dtype)
        for net in (model, plain):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            wcr_fast.L1(net, lam=0.05, mode=mode).attach(optimizer)
            train(net, optimizer, whole=net is plain, steps=5)
        found[mode] = apart(model, plain)
    return found


def groups(dtype):
    """Rows and columns that lie on several ranks, against one process."""
    found = {}
    for name, kind, options in (
        ("filters", wcr_fast.GroupLasso, {"weighted": True}),
        ("both", wcr_fast.GroupLasso, {"groups": "both"}),
        ("hoyer", wcr_fast.GroupHoyerSquare, {}),
        ("proximal", wcr_fast.GroupLasso, {"groups": "inputs", "mode": "proximal"}),
    ):
        model, plain = sharded(dtype), Net(dtype)
        for net in (model, plain):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
            penalty = kind(net, lam=0.01, **options)
            penalty.attach(optimizer)
            train(net, optimizer, whole=net is plain, steps=5)
            found.setdefault(f"{name} value", penalty().item())
        found[f"{name} value"] = abs(found[f"{name} value"] / penalty().item() - 1)
        found[name] = apart(model, plain)
    model, plain = sharded(dtype), Net(dtype)
    for net in (model, plain):
        wcr_fast.GroupHoyerSquare(net, lam=0.01)().backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    found["loss"] = max((full(p.grad) - q.grad).abs().max().item() for p, q in pairs if q.grad is not None)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        torch.manual_seed(3)
        whole = torch.randn(5, 3, 6, dtype=dtype)
        parts = [nn.Parameter(distribute_tensor(whole, mesh, [placement])), nn.Parameter(whole.clone())]
        for p in parts:
            wcr_fast.GroupHoyerSquare([p], lam=1.0).add_grad_()
        found[str(placement)] = (full(parts[0].grad) - parts[1].grad).abs().max().item()
    split = nn.ConvTranspose2d(4, 4, 3, groups=2).to(dtype)
    fully_shard(split, mesh=mesh)
    with pytest.raises(TypeError, match=r"weight is a DTensor of a transposed convolution with groups"):
        wcr_fast.GroupLasso(split)()
    return found


def moments(dtype):
    """Moments of cut layers, with equal magnitudes and a degenerate layer among them."""
    model, plain = sharded(dtype), Net(dtype)
    found, want = wcr_fast.WCR(model).moments(), wcr_fast.WCR(plain).moments()
    assert list(found) == list(want) == ["first.weight", "middle.weight", "narrow.weight", "last.weight"]
    assert "115 values" in repr(wcr_fast.WCR(model))
    with torch.no_grad():  # the root stays whole after a forward pass without backward
        model(data(dtype, False)[0])
    assert not isinstance(model.last.weight, DTensor)
    again = wcr_fast.WCR(model).moments()
    model.reshard()
    with torch.no_grad():
        model.middle.weight.copy_(model.middle.weight.sign() * 0.3)
    flat = wcr_fast.L1(model)
    assert flat.moments()["middle.weight"][1] == 0.0
    with pytest.raises(ValueError, match=r"equal in middle\.weight = tied\.weight: variance <= eps"):
        wcr_fast.WCR(model)
    return {
        name: max(abs(a / b - 1) for got in (found, again) for a, b in zip(got[name], want[name], strict=True))
        for name in want
    }


def resume(dtype):
    """Save by torch.distributed.checkpoint's functions, load into new objects, continue: the same bits."""
    kept = {"master": "float32"} if dtype == torch.bfloat16 else {}
    for kind in ("sgd", "adamw"):
        straight = sharded(dtype)
        train(straight, make(kind, straight, wcr_fast.WCR, **kept))
        model = sharded(dtype)
        optimizer = make(kind, model, wcr_fast.WCR, **kept)
        train(model, optimizer, steps=STEPS // 2)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        weights = copy.deepcopy(model.state_dict())
        state = saved["state"]["first.weight"]
        assert all(isinstance(v, DTensor) for k, v in state.items() if k != "step")
        other = sharded(dtype)
        other.load_state_dict(weights)
        fresh = make(kind, other, wcr_fast.WCR, **kept)
        set_optimizer_state_dict(other, fresh, saved)
        assert fresh.param_groups[0]["lam"] == 1e-4
        train(other, fresh, steps=STEPS // 2)
        assert apart(other, straight) == 0.0, apart(other, straight)
    return {}


def placements(dtype):
    """DTensors made by hand: every placement gives the plain layer's gradient, sums are summed or refused."""
    ranks, found = dist.get_world_size(), {}
    line = init_device_mesh("cpu", (ranks,))
    cases = {"rows": (line, [Shard(0)]), "columns": (line, [Shard(1)]), "replicas": (line, [Replicate()])}
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2))
        cases |= {
            "blocks": (square, [Shard(0), Shard(1)]),
            "twice": (square, [Shard(0), Shard(0)]),
            "rows, replicas": (square, [Replicate(), Shard(0)]),
        }
    torch.manual_seed(5)
    whole = nn.Parameter(torch.randn(5, 6, dtype=dtype))
    wcr_fast.WCR([whole], lam=1e-2).add_grad_()
    for label, (mesh, placed) in cases.items():
        cut = nn.Parameter(distribute_tensor(whole.detach(), mesh, placed))
        other = nn.Parameter(torch.randn(3, 3, dtype=dtype))  # plain ones may be among them
        penalty = wcr_fast.WCR([other, cut], lam=1e-2)
        penalty.add_grad_()
        found[label] = ((full(cut.grad) - whole.grad).abs().max() / whole.grad.abs().max()).item()
        assert cut.grad.placements == cut.placements
        assert same_everywhere(stats_of([cut], 1e-8)[0][:2])
    # A replicated weight gets its gradient in parts.
    start = torch.randn(6, 6, dtype=dtype)
    rows = torch.randn(8, 6, dtype=dtype)
    results = []
    for mesh in (None, line):
        for add in (False, True):
            p = start.clone()
            p = nn.Parameter(p if mesh is None else distribute_tensor(p, mesh, [Replicate()]))
            x = rows if mesh is None else distribute_tensor(rows, mesh, [Shard(0)])
            reg = wcr_fast.WCR([p], lam=1e-2)
            optimizer = wcr_fast.optim.SGD([p], lr=0.1, penalty=None if add else reg)
            (x @ p).square().sum().backward()
            assert mesh is None or p.grad.placements[0].is_partial()
            if add:
                reg.add_grad_()
            optimizer.step()
            results.append(full(p))
    found["partial gradients"] = max((r - results[0]).abs().max().item() for r in results)
    with pytest.raises(TypeError, match=r"weights\[0\] is a DTensor with placement .*, sums still to be made"):
        wcr_fast.WCR([DTensor.from_local(start, line, [Partial()])])
    return found


def hybrid(dtype):
    """HSDP: rows over half of the ranks, replicas over the other; the replicas stay equal."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicas", "rows"))
    model, plain = sharded(dtype, mesh), Net(dtype)
    train(model, make("adamw", model, wcr_fast.WCR))
    train(plain, make("adamw", plain, wcr_fast.WCR), whole=True)
    assert same_everywhere(*(full(p) for p in model.parameters()))
    return {"hybrid": apart(model, plain)}


def ddp(dtype):
    """DistributedDataParallel needs nothing: equal to one process, replicas bit-equal."""
    found = {}
    for kind in ("sgd", "adamw"):
        model, plain = DistributedDataParallel(Net(dtype)), Net(dtype)
        train(model, make(kind, model, wcr_fast.WCR))
        train(plain, make(kind, plain, wcr_fast.WCR), whole=True)
        assert same_everywhere(*model.parameters())
        found[kind] = apart(model, plain)
    return found


def built_before(dtype):
    """A penalty built before fully_shard finds the new parameters; an optimizer built before it says so."""
    model, mesh = Net(dtype), init_device_mesh("cpu", (dist.get_world_size(),))
    early = wcr_fast.WCR(model, lam=1e-3)
    want, plain = early.moments(), Net(dtype)
    stale = wcr_fast.optim.SGD(model.parameters(), lr=0.1, penalty=early)
    fully_shard(model, mesh=mesh)
    got = early.moments()
    optimizer = wcr_fast.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, penalty=early, lam=1e-4)
    train(model, optimizer)
    train(plain, make("sgd", plain, wcr_fast.WCR), whole=True)
    with pytest.raises(RuntimeError, match="was replaced by a new parameter"):
        stale.step()
    with pytest.raises(ValueError, match="owns none"):
        early.attach(torch.optim.SGD(plain.parameters()))
    moments = max(abs(a / b - 1) for name in want for a, b in zip(got[name], want[name], strict=True))
    return {"moments": moments, "training": apart(model, plain)}


def refusals(dtype):
    """What doesn't know DTensors yet says so."""
    model = sharded(dtype)
    for call in (wcr_fast.layer_moments, wcr_fast.concentration_penalty):
        with pytest.raises(TypeError, match="is a DTensor: sharded parameters are not supported yet"):
            call(model)
    return {}


def triton(dtype):
    """The kernels' carried moments are merged after each step; writes between two steps are noticed."""
    model, plain = sharded(dtype), Net(dtype)
    kind = "sgd" if dtype == torch.float64 else "adamw"

    @torch.no_grad()
    def halve(net, step):
        if step == 1:
            net.narrow.weight.mul_(0.5)

    with wcr_fast.backend("triton"):
        optimizer = make(kind, model, wcr_fast.WCR)
        train(model, optimizer, steps=3, before=partial(halve, model))
    train(plain, make(kind, plain, wcr_fast.WCR), whole=True, steps=3, before=partial(halve, plain))
    assert same_everywhere(optimizer._plan.stats()[:2], optimizer._plan.coef())
    if kind == "adamw":
        assert {state["step"].item() for state in optimizer.state.values()} == {3.0}
    return {kind: apart(model, plain)}


def one_row(dtype):
    """All weights lie on the first rank; on the others steps are counted, and left out after an overflow, too."""
    found = {}

    def overflow(optimizer, step):
        optimizer.found_inf = torch.tensor(float(step == 1))

    for name in ("torch", "triton"):
        lone, plain = nn.Linear(6, 1, bias=False, dtype=dtype), nn.Linear(6, 1, bias=False, dtype=dtype)
        lone.load_state_dict(plain.state_dict())
        fully_shard(lone, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        for model, whole in ((lone, False), (plain, True)):
            with wcr_fast.backend(name):
                optimizer = make("adamw", model, wcr_fast.WCR)
                train(model, optimizer, whole, steps=3, before=partial(overflow, optimizer))
            assert optimizer.state[model.weight]["step"].item() == 2.0
        found[name] = apart(lone, plain)
    return found


BOTH = (torch.float64, torch.float32)
CHECKS = {
    2: {
        optimizers: BOTH,
        attached: (torch.float64,),
        in_the_loss: BOTH,
        moments: BOTH,
        sums: (torch.float64,),
        groups: BOTH,
        on_weights: (torch.float64,),
        resume: (torch.bfloat16,),
        placements: BOTH,
        ddp: BOTH,
        built_before: (torch.float64,),
        refusals: (torch.float32,),
        triton: BOTH,
        one_row: (torch.float64,),
    },
    4: {
        optimizers: BOTH,
        attached: (torch.float32,),
        in_the_loss: (torch.float64,),
        moments: BOTH,
        resume: (torch.float32,),
        placements: BOTH,
        hybrid: BOTH,
    },
}


def work(rank, ranks, folder, skipped):
    """Run all checks of a group of this size; leave what they found in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    found = {}
    for check, dtypes in CHECKS[ranks].items():
        for dtype in dtypes if check.__name__ not in skipped else ():
            try:
                found[check.__name__, dtype] = check(dtype)
            except Exception:
                found[check.__name__, dtype] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # one ordinary exit in some twenty is aborted by a thread of torch's that is still running
