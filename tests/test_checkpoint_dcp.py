"""Pruning folders of torch.distributed.checkpoint: as unsharded weights would be pruned, other bytes untouched."""

import io
import os
import pickle
import shutil
import warnings
import zipfile
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import reference_selection as reference
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_tools import load_dcp, write_dcp
from torch import nn
from torch.distributed.checkpoint import metadata as md
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict import get_state_dict

from wcr_fast import cli
from wcr_fast.errors import UsageError
from wcr_fast.pruning import checkpoint_cuts, checkpoint_plan, checkpoint_write, dcp_files, file_keys, tie_order
from wcr_fast.pruning.checkpoint import prune_checkpoint


def tensors(ties=True):
    def weights(*shape):
        drawn = torch.randn(*shape)
        return (drawn * 4).round() / 4 if ties else drawn

    return {
        "model.b.weight": weights(12, 30),
        "model.a.weight": weights(6, 8, 3, 3).bfloat16(),
        "model.c.weight": weights(8, 20).half(),
        "model.a.bias": weights(24),
        "step": 7,
        "optim.state.a.weight.exp_avg": weights(12, 30),
        "ids": torch.arange(12).reshape(3, 4),
        "model.d.weight": weights(9, 4, 2).double(),
        "model.empty": torch.empty(0, 3),
    }


NAMES = ["model.b.weight", "model.a.weight", "model.c.weight", "model.d.weight"]
LAYOUTS = {
    "whole": {},
    "dim 0": {"model.b.weight": {0: [5, 6]}, "model.a.weight": {0: [2]}, "model.d.weight": {0: [3, 8, 9]}},
    "dim 1": {"model.b.weight": {1: [4, 12]}, "model.a.weight": {1: [4]}, "model.c.weight": {1: [12, 16]}},
    "grid": {
        "model.b.weight": {0: [5], 1: [4, 20]},
        "model.a.weight": {0: [1], 2: [1], 3: [2]},
        "model.d.weight": {1: [1], 2: [1]},
    },
}


def same_bits(first, second):
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def assert_pruned(root, before, sparsity, scope="global"):
    out = load_dcp(root, before)
    keep = dict(zip(NAMES, reference.masks([before[n] for n in NAMES], sparsity, scope), strict=True))
    for name, tensor in out.items():
        kept = keep.get(name)
        want = before[name] if kept is None else torch.where(kept, before[name], torch.zeros_like(before[name]))
        assert same_bits(tensor, want), name
    return keep


@pytest.fixture(params=["small blocks", "large blocks"])
def block_size(request, monkeypatch):
    if request.param == "small blocks":
        for module in (checkpoint_cuts, checkpoint_plan, checkpoint_write):
            monkeypatch.setattr(module, "BLOCK_BYTES", 512)
        monkeypatch.setattr(file_keys, "SWEEP_BYTES", 192)
        monkeypatch.setattr(tie_order, "BINS", 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("scope", "sparsity"), [("global", 0.37), ("global", 0.9), ("layer", 0.61), ("row", 0.5), ("2:4", None)]
)
def test_as_unsharded(tmp_path, layout, scope, sparsity, block_size):
    before = tensors()
    write_dcp(tmp_path / "in", before, LAYOUTS[layout])
    run = partial(prune_checkpoint, tmp_path / "in", sparsity=sparsity, scope=scope)
    if (scope == "row" and layout in ("dim 1", "grid")) or (scope == "2:4" and layout == "grid"):
        with pytest.raises(UsageError, match="sharded within its"):
            run(target=tmp_path / "out")
        assert os.listdir(tmp_path) == ["in"]
        return
    record = run(target=tmp_path / "out")
    keep = assert_pruned(tmp_path / "out", before, sparsity, scope)
    assert [layer.name for layer in record.per_layer] == NAMES
    assert [layer.removed for layer in record.per_layer] == [int((~keep[n]).sum()) for n in NAMES]
    assert run(target=None, dry_run=True).per_layer == record.per_layer


