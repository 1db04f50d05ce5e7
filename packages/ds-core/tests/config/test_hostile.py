"""Sources made to harm: each is refused with one error, or loaded, with little memory and little time."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections import UserDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_core.config.loading import examine
from ds_core.config.problems import raise_problems
from ds_core.config.reading import read
from ds_core.errors import ConfigError

MEGABYTE = 2**20

LONGEST = 2**19
"""Characters of an error: 100 problems, each with a key of at most 1,000 characters, which its fix may write nested."""

# In a process of its own: what this one has allocated before does not count there. The limit is on what is added.
EXAMINE = """
import json, resource, sys
from ds_core.config.loading import examine
from ds_core.config.problems import raise_problems
from ds_core.errors import ConfigError
import hjson, encodings.idna  # loaded before the limit, which is for data
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
kind, source, compatible = sys.argv[1:]
given = {"path": lambda: source, "text": sys.stdin.read, "mapping": lambda: json.load(sys.stdin)}[kind]()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
try:
    examined = examine(given, compatible=compatible == "compatible")
    raise_problems(examined.problems, where=examined.document.where)
    print("no problems,", len(examined.warnings), "warnings")
except ConfigError as error:
    said = str(error)
    assert len(said) < int(LONGEST), len(said)
    assert said.startswith(error.what)
    print(error.what.splitlines()[0])
