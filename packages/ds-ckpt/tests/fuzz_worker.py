"""Feeds hostile checkpoints to the readers, in a process with little memory that may touch nothing but their folder.

The script of ``test_fuzz.py``: ``fuzz_worker.py TARGET BASE FACTOR`` prints what came out as JSON. Neither torch nor
pickle is loaded: what the readers would do with them would be seen.
"""

from __future__ import annotations

import contextlib
import copy
import encodings.cp437  # noqa: F401  of zipfile, for names that do not say what they are in
import io
import itertools
import json
import os
import pickletools
import re
import resource
import shutil
import struct
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ds_ckpt import formats
from ds_ckpt.manifest import _head
from ds_ckpt.tags import folder_of
from ds_ckpt.verify import find_damage
from ds_core.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MEMORY_BYTES = 600 * 2**20
ALLOWED = {"object.__getattr__", "sys._getframe", "os.listdir", "os.scandir", "mmap.__new__", "marshal.loads"}
"""Events beside opening files for reading; all that change files, run or load anything are not among them."""
WATCHED = (
    "open",
    "os.",
    "import",
    "exec",
    "compile",
    "subprocess.",
    "socket.",
    "ctypes.",
    "shutil.",
    "pickle.",
    "marshal.",
    "code.",
    "tempfile.",
    "glob.",
    "pathlib.",
)


class OutsideError(BaseException):
    """What no reader may do; no handler of errors takes it for one."""


# -- the watch --------------------------------------------------------------------------------------------------------

_folder: Path | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _folder is None or not event.startswith(WATCHED) or event in ALLOWED:
        return
    if event == "open":
        path, _, flags = args
        if isinstance(path, int):
            return  # what was opened before
        inside = Path(os.fsdecode(path)) in (_folder, _folder.parent) or str(path).startswith(f"{_folder}/")
        part = "/" not in os.fsdecode(path) and os.fsdecode(path) not in ("", ".", "..")  # below a descriptor
        # Writing needs one of these; reading through a link would leave the folder.
        reads = not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if reads and ".." not in Path(os.fsdecode(path)).parts and (inside or (part and flags & os.O_NOFOLLOW)):
            return
    elif event.startswith(("glob.", "pathlib.")):
        return  # ends in listing
    raise OutsideError(f"{event}{args!r}"[:500])


@contextlib.contextmanager
def watching(folder: Path) -> Iterator[None]:
    global _folder
    _folder = folder
    try:
        yield
    finally:
        _folder = None


outcomes: Counter[str] = Counter()


def check(folder: Path, *, named: bool = False) -> None:
    """Read the checkpoint as commands do: it is refused, or what is believed fits the files.

    ``named``: not the one in ``folder``, but the one that its ``latest`` names.
    """
    try:
        with watching(folder):
            if named:
                folder = folder_of(folder, None).path
            stored = formats.read(folder)
            damages = list(find_damage(stored, lambda nbytes: None))
            json.dumps([dict(stored.state), [dict(state) for state in stored.rank_states]])
    except CheckpointError as error:
        message = str(error)
        if len(message) > 6000:
            raise ValueError("an error too long to be read") from error
        outcomes[re.sub(r"[^a-z ]+|'.*'", "", error.what)[-30:]] += 1
        return
    outcomes["damaged" if damages else "read"] += 1
    for tensor in stored.tensors.values():
        assert sum(chunk.chunk.length for chunk in tensor.chunks) == tensor.of.numel
        for chunk in tensor.chunks:
            assert 0 <= chunk.offset <= chunk.offset + chunk.nbytes <= stored.files[chunk.file].nbytes
    for file in stored.files.values():
        path = folder / file.name
        assert path.resolve().is_relative_to(folder.resolve())
        assert path.stat().st_size == file.nbytes


# -- values -----------------------------------------------------------------------------------------------------------

NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**32 - 1,
    2**53 + 1,
    2**62,
    2**63,
    10**12,
    10**30,
    1.0,
    0.5,
    float("inf"),
    float("nan"),
]
TEXTS = [
    "",
    ".",
    "..",
    "../secret",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\0b",
    "checkpoint.json",
    "link",
    "\ud800",
    "x" * 5000,
]
NASTY = [*NUMBERS, *TEXTS, True, False, None, [], {}, [[]], "float32", "xxh3:" + "0" * 32, {"$ds": "tensor"}]


