"""Saving and loading an engine: its parts as logical tensors and JSON, stored by whatever checkpoint engine is set.

What becomes of the engine once a checkpoint is open is in :mod:`ds_core.engine.restore`.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ds_core.checkpoint.atomic import make_durable
from ds_core.checkpoint.folder import check_tag, is_url
from ds_core.checkpoint.jsonable import decode, encode, encode_mapping
from ds_core.checkpoint.local import local_path
from ds_core.checkpoint.partly import values_of
from ds_core.checkpoint.saving import together
from ds_core.comm import all_or_none, values_of_ranks
from ds_core.engine.names import frozen_names, shared_names
from ds_core.engine.restore import extra_state_of, plan_in_words, restore
from ds_core.engine.rng import capture_rng
from ds_core.errors import CheckpointError
from ds_core.interfaces.checkpoint import digest
from ds_core.interfaces.logical import WEIGHT, Snapshot
from ds_core.log import log_dist
from ds_core.optim.slots import group_state, merge_values, slot_pieces, slot_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike

    from torch.distributed import ProcessGroup

    from ds_core.engine.face import EngineFace
    from ds_core.engine.restore import LoadOptions
    from ds_core.interfaces.checkpoint import CheckpointReader, Directory
    from ds_core.interfaces.logical import Piece

__all__ = ["load", "save"]

_NEEDED: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("global_steps", "global_samples", "skipped_steps", "micro_steps", "in_window"), int),
    **dict.fromkeys(("accumulation", "stage"), int),
    **dict.fromkeys(("plan", "scaler", "extra_state", "client_state"), dict),
    "loss_scale": (int, float),
    "precision": str,
    "excluded": list,
}
"""What the state of every checkpoint of an engine has, and in which form."""


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
        client_state: the caller's own, in what JSON can hold; see :func:`ds_core.checkpoint.jsonable.encode`. Rank 0's
            is saved; the others may leave it out, and one that differs is warned of once.
        latest: write ``save_dir/latest``; rank 0's counts.
        exclude_frozen: leave out the weights that are not trained; the same on every rank.

    Raises:
        CheckpointError: on every rank, with the reason of the one that failed; also what the ``state_dict`` of
            something of the caller's raised, as its cause.
    """
    group = engine.parts.group
    snapshot: list[Snapshot] = []
    place: list[tuple[Directory, str, dict[str, Any]]] = []
    together(lambda: place.append(_place_of(engine, save_dir, tag, client_state)), "save_checkpoint", group)
    directory, chosen, client = place[0]
    chosen = _agree_on_place(engine, directory, chosen, client, exclude_frozen)

    def prepare() -> None:
        # First: they may need a collective, and no rank may have failed by then.
        gradients = [] if engine.basic_optimizer is None else list(engine.parts.partition.gradient_pieces())
        _make_folder(directory)
        snapshot.append(_capture(engine, client, gradients, exclude_frozen))

    # Also for what the caller's own state_dict raises: the other ranks are waiting for this one.
    together(prepare, "save_checkpoint", group)
    if engine.basic_optimizer is not None and engine.parts.partition.divides:
        # What every rank writes is rank 0's, which does not know of the parameters of others.
        of_optimizer = snapshot[0].state["optimizer"]
        of_optimizer["values"] = merge_values(values_of_ranks(of_optimizer["values"], group))
    engine.parts.checkpoint.save(directory, chosen, snapshot[0], latest=latest)
    log_dist(f"saved checkpoint {chosen!r} in {directory}", level=logging.DEBUG)


def _make_folder(directory: Directory) -> None:
    if isinstance(directory, str):  # a URL: whatever a store needs is the engine's to make
        return
    try:
        make_durable(directory)
    except OSError as error:
        raise CheckpointError(
            f"the folder cannot be made: {error.strerror}", where=str(directory), fix="choose another folder"
        ) from error


