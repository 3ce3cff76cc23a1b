"""The C++ twin of :mod:`wcr_fast.watch`: compiled once for each torch, in the background, and never needed.

Reading an attribute of a tensor costs Python 50 nanoseconds, C++ 5. torch's headers differ between its versions, so
no wheel could bring this along: where there is a compiler, it is built on the user's machine, as Triton builds its
kernels, and kept in ``$WCR_FAST_CACHE`` (``~/.cache/wcr_fast`` by default). ``WCR_FAST_NATIVE=0`` does without.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is built
    fcntl = None

SOURCE = Path(__file__).with_name("watch.cpp")

T = TypeVar("T")

_lock = threading.Lock()
_module: ModuleType | None = None
_failure: str | None = None
_asked = False


def module() -> ModuleType | None:
    """Return the compiled module where it is loaded already."""
    return _module


def wanted() -> bool:
    """Tell whether it may be built and used here."""
    return fcntl is not None and os.environ.get("WCR_FAST_NATIVE", "1") != "0"


def state() -> str:
    """Return in a few words whether it is there, and why not."""
    if not wanted():
        return "off (WCR_FAST_NATIVE=0)" if fcntl else "off (no build for this system)"
    if _module is not None:
        return f"loaded, {_module.__file__}"
    if _failure is not None:
        return f"failed: {_failure}"
    if _asked:
        return "being built"
    try:
        path = _path()
        built = path.exists()
    except (OSError, RuntimeError) as error:  # no home, or one that is somebody else's
        return f"failed: {error}"
    return f"built, {path}" if built else "not built yet: the first fused step on a GPU has it built"


def request() -> None:
    """Have it loaded, and built where it is not, without waiting for that; only the first call does anything."""
    global _asked
    if _asked or not wanted():
        return
    _asked = True
    threading.Thread(target=_try_to_build, name="wcr_fast.native", daemon=True).start()


def build() -> ModuleType:
    """Return the module, built first where it has to be; takes some 15 seconds.

    Raises:
        RuntimeError: there is no compiler, it failed, or the result can't be written or loaded.
    """
    global _module, _failure
    with _lock:
        if _module is None:
            try:
                _module = load_or_build(_path(), _load, os.environ.get("CXX", "c++"), _arguments())
            except Exception as error:  # whatever it was, it must not break a step
                _failure = str(error)
                raise RuntimeError(f"{SOURCE.name} could not be built: {error}") from error
    return _module


def _try_to_build() -> None:
    with contextlib.suppress(RuntimeError):  # everything works without it; state() has the reason
        build()


def _after_fork() -> None:
    """Give a forked child a lock of its own: the parent's may be held by a thread that the child lacks."""
    global _lock, _asked
    _lock, _asked = threading.Lock(), False


if fcntl is not None:
    os.register_at_fork(after_in_child=_after_fork)


def _path() -> Path:
    """Return where the module for this torch, Python and machine is kept."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return cache_path(SOURCE, suffix, torch.__version__, torch.version.git_version)


def _arguments() -> list[str]:
    home = Path(torch.__file__).parent
    return [
        *(
            "-O2",
            "-std=c++20",
            "-fvisibility=hidden",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ),
        *(f"-I{headers}" for headers in (home / "include", sysconfig.get_paths()["include"])),
        *(str(SOURCE), f"-L{home / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"),
    ]


def cache_path(source: Path, suffix: str, *made_for: str | None) -> Path:
    """Return where the library made of a source, for these versions and this machine, is kept."""
    folder = os.environ.get("WCR_FAST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "wcr_fast")
    found = (source.read_bytes(), *made_for, suffix, sysconfig.get_platform())
    key = hashlib.sha256(repr(found).encode()).hexdigest()[:16]
    return Path(folder).expanduser() / f"_{source.stem}-{key}{suffix}"


def load_or_build(path: Path, load: Callable[[Path], T], compiler: str, arguments: Sequence[str]) -> T:
    """Return what ``load`` makes of a library in the cache, compiled with these arguments first where it has to be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):  # the other ranks of a node wait for one build
        if path.exists():
            with contextlib.suppress(ImportError, OSError):  # damaged, or made for a library that was replaced since
                return load(path)
        _compile(path, [*shlex.split(compiler), "-shared", "-fPIC", *arguments])
        return load(path)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(path: Path, command: Sequence[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix=".build-", dir=path.parent))  # renamed from there when it is whole
    made = folder / path.name
    command = [*command, "-o", str(made)]
    compiler: subprocess.Popen[str] | None = None

    def stop() -> None:
        if compiler is not None and compiler.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(compiler.pid, signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)  # whoever leaves before it is done leaves nothing behind
    try:
        compiler = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder)},
            start_new_session=True,  # its helpers end with it, and Ctrl-C is not for them
        )
        _, errors = compiler.communicate()
        if compiler.returncode:
            first = next((line for line in errors.splitlines() if "error" in line), errors.strip() or "no message")
            raise RuntimeError(f"{command[0]} failed with exit code {compiler.returncode}: {first}")
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(made, path)
    finally:
        atexit.unregister(stop)
        stop()


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("wcr_fast._watch", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no extension module for {sys.version.split()[0]}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
