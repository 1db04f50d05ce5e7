"""Plain values of a pickle -> JSON in the form of ``ds_core.checkpoint.jsonable``, whose ``decode`` reads it.

That module's own ``encode`` takes tensors; here they are references, and values may hold themselves. Loads no torch.
"""

from __future__ import annotations

import base64
import math
import os
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

from ds_ckpt.formats.deepspeed.values import Global, Record, TensorRef
from ds_ckpt.storage.local import open_inside
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Encoder"]

_TAG = "$ds"
_MAX_DEPTH = 100
_MAX_VALUES = 500_000
_MAX_TEXT = 128 * 2**20
_MAX_TENSOR_BYTES = 2**20
"""As in ``ds_core.checkpoint.jsonable``: a larger tensor does not belong into client state."""
_MAX_INT = 2**256
_MAX_REASONS = 1000


class Encoder:
    """Encodes values of one checkpoint; what all of them take together is bounded, as a value can occur many times."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values = 0
        self.text = 0

    def encode(self, value: Any, where: str) -> Any:
        """Return ``value`` as JSON.

        Args:
            value: numbers, texts, lists, tuples, dictionaries, sets, small tensors and namespaces.
            where: its name, for errors: ``client_state``.

        Raises:
            CheckpointError: naming the key of what cannot be kept.
        """
        return self._encode(value, where, 0)

    def encode_each(self, values: Mapping[Any, Any], where: str) -> tuple[Any, dict[str, str]]:
        """Return a dictionary of the caller's as JSON, and of each value that cannot be kept its key and why.

        Raises:
            CheckpointError: there are too many of those.
        """
        kept: dict[Any, Any] = {}
        reasons: dict[str, str] = {}
        for key, value in values.items():
            try:
                kept[key] = self.encode(value, f"{where}.{str(key)[:80]}")
            except CheckpointError as error:
                if len(reasons) >= _MAX_REASONS:
                    raise
                place = (error.where or "").removeprefix(f"{self.folder}, ")
                reasons[str(key).encode("utf-8", "replace").decode("utf-8")[:500]] = f"{error.what} ({place})"
        if all(type(key) is str and key != _TAG for key in kept):
            return {self._text(key, where): value for key, value in kept.items()}, reasons
        return {_TAG: "dict", "value": [[self.encode(key, where), value] for key, value in kept.items()]}, reasons

    def _encode(self, value: Any, where: str, depth: int) -> Any:
        self.values += 1
        if depth > _MAX_DEPTH or self.values > _MAX_VALUES:
            raise self._refused("a value nested too deeply, or holding itself", where)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._text(value, where)
        if isinstance(value, int):
            if abs(value) >= _MAX_INT:
                raise self._refused("an integer of more than 256 bits", where)
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
        inner = depth + 1
        if isinstance(value, list):
            return [self._encode(item, f"{where}[{index}]", inner) for index, item in enumerate(value)]
        if isinstance(value, tuple):
            items = [self._encode(item, f"{where}[{index}]", inner) for index, item in enumerate(value)]
            return {_TAG: "tuple", "value": items}
        if isinstance(value, set | frozenset):
            # JSON has no sets, and neither has this form: a sorted list is the same members.
            return [self._encode(item, where, inner) for item in sorted(value, key=repr)]
        if isinstance(value, dict):
            return self._dict(value, where, inner)
        if type(value) is Record and value.of.name == "Namespace":
            return self._dict(value.fields, where, inner)
        if type(value) is TensorRef:
            return self._tensor(value, where)
        kind = value.of if type(value) is Record else value if type(value) is Global else type(value).__name__
        raise self._refused(f"a value of type {kind}", where)

    def _text(self, value: str, where: str) -> str:
        self.text += len(value)
        if self.text > _MAX_TEXT:
            raise self._refused("a text that occurs too often", where)
        return value.encode("utf-8", "replace").decode("utf-8")

    def _dict(self, value: Mapping[Any, Any], where: str, depth: int) -> Any:
        kind = type(value).__name__ if type(value) in (OrderedDict, Counter) else "dict"
        if kind == "dict" and all(type(key) is str and key != _TAG for key in value):
            return {
                self._text(key, where): self._encode(item, f"{where}.{key[:80]}", depth) for key, item in value.items()
            }
        pairs = [
            [self._encode(key, where, depth), self._encode(item, f"{where}[{str(key)[:80]!r}]", depth)]
            for key, item in value.items()
        ]
        return {_TAG: kind, "value": pairs}

    def _tensor(self, value: TensorRef, where: str) -> Any:
        nbytes = value.span_nbytes
        if nbytes > _MAX_TENSOR_BYTES or not value.is_row_by_row:
            raise self._refused(f"a tensor of {nbytes} bytes, or with gaps", where)
        with os.fdopen(open_inside(self.folder, value.file), "rb") as file:
            file.seek(value.start_byte)
            data = file.read(nbytes)
        self._text(" " * nbytes, where)
        return {
            _TAG: "tensor",
            "dtype": value.dtype,
            "shape": list(value.shape),
            "value": base64.b64encode(data).decode("ascii"),
        }

    def _refused(self, what: str, where: str) -> CheckpointError:
        return CheckpointError(
            f"{what} cannot be taken over from DeepSpeed's checkpoint",
            where=f"{self.folder}, {where[:500]}",
            fix="save it again with DeepSpeed without this value, which is the caller's own",
        )
