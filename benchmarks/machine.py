"""What a record says of its machine."""

from __future__ import annotations

import datetime
import platform
from importlib import metadata
from pathlib import Path

import torch


def cpu_model() -> str:
    """Return the processor's name as the kernel gives it, else the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def machine() -> dict[str, object]:
    """Return processor, threads, GPU (None without one), versions and date."""
    versions = {}
    for name in ("wcr-fast", "torch", "triton", "numpy", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }
