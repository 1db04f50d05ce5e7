"""``optimizer.add_param_group`` after ``initialize`` and before the first step: the engine is laid out anew.

What a partition divides it lays out once, for the parameters there are then. So a group is added by going back: every
parameter gets all the digits it is trained in, the optimizer updates parameters of the model and has whole state, as
before ``initialize``. Then torch adds the group, and a new partition is built, as ``initialize`` builds one.

Note: a group that one rank adds alone. Its collectives would meet those of the others' backward, and all would wait.
So both calls begin by telling each other what they are: an addition always, a backward if it is the engine's first.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_core import comm
from ds_core.checkpoint.jsonable import decode
from ds_core.comm import all_or_none, values_of_ranks
from ds_core.engine.groups import check_ranks_agree, groups_to_train
from ds_core.errors import CommError, ConfigError, EngineError
from ds_core.interfaces.logical import MASTER
from ds_core.optim.client import take_over
from ds_core.optim.scaled import OptimizerStep
from ds_core.optim.slots import merge_values, slot_pieces, slot_values
from ds_core.schedules._base import GroupSchedule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from ds_core.engine.engine import DeepSpeedEngine
    from ds_core.interfaces.logical import Piece
    from ds_core.interfaces.partition import Partition, PartitionInputs

__all__ = ["accept_groups", "begin_training"]


def accept_groups(engine: DeepSpeedEngine) -> None:
    """Let ``add_param_group`` of the torch optimizer of ``engine`` reach the engine, as long as that lives."""
    optimizer = engine.basic_optimizer
    if optimizer is None:
        return
    of_engine, of_optimizer = weakref.ref(engine), weakref.ref(optimizer)

    def add_param_group(param_group: dict[str, Any]) -> None:
        engine, optimizer = of_engine(), of_optimizer()
        assert optimizer is not None  # it is what this was called on
        if engine is None or engine.is_destroyed or engine.basic_optimizer is not optimizer:
            type(optimizer).add_param_group(optimizer, param_group)
        else:
            _add(engine, optimizer, param_group)

    # On this one object, as torch's schedules do with its step: clients call it on the optimizer that they hold.
    optimizer.add_param_group = add_param_group  # type: ignore[method-assign]


def begin_training(engine: DeepSpeedEngine) -> None:
    """End the time in which groups are added; called before the first backward. Collective.

    Raises:
        CommError: other ranks add a group.
    """
    _meet("engine.backward", engine.parts.group)
    engine.has_begun = True


def _meet(call: str, group: ProcessGroup) -> None:
    """Make sure that every rank is in ``call``, since what follows are other collectives in another. Collective.

    Raises:
        CommError: on every rank; nothing has changed.
    """
    calls = [each if isinstance(each, str) else "another call" for each in values_of_ranks(call, group)]
    if len(set(calls)) > 1:
        ranks = {name: [rank for rank, each in enumerate(calls) if each == name] for name in dict.fromkeys(calls)}
        listing = ", ".join(f"ranks {there} are in {name}" for name, there in ranks.items())
        raise CommError(
            f"the ranks do different things before the first step: {listing}",
            where=call,
            fix="call optimizer.add_param_group on every rank, with the same parameters, before the first backward",
        )


def _add(engine: DeepSpeedEngine, optimizer: torch.optim.Optimizer, param_group: Mapping[str, Any]) -> None:
    """Train one more group. Collective; nothing has changed where it raises.

    Raises:
        EngineError: there was a backward already.
        ConfigError: not a group of parameters of the model that require grad and are not trained yet.
        CommError: the ranks add different groups, or some of them none.
    """
    partition = engine.parts.partition
    inputs = partition.inputs
    _check_time(engine)
    _meet("optimizer.add_param_group", inputs.group)
    group = all_or_none(lambda: _checked(param_group, partition), inputs.group)
    trained = [param for param in _params_of(group) if param.requires_grad]
    check_ranks_agree(
        inputs.module, [*inputs.param_groups, {"params": trained}], inputs.names, inputs.config, inputs.group
    )
    _undo(optimizer, partition)
    before = list(optimizer.param_groups)
    try:
        type(optimizer).add_param_group(optimizer, group)
        # What torch's schedules make of a new group is theirs to say, as in plain PyTorch.
        if isinstance(engine.lr_scheduler, GroupSchedule):
            engine.lr_scheduler.follow_groups()
    except BaseException:
        optimizer.param_groups[:] = before
        raise
    finally:
        # Also where the optimizer refused the group: the engine goes on with those it had.
        groups = groups_to_train(inputs.module, optimizer, None)
        rebuilt = type(partition)(inputs.with_groups(groups))
        take_over(optimizer, rebuilt)
        engine.parts = dataclasses.replace(engine.parts, partition=rebuilt, optimizer=OptimizerStep(optimizer))


def _check_time(engine: DeepSpeedEngine) -> None:
    """Refuse a group that comes too late. Every rank that adds one finds it by itself; the others are elsewhere."""
    if engine.has_begun or engine.progress.global_steps:
        raise EngineError(
            f"a parameter group was added after {engine.progress.global_steps} steps; parameters, masters and what is "
            "reduced are laid out before the first backward",
            where="optimizer.add_param_group",
            fix="add it before training; or save a checkpoint, and load it with load_optimizer_states=False into an "
            "engine whose optimizer has the group",
        )


def _params_of(group: Mapping[str, Any]) -> list[nn.Parameter]:
    """Return the parameters of a group as torch takes it: some, or one, or pairs of name and parameter."""
    return [param[1] if isinstance(param, tuple) else param for param in group["params"]]


def _checked(param_group: Mapping[str, Any], partition: Partition) -> dict[str, Any]:
    """Return a copy of the group, its parameters in a list."""
    where = "optimizer.add_param_group"
    given = param_group["params"]
    if not isinstance(given, (torch.Tensor, set)):
        given = list(given)
    group = {**param_group, "params": [given] if isinstance(given, torch.Tensor) else given}
    names = partition.inputs.names
    params = _params_of(group)
    if any(param not in names for param in params if isinstance(param, torch.Tensor)):
        raise ConfigError(
            "the group has parameters that are not the model's",
            where=where,
            fix="add parameters of the model that was given to initialize",
        )
    known = {param for each in partition.inputs.param_groups for param in each["params"]}
    for param in params:
        if param in known:
            raise ConfigError(
                f"parameter {names[param]!r} is in the groups twice", where=where, fix="add each parameter once"
            )
        known.add(param)
    if not any(param.requires_grad for param in params):
        raise ConfigError(
            "no parameter of the group requires grad", where=where, fix="call requires_grad_() on them before"
        )
    return group


def _undo(optimizer: torch.optim.Optimizer, partition: Partition) -> None:
    """Let ``optimizer`` update parameters of the model again, with all digits and state; end ``partition``. Collective.

    The parameters may be in other dtypes then than the model is stored in.
    """
    inputs = partition.inputs
    params = [param for group in inputs.param_groups for param in group["params"]]
    pieces = partition.optimizer_pieces()
    partition.refresh_masters()  # what was written into parameters since counts
    masters = [piece for piece in pieces if piece.of.kind == MASTER]
    full = _full_tensors([*masters, *slot_pieces(optimizer, pieces)], inputs)
    values = merge_values(values_of_ranks(slot_values(optimizer, pieces), inputs.group))
    partition.destroy()
    state: dict[Any, Any] = {key: value for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor)}
    by_name: dict[str, dict[str, Any]] = {}
    for (name, kind), tensor in full.items():
        if kind != MASTER:
            by_name.setdefault(name, {})[kind] = tensor
    for name, of_parameter in values.items():
        by_name.setdefault(name, {}).update({slot: decode(value) for slot, value in of_parameter.items()})
    for param, piece in zip(params, pieces, strict=True):
        if piece.of.kind == MASTER:
            param.data = full[piece.of.name, MASTER]
        if piece.of.name in by_name:
            state[param] = by_name[piece.of.name]
    for own, group in zip(optimizer.param_groups, inputs.param_groups, strict=True):
        own["params"] = list(group["params"])
    optimizer.state.clear()
    optimizer.state.update(state)


@torch.no_grad()
def _full_tensors(pieces: Sequence[Piece], inputs: PartitionInputs) -> dict[tuple[str, str], Tensor]:
    """Return the logical tensors of which the ranks hold ``pieces``, whole, by name and kind. Collective."""
    rank = comm.get_rank(inputs.group)
    mine = {(piece.of.name, piece.of.kind): piece for piece in pieces}
    told = {key: (piece.of.shape, piece.data.dtype, piece.data.device.type) for key, piece in mine.items()}
    of_all: dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype, str]] = {}
    for of_rank in values_of_ranks(told, inputs.group):
        of_all = {**of_rank, **of_all}
    found = {}
    for key in sorted(of_all):
        shape, dtype, device_type = of_all[key]
        full = torch.zeros(shape, dtype=dtype, device=inputs.device)
        piece = mine.get(key)
        if piece is not None and piece.writer == rank:
            # Partitions that divide do so by intervals of the whole parameter.
            part = full.view(-1)[piece.chunk.offset : piece.chunk.offset + piece.chunk.length]
            part.copy_(piece.data.detach().reshape(-1))
        if full.numel():
            # Added as bytes: of each element one rank has the bits, the others zeros.
            torch.distributed.all_reduce(full.view(-1).view(torch.uint8), group=inputs.group)
        # Step counts are on the CPU for some optimizers.
        found[key] = full.cpu() if device_type == "cpu" else full
    return found