def ways(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if way:
        yield way
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from ways(item, (*way, key))


def at(value: Any, way: tuple[Any, ...]) -> Any:
    for step in way:
        value = value[step]
    return value


def mutate_json(data: st.DataObject, content: Any) -> None:
    """Change ``content`` in a few places: values, keys, rows, parts of it moved to where others are."""
    for _ in range(data.draw(st.integers(1, 3))):
        every = list(ways(content))
        if not every:
            return
        way = data.draw(st.sampled_from(every))
        holder, last = at(content, way[:-1]), way[-1]
        kind = data.draw(st.sampled_from(["value", "number", "delete", "move", "twice", "rename", "swap"]))
        if kind == "delete":
            del holder[last]
        elif kind == "move":
            holder[last] = copy.deepcopy(at(content, data.draw(st.sampled_from(every))))
        elif kind == "twice" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        elif kind == "swap" and isinstance(holder, list):
            other = data.draw(st.integers(0, len(holder) - 1))
            holder[last], holder[other] = holder[other], holder[last]
        elif kind == "rename" and isinstance(holder, dict):
            holder[data.draw(st.sampled_from(TEXTS))] = holder.pop(last)
        elif kind == "number" and type(holder[last]) is int:
            holder[last] = data.draw(
                st.sampled_from([lambda n: n + 1, lambda n: n - 1, lambda n: -n, lambda n: 2 * n])
            )(holder[last])
        else:
            holder[last] = copy.deepcopy(data.draw(st.sampled_from(NASTY)))


def mutate_text(data: st.DataObject, text: str) -> bytes:
    """Return JSON as bytes, sometimes such as no writer of JSON makes."""
    raw = text.encode("utf-8", "surrogatepass")
    kind = data.draw(st.sampled_from(["none"] * 6 + ["twice", "deep", "bytes", "number"]))
    spot = data.draw(st.integers(0, len(raw)))
    if kind == "twice":  # a key twice: the last one counts
        return raw.replace(b'"files"', b'"files":{"../x":1},"files"', 1).replace(b'"name"', b'"name":1,"name"', 1)
    if kind == "deep":
        colon = raw.find(b":", spot) + 1
        return raw[:colon] + b"[" * 50_000 + b"]" * 50_000 + b"," + raw[colon:]
    if kind == "bytes":
        return raw[:spot] + data.draw(st.sampled_from([b"\xff\xfe", b"\x80", b"\0", b"\xed\xa0\x80"])) + raw[spot:]
    if kind == "number":
        return re.sub(rb"\d+", data.draw(st.sampled_from([b"1e999", b"-0", b"1" * 5000, b"NaN"])), raw, count=3)
    return raw


# -- targets ----------------------------------------------------------------------------------------------------------


def manifests(base: Path) -> Callable[[st.DataObject], None]:
    folder = base / "sharded"
    path = folder / "checkpoint.json"
    content = json.loads(path.read_bytes())
    kept = {name: content[name] for name in ("world_size", "files", "tensors", "state", "rank_states")}
    (folder / "link").symlink_to(base / "secret")

    def one(data: st.DataObject) -> None:
        changed = copy.deepcopy(kept)
        mutate_json(data, changed)
        body = mutate_text(data, json.dumps(changed))[1:] + b"\n"
        path.write_bytes(_head(body) + body)  # the checksum is right: what is behind it is reached
        check(folder)

    return one


LATEST = [
    b"sharded",
    b" plain\n",
    b"",
    b"../secret",
    b"/etc/passwd",
    b"link_out",
    b"..",
    b"a\0b",
    b"\xff\xfe",
    b"x" * 255,
    b"x" * 4096,
    b"sharded" + b" " * 10**6,
]


def latest(base: Path) -> Callable[[st.DataObject], None]:
    (base / "link_out").symlink_to("/etc")

    def one(data: st.DataObject) -> None:
        # The converter's file is read where there is no other.
        path = base / data.draw(st.sampled_from(["latest", "latest", "latest_universal"]))
        kind = data.draw(st.sampled_from(["text", "text", "text", "bytes", "link", "pipe", "folder", "huge"]))
        try:
            if kind == "link":
                path.symlink_to(data.draw(st.sampled_from(["/dev/zero", "secret", "nowhere", "latest", "sharded"])))
            elif kind == "pipe":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            else:
                path.write_bytes(data.draw(st.sampled_from(LATEST) if kind == "text" else st.binary(max_size=20)))
            if kind == "huge":
                os.truncate(path, 2**40)
            check(base, named=True)
        finally:
            path.rmdir() if kind == "folder" else path.unlink(missing_ok=True)

    return one


def plain_headers(base: Path) -> Callable[[st.DataObject], None]:
    folder = base / "plain"
    (path,) = folder.glob("*.safetensors")
    manifest, whole = json.loads((folder / "checkpoint.json").read_bytes()), path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    (folder / "link").symlink_to(base / "secret")
    tables = {key: json.loads(header["__metadata__"][key]) for key in ("pieces", "rank_state")}

    def one(data: st.DataObject) -> None:
        changed = copy.deepcopy({"header": header, "tables": tables, "manifest": manifest})
        part = data.draw(st.sampled_from(["header", "tables", "tables", "manifest"]))
        mutate_json(data, changed[part])
        metadata = changed["header"].get("__metadata__")
        if part == "tables" and isinstance(metadata, dict):
            for key, value in changed["tables"].items():
                metadata[key] = mutate_text(data, json.dumps(value)).decode("utf-8", "replace")
        text = mutate_text(data, json.dumps(changed["header"]))
        length = data.draw(st.sampled_from([len(text)] * 5 + [len(text) + 8, 0, 2**62, 2**64 - 1, 10**8]))
        path.write_bytes(length.to_bytes(8, "little") + text + whole[8 + size :])
        if part != "manifest":
            changed["manifest"]["files"][path.name] = path.stat().st_size
        (folder / "checkpoint.json").write_bytes(mutate_text(data, json.dumps(changed["manifest"])))
        check(folder)

    return one


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


SNIPPETS = [
    b"cos\nsystem\n" + text("touch ran") + b"\x85R",
    b"cbuiltins\neval\n" + text("1") + b"\x85R",
    b"cbuiltins\ngetattr\n" + text("a") + text("__class__") + b"\x86R",
    b"ctorch\nload\n" + text("x.pt") + b"\x85R",
    b"cposix\nsystem\n0",
    b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("../../secret") + text("cpu") + b"K\x04tQ",
    b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + b"\x8a\x08"
    + b"\xff" * 7
    + b"\x0ftQ",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n)R",
    b"ctorch\nSize\n(J\x00\x00\x00\x7fJ\x00\x00\x00\x7ftR",
    b"]q\x07h\x07a",  # a list that holds itself
    b"}q\x08" + text("a") + b"h\x08s",
    b"]r\xff\xff\xff\x7f",
    b"h\x05",
    b"j\xff\xff\xff\xff",
    b"\x8a\x40" + b"\x7f" * 64,
    b"\x8b\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff",
    b"\x8d" + b"\xff" * 8,
    b"G\x7f\xf8\0\0\0\0\0\0",
    b"(" * 900 + b"l" * 900,
    b")" + b"\x85" * 3000,
    b"K\x00",
    b"\x88",
    b"N",
    b"J\xff\xff\xff\xff",
    b"\x8a\x09" + b"\0" * 8 + b"\x01",
    text("x" * 5000),
    text("../../x"),
    b"X\x03\x00\x00\x00\xed\xa0\x80",
    b"0",
    b"2",
    b"\x94",
]


