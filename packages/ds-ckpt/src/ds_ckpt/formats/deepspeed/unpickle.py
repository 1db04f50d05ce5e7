"""An interpreter of pickles that can only build plain values. ``pickle`` itself is not used; nothing is imported.

Opcodes: those that ``torch.save`` writes at protocols 2 to 5. Names must be on the list of
:mod:`~ds_ckpt.formats.deepspeed.allowed`; calling one runs our own function there, and ``BUILD`` fills a
:class:`Record`'s dictionary, so no attribute is ever looked up or set by a name from the file. Work and memory are
linear in the bytes read and bounded by :class:`Limits`; there is no recursion, so depth costs nothing here (who walks
the values, which may hold themselves, bounds that).
"""

from __future__ import annotations

import pickletools
import struct
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_ckpt.formats.deepspeed.allowed import CALLABLE, RECORDS, STORAGES, check_key, check_numpy_state, is_allowed
from ds_ckpt.formats.deepspeed.values import Global, Record, Storage, TensorRef
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from mmap import mmap

__all__ = ["Limits", "Unpickled", "unpickle"]


@dataclass(frozen=True)
class Limits:
    """What a pickle may cost. A model of 100 000 parameters stays far below."""

    nbytes: int = 128 * 2**20
    opcodes: int = 10_000_000
    marks: int = 1000
    """Containers being filled at the same time."""
    int_bytes: int = 64
    containers: int = 1_000_000
    """Lists, dictionaries, sets and objects: some 240 bytes of memory each, made by an opcode of one byte."""
    tuples: int = 4_000_000
    """Some 60 bytes each; a tensor has four of them."""
    memo: int = 4_000_000
    """Values that are remembered, some 90 bytes each."""
    tensors: int = 2_000_000
    storages: int = 2_000_000
    copied: int = 64 * 2**20
    """Members, characters and bytes that calls are given, together: a value can be recalled, and copied, many times."""


@dataclass(frozen=True)
class Unpickled:
    """A pickle's value, the storages it refers to by key, and where it ends in the buffer."""

    value: Any
    storages: Mapping[str, Storage]
    end: int


class _BadError(Exception):
    """What is wrong with the pickle; becomes a :class:`CheckpointError` with the place."""


def unpickle(data: bytes | mmap, *, file: str, start: int = 0, limits: Limits | None = None) -> Unpickled:
    """Interpret the pickle that begins at ``start``.

    Args:
        data: a file's content, mapped or read.
        file: its name in the checkpoint's folder; for errors and for the storages.
        start: byte to begin at.
        limits: None: the usual ones.

    Raises:
        CheckpointError: a name or opcode that is not on the list, a limit exceeded, or no pickle. Nothing of it ran.
    """
    machine = _Machine(data, file, start, limits or Limits())
    try:
        value = machine.run()
    except _BadError as error:
        raise CheckpointError(
            f"the pickle in this file is refused: {error}",
            where=f"{file}, byte {machine.at - start} of its pickle",
            fix="only what DeepSpeed itself writes is read; move objects of your own out of client_state and save "
            "again, or restore the file from a copy",
        ) from None
    return Unpickled(value, machine.storages, machine.at)


class _Mark:
    """Where a container began on the stack."""


_MARK = _Mark()


