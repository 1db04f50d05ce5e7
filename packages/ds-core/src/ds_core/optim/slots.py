"""Optimizer state as logical tensors: what the optimizer keeps for a tensor has that tensor's name and chunk."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ds_core.checkpoint.jsonable import decode, encode
from ds_core.errors import CheckpointError, few
from ds_core.interfaces.logical import BUFFER, GRADIENT, MASTER, WEIGHT, Chunk, LogicalTensor, Piece
from ds_core.log import log_dist
from ds_core.optim.per_element import is_per_element, of_whole_parameters, shapes_in

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from ds_core.interfaces.checkpoint import CheckpointReader

__all__ = ["check_groups", "group_state", "merge_values", "restore_optimizer", "slot_pieces", "slot_values"]

_RESERVED = frozenset({BUFFER, GRADIENT, MASTER, WEIGHT})
_OF_THIS_MACHINE = frozenset({"params", "fused", "foreach", "capturable", "differentiable"})
"""Options that say how an update is computed, not which: this job's own are kept."""
_NOT_OF_THE_CLASS = _OF_THIS_MACHINE | {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}
"""Options by which classes of optimizers cannot be told: those, and what schedules add to a group."""


def slot_pieces(optimizer: torch.optim.Optimizer, pieces: Sequence[Piece]) -> list[Piece]:
    """Return the tensors in the optimizer's state, each as a chunk of a logical tensor of kind <slot name>.

    One with a value per element has the chunk of its tensor; one of the parameter as a whole is stored once.
    """
    found = []
    of_whole = of_whole_parameters(shapes_in(optimizer.state))
    for piece in pieces:
        for slot, value in optimizer.state.get(piece.data, {}).items():
            if not isinstance(value, torch.Tensor):
                continue
            if slot in _RESERVED:
                raise CheckpointError(
                    f"{type(optimizer).__name__} calls a state {slot!r}, which is a name of checkpoints",
                    where=f"parameter {piece.of.name!r}",
                    fix=f"use another name than {', '.join(sorted(_RESERVED))}",
                )
            like_param = is_per_element(slot, value.shape, piece.data.shape, of_whole)
            shape = piece.of.shape if like_param else tuple(value.shape)
            of = LogicalTensor(piece.of.name, slot, shape, str(value.dtype).removeprefix("torch."))
            if like_param:
                found.append(Piece(of, piece.chunk, value, piece.writer))
            elif piece.chunk.offset == 0 and not any(piece.chunk.box.start):
                # Of the ranks that hold parts of a parameter, the one with its beginning.
                found.append(Piece(of, Chunk.whole(shape), value, piece.writer))
    return found


def slot_values(optimizer: torch.optim.Optimizer, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return what the state has beside tensors, as JSON: parameter name -> slot -> value.

    Where parameters are divided among ranks, each says what it has for those of which it has elements; see
    :func:`merge_values`.
    """
    found: dict[str, Any] = {}
    for piece in pieces:
        if piece.of.numel and not piece.chunk.length:
            continue
        for slot, value in optimizer.state.get(piece.data, {}).items():
            if not isinstance(value, torch.Tensor):
                where = f"optimizer state {slot!r} of {piece.of.name!r}"
                found.setdefault(piece.of.name, {})[slot] = encode(value, where)
    return found


def merge_values(by_rank: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what :func:`slot_values` found on all ranks.

    Of a parameter of which several ranks have parts, what the first of them says: the one with its beginning.
    """
    found: dict[str, Any] = {}
    for values in by_rank:
        for name, of_parameter in values.items():
            found.setdefault(name, of_parameter)
    return found


def group_state(optimizer: torch.optim.Optimizer, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """Return each group's options and the names of its parameters, as JSON."""
    names = _names_by_group(optimizer, pieces)
    return [
        {
            "names": names[index],
            "options": {
                key: encode(value, f"optimizer group {index}, option {key!r}")
                for key, value in group.items()
                if key not in _OF_THIS_MACHINE
            },
        }
        for index, group in enumerate(optimizer.param_groups)
    ]


def _names_by_group(optimizer: torch.optim.Optimizer, pieces: Sequence[Piece]) -> list[list[str]]:
    name_of = {piece.data: piece.of.name for piece in pieces}
    for index, group in enumerate(optimizer.param_groups):
        unknown = [list(param.shape) for param in group["params"] if param not in name_of]
        if unknown:
            raise CheckpointError(
                f"group {index} of the optimizer holds a tensor of shape {unknown[0]} that the engine does not train",
                where="optimizer.param_groups",
                fix="give all parameters to initialize, instead of add_param_group afterwards",
            )
    return [[name_of[param] for param in group["params"]] for group in optimizer.param_groups]


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    pieces: Sequence[Piece],
    reader: CheckpointReader,
    groups: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any],
    saved_by: str | None = None,
    *,
    elsewhere: Collection[torch.Tensor] = (),
) -> None:
    """Give ``optimizer`` the state stored for the chunks it has here.

    What another kind of optimizer kept is left out, with a warning: this one would not use it, and save it for ever.

    Args:
        pieces: identity of its tensors, see ``Partition.optimizer_pieces``.
        reader: the checkpoint.
        groups: what :func:`group_state` returned.
        values: what :func:`slot_values` returned, of all ranks.
        saved_by: name of the class of the optimizer that was saved, where the checkpoint says it.
        elsewhere: tensors that the optimizer never updates here, and so has no state for.

    Raises:
        CheckpointError: a slot cannot be read. The optimizer is as before.
    """
    current = _names_by_group(optimizer, pieces)
    slots: dict[str, list[LogicalTensor]] = {}
    for of in reader.tensors():
        if of.kind not in _RESERVED:
            slots.setdefault(of.name, []).append(of)
    if saved_by is not None and saved_by != type(optimizer).__name__:
        kinds = {of.kind for stored in slots.values() for of in stored} | {
            slot for of in values.values() for slot in of
        }
        if _starts_anew(optimizer, groups, saved_by, kinds):
            slots, values = {}, {}
            groups = [
                {**saved, "options": {key: value for key, value in saved["options"].items() if key in group}}
                for group, saved in zip(optimizer.param_groups, groups, strict=True)
            ]
    wanted: list[Piece] = []
    by_name: dict[str, dict[str, Any]] = {}
    of_whole = of_whole_parameters(
        (of.kind, of.shape, piece.of.shape) for piece in pieces for of in slots.get(piece.of.name, ())
    )
    for piece in pieces:
        state = by_name.setdefault(piece.of.name, {})
        if piece.data in elsewhere:
            continue
        for of in slots.get(piece.of.name, ()):
            like_param = is_per_element(of.kind, of.shape, piece.of.shape, of_whole)
            state[of.kind] = _empty_slot(of, piece, like_param=like_param)
            wanted.append(Piece(of, piece.chunk if like_param else Chunk.whole(of.shape), state[of.kind]))
        state.update({slot: decode(value) for slot, value in values.get(piece.of.name, {}).items()})
    reader.read(wanted)
    packed, at = [], 0
    for group, saved, names in zip(optimizer.param_groups, groups, current, strict=True):
        # What the checkpoint does not say, such as an option that its torch did not have, stays as it is here.
        options = {key: decode(value) for key, value in saved["options"].items() if key not in _OF_THIS_MACHINE}
        packed.append({**group, **options, "params": list(range(at, at + len(names)))})
        at += len(names)
    flat = [name for names in current for name in names]
    optimizer.load_state_dict(
        {"state": {index: by_name[name] for index, name in enumerate(flat) if by_name[name]}, "param_groups": packed}
    )
    updated_in = {of.name: of.dtype for kind in (WEIGHT, MASTER) for of in reader.tensors() if of.kind == kind}
    for piece in pieces:
        _undo_casts(optimizer.state.get(piece.data, {}), by_name[piece.of.name], piece, updated_in.get(piece.of.name))


