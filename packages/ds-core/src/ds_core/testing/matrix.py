"""Choose cases out of a product of factors: all of it, a set in which every pair of values occurs, or a drawn few.

>>> factors = {"color": ("red", "blue"), "size": (1, 2), "shape": ("round", "square")}
>>> len(full(factors)), len(pairwise(factors))
(8, 4)
>>> drawn(factors, 2, seed=5) == drawn(factors, 2, seed=5)
True
"""

from __future__ import annotations

import os
import random
from datetime import datetime, timezone
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["drawn", "full", "pairwise", "seed_of_today"]

SEED_VARIABLE = "DS_MATRIX_SEED"


def full(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return every combination, the last factor changing fastest."""
    return [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return few combinations in which every two values of different factors occur together at least once.

    Greedy and the same every time: a combination starts from the first pair still missing, and each further factor
    takes the value that brings the most missing pairs.
    """
    names = list(factors)
    # A dict for its order: which pair comes first must not depend on hashing.
    missing = {
        (a, i, b, j): None
        for a, b in combinations(range(len(names)), 2)
        for i, j in product(range(len(factors[names[a]])), range(len(factors[names[b]])))
    }
    found: list[dict[str, Any]] = []
    while missing:
        a, i, b, j = next(iter(missing))
        chosen = {a: i, b: j}
        for factor, name in enumerate(names):
            if factor in chosen:
                continue
            count = len(factors[name])
            # Among equals another one each time, so that the rest is spread evenly.
            order = [(value + len(found)) % count for value in range(count)]
            chosen[factor] = max(order, key=lambda value: len(_new_pairs(chosen, factor, value, missing)))
        for (a, i), (b, j) in combinations(sorted(chosen.items()), 2):
            missing.pop((a, i, b, j), None)
        found.append({name: factors[name][chosen[factor]] for factor, name in enumerate(names)})
    if not found:
        return full(factors)  # fewer than two factors have no pairs
    return found


def _new_pairs(
    chosen: Mapping[int, int], factor: int, value: int, missing: Mapping[tuple[int, int, int, int], None]
) -> list[tuple[int, int, int, int]]:
    pairs = [
        (other, at, factor, value) if other < factor else (factor, value, other, at) for other, at in chosen.items()
    ]
    return [pair for pair in pairs if pair in missing]


def drawn(factors: Mapping[str, Sequence[Any]], count: int, *, seed: int) -> list[dict[str, Any]]:
    """Return ``count`` combinations drawn by ``seed``, the same for the same seed; some may be equal."""
    generator = random.Random(seed)
    return [{name: generator.choice(list(values)) for name, values in factors.items()} for _ in range(count)]


def seed_of_today() -> int:
    """Return the date (UTC) as a number such as 20240131, or what the variable DS_MATRIX_SEED says.

    A test that draws by it prints the seed and the cases when it fails; the variable brings them back another day.
    """
    given = os.environ.get(SEED_VARIABLE)
    return int(given) if given else int(datetime.now(timezone.utc).strftime("%Y%m%d"))
