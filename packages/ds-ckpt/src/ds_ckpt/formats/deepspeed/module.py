"""Weights, buffers and frozen parameters out of the model-states files. Pure; loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_ckpt.formats.deepspeed.building import flat_of, ref_of, shapes_of
from ds_ckpt.formats.deepspeed.state import is_extra_state
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import BUFFER, WEIGHT, logical_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ds_ckpt.checks import Field
    from ds_ckpt.formats.deepspeed.building import Builder
    from ds_ckpt.formats.deepspeed.values import TensorRef

__all__ = ["Module", "add_buffers", "add_frozen_slices", "add_weights", "check_kind", "module_of", "unread"]


class Module:
    """``module`` of a file: every parameter once under the first of its names, as ds-core names it, and buffers."""

    def __init__(self, params: dict[str, TensorRef], buffers: dict[str, TensorRef], aliases: dict[str, str]) -> None:
        self.params, self.buffers, self.aliases = params, buffers, aliases


def check_kind(model: Field) -> None:
    """Refuse what is not read at all.

    Raises:
        CheckpointError: a checkpoint of tensor or pipeline parallelism, or of experts.
    """
    for key, feature in (
        ("num_experts", "mixture-of-experts models"),
        ("ds_autoep_layers", "mixture-of-experts models"),
        ("folding", "mixture-of-experts models"),
    ):
        if model.get(key) is not None:
            raise _cannot(model, feature)
    degrees = model.get("checkpoint_parallel_dimensions")
    counts = [model.get("mp_world_size")]
    counts += [] if degrees is None else [degrees.get("pp_degree"), degrees.get("tp_degree")]
    if any(count is not None and count.whole() > 1 for count in counts):
        raise _cannot(model, "tensor or pipeline parallelism")
    if model["module"].value is None:
        raise _cannot(model, "pipeline parallelism")


def _cannot(model: Field, feature: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoints of DeepSpeed's with {feature} are not read",
        where=str(model.origin[0] / model.origin[1]),
        fix="export the weights with DeepSpeed itself and load those",
    )


def module_of(model: Field) -> Module:
    """Return parameters and buffers; names that share a tensor are told by ``shared_params``, or by their storage."""
    module = model["module"]
    told = model.get("shared_params")
    shared = {} if told is None else {key: field.text() for key, field in told.items()}
    names = model.get("buffer_names")
    buffer_names = set() if names is None else {field.text() for field in names.list()}
    params: dict[str, TensorRef] = {}
    buffers: dict[str, TensorRef] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name in module.object():
        if not isinstance(name, str):
            raise module.wrong("names of tensors")
        if is_extra_state(name):
            continue
        ref = ref_of(module[name])
        is_buffer = name in buffer_names
        canonical = shared.get(name)
        if canonical is None and ref.numel:
            view = (is_buffer, ref.storage.key, ref.offset, ref.shape, ref.strides, ref.dtype)
            canonical = first.setdefault(view, name)
        if canonical is not None and canonical != name:
            aliases[name] = canonical
        elif is_buffer:
            buffers[name] = ref
        else:
            params[name] = ref
    return Module(params, buffers, aliases)


def add_buffers(module: Module, builder: Builder) -> None:
    for name, ref in module.buffers.items():
        builder.add_whole(name, BUFFER, ref)


def add_weights(module: Module, builder: Builder) -> None:
    """Add the weights as the model has them: of stage 0 to 2, where they are whole."""
    for name, ref in module.params.items():
        builder.add_whole(name, WEIGHT, ref)


def add_frozen_slices(first: Field, models: Callable[[], Sequence[Field]], builder: Builder) -> None:
    """Add the parameters that are not trained of stage 3: each rank has a slice, padded.

    Args:
        first: the file of rank 0.
        models: returns the files of all ranks; called only where there are such parameters.
        builder: takes them.
    """
    shapes = first.get("frozen_param_shapes")
    if shapes is None or not shapes.object():
        return
    params = shapes_of(shapes)
    fragments = [model["frozen_param_fragments"] for model in models()]
    for name, shape in params.items():
        refs = [flat_of(of_rank[name]) for of_rank in fragments]
        builder.add_slices(WEIGHT, {name: shape}, refs, fragments[0][name])


def unread(module: Module, builder: Builder) -> list[str]:
    """Return parameters of the model that no element of was saved, such as frozen ones that were excluded."""
    held = {name for name, _, _ in builder.tensors}
    return [logical_name(name) for name in module.params if logical_name(name) not in held]
