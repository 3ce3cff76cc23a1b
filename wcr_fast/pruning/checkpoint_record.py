"""What pruning a checkpoint did: the record of a pruning, with its files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from wcr_fast.pruning.record import LayerRecord, PruneRecord


@dataclass(frozen=True)
class StoredLayer(LayerRecord):
    """One tensor of a checkpoint after pruning.

    Attributes:
        dtype: the format's name of its dtype, such as BF16.
        file: the name of the file that holds it.
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
        # A language model leaves hundreds of gains and biases out: here one line a reason, all of them in JSON.
        counts = Counter(reason for _, reason in self.left_out)
        first = {reason: name for name, reason in reversed(self.left_out)}
        summary = tuple((f"{n} tensor{'s' * (n > 1)}", f"{why}, such as {first[why]}") for why, n in counts.items())
        table = PruneRecord.__str__(dataclasses.replace(self, left_out=summary))
        done = f"wrote {self.target}: {self.bytes_written:,} bytes in {self._files()}"
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([table, *notes, done if self.target else "dry run: nothing written"])

    def _files(self) -> str:
        pruned, copied = len(self.pruned_files), len(self.copied_files)
        return f"{pruned} pruned and {copied} copied files" if copied else f"{pruned} file{'s' * (pruned > 1)}"
