"""Masks in a safetensors file; docs/mask-format.md describes it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from wcr_fast.errors import UsageError
from wcr_fast.pruning.checkpoint_files import CheckpointFiles
from wcr_fast.pruning.safetensors_io import (
    Header,
    pack_header,
    read_header,
    read_into,
    reading,
    write_all,
    writing,
)
from wcr_fast.pruning.staging import staging
from wcr_fast.torch_path.bits import num_bytes

FORMAT = "wcr-fast/masks/1"


def write(path: Path, layers: Mapping[str, tuple[Tensor, torch.Size]], weights_sha256: str | None) -> None:
    """Write plain bits and shapes by name: through a synced temporary neighbour and a rename."""
    if path.is_dir():
        raise UsageError(f"{path}: this is a folder: name a file in it")
    packed = [memoryview(bits.cpu().numpy()) for bits, _ in layers.values()]
    sha = hashlib.sha256()
    for view in packed:
        sha.update(view)
    metadata = {
        "format": FORMAT,
        "shapes": json.dumps({name: list(shape) for name, (_, shape) in layers.items()}),
        "bits_sha256": sha.hexdigest(),
    }
    if weights_sha256 is not None:
        metadata["weights_sha256"] = weights_sha256
    head = pack_header(((n, "U8", [len(v)], len(v)) for n, v in zip(layers, packed, strict=True)), metadata)
    files = CheckpointFiles(path.parent, False, (Path(path.name),))
    with staging(path, files) as stage, writing(stage / path.name) as fd:
        for view in (memoryview(head), *packed):
            write_all(fd, view, path)


def read(path: Path) -> tuple[dict[str, tuple[Tensor, torch.Size]], str | None]:
    """Return plain bits and shapes by name, and the hash of the weights.

    Raises:
        UsageError: when the file is missing, damaged, of another kind or of a format not known.
    """
    header = read_header(path)
    shapes = _shapes(header)
    layers, sha = {}, hashlib.sha256()
    with reading(path) as fd:
        for info in header.tensors:
            shape = shapes[info.name]
            bits = torch.empty(info.stop - info.start, dtype=torch.uint8)
            view = memoryview(bits.numpy())
            read_into(fd, view, info.start, path)
            sha.update(view)
            layers[info.name] = bits, shape
    if sha.hexdigest() != header.metadata.get("bits_sha256"):
        _damaged(path, "the bits don't match bits_sha256")
    return layers, header.metadata.get("weights_sha256")


def _shapes(header: Header) -> dict[str, torch.Size]:
    found = header.metadata.get("format")
    if found != FORMAT:
        what = f"format {found!r} is not known; update wcr-fast" if found else "write one with Masks.save"
        raise UsageError(f"{header.path}: not a file of masks ({FORMAT}): {what}")
    try:
        shapes = {name: torch.Size(shape) for name, shape in json.loads(header.metadata["shapes"]).items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        _damaged(header.path, "no shapes")
    if shapes.keys() != {info.name for info in header.tensors}:
        _damaged(header.path, "shapes and tensors have different names")
    for info in header.tensors:
        if info.dtype != "U8" or info.shape != (num_bytes(math.prod(shapes[info.name])),):
            _damaged(header.path, f"{info.name!r} is not the bits of shape {tuple(shapes[info.name])}")
    return shapes


def _damaged(path: Path, what: str) -> NoReturn:
    raise UsageError(f"{path}: damaged file of masks: {what}; write it again with Masks.save")
