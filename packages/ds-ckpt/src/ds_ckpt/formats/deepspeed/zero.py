"""Optimizer files of ZeRO: which bytes are which parameter's (stages 1, 2, 3 and BF16_Optimizer). Pure; no torch.

Note: the order in the flat buffers is that of ``param_shapes``, also with ``round_robin_gradients``, where the files'
own ``param_slice_mappings`` point at other parameters.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from ds_ckpt.checks import Field, short
from ds_ckpt.formats.deepspeed.building import at_index, flat_of, shapes_of
from ds_ckpt.formats.deepspeed.state import Optimizer
from ds_ckpt.formats.deepspeed.values import TensorRef
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import BUFFER, GRADIENT, MASTER, WEIGHT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ds_ckpt.formats.deepspeed.building import Builder, Shape

__all__ = ["RESERVED", "add_slots", "partition_count", "read_partitions", "read_slices", "stage_of"]

RESERVED = frozenset({BUFFER, GRADIENT, MASTER, WEIGHT})


def stage_of(inner: Field) -> int:
    """Return the stage that wrote the file; BF16_Optimizer, which does not say, is one of stage 1."""
    found = inner.get("zero_stage")
    return 1 if found is None else found.whole(0, 3)


def partition_count(inner: Field) -> int | None:
    """Return how many ranks share the optimizer; old files have a number, new ones a list with one per group."""
    found = inner.get("partition_count")
    if found is None:
        return None
    counts = [found] if not isinstance(found.value, list) else found.list()
    values = [count.whole(1, 2**24) for count in counts]
    if len(set(values)) > 1:
        raise CheckpointError(
            f"groups of the optimizer are shared by different numbers of ranks, {short(values)}; checkpoints of "
            "mixture-of-experts models are not read",
            where=f"{found.origin[0] / found.origin[1]}",
            fix="export the weights with DeepSpeed itself and load those",
        )
    return values[0] if values else None


def read_partitions(ranks: Sequence[Field], shapes: Sequence[Field], builder: Builder) -> Optimizer:
    """Add masters and slots of stages 1 and 2: a flat buffer per group, cut into as many parts as there are ranks.

    Padding is at the end of the last ranks' parts, kept or removed.

    Args:
        ranks: the inner dictionary of each rank's file, in the order of ranks.
        shapes: name -> shape of each group.
        builder: takes the tensors.
    """
    optimizer = Optimizer()
    masters = [rank["single_partition_of_fp32_groups"].list(len(shapes)) for rank in ranks]
    bases = [rank["base_optimizer_state"] for rank in ranks]
    for group, field in enumerate(shapes):
        params = shapes_of(field)
        numel = sum(map(math.prod, params.values()))
        parts = [flat_of(of_rank[group]) for of_rank in masters]
        where = masters[0][group]
        _check_length(parts, numel, len(ranks), where)
        builder.add_concatenated(MASTER, params, parts, where)
        options, slots = _group_of(bases, group)
        optimizer.groups.append((list(params), options))
        _refuse_experts(options, bases[0])
        place = _Partition(builder, params, numel, [part.numel for part in parts])
        add_slots(optimizer, slots, params, options, place.add, builder)
        step = ranks[0].get("base_optimizer_state_step")
        if step is not None and not isinstance(bases[0].value, dict):
            for name in params:
                optimizer.add_value(name, "step", step.value)
    return optimizer


class _Partition:
    """How a slot of one group lies in the ranks' files."""

    def __init__(self, builder: Builder, params: Mapping[str, Shape], numel: int, lengths: Sequence[int]) -> None:
        self.builder, self.params, self.numel, self.lengths = builder, params, numel, lengths

    def add(self, slot: str, values: Sequence[Field | None]) -> None:
        parts = []
        for rank, (value, length) in enumerate(zip(values, self.lengths, strict=True)):
            if value is not None:
                parts.append(flat_of(value))
            elif length:
                where = next(value for value in values if value is not None)
                raise where.wrong(f"it on rank {rank} as well, which has none")
        where = next(value for value in values if value is not None)
        _check_length(parts, self.numel, len(values), where)
        self.builder.add_concatenated(slot, self.params, parts, where)


