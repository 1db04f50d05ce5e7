"""The list of what DeepSpeed's pickles may name, and what each becomes. Nothing on it is ever imported or called.

Every entry makes a plain value out of arguments it checks itself (spec: the table of pickled names). A constructor
here can build numbers, strings, containers, :class:`Record` and :class:`TensorRef`, and nothing else.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

from ds_ckpt.formats.deepspeed.values import Global, Record, Storage, TensorRef

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["CALLABLE", "DTYPES", "RECORDS", "STORAGES", "check_key", "check_numpy_state", "is_allowed"]

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
"""Classes of storages in ``torch`` and ``torch.storage`` -> dtype of the elements they count."""

DTYPES = frozenset(
    [
        "float64",
        "double",
        "float32",
        "float",
        "float16",
        "half",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "int64",
        "long",
        "int32",
        "int",
        "int16",
        "short",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
        "complex64",
        "cfloat",
        "complex128",
        "cdouble",
    ]
)
"""Names in ``torch`` that are dtypes."""

RECORDS = frozenset(
    {
        Global("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        Global("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
        Global("deepspeed.utils.tensor_fragment", "fragment_address"),
        Global("deepspeed.runtime.bf16_optimizer", "fragment_address"),
        Global("deepspeed.checkpoint.universal_checkpoint", "SubparamShape"),
        Global("argparse", "Namespace"),
    }
)
"""Classes whose objects become a :class:`Record` of what was in their ``__dict__``."""

_BUILTINS = ("builtins", "__builtin__")


def is_allowed(found: Global) -> bool:
    """Return whether a pickle may name ``found`` at all."""
    if found.module in ("torch", "torch.storage") and found.name in STORAGES:
        return True
    if found.module == "torch" and found.name in DTYPES:
        return True
    return found in CALLABLE or found in RECORDS or found in _TYPES


def check_key(key: Any) -> None:
    """Refuse what cannot be a key of a dictionary or a member of a set, and what would be slow to hash.

    Raises:
        ValueError: saying why. (Hashing a tuple nested a million deep would end the process.)
    """
    parts = key if type(key) is tuple and len(key) <= 16 else (key,)
    for part in parts:
        if type(part) is int and not -(2**63) <= part < 2**64:
            raise ValueError("an integer of more than 64 bits as a key")
        if part is not None and type(part) not in (str, int, float, bool, bytes, Global):
            raise ValueError(f"a key of type {type(part).__name__}")


def _ordered_dict(*args: Any) -> OrderedDict[Any, Any]:
    found: OrderedDict[Any, Any] = OrderedDict()
    for items in args:  # protocol 1 passes [[key, value], ...]; later ones set items afterwards
        if type(items) is not list:
            raise ValueError("a dictionary made from something else than a list")
        for pair in items:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise ValueError("a dictionary made from something else than pairs")
            check_key(pair[0])
            found[pair[0]] = pair[1]
    return found


def _members(*args: Any) -> list[Any]:
    if not args:
        return []
    (items,) = args
    if type(items) not in (list, tuple):
        raise ValueError("a set or list made from something else than a list")
    for item in items:
        check_key(item)
    return list(items)


def _set(*args: Any) -> set[Any]:
    return set(_members(*args))


def _frozenset(*args: Any) -> frozenset[Any]:
    return frozenset(_members(*args))


def _counter(*args: Any) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for counts in args:
        if type(counts) is not dict:
            raise ValueError("a counter made from something else than a dictionary")
        found.update({key: value for key, value in counts.items() if type(value) is int})
    return found


def _defaultdict(*args: Any) -> dict[Any, Any]:
    return {}


def _size(dims: Any) -> tuple[int, ...]:
    if type(dims) not in (list, tuple) or not all(type(dim) is int for dim in dims):
        raise ValueError("a torch.Size of something else than integers")
    return tuple(dims)


def _enum(value: Any) -> int:
    if type(value) is not int:
        raise ValueError("a ZeRO stage that is no integer")
    return value


def _enum_member(kind: Any, name: Any) -> int:
    # Some releases of Python pickle a member of an enumeration as getattr(class, name).
    if kind != _ZERO_STAGE or type(name) is not str or name not in _ZERO_STAGES:
        raise ValueError("an attribute of something else than the ZeRO stages")
    return _ZERO_STAGES.index(name)


def _device(*args: Any) -> str:
    if not all(type(arg) in (str, int) for arg in args):
        raise ValueError("a device of something else than a name and a number")
    return ":".join(map(str, args))


def _bytes_of_text(text: Any, encoding: Any) -> bytes:
    # Protocol 2 has no bytes: they are written as text and encoded again.
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes written in another way than as latin-1 text")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    return b""


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorRef:
    if type(storage) is not Storage:
        raise ValueError("a tensor without a storage")
    return TensorRef.checked(storage, offset, shape, strides)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> TensorRef:
    if type(storage) is not Storage or type(dtype) is not Global or dtype.module != "torch":
        raise ValueError("a tensor without a storage or dtype")
    return TensorRef.checked(storage, offset, shape, strides, _DTYPE_ALIASES.get(dtype.name, dtype.name))


_DTYPE_ALIASES = {
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "cfloat": "complex64",
    "cdouble": "complex128",
}


def _parameter(data: Any, *rest: Any) -> TensorRef:
    if type(data) is not TensorRef:
        raise ValueError("a parameter without a tensor")
    return data


def _from_type(function: Any, kind: Any, args: Any, state: Any) -> TensorRef:
    # Tensors with attributes: the attributes (such as ds_id) mean nothing here.
    build = _REBUILDS.get(function) if type(function) is Global else None
    if build is None or kind not in _TENSOR_TYPES or type(args) is not tuple:
        raise ValueError("a tensor of a type that is not torch's own")
    return build(*args)


def _numpy_dtype(name: Any, *rest: Any) -> Record:
    if type(name) is not str:
        raise ValueError("a numpy dtype without a name")
    return Record(_NUMPY_DTYPE, {"name": name})


def check_numpy_state(record: Record, state: Any) -> None:
    """Refuse the state of a numpy dtype that is not of this machine's byte order.

    Raises:
        ValueError: saying so.
    """
    if record.of != _NUMPY_DTYPE or type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|", "="):
        raise ValueError("a numpy dtype that is not little-endian")


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if type(dtype) is not Record or dtype.of != _NUMPY_DTYPE or type(data) is not bytes:
        raise ValueError("a numpy scalar without dtype or data")
    code = _NUMPY_CODES.get(dtype.fields["name"])
    if code is None or len(data) != struct.calcsize(code):
        raise ValueError(f"a numpy scalar of dtype {dtype.fields['name'][:20]!r}")
    return struct.unpack(code, data)[0]


_ZERO_STAGE = Global("deepspeed.runtime.zero.config", "ZeroStageEnum")
_ZERO_STAGES = ("disabled", "optimizer_states", "gradients", "weights")
_NUMPY_DTYPE = Global("numpy", "dtype")
_NUMPY_CODES = {
    "f8": "<d",
    "f4": "<f",
    "f2": "<e",
    "i8": "<q",
    "i4": "<i",
    "i2": "<h",
    "i1": "<b",
    "u8": "<Q",
    "u4": "<I",
    "u2": "<H",
    "u1": "<B",
    "b1": "<?",
}
_REBUILDS: dict[Global, Callable[..., TensorRef]] = {
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
_TENSOR_TYPES = frozenset({Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter")})
_TYPES = _TENSOR_TYPES | {Global(module, name) for module in _BUILTINS for name in ("dict", "list", "int", "float")}
"""Named as arguments of others, such as a ``defaultdict(list)``; nothing is made of them."""

CALLABLE: Mapping[Global, Callable[..., Any]] = {
    **_REBUILDS,
    Global("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    Global("torch", "Size"): _size,
    Global("torch", "device"): _device,
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("collections", "Counter"): _counter,
    Global("collections", "defaultdict"): _defaultdict,
    **{Global(module, "set"): _set for module in _BUILTINS},
    **{Global(module, "frozenset"): _frozenset for module in _BUILTINS},
    Global("_codecs", "encode"): _bytes_of_text,
    **{Global(module, "bytes"): _no_bytes for module in _BUILTINS},
    _ZERO_STAGE: _enum,
    **{Global(module, "getattr"): _enum_member for module in _BUILTINS},
    _NUMPY_DTYPE: _numpy_dtype,
    Global("numpy.core.multiarray", "scalar"): _numpy_scalar,
    Global("numpy._core.multiarray", "scalar"): _numpy_scalar,
}
"""What may be called, and our own function in its place."""
