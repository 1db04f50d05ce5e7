"""Activation checkpointing of the section ``activation_checkpointing``: what its policy does to an unmodified model."""

from __future__ import annotations

import logging
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ds_activation import settings
from ds_activation.blocks import find_blocks, places
from ds_activation.call import checkpoint
from ds_activation.choice import decide, merge, solve
from ds_activation.forwards import attach_forwards
from ds_activation.profile import Measurement
from ds_activation.report import as_text, choice_table, summary
from ds_core.comm.together import values_of_ranks
from ds_core.config.sections.activation import ActivationCheckpointingSection
from ds_core.errors import ConfigError
from ds_core.interfaces.activation import ActivationCheckpointing, Attached
from ds_core.log import log_dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import nn
    from torch.distributed import ProcessGroup

    from ds_activation.choice import Choice, ModelProfile
    from ds_activation.forwards import CheckpointedForward
    from ds_core.config import Config

__all__ = ["DeepSpeedActivation"]

_SECTION = "activation_checkpointing"
_OF_POLICIES = frozenset({"policy", "modules", "interval", "memory_budget"})
"""The keys that are not flags."""


class DeepSpeedActivation(ActivationCheckpointing):
    """Recomputation with DeepSpeed's flags, and policies for models that call no ``checkpoint`` themselves."""

    @classmethod
    def check_config(cls, config: Config) -> None:
        """Refuse flags that contradict each other or those of ``configure``, and what needs an ``mpu``.

        Raises:
            ConfigError: it cannot be.
        """
        _settings(_section(config))

    def checkpoint(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``; inputs are kept as the settings in force say."""
        return checkpoint(function, *args, **kwargs)

    def attach(self, module: nn.Module, config: Config, group: ProcessGroup, device: torch.device) -> Attached:
        """Exchange the forwards of the blocks that the policy is for.

        Raises:
            ConfigError: a pattern names no module, or no blocks repeat.
        """
        return _AttachedPolicy(module, _section(config), group, device)


def _section(config: Config) -> ActivationCheckpointingSection:
    section = config.section(_SECTION)
    assert isinstance(section, ActivationCheckpointingSection)
    return section


def _settings(section: ActivationCheckpointingSection) -> settings.Settings | None:
    """Return the flags that ``section`` gives, over those of ``configure``; None where it gives none."""
    flags = section.model_fields_set - _OF_POLICIES
    if not flags:
        return None
    configured = settings.configured()
    if section.partition_activations and configured.mpu is None:
        raise ConfigError(
            "partition_activations divides inputs over the ranks of an mpu, and there is none",
            where=f"{_SECTION}.partition_activations",
            fix="call checkpointing.configure(mpu) before initialize, or leave it out",
        )
    return replace(configured, **{name: getattr(section, name) for name in flags})


class _AttachedPolicy(Attached):
    """A section at work on one engine's model."""

    def __init__(
        self, module: nn.Module, section: ActivationCheckpointingSection, group: ProcessGroup, device: torch.device
    ) -> None:
        _settings(section)
        self._section, self._group, self._device = section, group, device
        self._configured: settings.Settings | None = None
        self._settings: settings.Settings | None = None
        """The section's flags over those of ``_configured``."""
        self._forwards: list[CheckpointedForward] = []
        self._choice: Choice | None = None
        self._is_waiting = section.policy == "auto"
        """Whether the choice is still to be made."""
        if section.policy is None:
            return
        self._module = weakref.ref(module)
        blocks = find_blocks(module, section.modules)
        self._names = [name for name, _ in blocks]
        log_dist(
            f"activation checkpointing: policy {section.policy} is for {len(blocks)} blocks: {places(self._names)}"
        )
        self._forwards = attach_forwards(blocks, decide(section.policy, len(blocks), section.interval))

    def active(self) -> AbstractContextManager[object]:
        """Return the context of a forward: the section's flags hold, and the first one of ``auto`` is measured."""
        if self._is_waiting and torch.is_grad_enabled():
            return self._measured()
        return self._in_force()

    def report(self) -> Mapping[str, str]:
        """Return what the policy does, in one line."""
        if self._section.policy is None:
            return {}
        decisions = tuple(forward.decision for forward in self._forwards)
        line = summary(self._section.policy, self._choice, decisions, self._section.memory_budget)
        return {"activation checkpointing": line + (", until a forward was measured" if self._is_waiting else "")}

    def detach(self) -> None:
        """Put the forwards back. Safe to repeat."""
        for forward in self._forwards:
            forward.detach()
        self._is_waiting = False

    def _in_force(self) -> AbstractContextManager[object]:
        configured = settings.configured()
        if configured is not self._configured:  # configure was called since
            self._configured, self._settings = configured, _settings(self._section)
        return nullcontext() if self._settings is None else settings.in_force(self._settings)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        module = self._module()
        assert module is not None, "a forward of a module that is gone"
        measurement = Measurement(module, self._names, self._device)
        for forward in self._forwards:
            forward.measurement = measurement
        try:
            with self._in_force(), measurement:
                yield
        finally:
            for forward in self._forwards:
                forward.measurement = None
        self._choose(measurement.result())  # a forward that failed does not come here

    def _choose(self, mine: ModelProfile) -> None:
        budget = self._section.memory_budget
        assert budget is not None  # a rule of the configuration
        self._is_waiting = False
        profile = merge(values_of_ranks(mine, self._group))
        if profile is None or not profile.calls:
            why = "the ranks' first forwards were different" if profile is None else "no block was called eagerly"
            log_dist(f"activation checkpointing: all blocks are recomputed, {why}", level=logging.WARNING)
            return
        self._choice = solve(profile, budget)
        for forward, decision in zip(self._forwards, self._choice.decisions, strict=True):
            forward.decision = decision
        log_dist(as_text(choice_table(profile, self._choice, budget)))
