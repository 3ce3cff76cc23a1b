"""What every rank of a gloo group does for test_perturbed_ranks.py: each check returns what it found, or fails."""

import copy
import os
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import wcr_fast
from wcr_fast.optim import ASAM, S2SAM, SAM, CrAM, CrAMPlus

KINDS = {
    "sam": (SAM, {"rho": 0.2}),
    "asam": (ASAM, {"rho": 0.7}),
    "cram": (CrAM, {"rho": 0.3, "sparsities": [0.3, 0.5, 0.7]}),
    "cram layer": (CrAM, {"rho": 0.3, "sparsities": [0.3, 0.6], "scope": "layer"}),
    "cram+": (CrAMPlus, {"rho": 0.3, "sparsities": [0.4, "2:4"]}),
    "s2sam": (S2SAM, {"rho": 0.2}),
}


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()


def batch(k, whole):
    generator = torch.Generator().manual_seed(k)
    x, y = torch.randn(16, 8, generator=generator, dtype=torch.float64), torch.randint(4, (16,), generator=generator)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    return (x, y) if whole else (x.chunk(ranks)[rank], y.chunk(ranks)[rank])


def train(model, optimizer, steps, whole, seen=None):
    for k in range(steps):
        x, y = batch(k, whole)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            if seen is not None and optimizer.perturbed:
                seen.append([p.detach().clone() for p in model.parameters()])
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def built(name, model, **more):
    kind, options = KINDS[name]
    return kind(model, torch.optim.SGD, lr=0.1, momentum=0.9, **options, **more)


def full(p):
    return p.full_tensor() if isinstance(p, DTensor) else p.detach()


def apart(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((full(a) - full(b)).abs().max().item() for a, b in pairs)


def replicas_equal(model):
    for p in model.parameters():
        mine = p.detach().clone()
        dist.broadcast(mine, 0)
        assert torch.equal(mine, p.detach())


def per_worker():
    """Replicas stay equal, and step by the mean of the workers' own SAM gradients."""
    model, other = net(), net()
    parallel = DistributedDataParallel(model)
    optimizer, seen = built("sam", parallel), []
    train(parallel, optimizer, 50, False, seen)
    replicas_equal(model)
    first = seen[0][0].clone()
    dist.broadcast(first, 0)
    assert dist.get_rank() == 0 or not torch.equal(first, seen[0][0])  # perturbed by gradients of their own
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for k in range(50):
        alone = copy.deepcopy(other)
        lone = SAM(alone, torch.optim.SGD, rho=0.2, lr=0.1)
        lone.base_optimizer.step = lambda: None  # only its gradient is wanted
        x, y = batch(k, False)

        def closure(x=x, y=y, alone=alone, lone=lone):
            lone.zero_grad()
            nn.functional.cross_entropy(alone(x), y).backward()

        lone.step(closure)
        for p, q in zip(other.parameters(), alone.parameters(), strict=True):
            dist.all_reduce(q.grad)
            p.grad = q.grad / dist.get_world_size()
        plain.step()
    return apart(model, other)


def synchronised():
    """All the workers' SAM is that of one process with the whole batch."""
    found = {}
    for name in KINDS:
        model, other = net(), net()
        more = {"per_worker": False} if name in ("sam", "asam") else {}
        train(parallel := DistributedDataParallel(model), built(name, parallel, **more), 10, False)
        train(other, built(name, other), 10, True)
        replicas_equal(model)
        found[name] = apart(model, other)
    return found


def same_masks():
    """CrAM draws the same sparsity, and prunes the same weights, on all ranks."""
    for name in ("cram", "cram layer", "cram+"):
        model, seen = DistributedDataParallel(net()), []
        train(model, built(name, model), 8, False, seen)
        for weights in seen:
            for w in weights:
                zero = (w == 0).to(torch.int32)
                total = zero.clone()
                dist.all_reduce(total)
                assert torch.equal(total, zero * dist.get_world_size())
        counts = {sum(int((w == 0).sum()) for w in weights) for weights in seen}
        assert len(counts) > 1, counts
    return 0.0


def accumulated():
    """Micro-batches one by one, where gradients are views of the buckets that the next pass writes to."""
    found = {}
    for name in ("sam", "cram+"):
        models = net(), net()
        wrapped = [
            DistributedDataParallel(m, gradient_as_bucket_view=views)
            for m, views in zip(models, (True, False), strict=True)
        ]
        for model in wrapped:
            optimizer = built(name, model)
            for k in range(3):
                optimizer.zero_grad()
                x, y = batch(k, False)
                for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
                    optimizer.accumulate(lambda a=a, b=b, m=model: nn.functional.cross_entropy(m(a), b).backward())
                optimizer.step()
        replicas_equal(models[0])
        found[name] = apart(*models)
    return found


def workers_that_cannot():
    """A compiled module's workers are found; a static graph is refused."""
    parallel = DistributedDataParallel(net())
    assert built("sam", torch.compile(parallel, backend="eager"))._parallel() is parallel
    assert built("sam", net())._parallel() is None
    assert built("sam", parallel, per_worker=False)._parallel() is None
    fixed = DistributedDataParallel(net(), static_graph=True)
    with pytest.raises(RuntimeError, match="per_worker=False"):
        train(fixed, built("sam", fixed), 1, False)
    return 0.0


def fsdp_that_keeps_whole_weights():
    models = net(), net()
    fully_shard(models[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    models[0].set_reshard_after_backward(False)
    for model, whole in zip(models, (False, True), strict=True):
        train(model, built("sam", model), 4, whole)
    return apart(*models)


def fsdp_by_the_forward_pass():
    """S2SAM's hook, with an evaluation before each step, after which FSDP2 keeps whole weights at hand."""
    models = net(), net()
    fully_shard(models[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for model, whole in zip(models, (False, True), strict=True):
        optimizer = S2SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, model=model)
        for k in range(4):
            x, y = batch(k, whole)
            with torch.no_grad():
                model.eval()(x)
            model.train()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return apart(*models)


def fsdp():
    """Shards: norms, thresholds and gradients are those of the whole weights."""
    found = {}
    for name in KINDS:
        for base in (torch.optim.AdamW, wcr_fast.optim.SGD):
            models = net(), net()
            fully_shard(models[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
            kind, options = KINDS[name]
            for model, whole in zip(models, (False, True), strict=True):
                optimizer = kind(model, base, lr=0.02, **options)
                train(model, optimizer, 5, whole)
                saved = optimizer.state_dict()
                optimizer.load_state_dict(saved)
                train(model, optimizer, 3, whole)
            found[name, base.__module__] = apart(*models)
    return found


def overflow_of_one():
    """Where one worker's own gradient overflows, all of them skip the step."""
    model = net().float()
    parallel = DistributedDataParallel(model)
    optimizer = built("sam", parallel)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch(0, False)

    def closure():
        optimizer.zero_grad()
        loss = scaler.scale(nn.functional.cross_entropy(parallel(x.float()), y))
        loss.backward()
        if dist.get_rank() == 0 and not optimizer.perturbed:
            model[0].bias.grad[0] = float("inf")

    optimizer.step(closure, scaler=scaler)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return 0.0


CHECKS = (
    per_worker,
    synchronised,
    same_masks,
    accumulated,
    workers_that_cannot,
    fsdp,
    fsdp_that_keeps_whole_weights,
    fsdp_by_the_forward_pass,
    overflow_of_one,
)


def work(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    found = {}
    for check in CHECKS:
        try:
            found[check.__name__] = check()
        except Exception:
            found[check.__name__] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # one ordinary exit in some twenty is aborted by a thread of torch's that is still running