class _Machine:
    def __init__(self, data: bytes | mmap, file: str, start: int, limits: Limits) -> None:
        self.data, self.file, self.limits = data, file, limits
        self.at = start
        self.end = min(len(data), start + limits.nbytes)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.tensors = self.containers = self.tuples = 0
        self.copied = 0

    def run(self) -> Any:
        data, handlers, stop = self.data, _HANDLERS, 0x2E
        for _ in range(self.limits.opcodes):
            if self.at >= self.end:
                raise _BadError(f"it does not end within {self.limits.nbytes} bytes or the file")
            code = data[self.at]
            self.at += 1
            if code == stop:
                if len(self.stack) != 1 or self.marks:
                    raise _BadError("it ends in the middle of a value")
                return self.pop()
            handler = handlers.get(code)
            if handler is None:
                raise _BadError(f"opcode {_name_of(code)} is not on the list")
            handler(self)
        raise _BadError(f"it has more than {self.limits.opcodes} opcodes")

    # Reading.

    def take(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise _BadError(f"{count} bytes are announced and {self.end - self.at} are left")
        found = self.data[self.at : self.at + count]
        self.at += count
        return found

    def number(self, format: str) -> int:
        found: int = struct.unpack(format, self.take(struct.calcsize(format)))[0]
        return found

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, min(self.end, self.at + 1000))
        if end < 0:
            raise _BadError("a name without an end")
        found = self.take(end - self.at)
        self.at += 1
        return self.text(found)

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise _BadError("a text that is no UTF-8") from None

    # The stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _BadError("it takes a value that is not there")
        return self.stack.pop()

    def top(self, *kinds: type[Any]) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _BadError("it fills a container that is not there")
        found = self.stack[-1]
        if type(found) not in kinds:
            raise _BadError(f"it fills a {type(found).__name__}")
        return found

    def mark(self) -> None:
        if len(self.marks) >= self.limits.marks:
            raise _BadError(f"it is nested deeper than {self.limits.marks}")
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise _BadError("it ends a container that was not begun")
        at = self.marks.pop()
        found = self.stack[at:]
        del self.stack[at:]
        return found

    # Containers.

    def hold(self, made: Any) -> None:
        """Push a new container."""
        self.containers += 1
        if self.containers > self.limits.containers:
            raise _BadError(f"it has more than {self.limits.containers} containers")
        self.push(made)

    def hold_tuple(self, items: Iterable[Any]) -> None:
        self.tuples += 1
        if self.tuples > self.limits.tuples:
            raise _BadError(f"it has more than {self.limits.tuples} tuples")
        self.push(tuple(items))

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.hold_tuple(reversed(items))

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict, OrderedDict, Counter)
        if len(items) % 2:
            raise _BadError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.key(key)
            target[key] = value

    def add_items(self, items: list[Any]) -> None:
        target = self.top(set)
        for item in items:
            self.key(item)
            target.add(item)

    def key(self, key: Any) -> None:
        try:
            check_key(key)
        except ValueError as error:
            raise _BadError(str(error)) from None

    def dict_of(self, items: list[Any]) -> None:
        self.hold({})
        self.set_items(items)

    def frozen_set(self) -> None:
        items = self.since_mark()
        for item in items:
            self.key(item)
        self.hold(frozenset(items))

    # Memory.

    def put(self, index: int) -> None:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _BadError("it remembers a value that is not there")
        self.memo[index] = self.stack[-1]
        if len(self.memo) > self.limits.memo:
            raise _BadError(f"it remembers more than {self.limits.memo} values")

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise _BadError(f"it recalls value {index}, which it did not remember")
        self.push(self.memo[index])

    # Names and objects.

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise _BadError("a name that is no text")
        found = Global(module, name)
        if not is_allowed(found):
            raise _BadError(f"{str(found)[:200]!r} is not on the list of what DeepSpeed's files may name")
        self.push(found)

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if type(function) is not Global or type(args) is not tuple:
            raise _BadError("it calls something that is no name")
        self.hold_called(function, args)

    def new_object(self) -> None:
        args, kind = self.pop(), self.pop()
        if type(kind) is not Global or type(args) is not tuple:
            raise _BadError("it makes an object of something that is no name")
        self.hold_called(kind, args)

    def hold_called(self, function: Global, args: tuple[Any, ...]) -> None:
        found = self.call(function, args)
        if type(found) is Record or type(found) in _SIZED:
            self.hold(found)
        else:
            self.push(found)

    def call(self, function: Global, args: tuple[Any, ...]) -> Any:
        if function in RECORDS:
            if args:
                raise _BadError(f"{function} with arguments")
            return Record(function)
        ours = CALLABLE.get(function)
        if ours is None:
            raise _BadError(f"{function} is not to be called")
        self.charge(args)
        try:
            found = ours(*args)
        except (TypeError, ValueError) as error:
            # Wrong arguments: what our own functions take is checked by them and by the call itself.
            raise _BadError(f"{function}: {error}") from None
        if type(found) is TensorRef:
            self.tensors += 1
            if self.tensors > self.limits.tensors:
                raise _BadError(f"it has more than {self.limits.tensors} tensors")
        return found

    def charge(self, values: tuple[Any, ...]) -> None:
        self.copied += sum(len(value) for value in values if type(value) in _SIZED)
        if self.copied > self.limits.copied:
            raise _BadError(f"it copies more than {self.limits.copied} members or bytes")

    def build(self) -> None:
        state, target = self.pop(), self.top(Record, OrderedDict, TensorRef)
        if type(target) is not Record:
            # Attributes of a dictionary (a module's versions) or a tensor mean nothing here.
            return
        if type(state) is not dict:
            if target.of in RECORDS:
                raise _BadError(f"the state of a {target.of} is no dictionary")
            try:
                check_numpy_state(target, state)
            except ValueError as error:
                raise _BadError(str(error)) from None
            return
        self.charge((state,))
        if not all(type(key) is str for key in state):
            raise _BadError(f"the state of a {target.of} has a key that is no text")
        target.fields.update(state)

    def persistent(self) -> None:
        found = self.pop()
        # ("storage", class, key, location, number of elements); the old format adds a view, None by now.
        if type(found) is not tuple or len(found) not in (5, 6) or found[0] != "storage":
            raise _BadError("a reference to something that is no storage")
        kind, key, numel = found[1], found[2], found[4]
        if type(kind) is not Global or kind.module not in ("torch", "torch.storage") or kind.name not in STORAGES:
            raise _BadError("a storage of an unknown class")
        if type(key) is not str or not (key.isascii() and key.isdigit() and len(key) <= 20):
            raise _BadError(f"a storage named {str(key)[:40]!r}, which is no number")
        if type(numel) is not int or not 0 <= numel < 2**60:
            raise _BadError(f"a storage of {str(numel)[:40]} elements")
        if len(found) == 6 and found[5] is not None:
            raise _BadError("a view of a storage, as torch before 0.4 wrote them")
        dtype = STORAGES[kind.name]
        storage = self.storages.get(key)
        if storage is None:
            if len(self.storages) >= self.limits.storages:
                raise _BadError(f"it has more than {self.limits.storages} storages")
            storage = self.storages[key] = Storage(key, dtype, numel, self.file)
        elif (storage.dtype, storage.numel) != (dtype, numel):
            raise _BadError(f"storage {key!r} is described in two ways")
        self.push(storage)

    # Numbers and texts.

    def long(self, count: int) -> None:
        if not 0 <= count <= self.limits.int_bytes:
            raise _BadError(f"an integer of {count} bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))


_SIZED = frozenset({str, bytes, list, tuple, dict, OrderedDict, Counter, set, frozenset})


def _name_of(code: int) -> str:
    known = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
    return repr(known.get(code, hex(code)))


def _protocol(machine: _Machine) -> None:
    version = machine.take(1)[0]
    if version > 5:
        raise _BadError(f"pickle protocol {version}; up to 5 is known")


def _push(read: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(read(machine))


def _sized(format: str, convert: Callable[[_Machine, bytes], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(convert(machine, machine.take(machine.number(format))))


def _latin(machine: _Machine, raw: bytes) -> str:
    return raw.decode("latin-1")


def _pair(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _discard(machine: _Machine) -> None:
    machine.pop()


def _pop_mark(machine: _Machine) -> None:
    machine.since_mark()


def _append_one(machine: _Machine) -> None:
    value = machine.pop()
    machine.append([value])


def _named(machine: _Machine) -> None:
    machine.name(machine.line(), machine.line())


def _frame(machine: _Machine) -> None:
    machine.take(8)  # only a hint for readers of streams


def _raw(machine: _Machine, raw: bytes) -> bytes:
    return raw


_HANDLERS: dict[int, Callable[[_Machine], None]] = {
    ord(code): handler
    for code, handler in {
        "\x80": _protocol,
        "\x95": _frame,
        "(": _Machine.mark,
        "0": _discard,
        "1": _pop_mark,
        "N": _push(lambda machine: None),
        "\x88": _push(lambda machine: True),
        "\x89": _push(lambda machine: False),
        "J": _push(lambda machine: machine.number("<i")),
        "K": _push(lambda machine: machine.number("<B")),
        "M": _push(lambda machine: machine.number("<H")),
        "\x8a": lambda machine: machine.long(machine.number("<B")),
        "\x8b": lambda machine: machine.long(machine.number("<i")),
        "G": _push(lambda machine: machine.number(">d")),
        "X": _sized("<I", _Machine.text),
        "\x8c": _sized("<B", _Machine.text),
        "\x8d": _sized("<Q", _Machine.text),
        "U": _sized("<B", _latin),  # the old str of Python 2
        "T": _sized("<I", _latin),
        "C": _sized("<B", _raw),
        "B": _sized("<I", _raw),
        "\x8e": _sized("<Q", _raw),
        "}": lambda machine: machine.hold({}),
        "]": lambda machine: machine.hold([]),
        ")": _push(lambda machine: ()),
        "\x8f": lambda machine: machine.hold(set()),
        "t": lambda machine: machine.hold_tuple(machine.since_mark()),
        "l": lambda machine: machine.hold(machine.since_mark()),
        "d": lambda machine: machine.dict_of(machine.since_mark()),
        "\x91": _Machine.frozen_set,
        "\x85": lambda machine: machine.tuple_of(1),
        "\x86": lambda machine: machine.tuple_of(2),
        "\x87": lambda machine: machine.tuple_of(3),
        "a": _append_one,
        "e": lambda machine: machine.append(machine.since_mark()),
        "s": _pair,
        "u": lambda machine: machine.set_items(machine.since_mark()),
        "\x90": lambda machine: machine.add_items(machine.since_mark()),
        "q": lambda machine: machine.put(machine.number("<B")),
        "r": lambda machine: machine.put(machine.number("<I")),
        "\x94": lambda machine: machine.put(len(machine.memo)),
        "h": lambda machine: machine.get(machine.number("<B")),
        "j": lambda machine: machine.get(machine.number("<I")),
        "c": _named,
        "\x93": _Machine.stack_name,
        "R": _Machine.reduce,
        "\x81": _Machine.new_object,
        "b": _Machine.build,
        "Q": _Machine.persistent,
    }.items()
}
