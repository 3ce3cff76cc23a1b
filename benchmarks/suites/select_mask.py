"""Thresholds, masks and pruning by magnitude: ours, and what users write today (``benchmarks/rivals_select.py``).

A list's plain name means He-initialised weights of which 90 % go; "99 %" and the like another share, "ties" weights of
few levels, half of them zero. What is pruned in place is restored before each call, untimed. Sides that break ties
their own way are compared by count and magnitudes, ours by order too; a side that keeps too many is refused.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import wcr_fast
from benchmarks import rivals_select as rivals
from benchmarks import shapes
from benchmarks.harness import Case, Device, Side
from benchmarks.selecting import Check, Data, Op, Selecting
from benchmarks.verify_select import check_groups, check_masks, check_pruned, check_threshold
from wcr_fast.ops import select
from wcr_fast.torch_path.cuts import num_keep
from wcr_fast.weights import as_weights

N, M = 2, 4
SEVERAL = tuple(0.05 + 0.1 * i for i in range(10))
SCHEDULED = (0.5, 0.99, 0.999)


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


class Ways(Selecting):
    """The sides of every op on one list."""

    def threshold(self) -> list[Side]:
        """Return the ways to find one threshold: weights are read once."""

        def rival(way: str) -> Op:
            return lambda weights: rivals.THRESHOLDS[way](rivals.joined(weights), [self.keep])[0]

        ours = partial(wcr_fast.magnitude_threshold, sparsity=self.data.sparsity)
        return self.finding(ours, rival, partial(check_threshold, keep=self.keep))

    def layer_thresholds(self) -> list[Side]:
        """Return the ways to find a threshold for each layer: weights are read once."""

        def rival(way: str) -> Op:
            find, keep = rivals.THRESHOLDS[way], self.layer_keep
            return lambda ws: torch.cat([find(rivals.joined([w]), [k]) for w, k in zip(ws, keep, strict=True)])

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
        item = self.data.dtype.itemsize
        how = {"moved": 3 * item, "in_place": True}
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
        extra = self.extra("topk") + 8 * item
        sides = [
            self.side("ours", ours, in_order, ours=True, **how),
            self.side("ours, no record", no_record, in_order, ours=True, **how),
            self.side(
                "global_unstructured", unstructured, check, bind=rivals.Holder, fresh=True, extra=extra, moved=3 * item
            ),
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


def _each(check: Callable[[Tensor, Tensor, int], None], keep: Sequence[int]) -> Check:
    """Return a check of every layer by itself."""

    def layers(weights: list[Tensor], found: Sequence[Tensor]) -> None:
        for w, one, count in zip(weights, found, keep, strict=True):
            check(w, one, count)

    return layers


OPS: dict[str, Callable[[Ways], list[Side]]] = {
    "threshold": Ways.threshold,
    "ten thresholds": Ways.ten_thresholds,
    "layer thresholds": Ways.layer_thresholds,
    "masks": Ways.masks,
    "layer masks": Ways.layer_masks,
    "prune": Ways.prune,
    "2:4": Ways.groups,
}
