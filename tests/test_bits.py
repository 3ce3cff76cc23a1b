"""Bits of masks: both orders against a plain reading of their definition, and the mask enforced from them."""

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

import wcr_fast
from wcr_fast.torch_path import bits
from wcr_fast.torch_path import keep as torch_keep

SIZES = [0, 1, 7, 8, 31, 32, 1023, 1024, 1025, 32767, 32768, 32769, 2 * 32768 + 5, bits.PIECE + 3]


def bools(numel, seed=0):
    return torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < 0.5


def word_bit(words, element):
    """The bit of one element, by the definition of the interleaved words."""
    chunk, place = divmod(element, 32768)
    row, word = divmod(place, 1024)
    return int(words[chunk * 1024 + word]) >> row & 1


@pytest.mark.parametrize("numel", SIZES)
def test_round_trip(numel):
    mask = bools(numel)
    packed, words = bits.pack(mask), bits.pack_words(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == bits.num_bytes(numel) == -(-numel // 8)
    chunks = -(-numel // 32768)
    assert words.dtype == torch.int32
    assert words.numel() == (1024 * (chunks - 1) + min(1024, numel - 32768 * (chunks - 1)) if numel else 0)
    assert torch.equal(bits.unpack(packed, numel), mask)
    assert torch.equal(bits.unpack_words(words, 0, numel), mask)
    assert torch.equal(bits.words_for(packed, torch.empty(numel)), words)
    assert bits.count(packed) == int(mask.sum())


@settings(max_examples=60, deadline=None)
@given(numel=st.integers(1, 70000), seed=st.integers(0, 99), data=st.data())
def test_every_bit_is_where_the_format_says(numel, seed, data):
    mask = bools(numel, seed)
    packed, words = bits.pack(mask), bits.pack_words(mask)
    for element in {0, numel - 1, *data.draw(st.lists(st.integers(0, numel - 1), max_size=20))}:
        assert int(packed[element // 8]) >> (element % 8) & 1 == mask[element]
        assert word_bit(words, element) == mask[element]
    # What lies beyond the end is 0.
    assert int(packed[-1]) < 1 << (numel - 1) % 8 + 1
    assert bits.count(words.view(torch.uint8)) == bits.count(packed) == mask.sum()
    start = data.draw(st.integers(0, (numel - 1) // 32768)) * 32768
    count = data.draw(st.integers(1, numel - start))
    assert torch.equal(bits.unpack_words(words, start, count), mask[start : start + count])


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=0, max_size=4), seed=st.integers(0, 99), data=st.data())
def test_words_follow_the_memory_order(shape, seed, data):
    numel = torch.Size(shape).numel()
    mask = bools(numel, seed).view(shape)
    order = data.draw(st.permutations(range(len(shape))))
    dense = torch.empty([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
    words = bits.words_for(bits.pack(mask), dense)
    in_memory = torch.empty_like(dense, dtype=torch.bool).copy_(mask).permute(order).reshape(-1)
    assert torch.equal(bits.unpack_words(words, 0, numel), in_memory)


def test_masks_of_any_layout_are_packed_in_logical_order():
    mask = bools(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    wanted = bits.pack(mask.clone())
    assert torch.equal(bits.pack(mask.to(memory_format=torch.channels_last)), wanted)
    assert torch.equal(bits.pack(torch.cat([mask, mask], 3)[..., :5]), wanted)
    storage = torch.cat([mask.new_zeros(3), mask.view(-1)])
    assert torch.equal(bits.pack(storage[3:]), wanted)
    assert torch.equal(bits.pack(mask.float() - 0.5, lambda x: x > 0), wanted)


def enforce(backend, tensors, words):
    if backend == "torch":
        torch_keep.keep_(tensors, words)
    else:
        from wcr_fast.triton_path import keep

        keep.keep_(tensors, words)


def hostile(numel, dtype, device):
    """Values that a multiplication by zero would not clear."""
    x = torch.randn(numel).to(device, dtype)
    x[::5], x[1::5], x[2::5] = float("nan"), float("inf"), -0.0
    return x


def raw(tensor):
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_enforced_exactly(backend, device, dtype):
    sizes = [0, 1, 31, 1024, 32767, 32768, 32769, 3 * 32768 + 77]
    masks = [bools(n, seed=n).to(device) for n in sizes]
    tensors = [hostile(n, dtype, device) for n in sizes]
    tensors.append(hostile(40001, dtype, device)[1:])  # not aligned to 16 bytes
    masks.append(bools(40000).to(device))
    before = [t.clone() for t in tensors]
    enforce(backend, tensors, [bits.pack_words(m) for m in masks])
    for tensor, old, mask in zip(tensors, before, masks, strict=True):
        assert torch.equal(raw(tensor), raw(torch.where(mask, old, torch.zeros((), dtype=dtype, device=device))))


def test_enforced_in_any_layout(backend, device):
    plain = torch.randn(6, 4, 5, 3, device=device)
    strided = torch.randn(6, 4, 5, 6, device=device)
    tensors = [
        plain.to(memory_format=torch.channels_last),
        plain.double().permute(3, 1, 0, 2),
        strided[..., ::2],
        plain.bfloat16().to(memory_format=torch.channels_last)[:, 1:3],
        torch.randn((), device=device),
    ]
    masks = [bools(t.numel(), i).to(device).view(t.shape) for i, t in enumerate(tensors)]
    wanted = [torch.where(m, t, 0.0) for t, m in zip(tensors, masks, strict=True)]
    between = strided[..., 1::2].clone()
    enforce(backend, tensors, [bits.words_for(bits.pack(m), t) for t, m in zip(tensors, masks, strict=True)])
    for tensor, result in zip(tensors, wanted, strict=True):
        assert torch.equal(tensor, result)
    assert torch.equal(strided[..., 1::2], between)


def test_one_launch_for_each_dtype(monkeypatch):
    keep = pytest.importorskip("wcr_fast.triton_path.keep")
    launched = []
    monkeypatch.setattr(keep, "launch_keep", lambda rows, blocks, dtype: launched.append((dtype, len(rows))))
    tensors = [torch.randn(n, dtype=d, device=DEVICE) for n in (5, 40000, 0) for d in (torch.float32, torch.bfloat16)]
    words = [torch.zeros(bits.num_words(t.numel()), dtype=torch.int32, device=DEVICE) for t in tensors]
    with wcr_fast.backend("triton"):
        keep.keep_(tensors, words)
    assert launched == [(torch.float32, 2), (torch.bfloat16, 2)]
