"""Folders of ``torch.distributed.checkpoint``: what ``.metadata`` says, and where in the files the tensors' bytes lie.

``.metadata`` is a pickle: for each tensor its shape and chunks, for each chunk a stretch of a file, which holds that
chunk as ``torch.save`` writes it. It is read without running anything in it, and stays as it is, as offsets do.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from wcr_fast.errors import UsageError
from wcr_fast.pruning.checkpoint_files import CheckpointFiles, walk
from wcr_fast.pruning.inert_pickle import InertUnpickler, type_name
from wcr_fast.pruning.safetensors_io import reading
from wcr_fast.pruning.stored import Checksummed, Chunk, Contents, Shard, StoredTensor
from wcr_fast.pruning.torch_file import NotPlain, find_tensor

METADATA = ".metadata"
FLOATS = {"F16", "BF16", "F32", "F64"}
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "bool": "BOOL"}
# Entries of an optimizer: torch's names for its part of a state_dict, or for the state of one weight.
OPTIMIZER = re.compile(r"optim(izers?)?(_\w+)?")
STATE = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}


@dataclass(frozen=True, slots=True)
class _Place:
    """A stretch of a file that holds one chunk, and what it was transformed with."""

    file: str
    offset: int
    length: int
    transforms: Any


def is_dcp(source: Path) -> bool:
    """Tell whether a path is a folder of torch.distributed.checkpoint."""
    return source.is_dir() and (source / METADATA).is_file()


def read_dcp(source: Path) -> Contents:
    """Read what a folder of ``torch.distributed.checkpoint`` holds; list order is the order of the saved state_dict.

    Entries of an optimizer are no weights: those with a component named optim, optimizer or optimizers (or with such a
    beginning, as in optimizer_0) in their names, or a last one that is a name of torch's states, such as exp_avg.

    Raises:
        UsageError: damaged metadata, or chunks that don't make up their tensor, files that are missing or cut short.
    """
    entries, places = _read_metadata(source / METADATA)
    names = sorted({place.file for place in places.values()})
    found = walk(source)
    for name in names:
        if Path(name) not in found:
            raise UsageError(f"{source}: {METADATA} names {name!r}, which is not in the folder")
    files = CheckpointFiles(source, True, tuple(map(Path, names)), tuple(f for f in found if str(f) not in names))
    shards = tuple(Shard(source / name, (source / name).stat().st_size) for name in names)
    with contextlib.ExitStack() as stack:
        fds = [stack.enter_context(reading(shard.path)) for shard in shards]
        finder = _Finder(source, places, shards, dict(zip(names, fds, strict=True)))
        tensors = tuple(finder.tensor(entry) for entry in entries)
    reasons = {tensor.name: "optimizer state" for tensor in tensors if _is_state(tensor.name)}
    return Contents(files, shards, tensors, reasons, finder.unfit, tuple(finder.checksums))


def _is_state(name: str) -> bool:
    components = name.split(".")
    return components[-1] in STATE or any(OPTIMIZER.fullmatch(component) for component in components)


class _Finder:
    """Finds the chunks of tensors in open files.

    Attributes:
        unfit: tensor -> why it can't be pruned where it lies.
        checksums: the records that hold chunks, with the places of their checksums.
    """

    def __init__(
        self,
        source: Path,
        places: Mapping[tuple[str, tuple[int, ...]], _Place],
        shards: Sequence[Shard],
        fds: Mapping[str, int],
    ) -> None:
        self.source, self.places, self.shards, self.fds = source, places, shards, fds
        self.index = {name: i for i, name in enumerate(fds)}
        self.unfit: dict[str, str] = {}
        self.checksums: list[Checksummed] = []

    def tensor(self, entry: _Entry) -> StoredTensor:
        """Return a tensor, with chunks where it may be a weight."""
        dtype, chunks = DTYPES.get(entry.dtype, entry.dtype), []
        if dtype in FLOATS and len(entry.shape) > 1 and math.prod(entry.shape) and not _is_state(entry.name):
            _check_boxes(self.source, entry)
            try:
                chunks = [self._chunk(entry, offset, shape) for offset, shape in entry.boxes if math.prod(shape)]
            except NotPlain as error:
                self.unfit[entry.name] = str(error)
        return StoredTensor(entry.name, dtype, entry.shape, tuple(sorted(chunks, key=lambda chunk: chunk.offset)))

    def _chunk(self, entry: _Entry, offset: tuple[int, ...], shape: tuple[int, ...]) -> Chunk:
        place = self.places.get((entry.name, offset))
        if place is None:
            _damaged(self.source, f"{entry.name!r} has a chunk at {list(offset)} that is in no file")
        if place.transforms:
            raise NotPlain(f"written through {place.transforms}")
        shard = self.index[place.file]
        if place.offset + place.length > self.shards[shard].size:
            raise UsageError(
                f"{self.shards[shard].path}: truncated: a chunk of {entry.name!r} should end beyond its end"
            )
        saved = find_tensor(self.fds[place.file], place.offset, place.length)
        if (saved.dtype, saved.shape) != (entry.dtype, shape):
            raise NotPlain(f"{METADATA} says {entry.dtype} {list(shape)}, the file {saved.dtype} {list(saved.shape)}")
        self.checksums.append(Checksummed(shard, *saved.record, saved.crc_places))
        return Chunk(shard, saved.start, saved.stop, shape, offset)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor as the metadata describes it: its dtype (torch's name), its shape, offset and shape of each chunk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def _damaged(source: Path, what: str) -> NoReturn:
    raise UsageError(f"{source / METADATA}: damaged, or not of torch.distributed.checkpoint: {what}")


def _check_boxes(source: Path, entry: _Entry) -> None:
    """Raise UsageError where the chunks don't make up the tensor."""
    rank, held = len(entry.shape), 0
    for offset, shape in entry.boxes:
        inside = len(offset) == len(shape) == rank and all(
            0 <= at <= at + size <= whole for at, size, whole in zip(offset, shape, entry.shape, strict=True)
        )
        if not inside:
            _damaged(source, f"{entry.name!r} has a chunk {list(shape)} at {list(offset)}, and is {list(entry.shape)}")
        held += math.prod(shape)
    starts = {offset for offset, shape in entry.boxes if math.prod(shape)}
    if held != math.prod(entry.shape) or len(starts) < sum(math.prod(shape) > 0 for _, shape in entry.boxes):
        _damaged(source, f"the chunks of {entry.name!r} hold {held:,} of {math.prod(entry.shape):,} elements")


