"""A loader without end: ds_core.data.RepeatingLoader."""

from __future__ import annotations

from itertools import islice

import pytest
from torch.utils.data import DataLoader

from ds_core.data import DeepSpeedDataLoader, RepeatingLoader


def test_it_goes_on_for_ever() -> None:
    repeating = RepeatingLoader([1, 2, 3])
    assert iter(repeating) is repeating
    assert list(islice(repeating, 8)) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert next(repeating) == 3


def test_it_has_no_length() -> None:
    with pytest.raises(TypeError, match="no len"):
        len(RepeatingLoader([1]))  # type: ignore[arg-type]


def test_an_empty_loader_ends() -> None:
    repeating = RepeatingLoader([])
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(repeating)


def test_it_has_a_position_where_its_loader_has_one() -> None:
    plain = RepeatingLoader(DataLoader(range(4)))
    assert not hasattr(plain, "state_dict")
    assert not hasattr(plain, "load_state_dict")
    assert not hasattr(plain, "anything")
    assert hasattr(RepeatingLoader(DeepSpeedDataLoader(range(4), 2)), "load_state_dict")


@pytest.mark.parametrize("stop", range(8))
@pytest.mark.parametrize("used_before", [False, True], ids=["fresh", "used"])
def test_a_resumed_run_equals_the_uninterrupted_one(stop: int, used_before: bool) -> None:
    """3 batches an epoch; stops within epochs and at their ends."""

    def build() -> RepeatingLoader:
        return RepeatingLoader(DeepSpeedDataLoader(range(6), 2))

    expected = [batch.tolist() for batch in islice(build(), 14)]
    stopped, resumed = build(), build()
    begun = [batch.tolist() for batch in islice(stopped, stop)]
    if used_before:
        next(resumed)
    resumed.load_state_dict(stopped.state_dict())
    assert begun + [batch.tolist() for batch in islice(resumed, 14 - stop)] == expected


def test_a_loader_whose_iterator_holds_the_position() -> None:
    """As torchdata's: a loaded position counts from the next iter() on."""

    class Stateful:
        start = 0

        def __iter__(self) -> object:
            return iter(range(self.start, 4))

        def state_dict(self) -> int:
            return self.start

        def load_state_dict(self, state: int) -> None:
            self.start = state

    repeating = RepeatingLoader(Stateful())
    assert next(repeating) == 0
    repeating.load_state_dict(2)
    assert next(repeating) == 2
    assert repeating.state_dict() == 2
