"""``wcr-fast info``: versions, devices, and which backend runs where, and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

import torch

import wcr_fast
from wcr_fast import native
from wcr_fast.backend import active_backend, interpreting, triton_installed, use_triton
from wcr_fast.machine import processor, version
from wcr_fast.torch_path import scan

PACKAGES = ("torch", "triton", "numpy", "safetensors")
EXTRAS = {
    "demo": ("scikit-learn", "matplotlib", "rich"),
    "test": ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``wcr-fast info``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what :func:`collect` found."""
    found = collect()
    print(json.dumps(found, indent=2) if args.json else _table(found))
    return 0


def collect() -> dict[str, Any]:
    """Return versions, extras, devices and the backend of each device kind as plain values.

    Example:
        >>> collect()["schema"]
        'wcr-fast/info/2'
    """
    return {
        "schema": "wcr-fast/info/2",
        "version": wcr_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "extras": {extra: [name for name in names if version(name) is None] for extra, names in EXTRAS.items()},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": _devices(),
        "backend": {"asked": os.environ.get("WCR_FAST_BACKEND", "auto"), **_backends()},
        "native": {"steps": native.state(), "selection": scan.state()},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("WCR_FAST_", "TRITON_"))},
    }


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {"name": "cpu", "what": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    ]
    for i in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "name": f"cuda:{i}",
                "what": props.name,
                "capability": f"{props.major}.{props.minor}",
                "memory_gib": round(props.total_memory / 2**30, 1),
            }
        )
    return devices


def _backends() -> dict[str, dict[str, str | None]]:
    try:
        active_backend()
    except ValueError as error:
        return {"cpu": {"runs": None, "why": str(error)}, "cuda": {"runs": None, "why": str(error)}}
    return {"cpu": _backend("cpu"), "cuda": _backend("cuda")}


def _backend(device: str) -> dict[str, str | None]:
    if device == "cuda" and not torch.cuda.is_available():
        return {"runs": None, "why": _no_cuda()}
    try:
        triton = use_triton([torch.empty(0, device=device)])
    except RuntimeError as error:
        return {"runs": None, "why": str(error)}
    return {"runs": "triton" if triton else "torch", "why": _reason(device, triton)}


def _no_cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for the CPU only"
    return "torch sees no CUDA device"


def _reason(device: str, triton: bool) -> str:
    if active_backend() != "auto":
        note = ", in Triton's interpreter" if triton and interpreting() else ""
        return f"WCR_FAST_BACKEND={active_backend()} asks for it{note}"
    if device == "cpu":
        return "auto: CPU tensors take the torch path"
    if not triton_installed():
        return "auto: triton is not installed (pip install triton)"
    return "auto: CUDA tensors take the Triton kernels"


def _table(found: dict[str, Any]) -> str:
    rows = [("wcr-fast", found["version"]), ("python", f"{found['python']}  {sys.executable}")]
    rows.append(("platform", found["platform"]))
    rows += [(name, version or "not installed") for name, version in found["packages"].items()]
    if found["cuda"] or found["hip"]:
        rows.append(("torch built for", f"CUDA {found['cuda']}" if found["cuda"] else f"HIP {found['hip']}"))
    for extra, missing in found["extras"].items():
        state = f'missing {", ".join(missing)}: pip install "wcr-fast[{extra}]"' if missing else "installed"
        rows.append((f"extra {extra}", state))
    for device in found["devices"]:
        details = [f"{value} {key}" for key, value in device.items() if key not in ("name", "what")]
        rows.append((device["name"], ", ".join([device["what"], *details])))
    for device in ("cpu", "cuda"):
        backend = found["backend"][device]
        rows.append((f"backend on {device}", f"{backend['runs'] or 'none'}: {backend['why']}"))
    rows += [(f"compiled for {what}", state) for what, state in found["native"].items()]
    rows += [(name, value) for name, value in found["environment"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
