"""The precision report: what it says is read from the engine's tensors, whatever the configuration asked for."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import registry
from ds_core.engine.precision_report import GroupPrecision, PrecisionReport, precision_report
from ds_core.errors import EngineError
from ds_core.interfaces.precision import Precision, PrecisionPlan
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.5,
    "log_level": "error",
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
}
F16, BF16, F32, F64 = ("float16",), ("bfloat16",), ("float32",), ("float64",)


class Model(nn.Module):
    """Two trained layers, a frozen one, buffers of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.first.weight.dtype
        return self.norm(self.frozen(self.first(x.to(dtype)))).float().square().mean()


def start(model: nn.Module | None = None, **changes: Any):
    config = {**CONFIG, **changes.pop("config", {})}
    return ds_core.initialize(model=Model() if model is None else model, config=config, **changes)[0]


def step(engine, factor: float = 1.0) -> None:
    engine.backward(engine(torch.ones(2, 3)) * factor)
    engine.step()


class Scaler:
    def __init__(self, scale: float, dynamic: bool) -> None:
        self.scale, self.dynamic = scale, dynamic

    def update(self, *, overflowed: bool) -> None:
        if overflowed and self.dynamic:
            self.scale /= 2

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale = state["scale"]


@pytest.fixture
def start_in(monkeypatch):
    """Start an engine in a precision of these tests' own."""

    def start_in(plan: PrecisionPlan, *, scaler: Scaler, skips: bool = True, **changes: Any):
        class Own(Precision):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.skips_overflow, self._scaler = skips, scaler

            @property
            def plan(self) -> PrecisionPlan:
                return plan

            @property
            def scaler(self) -> Scaler:
                return self._scaler

            def overflowed(self, norm: float) -> bool:
                return skips and not math.isfinite(norm)

        load = registry.load

        def load_own(seam: str, name: str, **others: Any) -> Any:
            return Own if (seam, name) == ("precision", "own") else load(seam, name, **others)

        monkeypatch.setattr(registry, "load", load_own)
        return start(**{**changes, "config": {"precision": {"type": "own"}, **changes.get("config", {})}})

    return start_in


HALF = PrecisionPlan(stored=torch.float16, master=torch.float32, reduce=torch.float16, input_cast=torch.float16)


# -- fp32 -----------------------------------------------------------------------------------------------------------


def test_fp32_before_and_after_the_first_step():
    engine = start()
    before = precision_report(engine)
    trained = GroupPrecision("0", 4, 24, F32, F32, F32, F32, master=(), optimizer=())
    frozen = GroupPrecision("frozen", 1, 16, F32, F32)
    assert before == PrecisionReport(
        precision="Fp32",
        world_size=1,
        loss_scale=1.0,
        is_loss_scale_dynamic=False,
        steps=0,
        skipped_steps=0,
        autocast=None,
        input_cast=None,
        buffers=("float32", "int64"),
        overflow_policy="a step with inf or NaN is applied, as in plain PyTorch, and logged",
        rows=(trained, frozen),
    )
    step(engine)
    slots = (("step", F32), ("exp_avg", F32), ("exp_avg_sq", F32))
    after = dataclasses.replace(before, steps=1, rows=(dataclasses.replace(trained, optimizer=slots), frozen))
    assert precision_report(engine) == after


def test_it_prints_as_a_table():
    engine = start()
    text = str(precision_report(engine))
    assert text.splitlines() == [
        "precision       Fp32",
        "loss scale      none",
        "skipped steps   0 of 0",
        "autocast        none",
        "inputs cast to  not cast",
        "buffers         float32, int64",
        "ranks           1, so nothing is reduced",
        "on overflow     a step with inf or NaN is applied, as in plain PyTorch, and logged",
        "",
        "group   parameters  elements  storage  compute  gradient  reduction  master  optimizer",
        "0                4        24  float32  float32  float32   float32    -       none yet",
        "frozen           1        16  float32  float32  -         -          -       -",
    ]
    step(engine)
    lines = str(precision_report(engine)).splitlines()
    assert lines[2] == "skipped steps   0 of 1"
    assert lines[-2].endswith("  float32 (step, exp_avg, exp_avg_sq)")


