"""P03 over stages 0 to 2, every precision and 1 to 4 ranks: the cases of tools/right_numbers.py, and docs/numbers.md.

Each package has a smaller suite of its own, for what it can do alone.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from right_numbers import (
    COMMAND,
    FACTORS,
    PAGE,
    STAGES,
    WORLD_SIZES,
    by_row,
    counts,
    drawn_cases,
    fixed_cases,
    main,
    parse,
    placed,
    problems_of,
)

from ds_core.testing.low_precision import Measured, measured_cases, unnoticed, wrong_cases
from ds_core.testing.matrix import full, seed_of_today
from ds_core.testing.ranks import run_ranks
from ds_core.testing.reference import Case

if TYPE_CHECKING:
    from pathlib import Path

PRECISIONS = FACTORS["precision"]
MUTATED_WORLD_SIZES = (2, 4)
MUTATIONS = [
    (Case("plain", optimizer="SGD", precision=precision, stage=stage), factor)
    for stage in STAGES[1:]
    for precision in PRECISIONS
    for factor in (2.0, 0.0, 0.5)
]
# Of several backwards in a window, of a message of few digits, and of an optimizer that is given whole parameters.
MUTATIONS += [
    (replace(case, **how), 2.0)
    for case, factor in MUTATIONS
    if factor == 2.0 and case.precision in ("fp32", "bf16")
    for how in (
        {"accumulation": 2, "backwards": 2},
        {"accumulate": "float32", "reduce": "bf16"},
        {"optimizer": "WholeSGD"},
    )
]
VARIED = ("output", "accumulate", "reduce", "backwards", "bucket_numel")
"""What the full product draws: with all of it a run would take days."""


@pytest.fixture(scope="module")
def results() -> dict[int, dict[str, list[Any]]]:
    """Everything of one number of ranks in one spawn: what is asked -> what each rank answered."""
    fixed, today = fixed_cases(), drawn_cases(seed_of_today())
    found = {}
    for world_size in WORLD_SIZES:
        jobs: dict[str, Any] = {
            "fixed": partial(measured_cases, fixed[world_size]),
            "drawn": partial(wrong_cases, today[world_size]),
        }
        if world_size in MUTATED_WORLD_SIZES:
            jobs["mutations"] = partial(unnoticed, MUTATIONS)
        found[world_size] = dict(zip(jobs, run_ranks(list(jobs.values()), world_size, timeout_s=250), strict=True))
    return found


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_pair_of_values_equals_plain_pytorch(results, world_size):
    assert [wrong for wrong, _ in results[world_size]["fixed"]] == [{}] * world_size


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_cases_drawn_today_equal_plain_pytorch(results, world_size):
    cases = "\n".join(map(str, drawn_cases(seed_of_today())[world_size]))
    assert results[world_size]["drawn"] == [{}] * world_size, f"DS_MATRIX_SEED={seed_of_today()} drew\n{cases}"


@pytest.mark.parametrize("world_size", MUTATED_WORLD_SIZES)
def test_a_rank_counted_wrongly_is_noticed(results, world_size):
    # A comparison that accepts these shows nothing. Each tensor alone must notice.
    assert results[world_size]["mutations"] == [{}] * world_size


def test_cases_have_what_the_promise_lists():
    # A factor may refuse a combination; none may lose a value by it.
    cases = [(case, world_size) for world_size, cases in fixed_cases().items() for case in cases]
    for name, values in FACTORS.items():
        if name != "place":
            assert {getattr(case, name) for case, _ in cases} == set(values), name
    assert {(case.stage, world_size) for case, world_size in cases} == set(FACTORS["place"])
    assert sum(counts().values()) == len(cases)


def test_the_page_has_the_cases_of_the_suite():
    assert problems_of(PAGE.read_text(encoding="utf-8")) == [], f"run `{COMMAND}` and commit {PAGE.name}"


def test_what_is_measured_today_is_within_the_bounds_of_the_page(results):
    # Errors may differ by machine and kernel; the cases are those of the page.
    measured: dict[Case, Measured] = {}
    for of_ranks in results.values():
        for _, of_rank in of_ranks["fixed"]:
            measured.update(of_rank)
    assert len(measured) == sum(counts().values()), "every case was measured, on one rank"
    today, page = by_row(measured), parse(PAGE.read_text(encoding="utf-8"))
    assert today.keys() == page.keys()
    for row, errors in today.items():
        assert errors.share <= 1, row
        assert errors.gradient[0] <= page[row].gradient[1], row
        assert errors.weight[0] <= page[row].weight[1], row


def test_a_page_that_differs_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = PAGE.read_text(encoding="utf-8")
    row, errors = next((row, errors) for row, errors in parse(page).items() if errors.gradient[0])
    for wrong, problem in (
        (page.replace("| model |", "| models |"), "cases, factors or words"),
        ("\n".join(page.splitlines()[:-1]) + "\n", "the page has rows"),
        (page.replace(f"{errors.gradient[0]:.1e}", "9.9e+01"), f"{row}: the error of a gradient is 99.0"),
        (page.replace(f"{100 * errors.share:.0f} %", "101 %"), "a tensor is outside its bound"),
    ):
        assert wrong != page
        found = problems_of(wrong)
        assert any(problem in text for text in found), (problem, found)
    (tmp_path / PAGE.name).write_text("old", encoding="utf-8")
    assert main([], page=tmp_path / PAGE.name) == 1
    assert main([], page=tmp_path / "none.md") == 1
    assert f"run: {COMMAND}" in capsys.readouterr().out
    assert main([]) == 0


def test_a_page_that_is_right_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / PAGE.name).write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    trained = []
    monkeypatch.setattr("right_numbers.run_ranks", lambda jobs, *args, **more: trained.append(args) or [[({}, {})]])
    assert main(["--write"], page=tmp_path / PAGE.name) == 0
    assert trained == []
    with pytest.raises(KeyError):  # nothing was measured: of the first row there is nothing to write
        main(["--anew"], page=tmp_path / PAGE.name)
    assert len(trained) == len(WORLD_SIZES)


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_case(world_size, precision):
    product = {name: values for name, values in FACTORS.items() if name not in VARIED}
    places = tuple((stage, world_size) for stage in STAGES)
    draw = random.Random(f"{world_size} {precision}")
    rows = [
        {**row, **{name: draw.choice(FACTORS[name]) for name in VARIED}}
        for row in full({**product, "place": places, "precision": (precision,)})
    ]
    [found] = run_ranks([partial(wrong_cases, placed(rows)[world_size])], world_size, timeout_s=3600)
    assert found == [{}] * world_size
