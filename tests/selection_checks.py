"""What every rank of a gloo group does for test_sharded_selection.py: each check fails, or returns bytes sent."""

import copy
import itertools
import os
import traceback
import warnings
from datetime import timedelta

import pytest
import reference_selection as reference
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import wcr_fast
from wcr_fast.ops.ranks import traffic
from wcr_fast.pruning import Masks
from wcr_fast.torch_path.blocks import MemorySource

SPARSITIES = (0.0, 0.5, 0.9, 1.0)
VALUES = {
    "normal": torch.randn,
    "ties": lambda *shape: torch.randint(-2, 3, shape) / 4,
    "equal": lambda *shape: torch.full(shape, -0.5),
    "zeros": lambda *shape: torch.randn(shape) * (torch.rand(shape) < 0.3),
}


def mesh_of(*shape, names=None):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def cut(tensor, mesh, placements):
    """Return a tensor as a DTensor; None: plain, on every rank."""
    return tensor.clone() if mesh is None else distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8) if tensor.dim() else tensor.detach().view(1).view(torch.uint8)


def here(tensor):
    """Return this rank's shard, or a plain tensor as it is: all ranks compare, so nothing need be gathered."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def agree(value):
    """Check that all ranks have the same value."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    assert all(other == everyone[0] for other in everyone), everyone


def compare(tensors, layouts, scope, sparsity, everywhere=True):
    """Threshold, masks and prune_ of DTensors against those of the whole tensors, bit for bit."""
    parts = [cut(t, *layout) for t, layout in zip(tensors, layouts, strict=True)]
    plain = [t.clone() for t in tensors]
    want = reference.masks(tensors, sparsity, scope)
    assert all(map(torch.equal, wcr_fast.magnitude_masks(tensors, sparsity, scope=scope), want))
    masks = wcr_fast.magnitude_masks(parts, sparsity, scope=scope)
    for mask, keep, part, layout in zip(masks, want, parts, layouts, strict=True):
        assert isinstance(mask, DTensor) == isinstance(part, DTensor)
        if isinstance(part, DTensor):
            assert mask.placements == part.placements
            assert mask.shape == part.shape
        assert torch.equal(here(mask), here(cut(keep, *layout))), (scope, sparsity)
    if scope in ("global", "layer"):
        threshold = wcr_fast.magnitude_threshold(parts, [sparsity, 0.3], scope=scope)
        assert type(threshold) is torch.Tensor
        assert torch.equal(threshold, wcr_fast.magnitude_threshold(tensors, [sparsity, 0.3], scope=scope))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = wcr_fast.prune_(parts, sparsity, scope=scope)
        assert record == wcr_fast.prune_(plain, sparsity, scope=scope)
    if everywhere:
        agree(record)
    for part, other, layout in zip(parts, plain, layouts, strict=True):
        assert torch.equal(bits(here(part)), bits(here(cut(other, *layout)))), (scope, sparsity)


def layouts_for(ranks):
    line = mesh_of(ranks)
    found = [(line, [Shard(d)]) for d in (0, 1, 2)] + [(line, [Replicate()]), (None, None)]
    if ranks == 4:
        square = mesh_of(2, 2)
        found += [
            (square, [Shard(0), Shard(1)]),
            (square, [Shard(1), Shard(0)]),
            (square, [Shard(0), Shard(0)]),
            (square, [Shard(2), Shard(1)]),
            (square, [Replicate(), Shard(1)]),
            (square, [Shard(0), Replicate()]),
            (square, [_StridedShard(0, split_factor=2), Shard(0)]),
            (square, [_StridedShard(1, split_factor=2), Shard(1)]),
        ]
    return found


def every_placement():
    """One weight cut along each dimension, evenly or not, with empty shards; each copy is a layer."""
    layouts = layouts_for(dist.get_world_size())
    for kind, shape in itertools.product(("ties", "equal"), ((6, 5, 3), (1, 2, 4), (4, 8, 2, 3))):
        torch.manual_seed(1)
        tensors = [VALUES[kind](*shape)] * len(layouts)
        for scope, sparsity in (("layer", 0.5), ("row", 0.5), ("2:4", None), ("2:3", None)):
            compare(tensors, layouts, scope, sparsity)
        for i, layout in enumerate(layouts if (kind, shape[0]) == ("ties", 6) else ()):
            # with the cut in any of the three
            compare(tensors[:3], [layouts[i - 1], layout, layouts[i - 2]], "global", 0.5)


