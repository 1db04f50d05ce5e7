"""Weights of a running engine, for others to load: files in Hugging Face's layout, or a dictionary on rank 0.

Every function here is called by every rank; the model need not fit on any of them but rank 0, and there only as said.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ds_core.checkpoint.files import bytes_of, write_torch_file
from ds_core.checkpoint.folder import is_url
from ds_core.checkpoint.huggingface import parse_dtype, parse_size, plan_layout, write_layout, writing
from ds_core.checkpoint.local import local_path
from ds_core.checkpoint.safetensors_format import write_stream
from ds_core.comm import all_or_none
from ds_core.engine.gathering import Gathering, on_rank_0
from ds_core.engine.names import frozen_names, shared_names
from ds_core.engine.restore import extra_state_of
from ds_core.errors import CheckpointError, ConfigError, few
from ds_core.log import log_dist

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike
    from pathlib import Path

    from torch import Tensor

    from ds_core.checkpoint.huggingface import Exported, Layout
    from ds_core.checkpoint.safetensors_format import Entry
    from ds_core.engine.face import EngineFace

__all__ = ["consolidated", "export_weights", "save_16bit_model"]


def export_weights(
    engine: EngineFace,
    save_dir: str | PathLike[str],
    dtype: str | torch.dtype | None,
    max_shard_size: str | int | None,
    safe_serialization: bool,
    exclude_frozen: bool,
) -> Exported:
    """Write weights and persistent buffers as Hugging Face's libraries load them.

    Rank 0 writes, and holds one tensor at a time beside its own part of the model; with ``safe_serialization=False``
    those of one file.

    Args:
        engine: at any partition.
        save_dir: made if missing.
        dtype: ``float32``, ``bfloat16`` or ``float16``: what floating tensors are cast to, from masters where there
            are any; None: the weights as the model has them.
        max_shard_size: of a file, such as ``"5GB"``; None: one file.
        safe_serialization: safetensors rather than ``pytorch_model.bin``.
        exclude_frozen: leave out the weights that are not trained.

    Returns:
        What was written, on every rank.

    Raises:
        CheckpointError: on every rank, with the reason of the one that failed.
    """

    def checked() -> tuple[Path, str | None]:
        parse_size(max_shard_size)
        return local_path(save_dir, "export_weights(save_dir)"), parse_dtype(dtype)

    folder, word = all_or_none(checked, engine.parts.group)
    wanted: torch.dtype | None = None if word is None else getattr(torch, word)
    arguments = (str(folder), word, max_shard_size, safe_serialization)
    gathering = _gather(engine, wanted, exclude_frozen, "export_weights", arguments)
    shared = shared_names(engine.module)
    layout = plan_layout(
        gathering.entries, shared, max_shard_size=max_shard_size, safe_serialization=safe_serialization
    )
    writer = _stream if safe_serialization else _pickle

    def write(take: Callable[[Entry], Tensor]) -> None:
        write_layout(folder, layout, lambda path, name: writer(path, name, layout, take))

    on_rank_0(gathering, layout.entries, write)
    done = layout.exported(folder, _beyond(gathering, word))
    log_dist(f"exported {done.tensors} tensors to {folder}", level=logging.DEBUG)
    return done


def save_16bit_model(
    engine: EngineFace, save_dir: str | PathLike[str], save_filename: str, exclude_frozen: bool
) -> bool:
    """Write the weights as the model has them into one file; rank 0 holds all of them, or one if it is safetensors.

    Returns:
        Whether it was written: not at stage 3 without ``stage3_gather_16bit_weights_on_model_save``.
    """
    zero = engine._config.zero_optimization
    if zero.stage == 3 and not zero.gather_16bit_weights_on_model_save:
        log_dist(
            "save_16bit_model wrote nothing: the weights are divided among the ranks; "
            '"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": true} gathers them, '
            "export_weights does so without it"
        )
        return False
    folder = all_or_none(lambda: _folder_of(save_dir, save_filename), engine.parts.group)
    gathering = _gather(engine, None, exclude_frozen, "save_16bit_model", (str(folder), save_filename))
    shared = shared_names(engine.module)
    layout = plan_layout(gathering.entries, shared, max_shard_size=None, safe_serialization=True)
    ((name, _),) = layout.files.items()
    is_safe = save_filename.endswith(".safetensors")

    def write(take: Callable[[Entry], Tensor]) -> None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if is_safe:
                _stream(folder / save_filename, name, layout, take)
                if _extra_state(engine):
                    log_dist(
                        "extra state of modules is not in a safetensors file; use a .bin file", level=logging.WARNING
                    )
            else:
                _pickle(folder / save_filename, name, layout, take, _extra_state(engine))
        _warn_of_preferred(folder, save_filename)

    on_rank_0(gathering, layout.entries, write)
    return True


def _warn_of_preferred(folder: Path, written: str) -> None:
    """Warn of older files of the folder that ``transformers`` loads rather than what was just written."""
    names = [name for name in ("model.safetensors", "model.safetensors.index.json") if (folder / name).exists()]
    if written == "pytorch_model.bin" and names:
        log_dist(
            f"transformers will load {few(names)} of {folder}, which was there before, and not {written!r}, which was "
            f"just written: remove the older weights, or pass save_filename='model.safetensors'",
            level=logging.WARNING,
        )


def _folder_of(save_dir: str | PathLike[str], save_filename: str) -> Path:
    folder = local_path(save_dir, "save_16bit_model(save_dir)")
    if not isinstance(save_filename, str) or not save_filename or is_url(save_filename):
        raise CheckpointError(
            f"{save_filename!r} cannot name a file", where="save_16bit_model(save_filename)", fix="pass a plain name"
        )
    return folder


def consolidated(engine: EngineFace, exclude_frozen: bool, name: str) -> dict[str, Tensor] | None:
    """Return the weights as the model has them by name, in host memory, on rank 0; None on the other ranks.

    Names of one parameter share a tensor.

    Raises:
        ConfigError: the weights are not divided among the ranks: every rank has them in ``module_state_dict()``.
    """
    stage = engine.zero_optimization_stage()
    if stage < 3:
        raise ConfigError(
            f"the weights are whole on every rank at stage {stage}, there is nothing to consolidate",
            where=f"engine.{name}",
            fix="use engine.module_state_dict()",
        )
    gathering = _gather(engine, None, exclude_frozen, name, exclude_frozen)
    found: dict[str, Tensor] = {}

    def collect(take: Callable[[Entry], Tensor]) -> None:
        found.update({entry.name: take(entry) for entry in gathering.entries})

    on_rank_0(gathering, gathering.entries, collect)
    if gathering.rank != 0:
        return None
    return _with_aliases(found, shared_names(engine.module))


def _gather(
    engine: EngineFace, dtype: torch.dtype | None, exclude_frozen: bool, name: str, arguments: object
) -> Gathering:
    partition = engine.parts.partition
    inputs = partition.inputs
    return Gathering(
        # Also where the pieces of one rank cannot be had.
        all_or_none(lambda: list(partition.pieces()), engine.parts.group),
        engine.parts.group,
        engine.device,
        dtype=dtype,
        stored={inputs.names[param]: dtypes.stored for param, dtypes in inputs.dtypes.items()},
        exclude=frozen_names(engine.module) if exclude_frozen else (),
        where=f"engine.{name}",
        arguments=(arguments, exclude_frozen),
    )


def _beyond(gathering: Gathering, dtype: object) -> list[str]:
    found = gathering.agree()
    if found:
        log_dist(
            f"{len(found)} tensors, such as {found[0]!r}, have values that {dtype} cannot hold: they are infinite now",
            level=logging.WARNING,
        )
    return found


def _stream(path: Path, name: str, layout: Layout, take: Callable[[Entry], Tensor]) -> None:
    write_stream(path, layout.files[name], layout.metadata(name), lambda entry: [bytes_of(take(entry))])


def _pickle(
    path: Path, name: str, layout: Layout, take: Callable[[Entry], Tensor], extra: Mapping[str, Any] | None = None
) -> None:
    tensors = {entry.name: take(entry) for entry in layout.files[name]}
    write_torch_file(path, {**_with_aliases(tensors, layout.shared), **(extra or {})})


def _with_aliases(tensors: dict[str, Tensor], shared: Mapping[str, str]) -> dict[str, Tensor]:
    return {**tensors, **{alias: tensors[name] for alias, name in shared.items() if name in tensors}}


def _extra_state(engine: EngineFace) -> dict[str, Any]:
    """Return the extra state of modules under the names that ``load_state_dict`` expects."""
    return {f"{name}._extra_state".lstrip("."): value for name, value in extra_state_of(engine.module).items()}