def _starts_anew(
    optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]], saved_by: str, slots: Collection[str]
) -> bool:
    """Return whether the state of an optimizer of another class is of no use to this one; tell in both cases.

    Classes with equal options, or of which one derives from the other, keep the same state: ``Adam`` and ``AdamW``.
    An optimizer that made no step has no slots that could be compared.
    """
    here = type(optimizer).__name__
    what = f"the checkpoint's optimizer is {saved_by}, this job's is {here}"
    saved_options = {key for saved in groups for key in saved["options"]} - _NOT_OF_THE_CLASS
    own_options = {key for group in optimizer.param_groups for key in group} - _NOT_OF_THE_CLASS
    if saved_options == own_options or saved_by in {base.__name__ for base in type(optimizer).__mro__}:
        log_dist(f"{what}: its state is loaded", level=logging.WARNING)
        return False
    state = f"its state ({', '.join(sorted(slots))}) is" if slots else "its state is"
    gone = ", ".join(sorted(saved_options - own_options))
    log_dist(
        f"{what}: {state} not loaded{f', nor are its options {gone}' if gone else ''}; {here} starts anew, "
        f"with the checkpoint's {', '.join(sorted(saved_options & own_options)) or 'parameter groups'}",
        level=logging.WARNING,
    )
    return True


def _undo_casts(state: dict[str, Any], read: Mapping[str, Any], piece: Piece, was_updated_in: str | None) -> None:
    """Put back what torch's ``load_state_dict`` cast: it gives every slot but ``step`` the dtype of its parameter.

    Whole numbers always. Floating-point ones where the optimizer updated a tensor of this dtype before: one of another
    dtype expects its state in that.
    """
    same_dtype = was_updated_in == str(piece.data.dtype).removeprefix("torch.")
    for slot, value in read.items():
        loaded = state.get(slot)
        if slot == "step" or not isinstance(value, torch.Tensor) or not isinstance(loaded, torch.Tensor):
            continue
        if loaded.dtype != value.dtype and (same_dtype or not value.is_floating_point()):
            state[slot] = value.to(loaded.device)


def _empty_slot(of: LogicalTensor, piece: Piece, *, like_param: bool) -> torch.Tensor:
    dtype = getattr(torch, of.dtype)
    if like_param:
        return torch.empty_like(piece.data, dtype=dtype, requires_grad=False)
    # Step counts stay on the CPU here; the optimizer moves them where its implementation wants them.
    return torch.empty(of.shape, dtype=dtype, device="cpu" if not of.shape else piece.data.device)


def check_groups(
    optimizer: torch.optim.Optimizer, pieces: Sequence[Piece], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a checkpoint whose parameter groups (of :func:`group_state`) hold other parameters than these.

    Raises:
        CheckpointError: naming the group and the parameters.
    """
    saved = [set(group["names"]) for group in groups]
    current = [set(names) for names in _names_by_group(optimizer, pieces)]
    if saved == current:
        return
    if len(saved) != len(current):
        what = f"the checkpoint has {len(saved)} parameter groups, this optimizer {len(current)}"
    else:
        index = next(i for i, (a, b) in enumerate(zip(saved, current, strict=True)) if a != b)
        gone, new = sorted(saved[index] - current[index]), sorted(current[index] - saved[index])
        what = f"group {index} of the optimizer differs: only in the checkpoint {few(gone)}, only here {few(new)}"
    raise CheckpointError(
        what,
        where="optimizer state",
        fix="build the same groups, or pass load_optimizer_states=False to start the optimizer anew",
    )