def _check_length(parts: Sequence[TensorRef], numel: int, world_size: int, where: Field) -> None:
    """Check that parts hold ``numel`` elements and no more padding than alignment to two elements per rank needs."""
    held, padded = sum(part.numel for part in parts), -(-numel // (2 * world_size)) * 2 * world_size
    if not numel <= held <= padded:
        raise where.wrong(f"{numel} to {padded} elements on all ranks together, not {held}")


def _group_of(bases: Sequence[Field], group: int) -> tuple[Mapping[str, Any], list[Field | None]]:
    """Return a group's options, and each rank's slots of the one flat parameter it is for the inner optimizer."""
    if isinstance(bases[0].value, list):
        # Elastic checkpoints: the slots alone.
        return {}, [base.list()[group] if group < len(base.list()) else None for base in bases]
    groups = bases[0]["param_groups"].list()
    if group >= len(groups):
        raise bases[0]["param_groups"].wrong(f"at least {group + 1} groups")
    options = groups[group].object()
    (index,) = groups[group]["params"].list(1)
    return options, [at_index(base["state"], index.whole()) for base in bases]


def read_slices(ranks: Sequence[Field], shapes: Sequence[Field], builder: Builder) -> Optimizer:
    """Add masters and slots of stage 3: each parameter cut into equal slices, those of a sub-group one after the other.

    Args:
        ranks: the inner dictionary of each rank's file, in the order of ranks.
        shapes: name -> shape of each sub-group.
        builder: takes the tensors.
    """
    if ranks[0].get("ds_zero_partition_groups") is not None:
        raise ranks[0]["ds_zero_partition_groups"].wrong("none; mixture-of-experts models are not read")
    optimizer = Optimizer()
    masters = [rank["fp32_flat_groups"].list(len(shapes)) for rank in ranks]
    bases = [rank["optimizer_state_dict"] for rank in ranks]
    params = [shapes_of(field) for field in shapes]
    for index, of_sub_group in enumerate(params):
        where = masters[0][index]
        builder.add_slices(MASTER, of_sub_group, [flat_of(of_rank[index]) for of_rank in masters], where)
    seen: set[int] = set()
    for group in bases[0]["param_groups"].list():
        options, names = group.object(), []
        _refuse_experts(options, group)
        for member in group["params"].list():
            index = member.whole(0, len(params) - 1)
            if index in seen:
                raise member.wrong("every sub-group once")
            seen.add(index)
            names += list(params[index])
            slots = [at_index(base["state"], index) for base in bases]
            place = _Slices(builder, params[index])
            add_slots(optimizer, slots, params[index], options, place.add, builder)
        optimizer.groups.append((names, options))
    if len(seen) != len(params):
        raise bases[0]["param_groups"].wrong(f"all {len(params)} sub-groups")
    return optimizer


class _Slices:
    """How a slot of one sub-group lies in the ranks' files."""

    def __init__(self, builder: Builder, params: Mapping[str, Shape]) -> None:
        self.builder, self.params = builder, params

    def add(self, slot: str, values: Sequence[Field | None]) -> None:
        where = next(value for value in values if value is not None)
        if any(value is None for value in values):
            raise where.wrong("it on every rank")
        self.builder.add_slices(slot, self.params, [flat_of(value) for value in values if value is not None], where)


def add_slots(
    optimizer: Optimizer,
    ranks: Sequence[Field | None],
    params: Mapping[str, Shape],
    options: Mapping[str, Any],
    add_flat: Callable[[str, Sequence[Field | None]], None],
    builder: Builder,
) -> None:
    """Add the slots of a flat parameter to each of ``params`` that it is made of.

    A tensor of one dimension is cut as the masters are; a step count, and what is no tensor, is every parameter's.
    """
    found = dict.fromkeys(itertools.chain.from_iterable(field.object() for field in ranks if field is not None))
    for slot in found:
        where = next(field for field in ranks if field is not None and slot in field.object())
        if type(slot) is not str or slot in RESERVED or len(slot) > 200:
            raise where.wrong("slots of an optimizer with names of their own")
        values = [field[slot] if field is not None and slot in field.object() else None for field in ranks]
        first = next(value for value in values if value is not None)
        if type(first.value) is TensorRef and len(first.value.shape) > 0 and slot != "step":
            add_flat(slot, values)
        elif type(first.value) is TensorRef:
            for name in params:
                builder.add_whole(name, slot, first.value)
        else:
            for name in params:
                optimizer.add_value(name, slot, first.value)
    if found and "step" not in found and type(options.get("step")) is int:
        # Optimizers of apex's kind count per group.
        for name in params:
            optimizer.add_value(name, "step", options["step"])


def _refuse_experts(options: Mapping[str, Any], where: Field) -> None:
    if options.get("moe") is True:
        raise CheckpointError(
            "a group of the optimizer holds experts; checkpoints of mixture-of-experts models are not read",
            where=str(where.origin[0] / where.origin[1]),
            fix="export the weights with DeepSpeed itself and load those",
        )
