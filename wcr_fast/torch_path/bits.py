"""Masks as bits, one per weight, 1 = kept; a byte or word holds its first element in its lowest bit.

Plain order, in which masks are held and saved: bit k of byte b is element 8 b + k in logical row-major order.

Interleaved words, which the kernels read: of each chunk of 32768 elements in memory order, bit j of word i is element
1024 j + i, so that neighbours in memory find their bits in neighbouring words. Chunk k's words start at 1024 k; a last
chunk of c elements has min(1024, c) of them.

Both take 8 bools at a time as one int64. Masks pass through in pieces, so memory is that of a piece beside the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from wcr_fast.torch_path.layout import flat_view

CHUNK = 32768
WORDS = 1024

# Elements handled at a time: whole chunks, and small enough for the cache.
PIECE = 16 * CHUNK

# Moves bit 8 k of an int64 (byte k, a bool) to bit 56 + k; no two products meet, so nothing carries.
_GATHER = 0x0102040810204080


def num_bytes(numel: int) -> int:
    """Return how many bytes hold so many bits."""
    return -(-numel // 8)


def num_words(numel: int) -> int:
    """Return how many interleaved words hold so many bits."""
    whole, rest = divmod(numel, CHUNK)
    return WORDS * whole + min(rest, WORDS)


def _gather(bools: Tensor) -> Tensor:
    """Pack flat bools, a multiple of 8 of them and contiguous, into bytes."""
    return ((bools.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


@functools.cache
def _spread_table(device: torch.device) -> Tensor:
    """Return the 8 bools of every byte as one int64."""
    byte = torch.arange(256, device=device)[:, None]
    return (byte >> torch.arange(8, device=device) & 1).bool().view(torch.int64).view(-1)


def _spread(packed: Tensor) -> Tensor:
    """Unpack bytes into 8 bools each."""
    return _spread_table(packed.device).index_select(0, packed.to(torch.int32)).view(torch.bool)


def _padded(values: Tensor, numel: int) -> Tensor:
    """Return flat values in fresh memory, followed by zeros."""
    padded = values.new_zeros(numel)
    padded[: values.numel()] = values
    return padded


def pack(tensor: Tensor, test: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Pack a bool tensor, or ``test`` of pieces of any tensor, into plain bits: uint8 [ceil(numel / 8)].

    Example:
        >>> pack(torch.tensor([True, False, True])).tolist()
        [5]
    """
    flat = tensor.detach().reshape(-1)
    packed = torch.empty(num_bytes(flat.numel()), dtype=torch.uint8, device=flat.device)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE]
        bools = piece if test is None else test(piece)
        at = start // 8
        size = num_bytes(bools.numel())
        packed[at : at + size] = _gather(_padded(bools, 8 * size))
    return packed


def unpack(packed: Tensor, numel: int) -> Tensor:
    """Unpack plain bits into bool [numel]."""
    bools = torch.empty(numel, dtype=torch.bool, device=packed.device)
    for start in range(0, numel, PIECE):
        piece = packed[start // 8 : (start + PIECE) // 8]
        bools[start : start + PIECE] = _spread(piece)[: numel - start]
    return bools


def count(packed: Tensor) -> int:
    """Return how many bits are set; waits for the device."""
    pieces = packed.split(PIECE // 8)
    return int(torch.stack([_spread(piece).sum() for piece in pieces]).sum()) if packed.numel() else 0


def pack_words(flat: Tensor) -> Tensor:
    """Pack bool [n], in memory order, into interleaved words: int32 [num_words(n)]."""
    words = torch.empty(num_words(flat.numel()), dtype=torch.int32, device=flat.device)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE]
        chunks = _padded(piece, -(-piece.numel() // CHUNK) * CHUNK).view(-1, CHUNK // WORDS, WORDS)
        at = start // (CHUNK // WORDS)
        part = words[at : at + PIECE // (CHUNK // WORDS)]
        part.copy_(_gather(chunks.transpose(1, 2).reshape(-1)).view(torch.int32)[: part.numel()])
    return words


def unpack_words(words: Tensor, start: int, count: int) -> Tensor:
    """Unpack interleaved words into bool [count], the elements from ``start`` (a multiple of 32768) in memory order."""
    first, (chunks, rest) = start // CHUNK, divmod(count, CHUNK)
    pieces = []
    if chunks or not rest:
        spread = _spread(words[first * WORDS : (first + chunks) * WORDS].view(torch.uint8))
        pieces.append(spread.view(-1, WORDS, CHUNK // WORDS).transpose(1, 2).reshape(-1))
    if rest:  # of a short chunk only the rows that it has
        part = words[(first + chunks) * WORDS :][:WORDS]
        rows = torch.arange(-(-rest // WORDS), dtype=torch.int32, device=words.device)[:, None]
        pieces.append(((part >> rows) & 1).bool().view(-1)[:rest])
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def words_for(packed: Tensor, like: Tensor) -> Tensor:
    """Turn the plain bits of a tensor of this shape into interleaved words, on its device and in its memory order.

    Where the tensor has gaps, the order is that of ``torch.empty_like(like)``.
    """
    packed, numel = packed.to(like.device), like.numel()
    if not like.is_contiguous():
        mask = torch.empty_like(like, dtype=torch.bool, requires_grad=False)
        return pack_words(flat_view(mask.copy_(unpack(packed, numel).view(like.shape))))
    words = torch.empty(num_words(numel), dtype=torch.int32, device=like.device)
    for start in range(0, numel, PIECE):
        piece = unpack(packed[start // 8 : (start + PIECE) // 8], min(PIECE, numel - start))
        part = pack_words(piece)
        words[start // (CHUNK // WORDS) :][: part.numel()] = part
    return words
