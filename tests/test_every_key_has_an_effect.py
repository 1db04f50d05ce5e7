"""Every key of the configuration has an effect, or is refused, or stands in ``engine.report()`` with the reason (P03b).

All keys of the schema are walked. Each is given a value that is not its default, alone and with its section on, to
``initialize`` on one rank. What comes of it must be one of:

- refused: the error names the key or its section, and says that it is not built or needs a package;
- listed: the report has the key, or what holds it, with the reason;
- nothing is said: then ``EFFECTIVE`` has a probe that sees the key at work.

Arguments of torch's own optimizers and schedules are not keys of ours: torch's constructors check them.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin
from unittest import mock

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import ds_core
from ds_activation.host_copies import HostCopies
from ds_core import comm
from ds_core.accelerator import get_accelerator
from ds_core.config import Section, find_problems, load_config
from ds_core.config.catalog import all_sections
from ds_core.config.config import BatchKeys, Config
from ds_core.config.effects import state_of
from ds_core.config.sections.arguments import ARGUMENTS
from ds_core.errors import CheckpointError, ConfigError, DsError, EngineError, LossScaleError
from ds_core.partition.replicated import ReplicatedConfig
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.ranks import run_ranks
from ds_core.utils import safe_get_full_fp32_param

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

BATCH = tuple(BatchKeys.model_fields)
BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "log_level": "info",
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# -- the keys ------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """One key of the schema."""

    keys: tuple[str | int, ...]
    section: type[Section]
    field: str
    switches: tuple[tuple[str | int, ...], ...] = ()
    """Where the ``enabled`` of the sections around it are."""
    of: str = ""
    """Of an argument, the type of its optimizer or schedule."""

    @property
    def path(self) -> str:
        """``fp16.hysteresis``, or ``optimizer.params(adam).lr``."""
        parts = [str(part) for part in self.keys]
        if self.of:
            parts[1] = f"params({self.of})"
        return ".".join(parts)

    @property
    def group(self) -> str:
        """The test that it is part of: its top-level key, or the arguments of one type."""
        return self.path.rpartition(".")[0] if self.of else str(self.keys[0])


def walk(section: type[Section], keys: tuple[str | int, ...] = (), switches: tuple[Any, ...] = ()) -> Iterator[Key]:
    """Yield the keys of ``section`` and of all sections in it; of those in a dict or a list, one example each."""
    if "enabled" in section.model_fields:
        switches = (*switches, (*keys, "enabled"))
    for field, info in section.model_fields.items():
        name = info.serialization_alias or field
        inner = list(sections_in(info.annotation))
        for step, model in inner:
            yield from walk(model, (*keys, name, *step), switches)
        if not inner:
            yield Key((*keys, name), section, field, switches)


def sections_in(annotation: Any) -> Iterator[tuple[tuple[str | int, ...], type[Section]]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield (), annotation
        return
    origin, arguments = get_origin(annotation), get_args(annotation)
    for argument in arguments[:1] if origin is Annotated else arguments:
        for step, model in sections_in(argument):
            yield {dict: ("example", *step), tuple: (0, *step), list: (0, *step)}.get(origin, step), model


@cache
def all_keys() -> Mapping[str, Key]:
    found = [
        *(key for key in walk(Config) if len(key.keys) == 1),
        *(key for name, section in all_sections().items() for key in walk(section, (name,))),
        *(
            Key((seam, "params", field), model, field, of=type_name.lower())
            for seam, models in ARGUMENTS.items()
            for type_name, model in models.items()
            for field in model.model_fields
        ),
        *walk(ReplicatedConfig, ("partition", "replicated")),
    ]
    return {key.path: key for key in found}


GROUPS = sorted({key.group for key in all_keys().values()})


def test_every_key_is_walked() -> None:
    assert len(all_keys()) > 600
    for path in ("dump_state", "fp16.hysteresis", "compression_training.row_pruning.different_groups.example.modules"):
        assert path in all_keys()


# -- their values --------------------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "train_batch_size": 6,
    "data_types.grad_accum_dtype": "float32",
    "optimizer.type": "Adagrad",
    "optimizer.params": {"lr": 0.5},
    "scheduler.params": {"warmup_num_steps": 3},
    "scheduler.type": "WarmupLR",
    "activation_checkpointing.modules": ["layers.1"],
    "activation_checkpointing.interval": 3,
    "activation_checkpointing.memory_budget": 1,
    "checkpoint.engine": "plain",
    "checkpoint.writer.type": "PYTHON",
    "checkpoint.tag_validation": "Fail",
    "partition.replicated.bucket_bytes": 1,
    "precision.type": "fp16",
    "partition.type": "2",
    "elasticity.version": 0.1,
    "elasticity.max_train_batch_size": 60,
    "elasticity.max_gpus": 3,
    "optimizer.params(adagrad).fused": False,
    "torch_autocast.lower_precision_safe_modules": ["torch.nn.Embedding"],
    "torch_autocast.dtype": "float16",
    "zero_optimization.stage": 2,
    "csv_monitor.output_path": "here",
    "curriculum_learning.schedule_type": "fixed_root",
    "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.example.schedule_type": "fixed_root",
    "pipeline.partition": "uniform",
    "tensor_parallel.partition_config.layer_specs.0.grad_allreduce": True,
    # The only word there is.
    "compression_training.head_pruning.shared_parameters.method": "topk",
    "data_efficiency.data_routing.random_ltd.random_ltd_schedule.schedule_type": "fixed_linear",
    # Read as another key.
    "inference.mp_size": 4,
    "inference.mpu": "mpu",
    "inference.ep_size": 4,
    "inference.ep_group": "group",
    "inference.ep_mp_group": "group",
    "inference.moe_experts": [4],
    "inference.moe_type": "residual",
}
"""Where a value chosen by type does not do."""


def value_of(key: Key) -> Any:
    """Return a value of ``key`` that the schema takes, but for its being built or not, and that is not the default."""
    if key.path in VALUES:
        return VALUES[key.path]
    info = key.section.model_fields[key.field]
    words = list(literals(info.annotation))
    name = info.serialization_alias or key.field
    candidates = [
        True,
        False,
        *words,
        *([word] for word in words),
        0.25,
        2,
        3,
        "text",
        ["text"],
        [2],
        [0.5, 0.25],
        {"text": "text"},
    ]
    for value in candidates:
        try:
            checked = getattr(key.section.model_validate({name: value}), key.field)
        except ValidationError as error:
            wrong = [details["type"] for details in error.errors() if details["loc"][:1] == (name,)]
            needs_more = not wrong and all(details["type"] in ("missing", "needs") for details in error.errors())
            is_other = info.is_required() or value != info.get_default(call_default_factory=True)
            if (needs_more and is_other) or (wrong and set(wrong) == {"not_built"}):
                return value
        else:
            if info.is_required() or checked != info.get_default(call_default_factory=True):
                return value
    raise AssertionError(f"no value of {key.path} is known: add one to VALUES")


def literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for argument in get_args(annotation):
            yield from literals(argument)


# -- their configurations ------------------------------------------------------------------------------------------

DIFFICULTY = {
    "min_difficulty": 1,
    "max_difficulty": 4,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 5, "difficulty_step": 1, "root_degree": 2},
}


def technique(**params: Any) -> dict[str, Any]:
    return {"shared_parameters": {"enabled": True}, "different_groups": {"example": {"params": params}}}


SCHEDULE = {"warmup_num_steps": 4}
TRACE = {"initial_scale_power": 3, "loss_scale_window": 2}
WITH: dict[str, dict[str, Any]] = {
    "activation_checkpointing.modules": {"activation_checkpointing": {"policy": "full"}},
    "activation_checkpointing.interval": {"activation_checkpointing": {"policy": "every_n"}},
    "activation_checkpointing.memory_budget": {"activation_checkpointing": {"policy": "auto", "memory_budget": 10**6}},
    "activation_checkpointing.cpu_checkpointing": {"activation_checkpointing": {"policy": "full"}},
    "activation_checkpointing.synchronize_checkpoint_boundary": {"activation_checkpointing": {"policy": "full"}},
    "activation_checkpointing.profile": {"activation_checkpointing": {"policy": "full"}},
    "zero_optimization": {"zero_optimization": {"stage": 2}},
    "zero_optimization.stage": {"zero_optimization": {"stage": 0}},
    "zero_optimization.load_from_fp32_weights": {"bf16": {"enabled": True}},
    "prescale_gradients": {"gradient_predivide_factor": 4},
    "zero_optimization.offload_optimizer": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    "zero_optimization.offload_param": {"zero_optimization": {"offload_param": {"device": "cpu"}}},
    "compile": {"compile": {"deepcompile": True}},
    "tensor_parallel": {"tensor_parallel": {"autotp_size": 2}},
    "curriculum_learning": {"curriculum_learning": DIFFICULTY},
    "data_efficiency.data_sampling.curriculum_learning": {
        "data_efficiency": {"data_sampling": {"curriculum_learning": {"curriculum_metrics": {"example": DIFFICULTY}}}}
    },
    "data_efficiency.data_sampling.dynamic_batching": {
        "data_efficiency": {"data_sampling": {"dynamic_batching": {"max_tokens": 5}}}
    },
    **{
        f"compression_training.{name}": {"compression_training": {name: technique(**params)}}
        for name, params in {
            "weight_quantization": {"start_bits": 8, "target_bits": 4},
            "activation_quantization": {"bits": 8},
            **{f"{what}_pruning": {"dense_ratio": 0.5} for what in ("sparse", "row", "channel", "head")},
        }.items()
    },
    "compression_training.head_pruning.": {
        "compression_training": {"head_pruning": {"shared_parameters": {"num_heads": 2}}}
    },
    "elasticity": {
        "train_micro_batch_size_per_gpu": None,
        "elasticity": {"max_train_batch_size": 100, "micro_batch_sizes": [2, 3]},
    },
    "elasticity.ignore_non_elastic_batch_info": {"train_batch_size": 7},
    "elasticity.max_gpus": {"elasticity": {"version": 0.1}},
    "elasticity.version": {"elasticity": {"num_gpus_per_node": 2}},
    "weight_quantization.enabled": {"weight_quantization": {"q_groups": 2}},
    "elasticity.model_parallel_size": {"elasticity": {"num_gpus_per_node": 2}},
    "data_types.grad_accum_dtype": {"bf16": {"enabled": True}},
    "fp16.loss_scale_window": {"fp16": {"initial_scale_power": 3}},
    **{f"fp16.{name}": {"fp16": TRACE} for name in ("hysteresis", "consecutive_hysteresis", "min_loss_scale")},
    "scheduler.params": {"scheduler": {"type": "WarmupLR"}},
    **{
        f"optimizer.params({name.lower()})": {"optimizer": {"type": name, "params": None}}
        for name in ARGUMENTS["optimizer"]
    },
    "scheduler.params(warmuplr)": {"scheduler": {"type": "WarmupLR", "params": SCHEDULE}},
    "scheduler.params(warmupdecaylr)": {
        "scheduler": {"type": "WarmupDecayLR", "params": {**SCHEDULE, "total_num_steps": 6}}
    },
    "scheduler.params(warmupcosinelr)": {
        "scheduler": {"type": "WarmupCosineLR", "params": {**SCHEDULE, "total_num_steps": 6}}
    },
    "scheduler.params(onecycle)": {
        "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}}
    },
    "scheduler.params(lrrangetest)": {"scheduler": {"type": "LRRangeTest"}},
}
"""What must stand beside a key, or the keys of a section, so that it is on; None removes a key of ``BASE``."""


def merged(config: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(config)
    for name, value in more.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if both else value
        if value is None:
            del result[name]
    return result


def nested(keys: tuple[str | int, ...], value: Any) -> Any:
    for key in reversed(keys):
        value = [value] if isinstance(key, int) else {key: value}
    return value


def surroundings(key: Key) -> dict[str, Any]:
    """Return ``BASE`` with everything around ``key`` on."""
    config = BASE
    for place, more in WITH.items():
        if f"{key.path}.".startswith(place if place.endswith(".") else f"{place}."):
            config = merged(config, more)
    for switch in key.switches:
        if switch != key.keys and 0 not in switch:
            config = merged(config, nested(switch, True))
    return config


def situations(key: Key) -> Iterator[dict[str, Any]]:
    """Yield the configurations that ``key`` is given in: alone, where it means something so, and with all it needs."""
    given = nested(key.keys, value_of(key))
    around = surroundings(key)
    if not key.of and key.field != "enabled":
        yield merged(BASE, given)
    if key.of or key.field == "enabled" or around != BASE:
        yield merged(around, given)
    if key.path.startswith(AT_STAGES) and key.field != "stage":
        # Beside the keys of the section itself, stage 3 is what is refused.
        stages = (1, 2, 3) if key.keys[0] == "zero_optimization" else (1, 2)
        yield from (merged(merged(around, {"zero_optimization": {"stage": stage}}), given) for stage in stages)


AT_STAGES = ("zero_", "allgather_", "gradient_", "prescale_", "communication_", "aio.", "fp16.", "bf16.", "data_types.")
"""Beginnings of the keys that are also given at each stage."""


# -- what comes of them --------------------------------------------------------------------------------------------

NOT_HERE = re.compile(r"not built yet|is accepted\b|comes with a later release of ds-|pip install ds-|needs ZeRO stage")
REFUSED = {
    "activation_checkpointing.partition_activations": "there is none",
    "activation_checkpointing.contiguous_memory_optimization": "partition_activations is off",
    "bf16.bf16_optimizer_states": "needs bf16.bf16_master_weights_and_grads",
    "data_types.param_dtype": "without fp16 and bf16 weights are",
    "zero_optimization.offload_optimizer.ratio": "below 1 is possible at stage 3 only",
    "tensor_parallel.partition_config.layer_specs.0.grad_allreduce": 'possible with "partition_type": "skip" only',
    "tensor_parallel.tensor_parallel.tp_size": "must be 1 or equal",
    "optimizer.params(adagrad).amsgrad": "has no parameter",
    "optimizer.params(adagrad).fp32_optimizer_states": "has no parameter",
    "optimizer.params(adam).bias_correction": "torch's Adam always corrects",
    "optimizer.params(adamw).bias_correction": "torch's Adam always corrects",
}
"""Keys that other words refuse: asked for with something that contradicts them."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Stack(nn.Module):
    """Blocks that repeat."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def start(config: Mapping[str, Any]) -> Any:
    return ds_core.initialize(model=Net(), config=dict(config), training_data=[torch.ones(3)] * 5)[0]


def outcome(key: Key, config: dict[str, Any]) -> str:
    """Return ``refused``, ``listed``, ``silent``, or what is wrong."""
    problems = find_problems(config, dp_world_size=1)
    for problem in problems:
        if (problem.keys or problem.path.split("."))[0] != key.keys[0] or not is_refusal(key, problem.text):
            return f"not refused as it should be: {problem}"
    if problems:
        return "refused"
    try:
        engine = start(config)
    except DsError as error:
        text = str(error)
        is_named = any(str(part) in text for part in key.keys)
        return "refused" if is_named and is_refusal(key, text) else f"not refused as it should be: {text}"
    report = engine.report()
    engine.destroy()
    holders = [".".join(map(str, key.keys[:length])) for length in range(len(key.keys), 0, -1)]
    reasons = [report[holder] for holder in holders if report.get(holder, "").startswith("no effect: ")]
    return "listed" if reasons else "silent"


def is_refusal(key: Key, text: str) -> bool:
    return bool(NOT_HERE.search(text)) or (key.path in REFUSED and REFUSED[key.path] in text)


ALLOWED = {
    "not built: only": {"refused"},
    "not built": {"listed", "refused"},
    "no effect": {"listed", "refused"},
    "deprecated": {"listed", "refused"},
    "needs": {"listed", "refused"},
    "effective": {"listed", "refused"},
}
"""Beginning of ``state_of`` -> what may come of a key that has no probe."""


# -- keys at work --------------------------------------------------------------------------------------------------


def steps(engine: Any, count: int = 1, *, factors: Iterator[float] | None = None) -> Iterator[Any]:
    """Train, and yield the engine after each micro-batch."""
    for factor in factors or [1.0] * count:
        engine.backward(engine(torch.ones(2, 3)).float().square().sum() * factor)
        engine.step()
        yield engine


def batches(config: dict[str, Any]) -> Any:
    engine = start(config)
    return engine.get_batch_info(), [len(batch) for batch in engine.training_dataloader]


def weights(config: dict[str, Any]) -> Any:
    (engine,) = steps(start(config))
    return [param.tolist() for param in engine.module.parameters()]


def lines(config: dict[str, Any]) -> Any:
    """Return what is logged of four steps."""
    return [line for line in logged(lambda: list(steps(start(config), 4))) if line.startswith("step=")]


def vocabulary(config: dict[str, Any]) -> Any:
    """Return what is logged of the vocabulary at the start."""
    return [line for line in logged(lambda: start(config)) if line.startswith("vocabulary_size")]


def logged(run: Callable[[], Any]) -> list[str]:
    logger, found = logging.getLogger("ds_core"), []
    handler = logging.Handler()
    handler.emit = lambda entry: found.append(entry.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        run()
    finally:
        logger.removeHandler(handler)
    return found


def log_level(config: dict[str, Any]) -> Any:
    start(config)
    return logging.getLogger("ds_core").getEffectiveLevel()


def dtypes(config: dict[str, Any]) -> Any:
    return {name: tensor.dtype for name, tensor in start(config).module.state_dict().items()}


def gradient(config: dict[str, Any]) -> Any:
    engine = start(config)
    engine.backward(engine(torch.ones(2, 3, dtype=engine.module.linear.weight.dtype)).sum())
    return engine.module.linear.weight.grad.dtype


def output(config: dict[str, Any]) -> Any:
    """Return the dtype that forward makes of fp32, or what it raises."""
    try:
        return start(config)(torch.ones(2, 3)).dtype
    except RuntimeError as error:
        return str(error)


def scales(config: dict[str, Any]) -> Any:
    """Return the loss scale before and after steps of which some overflow."""
    engine = start(merged(config, {"fp16": {"auto_cast": True}}))
    found = [engine.cur_scale]
    infinite, fine = float("inf"), 1e-3
    # After an overflow with a scale at its smallest the next is an error, which the trace ends with.
    with contextlib.suppress(LossScaleError):
        for _ in steps(engine, factors=iter([infinite, fine, infinite, fine, fine, fine, *[infinite] * 8])):
            found.append(engine.cur_scale)
    return found


def infinite_step(config: dict[str, Any]) -> Any:
    engine = start(merged(config, {"bf16": {"auto_cast": True}}))
    (engine,) = steps(engine, factors=iter([float("inf")]))
    return engine.was_step_applied()


def optimizer(config: dict[str, Any]) -> Any:
    found = start(config).basic_optimizer
    group = {name: value for name, value in found.param_groups[0].items() if name != "params"}
    return type(found).__name__, group, str(found.state_dict()["state"])


def rates(config: dict[str, Any]) -> Any:
    engine = start(config)
    return [type(engine.lr_scheduler), *engine.get_lr(), *(engine.get_lr() for _ in steps(engine, 8))]


def files(config: dict[str, Any]) -> Any:
    """Return what a step leaves in the working folder."""
    (engine,) = steps(start(config))
    engine.destroy()
    found = sorted(str(path) for path in Path().rglob("*"))
    for folder in Path().iterdir():
        shutil.rmtree(folder)
    return found


def elastic(config: dict[str, Any]) -> Any:
    """Return the batch sizes for some numbers of ranks; those that do not fit have an error."""
    found = []
    for ranks in (1, 2, 3, 4):
        try:
            sizes = load_config(config, dp_world_size=ranks)
        except ConfigError as error:
            found.append(str(error))
        else:
            found.append(str([getattr(sizes, name) for name in BATCH]))
    return found


def refusals(config: dict[str, Any]) -> Any:
    return [problem.path for problem in find_problems(config)]


def divided_by(config: dict[str, Any]) -> str:
    found: str = start(config).report()["partition"]
    return found


def reduced_in(config: dict[str, Any]) -> str:
    found: str = start(config).report()["gradient buckets"]
    return found


def unused(config: dict[str, Any]) -> str:
    """What a step says to a parameter that got no gradient."""
    engine = start(config)
    engine.backward(engine.module.linear.bias.sum())
    try:
        engine.step()
    except EngineError as error:
        return str(error)
    return "stepped"


def masters(config: dict[str, Any]) -> list[float]:
    """Return a master that was saved with more digits than its weight, and loaded."""
    (engine,) = steps(start(merged(config, {"bf16": {"auto_cast": True}})))
    engine.save_checkpoint("saved")
    engine.load_checkpoint("saved")
    master = safe_get_full_fp32_param(engine.module.linear.weight)
    assert master is not None
    return master.flatten().tolist()


def stored_by(config: dict[str, Any]) -> str:
    """The engine that stores checkpoints, and why; without ds-ckpt every word but ``plain`` is refused."""
    report: dict[str, str] = start(config).report()
    return report["checkpoint"]


def loaded(config: dict[str, Any]) -> str:
    """Which checkpoint is loaded where DeepSpeed's converter left the name of one."""
    engine = start(config)
    for tag in ("converted", "newest"):
        engine.save_checkpoint("saved", tag=tag)
    Path("saved/latest_universal").write_text("converted")
    path: str = engine.load_checkpoint("saved")[0]
    return path


