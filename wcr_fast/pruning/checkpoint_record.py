"""What pruning a checkpoint did: the record of a pruning, with its files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from wcr_fast.pruning.record import LayerRecord, PruneRecord, columns


@dataclass(frozen=True)
class StoredLayer(LayerRecord):
    """One tensor of a checkpoint after pruning.

    Attributes:
        dtype: the format's name of its dtype, such as BF16.
        file: the name of the file that holds it; several, joined by ", ", where it is sharded.
    """

    dtype: str = ""
    file: str = ""


@dataclass(frozen=True)
class CheckpointRecord(PruneRecord):
    """The outcome of :func:`prune_checkpoint`: ``str()`` is a table, ``to_dict()`` is ready for JSON.

    Attributes:
        source: the input's path.
        target: the output's path; None after a dry run.
        pruned_files: the names of the files pruned, sorted.
        copied_files: the files of a folder copied as they are.
        bytes_written: their size together; 0 after a dry run.
        notes: what else there is to say.
    """

    source: str = ""
    target: str | None = None
    pruned_files: tuple[str, ...] = ()
    copied_files: tuple[str, ...] = ()
    bytes_written: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        table = PruneRecord.__str__(dataclasses.replace(self, left_out=_summary(self.left_out)))
        done = f"wrote {self.target}: {self.bytes_written:,} bytes in {self._files()}"
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([table, *notes, done if self.target else "dry run: nothing written"])

    def _files(self) -> str:
        pruned, copied = len(self.pruned_files), len(self.copied_files)
        return f"{pruned} pruned and {copied} copied files" if copied else f"{pruned} file{'s' * (pruned > 1)}"


def _summary(left_out: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return one pair a reason: a language model leaves hundreds of gains and biases out. JSON has them all."""
    counts = Counter(reason for _, reason in left_out)
    first = {reason: name for name, reason in reversed(left_out)}
    return tuple((f"{n} tensor{'s' * (n > 1)}", f"{why}, such as {first[why]}") for why, n in counts.items())


def compare(records: Sequence[CheckpointRecord]) -> str:
    """Return dry runs of one checkpoint at several sparsities as a table: what each layer's share of zeros would be."""
    one = records[0]
    rows = [("layer", "shape", "weights", *(f"at {record.requested:g}" for record in records))]
    for i, layer in enumerate(one.per_layer):
        shares = (f"{record.per_layer[i].sparsity:.2%}" for record in records)
        rows.append((layer.name, "x".join(map(str, layer.shape)), f"{layer.numel:,}", *shares))
    rows.append(("all", "", f"{one.numel:,}", *(f"{record.achieved:.2%}" for record in records)))
    notes = [f"sparsity {record.requested:g}: note: {note}" for record in records for note in record.notes]
    left_out = [f"left out: {name} ({reason})" for name, reason in _summary(one.left_out)]
    headlines = [record.headline() for record in records]
    return "\n".join([*headlines, *columns(rows), *left_out, *notes, "dry run: nothing written"])
