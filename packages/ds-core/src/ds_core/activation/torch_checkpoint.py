"""Activation checkpointing as torch does it: nothing kept, everything computed again in backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import checkpoint

from ds_core.interfaces.activation import ActivationCheckpointing

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TorchActivation"]


class TorchActivation(ActivationCheckpointing):
    """``torch.utils.checkpoint``, not reentrant: parameters get gradients also where no input needs one."""

    def checkpoint(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``; it runs a second time in backward, from the same random state.

        All of ``kwargs`` are the function's own, ``use_reentrant`` too. The random state is that of the CPU and of
        the devices of the tensors among the arguments.
        """
        positional = len(args)

        # By position, because torch looks for devices (whose random state to keep) in positional arguments alone, and
        # keeps some keywords for itself.
        def run(*values: Any) -> Any:
            return function(*values[:positional], **dict(zip(kwargs, values[positional:], strict=True)))

        return checkpoint(run, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=True)
