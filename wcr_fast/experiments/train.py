"""One training run of the demo: train, then accuracy along the sparsities, without and with re-estimation."""

from __future__ import annotations

import gc
import hashlib
import time
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wcr_fast.experiments import methods, plan
from wcr_fast.experiments.digits import Digits, Part, build_net
from wcr_fast.pruning.curve import pruning_curve

#: Edges of the recorded histogram of |w|: eight bins a decade, the first also takes zeros, the last the rest.
MAGNITUDE_EDGES = 10.0 ** (np.arange(-64, 9) / 8)


def train(run: plan.Run, train_part: Part) -> nn.Module:
    """Return the net of one run, trained, in eval mode."""
    return _train(run, train_part)[0].eval()


def _train(run: plan.Run, train_part: Part) -> tuple[nn.Module, torch.optim.Optimizer, list[Any]]:
    """Train one run, the only training loop of the demo; return the net, its optimizer and its penalties.

    The seed fixes initialisation and the order of batches, so all methods start alike. An optimizer evaluates the
    closure as often as its method asks; penalties act in its step. An incomplete last batch of an epoch is dropped.
    """
    method = methods.BY_KEY[run.method]
    shuffle = torch.Generator().manual_seed(run.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        net = build_net()
    optimizer = method.optimizer(net, run.strength)
    penalties = method.penalties(net, run.strength)
    for penalty in penalties:
        penalty.attach(optimizer)
    per_epoch = len(train_part) // plan.BATCH_SIZE
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs * per_epoch)
    net.train()
    for _ in range(run.epochs):
        order = torch.randperm(len(train_part), generator=shuffle)
        for rows in order[: per_epoch * plan.BATCH_SIZE].split(plan.BATCH_SIZE):

            def closure(rows: Tensor = rows) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(train_part.images[rows]), train_part.labels[rows])
                loss.backward()
                return loss

            optimizer.step(closure)
            schedule.step()
    return net, optimizer, penalties


def held_copies(method: str, strength: float, train_part: Part) -> float:
    """Return how much memory a method holds between two steps beyond net and gradients, in copies of the parameters.

    Tensors are counted that training for an epoch left behind: states, copies, caches; plain SGD's momentum is one.
    """
    before = _storages()
    net, optimizer, penalties = _train(plan.Run(method, strength, 0, 1), train_part)
    of_net = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    of_net |= {p.grad.untyped_storage().data_ptr() for p in net.parameters() if p.grad is not None}
    held = sum(size for place, size in _storages().items() if place not in before and place not in of_net)
    del optimizer, penalties
    return held / sum(p.numel() * p.element_size() for p in net.parameters())


def _storages() -> dict[int, int]:
    """Return the sizes in bytes of all tensors there are, by address."""
    gc.collect()
    found = [t.untyped_storage() for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@torch.no_grad()
def count_correct(net: nn.Module, part: Part) -> int:
    """Return how many images of a part the net classifies correctly."""
    return int((net(part.images).argmax(1) == part.labels).sum())


def _weights(net: nn.Module) -> list[Tensor]:
    return [p.detach() for p in net.parameters() if p.dim() > 1]


def _count_magnitudes(net: nn.Module) -> list[int]:
    magnitudes = torch.cat([w.flatten() for w in _weights(net)]).abs().numpy()
    edges = np.concatenate([[0.0], MAGNITUDE_EDGES[1:-1], [np.inf]])
    return np.histogram(magnitudes, edges)[0].tolist()


def _digest(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _curve(net: nn.Module, digits: Digits, recalibrate: list[Tensor] | None) -> dict[str, list[int]]:
    """Return the counts of correct answers per sparsity, on the validation and the test part."""

    def evaluate(pruned: nn.Module) -> tuple[int, int]:
        return count_correct(pruned, digits.val), count_correct(pruned, digits.test)

    with warnings.catch_warnings():
        # At 98 and 99 % a layer may lose everything, which prune_ warns of: here it is what is measured.
        warnings.simplefilter("ignore")
        curve = pruning_curve(net, evaluate, plan.SPARSITIES, recalibrate=recalibrate)
    val, test = zip(*(point.value for point in curve.points), strict=True)
    return {"val": list(val), "test": list(test)}


def execute(run: plan.Run, digits: Digits) -> dict[str, Any]:
    """Train one run and return its row of results.json, plain values only.

    ``correct`` holds the numbers of correct answers at each sparsity, as pruned (``"as_is"``) and with
    batch-norm statistics re-estimated on the training images (``"re_estimated"``). A run whose weights are
    no longer finite can't be pruned: it is marked ``diverged`` and counts nothing as correct.
    """
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = train(run, digits.train)
    trained = time.perf_counter() - start
    diverged = not all(bool(torch.isfinite(w).all()) for w in _weights(net))
    if diverged:
        nothing = {"val": [0] * len(plan.SPARSITIES), "test": [0] * len(plan.SPARSITIES)}
        correct = {"as_is": nothing, "re_estimated": nothing}
    else:
        correct = {
            "as_is": _curve(net, digits, None),
            "re_estimated": _curve(net, digits, digits.train.batches(plan.BATCH_SIZE)),
        }
    return {
        "method": run.method,
        "strength": run.strength,
        "seed": run.seed,
        "epochs": run.epochs,
        "diverged": diverged,
        "warnings": sorted({str(warning.message) for warning in caught}),
        "correct": correct,
        "magnitudes": [0] * (len(MAGNITUDE_EDGES) - 1) if diverged else _count_magnitudes(net),
        "weights_sha256": _digest(net),
        "train_seconds": round(trained, 3),
        "seconds": round(time.perf_counter() - start, 3),
    }
