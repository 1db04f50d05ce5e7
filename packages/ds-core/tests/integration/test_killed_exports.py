"""SIGKILL at every file operation of an export: the old weights, none, or the new ones, never some of both.

This file is also the script that does it: it forks for every case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ds_core.checkpoint.huggingface import plan_layout, write_layout
from ds_core.checkpoint.safetensors_format import Entry, write_stream
from ds_core.testing import crash

ENTRIES = [Entry(name, "uint8", (40,)) for name in ("a", "b", "c")]
LIMITS = {"one": None, "two": 80, "three": 40}
CASES = ("two to two", "three to two", "one to two", "two to one", "one to one")


@pytest.mark.parametrize("name", CASES)
def test_an_export_killed_at_any_point_leaves_no_mixture(name, tmp_path):
    found = crash.run_script(__file__, tmp_path, name)
    assert len(found) >= 12, "too few points to mean anything"
    seen = [case["loaded"] for case in found]
    # Old, perhaps none, new; once there is no going back there is none.
    ages = [("old", "none", "new")[(0, 2, 1).index(number)] for number in seen]
    order = ["old", "none", "new"]
    assert [order.index(age) for age in ages] == sorted(order.index(age) for age in ages)
    assert ages[0] == "old"
    assert ages[-1] == "new"
    if name == "one to one":
        assert "none" not in ages, "a single file is replaced in one step"


# -- the script -------------------------------------------------------------------------------------------------------


def export(folder: Path, limit: str, value: int) -> None:
    layout = plan_layout(ENTRIES, {}, max_shard_size=LIMITS[limit], safe_serialization=True)

    def write_file(path: Path, name: str) -> None:
        write_stream(path, layout.files[name], {}, lambda entry: [bytes([value]) * entry.nbytes])

    write_layout(folder, layout, write_file)


def look(folder: Path) -> int:
    """Return what a loader finds: 0 the old weights, 2 none, 1 the new ones."""
    from safetensors.numpy import load_file

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    assert not (single.exists() and index.exists()), "loaders would choose differently"
    if single.exists():
        files = [single]
    elif index.exists():
        files = [folder / name for name in set(json.loads(index.read_text())["weight_map"].values())]
    else:
        return 2
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    assert sorted(tensors) == ["a", "b", "c"]
    ages = {int(number) for value in tensors.values() for number in value}
    assert len(ages) == 1, f"a mixture of {ages}"
    return ages.pop()


def check(folder: Path, name: str) -> int:
    """Look, then export again over what the crash left."""
    found = look(folder)
    limit = name.split()[-1]
    export(folder, limit, 1)
    assert look(folder) == 1
    count = {"one": 1, "two": 3, "three": 4}[limit]
    assert len(list(folder.iterdir())) == count, "leftovers of the crash"
    return found


def save(folder: Path, rank: int, store: Path, name: str) -> None:
    crash.ready()
    export(folder, name.split()[-1], 1)


def main(root: Path, name: str) -> None:
    before = root / "before"
    export(before, name.split()[0], 0)
    print(crash.as_json(crash.kill_everywhere(root, before, 1, [name], save, check)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
