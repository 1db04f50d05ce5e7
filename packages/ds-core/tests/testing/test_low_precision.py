"""The reference itself: it is plain PyTorch, it knows the scaling rule, and its comparison sees what is wrong."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from ds_core.testing.low_precision import PRECISIONS, Scaler, differences, emulate
from ds_core.testing.reference import BATCH_NORM, Case, build_model, loss_of, micro_batch, reference

CASES = [Case("all", precision=precision, accumulation=2) for precision in PRECISIONS]


def test_the_scaler_has_the_traces_of_deepspeed():
    # spec section 4, seen on 0.19.6: 16, window 2, hysteresis 2.
    scaler, found = Scaler(16.0, window=2), []
    for overflow in (1, 1, 1, 0, 0, 0, 1, 1, 0):
        scaler.update(bool(overflow))
        found.append((scaler.scale, scaler.left))
    assert found == [(16, 1), (8, 1), (4, 1), (4, 1), (4, 1), (8, 2), (8, 1), (4, 1), (4, 1)]


def test_in_fp32_it_is_the_other_reference():
    case = Case("all", accumulation=2, clipping=0.05, optimizer="AdamW")
    mine, expected = reference(case, 2), emulate(case, 2)
    for step in range(3):
        assert mine.losses[step] == pytest.approx(expected.losses[step], abs=2**-18)
        assert mine.norms[step] == pytest.approx(expected.norms[step], rel=2**-18)
        for name, weight in expected.weights[step].items():
            torch.testing.assert_close(mine.weights[step][name], weight, rtol=2**-16, atol=2**-16)


def test_in_bf16_its_gradient_is_that_of_the_model_in_bf16():
    case = Case("plain", precision="bf16")
    model = build_model(case)
    for param in model.parameters():
        param.data = param.data.bfloat16()
    loss_of(model(*micro_batch(0, 0, 0))).backward()
    expected = emulate(case, 1, steps=1)
    for name, param in model.named_parameters():
        assert torch.equal(param.grad, expected.gradients[0][name])
        assert expected.gradient_bounds[0][name] == 0.0


def test_the_scale_changes_nothing_but_the_gradients():
    case = Case("all", precision="fp16")
    small, large = (emulate(case, 1, scaler=Scaler(scale, window=1000)) for scale in (256.0, 2048.0))
    for name, gradient in small.gradients[0].items():
        if gradient is not None:
            assert (8 * gradient - large.gradients[0][name]).norm() <= 2**-9 * large.gradients[0][name].norm()
    for name, master in small.masters[0].items():
        torch.testing.assert_close(master, large.masters[0][name], rtol=2**-10, atol=2**-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.precision)
def test_a_step_that_never_was_leaves_no_trace(case):
    never = emulate(case, 2, never=(1,))
    assert never.skipped == [False, True, False]
    assert all(torch.equal(value, never.weights[0][name]) for name, value in never.weights[1].items())
    assert all(torch.equal(value, never.masters[0][name]) for name, value in never.masters[1].items())
    assert not all(torch.equal(value, never.weights[1][name]) for name, value in never.weights[2].items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.precision)
def test_the_comparison_accepts_itself_and_little_else(case):
    expected = emulate(case, 2)
    assert differences(expected, emulate(case, 2, follow=expected)) == []
    changes = {
        "gradient of norm.bias": lambda trace: trace.gradients[1]["norm.bias"].mul_(1.1),
        "gradient of sometimes.bias is None": lambda trace: trace.gradients[0].update({"sometimes.bias": None}),
        "weight norm.bias": lambda trace: trace.weights[2]["norm.bias"].add_(0.1),
        "norm is": lambda trace: trace.norms.__setitem__(1, trace.norms[1] * 1.1),
        "loss is": lambda trace: trace.losses[0].__setitem__(0, 0.0),
        "buffer scale": lambda trace: trace.buffers[1]["scale"].add_(1.0),
        "scales is": lambda trace: trace.scales.__setitem__(2, 3.0),
        "skipped is": lambda trace: trace.skipped.__setitem__(0, True),
        "before any step: weight": lambda trace: (
            trace.start_weights["head.weight"].add_(2**-6)
            if "head.weight" in trace.start_weights
            else trace.start_weights["embed.weight"].add_(2**-6)
        ),
    }
    for problem, change in changes.items():
        wrong = copy.deepcopy(expected)
        change(wrong)
        assert any(problem in found for found in differences(wrong, expected)), problem


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.precision)
def test_a_gradient_of_zero_is_exact_and_moves_the_weights(case):
    expected = emulate(case, 2, zero=(1,))
    assert expected.skipped == [False] * 3
    assert expected.norms[1] == 0.0
    for name, gradient in expected.gradients[1].items():
        assert gradient is None or not gradient.count_nonzero(), name
    # Momentum and weight decay act.
    assert not torch.equal(expected.weights[0]["norm.bias"], expected.weights[1]["norm.bias"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "autocast bf16"])
def test_each_rank_has_batch_statistics_of_its_own(precision):
    case = Case(BATCH_NORM, accumulation=2, precision=precision)
    of_ranks = [emulate(case, 2, rank) for rank in range(2)]
    stored = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    for rank, trace in enumerate(of_ranks):
        assert trace.buffers[0]["batch.running_mean"].dtype == stored
        # As many as this rank's own micro-batches.
        assert [buffers["batch.num_batches_tracked"].item() for buffers in trace.buffers] == [2, 4, 6]
        # The first step is at the weights given: it is that of a model which saw nobody else's batches.
        alone = emulate(replace(case, accumulation=1), 1, steps=1, data=lambda *at, rank=rank: micro_batch(0, 0, rank))
        twice = emulate(case, 1, steps=1, data=lambda *at, rank=rank: micro_batch(0, at[1], rank))
        assert not torch.equal(alone.buffers[0]["batch.running_mean"], trace.buffers[0]["batch.running_mean"])
        assert torch.equal(twice.buffers[0]["batch.running_mean"], trace.buffers[0]["batch.running_mean"])
    first, second = (trace.buffers[0]["batch.running_mean"] for trace in of_ranks)
    assert not torch.equal(first, second)


def test_a_step_that_never_was_had_a_forward():
    expected = emulate(Case(BATCH_NORM, precision="bf16"), 2, never=(1,))
    assert [len(losses) for losses in expected.losses] == [1, 1, 1]
    assert [buffers["batch.num_batches_tracked"].item() for buffers in expected.buffers] == [1, 2, 3]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_master_that_is_off_is_seen_where_the_weight_is_not(precision):
    case = Case("plain", precision=precision)
    expected = emulate(case, 2)
    wrong = copy.deepcopy(expected)
    # Less than half of what the stored dtype can tell apart.
    wrong.masters[0]["embed.weight"].mul_(1 + 2**-13)
    assert any("weight embed.weight is off" in found for found in differences(wrong, expected))
