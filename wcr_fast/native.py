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
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path
from types import ModuleType

import torch

SOURCE = Path(__file__).with_name("watch.cpp")

_lock = threading.Lock()
_module: ModuleType | None = None
_failure: str | None = None
_asked = False


def module() -> ModuleType | None:
    """Return the compiled module where it is loaded already."""
    return _module


def wanted() -> bool:
    """Tell whether it may be built and used here."""
    return os.name == "posix" and os.environ.get("WCR_FAST_NATIVE", "1") != "0"


def state() -> str:
    """Return in a few words whether it is there, and why not."""
    if not wanted():
        return "off (WCR_FAST_NATIVE=0)" if os.name == "posix" else "off (no build for this system)"
    if _module is not None:
        return f"loaded, {_path()}"
    if _failure is not None:
        return f"failed: {_failure}"
    if _asked:
        return "being built"
    return f"built, {_path()}" if _path().exists() else "not built yet: the first fused step on a GPU has it built"


def request() -> None:
    """Have it loaded, and built where it is not, without waiting for that; only the first call does anything."""
    global _asked
    if _asked or not wanted():
        return
    _asked = True
    if _path().exists():
        _try_to_build()
    else:
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
                _module = _loaded_or_built(_path())
            except (OSError, subprocess.SubprocessError, ImportError, RuntimeError) as error:
                _failure = str(error)
                raise RuntimeError(f"{SOURCE.name} could not be built: {error}") from error
    return _module


def _try_to_build() -> None:
    with contextlib.suppress(RuntimeError):  # everything works without it; state() has the reason
        build()


def _path() -> Path:
    """Return where the module for this torch, Python and machine is kept."""
    folder = os.environ.get("WCR_FAST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "wcr_fast")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    made_for = (SOURCE.read_bytes(), torch.__version__, torch.version.git_version, suffix, platform.platform())
    key = hashlib.sha256(repr(made_for).encode()).hexdigest()[:16]
    return Path(folder).expanduser() / f"_watch-{key}{suffix}"


def _loaded_or_built(path: Path) -> ModuleType:
    if path.exists():
        with contextlib.suppress(ImportError):  # damaged, or made for a library that was replaced since
            return _load(path)
    _compile(path)
    return _load(path)


def _compile(path: Path) -> None:
    home = Path(torch.__file__).parent
    path.parent.mkdir(parents=True, exist_ok=True)
    # A neighbour that is renamed when it is whole: several processes may build at the same time.
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder:
        made = Path(folder, path.name)
        command = [
            *shlex.split(os.environ.get("CXX", "c++")),
            *("-O2", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden"),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(f"-I{folder}" for folder in (home / "include", sysconfig.get_paths()["include"])),
            *(str(SOURCE), "-o", str(made), f"-L{home / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"),
        ]
        compiler = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        atexit.register(compiler.kill)
        _, errors = compiler.communicate()
        atexit.unregister(compiler.kill)
        if compiler.returncode:
            first = next((line for line in errors.splitlines() if "error" in line), errors.strip() or "no message")
            raise RuntimeError(f"{command[0]} failed with exit code {compiler.returncode}: {first}")
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        os.replace(made, path)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("wcr_fast._watch", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no extension module for {sys.version.split()[0]}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
