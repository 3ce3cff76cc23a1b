"""Errors that a command turns into one line on stderr and an exit code."""

from __future__ import annotations

import importlib
from types import ModuleType


class UsageError(ValueError):
    """Wrong arguments or bad input; the text names the cause and the remedy. Exit code 2."""


class MissingExtra(RuntimeError):
    """An optional dependency or a device is missing; the text names the remedy. Exit code 3."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: import name, such as ``"matplotlib"`` or ``"sklearn.datasets"``.
        extra: the extra of wcr-fast that installs it, such as ``"demo"``.

    Raises:
        MissingExtra: when its package isn't installed, naming the pip line that installs it.

    Example:
        >>> require("json", "demo").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module missing inside an installed package is a broken installation, not a missing extra.
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtra(f'{package} is not installed: pip install "wcr-fast[{extra}]"') from None
