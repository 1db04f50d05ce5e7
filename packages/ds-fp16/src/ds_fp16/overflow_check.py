"""The check for overflow of a loop of one's own, under DeepSpeed's name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ds_core.errors import EngineError
from ds_core.log import logger
from ds_fp16._groups import all_ranks, any_rank, data_group, expert_group, expert_names, model_groups
from ds_fp16._powers import as_list, device_of, is_norm, sum_of_powers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

__all__ = ["CheckOverflow"]


class CheckOverflow:
    """Says whether gradients hold inf or NaN. Large finite ones are no overflow.

    Args:
        param_groups: lists of parameters, or dictionaries with a key ``params``; what :meth:`check` looks at.
        mpu: see the module.
        zero_reduce_scatter: each rank sees other gradients: all ranks ask each other.
        deepspeed: an engine; where its ``enable_backward_allreduce`` is False gradients are not reduced over the
            data-parallel ranks, so those ask each other.
    """

    def __init__(
        self,
        param_groups: Iterable[Any] | None = None,
        mpu: Any = None,
        zero_reduce_scatter: bool = False,
        deepspeed: Any = None,
    ) -> None:
        self.mpu = mpu
        self.zero_reduce_scatter = zero_reduce_scatter
        self.deepspeed = deepspeed
        self.params: list[Tensor] | None = None if param_groups is None else _params_of(param_groups)
        self.has_moe_params = bool(expert_names(self.params or []))

    def check(self, param_groups: Iterable[Any] | None = None) -> bool:
        """Return :meth:`has_overflow` of the parameters in ``param_groups``, None: of those given at construction."""
        params = self.params if param_groups is None else _params_of(param_groups)
        if params is None:
            raise EngineError(
                "there are no parameters to check",
                where="CheckOverflow.check()",
                fix="pass param_groups here or to CheckOverflow",
            )
        return self.has_overflow(params)

    def has_overflow(self, params: Iterable[Tensor], has_moe_params: bool | None = None) -> bool:
        """Return whether a gradient of ``params`` holds inf or NaN, here or on a rank that is asked.

        Asked are the expert groups of ``params``; then all ranks with ``zero_reduce_scatter``, else the
        model-parallel group of mpu (and the data-parallel group, if gradients are not reduced), else all ranks if
        gradients are not reduced. So with plain data parallelism nothing is sent: gradients are reduced already.

        Args:
            params: those without a gradient are passed over.
            has_moe_params: whether expert groups are asked; None: if a parameter has ``allreduce`` False, the mark of
                an expert.

        Raises:
            NotBuiltError: the ranks of an expert group are needed, and mpu does not know them.
        """
        params = list(params)
        groups = self._expert_groups(params, has_moe_params)
        reduced = getattr(self.deepspeed, "enable_backward_allreduce", True) is not False
        if self.zero_reduce_scatter or (self.mpu is None and not reduced):
            groups += all_ranks()
        elif self.mpu is not None:
            groups += model_groups(self.mpu)
            if not reduced:
                group, world_size = data_group(self.mpu)
                groups += [group] if world_size > 1 else []
        return any_rank(self.has_overflow_serial(params), groups, device_of(params))

    def has_overflow_serial(self, params: Iterable[Tensor]) -> bool:
        """Return whether a gradient of ``params`` holds inf or NaN on this rank. Nothing is sent."""
        grads = {index: param.grad for index, param in enumerate(params) if param.grad is not None}
        # One read of all. inf and NaN cannot hide in a sum of squares, but large finite numbers may reach inf there, so
        # only then each is looked at.
        if math.isfinite(sum_of_powers(list(grads.values()), 2.0)):
            return False
        return any(self._has_inf_or_nan(grad, index) for index, grad in grads.items())

    def check_using_norm(self, norm_group: Iterable[float | Tensor], reduce_overflow: bool = True) -> bool:
        """Return whether one of the norms is -1 (or inf, or NaN), here or on a rank that is asked.

        Asked are the expert groups of the parameters given at construction; then the model-parallel group of mpu,
        else all ranks with ``reduce_overflow``.
        """
        groups = self._expert_groups(self.params or [], None)
        if self.mpu is not None:
            groups += model_groups(self.mpu)
        elif reduce_overflow:
            groups += all_ranks()
        overflowed = not all(is_norm(float(norm)) for norm in norm_group)
        return any_rank(overflowed, groups, device_of(self.params or []))

    @staticmethod
    def _has_inf_or_nan(x: Tensor, i: int | None = None) -> bool:
        """Return whether ``x`` holds inf or NaN; ``i`` names it in the debug log."""
        if not x.numel():
            return False
        # Exact in every dtype, and it allocates nothing of the size of x.
        least, greatest = torch.aminmax(x.detach())
        found = not bool(torch.isfinite(least) & torch.isfinite(greatest))
        if found:
            logger.debug("gradient %s, shape %s, holds inf or NaN", i, tuple(x.shape))
        return found

    def _expert_groups(self, params: Sequence[Tensor], wanted: bool | None) -> list[Any]:
        names = expert_names(params)
        if wanted and not names:
            raise EngineError(
                "has_moe_params is True, but no parameter is an expert's",
                where="CheckOverflow.has_overflow",
                fix="mark them with allreduce = False and their group_name, or leave has_moe_params out",
            )
        if wanted is False:
            return []
        groups = (expert_group(self.mpu, name, "CheckOverflow") for name in names)
        return [group for group in groups if group is not None]


def _params_of(param_groups: Iterable[Any]) -> list[Tensor]:
    return [param for group in param_groups for param in as_list(group["params"] if isinstance(group, dict) else group)]