""".replace("LONGEST", str(LONGEST))


def examined_in_process(source: str = "", *, kind: str = "path", text: str | None = None, mode: str = "strict") -> str:
    """Return the first line of what is said, in a process with a limit on memory and one on time.

    Args:
        source: a path.
        kind: ``path``; ``text``, which is what ``text`` is; or ``mapping``, which ``text`` is as JSON.
        text: what the process has on stdin.
        mode: ``strict`` or ``compatible``.
    """
    result = subprocess.run(
        [sys.executable, "-c", EXAMINE, kind, source, mode],
        input=text, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


def fill(*parts: str) -> str:
    """Return a text of almost 1 MiB: the parts, with the middle one repeated."""
    head, middle, tail = parts
    return head + middle * ((MEGABYTE - len(head) - len(tail)) // len(middle)) + tail


NEVER_CLOSED = "this is neither JSON nor HJSON: this bracket is never closed (line 1, column 1)"
TOO_DEEP = "objects are nested more than 64 deep (line 1, column "
TOO_MANY = "the configuration has more than 100000 values"
TOO_LONG = "a line of "
UNKNOWN = "a: unknown key (its value is "

FILES = {
    # name: (text, beginning of what is said)
    "10 MB": ('{"a": "' + "x" * 10**7 + '"}', "the file has 10000009 bytes, a configuration may have 1048576"),
    "10 MB of spaces": (" " * 10**7, "the file has 10000000 bytes"),
    "deep objects": ('{"a":' * 10_000 + "1" + "}" * 10_000, TOO_DEEP + "321)"),
    "deep lists": ('{"a":' + "[" * 10_000 + "]" * 10_000 + "}", TOO_DEEP + "69)"),
    "deep HJSON": ("{a:" * 10_000 + "1\n" + "}" * 10_000, TOO_DEEP + "193)"),
    "deep HJSON lists": ("# c\na:" + "[" * 10_000, "objects are nested more than 64 deep (line 2, column 66)"),
    "deepest": (fill("", "[", ""), TOO_DEEP + "65)"),
    "deepest HJSON": (fill("a:", "{a:", ""), TOO_DEEP),
    "deep behind a string": ("a: NaN,\nb: " + "[" * 10_000, "objects are nested more than 64 deep (line 2, column 67)"),
    "deep behind what ends a JSON scan": ("{a: NaN, {\nb: " + "[" * 10_000, "objects are nested more than 64 deep"),
    "long key": ('{"' + "k" * 10**6 + '": 1}', 'a key has 1000000 characters, it may have 1000; it begins with "kkk'),
    "long bare key": ("k" * 10**6 + ": 1", "a key has 1000000 characters"),
    "99,999 keys": ("{" + ",".join(f'"{i}":1' for i in range(99_999)) + "}", "99999 problems in the configuration"),
    "100,001 keys": ("{" + ",".join(f'"{i}":1' for i in range(100_001)) + "}", TOO_MANY),
    "one key 100,000 times": ("{" + ",".join(['"a":1'] * 100_000) + "}", "2 problems in the configuration"),
    "40,000 keys twice": (
        "{" + ",".join(f'"{i}":1,"{i}":2' for i in range(40_000)) + "}",
        "80000 problems in the configuration",
    ),
    "20,000 misspelt keys of a section": (
        '{"zero_optimization": {' + ",\n".join(f'"stage_{i}": 1' for i in range(20_000)) + "}}",
        "20000 problems in the configuration",
    ),
    "many lists": (fill('{"a": [', "[],", "[]]}"), TOO_MANY),
    "many keys in HJSON": ("\n".join(f"{i}: 1" for i in range(90_000)), "90000 problems in the configuration"),
    "digits": ('{"a": ' + "1" * 100_000 + "}", "a number has 100000 digits (line 1, column 7)"),
    "digits in HJSON": ("a: " + "1" * 100_000, "a number has 100000 digits (line 1, column 4)"),
    "digits behind the point": ('{"a": 0.' + "1" * 100_000 + "}", "a number has 100002 characters (line 1, column 7)"),
    "large exponent": ('{"a": 1e999999}', "1e999999 is larger than the largest number, 1.8e308 (line 1, column 7)"),
    "large exponent in HJSON": ("a: 1e999999", "1e999999 is larger than the largest number"),
    "null bytes": ("\0" * 1000, "this is not text: it has a null byte (line 1, column 1)"),
    "escapes": (fill('{"a": "', "\\u0041", '"}'), UNKNOWN),
    "quotes": (fill('{"a": "', "'", '"}'), UNKNOWN),
    "unterminated string": (
        fill('{"a": "', "x", ""),
        "this is neither JSON nor HJSON: unterminated string (line 1, column 7)",
    ),
    "unterminated in single quotes": (fill("{a: '", '"', ""), "this is neither JSON nor HJSON: unterminated string"),
    "unterminated strings": (fill("{a: ", "'\n", ""), "this is neither JSON nor HJSON: invalid control character"),
    "comments": (fill("", "#\n", "a: 1"), UNKNOWN),
    "comments in one line": (fill("", "/**/", "a: 1"), TOO_LONG),
    "comment never closed": (fill("a: 1\n/*", "x", ""), "this is neither JSON nor HJSON: this comment is never closed"),
    "comments never closed": (fill("", "/* \n", ""), "this is neither JSON nor HJSON: this comment is never closed"),
    "spaces": (fill("", " ", "a: 1"), UNKNOWN),
    "spaces in a key": (fill("a", " ", ": 1"), UNKNOWN),
    "strings without quotes": (
        "".join(f"k{i}: hello, world\n" for i in range(40_000)),
        "40000 problems in the configuration",
    ),
    "long string without quotes": (fill("a: ", "x", ""), UNKNOWN),
    "number, or a string": (fill("# c\na: " + "1" * 500_000 + "x", ",", ""), TOO_LONG),
    "null, or a string": (fill("# c\na: n", "#", ""), TOO_LONG),
    "root that is a number, or a string": (fill("1" * 500_000 + "x", ",", ""), "a number has 500000 digits"),
    "strings of many lines in one": (fill("# c\na: [", "''''''", "]"), TOO_LONG),
    "strings of many lines": (fill("a: [\n", "''''''\n", "]"), TOO_MANY),
    "lines of one string": (fill(" " * 500_000 + "a: '''", "\n ", "'''"), UNKNOWN),
    "brackets that do not match": (fill('{"a": ', "{}", "}"), "this is neither JSON nor HJSON: "),
    "colons": (fill("", ":", ""), "this is neither JSON nor HJSON: "),
    "commas": (fill("", ",", ""), "this is neither JSON nor HJSON: "),
    "backslashes": (fill('{"a": "', "\\", ""), "this is neither JSON nor HJSON: unterminated string"),
    "halves of characters": (fill('{"a": "', "\\ud800", '"}'), "\\ud800 is half of a character"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    text, said = FILES[name]
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    assert examined_in_process(str(path)).startswith(said)


def many(count: int, key: str = "key_{}", value: Any = 1) -> dict[str, Any]:
    return {key.format(number): value for number in range(count)}


MAPPINGS: dict[str, tuple[dict[str, Any], int | str, int]] = {
    # name: (mapping, problems, those that compatibility mode ignores)
    "unknown keys": (many(60_000), 60_000, 60_000),
    "misspelt keys": (many(60_000, "train_batch_size{}"), 60_000, 60_000),
    "misspelt keys of a section": ({"zero_optimization": many(20_000, "stage_{}")}, 20_000, 20_000),
    "unknown keys of a rare section": ({"flops_profiler": many(60_000)}, 60_000, 60_000),
    "sections at the top": (many(20_000, value={"enabled": True, "stage": 3}), 20_000, 20_000),
    "keys with dots": (many(20_000, "zero_optimization.stage{}"), 20_000, 20_000),
    "keys with many dots": (many(90, "zero_optimization" + ".a" * 480 + "{}"), 90, 90),
    "long keys": (many(900, "k" * 990 + "{}"), 900, 900),
    "long values": (many(20, value="x" * 50_000), 20, 20),
    "wide values": (many(20, value=[1] * 4_000), 20, 20),
    "arguments of an optimizer": ({"optimizer": {"type": "Adam", "params": many(50_000)}}, 50_000, 0),
    "values that are no sections": (many(5_000, "flops_profiler{}", None), 5_000, 5_000),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize("name", MAPPINGS)
def test_mappings_with_many_problems(name: str) -> None:
    mapping, problems, _ = MAPPINGS[name]
    said = examined_in_process(kind="mapping", text=json.dumps(mapping))
    assert said == f"{problems} problems in the configuration"


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize("name", MAPPINGS)
def test_mappings_with_many_problems_in_compatibility_mode(name: str) -> None:
    mapping, problems, ignored = MAPPINGS[name]
    said = examined_in_process(kind="mapping", text=json.dumps(mapping), mode="compatible")
    assert said == (
        f"no problems, {ignored} warnings" if ignored == problems else f"{problems} problems in the configuration"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a":' * 10_000, "objects are nested more than 64 deep"),
        ('{"a": "' + "x" * 2**20 + '"}', "the text has 1048585 bytes, a configuration may have 1048576"),
        ("x" * 10**7, "the text has 13333336 characters"),
        (base64.urlsafe_b64encode(b'{"a": 1}').decode(), "file not found: "),  # encoded twice
    ],
)
def test_base64(text: str, said: str) -> None:
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    assert examined_in_process(kind="text", text=encoded).startswith(said)


@pytest.mark.skipif(sys.platform != "linux", reason="the paths are Linux's")
@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/dev/fd/0", "fifo"])
def test_what_is_no_file(tmp_path: Path, path: str) -> None:
    if path == "fifo":
        path = str(tmp_path / "fifo")
        os.mkfifo(path)
    assert examined_in_process(path, text='{"a": 1}') == "this is a pipe, a socket or a device, not a file"


@pytest.mark.skipif(sys.platform != "linux", reason="the path is Linux's")
def test_file_that_is_larger_than_it_says() -> None:
    assert Path("/proc/kallsyms").stat().st_size == 0
    assert (
        examined_in_process("/proc/kallsyms")
        == "the file has more than 1048576 bytes, a configuration may have 1048576"
    )


def error_of(source: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(source)
    assert len(str(caught.value)) < 2000
    return caught.value.what


def test_shared_lists_that_stand_for_billions() -> None:
    bomb: list[Any] = []
    for _ in range(30):
        bomb = [bomb] * 10
    assert error_of({"a": bomb}) == TOO_MANY
    few: dict[str, Any] = {}
    for _ in range(40):
        few = {"a": few, "b": few}
    assert error_of(few) == TOO_MANY


def test_what_contains_itself() -> None:
    endless: dict[str, Any] = {"train_batch_size": 1}
    endless["optimizer"] = endless
    assert error_of(endless) == "objects are nested more than 64 deep"
    items: list[Any] = []
    items.append(items)
    assert error_of({"a": items}) == "objects are nested more than 64 deep"
    wide: list[Any] = []
    wide.extend([wide] * 1000)
    assert error_of({"a": wide}) in ("objects are nested more than 64 deep", TOO_MANY)


def nested(levels: int, inner: Any) -> Any:
    value = inner
    for _ in range(levels):
        value = {"a": value}
    return value


def test_the_limits_are_the_same_for_mappings_and_files(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    for source, is_allowed in (
        (nested(64, 1), True),
        (nested(65, 1), False),
        (nested(63, []), True),
        (nested(64, []), False),
        ({"a": [1] * 99_999}, True),
        ({"a": [1] * 100_000}, False),
        ({"k" * 1000: 1}, True),
        ({"k" * 1001: 1}, False),
    ):
        path.write_text(json.dumps(source), encoding="utf-8")
        if is_allowed:
            assert read(path).raw == read(source).raw == source
        else:
            assert error_of(path).split(" (line")[0] == error_of(source)


class Raising(UserDict[str, Any]):
    def __iter__(self) -> Iterator[str]:
        raise OSError("no such thing")


class Endless(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        return 1

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        number = 0
        while True:
            yield str(number)
            number += 1


class Lying(dict[str, Any]):
    def __init__(self, items: Any) -> None:
        super().__init__()
        self.given = items

    def items(self) -> Any:
        return self.given


class RaisingList(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield 1
        raise ZeroDivisionError("division by zero")


class Deeper(UserDict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        return Deeper(a=1)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (Raising(), "a Raising in the configuration cannot be read: OSError: no such thing"),
        (Endless(), TOO_MANY),
        (Deeper(a=1), "objects are nested more than 64 deep"),
        (Lying([1]), "a Lying in the configuration cannot be read: TypeError: "),
        (Lying([([], 1)]), "a Lying in the configuration cannot be read: TypeError: unhashable type: 'list'"),
        (Lying(None), "a Lying in the configuration cannot be read: TypeError: "),
        (Lying([("a", RaisingList())]), "a RaisingList in the configuration cannot be read: ZeroDivisionError: "),
    ],
)
def test_mappings_that_lie_or_raise(value: Any, what: str) -> None:
    assert error_of(value).startswith(what)
    assert error_of({"a": [value]}).startswith(what)


def test_keys_of_mappings() -> None:
    assert error_of({"a": {"\ud800": 1}}) == "a key has half of a character: \\ud800"
    assert read({"a": {1: 2, None: 3}}).raw == {"a": {1: 2, None: 3}}  # what is no text is told by its path
    assert read({"nvme_path": "/data/\udcff"}).raw == {"nvme_path": "/data/\udcff"}  # how Python holds such a path


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.none(), inner, max_size=3)
    ),
    max_leaves=15,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=15,
)
FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def check(source: Any) -> None:
    """Examine ``source``: it is a document whose keys all may be asked for, or it is refused; each error prints."""
    try:
        examined = examine(source)
        document = examined.document
        assert type(document.raw) is dict
        for key in document.raw:
            assert (document.position((key,)) is None) == (document.text is None)
        raise_problems(examined.problems, where=document.where)
    except ConfigError as error:
        said = str(error)
    else:
        return
    assert 0 < len(said) < LONGEST


@FUZZ
@given(anything | st.text() | st.binary())
def test_any_source(source: Any) -> None:
    check(source)


@FUZZ
@given(
    st.binary()
    | st.text().map(str.encode)
    | st.text(st.sampled_from(list("ab1:,{}[]#/*'\"\\\n -eE.u\0"))).map(str.encode)
)
def test_any_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(data)
    check(path)
    check(base64.urlsafe_b64encode(data).decode())
    path.write_bytes(b"{" + data + b"}")
    check(path)


@FUZZ
@given(st.dictionaries(st.text(max_size=3), json_values, max_size=5), st.data())
def test_spoilt_json(tmp_path: Path, value: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(value, indent=data.draw(st.sampled_from([None, 2])))
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + data.draw(st.sampled_from(["", ",", "}", '"', "#", "\n", "x"])) + text[at + 1 :]
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    check(path)