def operations(data: bytes) -> list[bytes]:
    places = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    return [data[low:high] for low, high in itertools.pairwise(places)]


def mutate_pickle(data: st.DataObject, parts: list[bytes], others: list[bytes]) -> bytes:
    """Change whole operations, so that lengths stay right and what is behind the parser is reached."""
    parts = list(parts)
    for _ in range(data.draw(st.integers(1, 4))):
        spot = data.draw(st.integers(0, len(parts) - 1))
        kind = data.draw(
            st.sampled_from(["replace", "replace", "insert", "delete", "twice", "swap", "number", "number"])
        )
        if kind == "delete":
            del parts[spot : spot + data.draw(st.integers(1, 3))]
        elif kind == "twice":
            parts[spot:spot] = parts[spot : spot + data.draw(st.integers(1, 12))]
        elif kind == "swap":
            other = data.draw(st.integers(0, len(parts) - 1))
            parts[spot], parts[other] = parts[other], parts[spot]
        elif kind == "number":
            numbers = [index for index, part in enumerate(parts) if part[:1] in b"KMJ\x8a"]
            if numbers:
                small = data.draw(st.sampled_from([b"K\x00", b"K\x01", b"K\x02", b"K\xff", b"J\xff\xff\xff\xff"]))
                parts[data.draw(st.sampled_from(numbers))] = small
        else:
            new = data.draw(st.sampled_from(SNIPPETS) | st.sampled_from(others))
            parts[spot : spot + (kind == "replace")] = [new]
        if not parts:
            break
    return b"".join(parts)


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def archive_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