def _read_metadata(path: Path) -> tuple[list[_Entry], dict[tuple[str, tuple[int, ...]], _Place]]:
    """Return the tensors in the order saved, and where each chunk, by name and offset, and every other entry lies."""
    try:
        with path.open("rb") as file:
            fields = InertUnpickler(file).load().field
        entries = [
            _Entry(
                name,
                type_name(entry.field("properties").state[0]),
                entry.field("size"),
                tuple((chunk.field("offsets"), chunk.field("sizes")) for chunk in entry.field("chunks")),
            )
            for name, entry in fields("state_dict_metadata").items()
            if type_name(entry) == "TensorStorageMetadata"
        ]
        places = {
            (index.field("fqn"), index.field("offset")): _Place(
                place.field("relative_path"),
                place.field("offset"),
                place.field("length"),
                place.field("transform_descriptors"),
            )
            for index, place in fields("storage_data").items()
        }
        outside = [place.file for place in places.values() if Path(place.file).name != place.file]
        numbers = [(place.offset, place.length) for place in places.values()]
        shapes = [shape for entry in entries for shape in (entry.shape, *(part for box in entry.boxes for part in box))]
        if not all(type(n) is int and n >= 0 for group in (*numbers, *shapes) for n in group):
            _damaged(path.parent, "a size is not a number")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UsageError:
        raise
    except Exception as error:  # the bytes of a pickle can ask for anything
        _damaged(path.parent, f"{type(error).__name__}: {error}")
    if outside:
        _damaged(path.parent, f"{outside[0]!r} is not a file of this folder")
    return entries, places
