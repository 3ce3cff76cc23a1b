"""How new files take their places: all at once at the end, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from wcr_fast.errors import UsageError
from wcr_fast.pruning.checkpoint_files import STAGE, CheckpointFiles
from wcr_fast.pruning.safetensors_io import sync_folder

try:
    import fcntl
except ImportError:  # no locks here: what a killed run leaves behind stays
    fcntl = None


@contextlib.contextmanager
def staging(target: Path, files: CheckpointFiles) -> Iterator[Path]:
    """Yield a hidden folder on the target's disk; the files written there take their places, or vanish.

    A folder that doesn't exist yet appears by one rename. Else each file is replaced by a rename of its own,
    and files of other names stay. What a killed run has left behind for the same target is removed.
    """
    inside = target.is_dir()
    place = target if files.is_folder else target.parent
    home, prefix = target if inside else target.parent, f".{target.name or 'wcr-fast'}."
    stage, lock = home / f"{prefix}{os.getpid()}.tmp", None
    try:
        _remove_orphans(home, prefix)
        stage.mkdir()
        lock = _locked(stage)
        yield stage
        _sync_folders(stage)
        with _uninterrupted():
            if files.is_folder and not inside:
                os.replace(stage, target)
                sync_folder(target.parent)
            else:
                _move_files(stage, place)
    except UsageError as error:  # name the file by the place it was meant for
        raise type(error)(str(error).replace(str(stage), str(place))) from None
    except OSError as error:
        raise UsageError(f"{target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """Hold a lock on a folder until the descriptor is closed or the process ends; None where another holds it."""
    if fcntl is None:
        return None
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks: either way not known to be free
        os.close(fd)
        return None
    return fd


def _remove_orphans(home: Path, prefix: str) -> None:
    """Remove the folders of runs that were killed: nobody holds their locks any more."""
    for folder in home.iterdir():
        if folder.name.startswith(prefix) and STAGE.fullmatch(folder.name) and not folder.is_symlink():
            with contextlib.suppress(OSError):
                fd = _locked(folder)
                if fd is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(fd)


def _sync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        sync_folder(Path(folder))


def _move_files(stage: Path, place: Path) -> None:
    touched = {place}
    for folder, _, names in os.walk(stage):
        to = place / Path(folder).relative_to(stage)
        to.mkdir(exist_ok=True)
        touched |= {to, to.parent} if to != place else {to}
        for name in names:
            os.replace(Path(folder, name), to / name)
    for folder in touched:
        sync_folder(folder)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM for the few renames: the work is done, half of it would be worse."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
