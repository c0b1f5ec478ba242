"""Modules that others import and drawing never uses: executed when something is asked of them, or never."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


class PutOff(ModuleType):
    """Stands in sys.modules for a module, and makes way for it when one of its names is asked for.

    The standard library's LazyLoader makes way at any look at it, and `inspect` looks at all modules that there are.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def put_off(name: str) -> None:
    """Have a module executed when something is first asked of it; nothing if it is loaded already or not installed."""
    if name in sys.modules:
        return
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # the package that it would be in
        return
    if spec is not None:
        module = PutOff(name)
        module.__spec__ = spec
        sys.modules[name] = module


def put_off_what_drawing_never_uses() -> None:
    """diffusers' schedulers import scipy.stats for one option, `use_beta_sigmas`."""
    put_off("scipy.stats")
