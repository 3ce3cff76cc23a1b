"""The processes that hold parts of the same weights: they sum counts, compare notes and count what they send."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wcr_fast.ops.sharded import is_sharded


@dataclass
class Traffic:
    """What this process has sent: bytes, as collectives on rings send them, in so many messages."""

    bytes: int = 0
    messages: int = 0


_counting: list[Traffic] = []


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what selections inside of the block send.

    Example:
        >>> import torch, wcr_fast
        >>> with traffic() as sent:
        ...     threshold = wcr_fast.magnitude_threshold(torch.randn(10), 0.5)
        >>> sent.bytes  # nothing is sharded
        0
    """
    sent = Traffic()
    _counting.append(sent)
    try:
        yield sent
    finally:
        _counting.remove(sent)


def _sent(size: float) -> None:
    for sent in _counting:
        sent.bytes += round(size)
        sent.messages += 1


class Ranks:
    """The processes of one or more process groups that lie across each other, such as the dimensions of a mesh.

    All methods are collectives: every process calls them in the same order.

    Args:
        groups: their product is all processes; none for this process alone.
        device: where the groups' backends take tensors from.

    Attributes:
        size: number of processes.
        index: this process's number, row-major over the groups.
    """

    def __init__(self, groups: Sequence[Any] = (), device: torch.device | str = "cpu") -> None:
        self._groups = [group for group in groups if group.size() > 1]
        self._device = torch.device(device)
        self.size, self.index = 1, 0
        for group in self._groups:
            self.size, self.index = self.size * group.size(), self.index * group.size() + group.rank()

    def sum(self, counts: np.ndarray) -> np.ndarray:
        """Return the sums of an int32 or int64 array over all processes, the same in each."""
        total = torch.from_numpy(counts.copy()).to(self._device)
        for group in self._groups:
            torch.distributed.all_reduce(total, group=group)
            _sent(2 * counts.nbytes * (group.size() - 1) / group.size())
        return total.cpu().numpy()

    def gather(self, values: Sequence[int]) -> np.ndarray:
        """Return the int64 values of all processes, [size, number of values]."""
        everyone = torch.tensor([list(values)], dtype=torch.int64, device=self._device)
        for group in reversed(self._groups):
            parts = [torch.empty_like(everyone) for _ in range(group.size())]
            torch.distributed.all_gather(parts, everyone, group=group)
            _sent(everyone.nbytes * (group.size() - 1))
            everyone = torch.cat(parts)
        return everyone.cpu().numpy()

    def check_same(self, facts: object) -> None:
        """Raise ValueError in all processes where some selects otherwise than the first; facts have a stable repr."""
        digest = hashlib.sha256(repr(facts).encode()).digest()
        found = self.gather([int.from_bytes(digest[:8], "little", signed=True)])[:, 0]
        others = np.flatnonzero(found != found[0]).tolist()
        if others:
            raise ValueError(
                f"sharded weights: processes {others} select among other weights, or otherwise, than process 0: all "
                "must make the same call"
            )


def ranks_of(tensors: Sequence[Tensor]) -> Ranks:
    """Return the processes that hold the DTensors of a list: those of one mesh that has all, else all there are."""
    meshes = list(dict.fromkeys(t.device_mesh for t in tensors if is_sharded(t)))
    if not meshes:
        return Ranks()
    members = [set(mesh.mesh.flatten().tolist()) for mesh in meshes]
    widest = max(range(len(meshes)), key=lambda i: len(members[i]))
    if members[widest] == set().union(*members):
        return Ranks(_groups(meshes[widest]), _device(meshes[widest]))
    return Ranks([torch.distributed.group.WORLD], _device(meshes[0], torch.distributed.group.WORLD))


def ranks_across(tensor: Any, dims: Sequence[int]) -> Ranks:
    """Return the processes among which these dimensions of a DTensor are cut."""
    mesh = tensor.device_mesh
    cut = [i for i, placement in enumerate(tensor.placements) if getattr(placement, "dim", None) in dims]
    return Ranks([mesh.get_group(i) for i in cut], _device(mesh))


def _groups(mesh: Any) -> list[Any]:
    if mesh.get_coordinate() is None:
        raise ValueError(f"sharded weights: this process has no part of their mesh {mesh}: call on those that have")
    return [mesh.get_group(i) for i in range(mesh.ndim)]


def _device(mesh: Any, group: Any = None) -> str:
    """Return the device type that a mesh's messages need: the CPU where it will do, as counts are there."""
    config = torch.distributed.get_backend_config(group or mesh.get_group(0))
    return "cpu" if "cpu" in config else mesh.device_type


@contextlib.contextmanager
def all_or_none(tensors: Sequence[Tensor], op: str) -> Iterator[None]:
    """Run this process's own checks so that where one process raises, the others that hold the weights do, too."""
    ranks = ranks_of(tensors)
    try:
        yield
    except Exception:
        ranks.sum(np.ones(1, np.int64))
        raise
    if ranks.sum(np.zeros(1, np.int64))[0]:
        raise RuntimeError(f"{op}: another process found an error in its part of the weights; nothing was written")
