"""Seam ``partition``: where parameters, gradients and optimizer state live, and which collectives keep them right.

The entry name is the ZeRO stage (``1``, ``2``, ``3``), ``replicated`` for stage 0, or ``partition.type`` for one that
is not DeepSpeed's. Contract: ``ds_core.testing.partition``.

The order of calls, the same on every rank::

    for each micro-batch:  begin_backward(reduce=is_boundary)  -> autograd ->  end_backward()
    at the boundary:       reduce() -> [optimizer.step -> publish(), unless skipped] -> clear_gradients()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

    from ds_core.config import Config, Section
    from ds_core.config.config import Config as WholeConfig
    from ds_core.interfaces.logical import Piece
    from ds_core.interfaces.precision import ParameterDtypes, PrecisionPlan

__all__ = ["OverflowSource", "Partition", "PartitionInputs", "SquaredNorm"]


@dataclass(frozen=True)
class PartitionInputs:
    """What a partition is built from."""

    module: nn.Module
    """On its device, equal on every rank."""
    param_groups: Sequence[Mapping[str, Any]]
    """Groups as for a torch optimizer; ``params`` lists parameters of ``module``, frozen ones left out.

    Empty where nothing is trained.
    """
    names: Mapping[nn.Parameter, str]
    """Every parameter of ``module`` by its (first) name."""
    plan: PrecisionPlan
    group: ProcessGroup
    """The data-parallel group."""
    device: torch.device
    config: Config
    find_sources: bool = False
    """Remember which ranks had inf or NaN of their own, for :meth:`Partition.find_overflow`: one more read of the
    gradients before each collective."""
    whole_tensors: bool = False
    """The optimizer looks at a parameter as a whole (a matrix, a norm), so it must get whole ones. If not, every
    element is updated by itself, and any interval of a parameter will do."""
    dtypes: Mapping[nn.Parameter, ParameterDtypes] = field(init=False, repr=False)
    """What ``plan`` means for each parameter of ``module``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtypes", self.plan.dtypes_of(self.module))

    def with_groups(self, param_groups: Sequence[Mapping[str, Any]]) -> PartitionInputs:
        """Return these inputs with other groups; each parameter has the dtypes it has here, in whichever it is now."""
        others = replace(self, param_groups=param_groups)
        object.__setattr__(others, "dtypes", self.dtypes)
        return others


@dataclass(frozen=True)
class SquaredNorm:
    """This rank's share of the squared gradient norm; the sum over ``groups`` is the whole, each element once."""

    value: Tensor
    """``[]``, float64 or float32."""
    groups: tuple[ProcessGroup, ...] = field(default=())


@dataclass(frozen=True)
class OverflowSource:
    """Where inf or NaN entered the gradients of a step."""

    parameter: str | None
    """The first in the order of backward (nearest the loss) whose reduced gradient is not finite; None: every gradient
    is finite, but the sum of their squares is not."""
    ranks: tuple[int, ...] | None
    """Places in the data-parallel group that had it before the reduction; empty: none, only the sum over ranks is not
    finite; None: not known, see ``PartitionInputs.find_sources``."""


