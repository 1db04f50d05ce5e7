"""From an opened checkpoint to an engine that goes on from it: what fits is checked first, then tensors change."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_core import comm
from ds_core.checkpoint.jsonable import decode
from ds_core.checkpoint.partly import values_of
from ds_core.engine.matching import check, match, tell
from ds_core.engine.overflow import OverflowHistory
from ds_core.engine.parts import Outcome
from ds_core.engine.rng import restore_rng
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import BUFFER, GRADIENT, MASTER, WEIGHT, Chunk, Piece, logical_name
from ds_core.log import log_dist
from ds_core.optim.slots import check_groups, restore_optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ds_core.engine.face import EngineFace
    from ds_core.engine.matching import Matched
    from ds_core.interfaces.checkpoint import CheckpointReader
    from ds_core.interfaces.precision import LossScaler, PrecisionPlan

__all__ = ["LoadOptions", "extra_state_of", "load_weights", "plan_in_words", "restore"]


@dataclass(frozen=True)
class LoadOptions:
    """What ``load_checkpoint`` was asked to load."""

    strict: bool = True
    optimizer: bool = True
    schedule: bool = True
    module_only: bool = False
    custom: Callable[..., None] | None = None


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def extra_state_of(module: nn.Module) -> dict[str, Any]:
    """Return what modules give with ``get_extra_state``, by their names."""
    return {
        logical_name(name): submodule.get_extra_state()
        for name, submodule in module.named_modules()
        if _has_extra_state(submodule)
    }


def restore(engine: EngineFace, reader: CheckpointReader, options: LoadOptions) -> None:
    """Give ``engine`` what is in ``reader``; no collective.

    Raises:
        CheckpointError: it is of another model, or damaged. Tensors loaded until then stay loaded.
    """
    parts, state = engine.parts, reader.state
    # Everything that can be refused is, before the first tensor changes.
    matched = None
    if options.custom is None:
        masters = engine._config.zero_optimization.load_from_fp32_weights or not parts.partition.divides
        matched = match(parts.partition.pieces(), reader, masters=masters)
        check(matched, strict=options.strict)
    of_optimizer = parts.partition.optimizer_pieces()
    options = _with_optimizer_if_it_fits(engine, of_optimizer, state, options)
    scale = state["loss_scale"] if options.module_only else _scale_after(engine, state)
    _check_window(engine, reader, options, scale)
    optimizer = engine.basic_optimizer if options.optimizer and "optimizer" in state else None
    changes = _precision_changes(engine, state, options, scale)
    _restore_weights(engine, reader, options, matched)
    if changes:
        log_dist(f"the checkpoint was written in another precision: {'; '.join(changes)}")
    if options.module_only:
        return
    parts.partition.clear_gradients()
    if optimizer is not None:
        saved = state["optimizer"]
        restore_optimizer(
            optimizer,
            of_optimizer,
            reader,
            saved["groups"],
            saved["values"],
            saved.get("class"),
            elsewhere={piece.data for piece in of_optimizer if parts.partition.is_elsewhere(piece)},
        )
    if options.optimizer:
        _restore_gradients(engine, reader)
    if options.schedule:
        _restore_schedule(engine, state)
    if engine.training_dataloader is not None and "data" in state:
        engine.training_dataloader.load_state_dict(decode(state["data"]))
    _restore_scaler(parts.precision.scaler, type(parts.precision).__name__, state)
    progress = engine.progress
    progress.norm, progress.outcome = None, Outcome.ACCUMULATED  # there is no last step yet
    engine.overflow_history = OverflowHistory()
    progress.global_steps = state["global_steps"]
    progress.global_samples = state["global_samples"]
    progress.skipped_steps = state["skipped_steps"]
    window = parts.accumulation
    window.backwards = 0
    window.micro_steps = state["micro_steps"]
    # Without its gradients a window starts anew.
    window.in_window = state["in_window"] if optimizer is not None else 0
    rank = comm.get_rank(parts.group)
    rank_state = reader.rank_state(rank) if rank < reader.world_size else {}
    if "rng" in rank_state:  # not in what others than this engine wrote
        restore_rng(decode(rank_state["rng"]), engine.device)


def _with_optimizer_if_it_fits(
    engine: EngineFace, of_optimizer: Sequence[Piece], state: Mapping[str, Any], options: LoadOptions
) -> LoadOptions:
    """Return ``options``, without the optimizer where weights of other names are loaded by the caller's own function.

    Raises:
        CheckpointError: the state of the optimizer cannot be loaded into the one here.
    """
    optimizer = engine.basic_optimizer
    if optimizer is None or not options.optimizer or options.module_only:
        return options
    if "optimizer_missing" in state:
        raise CheckpointError(
            f"the state of the optimizer cannot be loaded: {state['optimizer_missing']}",
            where="load_checkpoint",
            fix="pass load_optimizer_states=False to start the optimizer anew",
        )
    if "optimizer" not in state:
        return options
    try:
        check_groups(optimizer, of_optimizer, state["optimizer"]["groups"])
    except CheckpointError as error:
        if options.custom is None:
            raise
        log_dist(f"the optimizer starts anew: {error.what}", level=logging.WARNING)
        return replace(options, optimizer=False)
    return options


def _restore_schedule(engine: EngineFace, state: Mapping[str, Any]) -> None:
    """Go on with the schedule of the checkpoint; warn where one is only here or only there."""
    schedule = engine.lr_scheduler
    if schedule is not None and "schedule" in state:
        schedule.load_state_dict(decode(state["schedule"]))
        return
    if (schedule is None and "schedule" not in state) or engine.basic_optimizer is None:
        return
    rates = ", ".join(f"{rate:g}" for rate in engine.get_lr())
    if schedule is None:
        what = "the checkpoint's learning-rate schedule is not used, there is none here"
        then = f"the rate stays at {rates}"
    else:
        what = f"the checkpoint has no learning-rate schedule: {type(schedule).__name__} starts at its beginning"
        then = f"the rate is {rates} until it sets one"
    log_dist(f"{what}; {then}", level=logging.WARNING)


def plan_in_words(plan: PrecisionPlan) -> dict[str, str]:
    """Return the dtypes of ``plan``, those that are given, by field."""
    given = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return {name: str(dtype).removeprefix("torch.") for name, dtype in given.items() if isinstance(dtype, torch.dtype)}


def _precision_changes(engine: EngineFace, state: Mapping[str, Any], options: LoadOptions, scale: float) -> list[str]:
    """Return, in words, what is another precision here than where the checkpoint was written, and what that means.

    ``scale``: the loss scale after loading.
    """
    precision = engine.parts.precision
    here, there = plan_in_words(precision.plan), state["plan"]
    found = [
        f"{name} dtype {there.get(name, 'not set')} -> {here.get(name, 'not set')}"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]
    if type(precision).__name__ != state["precision"]:
        found.insert(0, f"{state['precision']} -> {type(precision).__name__}")
    if not found:
        return []
    if options.custom is None:
        found.append("weights are taken from the masters where there are any, and cast")
    if not options.module_only:
        found.append("optimizer state is kept" if options.optimizer else "optimizer state is not loaded")
    if scale != state["loss_scale"]:
        found.append(f"the loss scale starts anew, {state['loss_scale']:g} -> {scale:g}")
    return found


def _scale_after(engine: EngineFace, state: Mapping[str, Any]) -> float:
    """Return the loss scale that this engine will have once :func:`_restore_scaler` ran on its own scaler."""
    precision = engine.parts.precision
    scaler = copy.deepcopy(precision.scaler)
    _restore_scaler(scaler, type(precision).__name__, state)
    return scaler.scale


def _restore_scaler(scaler: LossScaler, precision: str, state: Mapping[str, Any]) -> None:
    """Go on with the scaler of the checkpoint, unless that was written in another precision."""
    if precision == state["precision"]:
        scaler.load_state_dict(decode(state["scaler"]))


def _check_window(engine: EngineFace, reader: CheckpointReader, options: LoadOptions, scale: float) -> None:
    if options.module_only or not options.optimizer or engine.basic_optimizer is None or not reader.state["in_window"]:
        return
    precisions = reader.state["precision"], type(engine.parts.precision).__name__
    if precisions[0] != precisions[1]:
        raise CheckpointError(
            f"checkpoint was saved inside an accumulation window in {precisions[0]}, this job trains in "
            f"{precisions[1]}; its unfinished gradients carry the other loss scale and dtype",
            where="load_checkpoint",
            fix=f"load it in {precisions[0]} and save at a step boundary, or pass load_optimizer_states=False",
        )
    _check_gradients(engine, reader, scale)
    accumulation = reader.state["accumulation"]
    if engine.gradient_accumulation_steps() != accumulation:
        raise CheckpointError(
            f"checkpoint was saved inside an accumulation window of {accumulation} micro-batches, "
            f"this job's have {engine.gradient_accumulation_steps()}",
            where="load_checkpoint",
            fix=f'load it with "gradient_accumulation_steps": {accumulation}, or save at a step boundary',
        )
    here = (engine.dp_world_size, engine.zero_optimization_stage())
    there = (reader.world_size, reader.state["stage"])
    if here != there:
        raise CheckpointError(
            f"checkpoint was saved inside an accumulation window by {there[0]} ranks at stage {there[1]}, "
            f"this job has {here[0]} ranks at stage {here[1]}",
            where="load_checkpoint",
            fix=f"load it with {there[0]} ranks at stage {there[1]}, or save at a step boundary",
        )
    factor = engine.parts.partition.loss_factor
    saved = reader.state.get("loss_factor", factor)  # others than this engine write none
    if saved != factor:
        raise CheckpointError(
            f"checkpoint was saved inside an accumulation window whose gradients were multiplied by {saved:g} before "
            f"their sum over the ranks, this job's are by {factor:g}",
            where="load_checkpoint, gradient_allreduce_op, gradient_predivide_factor, prescale_gradients",
            fix="load it with the settings it was written with, or save at a step boundary",
        )


def _check_gradients(engine: EngineFace, reader: CheckpointReader, scale: float) -> None:
    """Refuse gradients of an unfinished window that those to come could not be added to."""
    fix = "load it with the settings it was written with and save at a step boundary, or load_optimizer_states=False"
    if scale != reader.state["loss_scale"]:
        raise CheckpointError(
            f"checkpoint was saved inside an accumulation window at loss scale {reader.state['loss_scale']:g}, this "
            f"job's is {scale:g}; its unfinished gradients carry the other one",
            where="load_checkpoint",
            fix=fix,
        )
    inputs = engine.parts.partition.inputs
    expected = {inputs.names[param]: dtypes.accumulate for param, dtypes in inputs.dtypes.items()}
    for of in reader.tensors():
        if of.kind == GRADIENT and of.name in expected and getattr(torch, of.dtype) != expected[of.name]:
            raise CheckpointError(
                f"checkpoint was saved inside an accumulation window whose gradients are {of.dtype}, this job's are "
                f"{str(expected[of.name]).removeprefix('torch.')}",
                where=f"load_checkpoint, parameter {of.name!r}",
                fix=fix,
            )


def _restore_weights(
    engine: EngineFace, reader: CheckpointReader, options: LoadOptions, matched: Matched | None
) -> None:
    if matched is None:
        assert options.custom is not None
        options.custom(src=_full_state_dict(engine, reader), dst=engine.module)
        engine.parts.partition.refresh_masters()
        return
    tell(matched)
    reader.read(matched.found)
    extra_state = values_of(reader.state, "extra_state", decode)
    for name, submodule in engine.module.named_modules():
        if _has_extra_state(submodule) and logical_name(name) in extra_state:
            submodule.set_extra_state(extra_state[logical_name(name)])


@torch.no_grad()
def load_weights(engine: EngineFace, weights: Mapping[str, Any], strict: bool) -> None:
    """Load a state dict into the module, and its full digits into the masters of weights that are stored in fewer."""
    partition = engine.parts.partition
    engine.module.load_state_dict(weights, strict=strict)
    partition.refresh_masters()
    given = {logical_name(name): value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    inputs = partition.inputs
    stored = {inputs.names[param]: dtypes.stored for param, dtypes in inputs.dtypes.items()}
    for piece in partition.pieces():
        name = piece.of.name
        if piece.of.kind != MASTER or name not in given or given[name].shape != piece.of.shape:
            continue
        value = _part(given[name], piece.chunk).to(piece.data).view_as(piece.data)
        # Not where the module made something else of what it was given.
        is_given = value.to(stored[name]) == piece.data.to(stored[name])
        piece.data.copy_(torch.where(is_given, value, piece.data))


def _part(full: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """Return the elements of ``chunk``, flat."""
    box = full[tuple(slice(start, start + size) for start, size in zip(chunk.box.start, chunk.box.size, strict=True))]
    return box.reshape(-1)[chunk.offset : chunk.offset + chunk.length]


def _full_state_dict(engine: EngineFace, reader: CheckpointReader) -> dict[str, torch.Tensor]:
    """Return weights and buffers by name, in the dtypes they have here, weights with what digits their masters have."""
    here = {piece.of.name: piece.data.dtype for piece in engine.parts.partition.pieces() if piece.of.kind != MASTER}
    # Masters come last, so that they are what is found under their names.
    stored = sorted(reader.tensors(), key=lambda of: of.kind == MASTER)
    found = {}
    for of in stored:
        if of.kind in (WEIGHT, BUFFER, MASTER):
            dtype = here.get(of.name, getattr(torch, of.dtype))
            found[of.name] = Piece(of, Chunk.whole(of.shape), torch.empty(of.shape, dtype=dtype))
    reader.read(list(found.values()))
    return {name: piece.data for name, piece in found.items()}


def _restore_gradients(engine: EngineFace, reader: CheckpointReader) -> None:
    rank = comm.get_rank(engine.parts.group)
    pieces = [
        Piece(
            of, Chunk.whole(of.shape), torch.empty(of.shape, dtype=getattr(torch, of.dtype), device=engine.device), rank
        )
        for of in reader.tensors()
        if of.kind == GRADIENT and of.rank == rank
    ]
    reader.read(pieces)
    if pieces:
        engine.parts.partition.restore_gradients(pieces)
