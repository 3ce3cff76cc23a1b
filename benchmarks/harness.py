"""One protocol for every suite: verify first, warm up, take the sides in turn, report quartiles.

A *case* is one op on one list of tensors, a *side* one way of doing it. A side is built, run and checked before it is
timed; a wrong result is never timed. Rounds take every side once, so that drift hits all alike; sides that don't fit
into memory together go in several batches, named in the row. Each side holds as many copies of its tensors as
it takes to exceed three times the second-level cache, and goes from one to the next.

A record is one JSON object per suite:

    schema      "wcr-fast/benchmark/1"
    suite, command, date, quick, complete (false: the run broke off there)
    machine     versions, processor, commit; gpu (null: none was used), driver, clocks
    copy        gbps of a large copy on the same device, in the same run (the better of start and end), bytes moved
    device_at_end   gpu, driver, clocks once more
    notes       lines: what was left out, and why
    rows        one per side and case:
      list, op, dtype, tensors, weights       the case
      side, ours                              who
      status      timed | refused (wrong result) | failed (its error) | skipped (doesn't fit, no time left)
      why         the error's or the reason's text, else null
      rounds, copies, batch                   sides of one batch were interleaved
      device_ms   [quartile, median, quartile] on the device, with the queue kept full; on the CPU the time of the call
      host_ms     the same for issuing the call on an empty queue; null on the CPU
      wall_ms     the same from there until the device is done; null on the CPU
      bytes       the least that the op must move; null for a training step
      gbps        bytes over the median device time
      copy_share  gbps over the measured copy's
      peak_bytes  memory above what was there before the call: the device's; on the CPU resident (null: not known)
      launch_bound  whether the host takes longer than the device; null on the CPU
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wcr_fast.machine import describe_machine
from wcr_fast.report.files import write_file

SCHEMA = "wcr-fast/benchmark/1"
CACHE_FACTOR = 3
Row = dict[str, Any]


class WrongResult(Exception):
    """A side's result differs from the reference: it must not be timed."""


@dataclass(frozen=True)
class Subject:
    """A side ready to run: ``call(copy)`` does the op once, ``verify()`` raises WrongResult if it does it wrong.

    ``prepare(copy)``, if there is one, comes before each call and is never timed.
    """

    call: Callable[[int], object]
    verify: Callable[[], None]
    prepare: Callable[[int], object] | None = None

    def ready(self, copy: int) -> Callable[[], object]:
        """Return the call on a copy that is ready for it."""
        if self.prepare is not None:
            self.prepare(copy)
        return lambda: self.call(copy)


@dataclass(frozen=True)
class Side:
    """One way of doing a case's op; ``build(copies)`` allocates what it needs."""

    name: str
    build: Callable[[int], Subject]
    ours: bool = False
    bytes: int | None = None
    holds: int = 0  # memory of one copy, the call's own included


@dataclass(frozen=True)
class Case:
    """One op on one list of tensors."""

    list: str
    op: str
    dtype: str
    tensors: int
    weights: int
    working_set: int  # bytes of one copy that a call touches
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    device: float
    host: float | None = None
    wall: float | None = None


class Cpu:
    """The processor: one clock, no queue."""

    name = "cpu"
    torch_device = torch.device("cpu")
    cache_bytes = 0
    copy_bytes = 256 << 20

    def free_bytes(self) -> int:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
        return 4 << 30

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Return how far resident memory rises above what was there; None where the system can't tell (not Linux)."""
        gc.collect()
        before = _watched_memory()
        call()
        return None if before is None else max(0, _memory("VmHWM") - before)

    def times(self, calls: Iterator[Callable[[], object]]) -> Times:
        call = next(calls)
        start = time.perf_counter()
        call()
        return Times(time.perf_counter() - start)

    def clean(self) -> None:
        gc.collect()

    def describe(self) -> Row:
        return {"gpu": None, "threads": torch.get_num_threads()}


