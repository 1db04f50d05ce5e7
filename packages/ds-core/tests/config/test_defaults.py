"""A snapshot of every default (``defaults.json``): none changes without being meant to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_core.config import examine
from ds_core.config.catalog import all_sections
from ds_core.config.config import BatchKeys, Config
from ds_core.config.paths import sections_of
from ds_core.config.schema import names_of
from ds_core.config.section import Section
from ds_core.config.sections.arguments import ARGUMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

SNAPSHOT = Path(__file__).with_name("defaults.json")
REQUIRED = "required"


def current() -> dict[str, Any]:
    """Return the path of every key -> its default, of those in lists and free objects too (``*``)."""
    found = dict(_keys(BatchKeys, ""))
    found |= {key: value for key, value in _keys(Config, "") if key not in found}
    for name, section in all_sections().items():
        if name not in sections_of(Config):
            found |= _keys(section, f"{name}.")
    for section_name, models in ARGUMENTS.items():
        for type_name, section in models.items():
            found |= _keys(section, f"{section_name}.params({type_name.lower()}).")
    plain: dict[str, Any] = json.loads(json.dumps(found))  # tuples are lists
    return plain


def _keys(model: type[Section], before: str) -> Iterator[tuple[str, Any]]:
    for field, info in model.model_fields.items():
        path = before + names_of(model, field)[0]
        default = info.get_default(call_default_factory=True, validated_data={})
        if not isinstance(default, Section):
            yield path, REQUIRED if info.is_required() else default
        inner = sections_of(model).get(field)
        if inner is not None:
            yield from _keys(inner, f"{path}.*." if isinstance(default, (dict, list, tuple)) else f"{path}.")


def differences() -> list[str]:
    old, new = json.loads(SNAPSHOT.read_text(encoding="utf-8")), current()
    return [
        f"{path}: was {old.get(path, 'not there')!r}, is {new.get(path, 'not there')!r}"
        for path in sorted(old.keys() | new.keys())
        if path not in old or path not in new or (old[path], type(old[path])) != (new[path], type(new[path]))
    ]


def write() -> None:
    SNAPSHOT.write_text(json.dumps(current(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def test_no_default_changed() -> None:
    assert not differences(), (
        "if that is meant: `python packages/ds-core/tests/config/test_defaults.py` writes defaults.json anew; "
        "say it in the package's CHANGELOG, since every configuration that leaves the key out changes with it"
    )


def test_a_changed_default_is_seen(tmp_path: Path, monkeypatch: Any) -> None:
    changed = tmp_path / "defaults.json"
    changed.write_text(json.dumps(current() | {"gradient_clipping": 1, "fp16.hysteresis": 3}), encoding="utf-8")
    monkeypatch.setitem(globals(), "SNAPSHOT", changed)
    assert differences() == ["fp16.hysteresis: was 3, is 2", "gradient_clipping: was 1, is 1.0"]


def written_out() -> dict[str, Any]:
    """Return a configuration that gives every key its default."""
    result: dict[str, Any] = {}
    absent = {path for path, default in current().items() if default is None}
    for path, default in current().items():
        parts = path.split(".")
        parents = {".".join(parts[:length]) for length in range(1, len(parts))}
        if "*" in parts or "(" in path or parents & absent:
            continue
        holder = result
        for part in parts[:-1]:
            holder = holder.setdefault(part, {})
        holder[parts[-1]] = default
    return result


def test_every_default_may_be_written_out() -> None:
    examined = examine({**written_out(), "train_batch_size": 8}, dp_world_size=2)
    assert [str(problem) for problem in examined.problems] == []
    left_out = examine({"train_batch_size": 8}, dp_world_size=2).config
    assert dict(examined.config) == dict(left_out)
    assert len(examined.config.sections) > len(left_out.sections)
    for name, section in examined.config.sections.items():
        assert section == left_out.section(name)


if __name__ == "__main__":
    write()
