"""Overflows: what a record says, which module it names, what is logged and how often, and what an error tells."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from ds_core.engine.overflow import OverflowHistory, OverflowRecord, describe
from ds_core.errors import LossScaleError
from ds_core.interfaces.logical import logical_name
from ds_core.interfaces.partition import OverflowSource


def record(step: int = 12, **changes: Any) -> OverflowRecord:
    given: dict[str, Any] = {
        "scale": 65536.0,
        "parameter": "blocks.0.mlp.up.weight",
        "module": "blocks.0.mlp.up",
        "module_type": "Linear",
        "ranks": (1,),
        "norm": math.inf,
        "skipped": True,
    }
    return OverflowRecord(step, **{**given, **changes})


def of_module(name: str, step: int = 1) -> OverflowRecord:
    return record(step, parameter=f"{name}.weight", module=name)


# -- a record -------------------------------------------------------------------------------------------------------

IN_UP = "inf or NaN in blocks.0.mlp.up.weight (Linear 'blocks.0.mlp.up')"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, f"step 12 at loss scale 65536: {IN_UP} on rank 1; skipped"),
        ({"scale": 2.0**24}, f"step 12 at loss scale 16777216: {IN_UP} on rank 1; skipped"),
        ({"scale": 0.5}, f"step 12 at loss scale 0.5: {IN_UP} on rank 1; skipped"),
        ({"scale": 1.0}, f"step 12: {IN_UP} on rank 1; skipped"),
        ({"scale": 1.0, "skipped": False}, f"step 12: {IN_UP} on rank 1; applied"),
        ({"ranks": (0, 3)}, f"step 12 at loss scale 65536: {IN_UP} on ranks 0, 3; skipped"),
        (
            {"ranks": tuple(range(512))},
            f"step 12 at loss scale 65536: {IN_UP} on ranks 0, 1, 2, 3, 4, 5, 6, 7, ... (512 in all); skipped",
        ),
        ({"ranks": ()}, f"step 12 at loss scale 65536: {IN_UP}, finite on every rank, not in their sum; skipped"),
        ({"ranks": None}, f"step 12 at loss scale 65536: {IN_UP}, rank not known; skipped"),
        (
            {"parameter": "w", "module": "", "module_type": "Net"},
            "step 12 at loss scale 65536: inf or NaN in w (Net, the model itself) on rank 1; skipped",
        ),
        (
            {"parameter": "w", "module": None, "module_type": None},
            "step 12 at loss scale 65536: inf or NaN in w on rank 1; skipped",
        ),
        (
            {"parameter": None, "module": None, "module_type": None, "ranks": ()},
            "step 12 at loss scale 65536: every gradient is finite, but the norm of all is inf; skipped",
        ),
    ],
)
def test_a_record_is_one_line(changes, line):
    assert str(record(**changes)) == line


@pytest.mark.parametrize(("ranks", "rank"), [((2, 3), 2), ((0,), 0), ((), None), (None, None)])
def test_the_rank_is_the_first(ranks, rank):
    assert record(ranks=ranks).rank == rank


def test_a_record_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().step = 3


# -- which module ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Tied and nested parameters, one of the model itself, and a compiled part."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(2))
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)])
        self.blocks[1] = torch.compile(self.blocks[1], backend="eager")
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.blocks[0]


def found(parameter: str | None, module: nn.Module, **changes: Any) -> OverflowRecord:
    given: dict[str, Any] = {"step": 3, "scale": 8.0, "norm": math.nan, "skipped": True}
    return describe(OverflowSource(parameter, (1,)), module, **{**given, **changes})


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("parameter", "module", "module_type"),
    [
        ("own", "", "Net"),
        ("embed.weight", "embed", "Embedding"),  # tied to head.weight, whose name comes later
        ("blocks.0.0.weight", "blocks.0.0", "Linear"),
        ("blocks.0.1.bias", "blocks.0.1", "LayerNorm"),
        ("blocks.1.0.bias", "blocks.1.0", "Linear"),
        ("of.a.partition.alone", None, None),
        (None, None, None),
    ],
)
def test_the_module_of_a_parameter_is_named(parameter, module, module_type, compiled):
    model = torch.compile(Net(), backend="eager") if compiled else Net()
    described = found(parameter, model)
    assert (described.parameter, described.module, described.module_type) == (parameter, module, module_type)


def test_every_parameter_of_a_model_has_a_module():
    model = torch.compile(Net(), backend="eager")
    modules = {logical_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    for name, param in model.named_parameters():
        described = found(logical_name(name), model)
        assert described.module is not None, name
        own = dict(modules[described.module].named_parameters(recurse=False))
        assert own[name.rpartition(".")[2]] is param
        assert described.module_type == type(modules[described.module]).__name__


def test_a_record_keeps_what_the_engine_and_the_partition_said():
    described = describe(OverflowSource("own", (0, 2)), Net(), step=7, scale=4.0, norm=math.inf, skipped=False)
    assert described == OverflowRecord(7, 4.0, "own", "", "Net", (0, 2), math.inf, False)


# -- the history ----------------------------------------------------------------------------------------------------


def test_the_last_records_are_kept_and_all_are_counted():
    history = OverflowHistory(3)
    for step in range(1, 6):
        history.note(of_module("a" if step < 5 else "b", step))
    assert [kept.step for kept in history.records] == [3, 4, 5]
    assert history.count == 5
    assert history.worst_modules(5) == [("a", 4), ("b", 1)]


def test_the_worst_modules_come_first_and_equals_in_the_order_they_were_met():
    history = OverflowHistory()
    for name in ("late", "b", "worst", "b", "worst", "worst", ""):
        history.note(of_module(name))
    history.note(record(parameter=None, module=None, module_type=None))
    assert history.worst_modules(3) == [("worst", 3), ("b", 2), ("late", 1)]
    assert history.worst_modules(9) == [("worst", 3), ("b", 2), ("late", 1), ("", 1)]
    assert OverflowHistory().worst_modules(3) == []


def test_histories_share_nothing():
    first, second = OverflowHistory(), OverflowHistory()
    first.note(record())
    assert second.records == ()
    assert second.worst_modules(1) == []


# -- the error ------------------------------------------------------------------------------------------------------


class ScaleAtMinimumError(LossScaleError):
    pass


OTHERWISE = (
    "lower the learning rate, clip harder (gradient_clipping), "
    "or train in bf16 (bf16.enabled), which needs no loss scale; none of it cures a NaN in data or weights"
)


def test_an_error_tells_the_last_events_the_worst_modules_and_where_to_look():
    history = OverflowHistory(is_dynamic=True)
    history.note(of_module("embed", 1))
    for step in range(2, 12):
        history.note(record(step, scale=2.0 ** (11 - step)))
    given = LossScaleError("gradients overflow at the smallest loss scale, 1", where="fp16.min_loss_scale", fix="rest")
    lines = str(history.explain(given)).splitlines()
    assert lines == [
        "gradients overflow at the smallest loss scale, 1",
        "  last overflows, 8 of 11:",
        *(f"    step {step} at loss scale {2 ** (11 - step)}: {IN_UP} on rank 1; skipped" for step in range(4, 12)),
        "  first in, most often:",
        "    Linear 'blocks.0.mlp.up': 10 of 11",
        "    Linear 'embed': 1 of 11",
        "  where: fp16.min_loss_scale",
        f"  fix: look at Linear 'blocks.0.mlp.up': normalise its input, {OTHERWISE}",
    ]
    # The last event is at scale 1, and says so: that is how far the scale fell.
    assert "step 11 at loss scale 1:" in lines[9]


def test_an_explained_error_is_a_new_one_of_the_same_kind():
    history = OverflowHistory()
    history.note(record())
    given = ScaleAtMinimumError("at the minimum", where="here", fix="this")
    explained = history.explain(given)
    assert type(explained) is ScaleAtMinimumError
    assert explained is not given
    assert (given.what, given.where, given.fix) == ("at the minimum", "here", "this")
    assert explained.where == "here"


def test_an_error_without_a_known_module_still_says_what_to_do():
    history = OverflowHistory()
    history.note(record(parameter=None, module=None, module_type=None, ranks=()))
    text = str(history.explain(LossScaleError("at the minimum")))
    assert "every gradient is finite, but the norm of all is inf" in text
    assert "most often" not in text
    assert f"  fix: {OTHERWISE}" in text


def test_an_error_before_any_record_is_as_it_was_but_for_the_fix():
    assert OverflowHistory().explain(LossScaleError("at the minimum", where="here")).what == "at the minimum"


# -- the log --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(caplog, monkeypatch):
    """The (level, text) logged so far, by this process as rank 0."""
    monkeypatch.delenv("RANK", raising=False)
    with caplog.at_level(logging.INFO, "ds_core"):
        yield lambda: [(entry.levelno, entry.message) for entry in caplog.records]


def test_of_overflows_in_a_row_the_1st_2nd_4th_and_8th_are_logged(lines):
    history = OverflowHistory(is_dynamic=True)
    for step in range(1, 16):
        history.note(record(step))
    assert [text.split(" at ")[0] for _, text in lines()] == ["step 1", "step 2", "step 4", "step 8"]
    assert ["in a row" in text for _, text in lines()] == [False, True, True, True]
    assert "; skipped (4 in a row). " in lines()[2][1]


def test_a_good_step_ends_a_row(lines):
    history = OverflowHistory(is_dynamic=True)
    for step in range(1, 10):
        if step % 3 == 0:
            history.good_step()
        else:
            history.note(record(step))
    assert [text.split(" at ")[0] for _, text in lines()] == [f"step {step}" for step in (1, 2, 4, 5, 7, 8)]


def test_the_lines_between_are_for_debugging(caplog):
    history = OverflowHistory(is_dynamic=True)
    with caplog.at_level(logging.DEBUG, "ds_core"):
        for step in range(1, 6):
            history.note(record(step))
    levels = [entry.levelno for entry in caplog.records]
    assert levels == [logging.INFO, logging.INFO, logging.DEBUG, logging.INFO, logging.DEBUG]


def test_only_rank_0_speaks(lines, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    OverflowHistory().note(record())
    assert lines() == []
    monkeypatch.setenv("RANK", "0")
    OverflowHistory().note(record())
    assert len(lines()) == 1


@pytest.mark.parametrize("scale", [65536.0, 1.0])
def test_under_a_moving_scale_it_is_expected(lines, scale):
    OverflowHistory(is_dynamic=True).note(record(scale=scale))
    line = f"step 12 at loss scale {scale:.0f}: {IN_UP} on rank 1; skipped. "
    assert lines() == [(logging.INFO, line + "Expected now and then: the loss scale adapts")]


def test_a_scale_that_keeps_falling_is_not_expected_any_more(lines):
    history = OverflowHistory(is_dynamic=True)
    for step in range(1, 9):
        history.note(record(step))
    level, text = lines()[-1]
    assert level == logging.INFO
    assert text.endswith(
        "; skipped (8 in a row). Lowering the loss scale does not help: lower the learning rate or clip "
        "(gradient_clipping), and look at what goes into blocks.0.mlp.up"
    )


def test_a_scale_that_stays_must_be_lowered(lines):
    OverflowHistory().note(record(scale=128.0))
    ((level, text),) = lines()
    assert level == logging.INFO
    assert text.endswith("; skipped. If it goes on, lower fp16.loss_scale, or set it to 0 to have it found")


def test_without_a_scale_it_is_a_warning(lines):
    OverflowHistory().note(record(scale=1.0))
    advice = "If it goes on, lower the learning rate or clip (gradient_clipping), and look at what goes into "
    line = f"step 12: {IN_UP} on rank 1; skipped. {advice}blocks.0.mlp.up"
    assert lines() == [(logging.WARNING, line)]


def test_an_applied_step_left_weights_that_are_not_finite(lines):
    history = OverflowHistory()
    for step in range(1, 5):
        history.note(record(step, scale=1.0, skipped=False, module="", module_type="Net"))
    assert [level for level, _ in lines()] == [logging.WARNING] * 3
    assert lines()[0][1].endswith(
        "; applied. The weights are now not finite: load the last checkpoint, lower the learning rate or clip "
        "(gradient_clipping), and look at what goes into the model"
    )


def test_finite_gradients_of_too_great_a_norm_leave_finite_weights(lines):
    nobody: dict[str, Any] = {"parameter": None, "module": None, "module_type": None, "ranks": ()}
    OverflowHistory().note(record(scale=1.0, skipped=False, **nobody))
    line = "step 12: every gradient is finite, but the norm of all is inf; applied. "
    assert lines() == [
        (logging.WARNING, line + "If it goes on, lower the learning rate or clip (gradient_clipping)"),
    ]
