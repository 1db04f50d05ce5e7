"""``BF16_Optimizer``: DeepSpeed's optimizer of bf16 training, a face over an engine.

Note: flat attributes. Nothing here is stored flat. Attributes called ``*_flat`` or ``*_partition`` are copies made at
each reading, so writing to one changes nothing; the tensors themselves are in ``bf16_groups`` and ``fp32_groups``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import ds_core
from ds_core.errors import CheckpointError, ConfigError, EngineError
from ds_fp16._low_precision import LowPrecisionFace, flat, not_scaled, split
from ds_fp16._own_engine import build, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

__all__ = ["BF16_Optimizer"]

_DEFAULT_ALLGATHER_BUCKET = 5_000_000_000


class BF16_Optimizer(LowPrecisionFace):  # noqa: N801, DeepSpeed's name
    """bf16 parameters with fp32 masters; ``engine.optimizer`` in bf16.

    In DeepSpeed it divides masters and optimizer state among the ranks. Here every rank has the whole of both: each
    "partition" is the whole group, without padding. DeepSpeed's has no ``overflow`` and no ``loss_scale``; this one
    has both, because clients read them: a step with inf or NaN is skipped, and the scale is always 1.

    Args:
        init_optimizer: as of :class:`FP16_Optimizer`.
        param_names: name of each parameter, for errors and overflow records; None: they have numbers.
        bfloat16_config: the section ``bf16``, as a dictionary or as ``ds_core.config`` has it; None: its defaults.
        mpu: not built.
        clip_grad: largest gradient norm, 0 for any.
        norm_type: 2.
        allgather_bucket_size: the default only: nothing is gathered.
        dp_process_group: the group of all ranks, or None.
        timers: not built.
        grad_acc_dtype: gradients are added over micro-batches in this, fp32 or bf16; None: bf16.
        graph_harvesting: not built.
        has_moe_layers: not built.

    Raises:
        NotBuiltError: an argument that is not built.
        ConfigError: a value that cannot be, or an optimizer that cannot be trained with.
    """

    def __init__(
        self,
        init_optimizer: torch.optim.Optimizer,
        param_names: Mapping[nn.Parameter, str] | None = None,
        bfloat16_config: Any = None,
        mpu: Any = None,
        clip_grad: float = 0.0,
        norm_type: int = 2,
        allgather_bucket_size: int = _DEFAULT_ALLGATHER_BUCKET,
        dp_process_group: Any = None,
        timers: Any = None,
        grad_acc_dtype: torch.dtype | None = None,
        graph_harvesting: bool = False,
        has_moe_layers: bool = False,
    ) -> None:
        where = "BF16_Optimizer"
        bucket = None if allgather_bucket_size == _DEFAULT_ALLGATHER_BUCKET else allgather_bucket_size
        refuse(
            where,
            mpu=(mpu, "leave it out: all ranks are data-parallel"),
            norm_type=(None if norm_type == 2 else norm_type, "leave it out: gradients are clipped by their L2 norm"),
            allgather_bucket_size=(bucket, "leave it out: every rank has everything, nothing is gathered"),
            dp_process_group=(None if _is_world(dp_process_group) else dp_process_group, "leave it out"),
            timers=(timers, "leave it out, and time the calls"),
            graph_harvesting=(graph_harvesting, "leave it out"),
            has_moe_layers=(has_moe_layers, "leave it out"),
        )
        config: dict[str, Any] = {"bf16": _bf16_section(bfloat16_config), "gradient_clipping": clip_grad}
        if grad_acc_dtype is not None:
            names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
            if grad_acc_dtype not in names:
                raise ConfigError(
                    f"grad_acc_dtype is {grad_acc_dtype}", where=where, fix="pass torch.float32 or torch.bfloat16"
                )
            config["data_types"] = {"grad_accum_dtype": names[grad_acc_dtype]}
        super().__init__(build(init_optimizer, config, where=where, names=param_names))

    # -- groups -----------------------------------------------------------------------------------------------------

    @property
    def bf16_groups(self) -> list[list[nn.Parameter]]:
        """The model's parameters that are trained, by group."""
        return self._low()

    @property
    def bf16_groups_flat(self) -> list[Tensor]:
        """The parameters of each group in one 1-d tensor: a copy made at each reading."""
        return flat(self.bf16_groups)

    @property
    def bf16_partitioned_groups(self) -> list[list[Tensor]]:
        """As :attr:`bf16_groups_flat`, each as the one partition there is."""
        return [[whole] for whole in self.bf16_groups_flat]

    @property
    def fp32_groups(self) -> list[list[Tensor]]:
        """The masters, by group, one per parameter: what the torch optimizer updates."""
        return self._masters()

    @property
    def fp32_groups_flat_partition(self) -> list[Tensor]:
        """The masters of each group in one 1-d tensor: a copy made at each reading."""
        return flat(self.fp32_groups)

    @property
    def single_partition_of_fp32_groups(self) -> list[Tensor]:
        """The same as :attr:`fp32_groups_flat_partition`."""
        return self.fp32_groups_flat_partition

    @property
    def fp32_groups_gradients(self) -> list[list[Tensor]]:
        """The gradients summed so far, by group, one per parameter; zeros where there is none.

        In the dtype they accumulate in. Reduced over the ranks once the window's last backward returned.
        """
        dtypes = self._engine.parts.partition.inputs.dtypes
        return [
            [
                torch.zeros_like(param, dtype=dtypes[param].accumulate) if param.grad is None else param.grad
                for param in group
            ]
            for group in self.bf16_groups
        ]

    @property
    def fp32_groups_has_gradients(self) -> list[list[bool]]:
        """Whether each parameter has a gradient."""
        return [[param.grad is not None for param in group] for group in self.bf16_groups]

    @property
    def fp32_groups_gradients_flat(self) -> list[Tensor]:
        """The gradients of each group in one 1-d tensor: a copy made at each reading."""
        return flat(self.fp32_groups_gradients)

    @property
    def fp32_groups_gradient_flat_partition(self) -> list[Tensor]:
        """The same as :attr:`fp32_groups_gradients_flat`."""
        return self.fp32_groups_gradients_flat

    @property
    def partition_count(self) -> list[int]:
        """1 for each group: nothing is divided."""
        return [1 for _ in self.param_groups]

    @property
    def group_paddings(self) -> list[int]:
        """0 for each group: nothing is padded."""
        return [0 for _ in self.param_groups]

    # -- the loss is not scaled -------------------------------------------------------------------------------------

    def override_loss_scale(self, loss_scale: float) -> None:
        """Refused: bf16 has the range of fp32."""
        raise not_scaled("BF16_Optimizer.override_loss_scale")

    def _set_loss_scale(self, scale: float) -> None:
        raise not_scaled("BF16_Optimizer.loss_scale")

    # -- a backward of the caller's own -----------------------------------------------------------------------------

    def backward_prologue(self) -> None:
        """Say that ``loss.backward()`` follows, to be ended by :meth:`backward_epilogue`.

        Only where ``engine.backward`` would do no more than that: on one rank, without accumulation.

        Raises:
            EngineError: the loss would have to be multiplied.
        """
        parts = self._engine.parts
        factor = parts.precision.scaler.scale * parts.partition.loss_factor / parts.accumulation.steps
        if factor != 1.0:
            raise EngineError(
                f"the loss must be multiplied by {factor:g} here (accumulation, number of ranks), "
                "which loss.backward() alone does not do",
                where="BF16_Optimizer.backward_prologue",
                fix="call backward(loss), of the optimizer or of the engine",
            )
        parts.partition.begin_backward(reduce=parts.accumulation.at_boundary)

    def backward_epilogue(self, update_hp_grads: bool = True, clear_lp_grads: bool = False) -> None:
        """Say that the ``loss.backward()`` after :meth:`backward_prologue` has returned.

        Raises:
            EngineError: other arguments than the default: autograd has added to the only gradients there are.
        """
        if not update_hp_grads:
            raise _one_gradient("backward_epilogue(update_hp_grads=False)")
        if clear_lp_grads:
            raise _one_gradient("backward_epilogue(clear_lp_grads=True)")
        parts = self._engine.parts
        parts.partition.end_backward()
        parts.accumulation.backwards += 1

    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """Refused: see :meth:`backward_epilogue`."""
        raise _one_gradient("update_hp_grads")

    def clear_lp_grads(self, set_to_none: bool = False) -> None:
        """Refused: they are also what accumulates; :meth:`zero_grad` forgets those."""
        raise _one_gradient("clear_lp_grads")

    def clear_hp_grads(self) -> None:
        """Forget the gradients so far, as :meth:`zero_grad`."""
        self._engine.zero_grad()

    def update_lp_params(self) -> None:
        """Cast the masters into the model's parameters, as each step does."""
        self._engine.parts.partition.publish()

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return optimizer state, masters (``single_partition_of_fp32_groups``) and shapes, under DeepSpeed's keys."""
        return {
            "clip_grad": self.clip_grad,
            "base_optimizer_state": self.optimizer.state_dict(),
            "single_partition_of_fp32_groups": self.single_partition_of_fp32_groups,
            "group_paddings": self.group_paddings,
            "partition_count": self.partition_count,
            "ds_version": ds_core.__version__,
            "param_slice_mappings": self._slices(),
        }

    def _slices(self) -> list[dict[str, dict[str, int]]]:
        """Return where each parameter is in its group's flat tensor: name -> start and numel."""
        names = self._engine.parts.partition.inputs.names
        found = []
        for group in self.bf16_groups:
            at, slices = 0, {}
            for param in group:
                slices[names[param]] = {"start": at, "numel": param.numel()}
                at += param.numel()
            found.append(slices)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], load_optimizer_states: bool = True) -> None:
        """Go on from :meth:`state_dict`. ``clip_grad`` stays as it is here; DeepSpeed overwrites it.

        Raises:
            CheckpointError: it is of other parameters, or divided among ranks; nothing has changed then.
        """
        self._required(state_dict, "ds_version")
        count = self._required(state_dict, "partition_count")
        if any(parts != 1 for parts in count):
            raise CheckpointError(
                f"the state is one of {max(count)} partitions",
                where="BF16_Optimizer.load_state_dict",
                fix="load the whole checkpoint with engine.load_checkpoint",
            )
        flats = self._required(state_dict, "single_partition_of_fp32_groups")
        optimizer = self._required(state_dict, "base_optimizer_state") if load_optimizer_states else None
        self._restore(split(flats, self.fp32_groups), optimizer, {})


def _bf16_section(given: Any) -> dict[str, Any]:
    section = given if given is None or isinstance(given, dict) else given.model_dump()
    return {**(section or {}), "enabled": True}


def _is_world(group: Any) -> bool:
    return group is None or group is torch.distributed.group.WORLD


def _one_gradient(call: str) -> EngineError:
    return EngineError(
        "there is one gradient per parameter here, which accumulates: none in low and another in high precision",
        where=f"BF16_Optimizer.{call}",
        fix="call backward(loss) and step(), of the optimizer or of the engine",
    )
