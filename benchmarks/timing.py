"""One timing protocol: warm up, take the sides in turn, report the median of each and the ratio of medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(sides: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 2) -> dict[str, float]:
    """Return the median seconds of each side; every round runs each side once, so drift hits all alike.

    A side may be a pair (prepare, run): prepare is called before each run and isn't timed.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    try:
        for i in range(warmup + rounds):
            for name, side in sides.items():
                prepare, run = side if isinstance(side, tuple) else (None, side)
                if prepare is not None:
                    prepare()
                start = time.perf_counter()
                run()
                elapsed = time.perf_counter() - start
                if i >= warmup:
                    times[name].append(elapsed)
    finally:
        gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}
