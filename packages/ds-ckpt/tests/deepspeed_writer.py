"""Writes checkpoints as DeepSpeed does, from the description of its format; for tests of the reader.

The classes that its pickles name exist under its module names only while a file is written.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import sys
import types
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLOTS = ("exp_avg", "exp_avg_sq")


class ZeroStageEnum(enum.IntEnum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


class LossScaler:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class DynamicLossScaler(LossScaler): ...


@dataclass
class fragment_address:  # noqa: N801  the pickled name
    numel: int
    start: int


class SubparamShape(LossScaler): ...


PLACES = {
    "deepspeed.runtime.zero.config": [ZeroStageEnum],
    "deepspeed.runtime.fp16.loss_scaler": [LossScaler, DynamicLossScaler],
    "deepspeed.utils.tensor_fragment": [fragment_address],
    "deepspeed.checkpoint.universal_checkpoint": [SubparamShape],
}


@contextlib.contextmanager
def its_classes() -> Iterator[None]:
    """Give the classes above DeepSpeed's names, as long as it takes to pickle them."""
    names = {".".join(name.split(".")[:n]) for name in PLACES for n in range(1, len(name.split(".")) + 1)}
    was = {cls: cls.__module__ for classes in PLACES.values() for cls in classes}
    try:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
        for name, classes in PLACES.items():
            for cls in classes:
                cls.__module__ = name
                setattr(sys.modules[name], cls.__name__, cls)
        yield
    finally:
        for name in names:
            del sys.modules[name]
        for cls, module in was.items():
            cls.__module__ = module


def save(value: Any, path: Path, zipped: bool = True) -> None:
    with its_classes():
        torch.save(value, path, _use_new_zipfile_serialization=zipped)


