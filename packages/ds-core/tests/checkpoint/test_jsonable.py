"""Values come back exactly, after real JSON in between; what cannot is refused with its key."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import json
import math
import pathlib
from collections import Counter, OrderedDict, defaultdict, namedtuple

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_core.checkpoint import jsonable
from ds_core.checkpoint.jsonable import decode, encode, encode_mapping, leaves
from ds_core.errors import CheckpointError


def round_trip(value: object) -> object:
    # strict: NaN and inf are no JSON, other programs could not read the manifest.
    return decode(json.loads(json.dumps(encode(value, "value"), allow_nan=False)))


def same(a: object, b: object) -> bool:
    """Equal in value and type; NaN equals NaN, 0.0 differs from -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a.hex() == b.hex()
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(*pair) for pair in zip(a.items(), b.items(), strict=True))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and same(as_bytes(a), as_bytes(b))
    return a == b


def as_bytes(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text()) | st.just("$ds")
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner) | st.dictionaries(st.text(), inner)
    ),
    max_leaves=20,
)


@given(values)
@settings(max_examples=300, deadline=None)
def test_every_value_comes_back(value):
    assert same(round_trip(value), value)


@given(values)
@settings(max_examples=50, deadline=None)
def test_what_is_encoded_stays_as_it_was(value):
    before = repr(value)
    encode(value, "value")
    assert repr(value) == before


EXAMPLES = [
    {"$ds": "tuple", "value": [1]},
    {"$ds": 1},
    [{"$ds": {"$ds": ()}}],
    {1: "int", "1": "text"},
    {True: 1, None: 2, 1.5: 3, (1, (2,)): 4},
    {float("inf"): -math.inf, "nan": math.nan},
    (),
    [[], {}, ((),)],
    2**200,
    -0.0,
    5e-324,
    "\ud800 \0 \u2028",
]


@pytest.mark.parametrize("value", EXAMPLES, ids=repr)
def test_awkward_values_come_back(value):
    assert same(round_trip(value), value)


DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex32", "complex64"),
    *("complex128", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_small_tensors_of_every_dtype(name):
    for shape in ((), (0, 3), (2, 3)):
        tensor = torch.arange(math.prod(shape)).reshape(shape).to(getattr(torch, name))
        assert same(round_trip(tensor), tensor)


def test_tensors_of_any_strides_and_with_a_graph():
    base = torch.arange(24.0).view(4, 6)
    weight = torch.nn.Parameter(base)
    for tensor in (base.t(), base[::2, 1:4], base[0, 0], torch.ones(1).expand(5), weight, weight * 2):
        found = round_trip(tensor)
        assert same(found, tensor.detach())
        assert not found.requires_grad
    found = round_trip(torch.zeros(2))
    found += 1  # its own memory, which may be written to


def test_complex_views_are_stored_as_what_they_show():
    value = torch.tensor([1 + 2j, 3 - 4j])
    assert round_trip(value.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert round_trip(value.conj().imag).tolist() == [-2.0, 4.0]


def test_subclasses_that_mean_a_plain_value_become_it():
    class Level(enum.IntEnum):
        HIGH = 3

    class Mode(str, enum.Enum):
        FAST = "fast"

    assert same(round_trip(Level.HIGH), 3)
    assert same(round_trip(Mode.FAST), "fast")
    assert same(round_trip(defaultdict(list, {1: [2]})), {1: [2]})
    assert same(round_trip(defaultdict(int, {"a": 2})), {"a": 2})


@pytest.mark.parametrize("value", [Counter({3: 2, 5: 1}), Counter("abca"), OrderedDict(b=1, a=(2,)), Counter()])
def test_counters_and_ordered_dictionaries_stay_what_they_are(value):
    # MultiStepLR keeps its milestones in a Counter, and asks it for elements().
    found = round_trip({"kept": value})["kept"]
    assert type(found) is type(value)
    assert found == value
    assert list(found) == list(value)


def test_a_torch_schedule_goes_on_from_its_state():
    def build() -> torch.optim.lr_scheduler.MultiStepLR:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4])
        optimizer.step()  # torch warns of a schedule that moves before its optimizer
        return schedule

    original, resumed = build(), build()
    original.step()
    resumed.load_state_dict(round_trip(original.state_dict()))
    for _ in range(4):
        original.step()
        resumed.step()
        assert resumed.get_last_lr() == original.get_last_lr()
    assert resumed._get_closed_form_lr() == original._get_closed_form_lr()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (numpy.float32(0.5), 0.5),
        (numpy.float64(0.1), 0.1),
        (numpy.float16("nan"), math.nan),
        (numpy.int64(-3), -3),
        (numpy.uint8(200), 200),
        (numpy.bool_(True), True),
        (numpy.str_("text"), "text"),
    ],
)
def test_numpy_scalars_become_python_ones(value, expected):
    assert same(round_trip([value]), [expected])


Pair = namedtuple("Pair", "a b")

