"""A model and a batch for it, made by a function that the user names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from torch import nn

__all__ = ["load_target"]


def load_target(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return the model, and positional and keyword arguments of its forward.

    Args:
        target: ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``; the function takes nothing and returns the model and its
            inputs: a tuple or list of them, a mapping of keywords, or a single one.

    Raises:
        ConfigError: there is no such function, or it returns something else. What it raises itself goes through.
    """
    source, _, name = target.rpartition(":")
    if not source or not name:
        raise ConfigError(
            f"{target!r} names no function", where="TARGET", fix="write FILE.py:FUNCTION or MODULE:FUNCTION"
        )
    function = getattr(_module(source), name, None)
    if not callable(function):
        raise ConfigError(f"{source} has no function {name!r}", where="TARGET", fix="define it, or name another one")
    made = function()
    import torch

    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module):
        raise ConfigError(
            f"it returned {_said(made)}", where=target, fix="return (model, inputs), the model a torch.nn.Module"
        )
    model, inputs = made
    if isinstance(inputs, Mapping):
        return model, (), dict(inputs)
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


def _module(source: str) -> ModuleType:
    path = Path(source)
    if path.suffix == ".py":
        if not path.is_file():
            raise ConfigError(f"there is no file {source}", where="TARGET", fix="check the path")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # As `python FILE.py` would: its neighbours are importable, and pickles find it.
        sys.path.insert(0, str(path.parent.resolve()))
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, "")
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name != source.partition(".")[0] and error.name != source:
            raise  # it is there, and misses something itself
        raise ConfigError(
            f"there is no module {source!r}", where="TARGET", fix="run this where it can be imported, or name its file"
        ) from error


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return f"a {type(value).__name__}"
