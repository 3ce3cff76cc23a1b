"""Thresholds, masks and pruning by magnitude: ours, and what users write today (``benchmarks/rivals_select.py``).

A list's plain name means He-initialised weights of which 90 % go; "99 %" and the like another share, "ties" weights of
few levels, half of them zero. What is pruned in place is restored before each call, untimed. Sides that break ties
their own way are compared by count and magnitudes, ours by order too; a side that keeps too many is refused.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import wcr_fast
from benchmarks import rivals_select as rivals
from benchmarks import shapes
from benchmarks.harness import Case, Device, Side, Subject, captured
from benchmarks.verify_select import check_groups, check_masks, check_pruned, check_threshold
from wcr_fast.ops import select
from wcr_fast.torch_path.cuts import num_keep
from wcr_fast.weights import as_weights

Op = Callable[[Any], Any]  # what is timed: a list, or what `bind` made of it -> its result
Check = Callable[[list[Tensor], Any], None]  # weights as they were, result

N, M = 2, 4
SPARSITY = 0.9
SEVERAL = tuple(0.05 + 0.1 * i for i in range(10))
SCHEDULED = (0.5, 0.99, 0.999)
# torch.kthvalue takes one block of a GPU for a whole list: seconds beyond so many weights.
KTHVALUE_MAX = 30_000_000


class Data(NamedTuple):
    """The weights of a case, and the share that goes."""

    list: str
    dtype: torch.dtype = torch.float32
    sparsity: float = SPARSITY
    ties: bool = False

    def label(self) -> str:
        """Return the list's name with what is special about it."""
        share = "" if self.sparsity == SPARSITY else f" {100 * self.sparsity:g} %"
        return self.list + " ties" * self.ties + share


def plan(device: Device, *, quick: bool) -> list[tuple[str, Data]]:
    """Return (op, data) of every case; what must not be missing when time runs out comes first."""
    if device.name == "cpu" or quick:
        name = "tiny" if device.name == "cpu" and quick else "resnet18"
        first, ties, narrow = Data(name), Data(name, ties=True), Data(name, torch.bfloat16)
        found = [(op, first) for op in ("prune", "threshold", "masks", "2:4")] + [("prune", ties), ("prune", narrow)]
        found += [(op, first) for op in ("ten thresholds", "layer thresholds", "layer masks")]
        if quick:
            return found
        found += [("threshold", ties), ("threshold", narrow), ("2:4", narrow)]
        return found + [(op, first._replace(sparsity=s)) for s in SCHEDULED for op in ("prune", "threshold")]
    nets = [Data("resnet50"), Data("llama_7b", torch.bfloat16), Data("gpt2"), Data("llama_1b", torch.bfloat16)]
    nets.append(Data("resnet18"))
    some, large = Data("resnet50"), Data("llama_1b", torch.bfloat16)
    listed = list(itertools.product(("prune", "threshold"), nets))
    listed += [("2:4", net) for net in nets[:4]] + [("masks", net) for net in nets[:4]]
    listed += [(op, Data("gpt2", ties=True)) for op in ("prune", "threshold")]
    listed.append(("prune", Data("gpt2", torch.bfloat16, ties=True)))
    listed += [("prune", Data("gpt2", sparsity=s)) for s in SCHEDULED]
    listed += itertools.product(("ten thresholds", "layer thresholds"), (some, large))
    listed.append(("layer masks", some))
    narrow = [Data(net, torch.bfloat16) for net in ("gpt2", "resnet50")]
    return listed + list(itertools.product(("prune", "threshold"), narrow))


def cases(device: Device, *, quick: bool) -> Iterator[Case]:
    """Yield one case for each op and list."""
    for op, data in plan(device, quick=quick):
        listed = shapes.weights_of(shapes.LISTS[data.list]())
        ways = Ways(data, listed, device)
        size = ways.count * data.dtype.itemsize
        dtype = str(data.dtype).removeprefix("torch.")
        yield Case(data.label(), op, dtype, len(listed), ways.count, size, tuple(OPS[op](ways)))


