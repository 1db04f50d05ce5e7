"""Bad configurations (``bad/*.json``, ``*.hjson``) and the whole error of each (``*.txt``): no more reaches a user.

The errors can be written anew, to see in a diff what a change of wording does; read each as its user will::

    DS_WRITE_BAD_CONFIGS=1 pytest packages/ds-core/tests/config/test_bad_configs.py
"""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from ds_core.config import ConfigError, examine, find_problems, load_config

FOLDER = Path(__file__).with_name("bad")
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".json", ".hjson"))
WRITE = os.environ.get("DS_WRITE_BAD_CONFIGS") == "1"
RANKS = {
    "batch_of_eight_ranks": 8,
    "bf16_masters_without_zero": 1,
    "elastic_wrong_ranks": 7,
    "huge_world": 4,
}
"""Data-parallel ranks for the batch sizes, where those are not two."""

INTERNAL = (
    "pydantic",
    "Section",
    "Traceback",
    "validation error",
    "ds_core.",
    "object at 0x",
    "NoneType",
    "<class",
    "input_",
)
"""What shows the insides of the program; no message has it."""


def error_of(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path.name, dp_world_size=RANKS.get(path.stem, 2))
    return caught.value


@pytest.fixture(autouse=True)
def _in_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)
    for name in ("DS_CONFIG_COMPATIBLE", "DEEPSPEED_ELASTICITY_CONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=FILES, ids=[path.name for path in FILES])
def path(request: pytest.FixtureRequest) -> Path:
    file: Path = request.param
    return file


def test_error(path: Path) -> None:
    error, expected = error_of(path), path.with_suffix(".txt")
    if WRITE:
        expected.write_text(f"{error}\n", encoding="utf-8")
    assert f"{error}\n" == expected.read_text(encoding="utf-8")


def test_nothing_from_inside(path: Path) -> None:
    error = error_of(path)
    # Someone who reads the traceback must not meet pydantic's exception as its cause or context.
    assert error.__cause__ is None
    assert error.__context__ is None or isinstance(error.__context__, ValueError)
    assert [word for word in INTERNAL if word in str(error)] == []
    assert max(map(len, str(error).splitlines())) < 400


def test_every_problem_once_with_a_place_and_in_order(path: Path) -> None:
    try:
        examined = examine(path.name, dp_world_size=RANKS.get(path.stem, 2))
    except ConfigError:
        return  # it could not be read, so there is no more to say
    problems = examined.problems
    assert problems == tuple(find_problems(path.name, dp_world_size=RANKS.get(path.stem, 2)))
    assert len({(problem.path, problem.text) for problem in problems}) == len(problems)
    places = [problem.place for problem in problems if problem.place is not None]
    assert places == sorted(places)
    for problem in problems:
        # A key that is missing has no place, unless its section has one.
        assert problem.place is not None or problem.text.startswith("is missing"), problem


def test_each_file_has_its_error_and_its_table_row() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == {path.stem for path in FILES}
    assert len(FILES) == len({path.stem for path in FILES})
    assert RANKS.keys() <= {path.stem for path in FILES}
    assert len(FILES) >= 140


class _Color(Enum):
    RED = "red"


ONLY_FROM_PYTHON: list[tuple[dict[Any, Any], str, str | None]] = [
    ({3: 4}, "3: a key must be text, got 3", 'write it as "3"'),
    ({"fp16": {3: 4}}, "fp16.3: a key must be text, got 3", 'write it as "3"'),
    ({None: 4}, "None: a key must be text, got null", 'write it as "None"'),
    ({"fp16": {"enabled": _Color.RED}}, 'fp16.enabled: got "red", must be true or false', None),
    ({"gradient_clipping": complex(1, 2)}, "gradient_clipping: got (1+2j), must be a finite number", None),
    ({"zero_optimization": {"stage": 2.5}}, "zero_optimization.stage: got 2.5, must be a whole number", None),
]


@pytest.mark.parametrize(("config", "what", "fix"), ONLY_FROM_PYTHON)
def test_error_of_what_no_file_can_hold(config: dict[Any, Any], what: str, fix: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"train_batch_size": 4, **config}, dp_world_size=2)
    assert (caught.value.what, caught.value.where, caught.value.fix) == (what, "config dict", fix)


def test_a_mapping_has_the_order_of_its_keys() -> None:
    config = {"zork": 1, "fp16": {"enabled": True, "zork": 1, "loss_scale": -1}, "gradient_clipping": "x"}
    paths = [problem.path for problem in find_problems({**config, "train_batch_size": 3}, dp_world_size=2)]
    assert paths == ["zork", "fp16.zork", "fp16.loss_scale", "gradient_clipping", "train_batch_size"]