@dataclass
class Model:
    """A model's truth: groups of trained parameters, and what else it has."""

    groups: list[dict[str, Tensor]]
    frozen: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    """Alias -> canonical name."""
    slots: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(parameter, slot) -> state of the optimizer."""
    stored: torch.dtype = torch.float32
    step: Any = field(default_factory=lambda: torch.tensor(7.0))

    def __post_init__(self) -> None:
        for (name, value), slot in itertools.product(self.trained.items(), SLOTS):
            self.slots[name, slot] = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(self.slots)))

    @property
    def trained(self) -> dict[str, Tensor]:
        return {name: value for group in self.groups for name, value in group.items()}

    def weight(self, name: str) -> Tensor:
        return ({**self.trained, **self.frozen}[self.aliases.get(name, name)]).to(self.stored)

    def module(self, *, whole: bool = True, excluded: bool = False) -> OrderedDict[str, Tensor]:
        """Return ``module``: weights as views of one flat storage, aliases sharing it; or empty ones of stage 3."""
        names = [*self.buffers, *self.trained, *self.aliases, *([] if excluded else self.frozen)]
        if not whole:
            empty = torch.empty(0, dtype=self.stored)
            return OrderedDict((name, self.buffers.get(name, empty.clone())) for name in names)
        weights = {name: self.weight(name) for name in names if name not in self.buffers and name not in self.aliases}
        flat = torch.cat([value.reshape(-1) for value in weights.values()]) if weights else torch.empty(0)
        at, views = 0, {}
        for name, value in weights.items():
            views[name] = flat[at : at + value.numel()].view(value.shape)
            at += value.numel()
        return OrderedDict((n, self.buffers[n] if n in self.buffers else views[self.aliases.get(n, n)]) for n in names)

    def options(self, group: int) -> dict[str, Any]:
        return {"lr": 0.1 * (group + 1), "betas": (0.9, 0.98), "weight_decay": 0.0 if group else 0.01, "fused": None}


def model_states(model: Model, world: int, **changes: Any) -> dict[str, Any]:
    """Return the model-states file; shapes and frozen parameters are given by the caller."""
    return {
        "module": model.module(),
        "buffer_names": list(model.buffers),
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": None,
        "frozen_param_fragments": None,
        "lr_scheduler": {"last_batch_iteration": 6},
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": set(),
        "skipped_steps": 1,
        "global_steps": 8,
        "global_samples": 64,
        "dp_world_size": world,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {"train_batch_size": 8, "gradient_accumulation_steps": 2},
        "ds_version": "0.19.6",
        "epoch": 3,
        **changes,
    }


def shapes(params: dict[str, Tensor], plain: bool = False) -> OrderedDict[str, Any]:
    return OrderedDict((name, tuple(p.shape) if plain else p.shape) for name, p in params.items())


def write_partitions(
    folder: Path,
    model: Model,
    world: int,
    *,
    stage: int = 2,
    round_robin: bool = False,
    elastic: bool = False,
    bf16_optimizer: bool = False,
    prefix: str = "",
    old_names: bool = False,
    zipped: bool = True,
    excluded: bool = False,
    scaler: Any = None,
    **changes: Any,
) -> None:
    """Write stage 1 or 2: a flat buffer per group, padded to two elements per rank, cut into equal parts."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = [_in_turns(group, world) if round_robin else group for group in model.groups]
    inner: list[dict[str, Any]] = [{} for _ in range(world)]
    for rank, mine in enumerate(inner):
        masters, state, elastic_state, paddings = [], {}, [], []
        for index, group in enumerate(groups):
            part, padding = _part(list(group.values()), rank, world)
            paddings.append(padding)
            masters.append(part if bf16_optimizer else part[: part.numel() - padding])
            slots = {slot: _part([model.slots[name, slot] for name in group], rank, world)[0] for slot in SLOTS}
            state[index] = {"step": model.step, **slots}
            elastic_state.append({slot: value[: value.numel() - padding] for slot, value in slots.items()})
        options = [{**model.options(index), "params": [index]} for index in range(len(groups))]
        mine["clip_grad"] = 1.0
        mine["base_optimizer_state"] = elastic_state if elastic else {"state": state, "param_groups": options}
        mine["single_partition_of_fp32_groups"] = masters
        mine["group_paddings"] = paddings
        mine["partition_count"] = world if old_names else [world] * len(groups)
        mine["ds_version"] = "0.19.6"
        # Of the order before the turns, as DeepSpeed writes it: nobody may use it.
        mine["param_slice_mappings"] = [
            OrderedDict((name, fragment_address(1, 0)) for name in group) for group in model.groups
        ]
        if elastic:
            mine["base_optimizer_state_step"] = 7
        if not bf16_optimizer:
            mine["zero_stage"] = stage if old_names else ZeroStageEnum(stage)
            mine["loss_scaler"] = scaler or LossScaler(cur_scale=1.0, dynamic=False)
        underscore = "" if old_names else "_"
        name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00{underscore}optim_states.pt"
        save({"optimizer_state_dict": mine, "ds_config": {}, "ds_version": "0.19.6"}, folder / name, zipped)
    frozen = stage == 2 and not excluded and not old_names
    value = model_states(
        model,
        world,
        module=model.module(excluded=excluded),
        param_shapes=[shapes(group, plain=old_names) for group in groups],
        shared_params=model.aliases,
        frozen_param_shapes=shapes(model.frozen) if frozen else None,
        frozen_param_fragments=OrderedDict((n, model.weight(n)) for n in model.frozen) if frozen else None,
    )
    if old_names:
        for key in ("shared_params", "checkpoint_parallel_dimensions", "frozen_param_shapes", "global_samples"):
            del value[key]
    save({**value, **changes}, folder / "mp_rank_00_model_states.pt", zipped)


def _in_turns(group: dict[str, Tensor], world: int) -> dict[str, Tensor]:
    names = list(group)
    return {name: group[name] for first in range(world) for name in names[first::world]}


