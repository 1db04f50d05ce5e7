"""Plans of a configuration: what a precision asks for, with the keys that hold for every precision filled in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ds_core.interfaces.precision import PrecisionPlan

if TYPE_CHECKING:
    from torch import nn

    from ds_core.config import Config

__all__ = ["plan_for"]


def plan_for(
    config: Config,
    *,
    stored: torch.dtype | None = None,
    master: torch.dtype | None = None,
    input_cast: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    reduce: torch.dtype | None = None,
    reduce_in: tuple[type[nn.Module], ...] | None = None,
) -> PrecisionPlan:
    """Return the plan of a precision that asks for these dtypes, see :class:`PrecisionPlan`.

    ``data_types`` says in what gradients accumulate and what buffers become; ``communication_data_type`` says in what
    all gradients are reduced, whatever the precision asks for.
    """
    chosen = _dtype(config.communication_data_type)
    return PrecisionPlan(
        stored=stored,
        accumulate=_dtype(config.data_types.grad_accum_dtype),
        reduce=chosen or reduce,
        reduce_in=None if chosen else reduce_in,
        master=master,
        buffer=_dtype(config.data_types.buffer_dtype),
        input_cast=input_cast,
        autocast=autocast,
    )


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