@pytest.mark.parametrize("ties", [True, False])
def test_several_sparsities(tmp_path, ties, block_size):
    before = tensors(ties)
    write_dcp(tmp_path / "in", before, LAYOUTS["grid"])
    for record in prune_checkpoint(tmp_path / "in", None, [0.2, 0.55, 0.8, 1.0], dry_run=True):
        keep = reference.masks([before[n] for n in NAMES], record.requested, "global")
        assert [layer.removed for layer in record.per_layer] == [int((~k).sum()) for k in keep]


def items(root):
    """The bytes of every entry, by name and offset."""
    meta = pickle.loads((root / ".metadata").read_bytes())
    return {
        index: (root / place.relative_path).read_bytes()[place.offset :][: place.length]
        for index, place in meta.storage_data.items()
    }


def test_only_the_numbers_and_their_checksums_change(tmp_path):
    before = tensors()
    write_dcp(tmp_path / "in", before, LAYOUTS["grid"])
    (tmp_path / "in" / "config.json").write_text("{}")
    prune_checkpoint(tmp_path / "in", tmp_path / "out", 0.7)
    old, new = items(tmp_path / "in"), items(tmp_path / "out")
    assert old.keys() == new.keys()
    for index, data in new.items():
        if index.fqn not in NAMES:
            assert data == old[index], index
            continue
        archives = [zipfile.ZipFile(io.BytesIO(d)) for d in (old[index], data)]
        assert archives[1].testzip() is None
        changed = [n for n in archives[0].namelist() if archives[0].read(n) != archives[1].read(n)]
        assert changed in ([], [n for n in archives[0].namelist() if n.endswith("/data/0")])
    for name in (".metadata", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


def quietly(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def test_a_training_run(tmp_path):
    """What torch itself saves of a model and its optimizer, with several files."""
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Conv2d(3, 7, 3))
    model[0](torch.randn(2, 40)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, "epoch": 3}
    writer = dcp.FileSystemWriter(tmp_path / "in", thread_count=3)
    quietly(lambda: dcp.save(saved, storage_writer=writer, no_dist=True))
    record = prune_checkpoint(tmp_path / "in", tmp_path / "out", 0.6, exclude="model.2")
    assert [layer.name for layer in record.per_layer] == ["model.0.weight"]
    assert dict(record.left_out)["optimizer.state.0.weight.exp_avg"] == "optimizer state"
    assert len(record.pruned_files) == 3
    loaded = {"model": {n: torch.zeros_like(w) for n, w in weights.items()}, "optimizer": state, "epoch": 0}
    quietly(lambda: dcp.load(loaded, checkpoint_id=tmp_path / "out", no_dist=True))
    keep = reference.masks([weights["0.weight"]], 0.6, "global")[0]
    assert same_bits(loaded["model"]["0.weight"], weights["0.weight"] * keep + 0.0)
    assert torch.equal(loaded["model"]["2.weight"], weights["2.weight"])
    assert loaded["epoch"] == 3


def test_without_checksums(tmp_path):
    """torch can leave them out; then they are written all the same."""
    before = tensors()
    torch.serialization.set_crc32_options(False)
    try:
        write_dcp(tmp_path / "in", before, LAYOUTS["dim 0"])
    finally:
        torch.serialization.set_crc32_options(True)
    prune_checkpoint(tmp_path / "in", tmp_path / "out", 0.7)
    assert_pruned(tmp_path / "out", before, 0.7)


def test_in_place_and_over_another(tmp_path):
    before = tensors()
    write_dcp(tmp_path / "in", before, LAYOUTS["dim 1"])
    shutil.copytree(tmp_path / "in", tmp_path / "out")
    for target in ("out", "in"):
        prune_checkpoint(tmp_path / "in", tmp_path / target, 0.5, force=True)
        assert_pruned(tmp_path / target, before, 0.5)
        assert sorted(os.listdir(tmp_path / target)) == [".metadata", "__0_0.distcp", "__1_0.distcp"]


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("trap"),)


