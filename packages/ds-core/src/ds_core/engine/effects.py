"""Which keys change nothing for the engine that was built, and why (P03b): what its configuration alone cannot tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core import registry
from ds_core.config.effects import given_paths, without_effect

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ds_core.engine.face import EngineFace

__all__ = ["without_effect_here"]

AMONG_RANKS = (
    *("communication_data_type", "torch_autocast.lower_precision_safe_modules"),
    *("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op"),
)
"""Keys about what gradients become on their way to other ranks."""
OF_STEPS = (
    *("gradient_clipping", "steps_per_print", "data_types.grad_accum_dtype", "bf16.check_grad_overflow", *AMONG_RANKS),
    *("fp16.loss_scale", "fp16.initial_scale_power", "fp16.loss_scale_window", "fp16.min_loss_scale"),
    *("fp16.hysteresis", "fp16.consecutive_hysteresis"),
)
"""Keys that only backward and step read."""


def without_effect_here(engine: EngineFace) -> dict[str, str]:
    """Return the dotted path of each key that was given in vain -> the reason."""
    found = without_effect(engine._config)
    found.update((path, f"no effect: deprecated; {text}") for path, text in engine._config.dropped.items())
    given = given_paths(engine._config)
    for path, why in _reasons(engine, given):
        if path in given or path == RATE:
            found.setdefault(path, f"no effect: {why}")
    return found


RATE = "optimizer.params.lr"


def _reasons(engine: EngineFace, given: list[str]) -> Iterator[tuple[str, str]]:
    config, optimizer = engine._config, engine.client_optimizer
    for section, argument, brought in (
        ("optimizer", "optimizer", optimizer),
        ("scheduler", "lr_scheduler", engine.client_lr_scheduler),
    ):
        if brought is not None:
            yield from ((path, f"initialize was given {argument}=") for path in given if path.startswith(f"{section}."))
    if engine.parts.optimizer is None:
        yield from ((path, "no parameter is trained") for path in given if path.startswith("optimizer."))
        monitors = (f"{name}.enabled" for name in registry.names("monitor"))
        yield from ((path, "this engine has no optimizer, so it takes no steps") for path in (*OF_STEPS, *monitors))
    elif optimizer is None and engine.client_lr_scheduler is None and _sets_every_rate(engine):
        assert config.scheduler is not None
        yield RATE, f"{config.scheduler.type} sets the learning rate of every step"
    if all(dtypes.master is None for dtypes in engine.parts.partition.inputs.dtypes.values()):
        yield "zero_optimization.load_from_fp32_weights", "the weights have all digits themselves"
    if engine.training_dataloader is None:
        yield "dataloader_drop_last", "no training_data was given; only a loader from deepspeed_io would read it"
    if engine.parts.world_size == 1:
        yield from ((path, "one rank has nothing to reduce") for path in AMONG_RANKS)
        yield "checkpoint.tag_validation", "one rank has one tag"


def _sets_every_rate(engine: EngineFace) -> bool:
    """Return whether the configured schedule never looks at the rate that was given to the optimizer."""
    from ds_core.schedules.warmup import WarmupDecayLR, WarmupLR

    config = engine._config
    if config.optimizer is None or "lr" not in config.optimizer.params or config.scheduler is None:
        return False
    highest = {WarmupLR: None, WarmupDecayLR: 0.001}
    kind = type(engine.lr_scheduler)
    return kind in highest and config.scheduler.params.get("warmup_max_lr", highest[kind]) is not None
