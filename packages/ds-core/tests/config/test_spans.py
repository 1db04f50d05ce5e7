from __future__ import annotations

import json
from typing import Any

import hjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_core.config.spans import Span, spans

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


def check(text: str, span: Span, value: Any) -> None:
    assert json.loads(text[span.start : span.end]) == value
    assert (span.members is None) == (not isinstance(value, dict))
    for name, member in (span.members or {}).items():
        assert json.loads(text[member.start : member.key_end]) == name
        check(text, member.value, value[name])


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.sampled_from([None, 0, 3]), st.booleans())
def test_every_value_is_where_its_span_says(value: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    found = spans(text, is_plain_json=True)
    assert found is not None
    check(text, found.root, value)
    assert list(found.root.members or {}) == list(value)
    assert found.comments == []


HJSON = """\
# first
{
  a: 5e8 // of a
  "b c": some text, with , and } and # inside
  /* c: 1 */ d: [1, /* two */ 2.50
    x y
  ], e: {f: null}
}
// last
"""


def test_hjson() -> None:
    found = spans(HJSON, is_plain_json=False)
    assert found is not None
    members = found.root.members
    assert members is not None
    values = {name: HJSON[member.value.start : member.value.end] for name, member in members.items()}
    assert values == {
        "a": "5e8",
        "b c": "some text, with , and } and # inside",
        "d": "[1, /* two */ 2.50\n    x y\n  ]",
        "e": "{f: null}",
    }
    assert list(hjson.loads(HJSON)) == list(members)
    comments = [HJSON[start:end] for start, end in found.comments]
    assert comments == ["# first", "// of a", "/* c: 1 */", "/* two */", "// last"]
    assert found.numbers == {5e8: "5e8", 2.5: "2.50"}


def test_root_without_braces() -> None:
    found = spans("a: 1\nb: {c: 2}\n", is_plain_json=False)
    assert found is not None
    assert list(found.root.members or {}) == ["a", "b"]


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "{a: 'x'}", "{a: '''x'''}", "{a: 1 /* }", "{'a': 1}", "{a: 1}}", "{"])
def test_forms_that_are_not_known(text: str) -> None:
    assert spans(text, is_plain_json=False) is None
