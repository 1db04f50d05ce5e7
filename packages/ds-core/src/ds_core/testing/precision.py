"""Contract of the seam ``precision``; inherit :class:`PrecisionContract` in a plugin's tests."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core.config import load_config
from ds_core.interfaces.precision import LossScaler, Precision, PrecisionPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ds_core.config import Config

__all__ = ["PrecisionContract"]

OUTCOMES = [False, True, True, False, False, True, False, False, False, True] * 3
"""How thirty steps ended: overflows alone, in a row, and far apart.

Twelve of them: a scale that starts at 2**16 and halves at each stays above 1, where a scaler may give up.
"""


class PrecisionContract:
    """What every precision promises."""

    @pytest.fixture
    def precision_class(self) -> type[Precision]:
        """Override: the class under test."""
        raise NotImplementedError

    @pytest.fixture
    def config_data(self) -> Mapping[str, Any]:
        """Override if needed: the configuration that chooses it."""
        return {}

    @pytest.fixture
    def config(self, config_data: Mapping[str, Any]) -> Config:
        return load_config({"train_micro_batch_size_per_gpu": 1, **config_data})

    @pytest.fixture
    def precision(self, precision_class: type[Precision], config: Config) -> Precision:
        return precision_class(config)

    def test_it_is_built_before_any_process_group(self, precision: Precision) -> None:
        assert isinstance(precision, Precision)
        assert not torch.distributed.is_initialized()

    def test_the_plan_is_dtypes_and_frozen(self, precision: Precision) -> None:
        plan = precision.plan
        assert isinstance(plan, PrecisionPlan)
        for cls in plan.reduce_in or ():
            assert issubclass(cls, torch.nn.Module), cls
        for field in dataclasses.fields(plan):
            if field.name == "reduce_in":
                continue
            dtype = getattr(plan, field.name)
            assert dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point), field.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            plan.stored = torch.float64  # type: ignore[misc]

    def test_all_ranks_build_the_same(self, precision_class: type[Precision], config: Config) -> None:
        first, second = precision_class(config), precision_class(config)
        assert first.plan == second.plan
        assert first.scaler.scale == second.scaler.scale

    def test_the_plan_outlives_steps(self, precision: Precision) -> None:
        before = precision.plan
        for skipped in OUTCOMES:
            precision.after_step(skipped=skipped)
        assert precision.plan == before

    def test_the_scale_is_a_factor(self, precision: Precision) -> None:
        assert isinstance(precision.scaler, LossScaler)
        scales = [precision.scaler.scale]
        for skipped in OUTCOMES:
            precision.after_step(skipped=skipped)
            scales.append(precision.scaler.scale)
        for scale in scales:
            assert isinstance(scale, float)
            assert math.isfinite(scale)
            assert scale > 0

    def test_a_finite_norm_is_no_overflow(self, precision: Precision) -> None:
        for norm in (0.0, 1e-30, 1.0, 1e30):
            assert precision.overflowed(norm) is False

    def test_a_scaled_loss_that_overflowed_is_skipped(self, precision: Precision) -> None:
        for norm in (math.inf, math.nan):
            result = precision.overflowed(norm)
            assert isinstance(result, bool)
            if precision.scaler.scale != 1.0:
                assert result, f"norm {norm} at scale {precision.scaler.scale}"

    def test_what_may_skip_says_so(self, precision: Precision) -> None:
        # Else the partition does not remember which rank had the inf or NaN.
        assert precision.skips_overflow or not (precision.overflowed(math.inf) or precision.overflowed(math.nan))

    def test_overflowed_only_asks(self, precision: Precision) -> None:
        before = precision.scaler.scale, precision.scaler.state_dict()
        for norm in (1.0, math.inf, math.nan):
            precision.overflowed(norm)
        assert (precision.scaler.scale, precision.scaler.state_dict()) == before

    def test_after_step_tells_the_scaler_once(self, precision_class: type[Precision], config: Config) -> None:
        stepped, told = precision_class(config), precision_class(config)
        for skipped in OUTCOMES:
            stepped.after_step(skipped=skipped)
            told.scaler.update(overflowed=skipped)
            assert stepped.scaler.scale == told.scaler.scale

    @pytest.mark.parametrize("saved_at", [0, 1, 5, 8, 27])
    def test_state_continues_exactly(self, precision_class: type[Precision], config: Config, saved_at: int) -> None:
        original, resumed = precision_class(config), precision_class(config)
        for skipped in OUTCOMES[:saved_at]:
            original.after_step(skipped=skipped)
        resumed.scaler.load_state_dict(json.loads(json.dumps(original.scaler.state_dict())))
        assert resumed.scaler.scale == original.scaler.scale
        for skipped in OUTCOMES[saved_at:]:
            original.after_step(skipped=skipped)
            resumed.after_step(skipped=skipped)
            assert resumed.scaler.scale == original.scaler.scale
        assert resumed.scaler.state_dict() == original.scaler.state_dict()

    def test_engines_do_not_share_a_scaler(self, precision_class: type[Precision], config: Config) -> None:
        used, fresh = precision_class(config), precision_class(config)
        before = fresh.scaler.scale, json.dumps(fresh.scaler.state_dict())
        for skipped in OUTCOMES:
            used.after_step(skipped=skipped)
        assert (fresh.scaler.scale, json.dumps(fresh.scaler.state_dict())) == before
