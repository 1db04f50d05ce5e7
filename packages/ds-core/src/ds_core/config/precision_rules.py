"""Rules among ``fp16``, ``bf16``, ``torch_autocast``, ``data_types`` and what they need elsewhere, for ``checks.py``.

A section that is off asks for nothing, so its keys are held against nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core.config.problems import Problem
from ds_core.config.section import show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ds_core.config.checks import Rule
    from ds_core.config.config import Config

__all__ = ["PRECISION_RULES"]

WEIGHTS = {"fp16": "float16", "bf16": "bfloat16"}
"""Precision -> the dtype it gives to weights; all others of the core leave them in float32."""
NEED_ZERO = {
    "fp16": ("fp16_master_weights_and_grads",),
    "bf16": ("bf16_master_weights_and_grads", "bf16_optimizer_states"),
}
LARGEST_POWER = 127
"""2**127 is the largest power of two in fp32."""
LEAST_SCALE, LARGEST_SCALE = 2.0**-126, (2 - 2.0**-23) * 2.0**LARGEST_POWER
"""The normal numbers of fp32; the reciprocal of a smaller one is infinite, or nearly so."""
NO_STATIC_SCALE = ("lamb", "onebitlamb")
"""Optimizers that need the scale to be found while training, as entry names."""


def _weights(config: Config) -> tuple[str | None, str] | None:
    """Return which of ``WEIGHTS`` is on, and the dtype of weights; None where a stranger or a conflict decides."""
    if config.precision.type not in (None, "fp32", "torch_autocast", *WEIGHTS):
        return None
    on = [name for name in WEIGHTS if config.enables(name)]
    if len(on) > 1:
        return None
    return (on[0], WEIGHTS[on[0]]) if on else (None, "float32")


def _one_precision(config: Config) -> Iterator[Problem]:
    if config.fp16.enabled and config.bf16.enabled:
        yield Problem(
            ("fp16", "enabled"),
            "got true, and bf16.enabled is true as well",
            "enable one of the two, bf16 if the device has it",
        )


def _own_precision(config: Config) -> Iterator[Problem]:
    for name in ("fp16", "bf16", "torch_autocast"):
        if config.precision.type is not None and getattr(config, name).enabled:
            yield Problem(
                ("precision", "type"),
                f"got {show(config.precision.type)}, and {name}.enabled is true as well",
                f'remove "type" from "precision", or set "enabled" of "{name}" to false',
            )


def _dtype_of_weights(config: Config) -> Iterator[Problem]:
    wanted, decided = config.data_types.param_dtype, _weights(config)
    if wanted is None or decided is None or wanted == decided[1]:
        return
    by, dtype = decided
    wanted_by = next((name for name, of_weights in WEIGHTS.items() if of_weights == wanted), None)
    because = f"with {by}" if by else "without fp16 and bf16"
    if by and wanted_by:
        instead = f"enable {wanted_by} in place of {by}"
    else:
        instead = f"do not enable {by}" if by else f"enable {wanted_by}"
    yield Problem(
        ("data_types", "param_dtype"),
        f"got {show(wanted)}, but {because} weights are {show(dtype)}",
        f"remove it, or {instead}",
    )


def _low_masters(config: Config) -> Iterator[Problem]:
    for name, flags in NEED_ZERO.items():
        for flag in flags:
            if not (config.enables(name) and getattr(getattr(config, name), flag)):
                continue
            needs = []
            if config.zero_optimization.stage == 0:
                needs.append("ZeRO stage 1 to 3, and zero_optimization.stage is 0")
            if flag == "bf16_optimizer_states" and not config.bf16.bf16_master_weights_and_grads:
                needs.append("bf16.bf16_master_weights_and_grads, and that is false")
            why = f"needs {'; it also needs '.join(needs)}" if needs else "is not built yet; only false is accepted"
            yield Problem((name, flag), f"got true, which {why}", "remove it")


def _static_scale(config: Config) -> Iterator[Problem]:
    scale = config.fp16.loss_scale
    if not config.enables("fp16") or scale == 0:
        return
    if not LEAST_SCALE <= scale <= LARGEST_SCALE:
        yield Problem(
            ("fp16", "loss_scale"),
            f"got {scale}, out of the range of fp32, {LEAST_SCALE:.2g} to {LARGEST_SCALE:.2g}",
            "set it to 0, which finds the scale while training",
        )
    if config.optimizer is not None and config.optimizer.type.lower() in NO_STATIC_SCALE:
        yield Problem(
            ("fp16", "loss_scale"),
            f"got {scale}, and optimizer {show(config.optimizer.type)} needs a scale found while training",
            "set it to 0",
        )


def _dynamic_scale(config: Config) -> Iterator[Problem]:
    fp16 = config.fp16
    if not config.enables("fp16") or fp16.loss_scale > 0:
        return
    for name, value in (("loss_scale_window", fp16.loss_scale_window), ("min_loss_scale", fp16.min_loss_scale)):
        if value < 1:
            yield Problem(("fp16", name), f"got {value}, must be at least 1", "write 1 or more, or remove it")
    power, least = fp16.initial_scale_power, fp16.min_loss_scale
    if power > LARGEST_POWER:
        yield Problem(
            ("fp16", "initial_scale_power"),
            f"got {power}, must be at most {LARGEST_POWER}: 2**{power} is infinite in fp32",
            "remove it: the scale then starts at 2**16",
        )
        return
    start, needed = fp16.initial_dynamic_scale(), (least - 1).bit_length()
    if start < least:
        yield Problem(
            ("fp16", "initial_scale_power"),
            f"got {power}, so the loss scale starts at {start}, below fp16.min_loss_scale, {least}",
            f'set "min_loss_scale" to {start} or less'
            + (f', or "initial_scale_power" to {needed} or more' if needed <= LARGEST_POWER else ""),
        )


def _autocast(config: Config) -> Iterator[Problem]:
    if not config.enables("torch_autocast"):
        return
    dtype, decided = config.torch_autocast.dtype, _weights(config)
    if dtype == "float32":
        yield Problem(
            ("torch_autocast", "dtype"),
            'got "float32", and autocast to it changes nothing; allowed are "bfloat16" and "float16"',
            'set it to one of them, or "enabled" of "torch_autocast" to false',
        )
    elif decided is not None and decided[0] is not None and decided[1] != dtype:
        yield Problem(
            ("torch_autocast", "dtype"),
            f"is {show(dtype)}, but with {decided[0]} weights are {show(decided[1])}",
            f"set it to {show(decided[1])}, or enable one of {decided[0]} and torch_autocast",
        )


_ON = ("precision.type", "fp16.enabled", "bf16.enabled", "torch_autocast.enabled")
PRECISION_RULES: list[tuple[set[str], Rule]] = [
    ({*_ON[1:3]}, _one_precision),
    ({*_ON}, _own_precision),
    ({*_ON, "data_types.param_dtype"}, _dtype_of_weights),
    ({*_ON, "fp16", "bf16", "zero_optimization.stage"}, _low_masters),
    ({*_ON, "fp16", "optimizer.type"}, _static_scale),
    ({*_ON, "fp16"}, _dynamic_scale),
    ({*_ON, "torch_autocast"}, _autocast),
]
"""(keys and sections the rule reads, the rule)."""