def _place_of(
    engine: EngineFace, save_dir: str | PathLike[str], tag: str | None, client_state: Mapping[str, Any]
) -> tuple[Directory, str, dict[str, Any]]:
    """Return what this rank was asked for: directory, tag, and the client state encoded."""
    window = engine.parts.accumulation
    if window.backwards:
        raise CheckpointError(
            "save_checkpoint was called between a backward and its step",
            where=f"micro-batch {window.micro_steps}",
            fix="call it after engine.step()",
        )
    if not save_dir:
        raise CheckpointError("no folder was given", where="save_checkpoint(save_dir)", fix="pass a path")
    directory = _directory_of(engine, save_dir, "save_checkpoint(save_dir)")
    chosen = check_tag(f"global_step{engine.global_steps}" if tag is None else tag)
    return directory, chosen, encode_mapping(client_state, "client_state")


def _agree_on_place(
    engine: EngineFace, directory: Directory, tag: str, client: Mapping[str, Any], exclude_frozen: bool
) -> str:
    """Return the tag, the same on every rank; ``checkpoint.tag_validation`` says what if tags differ. Collective."""
    mine = (str(directory), tag, bool(exclude_frozen), digest(client) if client else None)
    directories, tags, exclusions, clients = zip(*values_of_ranks(mine, engine.parts.group), strict=True)
    if other := _differing(directories):
        raise CheckpointError(
            f"ranks save to different folders: rank {other} to {directories[other]!r}",
            where="save_checkpoint(save_dir)",
            fix="pass the same folder on every rank; it is the rank's file in it that differs",
        )
    if other := _differing(exclusions):
        raise CheckpointError(
            f"ranks pass different exclude_frozen_parameters: rank {other} {exclusions[other]}, rank 0 {exclusions[0]}",
            where="save_checkpoint(exclude_frozen_parameters)",
            fix="pass the same on every rank",
        )
    _warn_of_client_states(engine, clients)
    if other := _differing(tags):
        what = f"ranks save under different tags: rank {other} under {tags[other]!r}"
        validation = engine._config.checkpoint.tag_validation.lower()
        if validation == "fail":
            raise CheckpointError(what, where="checkpoint.tag_validation", fix="pass the same tag on every rank")
        if validation == "warn":
            log_dist(f"{what}; all use rank 0's tag {tags[0]!r}", level=logging.WARNING)
    chosen: str = tags[0]
    return chosen


def _differing(values: Sequence[object]) -> int:
    """Return the first rank whose value is not rank 0's; 0 if there is none."""
    return next((rank for rank, value in enumerate(values) if value != values[0]), 0)


_warned_of_client_states: weakref.WeakSet[EngineFace] = weakref.WeakSet()
"""Engines of which it was said that client states differ: once is enough."""


def _warn_of_client_states(engine: EngineFace, digests: Sequence[str | None]) -> None:
    others = [str(rank) for rank, theirs in enumerate(digests) if theirs not in (None, digests[0])]
    if others and engine not in _warned_of_client_states:
        _warned_of_client_states.add(engine)
        log_dist(
            f"the client_state of rank {', '.join(others)} differs from rank 0's: only rank 0's is saved",
            level=logging.WARNING,
        )


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
    return local_path(given, where)


