"""Python values <-> JSON, exactly: what JSON cannot hold is tagged where we know how, else refused with its key.

Needed because ``json`` alone turns tuples into lists and integer keys into strings without a word.
"""

from __future__ import annotations

import argparse
import base64
import datetime
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import PurePath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeGuard

from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["decode", "encode", "encode_mapping", "leaves"]

_TAG = "$ds"
_MAPPINGS: tuple[type[dict[Any, Any]], ...] = (OrderedDict, Counter)
"""Kinds of dictionaries that differ from a plain one where it matters: ``MultiStepLR`` keeps its steps in a Counter."""
MAX_TENSOR_BYTES = 2**20
"""A larger tensor in the JSON part is surely a mistake: it belongs into the model or a buffer."""


def encode(value: Any, where: str) -> Any:
    """Return ``value`` in what JSON can hold.

    None, booleans, numbers (inf and NaN too), strings, lists, tuples, dictionaries with such keys (also ordered ones
    and counters; a ``defaultdict`` comes back as a plain one, a ``torch.Size`` as a tuple), small tensors, torch's
    dtypes and devices, and NumPy scalars are understood.

    Args:
        where: name of the value, for errors: ``client_state``.

    Raises:
        CheckpointError: naming the key of what cannot be stored.
    """
    try:
        return _encode(value, where)
    except RecursionError:
        raise CheckpointError(
            "a value cannot be stored in a checkpoint: it is nested too deeply, or holds itself",
            where=where,
            fix="store lists and dictionaries that do not refer to what they are in",
        ) from None


def encode_mapping(value: Any, where: str) -> Any:
    """:func:`encode` for what must be a dictionary.

    Raises:
        CheckpointError: it is none, or holds what cannot be stored.
    """
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{where} is a {type(value).__name__}, not a dictionary", where=where, fix=f'pass {{"mine": {where}}}'
        )
    return encode(dict(value), where)


def _encode(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, int):  # IntEnum and the like
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_TAG: "float", "value": repr(float(value))}
    if isinstance(value, list):
        return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, tuple) and type(value) is tuple:
        return {_TAG: "tuple", "value": [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]}
    if type(value) is dict or isinstance(value, defaultdict):
        if all(type(key) is str and key != _TAG for key in value):
            return {key: _encode(item, f"{where}.{key}") for key, item in value.items()}
        return {_TAG: "dict", "value": _encode_pairs(value, where)}
    if type(value) in _MAPPINGS:
        return {_TAG: type(value).__name__, "value": _encode_pairs(value, where)}
    special = _encode_torch(value, where)
    if special is not None:
        return special
    raise _refused(f"a value of type {type(value).__name__}", where, _hint(value))


def _encode_pairs(value: Mapping[Any, Any], where: str) -> list[list[Any]]:
    return [[_encode(key, where), _encode(item, f"{where}[{key!r}]")] for key, item in value.items()]


def _refused(what: str, where: str, hint: str | None = None) -> CheckpointError:
    accepted = "numbers, text, lists, tuples, dictionaries and tensors are stored"
    return CheckpointError(
        f"{what} cannot be stored in a checkpoint without pickle",
        where=where,
        fix=f"{hint}; {accepted}" if hint else f"{accepted}; keep anything else in buffers or own files",
    )


def _hint(value: Any) -> str | None:
    """Return what to store in place of ``value``."""
    import numpy as np

    for kinds, hint in (
        (np.ndarray, "store torch.from_numpy(value), a tensor"),
        (np.dtype, "store str(value)"),
        (argparse.Namespace | SimpleNamespace, "store vars(value), a dictionary"),
        (PurePath, "store str(value)"),
        (datetime.date | datetime.time, "store value.isoformat()"),
        (datetime.timedelta, "store value.total_seconds()"),
        (set | frozenset, "store sorted(value), a list"),
        (bytes | bytearray, "store value.hex(), which bytes.fromhex reads"),
        (complex, "store (value.real, value.imag)"),
        (Enum, "store value.value"),
    ):
        if isinstance(value, kinds):
            return hint
    if is_dataclass(value) and not isinstance(value, type):
        return "store dataclasses.asdict(value)"
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return "store value._asdict()"
    return "store value.state_dict()" if hasattr(value, "state_dict") else None


