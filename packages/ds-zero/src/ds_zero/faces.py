"""``DeepSpeedZeroOptimizer``: DeepSpeed's optimizer of stages 1 and 2, a face over an engine.

Note: what is not flat. Ranks own a segment of every bucket here, and the optimizer gets one tensor per parameter, so
nothing is one flat tensor per group. Attributes called ``*_flat``, and ``single_partition_of_fp32_groups``, are copies
made at each reading: writing to one changes nothing. The tensors themselves are in ``param_groups``;
``ds_core.utils.safe_set_full_fp32_param`` and its like write to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ds_core.comm import all_or_none
from ds_core.engine.optimizer_face import OptimizerFace
from ds_core.engine.parts import global_norm
from ds_core.errors import CheckpointError, EngineError, NotBuiltError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

    from ds_zero.partition import _Stage12

__all__ = ["DeepSpeedZeroOptimizer"]

_OWN_PARTS = "param_groups[i]['params'] has this rank's part of each parameter"


class DeepSpeedZeroOptimizer(OptimizerFace):
    """``engine.optimizer`` at stages 1 and 2, in every precision.

    What ranks divide is divided by buckets and not by groups (see the head of this module), so a few of DeepSpeed's
    attributes cannot be: reading one raises an ``AttributeError`` that says what to use instead.
    """

    cpu_offload = False
    """Optimizer state is where the parameters are."""
    _INSTEAD: ClassVar[dict[str, str]] = {
        "bf16_groups": "bit16_groups has them, in every precision",
        "fp16_groups": "bit16_groups has them, in every precision",
        "fp32_groups_flat_partition": f"single_partition_of_fp32_groups has a copy; {_OWN_PARTS}",
        "parallel_partitioned_bit16_groups": f"a rank's part of a group is not one interval of it; {_OWN_PARTS}",
        "round_robin_bit16_groups": "parameters are not reordered; use bit16_groups",
        "round_robin_bit16_indices": "parameters are not reordered; use bit16_groups",
        "reduce_gradients": "engine.backward(loss) reduces, while it runs",
        "offload_states": "it comes with a later release of ds-zero",
        "reload_states": "it comes with a later release of ds-zero",
    }

    @property
    def _partition(self) -> _Stage12:
        partition: _Stage12 = self._engine.parts.partition  # type: ignore[assignment]
        return partition

    def __getattr__(self, name: str) -> Any:
        if name in self._INSTEAD:
            raise NotBuiltError(
                f"{type(self).__name__} has no {name!r} here", where=f"optimizer.{name}", fix=self._INSTEAD[name]
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # -- the model's parameters, by group ---------------------------------------------------------------------------

    @property
    def bit16_groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters that are trained, by group, in whichever precision; whole on every rank."""
        return [list(group["params"]) for group in self._partition.inputs.param_groups]

    @property
    def bit16_groups_flat(self) -> list[Tensor]:
        """The parameters of each group in one 1-d tensor: a copy made at each reading."""
        return [_flat(group, self._partition.inputs.device) for group in self.bit16_groups]

    @property
    def param_names(self) -> dict[nn.Parameter, str]:
        """Every parameter of the model -> its name."""
        return dict(self._partition.inputs.names)

    # -- this rank's part -------------------------------------------------------------------------------------------

    @property
    def single_partition_of_fp32_groups(self) -> list[Tensor]:
        """What this rank updates of each group in one 1-d tensor: a copy made at each reading."""
        return [_flat(group["params"], self._partition.inputs.device) for group in self.param_groups]

    @property
    def averaged_gradients(self) -> dict[int, list[Tensor | None]]:
        """Group -> this rank's part of the reduced gradient of each parameter, in place, with the loss scale; flat.

        None where no rank used the parameter. Empty but between the backward that ends a window and ``step()``.
        """
        if not self._is_reduced:
            return {}
        return {
            index: [self._partition.reduced_gradient(param) for param in group]
            for index, group in enumerate(self.bit16_groups)
        }

    @property
    def _is_reduced(self) -> bool:
        window = self._engine.parts.accumulation
        return window.at_boundary and window.backwards > 0

    @property
    def partition_gradients(self) -> bool:
        """Whether each backward reduces, so that a rank keeps its part of gradients alone: stage 2."""
        return self._partition.every_backward

    @property
    def partition_count(self) -> list[int]:
        """Over how many ranks each group is divided."""
        return [self._engine.parts.world_size for _ in self.param_groups]

    @property
    def partition_size(self) -> list[int]:
        """How many elements this rank updates of each group; ranks may differ by a few."""
        return [sum(tensor.numel() for tensor in group["params"]) for group in self.param_groups]

    @property
    def groups_padding(self) -> list[int]:
        """0 for each group: what the optimizer updates has no padding."""
        return [0 for _ in self.param_groups]

    @property
    def dp_process_group(self) -> ProcessGroup:
        """The ranks that divide the model state."""
        return self._partition.inputs.group

    @property
    def real_dp_process_group(self) -> list[ProcessGroup]:
        """The same for each group."""
        return [self.dp_process_group for _ in self.param_groups]

    @property
    def offloaded_states(self) -> set[str]:
        """Nothing is ever offloaded."""
        return set()

    # -- steps of training ------------------------------------------------------------------------------------------

    def update_lp_params(self) -> None:
        """Bring what the ranks updated to the parameters the model computes with, as each step does. Collective."""
        self._partition.publish()

    def scaled_global_norm(self, norm_type: float = 2) -> float:
        """Return the L2 norm of the gradients that the coming step takes, before clipping, with the loss scale.

        Between the backward that ends a window and ``step()``, which computes it by itself. Collective.

        Raises:
            EngineError: there are no reduced gradients now, or another norm was asked for.
        """
        where = "optimizer.scaled_global_norm"
        if norm_type != 2:
            raise EngineError(f"norm_type is {norm_type}", where=where, fix="leave it out: gradients are clipped by L2")
        if not self._is_reduced:
            raise EngineError(
                "there are no reduced gradients now",
                where=where,
                fix="call it between the backward that ends a window and step(); engine.get_global_grad_norm() has the "
                "norm of the last step, unscaled",
            )
        return global_norm(self._partition.reduce())

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of optimizer state and masters, and the scaler's state.

        For this rank of a job of the same model, stage and size; ``engine.save_checkpoint`` saves for any. Tensors are
        this rank's own, not copies, as in torch.
        """
        return {
            **super().state_dict(),
            "partition_count": self.partition_count,
            "param_slice_mappings": self._slices(),
        }

    def load_state_dict(
        self, state_dict: Mapping[str, Any] | Sequence[Mapping[str, Any]], load_optimizer_states: bool = True
    ) -> None:
        """Go on from :meth:`state_dict`. Collective: it fails on every rank or on none.

        Args:
            state_dict: of this rank; or those of all ranks, in their order.
            load_optimizer_states: False: the torch optimizer stays as it is.

        Raises:
            CheckpointError: it is of other parameters, or of other parts of them; nothing has changed then. What
                torch's optimizer refuses on one rank alone, others have loaded by then and not published: load again.
        """
        own = all_or_none(lambda: self._own_state(state_dict), self.dp_process_group)
        super().load_state_dict(own, load_optimizer_states)

    def _own_state(self, given: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        world_size = self._engine.parts.world_size
        if isinstance(given, (list, tuple)):
            if len(given) != world_size:
                raise _other_parts(f"the states are those of {len(given)} ranks, this job has {world_size}")
            own: Any = given[torch.distributed.get_rank(self.dp_process_group)]
        else:
            own = given
        for key in ("parameters", "optimizer_state_dict", "loss_scaler"):
            self._required(own, key)
        if self._required(own, "param_slice_mappings") != self._slices():
            count = max(self._required(own, "partition_count"), default=world_size)
            raise _other_parts(f"the state is of other parameters or parts than here, one of {count}")
        return own  # type: ignore[no-any-return]

    def _slices(self) -> list[dict[str, tuple[int, int]]]:
        """Return which part of each parameter is this rank's: name -> first element and how many."""
        found = []
        for group in self.bit16_groups:
            pieces = [self._partition.piece_of(param) for param in group]
            found.append({piece.of.name: (piece.chunk.offset, piece.chunk.length) for piece in pieces if piece})
        return found


def _flat(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    parts = [tensor.detach().reshape(-1) for tensor in tensors]
    return torch.cat(parts) if parts else torch.empty(0, device=device)


def _other_parts(what: str) -> CheckpointError:
    return CheckpointError(
        what,
        where="optimizer.load_state_dict",
        fix="load it at the number of ranks it is of; what engine.save_checkpoint writes loads at any",
    )
