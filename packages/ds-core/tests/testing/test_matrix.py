"""Choosing cases: every pair occurs, few are needed, and the same ones are chosen every time."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from ds_core.testing.matrix import drawn, full, pairwise, seed_of_today

FACTORS = {"a": (1, 2, 3, 4), "b": "xyz", "c": (None, False, True), "d": (0.0, 1.0), "e": (5,)}


@pytest.mark.parametrize("names", ["ab", "abc", "abcd", "abcde", "dcba", "ae"])
def test_every_pair_occurs(names):
    factors = {name: FACTORS[name] for name in names}
    rows = pairwise(factors)
    for one, other in combinations(names, 2):
        assert {(row[one], row[other]) for row in rows} == set(product(factors[one], factors[other]))
    assert all(list(row) == list(names) for row in rows)


def test_far_fewer_than_the_product():
    factors = {str(index): range(3) for index in range(10)}
    assert len(full(factors)) == 3**10
    # No fewer than 3 x 3 can do; greedy choice needs about twice that.
    assert 9 <= len(pairwise(factors)) <= 24


def test_one_factor_has_no_pairs():
    assert pairwise({"a": (1, 2)}) == full({"a": (1, 2)}) == [{"a": 1}, {"a": 2}]


def test_the_same_every_time():
    assert pairwise(FACTORS) == pairwise(FACTORS)
    assert drawn(FACTORS, 20, seed=7) == drawn(FACTORS, 20, seed=7)
    assert drawn(FACTORS, 20, seed=7) != drawn(FACTORS, 20, seed=8)
    assert all(row in full(FACTORS) for row in drawn(FACTORS, 20, seed=7))


def test_the_seed_is_the_date_or_what_is_asked_for(monkeypatch):
    monkeypatch.delenv("DS_MATRIX_SEED", raising=False)
    assert 20240101 <= seed_of_today() <= 99991231
    monkeypatch.setenv("DS_MATRIX_SEED", "20240131")
    assert seed_of_today() == 20240131
