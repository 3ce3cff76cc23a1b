"""Exports: exact to the bit, smaller on disk, whole or not there; the command around them."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import wcr_fast
from wcr_fast import cli
from wcr_fast.errors import UsageError
from wcr_fast.pruning import export_checkpoint, load_exported, packed_file, restore_checkpoint

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool]


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(raw(tensor), raw(other)), name


def sparse(shape, dtype=torch.float32, density=0.1):
    kept = torch.rand(shape) < density
    return torch.where(kept, torch.randn(shape) * 50, 0.0).to(dtype)


@pytest.fixture
def pruned(tmp_path):
    """A checkpoint with everything in it that could get lost."""
    tensors = {f"layer.{d}".replace("torch.", ""): sparse((64, 33), d) for d in DTYPES}
    odd = sparse((50, 41))
    odd.view(-1)[:8] = torch.tensor([-0.0, 1e-45, float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1.0])
    odd.view(torch.int32)[3, :2] = torch.tensor([0x7FC01234, -0x3FFFFF])  # NaNs with a payload
    tensors |= {
        "odd": odd,
        "dense": torch.randn(40, 40),
        "zeros": torch.zeros(300, 5),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
        "bias": torch.zeros(7),
        "fp8": sparse((128, 64)).to(torch.float8_e4m3fn),
        "complex": sparse((32, 32)).to(torch.complex64),
        "größe": sparse((100, 10)),
    }
    path = tmp_path / "dense.safetensors"
    save_file(tensors, path, {"format": "pt", "note": 'a "quoted" line\n'})
    return path


def test_exact_and_smaller(pruned, tmp_path):
    packed, back = tmp_path / "packed.safetensors", tmp_path / "back.safetensors"
    record = export_checkpoint(pruned, packed)
    same(load_exported(packed), load_file(pruned))
    assert restore_checkpoint(packed, back) == record.dense_bytes
    assert back.read_bytes() == pruned.read_bytes()
    assert record.dense_bytes == pruned.stat().st_size
    assert record.bitmask_bytes == packed.stat().st_size < record.dense_bytes / 3
    stored = load_file(packed)  # an ordinary safetensors file
    assert stored.keys() >= {"odd.values", "odd.bitmask", "dense", "scalar", "empty", "bias"}
    assert "dense.values" not in stored
    assert stored["zeros.values"].shape == (0,)
    assert record.tensors == 16
    assert record.packed == len([name for name in stored if name.endswith(".bitmask")]) == 12


@settings(max_examples=25, deadline=None)
@given(
    numel=st.sampled_from([0, 1, 7, 8, 31, 1024, 4096, 4097, 9001]),
    density=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    piece=st.sampled_from([64, 512, 8192]),
)
def test_pieces_of_any_size(tmp_path_factory, numel, density, dtype, piece):
    folder = tmp_path_factory.mktemp("export")
    dense, packed, back = (folder / name for name in ("dense", "packed", "back"))
    tensors = {"a": sparse((numel,), dtype, density), "b": sparse((3, numel), torch.float16, density)}
    save_file(tensors, dense)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_file, "PIECE", piece)
        record = export_checkpoint(dense, packed, compress=False)
        same(load_exported(packed), tensors)
        restore_checkpoint(packed, back)
    assert back.read_bytes() == dense.read_bytes()
    assert record.zlib_bytes is None
    zeros = sum(int((raw(t).view(t.numel(), -1) == 0).all(1).sum()) for t in tensors.values() if t.numel())
    assert record.zeros <= zeros
    assert record.packed < 2 or record.zeros == zeros


def test_a_dense_checkpoint_stays_dense(tmp_path):
    save_file({"w": torch.randn(100, 100)}, tmp_path / "a")
    record = export_checkpoint(tmp_path / "a", tmp_path / "b")
    assert (record.packed, record.zeros) == (0, 0)
    assert record.bitmask_bytes < record.dense_bytes + 512
    same(load_exported(tmp_path / "b"), load_file(tmp_path / "a"))


def test_names_that_are_taken(tmp_path):
    tensors = {name: sparse((100, 100)) for name in ("w", "w.values", "w.bitmask", "v", "v.values")}
    save_file(tensors, tmp_path / "a")
    record = export_checkpoint(tmp_path / "a", tmp_path / "b")
    assert record.packed == 3
    same(load_exported(tmp_path / "b"), tensors)


def test_what_is_pruned_becomes_small(tmp_path):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 10))
    wcr_fast.prune_(model, 0.95)
    save_file(model.state_dict(), tmp_path / "a")
    record = export_checkpoint(tmp_path / "a", tmp_path / "b")
    floor = (400 * 300 + 300 * 10) * (1 / 8 + 0.05 * 4)
    assert record.bitmask_bytes < floor + 4 * 310 + 2000
    fresh = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 10))
    fresh.load_state_dict(load_exported(tmp_path / "b"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    shards = {
        "model-1.safetensors": {"a": sparse((80, 80)), "b": torch.randn(5)},
        "model-2.safetensors": {"c": sparse((90, 70))},
    }
    for name, tensors in shards.items():
        save_file(tensors, root / name)
    index = {"metadata": {}, "weight_map": {t: name for name, tensors in shards.items() for t in tensors}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text("{}")
    (root / "sub" / "notes.txt").write_text("hello")
    return root


def content(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_folder(folder, tmp_path):
    before = content(folder)
    record = export_checkpoint(folder, tmp_path / "packed")
    assert record.files == ("model-1.safetensors", "model-2.safetensors")
    assert record.packed == 2
    tensors = load_file(folder / "model-1.safetensors") | load_file(folder / "model-2.safetensors")
    same(load_exported(tmp_path / "packed"), tensors)
    restore_checkpoint(tmp_path / "packed", tmp_path / "back")
    assert content(tmp_path / "back") == before
    export_checkpoint(folder, folder, force=True)  # in place, and back
    assert content(folder).keys() == before.keys()
    same(load_exported(folder), tensors)
    restore_checkpoint(folder, folder, force=True)
    assert content(folder) == before


def test_damage_is_found(pruned, tmp_path):
    packed = tmp_path / "packed"
    export_checkpoint(pruned, packed)
    whole = packed.read_bytes()
    data_start = 8 + int.from_bytes(whole[:8], "little")
    for place in (data_start + 100, len(whole) // 2 + 2000, len(whole) - 5):
        packed.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(UsageError, match=r"packed: damaged export: .*; export the checkpoint again"):
            load_exported(packed)
        with pytest.raises(UsageError, match="damaged export"):
            restore_checkpoint(packed, tmp_path / "back")
    packed.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match="truncated"):
        load_exported(packed)
    packed.write_bytes(whole.replace(b'"odd.bitmask"', b'"odd.bitmusk"'))
    with pytest.raises(UsageError, match="tensor 'odd' is missing, or not what its header says"):
        load_exported(packed)
    packed.write_bytes(whole.replace(b'"dense_sha256"', b'"dense_sha257"'))
    with pytest.raises(UsageError, match="its metadata is incomplete"):
        load_exported(packed)
    packed.write_bytes(whole.replace(b"wcr-fast/export/1", b"wcr-fast/export/2"))
    with pytest.raises(UsageError, match="format 'wcr-fast/export/2' is not known; update wcr-fast"):
        load_exported(packed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense.safetensors", "packed"]


def test_files_of_another_kind(pruned, tmp_path):
    for use in (load_exported, lambda path: restore_checkpoint(path, tmp_path / "out")):
        with pytest.raises(UsageError, match=r"dense.safetensors: not a file of wcr-fast export"):
            use(pruned)
        with pytest.raises(UsageError, match="no such file or folder"):
            use(tmp_path / "missing")
    export_checkpoint(pruned, tmp_path / "packed", compress=False)
    with pytest.raises(UsageError, match="is packed already; --restore makes it dense again"):
        export_checkpoint(tmp_path / "packed", tmp_path / "twice")
    with pytest.raises(UsageError, match="exists already; --force replaces it"):
        export_checkpoint(pruned, tmp_path / "packed")
    (tmp_path / "text").write_text("hello, this is no checkpoint")
    with pytest.raises(UsageError, match="damaged or not a safetensors file"):
        export_checkpoint(tmp_path / "text", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense.safetensors", "packed", "text"]


def test_a_file_that_changes_meanwhile(pruned, tmp_path, monkeypatch):
    found = packed_file.survey

    def survey(path, **options):
        result = found(path, **options)
        content = bytearray(path.read_bytes())
        content[-40000:] = b"\1" * 40000
        path.write_bytes(content)
        return result

    monkeypatch.setattr("wcr_fast.pruning.export.survey", survey)
    with pytest.raises(UsageError, match="changed while it was read"):
        export_checkpoint(pruned, tmp_path / "packed", compress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["dense.safetensors"]


def test_the_command(pruned, tmp_path, capsys):
    packed, back = str(tmp_path / "packed"), str(tmp_path / "back")
    assert cli.main(["export", str(pruned), packed]) == 0
    out, err = capsys.readouterr()
    sizes = [int(line.split()[1].replace(",", "")) for line in out.splitlines()[:3]]
    assert sizes[:2] == [pruned.stat().st_size, (tmp_path / "packed").stat().st_size]
    assert [line.split()[0] for line in out.splitlines()] == ["dense", "bitmask", "compressed", "wrote"]
    assert "zlib, level 6; not written" in out
    assert err == ""
    assert cli.main(["export", packed, back, "--restore"]) == 0
    assert "checked against the hash" in capsys.readouterr().out
    assert (tmp_path / "back").read_bytes() == pruned.read_bytes()


def test_the_command_prints_json(pruned, tmp_path, capsys):
    packed = str(tmp_path / "packed")
    assert cli.main(["export", str(pruned), packed, "--json", "--no-zlib"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["schema"] == "wcr-fast/export/1"
    assert record["version"] == wcr_fast.__version__
    assert record["bitmask_bytes"] == (tmp_path / "packed").stat().st_size
    assert record["zlib_bytes"] is record["zlib_level"] is None
    assert cli.main(["export", packed, str(tmp_path / "back"), "--json", "--restore"]) == 0
    assert json.loads(capsys.readouterr().out)["dense_bytes"] == pruned.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export"], "required: IN, OUT"),
        (["export", "{in}"], "required: OUT"),
        (["export", "{in}", "{in}"], "exists already"),
        (["export", "{in}", "{in}", "--restore", "--force"], "not a file of wcr-fast export"),
        (["export", "no", "{in}"], "no such file or folder"),
        (["export", "{in}", "no/folder"], "does not exist"),
    ],
)
def test_wrong_usage_exits_with_2(pruned, capsys, arguments, message):
    before = pruned.read_bytes()
    assert cli.main([a.replace("{in}", str(pruned)) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert pruned.read_bytes() == before


def test_a_full_disk(pruned, tmp_path, monkeypatch):
    from wcr_fast.pruning import safetensors_io

    def full(fd, view):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_io.os, "write", full)
    with pytest.raises(UsageError, match="packed: No space left on device: nothing was written"):
        export_checkpoint(pruned, tmp_path / "packed", compress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["dense.safetensors"]