def _part(tensors: list[Tensor], rank: int, world: int) -> tuple[Tensor, int]:
    """Return this rank's part of the padded concatenation, and how much of it is padding."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.empty(0)
    length = -(-flat.numel() // (2 * world)) * 2
    padded = torch.cat([flat, torch.full((length * world - flat.numel(),), float("nan"))])
    padding = max(0, min(length, (rank + 1) * length - flat.numel()))
    # With more storage than the part, as where DeepSpeed keeps views.
    return padded[rank * length : (rank + 1) * length], padding


def sub_groups(model: Model, world: int, size: int) -> tuple[list[dict[str, Tensor]], list[list[int]]]:
    """Return the sub-groups of stage 3, and the numbers of those of each group."""
    found: list[dict[str, Tensor]] = []
    of_group: list[list[int]] = []
    for group in model.groups:
        members: list[int] = []
        current: dict[str, Tensor] = {}
        held = 0
        for name, value in group.items():
            current[name] = value
            held += -(-value.numel() // world)
            if held >= size:
                members.append(len(found))
                found.append(current)
                current, held = {}, 0
        if current:
            members.append(len(found))
            found.append(current)
        of_group.append(members)
    return found, of_group


def write_slices(
    folder: Path, model: Model, world: int, *, sub_group_size: int = 10**9, prefix: str = "", excluded: bool = False
) -> None:
    """Write stage 3: every parameter cut into equal slices on its own, those of a sub-group after each other."""
    folder.mkdir(parents=True, exist_ok=True)
    subs, of_group = sub_groups(model, world, sub_group_size)
    for rank in range(world):
        state = {
            index: {
                "step": model.step,
                **{slot: _slices([model.slots[name, slot] for name in sub], rank, world) for slot in SLOTS},
            }
            for index, sub in enumerate(subs)
        }
        masters = []
        for sub in subs:
            master = _slices(list(sub.values()), rank, world).requires_grad_()
            master.ds_id = "0_1"  # type: ignore[attr-defined]
            masters.append(master)
        inner = {
            "zero_stage": ZeroStageEnum.weights,
            "loss_scaler": LossScaler(cur_scale=1.0, dynamic=False),
            "partition_count": world,
            "optimizer_state_dict": {
                "state": state,
                "param_groups": [{**model.options(i), "params": members} for i, members in enumerate(of_group)],
            },
            "fp32_flat_groups": masters,
        }
        save(
            {"optimizer_state_dict": inner, "ds_version": "0.19.6"},
            folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        frozen = {} if excluded else model.frozen
        value = model_states(
            model,
            world,
            module=model.module(whole=False, excluded=excluded),
            param_shapes=[shapes(sub) for sub in subs],
            shared_params=model.aliases if rank == 0 else {},
            frozen_param_shapes=None if excluded else shapes(frozen),
            frozen_param_fragments=None
            if excluded
            else OrderedDict((name, _slices([model.weight(name)], rank, world)) for name in frozen),
        )
        save(value, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


def _slices(tensors: list[Tensor], rank: int, world: int) -> Tensor:
    parts = []
    for tensor in tensors:
        each = -(-tensor.numel() // world)
        padded = torch.zeros(each * world, dtype=tensor.dtype)
        padded[: tensor.numel()] = tensor.reshape(-1)
        parts.append(padded[rank * each : (rank + 1) * each])
    return torch.cat(parts) if parts else torch.empty(0)


def write_universal(folder: Path, model: Model, *, stage: int, sub_group_size: int = 10**9) -> None:
    """Write what ``ds_to_universal`` makes of a checkpoint of ``stage``."""
    subs, of_group = sub_groups(model, 2, sub_group_size)
    for name, master in model.trained.items():
        (folder / "zero" / name).mkdir(parents=True)
        for slot, value in (("fp32", master), *((slot, model.slots[name, slot]) for slot in SLOTS)):
            content = value.reshape(-1).clone() if stage == 3 else {"param": value.clone(), "cat_dim": 0}
            save(content, folder / "zero" / name / f"{slot}.pt")
        if stage < 3:
            save(model.step, folder / "zero" / name / "step.pt")
    inner: dict[str, Any] = {
        "zero_stage": ZeroStageEnum(stage),
        "loss_scaler": LossScaler(cur_scale=1.0, dynamic=False),
    }
    members = of_group if stage == 3 else [[index] for index in range(len(model.groups))]
    inner["param_groups"] = [{**model.options(index), "params": each} for index, each in enumerate(members)]
    if stage == 3:
        inner["optimizer_state_dict"] = {"state": {0: {"step": model.step}}, "param_groups": inner["param_groups"]}
    save(inner, folder / "zero" / "optimizer_state.pt")
    value = model_states(
        model,
        2,
        module=model.module(whole=stage < 3),
        param_shapes=[shapes(group) for group in (subs if stage == 3 else model.groups)],
        shared_params=model.aliases,
    )
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    save(value, folder / name)