REFUSED = {
    "bytes": b"data",
    "set": {1},
    "object": object(),
    "function": len,
    "complex": 1j,
    "namedtuple": Pair(1, 2),
    "ndarray": numpy.zeros(2),
    "bytes_": numpy.bytes_(b"x"),
    "datetime64": numpy.datetime64("2020-01-01"),
    "longdouble": numpy.longdouble(1.5),
    "sparse tensor": torch.ones(2, 2).to_sparse(),
    "meta tensor": torch.ones(2, device="meta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_is_refused_with_its_key(name):
    with pytest.raises(CheckpointError) as caught:
        encode({"run": [0, {"callback": ("x", REFUSED[name])}], "fine": 1}, "client_state")
    assert caught.value.where == "client_state.run[1].callback[1]"
    assert "cannot be stored in a checkpoint" in caught.value.what
    assert caught.value.fix


def test_a_key_that_cannot_be_stored_is_refused():
    with pytest.raises(CheckpointError, match="bytes") as caught:
        encode({"outer": {b"key": 1}}, "client_state")
    assert caught.value.where == "client_state.outer"


def test_a_value_that_holds_itself_is_refused():
    loop: dict = {"list": []}
    loop["list"].append(loop)
    with pytest.raises(CheckpointError, match="nested"):
        encode(loop, "client_state")


def test_a_large_tensor_is_refused_with_its_key():
    limit = jsonable.MAX_TENSOR_BYTES
    assert round_trip(torch.zeros(limit, dtype=torch.uint8)).numel() == limit
    with pytest.raises(CheckpointError) as caught:
        encode({"cache": torch.zeros(limit + 1, dtype=torch.uint8)}, "client_state")
    assert caught.value.where == "client_state.cache"
    assert str(limit + 1) in caught.value.what
    assert "buffer" in caught.value.fix


def test_a_tag_of_a_later_version_says_so():
    with pytest.raises(CheckpointError, match="unknown tag 'matrix'") as caught:
        decode({"a": [{"$ds": "matrix", "value": []}]})
    assert caught.value.fix == "upgrade ds-core"


def test_leaves_are_what_was_encoded_with_the_way_to_it() -> None:
    value = {
        "lr": 0.5,
        "betas": (0.9, [1, 2]),
        "by_step": {3: "x", (1, 2): None},
        "milestones": Counter({30: 1}),
        "ordered": OrderedDict(a=True),
        "infinite": -math.inf,
        "t": torch.ones(2),
        "nothing": [],
        "none": {},
    }
    found = dict(leaves(encode(value, "state"), "s"))
    assert found.pop("s.t")["shape"] == [2]
    assert found == {
        "s.lr": 0.5,
        "s.betas[0]": 0.9,
        "s.betas[1][0]": 1,
        "s.betas[1][1]": 2,
        "s.by_step[3]": "x",
        "s.by_step[{'$ds': 'tuple', 'value': [1, 2]}]": None,
        "s.milestones[30]": 1,
        "s.ordered.a": True,
        "s.infinite": -math.inf,
        "s.nothing": [],
        "s.none": {},
    }


@pytest.mark.parametrize(
    "value",
    [
        {"$ds": "tuple", "value": 3},
        {"$ds": "dict", "value": [[1, 2, 3]]},
        {"$ds": "float", "value": "a"},
        {"$ds": ["x"], "value": {}},
        {"$ds": "tensor"},
    ],
)
def test_leaves_of_what_nobody_encoded(value: object) -> None:
    assert {path.partition(".")[0] for path, _ in leaves({"a": value})} == {"a"}


def test_leaves_of_what_is_deeper_than_python_calls() -> None:
    value: object = 5
    for _ in range(10_000):
        value = [value]
    [(path, leaf)] = leaves(value)
    assert (len(path), leaf) == (30_000, 5)


@pytest.mark.parametrize(
    "value", [torch.float16, torch.bfloat16, torch.bool, torch.device("cpu"), torch.device("cuda", 1)], ids=str
)
def test_torchs_own_words_come_back(value):
    assert same(round_trip({"kept": [value]}), {"kept": [value]})
    assert len(list(leaves(encode({"kept": value}, "value")))) == 1


def test_a_size_becomes_a_tuple():
    assert same(round_trip(torch.Size([2, 3])), (2, 3))


@pytest.mark.parametrize("stored", [("dtype", "load"), ("dtype", "float7"), ("dtype", 3), ("device", "x:y")])
def test_words_that_this_torch_has_not_are_refused(stored):
    tag, value = stored
    with pytest.raises(CheckpointError, match=f"knows no {tag}"):
        decode({"$ds": tag, "value": value})


@dataclasses.dataclass
class Settings:
    rate: float


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (argparse.Namespace(rate=1), "vars(value)"),
        (pathlib.Path("a"), "str(value)"),
        (numpy.zeros(2), "torch.from_numpy(value)"),
        (numpy.dtype("f4"), "str(value)"),
        (datetime.datetime(2020, 1, 1), "value.isoformat()"),
        (datetime.timedelta(1), "value.total_seconds()"),
        ({1, 2}, "sorted(value)"),
        (b"x", "value.hex()"),
        (1j, "(value.real, value.imag)"),
        (Pair(1, 2), "value._asdict()"),
        (Settings(1.0), "dataclasses.asdict(value)"),
        (torch.nn.Linear(1, 1), "value.state_dict()"),
        (object(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_refusal_says_what_to_store_instead(value, hint):
    with pytest.raises(CheckpointError) as caught:
        encode(value, "client_state")
    fix = caught.value.fix
    assert "numbers, text, lists, tuples, dictionaries and tensors" in fix
    assert fix.startswith(f"store {hint}") if hint else not fix.startswith("store")


@pytest.mark.parametrize("value", [[1], "text", 0, None])
def test_what_must_be_a_dictionary_is_one(value):
    with pytest.raises(CheckpointError, match=f"client_state is a {type(value).__name__}, not a dictionary"):
        encode_mapping(value, "client_state")
    assert encode_mapping(OrderedDict(a=1), "client_state") == {"a": 1}