def test_an_optimizer_without_state_is_not_waited_for():
    engine = start(config={"optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
    assert str(precision_report(engine)).splitlines()[-2].endswith("  none yet")
    step(engine)
    assert str(precision_report(engine)).splitlines()[-2].endswith("  none")


def test_every_group_has_a_row():
    model = Model()
    groups = [{"params": list(model.first.parameters())}, {"params": [model.norm.weight], "lr": 0.1}]
    rows = precision_report(start(model, model_parameters=groups)).rows
    sizes = {row.name: (row.parameters, row.elements) for row in rows}
    assert sizes == {"0": (2, 16), "1": (1, 4), "no optimizer": (1, 4), "frozen": (1, 16)}
    assert list(sizes) == ["0", "1", "no optimizer", "frozen"]
    outside = rows[2]
    assert (outside.gradient, outside.reduction, outside.master, outside.optimizer) == ((), (), (), ())


def test_an_engine_that_only_runs_forward_has_no_groups():
    report = precision_report(start(config={"optimizer": None}))
    assert [(row.name, row.parameters) for row in report.rows] == [("no optimizer", 4), ("frozen", 1)]
    assert str(report).count("none yet") == 0


def test_mixed_dtypes_are_all_named():
    model = Model()
    model.norm.weight.data = model.norm.weight.data.double()
    model.norm.forward = lambda x: x * model.norm.weight
    engine = start(model)
    step(engine)
    row = precision_report(engine).rows[0]
    both = ("float32", "float64")
    assert (row.storage, row.compute, row.gradient, row.reduction, row.master) == (both, both, both, both, ())
    # Each moment is like its parameter, and torch counts steps in float32.
    assert dict(row.optimizer) == {"step": F32, "exp_avg": both, "exp_avg_sq": both}
    assert "float32, float64 (exp_avg, exp_avg_sq)" in str(precision_report(engine))


def test_it_says_what_is_and_not_what_was_asked_for():
    engine = start()
    step(engine)
    engine.module.first.weight.data = engine.module.first.weight.data.to(torch.bfloat16)
    engine.module.mean = engine.module.mean.double()
    engine.optimizer.state[engine.module.norm.bias]["exp_avg"] = torch.zeros(4, dtype=torch.float16)
    report = precision_report(engine)
    assert report.rows[0].storage == ("bfloat16", "float32")
    assert dict(report.rows[0].optimizer)["exp_avg"] == ("float16", "float32")
    assert report.buffers == ("float64", "int64")


def test_state_that_is_no_tensor_has_the_name_of_its_type():
    engine = start()
    engine.optimizer.state[engine.module.norm.bias] = {"count": 3, "moment": torch.zeros(4)}
    assert precision_report(engine).rows[0].optimizer == (("count", ("int",)), ("moment", F32))


def test_a_model_without_buffers_has_none():
    report = precision_report(start(nn.Linear(2, 2)))
    assert report.buffers == ()
    assert "buffers         none" in str(report)


def test_a_destroyed_engine_has_no_report():
    engine = start()
    engine.destroy()
    with pytest.raises(EngineError, match="destroyed"):
        precision_report(engine)


# -- lower precisions -----------------------------------------------------------------------------------------------


def test_low_precision_with_masters(start_in):
    engine = start_in(HALF, scaler=Scaler(1024.0, dynamic=True))
    step(engine)
    report = precision_report(engine)
    assert report.rows[0] == GroupPrecision(
        "0", 4, 24, F16, F16, F16, F16, F32, (("step", F32), ("exp_avg", F32), ("exp_avg_sq", F32))
    )
    assert report.rows[1] == GroupPrecision("frozen", 1, 16, F16, F16)
    assert (report.precision, report.input_cast, report.autocast) == ("Own", "float16", None)
    assert report.buffers == ("float32", "int64")
    assert "inputs cast to  float16" in str(report)


def test_a_parameter_that_is_stored_as_its_master_would_be_has_none(start_in):
    plan = dataclasses.replace(HALF, stored=torch.float32)
    assert precision_report(start_in(plan, scaler=Scaler(1.0, dynamic=False))).rows[0].master == ()


def test_gradients_accumulate_in_a_dtype_of_their_own(start_in):
    plan = dataclasses.replace(HALF, accumulate=torch.float32, stored=torch.bfloat16, reduce=torch.bfloat16)
    engine = start_in(plan, scaler=Scaler(1.0, dynamic=False))
    step(engine)
    row = precision_report(engine).rows[0]
    assert (row.storage, row.gradient, row.reduction, row.master) == (BF16, F32, BF16, F32)


def test_skipped_steps_and_the_scale_are_those_of_now(start_in):
    engine = start_in(HALF, scaler=Scaler(1024.0, dynamic=True))
    step(engine, math.inf)
    report = precision_report(engine)
    assert (report.steps, report.skipped_steps, report.loss_scale) == (1, 1, 512.0)
    lines = str(report).splitlines()
    assert lines[1:3] == ["loss scale      512, moves", "skipped steps   1 of 1"]
    # Nothing was updated, so there is no state.
    assert lines[-2].endswith("  none yet")


@pytest.mark.parametrize(
    ("scaler", "skips", "scale", "policy"),
    [
        (
            Scaler(2.0**20, dynamic=True),
            True,
            "1048576, moves",
            "a step with inf or NaN is skipped and logged, and the loss scale learns of it",
        ),
        (Scaler(1.0, dynamic=True), True, "1, moves", "and the loss scale learns of it"),
        (Scaler(128.0, dynamic=False), True, "128, fixed", "a step with inf or NaN is skipped and logged"),
        (Scaler(1.0, dynamic=False), True, "none", "a step with inf or NaN is skipped and logged"),
        (
            Scaler(1.0, dynamic=False),
            False,
            "none",
            "a step with inf or NaN is applied, as in plain PyTorch, and logged",
        ),
    ],
)
def test_scale_and_policy_in_words(start_in, scaler, skips, scale, policy):
    lines = str(precision_report(start_in(HALF, scaler=scaler, skips=skips))).splitlines()
    assert lines[1] == f"loss scale      {scale}"
    assert lines[7].startswith("on overflow     a step with inf or NaN is ")
    assert lines[7].endswith(policy)


def test_autocast_computes_lower_what_it_casts(start_in):
    model = Model()
    model.norm.weight.data = model.norm.weight.data.double()
    plan = PrecisionPlan(autocast=torch.bfloat16, reduce=torch.bfloat16, reduce_in=(nn.Linear,))
    report = precision_report(start_in(plan, scaler=Scaler(1.0, dynamic=False), model=model))
    row, frozen = report.rows
    assert row.storage == ("float32", "float64")
    assert row.compute == ("bfloat16", "float64")
    # Those of Linear in bfloat16, those of LayerNorm as they are.
    assert row.reduction == ("bfloat16", "float32", "float64")
    assert (frozen.storage, frozen.compute) == (F32, BF16)
    assert "autocast        bfloat16" in str(report)


def test_autocast_really_leaves_float64_alone():
    weight = torch.ones(2, 2, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.mm(weight, weight).dtype == torch.float64
        assert torch.mm(weight.float(), weight.float()).dtype == torch.bfloat16


def test_ranks_are_told():
    report = dataclasses.replace(precision_report(start()), world_size=4)
    assert "ranks           4" in str(report).splitlines()


# -- for programs ---------------------------------------------------------------------------------------------------


def test_to_dict_is_json(start_in):
    engine = start_in(HALF, scaler=Scaler(1024.0, dynamic=True))
    step(engine)
    found = precision_report(engine).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {field.name for field in dataclasses.fields(PrecisionReport)}
    assert found["loss_scale"] == 1024.0
    assert found["buffers"] == ["float32", "int64"]
    trained, frozen = found["rows"]
    assert set(trained) == {field.name for field in dataclasses.fields(GroupPrecision)}
    assert trained["master"] == ["float32"]
    assert trained["optimizer"] == {"step": ["float32"], "exp_avg": ["float32"], "exp_avg_sq": ["float32"]}
    assert (frozen["name"], frozen["gradient"], frozen["optimizer"]) == ("frozen", [], {})


def test_a_report_stays_as_it_was():
    engine = start()
    report = precision_report(engine)
    text = str(report)
    step(engine)
    assert str(report) == text
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.loss_scale = 2.0
