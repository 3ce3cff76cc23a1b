"""Pickles read without running anything in them: every class and function becomes a placeholder."""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO

# Containers that are harmless to build.
PLAIN = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict, ("builtins", "set"): set}


class Inert:
    """Stands for an object of any class: keeps the arguments and the state that the pickle gives it."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and state[0] is None:
            state = state[1]  # of a class with slots
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Take an item of a list-like class, and forget it."""

    extend = add = append

    def field(self, name: str, default: Any = None) -> Any:
        """Return an attribute that the pickle set."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class InertUnpickler(pickle.Unpickler):
    """Builds containers, numbers and text; whatever has a class of its own becomes an :class:`Inert` of that name."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._classes: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return a placeholder named ``module.name``; nothing is imported."""
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        full = f"{module}.{name}"
        return self._classes.setdefault(full, type(full, (Inert,), {}))


def type_name(thing: Any) -> str:
    """Return the last part of the name of an object's class, or of a placeholder class itself."""
    cls = thing if isinstance(thing, type) else type(thing)
    return cls.__name__.rpartition(".")[2]
