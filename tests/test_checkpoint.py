"""Pruning checkpoints as a stream: equal to prune_ in memory, byte for byte elsewhere, nothing half-written."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import reference_selection as reference
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wcr_fast.errors import UsageError
from wcr_fast.pruning import (
    checkpoint,
    checkpoint_cuts,
    checkpoint_files,
    checkpoint_plan,
    checkpoint_write,
    file_keys,
    safetensors_io,
)
from wcr_fast.pruning.checkpoint import prune_checkpoint
from wcr_fast.pruning.prune import prune_
from wcr_fast.pruning.stream import Segment, blocks_of


def tensors(ties=True):
    """Weights of all dtypes in an order that misaligns some, and tensors that stay as they are."""

    def weights(*shape):
        drawn = torch.randn(*shape)
        return (drawn * 4).round() / 4 if ties else drawn

    return {
        "a.weight": weights(37, 29),
        "b.weight": weights(5, 7, 3, 3).bfloat16(),
        "c.weight": weights(11, 13).half(),
        "d.weight": weights(9, 21, 3).double(),
        "a.bias": torch.randn(37),
        "ids": torch.arange(12).reshape(3, 4),
        "flags": torch.ones(3, 3, dtype=torch.bool),
        "q.weight": torch.randn(8, 8).to(torch.float8_e4m3fn),
        "q.weight_scale": torch.rand(8, 1),
    }


def stored_order(path):
    header = safetensors_io.read_header(path)
    return [info.name for info in header.tensors]


def write_raw(path, stored, metadata=None):
    """Write tensors in the given order, unaligned where it falls so."""
    header, at, data = {"__metadata__": metadata or {}}, 0, b""
    names = {
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.float64: "F64",
        torch.uint8: "U8",
    }
    for name, tensor in stored.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(raw)],
        }
        at, data = at + len(raw), data + raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


WEIGHTS = ["a.weight", "b.weight", "c.weight", "d.weight"]


def same_bits(first, second):
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def assert_pruned_as(out, before, keep):
    for name, kept in keep.items():
        assert same_bits(out[name], torch.where(kept, before[name], torch.zeros_like(before[name]))), name


@pytest.fixture(params=["small blocks", "large blocks"])
def block_size(request, monkeypatch):
    if request.param == "small blocks":
        monkeypatch.setattr(checkpoint_write, "BLOCK_BYTES", 512)
        monkeypatch.setattr(checkpoint_plan, "BLOCK_BYTES", 512)
        monkeypatch.setattr(file_keys, "SWEEP_BYTES", 192)


@pytest.mark.parametrize(
    ("scope", "sparsity"),
    [
        *[("global", 0.0), ("global", 0.37), ("global", 0.9), ("global", 1.0), ("layer", 0.5), ("layer", 0.93)],
        *[("row", 0.6), ("row", 1.0), ("2:4", None), ("1:3", None)],
    ],
)
@pytest.mark.parametrize("ties", [True, False])
def test_equals_the_reference_and_prune_(tmp_path, scope, sparsity, ties, block_size):
    before = tensors(ties)
    save_file(before, tmp_path / "in.safetensors", metadata={"format": "pt", "note": "kept"})
    order = [name for name in stored_order(tmp_path / "in.safetensors") if name in WEIGHTS]
    record = prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", sparsity, scope=scope)
    out = load_file(tmp_path / "out.safetensors")
    listed = [before[name] for name in order]
    keep = dict(zip(order, reference.masks(listed, sparsity, scope), strict=True))
    assert_pruned_as(out, before, keep)
    in_memory = prune_(listed, sparsity, scope=scope) if sparsity != 1.0 else None
    for name in order:
        if in_memory:
            assert same_bits(before[name], out[name])
    assert [layer.name for layer in record.per_layer] == order
    assert [layer.removed for layer in record.per_layer] == [int((~keep[n]).sum()) for n in order]
    assert [layer.zeros for layer in record.per_layer] == [int((out[n] == 0).sum()) for n in order]
    if in_memory:
        assert record.pruned_now == in_memory.pruned_now
        assert record.asked == in_memory.asked
        assert record.threshold == in_memory.threshold
    for name in set(before) - set(WEIGHTS):
        assert same_bits(out[name], before[name]), name


def test_header_and_copied_bytes_stay(tmp_path):
    save_file(tensors(), tmp_path / "in.safetensors", metadata={"format": "pt", "x": "ü"})
    prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.8)
    old, new = (tmp_path / n for n in ("in.safetensors", "out.safetensors"))
    start = safetensors_io.read_header(old).data_start
    assert old.read_bytes()[:start] == new.read_bytes()[:start]
    assert old.stat().st_size == new.stat().st_size
    assert old.stat().st_mode == new.stat().st_mode
    with safe_open(new, "pt") as file:
        assert file.metadata() == {"format": "pt", "x": "ü"}


def test_numbers_at_odd_addresses(tmp_path):
    before = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "a": torch.randn(7, 9).bfloat16(),
        "b": torch.randn(5, 5),
        "empty": torch.empty(0, 4),
        "c": torch.randn(6, 3).double(),
    }
    write_raw(tmp_path / "in.safetensors", before)
    prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.6)
    out = load_file(tmp_path / "out.safetensors")
    names = ["a", "b", "c"]
    keep = dict(zip(names, reference.masks([before[n] for n in names], 0.6), strict=True))
    assert_pruned_as(out, before, keep)
    assert torch.equal(out["odd"], before["odd"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_larger_than_the_sample(tmp_path, dtype):
    """Hundreds of thousands of weights: the window is guessed from a sample, lines cross tensors."""
    before = {f"{i}": (torch.randn(101 + 50 * i, 700) * (i + 1)).to(dtype) for i in range(4)}
    before["tiny"] = torch.randn(2, 3).to(dtype)
    save_file(before, tmp_path / "in.safetensors")
    order = stored_order(tmp_path / "in.safetensors")
    record = prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.9)
    out = load_file(tmp_path / "out.safetensors")
    keep = dict(zip(order, reference.masks([before[n] for n in order], 0.9), strict=True))
    assert_pruned_as(out, before, keep)
    assert record.removed == round(0.9 * sum(t.numel() for t in before.values()))


def test_zeros_and_infinities(tmp_path):
    weight = torch.tensor([[0.0, -0.0, 1.0, -1.0], [torch.inf, -torch.inf, 1e-45, -2.0]])
    save_file({"w": weight}, tmp_path / "in.safetensors")
    for sparsity in (0.125, 0.25, 0.5, 0.875):
        prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", sparsity, force=True)
        out = load_file(tmp_path / "out.safetensors")
        assert_pruned_as(out, {"w": weight}, {"w": reference.masks([weight], sparsity)[0]})


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder: two shards, an index, other files and a subfolder."""
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    stored = tensors()
    first = ["c.weight", "a.weight", "a.bias", "ids"]
    shards = {
        "model-00001-of-00002.safetensors": first,
        "model-00002-of-00002.safetensors": sorted(set(stored) - set(first)),
    }
    weight_map = {}
    for file, names in shards.items():
        save_file({n: stored[n] for n in names}, root / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (root / "config.json").write_text('{"a": 1}')
    (root / "sub" / "tokenizer.bin").write_bytes(bytes(range(256)))
    save_file({"x": torch.randn(4, 4)}, root / "consolidated.safetensors")
    return root


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def assert_shards_pruned(root, before, sparsity):
    files = [root / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    out = {k: v for f in files for k, v in load_file(f).items()}
    order = [name for f in files for name in stored_order(f) if name in WEIGHTS]
    keep = dict(zip(order, reference.masks([before[n] for n in order], sparsity), strict=True))
    assert_pruned_as(out, before, keep)


def load_folder(root):
    return {k: v for f in sorted(root.glob("model-*.safetensors")) for k, v in load_file(f).items()}


def test_folder(folder, tmp_path):
    before, files = load_folder(folder), contents(folder)
    record = prune_checkpoint(folder, tmp_path / "out", 0.75)
    assert_shards_pruned(tmp_path / "out", before, 0.75)
    new = contents(tmp_path / "out")
    assert new.keys() == files.keys()
    for name in ("config.json", "sub/tokenizer.bin", "model.safetensors.index.json", "consolidated.safetensors"):
        assert new[name] == files[name]
    assert contents(folder) == files
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]
    assert "consolidated.safetensors" in record.notes[-1]
    assert record.bytes_written == sum(map(len, files.values()))


def test_folder_in_place(folder):
    before, files = load_folder(folder), contents(folder)
    with pytest.raises(UsageError, match="--force"):
        prune_checkpoint(folder, folder, 0.75)
    prune_checkpoint(folder, folder, 0.75, force=True)
    assert_shards_pruned(folder, before, 0.75)
    assert contents(folder).keys() == files.keys()


def test_folder_over_another(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("stays")
    before = load_folder(folder)
    prune_checkpoint(folder, out, 0.5, force=True)
    assert_shards_pruned(out, before, 0.5)
    assert (out / "mine.txt").read_text() == "stays"
    (out / "model.safetensors").write_bytes(b"old weights that a loader would prefer")
    with pytest.raises(UsageError, match=r"model\.safetensors.*remove it"):
        prune_checkpoint(folder, out, 0.5, force=True)


def test_file_in_place(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.randn(20, 20)}, path)
    prune_checkpoint(path, path, 0.5, force=True)
    assert int((load_file(path)["w"] == 0).sum()) == 200
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_links_become_files(folder, tmp_path):
    """Hub caches hold links to blobs: their content is copied, the blobs stay."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    files, before = contents(folder), load_folder(folder)
    prune_checkpoint(linked, linked, 0.5, force=True)
    assert_shards_pruned(linked, before, 0.5)
    assert contents(folder) == files


def test_dry_run_writes_nothing(folder, tmp_path):
    files = contents(tmp_path)
    for scope, sparsity in (("global", 0.9), ("row", 0.3), ("2:4", None)):
        record = prune_checkpoint(folder, None, sparsity, scope=scope, dry_run=True)
        assert contents(tmp_path) == files
        real = prune_checkpoint(folder, tmp_path / scope.replace(":", ""), sparsity, scope=scope)
        assert record.per_layer == real.per_layer
        assert record.target is None
        shutil.rmtree(tmp_path / scope.replace(":", ""))


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_several_sparsities(folder, tmp_path, scope, block_size, monkeypatch):
    """One search answers them all, each as it would be answered alone."""
    files = contents(tmp_path)
    sparsities = [0.9, 0.0, 0.37, 0.9, 1.0, 0.5]
    alone = [prune_checkpoint(folder, None, s, scope=scope, dry_run=True) for s in sparsities]
    real, ranks = checkpoint_cuts.window_search, []
    monkeypatch.setattr(
        checkpoint_cuts, "window_search", lambda source, keeps: ranks.append(len(keeps)) or real(source, keeps)
    )
    done = []
    several = prune_checkpoint(
        folder, None, sparsities, scope=scope, dry_run=True, progress=lambda *now: done.append(now)
    )
    assert several == alone
    assert set(ranks) <= {6, 0}
    assert done[-1][0] == done[-1][1]
    assert contents(tmp_path) == files


def test_several_sparsities_need_a_dry_run(folder, tmp_path):
    for sparsity, message in [
        ([0.5, 0.9], "--dry-run"),
        ([0.5], "--dry-run"),
        ([], "empty list"),
        ([0.5, 2.0], r"\[0, 1\]"),
    ]:
        with pytest.raises(UsageError, match=message):
            prune_checkpoint(folder, tmp_path / "out", sparsity)
    assert len(prune_checkpoint(folder, None, [0.5], dry_run=True)) == 1
    assert os.listdir(tmp_path) == ["model"]


def test_exclude(folder, tmp_path):
    record = prune_checkpoint(folder, None, 0.5, exclude=["a", "re:[bc]\\.w.*"], dry_run=True)
    assert [layer.name for layer in record.per_layer] == ["d.weight"]
    assert ("a.weight", "excluded by 'a'") in record.left_out
    assert dict(record.left_out)["q.weight"] == "dtype F8_E4M3"
    assert "scale" in dict(record.left_out)["q.weight_scale"]
    with pytest.raises(UsageError, match="'nothing' matches no"):
        prune_checkpoint(folder, tmp_path / "out", 0.5, exclude=["nothing"])
    with pytest.raises(UsageError, match="nothing to prune"):
        prune_checkpoint(folder, tmp_path / "out", 0.5, exclude="*")
    assert not (tmp_path / "out").exists()


def test_nan_is_named(tmp_path):
    weight = torch.randn(5, 5)
    weight[3, 3] = torch.nan
    save_file({"good": torch.randn(3, 3), "poor": weight}, tmp_path / "in.safetensors")
    for scope, sparsity in (("global", 0.5), ("layer", 0.5), ("row", 0.5), ("2:4", None)):
        with pytest.raises(UsageError, match="'poor' holds NaN"):
            prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", sparsity, scope=scope)
    assert os.listdir(tmp_path) == ["in.safetensors"]


def header_of(fields, data=b"", length=None):
    text = json.dumps(fields).encode() if not isinstance(fields, bytes) else fields
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "too few"),
        (header_of({}, length=10**12), "header claims"),
        (header_of(b"{nope"), "not JSON"),
        (header_of(b"[1]"), "not a JSON object"),
        (header_of(b'{"w": 1, "w": 2}'), "'w' occurs twice"),
        (header_of({"w": {"dtype": "F32", "shape": [2, 2]}}), "needs dtype"),
        (header_of({"w": F32 | {"shape": [-2, 2]}}, bytes(16)), "needs dtype"),
        (header_of({"w": F32 | {"shape": [2, 3]}}, bytes(16)), "needs 24 bytes"),
        (header_of({"w": F32}, bytes(12)), "truncated"),
        (header_of({"w": F32}, bytes(20)), "4 bytes follow"),
        (header_of({"w": F32, "v": F32 | {"data_offsets": [8, 24]}}, bytes(24)), "overlaps"),
        (header_of({"w": F32, "v": F32 | {"data_offsets": [20, 36]}}, bytes(36)), "hole"),
        (header_of({"__metadata__": {"a": 1}, "w": F32}, bytes(16)), "__metadata__"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "in.safetensors"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        prune_checkpoint(path, tmp_path / "out.safetensors", 0.5)
    assert str(path) in str(caught.value)
    assert os.listdir(tmp_path) == ["in.safetensors"]


def test_damaged_folders(folder, tmp_path):
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    for text, message in [
        ("{", "damaged index"),
        ("{}", "damaged index"),
        ('{"weight_map": {}}', "empty"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not in a file of this folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "not in the folder"),
        (good.replace('"a.bias"', '"z.bias"'), "has no tensor 'z.bias'"),
    ]:
        index.write_text(text)
        with pytest.raises(UsageError, match=message):
            prune_checkpoint(folder, tmp_path / "out", 0.5)
    index.unlink()
    save_file({"a.bias": torch.zeros(2)}, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(UsageError, match=r"'a\.bias' is in"):
        prune_checkpoint(folder, tmp_path / "out", 0.5)
    assert os.listdir(tmp_path) == ["model"]


def test_wrong_places(folder, tmp_path):
    one = folder / "model-00001-of-00002.safetensors"
    for source, target, message in [
        (tmp_path / "gone", tmp_path / "out", "no such file"),
        (tmp_path, tmp_path / "out", "nothing to prune"),
        (folder / "model.safetensors.index.json", tmp_path / "out", "give the folder"),
        (one, tmp_path / "no" / "out", "does not exist"),
        (one, tmp_path, "name a file in it"),
        (folder, one, "the input is a folder"),
        (folder, folder / "out", "inside the input"),
        (one, None, "an output is needed"),
    ]:
        with pytest.raises(UsageError, match=message):
            prune_checkpoint(source, target, 0.5, force=True)
    for scope, sparsity in (("global", 1.5), ("global", None), ("x", 0.5), ("2:4", 0.5), ("4:2", None)):
        with pytest.raises(UsageError):
            prune_checkpoint(one, tmp_path / "out", sparsity, scope=scope)
    assert os.listdir(tmp_path) == ["model"]


def test_full_disk(folder, tmp_path, monkeypatch):
    """Neither what is known beforehand nor what only the write finds leaves anything behind."""
    files = contents(folder)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=100)
        patch.setattr(checkpoint_files.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UsageError, match="100 free"):
            prune_checkpoint(folder, tmp_path / "out", 0.5)
    full = OSError(28, "No space left on device")
    reals, count = {"write": os.write, "pwrite": os.pwrite}, 0

    def write(name, fd, data, *place):
        nonlocal count
        count += 1
        if count > 5:
            raise full
        return reals[name](fd, data[: len(data) // 2 + 1], *place)  # the system may write less than asked

    for name in reals:
        monkeypatch.setattr(safetensors_io.os, name, partial(write, name))
    for target in (tmp_path / "out", folder):
        with pytest.raises(UsageError, match="No space left") as caught:
            prune_checkpoint(folder, target, 0.5, force=True)
        assert str(caught.value).startswith(str(target))
        assert ".tmp" not in str(caught.value)
        count = 0
    assert os.listdir(tmp_path) == ["model"]
    assert contents(folder) == files


INTERRUPTED = """
import os, signal, sys, time
from wcr_fast import cli
from wcr_fast.pruning import checkpoint_write, file_keys
number, place = getattr(signal, sys.argv[1]), sys.argv[2]
read = file_keys.OpenFile.read_into
def kill(*args):
    os.kill(os.getpid(), number)
    time.sleep(0.2)
if place == "write":
    checkpoint_write.write_behind = kill
else:
    file_keys.OpenFile.read_into = lambda *args: (kill(), read(*args))
sys.exit(cli.main(sys.argv[3:]))
"""


def interrupted(folder, tmp_path, name, place, out):
    arguments = [name, place, "prune", folder, tmp_path / out, "--sparsity", "0.5", "--force"]
    command = [sys.executable, "-c", INTERRUPTED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "code", "place", "out"),
    [
        ("SIGINT", 130, "write", "out"),
        ("SIGINT", 130, "write", "model"),
        ("SIGINT", 130, "search", "out"),
        ("SIGTERM", 143, "write", "model"),
    ],
)
def test_interrupted(folder, tmp_path, name, code, place, out):
    files = contents(folder)
    done = interrupted(folder, tmp_path, name, place, out)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["model"]
    assert contents(folder) == files


@pytest.mark.parametrize("out", ["out", "model"])
def test_killed(folder, tmp_path, out):
    """Nothing that looks finished: a hidden folder, which the next run ignores as input and removes."""
    files, before = contents(folder), load_folder(folder)
    done = interrupted(folder, tmp_path, "SIGKILL", "write", out)
    assert done.returncode == -9
    (left,) = tmp_path.glob(f"{'model/' * (out == 'model')}.{out}.*.tmp")
    assert not (tmp_path / "out").exists()
    assert {name: data for name, data in contents(folder).items() if left.name not in name} == files
    alive = left.with_name(f".{out}.1.tmp")  # of a run that still goes on
    alive.mkdir()
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    prune_checkpoint(folder, tmp_path / "copy", 0.5)
    assert contents(tmp_path / "copy").keys() == files.keys()
    prune_checkpoint(folder, tmp_path / out, 0.5, force=True)
    assert_shards_pruned(tmp_path / out, before, 0.5)
    assert not left.exists()
    assert alive.exists()
    os.close(lock)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 256 MB, sparse on the disk, adds less than half of that to a fresh process."""
    size = 64 * 2**20
    path = tmp_path / "in.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1024, size // 1024], "data_offsets": [0, 4 * size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 4 * size)
    code = f"""
import resource
from wcr_fast.pruning.checkpoint import prune_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
record = prune_checkpoint({str(path)!r}, {str(tmp_path / "out.safetensors")!r}, 0.9)
assert record.removed == round(0.9 * {size}) and record.pruned_now == 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 120


def test_blocks_cover_everything_once():
    segments = [
        Segment(0, 0, 100),
        Segment(0, 100, 340, part=0, grain=60, unit=20),
        Segment(0, 340, 344),
        Segment(1, 10, 130, part=1, grain=4, unit=4),
    ]
    blocks = list(blocks_of(segments, 50))
    assert all(0 < b.stop - b.start <= 50 for b in blocks)
    parts = [p for b in blocks for p in b.parts if p.part == 0]
    assert [p.start for p in parts] == [100, *(p.stop for p in parts[:-1])]
    assert parts[-1].stop == 340
    for part in parts:  # whole grains, or inside one and cut at units
        first, last = part.start - 100, part.stop - 100
        assert (first % 60 == 0 and last % 60 == 0) or (first // 60 == (last - 1) // 60 and first % 20 == 0)
    with pytest.raises(UsageError, match="one group"):
        list(blocks_of([Segment(0, 0, 200, part=0, grain=200, unit=100)], 50))


def test_files_of_torch_save(tmp_path):
    torch.save({"w": torch.ones(3, 3)}, tmp_path / "m.pt")
    with pytest.raises(UsageError, match=r"m\.pt.*a zip, as torch\.save writes it"):
        checkpoint.prune_checkpoint(tmp_path / "m.pt", tmp_path / "out.safetensors", 0.5)