def recomputed(config: dict[str, Any]) -> Any:
    """Return how often each layer of a stack runs in forward and backward, or what is refused."""
    calls: dict[int, int] = {}
    run = nn.Linear.forward

    def counted(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls[id(layer)] = calls.get(id(layer), 0) + 1
        return run(layer, x)

    try:
        with mock.patch.object(nn.Linear, "forward", counted):
            (engine,) = steps(ds_core.initialize(model=Stack(), config=config)[0])
    except DsError as error:
        return str(error)
    return [calls[id(layer)] for layer in engine.module.layers]


def waits(config: dict[str, Any]) -> Any:
    """Return how often the host waits for the device."""
    with mock.patch.object(type(get_accelerator()), "synchronize", autospec=True) as synchronize:
        recomputed(config)
    return synchronize.call_count


def moved(config: dict[str, Any]) -> Any:
    """Return how many inputs are sent to the host; on a CPU they are there already."""
    with mock.patch.object(HostCopies, "to_host", autospec=True, side_effect=HostCopies.to_host) as to_host:
        recomputed(config)
    return to_host.call_count


def logged_calls(config: dict[str, Any]) -> Any:
    return len(logged(lambda: recomputed(config)))


EFFECTIVE: dict[str, Callable[[dict[str, Any]], Any]] = {
    **dict.fromkeys((*BATCH, "dataloader_drop_last"), batches),
    "gradient_clipping": weights,
    **dict.fromkeys(
        (f"activation_checkpointing.{name}" for name in ("policy", "modules", "interval", "memory_budget")), recomputed
    ),
    "activation_checkpointing.cpu_checkpointing": moved,
    "activation_checkpointing.synchronize_checkpoint_boundary": waits,
    "activation_checkpointing.profile": logged_calls,
    **dict.fromkeys(("checkpoint.engine", "checkpoint.writer.decoupled"), stored_by),
    "checkpoint.load_universal": loaded,
    **dict.fromkeys(("partition.type", "zero_optimization.stage"), divided_by),
    "zero_optimization.reduce_bucket_size": reduced_in,
    "zero_optimization.ignore_unused_parameters": unused,
    "zero_optimization.load_from_fp32_weights": masters,
    "steps_per_print": lines,
    "log_level": log_level,
    "vocabulary_size": vocabulary,
    **dict.fromkeys(("fp16.enabled", "bf16.enabled", "precision.type", "data_types.buffer_dtype"), dtypes),
    "data_types.grad_accum_dtype": gradient,
    **dict.fromkeys(("fp16.auto_cast", "bf16.auto_cast", "torch_autocast.enabled", "torch_autocast.dtype"), output),
    **dict.fromkeys(
        (f"fp16.{name}" for name in ("loss_scale", "initial_scale_power", "loss_scale_window", "min_loss_scale")),
        scales,
    ),
    **dict.fromkeys(("fp16.hysteresis", "fp16.consecutive_hysteresis"), scales),
    "bf16.check_grad_overflow": infinite_step,
    **dict.fromkeys(("optimizer.type", "optimizer.params"), optimizer),
    **{
        f"optimizer.params({name}).{key}": optimizer
        for name, keys in {
            "adam": ("lr", "betas", "eps", "weight_decay", "amsgrad", "fused", "adam_w_mode"),
            "adamw": ("lr", "betas", "eps", "weight_decay", "amsgrad", "fused"),
            "adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", "foreach", "maximize"),
        }.items()
        for key in keys
    },
    **dict.fromkeys((f"optimizer.params(adagrad).{key}" for key in ("differentiable", "fused")), optimizer),
    **dict.fromkeys(("scheduler.type", "scheduler.params"), rates),
    **{
        f"scheduler.params({name}).{key}": rates
        for name, keys in {
            "warmuplr": ("warmup_min_lr", "warmup_max_lr"),
            "warmupdecaylr": ("warmup_min_lr", "warmup_max_lr", "total_num_steps"),
            "warmupcosinelr": ("warmup_min_ratio", "cos_min_ratio", "total_num_steps"),
        }.items()
        for key in (*keys, "warmup_num_steps", "warmup_type", "last_batch_iteration")
    },
    **dict.fromkeys((f"csv_monitor.{name}" for name in ("enabled", "output_path", "job_name")), files),
    **{
        f"elasticity.{name}": elastic
        for name in (
            *("enabled", "max_train_batch_size", "micro_batch_sizes", "min_gpus", "max_gpus", "prefer_larger_batch"),
            *("ignore_non_elastic_batch_info", "version", "num_gpus_per_node", "model_parallel_size"),
        )
    },
    "weight_quantization.enabled": refusals,
}
"""Key -> what is seen of a configuration; it differs with the key and without."""