def test_metadata_is_read_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tensors()
    meta = write_dcp(tmp_path / "in", before, {})
    meta.planner_data = Trap()
    (tmp_path / "in" / ".metadata").write_bytes(pickle.dumps(meta))
    prune_checkpoint(tmp_path / "in", tmp_path / "out", 0.5)
    assert not (tmp_path / "trap").exists()
    pickle.loads((tmp_path / "in" / ".metadata").read_bytes())
    assert (tmp_path / "trap").exists()


def edited(change):
    def damage(root):
        meta = pickle.loads((root / ".metadata").read_bytes())
        change(meta)
        (root / ".metadata").write_bytes(pickle.dumps(meta))

    return damage


def move(meta, **fields):
    index = md.MetadataIndex("model.b.weight", (0, 0))
    place = meta.storage_data[index]
    meta.storage_data[index] = _StorageInfo(**({f: getattr(place, f) for f in vars(place)} | fields))


DAMAGES = {
    "not a pickle": (lambda root: (root / ".metadata").write_bytes(b"abc"), "damaged"),
    "another pickle": (lambda root: (root / ".metadata").write_bytes(pickle.dumps([1])), "damaged"),
    "file gone": (lambda root: (root / "__0_0.distcp").unlink(), "'__0_0.distcp', which is not in the folder"),
    "cut": (lambda root: os.truncate(root / "__0_0.distcp", 2000), "__0_0.distcp: truncated"),
    "outside": (edited(lambda meta: move(meta, relative_path="../x")), "not a file of this folder"),
    "elsewhere": (edited(lambda meta: move(meta, offset=1)), "not what torch.save writes.*exclude it"),
    "negative": (edited(lambda meta: move(meta, offset=-1)), "a size is not a number"),
    "transformed": (edited(lambda meta: move(meta, transform_descriptors=["zstd"])), "written through.*zstd"),
    "chunk without file": (
        edited(lambda meta: meta.storage_data.pop(md.MetadataIndex("model.b.weight", (0, 0)))),
        "is in no file",
    ),
    "chunk missing": (
        edited(lambda meta: meta.state_dict_metadata["model.b.weight"].chunks.pop()),
        "hold 150 of 360",
    ),
    "chunk twice": (
        edited(lambda meta: meta.state_dict_metadata["model.b.weight"].chunks.__setitem__(1, chunk((0, 0), (7, 30)))),
        "hold 360 of 360",
    ),
    "chunk beyond": (
        edited(lambda meta: meta.state_dict_metadata["model.b.weight"].chunks.__setitem__(1, chunk((6, 0), (7, 30)))),
        "has a chunk",
    ),
    "other shape": (
        edited(lambda meta: meta.state_dict_metadata.update({"model.b.weight": transposed(meta)})),
        r"says float32 \[30, 5\]",
    ),
}


def chunk(offset, sizes):
    return md.ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes))


