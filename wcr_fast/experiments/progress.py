"""Progress on stderr: a bar with the time left on a terminal, a line each tenth elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from wcr_fast.errors import require


def _wants_bar(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


class Progress:
    """Counts finished runs; a context manager.

    A bar needs a terminal; with ``TERM=dumb`` or ``CI`` set, or when stderr goes elsewhere, it is one plain
    line for each tenth. ``NO_COLOR`` takes the bar's colours away (rich reads it itself).

    Args:
        total: number of runs.
        title: what they are.
        stream: default ``sys.stderr``.

    Example:
        >>> with Progress(2, "runs", stream=sys.stdout) as progress:  # doctest: +ELLIPSIS
        ...     progress.advance()
        runs: 1 of 2 (50 %), ... left
    """

    def __init__(self, total: int, title: str, stream: TextIO | None = None) -> None:
        self.total, self.title, self.done = total, title, 0
        self.stream = sys.stderr if stream is None else stream
        self.start = time.monotonic()
        self.bar = self._build_bar() if _wants_bar(self.stream) else None

    def _build_bar(self):
        progress = require("rich.progress", "demo")
        console = require("rich.console", "demo").Console(file=self.stream)
        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=console,
            # The estimate looks back over the whole sweep: runs arrive in pairs, seconds apart.
            speed_estimate_period=3600.0,
        )
        self.task = bar.add_task(self.title, total=self.total)
        return bar

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self) -> None:
        """Count one more run as finished."""
        tenth = 10 * self.done // self.total
        self.done += 1
        if self.bar is not None:
            self.bar.advance(self.task)
        elif 10 * self.done // self.total > tenth:
            left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
            share = f"{self.done} of {self.total} ({100 * self.done // self.total} %)"
            print(f"{self.title}: {share}, about {left:.0f} s left", file=self.stream, flush=True)