@pytest.mark.parametrize("path", EFFECTIVE)
def test_key_is_at_work(path: str) -> None:
    key, observe = all_keys()[path], EFFECTIVE[path]
    around = surroundings(key)
    assert observe(merged(around, nested(key.keys, value_of(key)))) != observe(around)


def buckets(config: dict[str, Any], folder: Path) -> str:
    found: str = start(config).report()["gradient buckets"]
    return found


def stepped(config: dict[str, Any], folder: Path) -> str:
    return str(weights(merged(config, {"gradient_clipping": 0})))


def sent(config: dict[str, Any], folder: Path) -> str:
    """Return what of the division comes before the collective."""
    return str(start(config).parts.partition.loss_factor)


def tags(config: dict[str, Any], folder: Path) -> str:
    try:
        start(config).save_checkpoint(folder, tag=f"of_rank_{comm.get_rank()}")
    except CheckpointError as error:
        return str(error)
    return "saved"


AMONG_RANKS: dict[str, Callable[[dict[str, Any], Path], str]] = {
    "communication_data_type": buckets,
    "gradient_allreduce_op": stepped,
    **dict.fromkeys(("gradient_predivide_factor", "prescale_gradients"), sent),
    "torch_autocast.lower_precision_safe_modules": buckets,
    "partition.replicated.bucket_bytes": buckets,
    "checkpoint.tag_validation": tags,
}
"""Keys that one rank lists, and several carry out -> what is seen of a configuration."""
AT_0_ALONE = ("partition.replicated.bucket_bytes", "checkpoint.tag_validation")


