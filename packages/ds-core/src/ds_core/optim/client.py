"""Optimizers that the client made: over parameters of the model before there was an engine, or by a callable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["check_updates", "take_over"]


def take_over(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Let the client's ``optimizer`` update the tensors of ``groups``; of frozen parameters it keeps nothing."""
    kept = [group for group in optimizer.param_groups if any(param.requires_grad for param in group["params"])]
    updated: dict[torch.Tensor, torch.Tensor] = {}
    for own, group in zip(kept, groups, strict=True):
        trains = [param.requires_grad for param in own["params"]]
        trained = [param for param, does in zip(own["params"], trains, strict=True) if does]
        updated.update(zip(trained, group["params"], strict=True))
        if "param_names" in own:  # torch's, where it was built from named_parameters()
            own["param_names"] = [name for name, does in zip(own["param_names"], trains, strict=True) if does]
        own["params"] = group["params"]
    optimizer.param_groups = kept
    state = list(optimizer.state.items())
    optimizer.state.clear()
    for param, of_param in state:
        if param in updated:
            optimizer.state[updated[param]] = _state_for(updated[param], of_param)


def check_updates(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that what a client's callable built updates the tensors of ``groups``, all of them and no others.

    Raises:
        ConfigError: it does not, so that some would never train, or train without the engine.
    """
    given = {id(tensor) for group in groups for tensor in group["params"]}
    updates = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    if given != updates:
        raise ConfigError(
            f"the optimizer callable was given {len(given)} tensors to update, its optimizer has "
            f"{len(updates & given)} of them and {len(updates - given)} others",
            where="initialize(optimizer)",
            fix="build the optimizer from the groups it is called with; freeze parameters before initialize",
        )


def _state_for(updated: torch.Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` of a parameter for the tensor updated in its place: what is shaped like it has its dtype.

    As torch's ``load_state_dict`` would cast it; an optimizer that was used on bf16 parameters has its state in bf16.
    """
    return {
        slot: value.to(updated.dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == updated.shape
        else value
        for slot, value in state.items()
    }
