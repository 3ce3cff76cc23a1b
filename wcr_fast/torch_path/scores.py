"""Selection by scores in torch and numpy: computed block by block where they are compared, never stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from wcr_fast.score import Scored, compute
from wcr_fast.torch_path.blocks import SERIAL, spread
from wcr_fast.torch_path.cuts import KEY_DTYPES, Cuts, keys_of, threshold_dtype
from wcr_fast.torch_path.select import _largest as largest
from wcr_fast.torch_path.window import KeyBlock, shares

LINE = 32


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of a block's size that run through tensors of one shape in logical order, in step."""
    first = tensors[0]
    if first.numel() <= SERIAL:
        if first.numel():
            yield tensors
    elif first[0].numel() > SERIAL:
        for slices in zip(*tensors, strict=True):
            yield from parts(*slices)
    else:
        yield from zip(*(t.split(SERIAL // first[0].numel()) for t in tensors), strict=True)


class ScoreSource:
    """The keys of some tensors' scores, tensor after tensor in logical order; see window.KeySource."""

    def __init__(self, tensors: Sequence[Tensor], scored: Scored) -> None:
        self.scored = scored
        self.tensors = [t.detach() for t in tensors]
        self.beside = [scored.beside(i, t) for i, t in enumerate(self.tensors)]
        self.dtype = threshold_dtype(t.dtype for t in tensors)
        self.numels = [t.numel() for t in tensors]

    def keys(self, w: Tensor, a: Tensor) -> Tensor:
        return keys_of(compute(self.scored.score, w, a), self.dtype)

    def sample(self, size: int) -> np.ndarray:
        """Return about ``size`` keys, in lines of neighbours at fixed places spread over all."""
        total = sum(self.numels)
        if total <= size:
            return np.concatenate([block.keys for block in self.streams(1)[0]]).reshape(-1, 1)
        places = spread(total, size // LINE)
        ends = np.cumsum(self.numels)
        lines = np.empty((len(places), LINE), str(KEY_DTYPES[self.dtype]).removeprefix("torch."))
        owners = np.searchsorted(ends, places, side="right")
        for i in np.unique(owners):
            mine = np.flatnonzero(owners == i)
            tensor, a = self.tensors[i], self.beside[i]
            inside = places[mine] - (ends[i] - self.numels[i])
            index = torch.from_numpy((inside[:, None] // LINE * LINE + np.arange(LINE)) % tensor.numel()).view(-1)
            at = torch.unravel_index(index.to(tensor.device), tensor.shape) if tensor.dim() else ()
            w, a = (x[at].reshape(-1).expand(index.numel()) for x in (tensor, a))
            lines[mine] = self.keys(w, a).cpu().numpy().reshape(-1, LINE)
        return lines

    def streams(self, count: int, windows: int = 1) -> list[Iterator[KeyBlock]]:
        """Return one iterator; see window.KeySource."""
        return [self._blocks()]

    def _blocks(self) -> Iterator[KeyBlock]:
        for i, pair in enumerate(zip(self.tensors, self.beside, strict=True)):
            for w, a in parts(*pair):
                yield KeyBlock([i], [0], self.keys(w, a).reshape(-1).cpu().numpy())


def apply(tensors: Sequence[Tensor], cuts: Cuts, out: Sequence[Tensor] | None, scored: Scored) -> None:
    """Write +0.0 to what the cuts (Q = 1) remove, or their keep masks (contiguous) into ``out``."""
    if cuts.bad.any():
        return
    source = ScoreSource(tensors, scored)
    keys, ties = cuts.key[:, 0].tolist(), cuts.ties[:, 0].cpu().numpy()
    stay = ties if len(keys) > 1 else shares(ties, cuts.counts.tied.cpu().numpy())[:, 0]
    for i, pair in enumerate(zip(source.tensors, source.beside, strict=True)):
        cut, left, start = keys[i if len(keys) > 1 else 0], int(stay[i]), 0
        for w, a in parts(*pair):
            key = source.keys(w, a)
            keep, tied = key > cut, key == cut
            if left > 0:
                within = tied.reshape(-1).cumsum(0).view(tied.shape) <= left
                keep |= tied & within
                left -= int(tied.sum())
            if out is None:
                w.masked_fill_(keep.logical_not_(), 0.0)
            else:
                out[i].view(-1)[start : start + w.numel()] = keep.reshape(-1)
                start += w.numel()


def apply_lines(
    views: Sequence[Tensor],
    beside: Sequence[Tensor],
    scored: Scored,
    counts: Sequence[int],
    sizes: Sequence[int],
    out: Sequence[Tensor] | None,
) -> None:
    """Keep the ``counts[i]`` best of every ``sizes[i]`` consecutive weights of views[i]: in place, or masks into out.

    ``sizes[i]`` divides the number of weights of a slice ``views[i][j]``.
    """
    for i, view in enumerate(views):
        if not view.numel():
            continue
        rows = max(1, SERIAL // max(view[0].numel(), 1))
        for start in range(0, len(view), rows):
            w, a = view[start : start + rows], beside[i][start : start + rows]
            key = keys_of(compute(scored.score, w, a), threshold_dtype((w.dtype,)))
            keep = largest(key.reshape(-1, sizes[i]).cpu().numpy(), counts[i])
            mask = torch.from_numpy(keep).view(w.shape).to(w.device)
            if out is None:
                w.masked_fill_(mask.logical_not_(), 0.0)
            else:
                out[i][start : start + rows].copy_(mask)