def _capture(
    engine: EngineFace, client: Mapping[str, Any], gradients: Sequence[Piece], exclude_frozen: bool
) -> Snapshot:
    parts = engine.parts
    window = parts.accumulation
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
        "loss_factor": parts.partition.loss_factor,
        "scaler": encode(parts.precision.scaler.state_dict(), "loss scaler"),
        "extra_state": encode(extra_state_of(engine.module), "extra state of the model"),
        "excluded": sorted(frozen) if exclude_frozen else [],
        # For those who read the weights without the model: exports, the tools.
        "frozen": sorted(frozen),
        "shared": shared_names(engine.module),
        "client_state": client,
    }
    optimizer = engine.basic_optimizer
    if optimizer is not None:
        of_optimizer = parts.partition.optimizer_pieces()
        pieces += slot_pieces(optimizer, of_optimizer)
        pieces += gradients
        state["optimizer"] = {
            "class": type(optimizer).__name__,
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

    All of it is agreed on: every rank passes the same, ``latest`` is read by rank 0, and each finds the same checkpoint
    under the tag, also where somebody saves over it meanwhile.

    Returns:
        (path of the checkpoint, client state).

    Raises:
        CheckpointError: on every rank: no such checkpoint, half of one, or one of another model. Tensors loaded until
            then stay loaded. Also where a save in the background failed and nobody was told yet, and where the ranks
            differ in what they pass or find: nothing is loaded then.
        Exception: what the caller's own ``load_state_dict`` raised, on its rank; the others get a DsError.
    """
    group, checkpoint = engine.parts.group, engine.parts.checkpoint
    directory, given = all_or_none(lambda: _source_of(engine, load_dir, tag), group)
    _agree_on_source(directory, given, options, group)
    # What is being saved in the background may be what is to be loaded; also engines of others agree by themselves.
    all_or_none(checkpoint.commit, group)
    chosen = given if given is not None else _latest(engine, directory)
    path = f"{str(directory).rstrip('/')}/{chosen}" if isinstance(directory, str) else str(directory / chosen)
    with ExitStack() as opened:
        reader = all_or_none(lambda: opened.enter_context(checkpoint.open(directory, chosen)), group)
        identities = values_of_ranks(all_or_none(lambda: _checked(reader, path), group), group)
        if other := _differing(identities):
            raise CheckpointError(
                f"rank {other} found another checkpoint than rank 0 under the tag {chosen!r}",
                where=path,
                fix="load it once nobody saves under this tag; every rank must see the same files",
            )
        # Also for a file that one rank cannot read, and for what the caller's own load_state_dict raises.
        client_state = all_or_none(lambda: _loaded(engine, reader, options), group)
    engine.parts.partition.after_load()
    log_dist(f"loaded checkpoint {path}")
    return path, client_state


def _source_of(engine: EngineFace, load_dir: str | PathLike[str], tag: str | None) -> tuple[Directory, str | None]:
    directory = _directory_of(engine, load_dir, "load_checkpoint(load_dir)")
    return directory, None if tag is None else check_tag(tag)


def _agree_on_source(directory: Directory, tag: str | None, options: LoadOptions, group: ProcessGroup) -> None:
    """Refuse what would load one thing on one rank and another on the next. Collective."""
    mine = {
        "load_dir": str(directory),
        "tag": tag,
        "load_module_strict": bool(options.strict),
        "load_optimizer_states": bool(options.optimizer),
        "load_lr_scheduler_states": bool(options.schedule),
        "load_module_only": bool(options.module_only),
        "custom_load_fn": options.custom is not None,
    }
    told = values_of_ranks(mine, group)
    if other := _differing(told):
        name = next(name for name, value in told[other].items() if value != told[0][name])
        raise CheckpointError(
            f"ranks load with different {name}: rank {other} {told[other][name]!r}, rank 0 {told[0][name]!r}",
            where=f"load_checkpoint({name})",
            fix="pass the same on every rank",
        )


def _latest(engine: EngineFace, directory: Directory) -> str:
    """Return the tag that rank 0 finds named, on every rank. Collective."""
    checkpoint, group = engine.parts.checkpoint, engine.parts.group
    is_universal = engine._config.checkpoint.load_universal
    read = checkpoint.read_latest_universal if is_universal else checkpoint.read_latest
    found = all_or_none(lambda: read(directory) if group.rank() == 0 else None, group)
    tag: str = values_of_ranks(found, group)[0]
    return tag


def _checked(reader: CheckpointReader, path: str) -> str:
    """Return the identity of what was opened, once its state is known to be an engine's."""
    state = reader.state
    for key, kinds in _NEEDED.items():
        if key not in state:
            raise CheckpointError(
                f"the state of the checkpoint has no {key!r}", where=path, fix="load one that save_checkpoint wrote"
            )
        if not isinstance(state[key], kinds):
            raise CheckpointError(
                f"the state of the checkpoint has {str(state[key])[:60]!r} as {key!r}",
                where=path,
                fix="load one that save_checkpoint wrote",
            )
    for key in ("groups", "values") if "optimizer" in state else ():
        if not isinstance(state["optimizer"], dict) or key not in state["optimizer"]:
            raise CheckpointError(
                f"the state of the checkpoint has no {key!r} of the optimizer",
                where=path,
                fix="load one that save_checkpoint wrote",
            )
    return reader.identity


def _loaded(engine: EngineFace, reader: CheckpointReader, options: LoadOptions) -> dict[str, Any]:
    restore(engine, reader, options)
    client_state: dict[str, Any] = values_of(reader.state, "client_state", decode, warn=True)
    return client_state
