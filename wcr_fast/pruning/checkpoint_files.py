"""Which files a checkpoint consists of, and how its pruned copy takes its place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wcr_fast.errors import UsageError
from wcr_fast.pruning.safetensors_io import Header, reading, write_all, writing

WEIGHTS, INDEX = ".safetensors", ".safetensors.index.json"
COPY_BYTES = 1 << 20
# The folder in which a run prepares its files: .NAME.PID.tmp; one that is left over is no part of a checkpoint.
STAGE = re.compile(r"\..+\.\d+\.tmp")


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint, relative to ``root`` (a folder, or the parent of a single file).

    Attributes:
        root: the folder they are in.
        is_folder: whether the whole folder is the checkpoint.
        shards: the files to prune, sorted by name.
        others: the files to copy as they are, those of subfolders included.
        index: tensor name -> shard's name, from the index; empty without one.
    """

    root: Path
    is_folder: bool
    shards: tuple[Path, ...]
    others: tuple[Path, ...] = ()
    index: dict[str, str] | None = None


def find_files(source: Path) -> CheckpointFiles:
    """Find the files of a checkpoint: one .safetensors file, or a folder with shards and an index.

    In a folder with an index its shards are pruned; without one ``model.safetensors``, else every
    .safetensors file. Subfolders and all other files are to be copied.

    Raises:
        UsageError: when there is no such file or folder, nothing to prune in it, or the index is damaged.
    """
    if not source.exists():
        raise UsageError(f"{source}: no such file or folder")
    if not source.is_dir():
        if source.name.endswith(INDEX):
            raise UsageError(f"{source}: this is an index: give the folder, {source.parent}")
        if source.suffix == ".distcp":
            raise UsageError(f"{source}: a part of a checkpoint of several files: give the folder, {source.parent}")
        return CheckpointFiles(source.parent, False, (Path(source.name),))
    files = walk(source)
    top = [file.name for file in files if len(file.parts) == 1]
    index = _read_index(source, top)
    if index is not None:
        names = sorted(set(index.values()))
    else:
        names = sorted(name for name in top if name.endswith(WEIGHTS))
        names = ["model.safetensors"] if "model.safetensors" in names else names
    if not names and ".metadata" in top:
        raise UsageError(f"{source}: a folder of torch.distributed.checkpoint; this takes safetensors only")
    if not names and any(name.endswith(".metadata") for name in top):
        raise UsageError(f"{source}: each process wrote its own metadata; save the checkpoint with one for all")
    if not names:
        raise UsageError(f"{source}: nothing to prune: no .safetensors file in this folder")
    missing = [name for name in names if name not in top]
    if missing:
        raise UsageError(f"{source}: the index names {missing[0]!r}, which is not in the folder")
    shards = tuple(Path(name) for name in names)
    others = tuple(file for file in files if file not in shards)
    return CheckpointFiles(source, True, shards, others, index)


def walk(root: Path) -> list[Path]:
    """Return all files below a folder, links followed."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise):
        subfolders[:] = sorted(name for name in subfolders if not STAGE.fullmatch(name))
        real = Path(folder).resolve()
        for name in subfolders:
            path = Path(folder, name)
            if path.is_symlink() and path.resolve() in (real, *real.parents):
                raise UsageError(f"{path}: a link to a folder around it: it can't be copied")
        for name in sorted(names):
            path = Path(folder, name)
            if not path.is_file():
                raise UsageError(f"{path}: neither a file nor a folder: it can't be copied")
            files.append(path.relative_to(root))
    return files


def _raise(error: OSError) -> None:
    raise UsageError(f"{error.filename}: {error.strerror}")


def _read_index(root: Path, names: list[str]) -> dict[str, str] | None:
    """Return tensor name -> file name, or None in a folder without an index."""
    found = sorted(name for name in names if name.endswith(INDEX))
    if not found:
        return None
    name = f"model{INDEX}" if f"model{INDEX}" in found else found[0]
    if len(found) > 1 and name == found[0] != f"model{INDEX}":
        raise UsageError(f"{root}: several indices and no model{INDEX}: {', '.join(found)}")
    try:
        content: Any = json.loads((root / name).read_text(encoding="utf-8"))
        entries = content["weight_map"]
        shards = [(str(tensor), Path(file).name == file) for tensor, file in entries.items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{root / name}: damaged index ({type(error).__name__}: {error})") from None
    outside = [tensor for tensor, inside in shards if not inside]
    if outside or not shards:
        what = f"{outside[0]!r} is not in a file of this folder" if outside else "weight_map is empty"
        raise UsageError(f"{root / name}: damaged index: {what}")
    return entries


def check_index(files: CheckpointFiles, headers: Sequence[Header]) -> None:
    """Raise UsageError where a tensor is in two shards, or not in the one that the index names."""
    homes: dict[str, Path] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in homes:
                raise UsageError(f"{header.path}: tensor {tensor.name!r} is in {homes[tensor.name]} too")
            homes[tensor.name] = header.path
    for name, shard in (files.index or {}).items():
        if name not in homes or homes[name].name != shard:
            raise UsageError(f"{files.root / shard}: has no tensor {name!r}, though the index says so")


def check_target(source: Path, files: CheckpointFiles, target: Path, *, force: bool) -> bool:
    """Check that the output may be written; return whether it replaces the input.

    Raises:
        UsageError: when it exists (and ``force`` is off), is of the other kind, lies inside the input folder,
            has no parent folder, holds weights that would stay beside the new ones, or the disk is too full.
    """
    if not target.parent.is_dir():
        raise UsageError(f"{target}: its folder {target.parent} does not exist")
    exists = target.exists() or target.is_symlink()
    if exists and target.is_dir() != files.is_folder:
        kind = "a folder: name a file in it" if target.is_dir() else "a file, the input is a folder"
        raise UsageError(f"{target}: this is {kind}")
    if exists and not force:
        raise UsageError(f"{target}: exists already; --force replaces it")
    same = target.exists() and os.path.samefile(source, target)
    if files.is_folder and not same:
        if source.resolve() in target.resolve().parents:
            raise UsageError(f"{target}: lies inside the input folder; choose a place outside it")
        _check_leftovers(files, target)
    _check_space(files, target, same)
    return same


def _check_leftovers(files: CheckpointFiles, target: Path) -> None:
    """Refuse to mix two checkpoints: a loader could pick the weights that were there before."""
    new = {str(file) for file in (*files.shards, *files.others)}
    old = sorted(p.name for p in target.glob("*") if p.name.endswith((WEIGHTS, INDEX))) if target.exists() else []
    stale = [name for name in old if name not in new]
    if stale:
        raise UsageError(f"{target}: holds {stale[0]!r}, which the new checkpoint has not; remove it first")


def _check_space(files: CheckpointFiles, target: Path, same: bool) -> None:
    copied = files.shards if same else (*files.shards, *files.others)
    needed = sum((files.root / file).stat().st_size for file in copied)
    free = shutil.disk_usage(target if target.is_dir() else target.parent).free
    if needed > free:
        raise UsageError(f"{target}: needs {needed:,} bytes, the disk has {free:,} free: nothing was written")


def make_folders(files: Iterable[Path], root: Path) -> None:
    """Make the folders below ``root`` that files need."""
    for folder in sorted({parent for file in files for parent in file.parents}):
        (root / folder).mkdir(exist_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes and its permissions, and put it on the disk."""
    with reading(source) as src, writing(target) as dst:
        while chunk := os.read(src, COPY_BYTES):
            write_all(dst, memoryview(chunk), target)
    shutil.copymode(source, target)
