"""The interpreter builds plain values, and refuses everything else by name without running or importing it."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pickle
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_ckpt.formats.deepspeed.jsonable import Encoder
from ds_ckpt.formats.deepspeed.unpickle import Limits, unpickle
from ds_ckpt.formats.deepspeed.values import Record, Storage, TensorRef
from ds_core.errors import CheckpointError

FIXTURES = Path(__file__).parent / "deepspeed-0.19.6"
STOP = b"."
LEFT = Path(tempfile.gettempdir()) / f"ds-ckpt-was-run-{os.getpid()}"
SMALL = Limits(nbytes=2**16, opcodes=20_000, marks=50, tensors=50, storages=50, copied=10_000)


def load(data: bytes, limits: Limits | None = None) -> Any:
    return unpickle(data, file="x.pt", limits=limits).value


def refused(data: bytes, limits: Limits | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(data, limits)
    assert "x.pt, byte" in (caught.value.where or "")
    assert caught.value.fix
    return caught.value.what


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def storage(key: str = "0", numel: int = 6, kind: str = "FloatStorage") -> bytes:
    parts = text("storage") + name("torch", kind) + text(key) + text("cpu") + number(numel)
    return b"(" + parts + b"tQ"


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(offset: int, shape: bytes, strides: bytes, of: bytes | None = None) -> bytes:
    args = (storage() if of is None else of) + number(offset) + shape + strides + b"\x89)"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + args + b"tR"


PLAIN: list[Any] = [
    None,
    True,
    0,
    255,
    65536,
    -1,
    2**62,
    -(2**200),
    1.5,
    float("inf"),
    "",
    "ü" * 300,
    b"",
    b"x" * 300,
    [],
    [1, [2, [3]]],
    (),
    (1,),
    (1, 2, 3, 4),
    {},
    {"a": {1: (None, {True: []})}},
    {1, 2},
    frozenset({3}),
    collections.OrderedDict([("a", 1), ("b", 2)]),
    collections.Counter({"a": 2}),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_come_back(value: Any, protocol: int) -> None:
    found = load(pickle.dumps(value, protocol))
    assert found == value
    assert type(found) is type(value)


def test_shared_values_stay_shared_and_a_value_may_hold_itself() -> None:
    inner = [1]
    found = load(pickle.dumps([inner, inner], 2))
    assert found[0] is found[1]
    inner.append(inner)  # type: ignore[arg-type]
    found = load(pickle.dumps(inner, 2))
    assert found[1] is found


def test_objects_on_the_list_become_records() -> None:
    found = load(pickle.dumps(argparse.Namespace(lr=0.1, name="x"), 2))
    assert type(found) is Record
    assert (str(found.of), found.fields) == ("argparse.Namespace", {"lr": 0.1, "name": "x"})


@pytest.mark.parametrize("value", [np.float64(1.25), np.float32(0.5), np.int64(-3), np.bool_(True), np.uint8(7)])
def test_numpy_scalars_become_numbers(value: np.generic) -> None:
    found = load(pickle.dumps(value, 2))
    assert found == value.item()
    assert type(found) is type(value.item())


def test_a_default_dict_becomes_a_plain_one() -> None:
    value = collections.defaultdict(list, {"a": [1]})
    found = load(pickle.dumps(value, 2))
    assert (type(found), found) == (dict, {"a": [1]})


def test_a_stage_is_a_number_in_both_ways_to_pickle_an_enumeration() -> None:
    kind = name("deepspeed.runtime.zero.config", "ZeroStageEnum")
    assert load(b"\x80\x02" + kind + b"K\x02\x85R.") == 2
    assert load(b"\x80\x02" + name("__builtin__", "getattr") + kind + text("gradients") + b"\x86R.") == 2


def test_a_tensor_is_a_reference() -> None:
    found = load(tensor(1, sizes(2, 2), sizes(2, 1)) + STOP)
    assert type(found) is TensorRef
    assert (found.offset, found.shape, found.strides, found.dtype) == (1, (2, 2), (2, 1), "float32")
    assert type(found.storage) is Storage
    assert (found.storage.key, found.storage.numel, found.storage.file) == ("0", 6, "x.pt")


class _Reduces:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


@pytest.fixture
def nothing_runs() -> Any:
    LEFT.unlink(missing_ok=True)
    before = set(sys.modules)
    yield
    assert not LEFT.exists()
    assert set(sys.modules) == before


def call(module: str, attribute: str, *args: bytes) -> bytes:
    return name(module, attribute) + b"(" + b"".join(args) + b"tR"


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (_Reduces(os.system, (f"touch {LEFT}",)), "posix.system"),
        (_Reduces(eval, ("1",)), "eval"),
        (_Reduces(exec, ("1",)), "exec"),
        (_Reduces(getattr, ("", "join")), "getattr"),
        (_Reduces(print, ("x",)), "print"),
        (_Reduces(pickle.loads, (b".",)), "pickle.loads"),
        (_Reduces(type, ("X", (), {})), "type"),
        (os.path.join, "posixpath.join"),
        (complex(1, 2), "complex"),
        (Path("/x"), "pathlib"),
        (np.zeros(3), "_reconstruct"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_other_names_are_refused_by_name(value: Any, named: str, protocol: int) -> None:
    assert named in refused(pickle.dumps(value, protocol))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "data",
    [
        call("os", "system", text(f"touch {LEFT}")),
        call("builtins", "getattr", name("builtins", "list"), text("__class__")),
        call("builtins", "getattr", call("builtins", "getattr", name("torch", "Size"), text("x")), text("y")),
        call("builtins", "__import__", text("os")),
        call("torch", "load", text("x.pt")),
        call("torch.storage", "_load_from_bytes", text("x")),
        call("torch._utils", "_rebuild_sparse_tensor"),
        call("copyreg", "_reconstructor", name("builtins", "dict"), name("builtins", "object"), b"N"),
        call("builtins", "list", name("os", "system")),
        call("operator", "attrgetter", text("__class__")),
        call("functools", "partial", name("os", "system")),
        name("collections", "OrderedDict.__class__"),
        text("collections") + text("OrderedDict.fromkeys") + b"\x93",
    ],
)
def test_chains_of_names_are_refused(data: bytes) -> None:
    assert "on the list" in refused(data + STOP) or "an attribute of something else" in refused(data + STOP)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "module", ["ds_ckpt.formats.deepspeed.allowed", "antigravity", "torch.hub", "torch", "deepspeed.anything", "os"]
)
def test_modules_are_not_imported(module: str) -> None:
    assert f"'{module}.load'" in refused(name(module, "load") + b")R.")


ATTRIBUTES = "getattr __class__ __dict__ __setstate__ __reduce__ __init__ fields of"


@pytest.mark.parametrize("attribute", ATTRIBUTES.split())
def test_build_sets_no_attribute(attribute: str) -> None:
    made = name("argparse", "Namespace") + b")\x81}" + text(attribute) + text("x") + b"sb."
    found = load(made)
    assert type(found) is Record
    assert found.fields == {attribute: "x"}
    assert str(found.of) == "argparse.Namespace"


def test_build_fills_only_what_is_on_the_list() -> None:
    assert "fills a list" in refused(b"]}b.")
    assert "fills a str" in refused(text("x") + b"}b.")
    assert "fills a Global" in refused(name("torch", "Size") + b"}b.")
    assert "is no dictionary" in refused(name("argparse", "Namespace") + b")\x81]b.")
    assert "no text" in refused(name("argparse", "Namespace") + b")\x81}K\x01Nsb.")
    # Attributes of dictionaries and tensors are dropped.
    found = load(name("collections", "OrderedDict") + b")R}" + text("clear") + b"Nsb.")
    assert (type(found), vars(found)) == (collections.OrderedDict, {})


def test_the_arguments_of_names_on_the_list_are_checked() -> None:
    size = name("torch", "Size")
    assert "torch.Size" in refused(size + text("ab") + b"\x85R.")
    assert "torch.Size" in refused(size + b")R.")
    assert "not to be called" in refused(name("torch", "FloatStorage") + b")R.")
    assert "with arguments" in refused(name("argparse", "Namespace") + b"K\x01\x85R.")
    assert "no name" in refused(b"K\x01)R.")
    assert "no name" in refused(text("os.system") + b")R.")
    kind = name("deepspeed.runtime.zero.config", "ZeroStageEnum")
    assert "getattr" in refused(name("builtins", "getattr") + kind + text("__class__") + b"\x86R.")
    size_named = name("builtins", "getattr") + size + text("gradients") + b"\x86R."
    assert "getattr" in refused(size_named)
    rebuild = name("torch._tensor", "_rebuild_from_type_v2")
    of_another_type = b"(" + name("torch._utils", "_rebuild_tensor_v2") + size + b"(" + storage() + b"K\x00"
    of_another_type += sizes(1) + sizes(1) + b"tNt"
    assert "_rebuild_from_type_v2: a tensor of a type" in refused(rebuild + of_another_type + b"R.")
    for function in (name("_codecs", "encode"), name("torch", "Size"), rebuild, b"N"):
        args = b"(" + function + name("torch", "Tensor") + b"))t"
        assert "_rebuild_from_type_v2: a tensor of a type" in refused(rebuild + args + b"R.")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (storage(key="../../etc/passwd"), "named '../../etc/passwd'"),
        (storage(key="/etc/passwd"), "named '/etc/passwd'"),
        (storage(key="0/../1"), "no number"),
        (storage(key=""), "no number"),
        (storage(key="٣"), "no number"),
        (storage(numel=-1), "-1 elements"),
        (storage(numel=2**61), "elements"),
        (storage(kind="Size"), "unknown class"),
        (storage() + storage(numel=7), "described in two ways"),
        (storage() + storage(kind="LongStorage"), "described in two ways"),
        (text("data/0") + b"Q", "no storage"),
        (b"Pdata/0\n", "'PERSID'"),
        (b"]Q", "no storage"),
    ],
)
def test_references_that_are_no_storages_are_refused(data: bytes, named: str) -> None:
    assert named in refused(data + STOP)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, sizes(10**12), sizes(1)),
        (0, sizes(10**12), sizes(0)),
        (0, sizes(7), sizes(1)),
        (6, sizes(1), sizes(1)),
        (2**61, sizes(1), sizes(1)),
        (-1, sizes(1), sizes(1)),
        (0, sizes(-1), sizes(1)),
        (0, sizes(2), sizes(-1)),
        (5, sizes(2), sizes(-5)),
        (0, sizes(2, 2), sizes(1)),
        (0, sizes(2), sizes(2**70)),
        (0, sizes(*[1] * 65), sizes(*[1] * 65)),
        (0, sizes(2, 3), sizes(6, 1)),
        (0, text("ab"), text("ab")),
        (0, b"]", b"]"),
        (0, b"\x88\x85", b"\x88\x85"),
    ],
)
def test_tensors_outside_their_storage_are_refused(offset: int, shape: bytes, strides: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"not what torch\.save writes"):
        load(tensor(offset, shape, strides) + STOP)


def test_a_tensor_needs_a_storage() -> None:
    assert "without a storage" in refused(tensor(0, sizes(1), sizes(1), of=b"]") + STOP)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "does not end"),
        (b"]", "does not end"),
        (b".", "in the middle"),
        (b"]].", "in the middle"),
        (b"(].", "in the middle"),
        (b"0.", "not there"),
        (b"e.", "not begun"),
        (b"(e.", "not there"),
        (b"}(K\x01u.", "key without a value"),
        (b"h\x00.", "did not remember"),
        (b"q\x00.", "not there"),
        (b"\x80\x06N.", "protocol 6"),
        (b"X\xff\xff\xff\xff", "announced"),
        (b"\x8d" + b"\xff" * 8, "announced"),
        (b"X\x01\x00\x00\x00\xff.", "UTF-8"),
        (b"\x8b\xff\xff\xff\x7f", "integer of 2147483647 bytes"),
        (b"\x8b\xff\xff\xff\xff", "integer of -1 bytes"),
        (b"cos\nsystem", "without an end"),
        (b"c" + b"a" * 2000 + b"\n\n", "without an end"),
        (b"\xff", "0xff"),
        (b"I1\n.", "'INT'"),
        (b"ios\nsystem\n.", "'INST'"),
        (b"(cos\nsystem\no.", "os.system"),
        (b"\x82\x01.", "'EXT1'"),
        (b"}]Ns.", "key of type list"),
        (b"}" + b")" + b"\x85" * 3 + b"Ns.", "key of type tuple"),
        (b"\x8f(]\x90.", "key of type list"),
        (b"K\x01K\x02\x86K\x03a.", "fills a tuple"),
        (b"NNNs.", "fills a NoneType"),
        (b"K\x01N\x93.", "no text"),
    ],
)
def test_what_is_no_pickle_is_refused(data: bytes, named: str) -> None:
    assert named in refused(data)


def test_limits_hold() -> None:
    assert "opcodes" in refused(b"N0" * 100_000 + b"N.", SMALL)
    assert "within 65536 bytes" in refused(b"N0" * 100_000 + b"N.", Limits(nbytes=2**16))
    assert "65531 are left" in refused(b"X" + (2**16).to_bytes(4, "little") + b"a" * 2**17, SMALL)
    assert "nested deeper" in refused(b"(" * 100, SMALL)
    assert "copies" in refused(
        b"](" + b"K\x01" * 2000 + b"eq\x00" + (name("torch", "Size") + b"h\x00\x85R0") * 9, SMALL
    )
    whole = (
        name("argparse", "Namespace") + b")\x81q\x00}(" + b"".join(text(str(i)) + b"N" for i in range(900)) + b"uq\x01b"
    )
    assert "copies" in refused(whole + b"h\x01b" * 20, SMALL)
    many = b"".join(storage(key=str(index)) for index in range(60))
    assert "storages" in refused(many, SMALL)
    assert "tensors" in refused(tensor(0, sizes(1), sizes(1)) * 60, SMALL)


@pytest.mark.parametrize(
    "one",
    [b"\x8f", b"}", b"]", b"(l", b"(d", b"(\x91", b"h\x00)R", b"h\x01)\x81"],
    ids=["set", "dict", "list", "list of", "dict of", "frozenset", "OrderedDict", "record"],
)
def test_an_opcode_of_a_byte_makes_no_gigabytes(one: bytes) -> None:
    made = (name("collections", "OrderedDict") + b"q\x00") + (name("argparse", "Namespace") + b"q\x01")
    few = Limits(containers=100)
    assert len(load(made + b"(" + one * 100 + b"t\x87" + STOP, few)[2]) == 100
    assert "it has more than 100 containers" in refused(made + b"(" + one * 101 + b"t" + STOP, few)


@pytest.mark.parametrize("one", [b"N\x85", b")\x85", b"NN\x86", b"NNN\x87", b"(t", b"(Nt"])
def test_tuples_are_counted(one: bytes) -> None:
    assert "it has more than 100 tuples" in refused(b"(" + one * 101 + b"l.", Limits(tuples=100))


@pytest.mark.parametrize("one", [b"\x94", b"q%c", b"r%c\0\0\0"])
def test_what_is_remembered_is_counted(one: bytes) -> None:
    data = b"N" + b"".join(one % index if b"%" in one else one for index in range(101)) + b"."
    assert "it remembers more than 100 values" in refused(data, Limits(memo=100))
    load(data, Limits(memo=101))


def test_deep_nesting_ends_no_process() -> None:
    deep = 200_000
    found = load(b")" + b"\x85" * deep + STOP)
    assert type(found) is tuple
    assert "key of type tuple" in refused(b"})" + b"\x85" * deep + b"Ns.")
    assert "key of type tuple" in refused(name("builtins", "set") + b"](" + b")" + b"\x85" * deep + b"e\x85R.")


def test_a_memo_bomb_costs_nothing() -> None:
    # Each list holds the one before twice: 2**60 leaves in 61 lists.
    bomb = b"(]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"l."
    found = load(bomb)
    assert len(found) == 61
    with pytest.raises(CheckpointError, match="nested too deeply, or holding itself"):
        Encoder(Path()).encode(found[-1], "client_state")


def test_a_value_that_holds_itself_is_no_json() -> None:
    with pytest.raises(CheckpointError, match="nested too deeply, or holding itself"):
        Encoder(Path()).encode(load(b"]q\x00h\x00a."), "client_state")


def _pickles() -> list[bytes]:
    found = []
    for path in sorted(FIXTURES.glob("*/*/*.pt")):
        with zipfile.ZipFile(path) as archive:
            found.append(archive.read(next(entry for entry in archive.namelist() if entry.endswith("/data.pkl"))))
    return found


PICKLES = _pickles()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_pickles_are_read_or_refused(data: st.DataObject) -> None:
    mutated = bytearray(data.draw(st.sampled_from(PICKLES)))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        kind = data.draw(st.sampled_from(["set", "delete", "insert", "repeat"]))
        if kind == "set":
            mutated[at] = data.draw(st.integers(0, 255))
        elif kind == "delete":
            del mutated[at : at + data.draw(st.integers(1, 20))]
        elif kind == "insert":
            mutated[at:at] = data.draw(st.binary(max_size=6))
        else:
            mutated[at:at] = mutated[at : at + data.draw(st.integers(1, 40))]
    _read_or_refuse(bytes(mutated))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from([bytes([code]) for code in range(256)] + [b"K\x01", b"h\x00", b"q\x00", b"]", b"}", b"("]))
)
@example([b"(", b"t", b"."])
def test_random_opcodes_are_read_or_refused(codes: list[bytes]) -> None:
    _read_or_refuse(b"".join(codes) + STOP)


def _read_or_refuse(data: bytes) -> None:
    before = set(sys.modules)
    with contextlib.suppress(CheckpointError):
        unpickle(data, file="x.pt", limits=SMALL)
    assert set(sys.modules) == before