def _encode_torch(value: Any, where: str) -> Any:
    """Encode what is torch's or NumPy's; None for anything else."""
    import numpy as np
    import torch

    if isinstance(value, torch.Size):
        return _encode(tuple(value), where)
    if isinstance(value, torch.dtype):
        return {_TAG: "dtype", "value": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {_TAG: "device", "value": str(value)}

    if isinstance(value, np.generic):
        item = value.item()
        # A longdouble is wider than any number of Python's, and stays itself.
        return None if isinstance(item, np.generic) else _encode(item, where)
    if not isinstance(value, torch.Tensor):
        return None
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        kind = "quantized" if value.is_quantized else "meta" if value.is_meta else str(value.layout)
        raise _refused(f"a {kind} tensor", where)
    if value.nbytes > MAX_TENSOR_BYTES:
        raise CheckpointError(
            f"a tensor of {value.nbytes} bytes in the JSON part of a checkpoint (allowed: {MAX_TENSOR_BYTES})",
            where=where,
            fix="register it as a buffer of the model, or write it to a file of its own",
        )
    values = value.detach().cpu().resolve_conj().resolve_neg()
    data = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        _TAG: "tensor",
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "value": base64.b64encode(data).decode("ascii"),
    }


def decode(value: Any) -> Any:
    """Return what :func:`encode` was given; tensors are on the CPU."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = value.get(_TAG)
    if tag is None:
        return {key: decode(item) for key, item in value.items()}
    if tag == "float":
        return float(value["value"])
    if tag == "tuple":
        return tuple(decode(item) for item in value["value"])
    if tag == "dict":
        return {decode(key): decode(item) for key, item in value["value"]}
    for mapping in _MAPPINGS:
        if tag == mapping.__name__:
            return mapping({decode(key): decode(item) for key, item in value["value"]})
    if tag in ("tensor", "dtype", "device"):
        return _decode_torch(tag, value)
    raise CheckpointError(f"unknown tag {tag!r} in the JSON part", where="checkpoint", fix="upgrade ds-core")


def _decode_torch(tag: str, value: Mapping[str, Any]) -> Any:
    import torch

    if tag == "tensor":
        data = bytearray(base64.b64decode(value["value"]))
        dtype = getattr(torch, value["dtype"])
        flat = torch.frombuffer(data, dtype=torch.uint8).view(dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(value["shape"])
    try:
        found = torch.device(value["value"]) if tag == "device" else getattr(torch, value["value"])
    except (RuntimeError, AttributeError, TypeError):
        found = None
    if not isinstance(found, torch.device | torch.dtype):
        raise CheckpointError(
            f"this torch knows no {tag} {value['value']!r}, which is in the checkpoint",
            where="checkpoint",
            fix="upgrade torch",
        )
    return found


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value inside ``value``, which is encoded, with the way to it; tensors stay as they are encoded.

    What no :func:`encode` wrote is taken as plain JSON. An empty list or dictionary is a leaf.

    >>> list(leaves({"lr": 0.5, "betas": {"$ds": "tuple", "value": [1, {"$ds": "float", "value": "inf"}]}}))
    [('lr', 0.5), ('betas[0]', 1), ('betas[1]', inf)]
    """
    waiting = [(path, value)]  # not recursive: a file may be nested deeper than Python calls
    while waiting:
        at, item = waiting.pop()
        inner = _inside(item, at)
        if inner:
            waiting += reversed(inner)
        else:
            yield at, _number(item)


def _inside(value: Any, path: str) -> list[tuple[str, Any]]:
    """Return what is directly in ``value``, with the way to it; nothing in a leaf."""
    if isinstance(value, dict):
        tag, inner = value.get(_TAG), value.get("value", [])
        if tag == "tuple" and isinstance(inner, list):
            return _inside(inner, path)
        if tag in ("dict", *(mapping.__name__ for mapping in _MAPPINGS)) and _are_pairs(inner):
            return [(_step(path, key), item) for key, item in inner]
        return (
            []
            if tag in ("float", "tensor", "dtype", "device")
            else [(_step(path, key), item) for key, item in value.items()]
        )
    return [(f"{path}[{index}]", item) for index, item in enumerate(value)] if isinstance(value, list) else []


def _are_pairs(value: Any) -> TypeGuard[list[list[Any]]]:
    return isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)


def _step(path: str, key: Any) -> str:
    if not isinstance(key, str):
        return f"{path}[{key!r}]"
    return f"{path}.{key}" if path else key


def _number(value: Any) -> Any:
    """Return the number that ``value`` stands for, where it is one that JSON has not; else itself."""
    if isinstance(value, dict) and value.get(_TAG) == "float" and value.get("value") in ("inf", "-inf", "nan"):
        return float(value["value"])
    return value
