"""The cases of P03 over stages and precisions, and docs/numbers.md, the table of what was measured on them.

``python tools/right_numbers.py`` tells whether the page has the cases of today's suite and is within its bounds;
``--write`` trains the fixed cases, which takes minutes, and writes it where it has not; ``--anew`` in any case.
tests/test_right_numbers.py trains them in CI.
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_core.testing.low_precision import FACTORS as OF_ONE_STAGE
from ds_core.testing.low_precision import PRECISIONS, Measured, case_of, measured_cases
from ds_core.testing.matrix import drawn, pairwise
from ds_core.testing.ranks import run_ranks
from ds_core.testing.reference import MIXED_MODELS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ds_core.testing.reference import Case

PAGE = Path(__file__).parents[1] / "docs" / "numbers.md"
COMMAND = "nox -s docs -- --write"
STAGES = (0, 1, 2)
WORLD_SIZES = (1, 2, 3, 4)
DRAWN = 20
FACTORS: dict[str, tuple[Any, ...]] = {
    "place": tuple((stage, world_size) for world_size in WORLD_SIZES for stage in STAGES),
    **OF_ONE_STAGE,
    "precision": ("fp32", *PRECISIONS),
    "accumulation": (1, 2, 4),
    "optimizer": ("SGD", "AdamW", "WholeSGD", "WholeAdamW"),
    "backwards": (1, 2),
    "bucket_numel": (None, 50),
}
"""Stage and number of ranks are one factor: each pair of them meets every value of the others."""
WORDS = {
    "place": "stage and ranks",
    "model": "model",
    "output": "its output",
    "accumulation": "accumulation",
    "clipping": "clipping (0: off)",
    "optimizer": "optimizer",
    "precision": "precision",
    "accumulate": "`data_types.grad_accum_dtype`",
    "reduce": "`communication_data_type`",
    "backwards": "backwards per micro-batch",
    "bucket_numel": "elements per gradient bucket",
}
"""What the factors are on the page."""

HEAD = f"""<!-- Written by `{COMMAND}`: change tools/right_numbers.py, not this page. -->

# Right numbers

Every step of training is compared with plain PyTorch in one process that sees the data of all ranks: the loss, every
gradient and every weight, and masters where there are any. fp32 is compared element by element too. The comparison and
the derivation of its bounds are in `ds_core.testing.reference` and `ds_core.testing.low_precision`; a bound holds for
each tensor of each step, and is the rounding that another order of the same additions may cost.

Models have a module used twice, tied weights, frozen, 0-d and zero-size parameters, parameters that one rank or no
rank uses, parameters given in other dtypes, batch norm, and sizes that no number of ranks divides.
`WholeSGD` and `WholeAdamW` are optimizers that must be given whole parameters. The comparison is itself checked: one
rank's gradient doubled, halved or dropped is outside the bound of every gradient and of every weight.

Every two values of different rows of this table occur together in a case below:

| What varies | Values |
|---|---|
"""
MIDDLE = """
The largest relative L2 error of any gradient and of any weight (or master) in three steps, each with the bound of that
tensor, and the largest part of its bound that any tensor used. On another machine the errors may differ, not the
bounds they are held to.

