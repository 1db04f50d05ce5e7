"""Universal folders (``ds_to_universal``): a file per parameter and slot. Loads no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ds_ckpt.checks import Field, damaged, short
from ds_ckpt.formats.deepspeed.building import at_index, ref_of, shapes_of
from ds_ckpt.formats.deepspeed.folder import UNIVERSAL
from ds_ckpt.formats.deepspeed.state import Optimizer, Scaling, scaler_in
from ds_ckpt.formats.deepspeed.torchfile import read_torch_file
from ds_ckpt.formats.deepspeed.values import TensorRef
from ds_ckpt.formats.deepspeed.zero import RESERVED, stage_of
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import MASTER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ds_ckpt.formats.deepspeed.building import Builder, Shape

__all__ = ["read_universal"]


def read_universal(shapes: Sequence[Field], builder: Builder) -> tuple[Optimizer, Scaling, int]:
    """Add what ``zero/`` holds; return the optimizer's groups, the scaler's state and the stage that wrote it.

    Both variants: of stages 1 and 2 a dictionary with the tensor in its full shape and a step count per parameter, of
    stage 3 a flat tensor, with the step count of the first sub-group for all. Every group has its own options.

    Args:
        shapes: name -> shape of each group, or of each sub-group at stage 3.
        builder: takes the tensors.
    """
    file = read_torch_file(builder.folder, UNIVERSAL)
    builder.add_file(file)
    saved = Field(file.value, "", builder.folder, UNIVERSAL)
    stage = stage_of(saved)
    params = [shapes_of(field) for field in shapes]
    optimizer = Optimizer()
    for of_group in params:
        for name, shape in of_group.items():
            _add_parameter(name, shape, optimizer, builder)
    groups = saved["param_groups"].list()
    if stage < 3 and len(groups) != len(params):
        raise saved["param_groups"].wrong(f"{len(params)} groups")
    seen: list[int] = []
    for index, group in enumerate(groups):
        members = [index]
        if stage == 3:
            members = [member.whole(0, len(params) - 1) for member in group["params"].list()]
        seen += members
        optimizer.groups.append(([name for member in members for name in params[member]], group.object()))
    if sorted(seen) != list(range(len(params))):
        raise saved["param_groups"].wrong(f"all {len(params)} sub-groups, each once")
    if stage == 3:
        _add_step(saved, params, optimizer, builder)
    return optimizer, scaler_in(saved), stage


def _add_parameter(name: str, shape: Shape, optimizer: Optimizer, builder: Builder) -> None:
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise damaged(f"a parameter called {short(name)} cannot be a folder", builder.folder)
    inner = f"zero/{name}"
    folder = builder.folder / "zero" / name
    if folder.is_symlink() or not folder.is_dir():
        raise damaged(f"the folder of parameter {name!r} is missing, or a link", builder.folder, inner)
    slots = sorted(path.name.removesuffix(".pt") for path in folder.iterdir() if path.name.endswith(".pt"))
    if "fp32" not in slots:
        raise damaged(f"parameter {name!r} has no fp32.pt", builder.folder, inner)
    for slot in slots:
        if slot in RESERVED or len(slot) > 200:
            raise damaged(f"parameter {name!r} has a slot {short(slot)}", builder.folder, inner)
        file = read_torch_file(builder.folder, f"{inner}/{slot}.pt")
        builder.add_file(file)
        value = Field(file.value, "", builder.folder, file.name)
        kind = MASTER if slot == "fp32" else slot
        if slot == "step":
            _add_count(name, value.value, optimizer, builder)
        elif isinstance(value.value, dict):
            if value.object().get("is_expert_param"):
                raise CheckpointError(
                    f"parameter {name!r} holds experts; checkpoints of mixture-of-experts models are not read",
                    where=str(builder.folder),
                    fix="export the weights with DeepSpeed itself and load those",
                )
            builder.add_whole(name, kind, ref_of(value["param"]))
        else:
            ref = ref_of(value)
            if ref.numel != math.prod(shape):
                raise value.wrong(f"the {math.prod(shape)} elements of {name!r}, not {ref.numel}")
            builder.add_whole(name, kind, ref, shape)


def _add_count(name: str, value: Any, optimizer: Optimizer, builder: Builder) -> None:
    if type(value) is TensorRef:
        builder.add_whole(name, "step", value)
    else:
        optimizer.add_value(name, "step", value)


def _add_step(saved: Field, params: Sequence[Mapping[str, Shape]], optimizer: Optimizer, builder: Builder) -> None:
    inner = saved.get("optimizer_state_dict")
    first = None if inner is None else at_index(inner["state"], 0)
    step = None if first is None else first.get("step")
    if step is None:
        return
    for of_sub_group in params:
        for name in of_sub_group:
            _add_count(name, step.value, optimizer, builder)
