"""Saving and loading an engine: its parts as logical tensors and JSON, stored by whatever checkpoint engine is set."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_core import comm
from ds_core.checkpoint.folder import check_tag, is_url
from ds_core.checkpoint.jsonable import decode, encode
from ds_core.comm import raise_together, same_on_all_ranks
from ds_core.engine.names import frozen_names, shared_names
from ds_core.engine.overflow import OverflowHistory
from ds_core.engine.parts import Outcome
from ds_core.engine.rng import capture_rng, restore_rng
from ds_core.errors import CheckpointError, DsError
from ds_core.interfaces.logical import BUFFER, GRADIENT, MASTER, WEIGHT, Chunk, Piece, Snapshot, logical_name
from ds_core.log import log_dist
from ds_core.optim.slots import check_groups, group_state, restore_optimizer, slot_pieces, slot_values

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    from ds_core.engine.face import EngineFace
    from ds_core.interfaces.checkpoint import CheckpointReader, Directory
    from ds_core.interfaces.logical import LogicalTensor
    from ds_core.interfaces.precision import LossScaler, PrecisionPlan

__all__ = ["LoadOptions", "extra_state_of", "load", "load_weights", "save"]


_WAS_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@dataclass(frozen=True)
class LoadOptions:
    """What ``load_checkpoint`` was asked to load."""

    strict: bool = True
    optimizer: bool = True
    schedule: bool = True
    module_only: bool = False
    custom: Callable[..., None] | None = None


def save(
    engine: EngineFace,
    save_dir: str | PathLike[str],
    tag: str | None,
    client_state: Mapping[str, Any],
    latest: bool,
    exclude_frozen: bool,
) -> None:
    """Save weights, buffers, optimizer, schedule, scaler, counters, data position, random generators, client state.

    Buffers are rank 0's: where ranks have different ones, such as their own batch statistics, the others' are lost.

    Collective. Inside an accumulation window the gradients so far are saved too; such a checkpoint goes on only in a
    job of the same world size.

    Args:
        save_dir: made if missing.
        tag: name of the folder in it; None: ``global_step<n>``.
        client_state: the caller's own, in what JSON can hold; see :func:`ds_core.checkpoint.jsonable.encode`.
        latest: write ``save_dir/latest``.
        exclude_frozen: leave out the weights that are not trained.

    Raises:
        CheckpointError: on every rank, with the reason of the one that failed.
    """
    directory, tag = _agree_on_place(engine, save_dir, tag)
    failure: Exception | None = None
    snapshot = None
    try:
        _make_folder(directory)
        snapshot = _capture(engine, client_state, exclude_frozen)
    except Exception as error:
        # Also what the client's own state_dict raises: the other ranks are waiting for this one.
        failure = error
    raise_together(failure, engine.parts.group)
    assert snapshot is not None
    engine.parts.checkpoint.save(directory, tag, snapshot, latest=latest)
    log_dist(f"saved checkpoint {tag!r} in {directory}", level=logging.DEBUG)


def _make_folder(directory: Directory) -> None:
    if isinstance(directory, str):  # a URL: whatever a store needs is the engine's to make
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the folder cannot be made: {error.strerror}", where=str(directory), fix="choose another folder"
        ) from error


def _agree_on_place(engine: EngineFace, save_dir: str | PathLike[str], tag: str | None) -> tuple[Directory, str]:
    """Return directory and tag, the same on every rank; ``checkpoint.tag_validation`` says what if tags differ."""
    failure: DsError | None = None
    directory: Directory = ""
    chosen = ""
    try:
        if not save_dir:
            raise CheckpointError("no folder was given", where="save_checkpoint(save_dir)", fix="pass a path")
        directory = _directory_of(engine, save_dir, "save_checkpoint(save_dir)")
        chosen = check_tag(f"global_step{engine.global_steps}" if tag is None else tag)
    except CheckpointError as error:
        failure = error
    raise_together(failure, engine.parts.group)
    differing = same_on_all_ranks(str(save_dir), engine.parts.group)
    if differing:
        raise CheckpointError(
            f"ranks save to different folders: rank {min(differing)} to {differing[min(differing)]!r}",
            where="save_checkpoint(save_dir)",
            fix="pass the same folder on every rank; it is the rank's file in it that differs",
        )
    differing = same_on_all_ranks(chosen, engine.parts.group)
    if differing:
        what = f"ranks save under different tags: rank {min(differing)} under {differing[min(differing)]!r}"
        validation = engine._config.checkpoint.tag_validation.lower()
        if validation == "fail":
            raise CheckpointError(what, where="checkpoint.tag_validation", fix="pass the same tag on every rank")
        told = [chosen]
        torch.distributed.broadcast_object_list(told, group=engine.parts.group, group_src=0)
        chosen = told[0]
        if validation == "warn":
            log_dist(f"{what}; all use rank 0's tag {chosen!r}", level=logging.WARNING)
    return directory, chosen


def _directory_of(engine: EngineFace, given: str | PathLike[str], where: str) -> Directory:
    """Return ``given`` as the checkpoint engine takes it: a path, or a URL as text.

    Raises:
        CheckpointError: a URL, of which the engine knows nothing; or one that was made a path of.
    """
    if is_url(given):
        if engine.parts.checkpoint.takes_urls:
            return str(given)
        raise CheckpointError(
            f"the checkpoint engine {type(engine.parts.checkpoint).__name__} takes paths, and no URL such as "
            f"{str(given).partition('://')[0]}://...",
            where=where,
            fix='pip install ds-ckpt and set "checkpoint": {"engine": "sharded"}, or pass a path',
        )
    path = Path(given)
    if not isinstance(given, str) and _WAS_URL.match(str(path)) and not Path(path.parts[0]).exists():
        # Silently kept in a folder called 's3:' of this machine, it would be gone with the machine.
        raise CheckpointError(
            f"the path {str(path)!r} was made of a URL, and lost one of its slashes", where=where, fix="pass it as text"
        )
    return path


def _capture(engine: EngineFace, client_state: Mapping[str, Any], exclude_frozen: bool) -> Snapshot:
    parts = engine.parts
    window = parts.accumulation
    if window.backwards:
        raise CheckpointError(
            "save_checkpoint was called between a backward and its step",
            where=f"micro-batch {window.micro_steps}",
            fix="call it after engine.step()",
        )
    frozen = set(frozen_names(engine.module))
    pieces = [
        piece
        for piece in parts.partition.pieces()
        if not (exclude_frozen and piece.of.kind == WEIGHT and piece.of.name in frozen)
    ]
    progress = engine.progress
    state: dict[str, Any] = {
        "global_steps": progress.global_steps,
        "global_samples": progress.global_samples,
        "skipped_steps": progress.skipped_steps,
        "micro_steps": window.micro_steps,
        "in_window": window.in_window,
        "accumulation": window.steps,
        "stage": engine.zero_optimization_stage(),
        "precision": type(parts.precision).__name__,
        "plan": _plan_in_words(parts.precision.plan),
        "loss_scale": parts.precision.scaler.scale,
        "scaler": encode(parts.precision.scaler.state_dict(), "loss scaler"),
        "extra_state": encode(extra_state_of(engine.module), "extra state of the model"),
        "excluded": sorted(frozen) if exclude_frozen else [],
        # For those who read the weights without the model: exports, the tools.
        "frozen": sorted(frozen),
        "shared": shared_names(engine.module),
        "client_state": encode(dict(client_state), "client_state"),
    }
    optimizer = engine.basic_optimizer
    if optimizer is not None:
        of_optimizer = parts.partition.optimizer_pieces()
        pieces += slot_pieces(optimizer, of_optimizer)
        pieces += parts.partition.gradient_pieces()
        state["optimizer"] = {
            "groups": group_state(optimizer, of_optimizer),
            "values": slot_values(optimizer, of_optimizer),
        }
    if engine.lr_scheduler is not None:
        state["schedule"] = encode(engine.lr_scheduler.state_dict(), "learning-rate schedule")
    if engine.training_dataloader is not None:
        state["data"] = encode(engine.training_dataloader.state_dict(), "training data")
    return Snapshot(pieces, state, {"rng": encode(capture_rng(engine.device), "random generators")})


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def extra_state_of(module: nn.Module) -> dict[str, Any]:
    """Return what modules give with ``get_extra_state``, by their names."""
    return {
        logical_name(name): submodule.get_extra_state()
        for name, submodule in module.named_modules()
        if _has_extra_state(submodule)
    }


def load(
    engine: EngineFace, load_dir: str | PathLike[str], tag: str | None, options: LoadOptions
) -> tuple[str, dict[str, Any]]:
    """Load a checkpoint into ``engine``; the world size it was written at does not matter. Collective.

    Returns:
        (path of the checkpoint, client state).

    Raises:
        CheckpointError: on every rank: no such checkpoint, half of one, or one of another model. Tensors loaded until
            then stay loaded. Also where a save in the background failed and nobody was told yet: nothing is loaded.
    """
    failure: Exception | None = None
    path, client_state = "", {}
    try:
        directory = _directory_of(engine, load_dir, "load_checkpoint(load_dir)")
        checkpoint = engine.parts.checkpoint
        checkpoint.commit()  # what is being saved in the background may be what is to be loaded
        chosen = _latest(engine, directory) if tag is None else check_tag(tag)
        path = f"{str(directory).rstrip('/')}/{chosen}" if isinstance(directory, str) else str(directory / chosen)
        with checkpoint.open(directory, chosen) as reader:
            _restore(engine, reader, options)
            client_state = decode(reader.state["client_state"])
    except Exception as error:
        # Also a file that this rank cannot read, and what the client's own load_state_dict raises.
        failure = error
    raise_together(failure, engine.parts.group)
    engine.parts.partition.after_load()
    log_dist(f"loaded checkpoint {path}")
    return path, client_state


def _latest(engine: EngineFace, directory: Directory) -> str:
    checkpoint = engine.parts.checkpoint
    if engine._config.checkpoint.load_universal:
        return checkpoint.read_latest_universal(directory)
    return checkpoint.read_latest(directory)


def _restore(engine: EngineFace, reader: CheckpointReader, options: LoadOptions) -> None:
    parts, state = engine.parts, reader.state
    # Everything that can be refused is, before the first tensor changes.
    scale = state["loss_scale"] if options.module_only else _scale_after(engine, state)
    _check_window(engine, reader, options, scale)
    of_optimizer = parts.partition.optimizer_pieces()
    optimizer = engine.basic_optimizer if options.optimizer and "optimizer" in state else None
    if options.optimizer and not options.module_only and engine.basic_optimizer and "optimizer_missing" in state:
        raise CheckpointError(
            f"the state of the optimizer cannot be loaded: {state['optimizer_missing']}",
            where="load_checkpoint",
            fix="pass load_optimizer_states=False to start the optimizer anew",
        )
    if optimizer is not None:
        check_groups(optimizer, of_optimizer, state["optimizer"]["groups"])
    changes = _precision_changes(engine, state, options, scale)
    _restore_weights(engine, reader, options)
    if changes:
        log_dist(f"the checkpoint was written in another precision: {'; '.join(changes)}")
    if options.module_only:
        return
    parts.partition.clear_gradients()
    if optimizer is not None:
        saved = state["optimizer"]
        restore_optimizer(optimizer, of_optimizer, reader, saved["groups"], saved["values"])
    if options.optimizer:
        _restore_gradients(engine, reader)
    if options.schedule and engine.lr_scheduler is not None and "schedule" in state:
        engine.lr_scheduler.load_state_dict(decode(state["schedule"]))
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


def _plan_in_words(plan: PrecisionPlan) -> dict[str, str]:
    """Return the dtypes of ``plan``, those that are given, by field."""
    given = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return {name: str(dtype).removeprefix("torch.") for name, dtype in given.items() if isinstance(dtype, torch.dtype)}


def _precision_changes(engine: EngineFace, state: Mapping[str, Any], options: LoadOptions, scale: float) -> list[str]:
    """Return, in words, what is another precision here than where the checkpoint was written, and what that means.

    ``scale``: the loss scale after loading.
    """
    precision = engine.parts.precision
    here, there = _plan_in_words(precision.plan), state["plan"]
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


def _restore_weights(engine: EngineFace, reader: CheckpointReader, options: LoadOptions) -> None:
    stored = {(of.name, of.kind): of for of in reader.tensors()}
    wanted = list(engine.parts.partition.pieces())
    if options.custom is not None:
        options.custom(src=_full_state_dict(engine, reader), dst=engine.module)
        engine.parts.partition.refresh_masters()
        return
    found: list[Piece] = []
    missing: list[str] = []
    for piece in wanted:
        of = _best_source(piece, stored)
        if of is None:
            missing.append(piece.of.name)
        elif of.shape != piece.of.shape:
            raise CheckpointError(
                f"{of.kind} {of.name!r} is {list(of.shape)} in the checkpoint and {list(piece.of.shape)} in the model",
                where="load_checkpoint",
                fix="load it into a model of the same sizes",
            )
        else:
            found.append(replace(piece, of=of))
    mine = {(piece.of.name, piece.of.kind) for piece in wanted}
    extra = sorted(name for (name, kind) in stored if kind in (WEIGHT, BUFFER) and (name, kind) not in mine)
    missing = sorted(set(missing) - set(reader.state["excluded"]))
    if options.strict and (missing or extra):
        raise CheckpointError(
            f"model and checkpoint differ: only in the model {missing[:5]}, only in the checkpoint {extra[:5]}",
            where="load_checkpoint",
            fix="load it into the model that wrote it, or pass load_module_strict=False",
        )
    reader.read(found)
    extra_state = decode(reader.state["extra_state"])
    for name, submodule in engine.module.named_modules():
        if _has_extra_state(submodule) and logical_name(name) in extra_state:
            submodule.set_extra_state(extra_state[logical_name(name)])


def _best_source(piece: Piece, stored: Mapping[tuple[str, str], LogicalTensor]) -> LogicalTensor | None:
    """Return the stored tensor with the most digits of ``piece``: a master is the weight before it was cast."""
    kinds = (MASTER, WEIGHT) if piece.of.kind in (MASTER, WEIGHT) else (piece.of.kind,)
    return next((stored[piece.of.name, kind] for kind in kinds if (piece.of.name, kind) in stored), None)


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
        if torch.equal(value.to(stored[name]).to(value.dtype), piece.data):
            piece.data.copy_(value)


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
