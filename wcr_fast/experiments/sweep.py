"""Runs in several processes, one torch thread each: the numbers don't depend on how many or on their order."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from wcr_fast.experiments.plan import Run

Row = dict[str, Any]
Source = tuple[np.ndarray, np.ndarray]

MAX_WORKERS = 8


def default_workers() -> int:
    """Return one worker for each core this process may use, at most MAX_WORKERS."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    return min(os.cpu_count() or 1, MAX_WORKERS)


def _serve(connection: Connection) -> None:
    """Be a worker: take the data, then answer each run with its row or an error's text, until the parent is gone."""
    import torch

    from wcr_fast.experiments.digits import prepare
    from wcr_fast.experiments.train import execute

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with contextlib.suppress(EOFError, OSError):
        digits = prepare(*connection.recv())
        while True:
            run = connection.recv()
            try:
                answer: Row | str = execute(run, digits)
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Let processes started here never see Ctrl-C, which reaches the whole group: the parent ends them.

    Blocked rather than ignored in the child's code: it holds while Python and torch are still being imported,
    and the parent gets a signal that came meanwhile afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _workers(count: int) -> Iterator[dict[Connection, BaseProcess]]:
    """Start worker processes; end them, whatever happens."""
    # spawn: a fork of a process with torch's threads may hang, and inherits its thread settings.
    context = multiprocessing.get_context("spawn")
    started: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            with _deaf_to_ctrl_c():
                process.start()
            theirs.close()
            started[ours] = process
        yield started
    finally:
        for connection, process in started.items():
            connection.close()
            process.terminate()
        for process in started.values():
            process.join()


def sweep(
    runs: Sequence[Run],
    read: Callable[[], Source],
    workers: int,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Execute runs in worker processes and return their rows in the order of ``runs``.

    Args:
        runs: what to train; each is independent of the others.
        read: returns pixels and labels; called once, here, while the workers start.
        workers: number of processes, >= 1; never more than runs.
        on_row: called in this process with each row as it arrives, in no particular order.

    Raises:
        RuntimeError: a run failed or a worker died, with the worker's traceback; all workers are ended then,
            as after any other exception, KeyboardInterrupt among them.
    """
    rows: list[Row | None] = [None] * len(runs)
    todo = iter(range(len(runs)))
    with _workers(min(workers, len(runs))) as connections:
        busy: dict[Connection, int] = {}

        def hand_out(connection: Connection) -> None:
            index = next(todo, None)
            if index is not None:
                busy[connection] = index
                with _noticing_death():
                    connection.send(runs[index])

        source = read()
        for connection in connections:
            with _noticing_death():
                connection.send(source)
            hand_out(connection)
        while busy:
            for connection in wait(list(busy)):
                index = busy.pop(connection)
                with _noticing_death():
                    answer = connection.recv()
                if isinstance(answer, str):
                    raise RuntimeError(f"{runs[index]} failed:\n{answer}")
                rows[index] = answer
                on_row(answer)
                hand_out(connection)
    return rows


@contextlib.contextmanager
def _noticing_death() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise RuntimeError("a worker process died (out of memory?); try fewer --workers") from None