| Stage | Precision | Cases | Gradient | Bound | Weight | Bound | Used of a bound |
|---|---|---|---|---|---|---|---|
"""

IN_16_BITS = "fp32, in part 16 bits"
"""Without masters: parameters that are given in 16 bits, or gradients that travel in them."""
Row = tuple[int, str]


def placed(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[Case]]:
    """Return the cases of combinations of ``FACTORS``, by number of ranks, none twice."""
    found: dict[int, dict[Case, None]] = {world_size: {} for world_size in WORLD_SIZES}
    for row in rows:
        values = dict(row)
        stage, world_size = values.pop("place")
        found[world_size][case_of({**values, "stage": stage})] = None
    return {world_size: list(cases) for world_size, cases in found.items()}


def fixed_cases() -> dict[int, list[Case]]:
    """Return cases in which every pair of values occurs, by number of ranks."""
    return placed(pairwise(FACTORS))


def drawn_cases(seed: int) -> dict[int, list[Case]]:
    """Return the cases drawn by ``seed``, by number of ranks."""
    return placed(drawn(FACTORS, DRAWN, seed=seed))


def row_of(case: Case) -> Row:
    """Return the row of the table that ``case`` is in."""
    if case.precision == "fp32" and (case.model in MIXED_MODELS or case.reduce in ("fp16", "bf16")):
        return case.stage, IN_16_BITS
    return case.stage, case.precision


def by_row(measured: Mapping[Case, Measured]) -> dict[Row, Measured]:
    """Return the largest of each row of the table."""
    found: dict[Row, list[Measured]] = {}
    for case, errors in measured.items():
        found.setdefault(row_of(case), []).append(errors)
    return {row: reduce(or_, several) for row, several in found.items()}


def counts() -> dict[Row, int]:
    """Return how many fixed cases each row has."""
    rows = [row_of(case) for cases in fixed_cases().values() for case in cases]
    return {row: rows.count(row) for row in sorted(set(rows), key=_order)}


def _order(row: Row) -> tuple[int, int]:
    return row[0], ("fp32", IN_16_BITS, *PRECISIONS).index(row[1])


def render(measured: Mapping[Row, Measured]) -> str:
    """Return the page."""
    lines = [f"| {WORDS[name]} | {_values(name)} |\n" for name in FACTORS]
    table = []
    for (stage, precision), count in counts().items():
        errors = measured[stage, precision]
        cells = [str(stage), precision, str(count), *map(_number, (*errors.gradient, *errors.weight))]
        table.append(f"| {' | '.join([*cells, f'{100 * errors.share:.0f} %'])} |\n")
    return HEAD + "".join(lines) + MIDDLE + "".join(table)


def _values(name: str) -> str:
    if name == "place":
        return f"each of {_listed(STAGES)} with each of {_listed(WORLD_SIZES)}"
    return _listed(FACTORS[name])


def _listed(values: Sequence[Any]) -> str:
    return ", ".join("default" if value is None else f"`{value}`" for value in values)


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def parse(page: str) -> dict[Row, Measured]:
    """Return what the rows of the page say."""
    number = r"([0-9.e+-]+)"
    row = re.compile(rf"\| (\d) \| ([\w, ]+) \| \d+ \| {number} \| {number} \| {number} \| {number} \| (\d+) % \|")
    found = {}
    for match in row.finditer(page):
        stage, precision, *numbers = match.groups()
        gradient, its_bound, weight, weights_bound, percent = map(float, numbers)
        found[int(stage), precision] = Measured((gradient, its_bound), (weight, weights_bound), percent / 100)
    return found


def problems_of(page: str) -> list[str]:
    """Return what of the page is not what the suite says; empty: it is."""
    measured = parse(page)
    if measured.keys() != counts().keys():
        return [f"the page has rows {sorted(measured)}, the suite {sorted(counts())}"]
    found = [] if render(measured) == page else ["cases, factors or words of the page are not those of the suite"]
    for row, errors in measured.items():
        for what, (error, bound) in (("gradient", errors.gradient), ("weight", errors.weight)):
            if not error <= bound:
                found.append(f"{row}: the error of a {what} is {error}, its bound {bound}")
        if not errors.share <= 1:
            found.append(f"{row}: a tensor is outside its bound")
    return found


def main(argv: Sequence[str] | None = None, page: Path = PAGE) -> int:
    """Look at the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="train the fixed cases and write the page, if it differs")
    parser.add_argument("--anew", action="store_true", help="train and write in any case: errors differ by machine")
    arguments = parser.parse_args(argv)
    found = problems_of(page.read_text(encoding="utf-8")) if page.exists() else [f"there is no {page.name}"]
    if not arguments.anew and not (found and arguments.write):
        print("\n".join([*found, f"run: {COMMAND}"] if found else [f"{page.name} is what the suite says"]))
        return bool(found)
    measured: dict[Case, Measured] = {}
    for world_size, cases in fixed_cases().items():
        [of_ranks] = run_ranks([partial(measured_cases, cases)], world_size, timeout_s=600)
        for wrong, errors in of_ranks:
            if wrong:
                print(f"{world_size} ranks: {wrong}")
                return 1
            measured.update(errors)
    page.write_text(render(by_row(measured)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