def seen_among_ranks(folder: Path) -> dict[tuple[str, int], tuple[str, str]]:
    """Run on every rank: what is seen with each key, and without, by key and stage."""
    found = {}
    for path, stage in product(AMONG_RANKS, range(3)):
        if stage and path in AT_0_ALONE:
            continue
        key, observe = all_keys()[path], AMONG_RANKS[path]
        around = merged(surroundings(key), {"zero_optimization": {"stage": stage}})
        found[path, stage] = (
            observe(merged(around, nested(key.keys, value_of(key))), folder / "with"),
            observe(around, folder / "without"),
        )
    return found


def test_keys_at_work_among_ranks(tmp_path: Path) -> None:
    [of_ranks] = run_ranks([partial(seen_among_ranks, tmp_path)], 2)
    for seen in of_ranks:
        assert {path for path, _ in seen} == AMONG_RANKS.keys()
        assert [place for place, (given, left_out) in seen.items() if given == left_out] == []


@pytest.mark.parametrize("group", GROUPS)
def test_every_key_is_effective_refused_or_listed(group: str) -> None:
    wrong = {}
    for path, key in all_keys().items():
        if key.group == group:
            if path in EFFECTIVE:  # its probe is the proof; while its section is off, the report has it
                is_off = bool(key.switches) and key.field != "enabled"
                if is_off and (alone := outcome(key, next(situations(key)))) != "listed":
                    wrong[path] = f"{alone} while its section is off"
                continue
            found = {outcome(key, config) for config in situations(key)}
            state = state_of(key.section, key.field)
            if not found or not found <= next(words for kind, words in ALLOWED.items() if state.startswith(kind)):
                wrong[path] = f"{sorted(found)}, and state_of says {state!r}"
    assert wrong == {}
