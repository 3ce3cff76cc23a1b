"""What a pruning did: counts, thresholds and a table per layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerRecord:
    """One weight after pruning.

    Attributes:
        name: all its names, joined by " = " where it is shared.
        shape: its shape.
        numel: its number of weights.
        removed: weights taken out by the selection, zeros among them.
        zeros: zeros it holds now.
        threshold: the smallest magnitude kept in the pool it was compared in; None for row and n:m.
        note: what else there is to say, such as an n:m remainder that stayed dense.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    removed: int
    zeros: int
    threshold: float | None = None
    note: str = ""

    @property
    def sparsity(self) -> float:
        """Return the share of zeros; 0 for a layer without weights."""
        return self.zeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class PruneRecord:
    """The outcome of :func:`wcr_fast.prune_`: ``str()`` is a table, ``to_dict()`` is ready for JSON.

    Attributes:
        scope: the scope asked for.
        requested: the sparsity asked for; None for n:m.
        asked: weights that had to go, over all layers.
        pruned_now: weights that this call turned from nonzero to zero.
        zeros: zeros in all, afterwards.
        numel: weights in all.
        threshold: the smallest magnitude kept (scope global; inf where nothing is); None for other scopes.
        per_layer: one row per weight.
        left_out: names of the parameters not pruned, each with the reason.
    """

    scope: str
    requested: float | None
    asked: int
    pruned_now: int
    zeros: int
    numel: int
    threshold: float | None
    per_layer: tuple[LayerRecord, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def achieved(self) -> float:
        """Return the share of zeros over all layers."""
        return self.zeros / self.numel if self.numel else 0.0

    @property
    def removed(self) -> int:
        """Return the number of weights taken out by the selection, zeros among them."""
        return sum(layer.removed for layer in self.per_layer)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON; an infinite threshold becomes the string "inf"."""
        record = dataclasses.asdict(self)
        record["achieved"] = self.achieved
        record["threshold"] = _plain(self.threshold)
        record["left_out"] = [list(pair) for pair in self.left_out]
        record["per_layer"] = [
            {
                **dataclasses.asdict(layer),
                "shape": list(layer.shape),
                "threshold": _plain(layer.threshold),
                "sparsity": layer.sparsity,
            }
            for layer in self.per_layer
        ]
        return record

    def __str__(self) -> str:
        rows = [("layer", "shape", "weights", "removed", "zeros", "sparsity")]
        rows += [
            (
                layer.name,
                "x".join(map(str, layer.shape)) or "scalar",
                f"{layer.numel:,}",
                f"{layer.removed:,}",
                f"{layer.zeros:,}",
                f"{layer.sparsity:.2%}",
            )
            for layer in self.per_layer
        ]
        rows.append(("all", "", f"{self.numel:,}", f"{self.removed:,}", f"{self.zeros:,}", f"{self.achieved:.2%}"))
        lines = [self.headline(), *columns(rows)]
        lines += [f"{layer.name}: {layer.note}" for layer in self.per_layer if layer.note]
        lines += [f"left out: {name} ({reason})" for name, reason in self.left_out]
        return "\n".join(lines)

    def headline(self) -> str:
        """Return the whole in one line."""
        target = f"sparsity {self.requested:g}, " if self.requested is not None else ""
        cut = f", threshold {self.threshold:.6g}" if self.threshold is not None else ""
        return f"{target}scope {self.scope}: {self.asked:,} asked, {self.pruned_now:,} pruned now{cut}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines of aligned columns: two of names, to the left, then numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if c < 2 else '>'}{widths[c]}}" for c, cell in enumerate(row)).rstrip() for row in rows
    ]


def _plain(value: float | None) -> float | str | None:
    return str(value) if value is not None and not math.isfinite(value) else value