def lists():
    """Lists of differently cut weights, plain ones among them, of mixed dtypes; all scopes and sparsities."""
    shapes = [(9, 4, 3, 3), (1, 7), (16, 8), (3, 3, 2), (5,), (0, 3), (2, 2, 2), (11, 12), (3, 3, 3), (8, 4), (6, 6)]
    layouts = layouts_for(dist.get_world_size())
    for kind, dtypes in (
        ("zeros", [torch.float32]),
        ("ties", [torch.float32, torch.bfloat16, torch.float64, torch.float16]),
    ):
        torch.manual_seed(2)
        tensors, placed = [], []
        for i, shape in enumerate(shapes * 2):
            tensors.append(VALUES[kind](*shape).to(dtypes[i % len(dtypes)]))
            usable = [x for x in layouts if x[0] is None or fits(x[1], len(shape))]
            placed.append(usable[i % len(usable)])
        for scope in ("global", "layer", "row"):
            for sparsity in SPARSITIES:
                compare(tensors, placed, scope, sparsity)
        compare(tensors, placed, "1:4", None)


def fits(placements, dims):
    return all(getattr(p, "dim", -1) < dims for p in placements)


def several_meshes():
    """Meshes that none of the list's spans meet in the default group; a mesh of some ranks doesn't need the others."""
    torch.manual_seed(8)
    tensors = [VALUES["ties"](6, 8), VALUES["ties"](5, 3), VALUES["ties"](4, 4)]
    both = mesh_of(2, dist.get_world_size() // 2, names=("a", "b"))
    layouts = [(both["a"], [Shard(0)]), (both["b"], [Shard(1)]), (None, None)]
    for scope, sparsity in (("global", 0.5), ("layer", 0.5), ("row", 0.5), ("2:4", None)):
        compare(tensors, layouts, scope, sparsity)
        compare(tensors, [(both, [Replicate(), Shard(0)]), *layouts[1:]], scope, sparsity)
    pair = DeviceMesh("cpu", [0, 1])
    if dist.get_rank() < 2:
        compare(tensors, [(pair, [Shard(0)]), (pair, [Shard(1)]), (None, None)], "global", 0.5, everywhere=False)
    elif dist.get_rank() == 2:
        part = DTensor.from_local(torch.empty(0), pair, [Shard(0)], run_check=False, shape=(6, 8), stride=(8, 1))
        with pytest.raises(ValueError, match="no part of their mesh"):
            wcr_fast.prune_([part], 0.5)


def cannot_run(tensors):
    raise RuntimeError("no GPU")


def kernels():
    """Triton's kernels count for the search over all ranks, and write the shards; where one rank can't, none counts."""
    torch.manual_seed(8)
    tensors = [VALUES["ties"](6, 8), VALUES["normal"](5, 3), VALUES["ties"](4, 4)]
    line = mesh_of(dist.get_world_size())
    layouts = [(line, [Shard(d)]) for d in (0, 1, 0)]
    with wcr_fast.backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.delattr(MemorySource, "streams")
        if dist.get_world_size() == 2:  # the interpreter takes its time
            for scope, sparsity in (("global", 0.5), ("layer", 0.5), ("row", 0.5), ("2:4", None)):
                compare(tensors, layouts, scope, sparsity)
        compare([t.bfloat16() for t in tensors], layouts, "global", 0.3)
        compare([tensors[0].half(), tensors[1].double(), tensors[2]], layouts, "layer", 0.3)
    with wcr_fast.backend("torch" if dist.get_rank() == 0 else "triton"):
        parts = [cut(t, *layout) for t, layout in zip(tensors, layouts, strict=True)]
        assert torch.equal(*(wcr_fast.magnitude_threshold(listed, 0.7) for listed in (parts, tensors)))
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr("wcr_fast.ops.paths.use_triton", cannot_run)
        with pytest.raises(RuntimeError, match=r"no GPU|another process can't run"):
            wcr_fast.magnitude_threshold(parts, 0.7)


def large():
    """Weights large enough for samples and windows: bytes sent."""
    torch.manual_seed(3)
    ranks, sent = dist.get_world_size(), {}
    shapes = [(256, 64, 3, 3), (300, 501), (1000, 64), (64, 3, 7, 7)]
    line = mesh_of(ranks)
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("normal", "ties"):
            tensors = [VALUES[kind](*shape).to(dtype) for shape in shapes]
            layouts = [(line, [Shard(i % 3 if len(t.shape) > 2 else i % 2)]) for i, t in enumerate(tensors)]
            for scope in ("global", "layer"):
                for sparsity in (0.5, 0.9):
                    with traffic() as counted:
                        compare(tensors, layouts, scope, sparsity)
                    sent[f"{dtype} {kind} {scope} {sparsity}"] = counted.bytes / 3  # calls
    return sent


def transposed():
    """Rows and n:m groups of transposed convolutions, whose inputs come first, with and without groups."""
    for groups, inputs in ((1, 7), (2, 12), (4, 8), (3, 9)):
        for m in ("2:4", "1:3"):
            torch.manual_seed(4)
            plain = nn.Sequential(nn.ConvTranspose2d(inputs, 6 * groups, 2, groups=groups), nn.Conv2d(6 * groups, 5, 1))
            for dim in (0, 1, 2):
                for scope, sparsity in (("row", 0.5), (m, None)):
                    one, other = copy.deepcopy(plain), copy.deepcopy(plain)
                    for module in other:
                        part = cut(module.weight.detach(), mesh_of(dist.get_world_size()), [Shard(dim)])
                        module.weight = nn.Parameter(part)
                    assert wcr_fast.prune_(one, sparsity, scope=scope) == wcr_fast.prune_(other, sparsity, scope=scope)
                    for a, b in zip(one, other, strict=True):
                        assert torch.equal(a.weight, whole(b.weight)), (groups, dim, scope)


class Net(nn.Module):
    """A tied weight, a norm, and a last layer of one row: no shard of it on most ranks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.middle = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.middle.weight
        self.last = nn.Linear(8, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.tied(torch.tanh(self.middle(self.norm(torch.tanh(self.first(x))))))))


def fsdp(mesh=None):
    model = Net()
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_and_tensor_parallel():
    mesh = mesh_of(2, dist.get_world_size() // 2, names=("dp", "tp"))
    model = nn.Sequential(Net().first, nn.Tanh(), nn.Linear(8, 12), nn.Linear(12, 4))
    torch.manual_seed(9)
    for p in model.parameters():
        nn.init.normal_(p)
    plain = copy.deepcopy(model)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"]), plain


def models():
    """FSDP2, HSDP, tensor parallel under FSDP2: prune_ gives the very same weights and record."""
    ranks = dist.get_world_size()
    made = [lambda: (fsdp(mesh_of(ranks)), Net())]
    if ranks == 4:
        made += [lambda: (fsdp(mesh_of(2, 2, names=("replicas", "rows"))), Net()), fsdp_and_tensor_parallel]
    for make in made:
        for scope, sparsity in (("global", 0.5), ("layer", 0.5), ("row", 0.5), ("2:4", None)):
            model, plain = make()
            names = list(model.state_dict())
            record, want = (wcr_fast.prune_(m, sparsity, scope=scope) for m in (model, plain))
            assert record == want
            agree(record)
            assert list(model.state_dict()) == names
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                assert torch.equal(bits(whole(p)), bits(q))
        model, plain = make()
        for call in (
            lambda m: Masks.from_sparsity(m, 0.5),
            lambda m: Masks.from_threshold(m, 0.1),
            lambda m: Masks.from_masks(wcr_fast.magnitude_masks(m, 0.5), m),
            Masks.from_model,
        ):
            masks, want = call(model), call(plain)
            assert list(masks) == list(want)
            assert all(torch.equal(masks[name], want[name]) for name in want)
        masks = Masks.from_sparsity(model, 0.75)
        masks.apply_(model)
        Masks.from_sparsity(plain, 0.75).apply_(plain)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(whole(p), q)


def curve():
    """pruning_curve: the values of the whole model at every sparsity, and the shards given back."""
    model, plain = fsdp(mesh_of(dist.get_world_size())), Net()
    before = {name: p.to_local().clone() for name, p in model.named_parameters()}
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))

    def evaluate(m):
        with torch.no_grad():  # leaves the root's weights gathered
            return m(x).sum().item()

    for scope in ("global", "layer", "row"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got, want = (wcr_fast.pruning_curve(m, evaluate, [0.9, 0.0, 0.5], scope=scope) for m in (model, plain))
        assert got == want
        assert len(set(got.values)) == 3
        agree(got.points)
        assert all(torch.equal(p.to_local(), before[name]) for name, p in model.named_parameters())
    evaluate(model)
    assert wcr_fast.prune_(model, 0.5) == wcr_fast.prune_(plain, 0.5)  # gathered weights are handed back first
    assert evaluate(model) == evaluate(plain)


def noticed():
    """A backward pass across prune_ raises, as it does for plain weights."""
    weight = nn.Parameter(cut(torch.randn(4, 4), mesh_of(dist.get_world_size()), [Shard(0)]))
    loss = weight.square().sum()
    wcr_fast.prune_([weight], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def failures():
    """All ranks raise, whichever of them has the fault, nothing is written, and none is left waiting."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    line = mesh_of(ranks)
    torch.manual_seed(5)
    whole_weight = torch.randn(8, 6)
    for scope, sparsity in (("global", 0.5), ("layer", 0.5), ("row", 0.5), ("2:4", None)):
        spoilt = whole_weight.clone()
        spoilt[-1, -1] = torch.nan
        parts = [("a", cut(whole_weight, line, [Shard(0)])), ("b", cut(spoilt, line, [Shard(0)]))]
        with pytest.raises(ValueError, match=r"prune_: b holds NaN.*nothing was written"):
            wcr_fast.prune_(parts, sparsity, scope=scope)
        with pytest.raises(ValueError, match=r"weights\[1\] holds NaN"):
            wcr_fast.magnitude_masks([p for _, p in parts], sparsity, scope=scope)
        assert torch.equal(whole(parts[0][1]), whole_weight)
    with pytest.raises(ValueError, match="holds NaN"):
        wcr_fast.magnitude_threshold([parts[1][1]], 0.5)
    with pytest.raises(ValueError, match="b holds NaN"):
        Masks.from_threshold(parts, 0.5)
    part = parts[0][1]
    with pytest.raises(TypeError, match="sums still to be made: redistribute it"):
        wcr_fast.prune_([DTensor.from_local(whole_weight, line, [Partial()])], 0.5)
    with pytest.raises(ValueError, match="share memory"):
        wcr_fast.prune_([part, part], 0.5)
    if ranks == 1:
        return
    last = rank == ranks - 1
    # One rank's shard can't be written.
    shard = torch.randn(2, 1).expand(2, 6) if last else torch.randn(2, 6)
    odd = DTensor.from_local(shard, line, [Shard(0)], run_check=False, shape=(2 * ranks, 6), stride=(6, 1))
    with pytest.raises(ValueError if last else RuntimeError, match="expanded" if last else "another process"):
        wcr_fast.prune_([odd], 0.5)
    # Other arguments, other weights on one rank.
    with pytest.raises(ValueError, match="all must make the same call"):
        wcr_fast.prune_([part], 0.25 if last else 0.5)
    with pytest.raises(ValueError, match="all must make the same call"):
        wcr_fast.magnitude_masks([part, part] if last else [part], 0.5)
    # Shards cut otherwise than torch cuts.
    sizes = [3, *[1] * (ranks - 1)]
    uneven = DTensor.from_local(
        torch.randn(sizes[rank], 6), line, [Shard(0)], run_check=False, shape=(sum(sizes), 6), stride=(6, 1)
    )
    with pytest.raises((ValueError, RuntimeError), match=r"can't be placed|can't place its shards"):
        wcr_fast.prune_([uneven], 0.5)
    assert torch.equal(whole(part), whole_weight)


def strided_memory():
    """channels_last and transposed shards: logical order counts."""
    ranks = dist.get_world_size()
    torch.manual_seed(6)
    tensors = [VALUES["ties"](8, 6, 3, 3).to(memory_format=torch.channels_last), VALUES["ties"](8, 12).t()]
    for dims in ((0, 0), (1, 1)):
        for scope, sparsity in (("global", 0.4), ("layer", 0.7), ("row", 0.4), ("2:4", None)):
            compare(tensors, [(mesh_of(ranks), [Shard(d)]) for d in dims], scope, sparsity)


CHECKS = {
    1: (every_placement, lists, kernels, models, curve, noticed, failures),
    2: (
        every_placement,
        lists,
        large,
        transposed,
        several_meshes,
        kernels,
        models,
        curve,
        noticed,
        failures,
        strided_memory,
    ),
    4: (every_placement, lists, transposed, several_meshes, kernels, failures),
}


def work(rank, ranks, folder, skipped=(), only=()):
    """Run the checks of a group of this size, or some of them; leave what they found in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    found = {}
    for check in CHECKS[ranks]:
        if check.__name__ in skipped or (only and check.__name__ not in only):
            continue
        try:
            found[check.__name__] = check() or {}
        except Exception:
            found[check.__name__] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # one ordinary exit in some twenty is aborted by a thread of torch's that is still running