def _copies(base: Path) -> list[tuple[Path, list[Path]]]:
    found = []
    for name in sorted(path.name for path in (base / "deepspeed").iterdir()):
        folder = base / "deepspeed" / name
        found.append((folder, sorted(folder.glob("*.pt"))))
    return found


def pickles(base: Path) -> Callable[[st.DataObject], None]:
    copies = _copies(base)
    for folder, _ in copies:
        check(folder)
    assert outcomes == {"read": len(copies)}, outcomes
    members = {path: members_of(path) for _, paths in copies for path in paths}
    keys = {path: next(name for name in found if name.endswith("/data.pkl")) for path, found in members.items()}
    parts = {path: operations(found[keys[path]]) for path, found in members.items()}
    others = sorted({part for found in parts.values() for part in found if len(part) > 1})

    def one(data: st.DataObject) -> None:
        folder, paths = data.draw(st.sampled_from(copies))
        path = data.draw(st.sampled_from(paths))
        whole = path.read_bytes()
        changed = mutate_pickle(data, parts[path], others)
        try:
            path.write_bytes(archive_of({**members[path], keys[path]: changed}))
            check(folder)
        finally:
            path.write_bytes(whole)

    return one


def archives(base: Path) -> Callable[[st.DataObject], None]:
    copies = _copies(base)
    members = {path: members_of(path) for _, paths in copies for path in paths}

    def one(data: st.DataObject) -> None:
        folder, paths = data.draw(st.sampled_from(copies))
        path = data.draw(st.sampled_from(paths))
        whole = path.read_bytes()
        try:
            path.write_bytes(_mutated_archive(data, dict(members[path]), whole))
            check(folder)
        finally:
            path.write_bytes(whole)

    return one


def _mutated_archive(data: st.DataObject, members: dict[str, bytes], whole: bytes) -> bytes:
    kind = data.draw(st.sampled_from(["members", "packed", "directory", "directory", "local", "end", "twice", "cut"]))
    name = data.draw(st.sampled_from(sorted(members)))
    root = name.partition("/")[0]
    if kind == "members":
        for _ in range(data.draw(st.integers(1, 3))):
            content = members.pop(name, b"")
            new = data.draw(
                st.sampled_from([name, f"{root}/../x", "/etc/passwd", f"{root}/data/99", "other/data.pkl", root])
            )
            members[new] = data.draw(st.sampled_from([content, content[:-1], content + b"\0", b""]))
        return archive_of(members)
    if kind == "packed":  # a bomb: a megabyte of zeros for each kilobyte
        members[name] += bytes(data.draw(st.sampled_from([0, 10**5, 10**7])))
        return archive_of(members, zipfile.ZIP_DEFLATED)
    content = bytearray(whole)
    if kind == "twice":
        return bytes(whole[: data.draw(st.integers(0, len(whole)))]) + whole
    if kind == "cut":
        return bytes(whole[: data.draw(st.integers(0, len(whole)))])
    sign, size = {"directory": (b"PK\x01\x02", 46), "local": (b"PK\x03\x04", 30), "end": (b"PK\x05\x06", 22)}[kind]
    places = [found.start() for found in re.finditer(re.escape(sign), whole)]
    for _ in range(data.draw(st.integers(1, 3))):
        spot = data.draw(st.sampled_from(places)) + data.draw(st.integers(4, size - 2))
        value = data.draw(st.sampled_from([0, 1, 8, 0xFF, 0xFFFF, 2**31, 2**32 - 1]) | st.integers(0, len(whole)))
        width = data.draw(st.sampled_from([2, 4]))
        content[spot : spot + width] = struct.pack("<I", value)[:width]
    return bytes(content)


