"""Optimizers that the client made: over parameters of the model before there was an engine, or by a callable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ds_core.errors import ConfigError
from ds_core.optim.per_element import is_per_element, of_whole_parameters, shapes_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ds_core.interfaces.logical import Piece
    from ds_core.interfaces.partition import Partition

__all__ = ["check_updates", "take_over"]


def take_over(optimizer: torch.optim.Optimizer, partition: Partition) -> None:
    """Let ``optimizer``, over parameters of the model, update what ``partition`` holds here of those that are trained.

    State that it has, from steps before or from a state dict, becomes that of the new tensors: what has a value per
    element is cut as they are, what belongs to a parameter as a whole stays. Of frozen parameters it keeps nothing.
    Lists that it shares with an optimizer inside of it are written in place.

    Raises:
        ConfigError: a state can neither be cut nor kept. The optimizer is as before.
    """
    kept = [group for group in optimizer.param_groups if any(param.requires_grad for param in group["params"])]
    trained = [param for group in kept for param in group["params"] if param.requires_grad]
    piece_of = dict(zip(trained, partition.optimizer_pieces(), strict=True))
    of_whole = of_whole_parameters(shapes_in(optimizer.state))
    state: dict[Any, Any] = {}
    for key, value in optimizer.state.items():
        if not isinstance(key, torch.Tensor):
            state[key] = value  # of no parameter
        elif key in piece_of and not partition.is_elsewhere(piece_of[key]):
            piece = piece_of[key]
            if partition.divides and not partition.inputs.whole_tensors:
                _check_can_be_cut(piece, value, of_whole)
            state[piece.data] = {slot: _cut(piece, slot, one, of_whole) for slot, one in value.items()}
    for own, group in zip(kept, partition.optimizer_groups(), strict=True):
        trains = [param.requires_grad for param in own["params"]]
        if "param_names" in own:  # torch's, where it was built from named_parameters()
            own["param_names"] = [name for name, does in zip(own["param_names"], trains, strict=True) if does]
        own["params"] = group["params"]
    optimizer.param_groups[:] = kept
    optimizer.state.clear()
    optimizer.state.update(state)


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


def _is_per_element(piece: Piece, slot: str, value: Any, of_whole: set[str]) -> bool:
    return isinstance(value, torch.Tensor) and is_per_element(slot, value.shape, piece.of.shape, of_whole)


def _cut(piece: Piece, slot: str, value: Any, of_whole: set[str]) -> Any:
    """Return the state ``value`` of a parameter for ``piece`` of it, which is updated in its place.

    What has a value per element has its dtype, as torch's ``load_state_dict`` would cast it: an optimizer that was used
    on bf16 parameters has its state in bf16.
    """
    if not _is_per_element(piece, slot, value, of_whole):
        return value
    chunk, updated = piece.chunk, piece.data
    if chunk.length < piece.of.numel:
        # A copy, so that the whole can go. Partitions that divide do so by intervals of the whole parameter.
        value = value.reshape(-1)[chunk.offset : chunk.offset + chunk.length].clone()
    if value.shape != updated.shape:
        value = value.reshape(updated.shape)
    return value.to(updated.dtype) if value.is_floating_point() else value


def _check_can_be_cut(piece: Piece, state: Mapping[str, Any], of_whole: set[str]) -> None:
    """Refuse state that a part of a parameter could not have: on every rank, also on those with all of it."""
    for slot, value in state.items():
        if not (_is_per_element(piece, slot, value, of_whole) or _has_one_value(value)):
            raise ConfigError(
                f"the optimizer's state {slot!r} has neither a value per element of its parameter nor one in all, so "
                "it cannot be divided among the ranks",
                where=f"initialize(optimizer), parameter {piece.of.name!r}",
                fix="start it without state, or have it get whole parameters: elementwise = False in its class",
            )


def _has_one_value(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return value is None or isinstance(value, (bool, int, float, str))
