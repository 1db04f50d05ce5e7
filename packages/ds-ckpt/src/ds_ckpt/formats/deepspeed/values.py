"""What the files hold, as plain values: references into storages, and records in place of objects. Loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ds_core.checkpoint.safetensors_format import ITEM_BYTES
from ds_core.errors import CheckpointError

__all__ = ["Global", "Record", "Storage", "TensorRef"]

_MAX_DIMS = 64


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names. Only a name: nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object of a class on the list: its name, and what was in its ``__dict__``."""

    of: Global
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Storage:
    """A storage that a pickle refers to; where it is in the file is found out afterwards."""

    key: str
    dtype: str
    numel: int
    file: str = ""
    """Name of the file relative to the checkpoint's folder."""
    offset: int = -1
    """Byte in the file; -1: not found out yet."""

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A view of a storage; checked to lie inside it and to have no more elements than it, be some there twice."""

    storage: Storage
    offset: int
    """In elements, as ``strides``."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @classmethod
    def checked(cls, storage: Storage, offset: Any, shape: Any, strides: Any, dtype: str | None = None) -> TensorRef:
        """Return the view, or raise a :class:`CheckpointError` if it is none of ``storage``."""
        chosen = dtype or storage.dtype
        if chosen not in ITEM_BYTES:
            raise _refused(f"a tensor of unknown dtype {chosen[:40]!r}", storage)
        # Untyped storages count bytes.
        if chosen != storage.dtype and (storage.dtype != "uint8" or storage.numel % ITEM_BYTES[chosen]):
            raise _refused(f"a {chosen} tensor in a storage of {storage.dtype}", storage)
        numel = storage.numel * ITEM_BYTES[storage.dtype] // ITEM_BYTES[chosen]
        for name, value in (("shape", shape), ("strides", strides)):
            if type(value) is not tuple or len(value) > _MAX_DIMS or not all(_is_size(item) for item in value):
                raise _refused(f"a tensor whose {name} is not a tuple of sizes", storage)
        if not _is_size(offset) or len(shape) != len(strides):
            raise _refused("a tensor whose offset or strides do not fit its shape", storage)
        count = math.prod(shape)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if count and (last >= numel or count > numel):
            raise _refused(f"a tensor of {count} elements up to element {last} in a storage of {numel}", storage)
        return cls(storage, offset if count else 0, shape, strides, chosen)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_row_by_row(self) -> bool:
        """Whether the elements lie in order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True

    @property
    def file(self) -> str:
        return self.storage.file

    @property
    def start_byte(self) -> int:
        """First byte in the file."""
        return self.storage.offset + self.offset * ITEM_BYTES[self.dtype]

    @property
    def span_nbytes(self) -> int:
        """Bytes from the first element to the end of the last one."""
        if not self.numel:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * ITEM_BYTES[self.dtype]

    def is_same_view(self, other: TensorRef) -> bool:
        """Return whether both are the same elements of the same storage, as tied parameters are; never when empty."""
        return (
            self.numel > 0
            and self.storage is other.storage
            and (self.offset, self.shape, self.strides, self.dtype)
            == (other.offset, other.shape, other.strides, other.dtype)
        )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _refused(what: str, storage: Storage) -> CheckpointError:
    return CheckpointError(
        f"{what} is not what torch.save writes",
        where=f"{storage.file}, storage {storage.key!r}",
        fix="restore the file from a copy; do not load files of unknown origin",
    )
