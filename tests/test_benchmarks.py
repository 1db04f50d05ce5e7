"""The pure parts of benchmarks/: interval, rule of the bars, order of turns, rows and reports. Nothing is timed."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(
    str(BENCHMARKS)
)  # the scripts find each other as their own folder does; last, so that nothing is hidden

from _contenders import DTYPES, SCALE_POWER, Contender, DdpLoop, DsCore, PlainLoop, Recipe, largest_difference  # noqa: E402
from _models import GPT_SIZES, Gpt, Mlp, byte_batches  # noqa: E402
from _pairs import Bar, Interval, PairTimes, median_interval, time_pairs  # noqa: E402
from _ranks import launcher_ranks, threads_per_rank, usable_cores  # noqa: E402
from _report import difference_row, exact_ratio_row, finish, interval_text, limit_row, machine_facts, ratio_row  # noqa: E402
from _sharded import has_deepspeed  # noqa: E402
from activation import SECTIONS, Configured, budget_of_auto, parse, ranks_of  # noqa: E402
from zero_memory import formula  # noqa: E402

from ds_core.errors import ConfigError  # noqa: E402

no_deadline = settings(deadline=None)  # a busy machine is no failure
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("[!_]*.py"))
numbers = st.floats(min_value=1e-6, max_value=1e6)
TWICE = ("--accumulation", "2")
samples = st.lists(numbers, min_size=1, max_size=60)


class FakeMachine:
    """A clock that a turn moves by hand, in the place of the ranks."""

    def __init__(self, other_rank_s: float = 0.0) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self._other_rank_s = other_rank_s

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.now += seconds

    def align(self) -> None:
        self.calls.append("align")
        self.now += 100.0  # waiting for the others is nobody's time

    def finish(self) -> None:
        self.calls.append("finish")
        self.now += 0.5

    def slowest(self, seconds: float) -> float:
        return max(seconds, self._other_rank_s)


# --- the interval


def test_the_interval_of_fifteen_lies_between_the_fourth_and_the_fifth() -> None:
    found = median_interval([float(i) for i in range(1, 16)])
    # P(4 <= Bin(15, 1/2) <= 11) and P(5 <= Bin <= 10), counted by hand from the binomial coefficients.
    outer = 1 - 2 * (1 + 15 + 105 + 455) / 2**15
    inner = outer - 2 * 1365 / 2**15
    i = (outer - 0.9) / (outer - inner)
    weight = 11 * i / (4 + 7 * i)
    assert found.median == 8
    assert found.lower == pytest.approx(4 + weight)
    assert found.upper == pytest.approx(12 - weight)
    assert (found.confidence, found.count) == (0.9, 15)


def test_a_confidence_that_order_statistics_reach_needs_no_interpolation() -> None:
    coverage = 1 - 2 * (1 + 15 + 105 + 455) / 2**15
    found = median_interval([float(i) for i in range(1, 16)], coverage)
    assert (found.lower, found.upper) == (4, 12)


@pytest.mark.parametrize(("count", "reached"), [(1, 0.0), (2, 0.5), (3, 0.75), (4, 0.875)])
def test_too_few_samples_give_the_extremes_and_say_what_they_reach(count: int, reached: float) -> None:
    found = median_interval([float(i) for i in range(count)])
    assert (found.lower, found.upper) == (0, count - 1)
    assert found.confidence == reached


def test_five_samples_reach_the_confidence() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]).confidence == 0.9


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.gauss(0, 1),
        lambda rng: rng.random() - 0.5,
        lambda rng: rng.choice((-1, 1)) * rng.expovariate(1),
        lambda rng: math.tan(math.pi * (rng.random() - 0.5)),
    ],
    ids=["normal", "uniform", "double exponential", "cauchy"],
)
@pytest.mark.parametrize("count", [15, 20])
def test_the_interval_encloses_the_true_median_nine_times_in_ten(draw, count: int) -> None:
    rng = random.Random(7)
    trials = 4000
    hits = 0
    for _ in range(trials):
        found = median_interval([draw(rng) for _ in range(count)])
        hits += found.lower <= 0 <= found.upper
    # The method is off by at most 0.01, the trials by three standard deviations: 3 * sqrt(0.9 * 0.1 / 4000) = 0.0142.
    assert hits / trials == pytest.approx(0.9, abs=0.01 + 0.0142)


@no_deadline
@given(samples)
def test_the_interval_encloses_the_median_and_stays_within_the_samples(values: list[float]) -> None:
    found = median_interval(values)
    assert min(values) <= found.lower <= found.median <= found.upper <= max(values)
    assert found.median == statistics.median(values)
    assert found.count == len(values)


@no_deadline
@given(samples, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(values: list[float], rng: random.Random) -> None:
    shuffled = list(values)
    rng.shuffle(shuffled)
    assert median_interval(shuffled) == median_interval(values)


@no_deadline
@given(samples, st.sampled_from([0.25, 2.0, 1024.0]))
def test_the_interval_scales_with_the_unit(values: list[float], unit: float) -> None:
    # Powers of two, so that scaling rounds nothing.
    one, other = median_interval(values), median_interval([value * unit for value in values])
    assert (other.lower, other.median, other.upper) == (one.lower * unit, one.median * unit, one.upper * unit)


@no_deadline
@given(st.lists(numbers, min_size=5, max_size=40))
def test_more_confidence_means_a_wider_interval(values: list[float]) -> None:
    narrow, wide = median_interval(values, 0.5), median_interval(values, 0.9)
    # Both are interpolated; a hair for the rounding of it.
    hair = 1e-9 * max(values)
    assert wide.lower <= narrow.lower + hair
    assert narrow.upper <= wide.upper + hair


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_samples_that_say_nothing_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one sample, all finite"):
        median_interval(values)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0])
def test_an_impossible_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        median_interval([1.0], confidence)


# --- the bar


@pytest.mark.parametrize(
    ("lower", "median", "met"),
    [
        (0.90, 0.95, True),
        (1.00, 1.05, True),  # both at their limit
        (1.01, 1.02, False),  # certainly above 1, if by little
        (0.80, 1.06, False),  # noise must not hide a median that is too high
    ],
)
def test_the_rule_for_bars(lower: float, median: float, met: bool) -> None:
    assert Bar(1.0).met(Interval(median, lower, 2.0, 0.9, 15)) is met


def test_fewer_than_fifteen_pairs_give_no_verdict() -> None:
    assert Bar(1.0).met(Interval(0.5, 0.4, 0.6, 0.9, 14)) is None


def test_a_bar_without_slack_holds_the_median_itself() -> None:
    bar = Bar(1.05, slack=0.0, min_count=1)
    assert bar.met(Interval.exact(1.05)) is True
    assert bar.met(Interval.exact(1.0500001)) is False


# --- the turns


def test_the_order_alternates_and_every_turn_is_aligned_and_finished() -> None:
    machine = FakeMachine()
    times = time_pairs(
        lambda: machine.work("ours", 3.0),
        lambda: machine.work("peer", 2.0),
        pairs=4,
        warmup=1,
        ranks=machine,
        clock=machine.clock,
    )
    turns = [machine.calls[i : i + 3] for i in range(0, len(machine.calls), 3)]
    order = ["ours", "peer"] + ["ours", "peer", "peer", "ours"] * 2
    assert turns == [["align", name, "finish"] for name in order]
    # finish is part of the turn, waiting in align is not; the warm-up is not among the times.
    assert times == PairTimes(ours=[3.5] * 4, peer=[2.5] * 4)


def test_a_turn_lasts_as_long_as_on_the_slowest_rank() -> None:
    machine = FakeMachine(other_rank_s=9.0)
    times = time_pairs(
        lambda: machine.work("ours", 3.0),
        lambda: machine.work("peer", 20.0),
        pairs=1,
        warmup=0,
        ranks=machine,
        clock=machine.clock,
    )
    assert times == PairTimes(ours=[9.0], peer=[20.5])


@no_deadline
@given(st.integers(2, 20).map(lambda half: 2 * half), st.floats(1.0, 1.05))
def test_a_steady_drift_of_the_machine_cancels(pairs: int, slowdown: float) -> None:
    machine = FakeMachine()
    speed = itertools.accumulate(itertools.repeat(slowdown), lambda so_far, factor: so_far * factor)
    times = time_pairs(
        lambda: machine.work("ours", next(speed)),
        lambda: machine.work("peer", next(speed)),
        pairs=pairs,
        warmup=0,
        ranks=machine,
        clock=machine.clock,
    )
    # Each pair is off by one slowdown, half of them up and half down; the 0.5 s of finish only dampens it.
    ratios = times.ratios
    assert statistics.median(ratios) == pytest.approx(1.0, abs=(slowdown - 1) ** 2 + 1e-6)
    assert max(abs(ratio - 1) for ratio in ratios) <= slowdown - 1 + 1e-6


# --- rows and reports


def test_rows_say_what_the_bar_speaks_of() -> None:
    times = PairTimes(ours=[2.0] * 15, peer=[4.0] * 15)
    ratio = ratio_row("r", times, Bar(1.0))
    assert (ratio.result.median, ratio.result_unit, ratio.met) == (0.5, "x", True)
    difference = difference_row("d", times, Bar(60.0, slack=0.0), scale=1e6, unit="us")
    assert (difference.result.median, difference.ours.median, difference.met) == (-2e6, 2e6, True)
    assert exact_ratio_row("m", 106.0, 100.0, Bar(1.05, slack=0.0, min_count=1), unit="MiB").met is False
    assert limit_row("l", [49.0, 50.0, 51.0], 50.0, unit="ms").met is True
    assert limit_row("l", [49.0, 50.1, 51.0], 50.0, unit="ms").met is False
    assert limit_row("l", [1.0], None, unit="ms").met is None


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Interval.exact(3.0), "exact"),
        (median_interval([1.0]), "one sample"),
        (median_interval([1.0, 2.0, 3.0]), "1 .. 3 (75%)"),
        (Interval(2.0, 1.25, 3.5, 0.9, 15), "1.25 .. 3.5"),
    ],
)
def test_the_table_says_how_sure_an_interval_is(found: Interval, text: str) -> None:
    assert interval_text(found) == text


MET = limit_row("met", [1.0], 2.0, unit="s")
MISSED = limit_row("missed", [3.0], 2.0, unit="s")
OPEN = ratio_row("open", PairTimes([1.0], [1.0]), Bar(1.0))
INFORMATION = limit_row("information", [3.0], None, unit="s")


@pytest.mark.parametrize(
    ("rows", "met", "strict_code"),
    [
        ([MET, INFORMATION], True, 0),
        ([MET, MISSED, OPEN], False, 1),
        ([MET, OPEN], None, 1),
    ],
)
def test_the_report_carries_the_verdict(tmp_path: Path, capsys, rows, met, strict_code: int) -> None:
    path = tmp_path / "results" / "one.json"
    code = finish("a title", rows, {"ranks": 2}, argparse.Namespace(json=path, strict=False))
    assert code == 0
    assert finish("a title", rows, {}, argparse.Namespace(json=None, strict=True)) == strict_code
    document = json.loads(path.read_text())
    assert document["met"] is met
    assert document["settings"] == {"ranks": 2}
    assert [row["met"] for row in document["rows"]] == [row.met for row in rows]
    assert document["rows"][0]["samples"] == {"ours": [1.0]}
    printed = capsys.readouterr().out
    for row in rows:
        assert row.name in printed


def test_machine_facts_name_the_machine_but_not_the_host() -> None:
    import platform

    facts = machine_facts()
    assert facts["torch"] == torch.__version__
    assert facts["cores"] >= 1
    assert platform.node() not in json.dumps(facts)


# --- the models and the loops


@pytest.mark.parametrize(("name", "low", "high"), [("14m", 14e6, 15e6), ("85m", 85e6, 86e6)])
def test_the_models_are_as_large_as_they_are_called(name: str, low: float, high: float) -> None:
    with torch.device("meta"):
        model = Gpt(GPT_SIZES[name])
    assert low <= sum(parameter.numel() for parameter in model.parameters()) <= high


def test_the_gpt_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    size = GPT_SIZES["tiny"]
    model = Gpt(size)
    (inputs, targets), *_ = byte_batches(1, 2, size.seq, seed=0, device=torch.device("cpu"))
    logits: list[torch.Tensor] = []
    model.head.register_forward_hook(lambda module, arguments, output: logits.append(output))
    model(inputs, targets)
    changed = inputs.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    model(changed, targets)
    torch.testing.assert_close(logits[0][:, :-1], logits[1][:, :-1])
    assert not torch.equal(logits[0][:, -1], logits[1][:, -1])


def test_batches_shift_by_one_byte_and_follow_the_seed() -> None:
    cpu = torch.device("cpu")
    first, again, other = (byte_batches(2, 3, 16, seed=seed, device=cpu) for seed in (0, 0, 1))
    inputs, targets = first[0]
    assert inputs.shape == targets.shape == (3, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, again[0][0])
    assert not torch.equal(inputs, other[0][0])
    assert not torch.equal(inputs, first[1][0])


def mlp_loop(recipe: Recipe, *, masters: bool = False) -> PlainLoop:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 16), torch.randn(8, 16)) for _ in range(4)]
    return PlainLoop(Mlp(16), recipe, batches, masters=masters)


def test_the_recipes_warmup_is_warmup_lr() -> None:
    recipe = Recipe(micro_batch=1, accumulation=1, lr=1.0, warmup_steps=4)
    # Golden values of WarmupLR, log: after 0, 1, 2, ... schedule steps.
    golden = [0, 0, 0.5, math.log(3) / math.log(4), 1, 1, 1]
    assert [recipe.lr_at(step) for step in range(7)] == pytest.approx(golden)
    assert Recipe(micro_batch=1, accumulation=1, lr=0.5).lr_at(0) == 0.5


def test_the_recipe_and_its_configuration_agree() -> None:
    config = Recipe(micro_batch=2, accumulation=3, warmup_steps=10).config()
    assert config["gradient_accumulation_steps"] == 3
    assert config["scheduler"]["params"]["warmup_num_steps"] == 10
    assert config["optimizer"]["params"]["lr"] == config["scheduler"]["params"]["warmup_max_lr"]
    json.dumps(config)


@pytest.mark.parametrize(
    ("dtype", "stored", "reduced", "master"),
    [
        ("fp32", None, None, None),
        ("bf16", torch.bfloat16, torch.bfloat16, torch.float32),
        ("fp16", torch.float16, torch.float16, torch.float32),
        ("autocast", None, torch.bfloat16, None),
    ],
)
def test_the_configuration_trains_in_the_recipes_dtype(dtype: str, stored, reduced, master) -> None:
    import ds_core

    engine = ds_core.initialize(model=Mlp(16), config=Recipe(micro_batch=1, accumulation=1, dtype=dtype).config())[0]
    plan = engine.parts.precision.plan
    scale = engine.parts.precision.scaler.scale
    engine.destroy()
    assert (plan.stored, plan.reduce, plan.master) == (stored, reduced, master)
    assert plan.autocast == (DTYPES[dtype] if dtype == "autocast" else None)
    assert (scale == 1.0) == (dtype != "fp16")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_loop_with_masters_updates_them_and_copies_them_back(dtype: str) -> None:
    recipe = Recipe(micro_batch=8, accumulation=1, lr=1e-2, clipping=0.01, dtype=dtype)
    loop, plain = mlp_loop(recipe, masters=True), mlp_loop(recipe)
    # The masters have every bit of the weights they were given.
    assert all(map(torch.equal, loop._updated, plain._parameters))
    twin = Mlp(16).to(DTYPES[dtype])
    twin.load_state_dict(loop._module.state_dict())
    masters = [master.clone() for master in loop._updated]
    optimizer = torch.optim.AdamW(masters, **recipe.adamw, fused=True)
    # A power of two, so that taking it out again rounds nothing.
    scale = 2.0**SCALE_POWER if dtype == "fp16" else 1.0
    for step in range(3):
        inputs, targets = (tensor.to(DTYPES[dtype]) for tensor in loop._batches[step])
        (twin(inputs, targets) * scale).backward()
        for master, parameter in zip(masters, twin.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float() / scale, None
        assert torch.nn.utils.clip_grad_norm_(masters, recipe.clipping) > recipe.clipping
        optimizer.step()
        for master, parameter in zip(masters, twin.parameters(), strict=True):
            parameter.data.copy_(master)
        loop.step()
        for found, master, parameter in zip(loop._updated, masters, loop._parameters, strict=True):
            assert torch.equal(found, master)
            assert torch.equal(parameter, found.to(DTYPES[dtype]))
            assert parameter.grad is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "autocast"])
def test_a_loop_without_masters_computes_under_autocast(dtype: str) -> None:
    loop = mlp_loop(Recipe(micro_batch=8, accumulation=2, lr=1e-2, dtype=dtype))
    outputs: list[torch.Tensor] = []
    loop._module.layers.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    before = [parameter.detach().clone() for parameter in loop._parameters]
    loop.step()
    assert {output.dtype for output in outputs} == {DTYPES[dtype]}
    assert {parameter.dtype for parameter in loop._parameters} == {torch.float32}
    assert not any(map(torch.equal, loop._parameters, before))


def test_accumulation_of_the_plain_loop_is_the_mean_of_its_micro_batches() -> None:
    loop = mlp_loop(Recipe(micro_batch=8, accumulation=4, lr=1e-2, clipping=1e9))
    torch.manual_seed(0)
    batches = [(torch.randn(8, 16), torch.randn(8, 16)) for _ in range(4)]
    twin = Mlp(16)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    twin(inputs, targets).backward()
    gradients: list[torch.Tensor] = []
    module = loop._module
    loop._optimizer.register_step_pre_hook(
        lambda *arguments: gradients.extend(parameter.grad.clone() for parameter in module.parameters())
    )
    loop.step()
    assert len(loop.losses) == 4
    assert len(gradients) == 6
    for found, parameter in zip(gradients, twin.parameters(), strict=True):
        # fp32 sums of 32 terms in another order: 5 of 24 bits.
        torch.testing.assert_close(found, parameter.grad, rtol=2**-18, atol=2**-20)


def test_losses_that_differ_are_noticed() -> None:
    recipe = Recipe(micro_batch=8, accumulation=1, lr=1e-2)
    one, same, other = mlp_loop(recipe), mlp_loop(recipe), mlp_loop(Recipe(micro_batch=8, accumulation=1, lr=2e-2))
    for loop in (one, same, other):
        for _ in range(3):
            loop.step()
    assert largest_difference(one, same) == 0.0
    assert largest_difference(one, other) > 1e-4
    assert largest_difference(one, other, first=1) == 0.0


def test_every_loop_is_a_contender() -> None:
    assert issubclass(PlainLoop, Contender)
    assert issubclass(DdpLoop, Contender)


# --- the ranks


def test_a_launcher_says_how_many_ranks_there_are(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert launcher_ranks() is None
    monkeypatch.setenv("RANK", "0")
    assert launcher_ranks() == 3


@no_deadline
@given(st.integers(1, 1000))
def test_ranks_never_have_more_threads_than_there_are_cores(ranks: int) -> None:
    threads = threads_per_rank(ranks)
    assert threads >= 1
    assert threads == 1 or threads * ranks <= usable_cores()


# --- the scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_how_to_run_it(script: str) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, "-h"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"python benchmarks/{script}" in done.stdout
    assert "--json PATH" in done.stdout


def results_of(script: str, tmp_path: Path, *options: str) -> dict:
    """Run ``script`` as it is run to see that it runs, for one pair; return its JSON."""
    path = tmp_path / "results.json"
    command = [sys.executable, BENCHMARKS / script, "--smoke", "--pairs", "1", "--warmup", "0"]
    done = subprocess.run(
        [*command, *options, "--json", path], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(path.read_text())
    # One pair is too few for a verdict, and bytes need none: no assertion depends on time.
    assert [row["result"]["count"] for row in document["rows"]] == [1] * len(document["rows"])
    return document


@pytest.mark.parametrize(("dtype", "peer"), [("bf16", "DDP"), ("fp16", "DDP bucket view"), ("autocast", "DDP")])
def test_stage_0_trains_in_low_precision_what_ddp_does(tmp_path: Path, dtype: str, peer: str) -> None:
    document = results_of("stage0.py", tmp_path, *TWICE, "--dtype", dtype, "--peer", peer, "--only", "time")
    # The script itself has compared the losses.
    assert [row["name"] for row in document["rows"]] == [f"step time, tiny {dtype}, accumulation 2, vs {peer}"]
    assert document["settings"]["dtypes"] == [dtype]


def test_overhead_in_low_precision_is_judged_by_the_step(tmp_path: Path) -> None:
    document = results_of("overhead.py", tmp_path, *TWICE, "--dtype", "bf16", "fp16", "--ranks", "1")
    assert [(row["name"], row["bar"]["limit"]) for row in document["rows"]] == [
        ("per step, bf16, 1 rank, accumulation 2, vs plain loop", 80.0),
        ("per step, fp16, 1 rank, accumulation 2, vs plain loop", 80.0),
    ]
    assert document["settings"]["dtypes"] == ["bf16", "fp16"]


def test_stage_0_counts_the_memory_of_low_precision(tmp_path: Path) -> None:
    options = ["--dtype", "bf16", "--peer", "DDP", "--only", "memory", "--ranks", "1"]
    document = results_of("stage0.py", tmp_path, *TWICE, *options)
    (row,) = document["rows"]
    assert row["name"] == "peak memory, tiny bf16, accumulation 2, vs DDP"
    assert row["bar"] is None
    # Weights, masters and two moments at least: 14 bytes for each of 134,912 parameters.
    assert 14 * 134_912 / 2**20 < row["ours"]["median"] < row["peer"]["median"]


def test_stages_of_zero_train_what_ddp_does(tmp_path: Path) -> None:
    options = ["--stage", "1", "--dtype", "fp32", "--peer", "DDP", "--only", "time", "--ranks", "2"]
    document = results_of("zero.py", tmp_path, *TWICE, *options, "--zero", '{"reduce_bucket_size": 20000}')
    # The script itself has compared the losses.
    (row,) = document["rows"]
    assert (row["name"], row["bar"]["limit"]) == ("step time, stage 1, tiny, accumulation 2, vs DDP", 1.0)
    assert (document["settings"]["stages"], document["settings"]["zero"]) == ([1], {"reduce_bucket_size": 20000})


def test_stages_of_zero_keep_a_share_of_the_state(tmp_path: Path) -> None:
    options = ["--stage", "2", "--dtype", "bf16", "--peer", "DDP", "--only", "memory", "--ranks", "2"]
    document = results_of("zero.py", tmp_path, *TWICE, *options)
    peak, kept = document["rows"]
    assert kept["name"] == "kept memory, stage 2, tiny bf16, accumulation 2, vs DDP"
    assert kept["bar"] is None
    parameters = 134_912
    # DDP: weight 2, gradient bucket 2, master 4, moments 8. Ours: weight 2, half of gradient 2, master 4 and moments 8;
    # buffers: the bucket's room, 2, and half of it received.
    assert kept["peer"]["median"] * 2**20 == pytest.approx(16 * parameters, rel=0.01)
    assert 8 * parameters <= kept["ours"]["median"] * 2**20 <= 12.1 * parameters
    assert kept["ours"]["median"] < peak["ours"]["median"] < peak["peer"]["median"]


def test_auto_has_to_give_something_up() -> None:
    size, cpu = GPT_SIZES["tiny"], torch.device("cpu")
    batches = byte_batches(1, 2, size.seq, seed=0, device=cpu)
    budgets = {}
    for dtype in ("fp32", "bf16", "autocast"):
        torch.manual_seed(0)
        model, recipe = Gpt(size), Recipe(micro_batch=2, accumulation=1, dtype=dtype)
        budgets[dtype] = budget_of_auto(model, recipe, batches[0])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        contender = Configured(model, recipe, batches, activation=SECTIONS["auto"])
        contender.step()
        chosen = contender._engine.report()["activation checkpointing"]
        contender.close()
        assert chosen.startswith("policy auto: ")
        assert "at most" in chosen, "no choice was made"
        assert "2 keep" not in chosen
    # The residual stream and what products take are of half the bytes, the loss is of as many.
    assert budgets["fp32"] / 2 < budgets["bf16"] < 0.75 * budgets["fp32"]
    assert budgets["bf16"] < budgets["autocast"] < budgets["fp32"]


def test_divided_inputs_need_two_ranks(monkeypatch, capsys) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert parse([]).policy == list(SECTIONS)
    assert [ranks_of("full", None), ranks_of("partitioned", None), ranks_of("partitioned", 3)] == [1, 2, 3]
    for rank, gpus in ((None, 1), ("0", 0)):  # one GPU; one rank of a launcher
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "1")
        assert parse([]).policy == [policy for policy in SECTIONS if policy != "partitioned"]
        with pytest.raises(SystemExit):
            parse(["--policy", "full", "partitioned"])
        assert "two ranks or more" in capsys.readouterr().err


def test_what_divided_inputs_need_ends_with_the_contender() -> None:
    from ds_core import checkpointing

    size = GPT_SIZES["tiny"]
    recipe = Recipe(micro_batch=2, accumulation=1)
    assert not checkpointing.is_configured()
    contender = Configured(Gpt(size), recipe, [], activation=SECTIONS["partitioned"])
    assert checkpointing.is_configured()
    contender.close()
    assert not checkpointing.is_configured()
    with pytest.raises(ConfigError, match="mpu"):  # nobody has one any more
        DsCore(Gpt(size), recipe, [], activation=SECTIONS["partitioned"])


def test_the_measured_step_of_auto_is_never_timed() -> None:
    assert parse(["--warmup", "0"]).warmup == 1
    assert parse([]).warmup == 3


def test_divided_inputs_train_what_torchs_checkpoint_does(tmp_path: Path) -> None:
    document = results_of("activation.py", tmp_path, "--policy", "partitioned", "--only", "time")
    # The script itself has compared the losses, and the plugin the inputs of the ranks.
    (row,) = document["rows"]
    assert row["name"] == "step time, partitioned, tiny, accumulation 1, 2 ranks, vs torch.utils.checkpoint"
    assert row["bar"] is None
    assert document["settings"]["ranks"] == {"partitioned": 2}


@pytest.mark.slow
def test_policies_leave_less_for_backward(tmp_path: Path) -> None:
    document = results_of("activation.py", tmp_path, "--policy", *SECTIONS, "--only", "memory")
    rows = {tuple(row["name"].split(", ")[:2]): row for row in document["rows"]}
    assert list(rows) == [(what, policy) for policy in SECTIONS for what in ("peak memory", "left for backward")]
    assert {names: row["bar"]["limit"] for names, row in rows.items() if row["bar"]} == {("peak memory", "full"): 1.0}
    left = {policy: rows["left for backward", policy]["result"]["median"] for policy in SECTIONS}
    # Nothing leaves a CPU; what is not divided is the loss and the layers after the blocks.
    assert left["full"] == left["offloaded"] == 1.0
    assert 0.5 < left["partitioned"] < 1 <= left["auto"]
    assert min(left["selective"], left["every_n"]) > 1


@pytest.mark.slow
def test_every_policy_trains_what_torchs_checkpoint_does(tmp_path: Path) -> None:
    options = ["--policy", *SECTIONS, "--only", "time", "--dtype", "bf16"]
    document = results_of("activation.py", tmp_path, *options)
    bars = {row["name"].split(", ")[1]: row["bar"] and row["bar"]["limit"] for row in document["rows"]}
    assert bars == {policy: 1.02 if policy == "full" else None for policy in SECTIONS}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "peer",
    [
        "fully_shard",
        pytest.param("DeepSpeed", marks=pytest.mark.skipif(not has_deepspeed(), reason="DeepSpeed is not installed")),
    ],
)
def test_peers_that_divide_state_train_the_same(tmp_path: Path, peer: str, dtype: str) -> None:
    document = results_of("zero.py", tmp_path, *TWICE, "--dtype", dtype, "--peer", peer, "--ranks", "2")
    assert [row["name"].split(",")[:2] for row in document["rows"]] == [
        [what, f" stage {stage}"] for stage in (1, 2) for what in ("step time", "peak memory", "kept memory")
    ]


@pytest.mark.parametrize(
    ("stage", "dtype", "of_64", "of_1"),
    [(0, "bf16", 16, 16), (1, "bf16", 4 + 12 / 64, 16), (2, "bf16", 2 + 14 / 64, 16), (2, "fp32", 4 + 12 / 64, 16)],
)
def test_the_formulas_of_model_state(stage: int, dtype: str, of_64: float, of_1: float) -> None:
    # Rajbhandari et al. 2019, table 1: 120, 31.4 and 16.6 GB of 7.5e9 parameters on 64 ranks, in 16 bits.
    assert sum(formula(stage, 64, dtype)) == pytest.approx(of_64)
    assert sum(formula(stage, 1, dtype)) == of_1


@pytest.mark.slow
def test_model_state_is_read_and_drawn(tmp_path: Path) -> None:
    path, plot = tmp_path / "results.json", tmp_path / "memory.png"
    command = [sys.executable, BENCHMARKS / "zero_memory.py", "--dtype", "bf16", "--ranks", "2", "--plot", plot]
    done = subprocess.run([*command, "--json", path], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == [f"state, stage {at}, bf16, 2 ranks, vs formula" for at in (0, 1, 2)]
    # 60 buckets of one layer; buffers are a few of them.
    assert all(1 <= row["result"]["median"] < 1.1 for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_profile_shows_each_contender_and_times_nothing(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    command = [sys.executable, BENCHMARKS / "zero.py", "--smoke", "--profile", "--json", path]
    options = ["--stage", "2", "--dtype", "fp32", *TWICE, "--peer", "DDP", "--ranks", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert not path.exists()
    ours, peer = done.stdout.split("DDP, tiny, accumulation 2\n")
    assert ours.startswith("stage 2, tiny, accumulation 2\n")
    for table in (ours, peer):
        assert "aten::_fused_adamw_" in table


def test_checkpoints_are_saved_loaded_and_verified(tmp_path: Path) -> None:
    document = results_of("checkpoint.py", tmp_path, "--only", "save", "load", "verify", "--ranks", "1")
    assert {row["name"].partition(",")[0]: row["bar"] and row["bar"]["limit"] for row in document["rows"]} == {
        "save vs one file": 1.15,
        "save vs torch.save": 1.0,
        "save vs DCP": 1.0,
        "load vs torch.load": 1.0,
        "open().tensor() vs torch.load": None,
        "verify vs reading": pytest.approx(1 / 0.7),
    }


def test_checkpoints_of_other_worlds_and_memory_on_two_ranks(tmp_path: Path) -> None:
    document = results_of("checkpoint.py", tmp_path, "--only", "async", "worlds", "memory", "--ranks", "2")
    names = [row["name"] for row in document["rows"]]
    assert names[:2] == ["async stall vs one copy, 0.01 GB, 2 ranks", "load of what 3 wrote vs what 2 wrote, 2 ranks"]
    assert [name for name in names if name.startswith("memory")] == names[2:]
    assert len(names) == 5
