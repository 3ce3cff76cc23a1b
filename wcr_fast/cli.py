"""The command ``wcr-fast``: finds the subcommand, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 a check failed, 2 wrong usage or bad input, 3 an extra or a device is missing,
130 Ctrl-C, 143 SIGTERM. A subcommand is a module with ``configure(parser)`` and ``run(args) -> int``; it is
imported only when it was chosen. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

import wcr_fast
from wcr_fast.errors import MissingExtra, UsageError

COMMANDS = {
    "prune": (
        "wcr_fast.pruning.command",
        "prune a safetensors file, a Hugging Face folder or a distributed checkpoint, as a stream",
    ),
    "export": ("wcr_fast.pruning.export_command", "pack the zeros of a pruned checkpoint, or restore it"),
    "demo": ("wcr_fast.experiments.command", "train, prune and compare penalties on real data in two minutes"),
    "info": ("wcr_fast.info", "show versions, devices, the backend in use and why"),
    "doctor": ("wcr_fast.doctor", "run every op on every device at hand and check it against float64"),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; only the chosen subcommand is imported and has its options."""
    parser = _Parser(
        prog="wcr-fast",
        description="Weight-concentration penalties and exact magnitude pruning for PyTorch.",
        epilog="Exit codes: 0 done, 1 a check failed, 2 wrong usage or bad input, "
        "3 an extra or a device is missing, 130 Ctrl-C. WCR_FAST_DEBUG=1 shows tracebacks.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"wcr-fast {wcr_fast.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            command = importlib.import_module(module)
            command.configure(sub)
            sub.set_defaults(run=command.run)
    return parser


def _dashed(argument: str) -> str:
    """Accept ``--dry_run`` for ``--dry-run``."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


def _say(message: str) -> None:
    print(f"wcr-fast: {message}", file=sys.stderr)


@contextlib.contextmanager
def _terminal_manners() -> Iterator[None]:
    """Print warnings as one line each, and let SIGTERM unwind the stack as Ctrl-C does."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        _say(f"warning: {message}")

    main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) if main_thread else None
    shown, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = shown
        if main_thread:
            signal.signal(signal.SIGTERM, previous)


def _run(arguments: Sequence[str]) -> int:
    chosen = next((a for a in arguments if a in COMMANDS), None)
    args = build_parser(chosen).parse_args([_dashed(a) for a in arguments])
    with _terminal_manners():
        code = args.run(args)
    sys.stdout.flush()
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        argv: the arguments after the program's name; default ``sys.argv[1:]``.

    Example:
        >>> main(["--version"])
        wcr-fast 0.1.0
        0
    """
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except SystemExit as stop:  # argparse: help and version exit 0, errors 2; SIGTERM 143
        return stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:  # the reader has gone: what is still buffered has nowhere to go
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("WCR_FAST_DEBUG", "0") not in ("", "0", "false"):
            raise
        return _report(error)


def _report(error: Exception) -> int:
    """Print one line for an error and return the exit code it stands for."""
    if isinstance(error, UsageError):
        _say(f"error: {error}")
        return 2
    if isinstance(error, MissingExtra):
        _say(f"error: {error}")
        return 3
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        _say(f"error: {where}{error.strerror or error}")
        return 2
    _say(f"error: {type(error).__name__}: {error} (WCR_FAST_DEBUG=1 shows where)")
    return 1


if __name__ == "__main__":
    sys.exit(main())
