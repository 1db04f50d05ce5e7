"""The JSON of a checkpoint, as the engine of ds-core keeps it, out of DeepSpeed's keys. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ds_ckpt.checks import Field, short
from ds_ckpt.formats.deepspeed.values import Record
from ds_core.interfaces.logical import logical_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ds_ckpt.formats.deepspeed.jsonable import Encoder

__all__ = ["Optimizer", "Scaling", "is_extra_state", "scaler_in", "scaling_of", "state_of"]

_INTERNAL = frozenset(
    {
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "csr_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "ds_config",
        "num_experts",
        "ds_autoep_layers",
        "folding",
    }
)
"""Keys of the model-states file that are DeepSpeed's; the caller's are beside them. ``ds_version`` is given to both."""
_OF_THE_MACHINE = frozenset({"params", "fused", "foreach", "capturable", "differentiable"})
_EXTRA_STATE = "_extra_state"


@dataclass
class Optimizer:
    """What an optimizer has beside tensors: per group the names and options, per parameter the other slots."""

    groups: list[tuple[list[str], Mapping[str, Any]]] = field(default_factory=list)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: str | None = None
    """Why there is no state of the optimizer although one was saved."""

    def add_value(self, name: str, slot: str, value: Any) -> None:
        self.values.setdefault(logical_name(name), {})[slot] = value

    def encoded(self, encoder: Encoder) -> dict[str, Any]:
        """Return the form of ``ds_core.optim.slots``."""
        return {
            "groups": [
                {
                    "names": [logical_name(name) for name in names],
                    "options": {
                        str(key): encoder.encode(value, f"optimizer group {index}, option {key!r}")
                        for key, value in options.items()
                        if key not in _OF_THE_MACHINE
                    },
                }
                for index, (names, options) in enumerate(self.groups)
            ],
            "values": {
                name: {
                    slot: encoder.encode(value, f"optimizer state {slot!r} of {name!r}")
                    for slot, value in slots.items()
                }
                for name, slots in self.values.items()
            },
        }


@dataclass(frozen=True)
class Scaling:
    """What a loss scaler learnt."""

    scale: float = 1.0
    learnt: Mapping[str, float] = field(default_factory=dict)
    """In the words of ds-fp16's scaler; empty where the scale does not move."""


def scaling_of(values: Mapping[str, Any], where: Field) -> Scaling:
    """Return the state of a scaler from its attributes, or the like-named keys of a stage-0 wrapper."""
    scale = _number(values, "cur_scale", 1.0, where)
    if not values.get("dynamic", "last_overflow_iter" in values):
        return Scaling(scale)
    learnt: dict[str, float] = {
        "scale": scale,
        "iteration": int(_number(values, "cur_iter", 0, where)),
        "last_overflow_iteration": int(_number(values, "last_overflow_iter", -1, where)),
    }
    if "cur_hysteresis" in values:
        learnt["hysteresis"] = int(_number(values, "cur_hysteresis", 1, where))
    return Scaling(scale, learnt)


def _number(values: Mapping[str, Any], name: str, otherwise: float, where: Field) -> float:
    value = values.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1 <= value < 2.0**128:
        raise where.wrong(f"a number as {name} of the loss scaler, not {short(value)}")
    return value if isinstance(value, int) and name != "cur_scale" else float(value)


def scaler_in(inner: Field) -> Scaling:
    """Return what the scaler in an optimizer file learnt; BF16_Optimizer has none."""
    found = inner.get("loss_scaler")
    if found is None:
        return Scaling()
    if type(found.value) is not Record:
        raise found.wrong("a loss scaler")
    return scaling_of(found.value.fields, found)


