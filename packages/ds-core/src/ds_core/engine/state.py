"""Saving and loading an engine: its parts as logical tensors and JSON, stored by whatever checkpoint engine is set.

What becomes of the engine once a checkpoint is open is in :mod:`ds_core.engine.restore`.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ds_core.checkpoint.atomic import make_durable
from ds_core.checkpoint.folder import check_tag, is_url
from ds_core.checkpoint.jsonable import decode, encode
from ds_core.checkpoint.partly import values_of
from ds_core.comm import raise_together, same_on_all_ranks
from ds_core.engine.names import frozen_names, shared_names
from ds_core.engine.restore import extra_state_of, plan_in_words, restore
from ds_core.engine.rng import capture_rng
from ds_core.errors import CheckpointError, DsError
from ds_core.interfaces.logical import WEIGHT, Snapshot
from ds_core.log import log_dist
from ds_core.optim.slots import group_state, slot_pieces, slot_values

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from ds_core.engine.face import EngineFace
    from ds_core.engine.restore import LoadOptions
    from ds_core.interfaces.checkpoint import Directory

__all__ = ["load", "save"]


_WAS_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


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
        make_durable(directory)
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
        "plan": plan_in_words(parts.precision.plan),
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
            restore(engine, reader, options)
            client_state = values_of(reader.state, "client_state", decode, warn=True)
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