class Cuda:
    """One GPU: device time between events behind a filled queue, host and wall time from an empty one."""

    name = "cuda"
    copy_bytes = 2 << 30
    longest_cover = 0.25  # seconds

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.torch_device)
        self.cache_bytes = self.properties.L2_cache_size
        for _ in range(2):  # the first one loads the kernel
            start, end = self._events()
            start.record()
            torch.cuda._sleep(10_000_000)
            end.record()
            end.synchronize()
        self.cycles_per_second = 10_000_000 / (start.elapsed_time(end) * 1e-3)

    def _events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def times(self, calls: Iterator[Callable[[], object]]) -> Times:
        call = next(calls)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        issued = time.perf_counter()
        torch.cuda.synchronize()
        done = time.perf_counter()
        # The device waits while the host issues the call, so that no gap between launches counts as device time. (The
        # queue holds about a thousand launches: a call of many more shows its gaps.)
        cover = min(1.3 * (issued - begin) + 1e-4, self.longest_cover)
        call = next(calls)
        start, end = self._events()
        torch.cuda._sleep(int(cover * self.cycles_per_second))
        start.record()
        call()
        end.record()
        end.synchronize()
        return Times(start.elapsed_time(end) * 1e-3, issued - begin, done - begin)

    def clean(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def describe(self) -> Row:
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        found: Row = {
            "gpu": self.properties.name,
            "gpu_memory_gb": round(self.properties.total_memory / 1e9, 1),
            "l2_mb": round(self.cache_bytes / 1e6, 1),
            "cuda": torch.version.cuda,
        }
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", self._bus_id()]
            out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
            found |= zip(fields.split(","), (value.strip() for value in out.split(",")), strict=False)
        return found

    def _bus_id(self) -> str:
        """Return the identity that nvidia-smi knows: its numbering ignores CUDA_VISIBLE_DEVICES."""
        uuid = getattr(self.properties, "uuid", None)
        return f"GPU-{uuid}" if uuid is not None else str(self.torch_device.index)


def _memory(field: str) -> int:
    """Return a line of the process's memory status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _watched_memory() -> int | None:
    """Return the resident memory, its peak started anew; None where there is no such thing."""
    # What malloc kept of earlier calls would be reused unseen; only glibc gives it back.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        now = _memory("VmRSS")
        return now if _memory("VmHWM") < now + (4 << 20) else None
    except OSError:
        return None


Device = Cpu | Cuda


def find_device(name: str) -> Device:
    """Return the device of that name, ``cpu`` or ``cuda``."""
    return Cuda() if name == "cuda" else Cpu()


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Return the replay of a CUDA graph of the call, which runs three times before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def quartiles(values: Sequence[float]) -> list[float]:
    """Return lower quartile, median and upper quartile, between neighbours where they fall there.

    Example:
        >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
        [2.0, 3.0, 4.0]
    """
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def copies_for(working_set: int, cache_bytes: int) -> int:
    """Return how many copies of a working set exceed the cache CACHE_FACTOR times; one where there is no cache size."""
    return max(1, -(-CACHE_FACTOR * cache_bytes // max(working_set, 1)))


def copy_gbps(device: Device, *, size: int | None = None, rounds: int = 10) -> Row:
    """Return the bandwidth of a large copy on the device: the ceiling that every op's is compared with."""
    size = min(size or device.copy_bytes // 2, device.free_bytes() // 4)
    source = torch.zeros(size, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    calls = itertools.repeat(lambda: target.copy_(source))
    for _ in range(2):
        device.times(calls)
    seconds = statistics.median(device.times(calls).device for _ in range(rounds))
    return {"gbps": 2 * size / seconds / 1e9, "bytes": 2 * size}


class Budget:
    """The time a suite may take: what is left of it, and how much one case should use for its timing."""

    def __init__(self, seconds: float, per_case: float, rounds: tuple[int, int]) -> None:
        self.end = time.monotonic() + seconds
        self.per_case = per_case
        self.rounds = rounds

    def left(self) -> float:
        return self.end - time.monotonic()

    def rounds_for(self, one_round: float) -> int:
        """Return the number of timed rounds when all sides take so many seconds once."""
        low, high = self.rounds
        return max(low, min(high, int(self.per_case / max(one_round, 1e-9))))


def run_case(case: Case, device: Device, budget: Budget) -> list[Row]:
    """Build, verify and time every side of a case; errors are kept in their rows."""
    copies = copies_for(case.working_set, device.cache_bytes)
    rows = {side.name: _empty_row(case, side, copies) for side in case.sides}
    for number, batch in enumerate(_batches(case, rows, copies, device.free_bytes())):
        subjects: dict[str, Subject] = {}
        for side in batch:
            row = rows[side.name]
            row["batch"] = number
            if budget.left() <= 0:
                row |= {"status": "skipped", "why": "no time left"}
                continue
            with _recording(row):
                subject = side.build(copies)
                subject.ready(0)()
                subject.verify()
                row["peak_bytes"] = device.peak_bytes(subject.ready(0))
                subjects[side.name] = subject
            subject = None
            if row["status"] != "timed":
                device.clean()
        _time(subjects, rows, device, budget, copies)
        subjects.clear()
        device.clean()
    return list(rows.values())


def _empty_row(case: Case, side: Side, copies: int) -> Row:
    head = {name: getattr(case, name) for name in ("list", "op", "dtype", "tensors", "weights")}
    empty = dict.fromkeys(("rounds", "device_ms", "host_ms", "wall_ms", "gbps", "copy_share", "peak_bytes"))
    row = {
        **head,
        "side": side.name,
        "ours": side.ours,
        "status": "timed",
        "why": None,
        "copies": copies,
        "batch": None,
    }
    return {**row, "bytes": side.bytes, **empty, "launch_bound": None}


def _batches(case: Case, rows: dict[str, Row], copies: int, free: int) -> Iterator[list[Side]]:
    """Yield groups of sides that fit into memory together, in order; mark those that don't fit alone."""
    usable = int(0.92 * free)
    batch: list[Side] = []
    held = 0
    for side in case.sides:
        need = side.holds * copies
        if need > usable:
            why = f"needs about {need / 1e9:.1f} GB, {usable / 1e9:.1f} GB are free"
            rows[side.name] |= {"status": "skipped", "why": why}
            continue
        if batch and held + need > usable:
            yield batch
            batch, held = [], 0
        batch.append(side)
        held += need
    if batch:
        yield batch


@contextlib.contextmanager
def _recording(row: Row) -> Iterator[None]:
    """Turn an error into the row's status, so that one side can't lose the others' results."""
    try:
        yield
    except WrongResult as error:
        row |= {"status": "refused", "why": str(error)}
    except torch.OutOfMemoryError:
        row |= {"status": "failed", "why": "out of memory"}
    except Exception as error:
        row |= {"status": "failed", "why": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _time(subjects: dict[str, Subject], rows: dict[str, Row], device: Device, budget: Budget, copies: int) -> None:
    """Time the sides in turn and fill their rows."""
    calls = {name: _rotation(subject, copies) for name, subject in subjects.items()}
    times: dict[str, list[Times]] = {name: [] for name in subjects}

    def one_round() -> None:
        for name in list(calls):
            with _recording(rows[name]):
                times[name].append(device.times(calls[name]))
            if rows[name]["status"] != "timed":
                del calls[name]

    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(2):  # warm up
            one_round()
        rounds = budget.rounds_for((time.perf_counter() - start) / 2)
        for found in times.values():
            found.clear()
        for _ in range(rounds):
            one_round()
    finally:
        gc.enable()
    for name in calls:
        _fill(rows[name], times[name])


def _rotation(subject: Subject, copies: int) -> Iterator[Callable[[], object]]:
    for i in itertools.cycle(range(copies)):
        yield subject.ready(i)


def _fill(row: Row, times: list[Times]) -> None:
    row["rounds"] = len(times)
    row["device_ms"] = _milliseconds([t.device for t in times])
    if times[0].host is not None:
        row["host_ms"] = _milliseconds([t.host for t in times])
        row["wall_ms"] = _milliseconds([t.wall for t in times])
        row["launch_bound"] = row["host_ms"][1] > row["device_ms"][1]
    if row["bytes"] is not None:
        row["gbps"] = row["bytes"] / row["device_ms"][1] * 1e-6


def _milliseconds(seconds: Sequence[float]) -> list[float]:
    return [round(1e3 * value, 6) for value in quartiles(seconds)]


class Record:
    """A suite's record; written whole after every case, so that a crash loses only what follows."""

    def __init__(self, suite: str, command: str, device: Device, *, quick: bool, path: Path | None) -> None:
        self.path = path
        self.device = device
        self.copy_size = (32 << 20) if quick and device.name == "cpu" else None
        self.content: Row = {
            "schema": SCHEMA,
            "suite": suite,
            "command": command,
            "date": datetime.date.today().isoformat(),
            "quick": quick,
            "complete": False,
            "machine": {**describe_machine(), "device": device.name, **device.describe()},
            "copy": copy_gbps(device, size=self.copy_size),
            "notes": [],
            "rows": [],
        }
        device.clean()

    def add(self, rows: list[Row]) -> None:
        self.content["rows"] += rows
        for row in rows:
            print(line_of(row), flush=True)
        self.write()

    def note(self, line: str) -> None:
        self.content["notes"].append(line)
        print(line, flush=True)

    def finish(self) -> None:
        self.device.clean()
        copies = [self.content["copy"], copy_gbps(self.device, size=self.copy_size)]
        self.content["copy"] = max(copies, key=lambda copy: copy["gbps"])
        self.content["device_at_end"] = self.device.describe()
        self.content["complete"] = True
        self.write()

    def write(self) -> None:
        for row in self.content["rows"]:
            if row["gbps"] is not None:
                row["copy_share"] = row["gbps"] / self.content["copy"]["gbps"]
        if self.path is not None:
            write_file(self.path, dump(self.content).encode())


def dump(record: Row) -> str:
    """Return a record's text: one line for each row, so that two records can be compared line by line."""
    head = {key: value for key, value in record.items() if key != "rows"}
    rows = ",\n".join("  " + json.dumps(row) for row in record["rows"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def line_of(row: Row) -> str:
    """Return a row as one line for the terminal."""
    head = f"{row['list']:9} {row['dtype']:9} {row['op']:16} {row['side']:28}"
    if row["status"] != "timed":
        return f"{head} {row['status']}: {row['why']}"
    low, median, high = row["device_ms"]
    text = f"{head} {median:9.3f} ms [{low:.3f}, {high:.3f}]"
    if row["gbps"] is not None:
        text += f" {row['gbps']:7.0f} GB/s"
    if row["host_ms"] is not None:
        text += f"  host {row['host_ms'][1]:.3f} ms"
    return text + ("  (launch-bound)" if row["launch_bound"] else "")
