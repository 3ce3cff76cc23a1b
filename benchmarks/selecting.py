"""One list's weights for a selection: drawn, given to each side, restored before each call, and checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.harness import Device, Side, Subject, captured
from benchmarks.rivals_select import ways
from wcr_fast.torch_path.cuts import num_keep

Op = Callable[[Any], Any]  # what is timed: a list, or what `bind` made of it -> its result
Check = Callable[[list[Tensor], Any], None]  # weights as they were, result

SPARSITY = 0.9
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
class Selecting:
    """What all sides of the cases on one list have in common."""

    data: Data
    listed: Sequence[shapes.Shape]
    device: Device

    @cached_property
    def count(self) -> int:
        """The number of weights."""
        return shapes.values_of(self.listed)

    @cached_property
    def keep(self) -> int:
        """How many stay."""
        return num_keep(self.data.sparsity, self.count)

    @cached_property
    def layers(self) -> list[int]:
        """The number of weights in each layer."""
        return [torch.Size(shape).numel() for shape in self.listed]

    @cached_property
    def layer_keep(self) -> list[int]:
        """How many stay in each layer."""
        return [num_keep(self.data.sparsity, numel) for numel in self.layers]

    def ranked(self) -> list[str]:
        """Return the rivals' ways of ranking, without those that would take most of the time."""
        cuda = self.device.name == "cuda"
        left_out = {"kthvalue"} if cuda and self.count > KTHVALUE_MAX else set()
        if not cuda and self.data != Data(self.data.list):
            left_out.add("sort")  # by far the slowest on the CPU
        return [way for way in ways(self.device.name) if way not in left_out]

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
            warnings.filterwarnings("ignore", "prune_: nothing is left of")  # at 99.9 %: it's so, and no news each call
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