class Partition(ABC):
    """Executes the precision's plan for the parameters of one engine."""

    Config: ClassVar[type[Section] | None] = None
    """Options of its own, ``partition.<name>``."""
    divides: ClassVar[bool] = False
    """Whether the optimizer of each rank updates a part of its own; if not, all of them update the same."""

    @classmethod  # noqa: B027 - most refuse nothing
    def check_config(cls, config: WholeConfig) -> None:
        """Refuse what this partition cannot carry out. Called first, before a process group or a device is touched.

        By the configuration alone: ``ds config check`` asks too, on any machine, where the class imports without torch.
        Batch sizes may be open there.

        Raises:
            ConfigError: what it is, and what to do instead. Where one key is to blame, the text begins with its path
                and a colon.
        """

    def __init__(self, inputs: PartitionInputs) -> None:
        """Collective over ``inputs.group``. May cast or move parameters and put hooks on them and their modules."""
        self.inputs = inputs
        self._piece_of: dict[nn.Parameter, Piece] | None = None

    @property
    @abstractmethod
    def loss_factor(self) -> float:
        """Multiplied into the loss: how much of the division by the number of ranks is before the sum; 1.0 on one."""

    @abstractmethod
    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the groups given, with ``params`` replaced by what the optimizer updates here.

        Plain local tensors, never DTensors; each is the data of exactly one of :meth:`optimizer_pieces`.
        """

    @abstractmethod
    def optimizer_pieces(self) -> Sequence[Piece]:
        """Return the identity of each tensor of :meth:`optimizer_groups`, in the same order."""

    def piece_of(self, param: nn.Parameter) -> Piece | None:
        """Return which of :meth:`optimizer_pieces` stands for ``param``; None: the optimizer does not update it."""
        if self._piece_of is None:
            params = [each for group in self.inputs.param_groups for each in group["params"]]
            self._piece_of = dict(zip(params, self.optimizer_pieces(), strict=True))
        return self._piece_of.get(param)

    def is_elsewhere(self, piece: Piece) -> bool:
        """Return whether another rank updates all of the parameter of ``piece``; one without elements is its writer's.

        The optimizer here gets no gradient of it, and state would never move.
        """
        if not (self.divides and self.inputs.whole_tensors) or piece.chunk.length:
            return False
        import torch.distributed as dist

        return piece.writer != dist.get_rank(self.inputs.group)

    @abstractmethod
    def begin_backward(self, *, reduce: bool) -> None:
        """Called before autograd runs; ``reduce`` is True for the backward that ends an accumulation window.

        A second backward with ``reduce`` in one window adds to the gradients of the first.
        """

    @abstractmethod
    def end_backward(self) -> None:
        """Called after autograd ran. In a backward that reduces, starts the collectives that hooks have not started.

        Where the partition keeps full gradients, ``param.grad`` is the reduced gradient on return.
        """

    @abstractmethod
    def abort_backward(self) -> None:
        """Called instead of :meth:`end_backward` when autograd raised: later calls must not mistake what is there."""

    @abstractmethod
    def reduce(self) -> SquaredNorm:
        """Wait for what is under way; afterwards the optimizer's tensors have their reduced gradient in ``.grad``.

        A parameter that somebody wrote to in place since :meth:`publish` is where its master goes on from.
        A parameter that no rank used has ``.grad`` None.
        """

    @abstractmethod
    def reduced_gradient(self, param: nn.Parameter) -> Tensor | None:
        """Return the reduced gradient of what this rank updates of ``param``, as long as there is one.

        From the end of the backward that ends a window to :meth:`clear_gradients`; in the dtype it accumulated in, with
        the elements of the parameter's :meth:`optimizer_pieces`, in place: writing to it changes the coming step. None
        before, and where no rank used the parameter.
        """

    @abstractmethod
    def find_overflow(self) -> OverflowSource:
        """Say where inf or NaN came from. Every rank calls it, between :meth:`reduce` and :meth:`clear_gradients`.

        Called only where the norm is not finite, so it may be slow and may communicate.
        """

    @abstractmethod
    def publish(self) -> None:
        """Bring what the optimizer updated to the parameters the model computes with."""

    @abstractmethod
    def clear_gradients(self) -> None:
        """Forget all gradients, at the end of a step or when a checkpoint is loaded."""

    @abstractmethod
    def pieces(self) -> Iterable[Piece]:
        """Return what this rank holds of weights, buffers and masters, for saving and for loading in place."""

    @abstractmethod
    def gradient_pieces(self) -> Iterable[Piece]:
        """Return the gradients accumulated so far in an unfinished window; empty at a boundary.

        Called and read to the end by every rank. Where it needs a collective, it fails on all ranks or on none.
        """

    @abstractmethod
    def restore_gradients(self, pieces: Iterable[Piece]) -> None:
        """Continue the window whose :meth:`gradient_pieces` these are."""

    @abstractmethod
    def after_load(self) -> None:
        """Called once the tensors of :meth:`pieces` were filled: makes the copies agree, masters first. Collective."""

    @abstractmethod
    def refresh_masters(self) -> None:
        """Begin anew from the model's parameters, which somebody else has written to."""

    def optimizer_face(self, engine: Any) -> Any:
        """Return what users get as ``engine.optimizer``: an object with DeepSpeed's surface over ``engine.parts``.

        None: what the precision returns, see ``Precision.optimizer_face``.
        """
        return None

    def report(self) -> Mapping[str, str]:
        """Return what a user may want to know: option or buffer -> its effect here."""
        return {}

    @abstractmethod
    def destroy(self) -> None:
        """Take hooks off and drop buffers. Safe to repeat; called without any collective."""
