"""The optimizer of stage 0, which is in the model-states file: plain, or one of the two wrappers for 16 bits. Pure.

Note: who is who. The file numbers the optimizer's parameters and does not name them. They are taken to come, group by
group, in the model's order; if more than one assignment has the right sizes, the optimizer's state is left out and
:attr:`Optimizer.missing` says why.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ds_ckpt.formats.deepspeed.building import at_index, flat_of, ref_of
from ds_ckpt.formats.deepspeed.state import Optimizer, Scaling, scaling_of
from ds_ckpt.formats.deepspeed.values import TensorRef
from ds_ckpt.formats.deepspeed.zero import RESERVED, add_slots
from ds_core.interfaces.logical import MASTER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ds_ckpt.checks import Field
    from ds_ckpt.formats.deepspeed.building import Builder, Shape

__all__ = ["assign", "read_stage0"]

_MAX_STATES = 200_000
"""Of the search for an assignment; beyond, it counts as ambiguous."""
_AMBIGUOUS = (
    "DeepSpeed numbers the parameters of a stage-0 optimizer and does not name them, and more than one assignment "
    "to this model's parameters has these sizes"
)
_NONE_FITS = "no assignment of the optimizer's parameters to the model's, in its order, has these sizes"


def read_stage0(saved: Field, candidates: Mapping[str, Shape], builder: Builder) -> tuple[Optimizer, Scaling]:
    """Add what the optimizer of stage 0 holds; return its groups and the scaler's state.

    Args:
        saved: ``optimizer`` of the model-states file.
        candidates: the model's parameters, each once, in its order.
        builder: takes the tensors.
    """
    if saved.get("fp32_groups_flat") is not None:
        return _read_fused(saved, candidates, builder), scaling_of(saved.object(), saved)
    masters = saved.get("fp32_groups")
    inner = saved if masters is None else saved["optimizer_state_dict"]
    scaling = Scaling() if masters is None else scaling_of(saved.object(), saved)
    return _read_by_parameter(inner, masters, candidates, builder), scaling


def _read_by_parameter(
    inner: Field, masters: Field | None, candidates: Mapping[str, Shape], builder: Builder
) -> Optimizer:
    """Read a torch ``state_dict``, with masters in their own shapes beside it or none."""
    states = inner["state"]
    groups = inner["param_groups"].list()
    members = [[member.whole() for member in group["params"].list()] for group in groups]
    copies = None if masters is None else [of_group.list() for of_group in masters.list(len(groups))]
    shapes: list[list[Shape | None]] = []
    for index, group in enumerate(members):
        if copies is not None and len(copies[index]) != len(group):
            raise inner["param_groups"].wrong(f"as many parameters in group {index} as it has masters")
        of_group: list[Shape | None] = []
        for place, member in enumerate(group):
            of_group.append(_shape(states, member) if copies is None else ref_of(copies[index][place]).shape)
        shapes.append(of_group)
    named = assign(candidates, shapes)
    if isinstance(named, str):
        return Optimizer(missing=named)
    optimizer = Optimizer()
    for index, (group, names) in enumerate(zip(members, named, strict=True)):
        for place, (member, name) in enumerate(zip(group, names, strict=True)):
            if copies is not None:
                builder.add_whole(name, MASTER, ref_of(copies[index][place]))
            _add_own_slots(optimizer, states, member, name, builder)
        optimizer.groups.append((names, groups[index].object()))
    return optimizer


def _shape(states: Field, member: int) -> Shape | None:
    """Return the shape a parameter has by its state, None where that does not tell."""
    field = at_index(states, member)
    if field is None:
        return None
    slots = field.object()
    known = ("exp_avg", "momentum_buffer", "exp_avg_sq", "sum", "square_avg", "acc_delta")
    found = next((slots[slot] for slot in known if type(slots.get(slot)) is TensorRef), None)
    return None if found is None else found.shape


def _add_own_slots(optimizer: Optimizer, states: Field, member: int, name: str, builder: Builder) -> None:
    slots = at_index(states, member)
    if slots is None:
        return
    for slot, value in slots.object().items():
        if type(slot) is not str or slot in RESERVED or len(slot) > 200:
            raise slots.wrong("slots of an optimizer with names of their own")
        if type(value) is TensorRef:
            builder.add_whole(name, slot, value)
        else:
            optimizer.add_value(name, slot, value)


def _read_fused(saved: Field, candidates: Mapping[str, Shape], builder: Builder) -> Optimizer:
    """Read the wrapper whose inner optimizer has one flat parameter per group, without padding."""
    inner = saved["optimizer_state_dict"]
    groups = inner["param_groups"].list()
    flats = [flat_of(flat) for flat in saved["fp32_groups_flat"].list(len(groups))]
    if len(flats) != 1 or flats[0].numel != sum(map(math.prod, candidates.values())):
        return Optimizer(missing=f"{_AMBIGUOUS}: the fused wrapper keeps only the sum of a group's sizes")
    optimizer = Optimizer()
    builder.add_concatenated(MASTER, candidates, flats, saved["fp32_groups_flat"])
    options = groups[0].object()
    (member,) = groups[0]["params"].list(1)
    slots = at_index(inner["state"], member.whole())

    def add_flat(slot: str, values: Sequence[Field | None]) -> None:
        parts = [flat_of(value) for value in values if value is not None]
        if sum(part.numel for part in parts) != flats[0].numel:
            raise inner["state"].wrong(f"{flats[0].numel} elements as {slot}")
        builder.add_concatenated(slot, candidates, parts, inner["state"])

    add_slots(optimizer, [slots], candidates, options, add_flat, builder)
    optimizer.groups.append((list(candidates), options))
    return optimizer


def assign(candidates: Mapping[str, Shape], groups: Sequence[Sequence[Shape | None]]) -> list[list[str]] | str:
    """Return the names of each group's parameters, or why they cannot be told.

    Every group is in the order of ``candidates``. All of those in the order of the groups is what one group without
    frozen parameters gives; otherwise it must be the only way in which the shapes fit.

    Args:
        candidates: name -> shape.
        groups: shapes in order; None where a shape is not known.
    """
    names, shapes = list(candidates), list(candidates.values())
    wanted = sum(map(len, groups))
    if wanted > len(names):
        return _NONE_FITS
    if len(groups) == 1 and wanted == len(names):
        fits = all(known is None or known == shape for known, shape in zip(groups[0], shapes, strict=True))
        return [names] if fits else _NONE_FITS
    # Ways to get to "so many of each group are assigned after the first n candidates"; two are as good as many.
    layers: list[dict[tuple[int, ...], tuple[int, Any]]] = [{(0,) * len(groups): (1, None)}]
    spare, states = len(names) - wanted, 1
    for number, shape in enumerate(shapes):
        following: dict[tuple[int, ...], tuple[int, Any]] = {}
        for taken, (ways, _) in layers[-1].items():
            steps: list[int | None] = [
                index
                for index, group in enumerate(groups)
                if taken[index] < len(group) and group[taken[index]] in (None, shape)
            ]
            if number - sum(taken) < spare:
                steps.append(None)
            for step in steps:
                after = taken if step is None else (*taken[:step], taken[step] + 1, *taken[step + 1 :])
                before = following.get(after, (0, None))[0]
                following[after] = (min(2, before + ways), (taken, step))
        states += len(following)
        if states > _MAX_STATES:
            return _AMBIGUOUS
        layers.append(following)
    end = tuple(map(len, groups))
    if end not in layers[-1]:
        return _NONE_FITS
    if layers[-1][end][0] > 1:
        return _AMBIGUOUS
    found: list[list[str]] = [[] for _ in groups]
    at: tuple[int, ...] = end
    for number in range(len(names), 0, -1):
        at, step = layers[number][at][1]
        if step is not None:
            found[step].append(names[number - 1])
    return [list(reversed(group)) for group in found]
