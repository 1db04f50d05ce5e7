"""What an mpu says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ds_activation.model_parallel import ALONE, Place, place_in, refuse_no_mpu, tp_rank_in
from ds_core.errors import ConfigError


def mpu(words: str, rank: int = 2) -> Any:
    return {
        f"get_{words}_rank": lambda: rank,
        f"get_{words}_world_size": lambda: 4,
        f"get_{words}_group": lambda: "group",
    }


def test_without_one_this_process_is_alone() -> None:
    assert place_in(None) == ALONE == Place(0, 1, None)
    assert tp_rank_in(None) == 0


@pytest.mark.parametrize("words", ["tensor_model_parallel", "model_parallel"])
def test_place(words: str) -> None:
    given = SimpleNamespace(**mpu(words))
    assert place_in(given) == Place(2, 4, "group")  # type: ignore[arg-type]
    assert tp_rank_in(given) == 2


def test_the_tensor_parallel_group_comes_first() -> None:
    given = SimpleNamespace(**mpu("model_parallel", 1), **mpu("tensor_model_parallel", 3), **mpu("slice_parallel", 2))
    assert place_in(given).rank == tp_rank_in(given) == 3
    assert tp_rank_in(SimpleNamespace(**mpu("model_parallel", 1), **mpu("slice_parallel", 2))) == 2


def test_what_is_no_mpu_is_named() -> None:
    for ask in (place_in, tp_rank_in, refuse_no_mpu):
        with pytest.raises(ConfigError, match=r"SimpleNamespace[^?]*get_model_parallel_world_size"):
            ask(SimpleNamespace(get_model_parallel_world_size=lambda: 1))


def test_looking_asks_nothing() -> None:
    def not_ready() -> int:
        raise AssertionError("model parallel group is not initialized")

    refuse_no_mpu(SimpleNamespace(**dict.fromkeys(mpu("model_parallel"), not_ready)))