def transposed(meta):
    entry = meta.state_dict_metadata["model.b.weight"]
    return md.TensorStorageMetadata(
        entry.properties, torch.Size((30, 12)), [chunk((0, 0), (30, 5)), chunk((0, 5), (30, 7))]
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(tmp_path, damage):
    write_dcp(tmp_path / "in", tensors(), {"model.b.weight": {0: [5]}})
    change, message = DAMAGES[damage]
    if damage == "other shape":
        edited(lambda meta: meta.storage_data.update(moved(meta)))(tmp_path / "in")
    change(tmp_path / "in")
    with pytest.raises(UsageError, match=message) as caught:
        prune_checkpoint(tmp_path / "in", tmp_path / "out", 0.5)
    assert str(tmp_path / "in") in str(caught.value)
    assert os.listdir(tmp_path) == ["in"]


def moved(meta):
    """The second chunk's place under the offset that it has in a transposed tensor."""
    return {md.MetadataIndex("model.b.weight", (0, 5)): meta.storage_data[md.MetadataIndex("model.b.weight", (5, 0))]}


def strided(tensor, file):
    torch.save(tensor.t().contiguous().t() if tensor.dim() == 2 else tensor, file)


def test_chunks_that_are_not_plain(tmp_path):
    """Another memory order is refused, unless excluded; a part of a larger storage, and a Parameter, are fine."""
    before = tensors()
    write_dcp(tmp_path / "in", before, {}, save=strided)
    with pytest.raises(UsageError, match=r"'model\.b\.weight'.*memory order.*exclude it"):
        prune_checkpoint(tmp_path / "in", tmp_path / "out", 0.5)
    prune_checkpoint(tmp_path / "in", None, 0.5, exclude=["model.b", "model.c"], dry_run=True)

    def inside(tensor, file):
        larger = torch.cat([torch.ones(3, dtype=tensor.dtype), tensor.reshape(-1), torch.ones(2, dtype=tensor.dtype)])
        view = larger[3 : 3 + tensor.numel()].view(tensor.shape)
        torch.save(nn.Parameter(view) if view.dtype.is_floating_point else view, file)

    write_dcp(tmp_path / "in2", before, LAYOUTS["dim 1"], save=inside)
    prune_checkpoint(tmp_path / "in2", tmp_path / "out", 0.5)
    for index, data in items(tmp_path / "out").items():
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None, index
    out = torch.load(io.BytesIO(items(tmp_path / "out")[md.MetadataIndex("model.b.weight", (0, 4))]))
    keep = reference.masks([before[n] for n in NAMES], 0.5, "global")[0]
    assert same_bits(out.detach(), (before["model.b.weight"] * keep + 0.0)[:, 4:12])
    assert torch.equal(out.detach().as_strided((3,), (1,), 0), torch.ones(3))


def test_hints(tmp_path, capsys):
    write_dcp(tmp_path / "in", tensors(), {})
    assert cli.main(["prune", str(tmp_path / "in" / "__0_0.distcp"), str(tmp_path / "out"), "--sparsity", ".5"]) == 2
    assert "give the folder" in capsys.readouterr().err
    assert cli.main(["prune", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "--sparsity is missing" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "this takes safetensors only" in capsys.readouterr().err
    (tmp_path / "in" / ".metadata").rename(tmp_path / "in" / "__0.metadata")
    assert cli.main(["prune", str(tmp_path / "in"), str(tmp_path / "out"), "--sparsity", ".5"]) == 2
    assert "each process wrote its own" in capsys.readouterr().err


def test_first_ties_are_the_first_in_row_major_order(monkeypatch):
    rng = np.random.default_rng(0)
    for bins, numel in ((1 << 14, 50), (2, 50), (7, 1000), (3, 1)):
        monkeypatch.setattr(tie_order, "BINS", bins)
        for _ in range(20):
            owner = rng.integers(0, 4, numel)
            tied = np.flatnonzero(rng.random(numel) < 0.6)
            if len(tied) < 2:
                continue
            parts = [tied[owner[tied] == p] for p in range(4)]
            stay = int(rng.integers(1, len(tied)))
            found = tie_order.first_ties(stay, numel, 4, lambda parts=parts: enumerate(parts), lambda counts: counts)
            assert found.tolist() == np.bincount(owner[tied[:stay]], minlength=4).tolist()


def test_borders_between_processes_leave_records_whole(tmp_path):
    write_dcp(tmp_path / "in", tensors(), LAYOUTS["grid"])
    contents = dcp_files.read_dcp(tmp_path / "in")
    weights, _ = checkpoint_plan.choose_stored(contents)
    scope, sparsities, _ = checkpoint_plan.parse_scope("global", 0.5)
    for size in (1, 2, 3, 7):
        planned, stretches = checkpoint_plan.spread(checkpoint_plan.plan(weights, scope, sparsities), contents, size)
        whole = sorted((s.shard, s.start, s.stop) for mine in stretches for s in mine)
        assert sum(stop - start for _, start, stop in whole) == sum(shard.size for shard in contents.shards)
        assert all(a[2] == b[1] for a, b in pairwise(whole) if a[0] == b[0])
        for part in planned.parts:
            (home,) = [s for s in stretches[part.rank] if s.shard == part.segment.shard]
            assert home.start <= part.segment.start < part.segment.stop <= home.stop
            assert (part.segment.start, part.segment.stop) == (part.chunk.start, part.chunk.stop)