def drawn(listed: Sequence[shapes.Shape], data: Data, device: torch.device) -> list[Tensor]:
    """Return Gaussian weights scaled as He initialisation does; with ties, of few levels and half of them zero."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: shapes.Shape) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        if data.ties:
            zero = torch.rand(shape, generator=generator, device=device) < 0.5
            return values.mul_(2.0).round_().mul_(2.0**-6).masked_fill_(zero, 0.0).to(data.dtype)
        return values.mul_((2.0 / torch.Size(shape[1:]).numel()) ** 0.5).to(data.dtype)

    return [draw(shape) for shape in listed]


@dataclass(frozen=True)
class Ways:
    """The sides of the cases on one list."""

    data: Data
    listed: Sequence[shapes.Shape]
    device: Device

    @property
    def count(self) -> int:
        """The number of weights."""
        return shapes.values_of(self.listed)

    @property
    def keep(self) -> int:
        """How many stay."""
        return num_keep(self.data.sparsity, self.count)

    @property
    def layers(self) -> list[int]:
        """The number of weights in each layer."""
        return [torch.Size(shape).numel() for shape in self.listed]

    @property
    def layer_keep(self) -> list[int]:
        """How many stay in each layer."""
        return [num_keep(self.data.sparsity, numel) for numel in self.layers]

    def ranked(self) -> list[str]:
        """Return the rivals' ways of ranking, without those that would take most of the time."""
        cuda = self.device.name == "cuda"
        left_out = {"kthvalue"} if cuda and self.count > KTHVALUE_MAX else set()
        if not cuda and self.data != Data(self.data.list):
            left_out.add("sort")  # by far the slowest on the CPU
        return [way for way in rivals.ways(self.device.name) if way not in left_out]

    def threshold(self) -> list[Side]:
        """Return the ways to find one threshold: weights are read once."""

        def rival(way: str) -> Op:
            return lambda weights: rivals.THRESHOLDS[way](rivals.joined(weights), [self.keep])[0]

        ours = partial(wcr_fast.magnitude_threshold, sparsity=self.data.sparsity)
        return self.finding(ours, rival, partial(check_threshold, keep=self.keep))

    def layer_thresholds(self) -> list[Side]:
        """Return the ways to find a threshold for each layer: weights are read once."""

        def rival(way: str) -> Op:
            find = rivals.THRESHOLDS[way]
            return lambda ws: torch.cat(
                [find(rivals.joined([w]), [k]) for w, k in zip(ws, self.layer_keep, strict=True)]
            )

        ours = partial(wcr_fast.magnitude_threshold, sparsity=self.data.sparsity, scope="layer")
        return self.finding(ours, rival, _each(lambda w, t, k: check_threshold([w], t, k), self.layer_keep))

    def ten_thresholds(self) -> list[Side]:
        """Return the ways to find thresholds at ten sparsities: weights are read once for all."""
        keep = [num_keep(s, self.count) for s in SEVERAL]

        def check(weights: list[Tensor], found: Tensor) -> None:
            for threshold, count in zip(found, keep, strict=True):
                check_threshold(weights, threshold, count)

        def ten_calls(weights: list[Tensor]) -> Tensor:
            return torch.stack([wcr_fast.magnitude_threshold(weights, s) for s in SEVERAL])

        def rival(way: str) -> Op:
            return lambda weights: rivals.THRESHOLDS[way](rivals.joined(weights), keep)

        ours = partial(wcr_fast.magnitude_threshold, sparsity=SEVERAL)
        sides = self.finding(ours, rival, check, density=1.0 - min(SEVERAL), ways=("topk", "sort", "partition"))
        return [sides[0], self.side("ours, ten calls", ten_calls, check, ours=True), *sides[1:]]

    def masks(self) -> list[Side]:
        """Return the ways to make masks of bool: weights are read twice, masks written."""

        def rival(way: str) -> Op:
            return lambda weights: rivals.masks(way, weights, self.keep)

        ours = partial(wcr_fast.magnitude_masks, sparsity=self.data.sparsity)
        return self.masking(ours, rival, lambda by_order: partial(check_masks, keep=self.keep, by_order=by_order))

    def layer_masks(self) -> list[Side]:
        """Return the ways to make masks layer by layer; NNCF's are checked against its own rounding."""

        def rival(way: str) -> Op:
            return lambda ws: [rivals.masks(way, [w], k)[0] for w, k in zip(ws, self.layer_keep, strict=True)]

        def check(by_order: bool, keep: Sequence[int] = self.layer_keep) -> Check:
            return _each(lambda w, mask, k: check_masks([w], [mask], k, by_order=by_order), keep)

        ours = partial(wcr_fast.magnitude_masks, sparsity=self.data.sparsity, scope="layer")
        sides = self.masking(ours, rival, check)
        if importlib.util.find_spec("nncf") and "kthvalue" in self.ranked():  # which it calls
            share = self.data.sparsity
            own = [rivals.nncf_keep(share, numel) for numel in self.layers]
            bind = partial(rivals.in_nncf, sparsity=share)
            op = partial(rivals.nncf_masks, sparsity=share)
            extra = self.extra("kthvalue") + 2
            sides.append(self.side("nncf", op, check(False, own), moved=self.masked, extra=extra, bind=bind))
        return sides

    def prune(self) -> list[Side]:
        """Return the ways to prune in place: weights are read to select, then read and written."""
        how = {"moved": 3 * self.data.dtype.itemsize, "in_place": True}
        check, in_order = (partial(check_pruned, keep=self.keep, by_order=by_order) for by_order in (False, True))

        def ours(weights: list[Tensor]) -> list[Tensor]:
            wcr_fast.prune_(weights, self.data.sparsity)
            return weights

        def no_record(weights: list[Tensor]) -> list[Tensor]:
            path = select.path_for(weights)
            path.apply(weights, path.find_cuts(weights, select.keep_counts(weights, [self.data.sparsity], "global")))
            return weights

        def rival(way: str) -> Op:
            return lambda weights: rivals.prune_(way, weights, self.keep)

        unstructured = partial(rivals.global_unstructured, sparsity=self.data.sparsity)
        extra = self.extra("topk") + 8 * self.data.dtype.itemsize
        sides = [
            self.side("ours", ours, in_order, ours=True, **how),
            self.side("ours, no record", no_record, in_order, ours=True, **how),
            self.side("global_unstructured", unstructured, check, bind=rivals.Holder, fresh=True, extra=extra, **how),
        ]
        for way in (way for way in self.ranked() if way in rivals.LARGEST):
            sides.append(self.side(way, rival(way), check, extra=self.extra(way) + 1, **how))
        return sides + self.in_graph("ours, no record", no_record, in_order, **how)

    def groups(self) -> list[Side]:
        """Return the ways to prune n:m in place: weights are read and written once."""
        item = self.data.dtype.itemsize
        how = {"moved": 2 * item, "in_place": True}
        check, in_order = (partial(check_groups, n=N, m=M, by_order=by_order) for by_order in (False, True))

        def ours(weights: list[Tensor]) -> list[Tensor]:
            wcr_fast.prune_(weights, None, scope=f"{N}:{M}")
            return weights

        def no_record(weights: list[Tensor]) -> list[Tensor]:
            select.path_for(weights).apply_nm(select.group_views(as_weights(weights, op="2:4"), weights), N, M)
            return weights

        def rival(way: str) -> Op:
            return lambda weights: rivals.prune_groups_(way, weights, N, M)

        # Weight by weight: the largest one's magnitudes, values and indices twice, masks.
        extra = max(self.layers) / self.count * (2 * item + 2 * (item + 8) + 1)
        sides = [
            self.side("ours", ours, in_order, ours=True, **how),
            self.side("ours, no record", no_record, in_order, ours=True, **how),
        ]
        sides += [self.side(way, rival(way), check, extra=extra, **how) for way in rivals.GROUPS]
        return sides + self.in_graph("ours, no record", no_record, in_order, **how)

    @property
    def masked(self) -> int:
        """Bytes to move for each weight to make masks."""
        return 2 * self.data.dtype.itemsize + 1

    def finding(
        self,
        ours: Op,
        rival: Callable[[str], Op],
        check: Check,
        *,
        density: float | None = None,
        ways: Sequence[str] = tuple(rivals.THRESHOLDS),
    ) -> list[Side]:
        """Return ours and rivals' ways to find thresholds, where at most such a share of the weights stays."""
        sides = [self.side("ours", ours, check, ours=True)]
        for way in (way for way in self.ranked() if way in ways):
            sides.append(self.side(way, rival(way), check, extra=self.extra(way, density)))
        return sides + self.in_graph("ours", ours, check)

    def masking(self, ours: Op, rival: Callable[[str], Op], check: Callable[[bool], Check]) -> list[Side]:
        """Return ours, which goes by order, and the rivals' ways to make masks."""
        sides = [self.side("ours", ours, check(True), moved=self.masked, ours=True)]
        for way in (way for way in self.ranked() if way in rivals.LARGEST):
            sides.append(self.side(way, rival(way), check(False), moved=self.masked, extra=self.extra(way) + 1))
        return sides + self.in_graph("ours", ours, check(True), moved=self.masked)

    def in_graph(self, name: str, op: Op, check: Check, **how: Any) -> list[Side]:
        """Return the same side replayed from a CUDA graph, where there are any."""
        if self.device.name != "cuda":
            return []
        return [self.side(f"{name}, in a graph", _run, check, ours=True, bind=partial(_replayed, op), **how)]

    def extra(self, way: str, density: float | None = None) -> float:
        """Return what a rival's temporaries take, in bytes for each weight, where it keeps so many of them."""
        item = self.data.dtype.itemsize
        density = 1.0 - self.data.sparsity if density is None else density
        pair = item + 8  # a value and its index
        return item + {"sort": 2 * pair, "kthvalue": pair, "partition": 8}.get(way, 2 * density * pair)

    def side(
        self,
        name: str,
        op: Op,
        check: Check,
        *,
        ours: bool = False,
        moved: int | None = None,
        extra: float = 0.0,
        in_place: bool = False,
        bind: Callable[[list[Tensor]], Any] | None = None,
        fresh: bool = False,
    ) -> Side:
        """Describe one side.

        Args:
            name: who.
            op: what is timed.
            check: raises WrongResult when the result is wrong.
            ours: whether it's ours.
            moved: bytes that the op must move for each weight; None: the weight itself, once.
            extra: bytes of its temporaries for each weight.
            in_place: it writes the weights, which must be restored before each call.
            bind: makes the op's argument of a list; None: the list itself.
            fresh: the argument serves one call only.
        """
        item = self.data.dtype.itemsize

        def build(copies: int) -> Subject:
            dense = drawn(self.listed, self.data, self.device.torch_device)
            made = [[w.clone() for w in dense] for _ in range(copies - (not in_place))]
            made += [dense] * (not in_place)
            bound = [bind(weights) if bind else weights for weights in made]

            def renew(restored: int, used: int) -> None:
                if in_place:
                    torch._foreach_copy_(made[restored], dense)
                if fresh:
                    bound[used] = bind(made[used])

            def verify() -> None:
                renew(0, 0)
                check(dense, op(bound[0]))

            for i in range(copies):
                renew(i, i)  # binding may have run the op
            # The copy used before is restored, not the one to be used: that must not come from the cache.
            prepare = (lambda i: renew(i - 1, i)) if in_place or fresh else None
            return Subject(lambda i: op(bound[i]), verify, prepare)

        held = self.count * (item * (1 + in_place) + extra)
        return Side(name, build, ours, self.count * (moved or item), int(held))


def _each(check: Callable[[Tensor, Tensor, int], None], keep: Sequence[int]) -> Check:
    """Return a check of every layer by itself."""

    def layers(weights: list[Tensor], found: Sequence[Tensor]) -> None:
        for w, one, count in zip(weights, found, keep, strict=True):
            check(w, one, count)

    return layers


def _replayed(op: Op, weights: list[Tensor]) -> Callable[[], Any]:
    """Return a call that replays the op from a CUDA graph and gives its result."""
    results: list[Any] = []

    def call() -> None:
        results[:] = [op(weights)]

    replay = captured(call)

    def run() -> Any:
        replay()
        return results[0]

    return run


def _run(call: Callable[[], Any]) -> Any:
    return call()


OPS: dict[str, Callable[[Ways], list[Side]]] = {
    "threshold": Ways.threshold,
    "ten thresholds": Ways.ten_thresholds,
    "layer thresholds": Ways.layer_thresholds,
    "masks": Ways.masks,
    "layer masks": Ways.layer_masks,
    "prune": Ways.prune,
    "2:4": Ways.groups,
}
