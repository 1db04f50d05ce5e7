"""Activation checkpointing under DeepSpeed's names: ``ds_core.checkpointing.checkpoint(function, *args)``.

ds-core has recomputation. The further names (``configure``, ``get_cuda_rng_tracker``, ...) are ds-activation's and
appear here once it is installed.

>>> import torch
>>> from ds_core import checkpointing
>>> x = torch.ones(2, requires_grad=True)
>>> checkpointing.checkpoint(torch.exp, x).sum().backward()
>>> x.grad
tensor([2.7183, 2.7183])
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any

from ds_core import registry
from ds_core.errors import MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ds_core.interfaces.activation import ActivationCheckpointing

__all__ = ["checkpoint", "deepspeed_shape"]

_PACKAGE = "ds-activation"
_MODULE = "ds_activation"

_THEIRS = frozenset(
    {
        "CheckpointFunction",
        "CudaRNGStatesTracker",
        "configure",
        "detach_variable",
        "extract_tensors",
        "gather_partitioned_activations",
        "get_cuda_rng_tracker",
        "get_partition_size",
        "get_partition_start",
        "is_activation_to_checkpoint",
        "is_configured",
        "merge_tensors",
        "model_parallel_cuda_manual_seed",
        "model_parallel_reconfigure_tp_seed",
        "non_reentrant_checkpoint",
        "partition_activations",
        "partition_activations_in_checkpoint",
        "reset",
        "set_num_layers",
    }
)
"""Names of DeepSpeed's module that ds-activation brings, for the error where it is missing; it has more."""


def checkpoint(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Return ``function(*args, **kwargs)``, its inner activations computed again in backward.

    Done by ds-activation where it is installed, as ``configure`` has set it up, else by torch. What the function
    returns has the shape of :func:`deepspeed_shape`.
    """
    import torch

    if torch.compiler.is_compiling():
        # torch.compile follows torch's own, which is what ds-activation would call too, but not our lookup.
        from ds_core.activation.torch_checkpoint import TorchActivation

        return deepspeed_shape(TorchActivation().checkpoint(function, *args, **kwargs))
    name = "deepspeed" if "deepspeed" in registry.names("activation") else "torch"
    return deepspeed_shape(_built(name).checkpoint(function, *args, **kwargs))


@cache
def _built(name: str) -> ActivationCheckpointing:
    # Once: the lookup reads metadata, which takes longer than the call.
    found: ActivationCheckpointing = registry.load("activation", name)()
    return found


def deepspeed_shape(output: Any) -> Any:
    """Return what DeepSpeed's ``checkpoint`` makes of a function's output (spec/activation-checkpointing.md 3).

    A list becomes a tuple, and a tuple or list of one element that element. Everything else, such as a dict or a named
    tuple, stays what it is, which DeepSpeed takes apart.

    >>> deepspeed_shape([1, 2]), deepspeed_shape((1,)), deepspeed_shape({"a": 1}), deepspeed_shape(None)
    ((1, 2), 1, {'a': 1}, None)
    """
    if type(output) not in (tuple, list):
        return output
    return output[0] if len(output) == 1 else tuple(output)


def __getattr__(name: str) -> Any:
    unknown = AttributeError(f"module 'ds_core.checkpointing' has no attribute {name!r}")
    if name.startswith("__"):
        raise unknown
    try:
        module = importlib.import_module(_MODULE)
    except ModuleNotFoundError as error:
        if error.name != _MODULE:
            raise  # it is installed, and misses something itself
        if name not in _THEIRS:
            raise unknown from error
        raise MissingPackageError(
            f"ds_core.checkpointing.{name} needs {_PACKAGE}: pip install {_PACKAGE}", fix=f"pip install {_PACKAGE}"
        ) from error
    if not hasattr(module, name):
        raise unknown
    return getattr(module, name)
