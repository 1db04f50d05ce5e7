"""Seam ``precision``: which dtype each thing has, how the loss is scaled, and when a step is skipped.

A precision is data plus a scaler; the partition executes the plan. The entry name is the section users enable
(``fp16``, ``bf16``, ``torch_autocast``), or ``precision.type`` for one that is not DeepSpeed's.
Contract: ``ds_core.testing.precision``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from ds_core.config import Config as Configuration
    from ds_core.config import Section

__all__ = ["LossScaler", "ParameterDtypes", "Precision", "PrecisionPlan"]


@dataclass(frozen=True)
class ParameterDtypes:
    """What a plan means for one parameter."""

    stored: torch.dtype
    """The parameter itself, between steps and in the model's products; autograd computes its gradient in this."""
    accumulate: torch.dtype
    """Its gradient, summed over micro-batches; ``param.grad`` has it."""
    reduce: torch.dtype
    """Its gradient inside a collective."""
    master: torch.dtype | None
    """The optimizer's own copy; None: the optimizer updates the parameter itself."""

    @property
    def updated(self) -> torch.dtype:
        """Of the tensor the optimizer updates, and so of the gradient it reads."""
        return self.stored if self.master is None else self.master


@dataclass(frozen=True)
class PrecisionPlan:
    """The dtype of everything in a step; None means "as the parameter is", or for the last five "none".

    What a matrix product computes in follows: ``autocast``, else ``stored``. So does a fresh gradient: ``stored``.
    """

    stored: torch.dtype | None = None
    """Model parameters between steps. Only floating-point ones are cast; frozen ones are, too."""
    accumulate: torch.dtype | None = None
    """Gradients summed over micro-batches."""
    reduce: torch.dtype | None = None
    """Gradients inside a collective."""
    reduce_in: tuple[type[nn.Module], ...] | None = None
    """``reduce`` holds for the direct parameters of modules of exactly these classes; None: for all."""
    master: torch.dtype | None = None
    """The optimizer's own copy of each weight that is stored in another dtype; None: it updates the stored ones."""
    buffer: torch.dtype | None = None
    """Floating-point buffers of the model; None: left alone."""
    input_cast: torch.dtype | None = None
    """Floating-point inputs of forward are cast to this; None: left alone."""
    autocast: torch.dtype | None = None
    """Forward runs under ``torch.autocast`` with this dtype; None: it does not."""

    def dtypes_of(self, module: nn.Module) -> dict[nn.Parameter, ParameterDtypes]:
        """Return what the plan means for each parameter of ``module``, before or after it was cast.

        Only floating-point parameters follow it; one of complex or whole numbers keeps its dtype in every role.
        A master of the dtype a parameter is stored in would be a second copy of the same bits: there is none then.
        A parameter that several modules share has the reduce dtype of the first of them.

        Raises:
            ConfigError: gradients would accumulate in another dtype than the optimizer can read.
        """
        found: dict[nn.Parameter, ParameterDtypes] = {}
        for prefix, submodule in module.named_modules():
            reduced = self.reduce_in is None or type(submodule) in self.reduce_in
            for name, param in submodule.named_parameters(recurse=False):
                if param in found:
                    continue
                floats = param.is_floating_point()
                stored = (self.stored if floats else None) or param.dtype
                found[param] = dtypes = ParameterDtypes(
                    stored=stored,
                    accumulate=(self.accumulate if floats else None) or stored,
                    reduce=(self.reduce if reduced and floats else None) or stored,
                    master=self.master if floats and self.master != stored else None,
                )
                if dtypes.master is None and dtypes.accumulate != stored and param.requires_grad:
                    full_name = f"{prefix}.{name}" if prefix else name
                    raise ConfigError(
                        f"gradients cannot accumulate in {dtypes.accumulate} for a parameter that is trained in "
                        f"{stored} without a master",
                        where=f"data_types.grad_accum_dtype, parameter {full_name!r}",
                        fix="leave grad_accum_dtype out, or enable fp16 or bf16, which keep masters",
                    )
        return found


@runtime_checkable
class LossScaler(Protocol):
    """The factor the loss is multiplied by, so that small gradients survive."""

    dynamic: bool
    """Whether the factor moves with how steps end."""

    @property
    def scale(self) -> float:
        """The factor of the coming backward; 1.0 where nothing is scaled."""

    def update(self, *, overflowed: bool) -> None:
        """Learn how a step ended. Called once per optimizer step, with the same value on every rank.

        Raises:
            LossScaleError: the scale cannot fall any further. The engine adds which steps and modules overflowed.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return JSON from which :meth:`load_state_dict` continues exactly."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Precision(ABC):
    """One precision, built once per engine. All ranks build the same."""

    Config: ClassVar[type[Section] | None] = None
    """Options of its own, ``precision.<name>``; DeepSpeed's sections are in ``ds_core.config`` already."""

    skips_overflow: bool = False
    """Whether :meth:`overflowed` may say yes. If so the partition remembers which rank had inf or NaN of its own."""

    def __init__(self, config: Configuration) -> None:
        """Raise ``ConfigError`` for what this precision cannot do. Called before a process group is touched."""
        self.config = config

    @property
    @abstractmethod
    def plan(self) -> PrecisionPlan: ...

    @property
    @abstractmethod
    def scaler(self) -> LossScaler: ...

    @abstractmethod
    def overflowed(self, norm: float) -> bool:
        """Return whether the step must be skipped.

        Args:
            norm: global L2 norm of the still scaled gradients, equal on every rank, inf or NaN where one of them is.
        """

    def after_step(self, *, skipped: bool) -> None:
        """Called on every rank at the end of each optimizer step."""
        self.scaler.update(overflowed=skipped)

    def optimizer_face(self, engine: Any) -> Any:
        """Return what users get as ``engine.optimizer``: an object with DeepSpeed's surface over ``engine.parts``.

        None: the torch optimizer itself.
        """
        return None