def state_of(
    model: Field,
    *,
    stage: int,
    optimizer: Optimizer | None,
    scaling: Scaling,
    weight_dtypes: Iterable[str],
    master_dtypes: Iterable[str],
    excluded: Sequence[str],
    params: Iterable[str],
    shared: Mapping[str, str],
    encoder: Encoder,
) -> dict[str, Any]:
    """Return the state of a snapshot.

    Args:
        model: the model-states file of rank 0.
        stage: of ZeRO.
        optimizer: None where none was saved.
        scaling: of the loss.
        weight_dtypes: of the trained parameters as the model has them.
        master_dtypes: of their masters.
        excluded: names the model has and the checkpoint holds no element of.
        params: names of all parameters.
        shared: alias -> name, as the model has them.
        encoder: of this checkpoint.
    """
    config = _config_of(model)
    accumulation = _accumulation(config)
    steps = _count(model, "global_steps", 0)
    precision, plan = _precision(config, set(weight_dtypes), set(master_dtypes))
    state: dict[str, Any] = {
        "global_steps": steps,
        "global_samples": _count(model, "global_samples", steps * _whole(config.get("train_batch_size"), 0)),
        "skipped_steps": _count(model, "skipped_steps", 0),
        # DeepSpeed saves neither micro-batches nor gradients of an unfinished window: one begins anew.
        "micro_steps": steps * accumulation,
        "in_window": 0,
        "accumulation": accumulation,
        "stage": stage,
        "precision": precision,
        "plan": plan,
        "loss_scale": scaling.scale,
        "scaler": dict(scaling.learnt) if precision in ("Fp16", "TorchAutocast") else {},
        "excluded": sorted(excluded),
    }
    state["shared"] = encoder.encode(
        {logical_name(alias): logical_name(name) for alias, name in shared.items()}, "shared_params"
    )
    if optimizer is not None and not optimizer.missing:
        trained = {name for names, _ in optimizer.groups for name in names}
        state["frozen"] = sorted(logical_name(name) for name in params if name not in trained)
    if optimizer is not None and optimizer.missing:
        state["optimizer_missing"] = optimizer.missing
    elif optimizer is not None:
        state["optimizer"] = optimizer.encoded(encoder)
    schedule = model.get("lr_scheduler")
    if schedule is not None:
        state["schedule"] = encoder.encode(schedule.value, "lr_scheduler")
    # Last: one of them may use up all that values may take together. It is missed when it is asked for.
    for name, values in (("extra_state", _extra_state(model)), ("client_state", _client_state(model))):
        state[name], reasons = encoder.encode_each(values, name)
        if reasons:
            state[f"{name}_missing"] = reasons
    return state


def _client_state(model: Field) -> dict[Any, Any]:
    return {key: value for key, value in model.object().items() if key not in _INTERNAL}


def _extra_state(model: Field) -> dict[str, Any]:
    """Return what modules gave with ``get_extra_state``, which torch keeps among the weights."""
    module = model.get("module")
    found = {}
    for key, value in module.object().items() if module is not None else ():
        if isinstance(key, str) and is_extra_state(key):
            name = key.removesuffix(_EXTRA_STATE).rstrip(".")
            found[logical_name(name)] = value
    return found


def is_extra_state(key: str) -> bool:
    """Return whether an entry of ``module`` is what a module gave with ``get_extra_state``."""
    return key == _EXTRA_STATE or key.endswith(f".{_EXTRA_STATE}")


def _count(model: Field, key: str, otherwise: int) -> int:
    found = model.get(key)
    return otherwise if found is None else found.whole()


def _whole(value: Any, otherwise: int) -> int:
    return value if type(value) is int and 0 < value < 2**40 else otherwise


def _config_of(model: Field) -> Mapping[str, Any]:
    found = model.get("ds_config")
    # The caller's own JSON; older files have none, and a path or "auto" in it is no mistake.
    return found.value if found is not None and isinstance(found.value, dict) else {}


def _accumulation(config: Mapping[str, Any]) -> int:
    return _whole(config.get("gradient_accumulation_steps"), 1)


def _precision(config: Mapping[str, Any], weights: set[str], masters: set[str]) -> tuple[str, dict[str, str]]:
    """Return the class of precision that corresponds, and its plan in words."""
    sections = ("fp16", "Fp16"), ("bf16", "Bf16"), ("bfloat16", "Bf16"), ("torch_autocast", "TorchAutocast")
    chosen = next((name for key, name in sections if _is_on(config.get(key))), None)
    if chosen is None:
        chosen = "Fp16" if "float16" in weights else "Bf16" if "bfloat16" in weights and masters else "Fp32"
    if chosen in ("Fp16", "Bf16"):
        stored = "float16" if chosen == "Fp16" else "bfloat16"
        master = next(iter(masters)) if len(masters) == 1 else "float32"
        return chosen, {"stored": stored, "reduce": stored, "master": master}
    if chosen == "TorchAutocast":
        dtype = config["torch_autocast"].get("dtype", "bfloat16")
        word = str(dtype).removeprefix("torch.")[:20]
        return chosen, {"reduce": word, "autocast": word}
    return chosen, {}


def _is_on(section: Any) -> bool:
    return isinstance(section, dict) and section.get("enabled") is True