def large(base: Path) -> Callable[[st.DataObject], None] | None:
    """Check what is refused for its size, each once."""
    folder = base / "sharded"
    path = folder / "checkpoint.json"
    import xxhash

    def write(*blocks: tuple[bytes, int]) -> None:
        """Write a manifest of repeated blocks; ``%d`` in one is its number."""

        def rows() -> Iterator[bytes]:
            for block, count in blocks:
                for start in range(0, count, 10_000):
                    some = range(start, min(count, start + 10_000))
                    yield b"".join(block % number if b"%d" in block else block for number in some)

        whole = xxhash.xxh3_128()
        for some in rows():
            whole.update(some)
        with path.open("wb") as file:
            head = _head(b"").replace(xxhash.xxh3_128(b"").hexdigest().encode(), whole.hexdigest().encode())
            file.write(head)
            file.writelines(rows())

    row = b'{"name":"t%d","kind":"weight","rank":null,"shape":[0],"dtype":"float32","chunks":[]},'
    first, last = b'"world_size":1,"files":{},"tensors":[', b'{}],"state":{},"rank_states":[{}]}\n'
    for blocks in (
        [(first, 1), (row, 10**6), (last, 1)],
        [(first, 1), (b"{},", 10**5), (last, 1)],
        [(first, 1), (b"[", 10**5), (b"]", 10**5), (b"," + last, 1)],
        [(b'"world_size":1,"files":{', 1), (b'"f%d":{},', 10**5), (b'"z":{}},"tensors":[],' + last[4:], 1)],
        [(first + b'{"name":"t","kind":"w","rank":null,"dtype":"bool","shape":[' + b"1," * 10**5 + b"1]}," + last, 1)],
    ):
        write(*blocks)
        check(folder)
    with path.open("r+b") as file:
        file.truncate(2**40)
    check(folder)
    for name, paths in _copies(base):
        whole = paths[0].read_bytes()
        found = members_of(paths[0])
        key = next(member for member in found if member.endswith("/data.pkl"))
        bombs = [
            b"(" + b"N" * 10**6 + b"t.",
            b"]q\0" + b"h\0" * (5 * 10**5) + b".",
            b"(]q\0" + b"".join(b"](" + b"h%c" % index * 200 + b"eq%c" % (index + 1) for index in range(60)) + b"l.",
            b"(" + (text("x" * 1000) + b"0") * 10**4 + b"t.",
            b"\x80\x02}(" + text("module") + b"(" + b"K\x01" * 10**5 + b"lu.",
        ]
        for bomb in bombs:
            paths[0].write_bytes(archive_of({**found, key: bomb}))
            check(name)
        paths[0].write_bytes(archive_of({**found, key: bytes(5 * 10**7)}, zipfile.ZIP_DEFLATED))
        check(name)
        with paths[0].open("r+b") as file:
            file.truncate(2**40)
        check(name)
        paths[0].write_bytes(whole)
        break
    return None


TARGETS = {
    "manifests": manifests,
    "latest": latest,
    "plain_headers": plain_headers,
    "pickles": pickles,
    "archives": archives,
    "large": large,
}


def main(target: str, base: Path, factor: int) -> None:
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "base"
        shutil.copytree(base, root)
        (root / "secret").write_text("outside")
        # What reading loads is loaded now; from then on nothing may be.
        for folder in (root / "sharded", root / "plain", *(root / "deepspeed").iterdir()):
            list(find_damage(formats.read(folder), lambda nbytes: None))
        with contextlib.suppress(CheckpointError):
            formats.read(root)
        sys.addaudithook(_hook)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        one = TARGETS[target](root)
        if one is not None:
            run = settings(
                deadline=None,
                database=None,
                derandomize=factor == 1,
                max_examples=150 * factor,
                suppress_health_check=list(HealthCheck),
                # Explanations take longer than all examples.
                phases=[phase for phase in Phase if phase is not Phase.explain],
            )(given(st.data())(one))
            run()
    assert "torch" not in sys.modules
    assert "pickle" not in sys.modules or target
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
