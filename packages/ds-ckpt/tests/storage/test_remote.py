"""A folder of a store, on fsspec's memory filesystem: the engine, the reader and the tools work on its URL."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from typer.testing import CliRunner

import ds_ckpt
import ds_core
from ds_ckpt.cli import app
from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_ckpt.storage import folder_at
from ds_ckpt.storage.local import LocalFolder
from ds_ckpt.storage.remote import RemoteFolder
from ds_ckpt.tags import find_tags, folder_of
from ds_ckpt.verify import find_damage
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.errors import CheckpointError, NoCheckpointError
from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece, Snapshot
from ds_core.testing.checkpoint import check_content, snapshot
from ds_core.testing.ranks import run_ranks

URL = "memory://bucket/run"
ENGINE = ShardedCheckpoint(ShardedConfig(writers=3, chunk_bytes=64), None)


@pytest.fixture(autouse=True)
def store():
    """Return the objects of the memory filesystem by name; it is empty before and after a test."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def save(version: int, tag: str = "tag", *, latest: bool = True, parts: int = 2) -> None:
    ENGINE.save(URL, tag, snapshot(version, parts=parts), latest=latest)


def put(name: str, data: bytes) -> None:
    fsspec.filesystem("memory").pipe_file(f"/bucket/run/{name}", data)


def content(name: str) -> bytes:
    return fsspec.filesystem("memory").cat_file(f"/bucket/run/{name}")


# -- saving and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [1, 3])
@pytest.mark.parametrize("read_in", [1, 2, 5])
def test_any_chunks_are_read_in_any_others(written, read_in):
    save(1, parts=written)
    check_content(ENGINE, URL, "tag", 1, parts=read_in)


def test_saving_again_replaces_and_leaves_nothing_behind(store):
    for version in (1, 2, 3):
        save(version)
        check_content(ENGINE, URL, "tag", version)
    files = [f"tag/{name}" for name in read(f"{URL}/tag").files]
    assert sorted(store) == sorted(f"/bucket/run/{name}" for name in ["latest", "tag/checkpoint.json", *files])
    assert len(files) == 3


def test_latest_names_the_tag_when_asked():
    save(1, "quiet", latest=False)
    with pytest.raises(CheckpointError, match="no file 'latest'") as caught:
        ENGINE.read_latest(URL)
    assert "quiet" in caught.value.fix
    save(2, "first")
    save(3, "second", latest=False)
    assert ENGINE.read_latest(URL) == "first"
    assert ds_ckpt.open(URL).state["version"] == 2
    assert ds_ckpt.open(URL, "second").state["version"] == 3
    assert ds_ckpt.open(f"{URL}/quiet/").state["version"] == 1


def test_an_engine_saves_to_and_loads_from_a_url(store):
    config = {"train_batch_size": 4, "checkpoint": {"engine": "sharded"}}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.01}}

    def start(seed):
        torch.manual_seed(seed)
        return ds_core.initialize(model=torch.nn.Linear(5, 3), config=config)[0]

    engine = start(0)
    for _ in range(2):
        engine.backward(engine(torch.ones(4, 5)).square().mean())
        engine.step()
    engine.save_checkpoint(f"{URL}/", client_state={"epoch": 3})
    assert "/bucket/run/global_step2/checkpoint.json" in store
    assert not os.path.exists("memory:")  # noqa: PTH110

    other = start(1)
    path, client_state = other.load_checkpoint(URL)
    assert (path, client_state) == (f"{URL}/global_step2", {"epoch": 3})
    assert other.global_steps == 2
    for mine, theirs in zip(engine.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with ds_ckpt.open(URL) as checkpoint:
        assert checkpoint.path == f"{URL}/global_step2"
        assert torch.equal(checkpoint.tensor("weight"), engine.module.weight)
        assert set(checkpoint.kinds("weight")) == {"weight", "exp_avg", "exp_avg_sq", "step"}


def test_what_plain_wrote_is_read(tmp_path):
    PlainCheckpoint(None, None).save(tmp_path, "tag", snapshot(4), latest=True)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            put(str(path.relative_to(tmp_path)), path.read_bytes())
    check_content(ENGINE, URL, ENGINE.read_latest(URL), 4, parts=3)


def test_what_deepspeed_wrote_is_to_be_copied():
    put("tag/mp_rank_00_model_states.pt", b"PK")
    put("universal/zero/optimizer_state.pt", b"PK")
    for tag in ("tag", "universal"):
        with pytest.raises(CheckpointError, match="DeepSpeed") as caught:
            ds_ckpt.open(URL, tag)
        assert "copy the folder to a local disk" in caught.value.fix


def test_only_what_is_wanted_is_fetched(monkeypatch):
    """A reader that wants one tensor fetches the manifest, that file's header and that tensor's chunks."""
    save(1)
    fetched: list[tuple[str, int]] = []
    cat_file = MemoryFileSystem.cat_file

    def counted(fs, path, start=None, end=None, **options):
        data = cat_file(fs, path, start, end, **options)
        fetched.append((path.rpartition("/")[2], len(data)))
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    with ds_ckpt.open(f"{URL}/tag") as checkpoint:
        assert [name for name, _ in fetched] == ["checkpoint.json"]
        fetched.clear()
        checkpoint.tensor("float32.matrix")
        stored = checkpoint.stored
    chunks = stored.tensors["float32.matrix", "master", None].chunks
    headers = {chunk.file: stored.files[chunk.file].header[0] for chunk in chunks}
    assert sorted(fetched) == sorted([*headers.items(), *((chunk.file, chunk.nbytes) for chunk in chunks)])


# -- a save that ends at any point ------------------------------------------------------------------------------------


def small(version: int) -> Snapshot:
    of = LogicalTensor("w", "weight", (6,), "float32")
    return Snapshot([Piece(of, Chunk.whole(of.shape), torch.full((6,), float(version)))], {"version": version}, {})


def whole_version() -> int:
    """Return the version of :func:`small` that ``latest`` leads to, having checked all of it."""
    with ds_ckpt.open(URL) as checkpoint:
        version = checkpoint.state["version"]
        assert torch.equal(checkpoint.tensor("w"), torch.full((6,), float(version))), "a mixture"
    return version


def run_save_until(point: int, tag: str, monkeypatch) -> int:
    """Save version 2 and stop it before its ``point``-th write, put or removal; return how many there were until then.

    A process that is gone also does not tidy up, so every operation after that fails, too.
    """
    count = 0

    def counted(call):
        def instead(*args, **options):
            nonlocal count
            count += 1
            if count > point:
                raise RuntimeError("it ends here")
            seen.append(whole_version())
            return call(*args, **options)

        return instead

    seen: list[int] = []
    with monkeypatch.context() as patch:
        for owner, name in ((MemoryFile, "write"), (MemoryFileSystem, "pipe_file"), (MemoryFileSystem, "rm_file")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        with contextlib.suppress(CheckpointError):
            ShardedCheckpoint(ShardedConfig(writers=1, chunk_bytes=12), None).save(URL, tag, small(2), latest=True)
    assert set(seen) <= {1, 2}, "what was to be seen in between"
    return count


@pytest.mark.parametrize("tag", ["tag", "next"])
def test_a_save_that_ends_anywhere_leaves_a_whole_checkpoint(tag, monkeypatch, store):
    found, point = [], 0
    while True:
        store.clear()
        ENGINE.save(URL, "tag", small(1), latest=True)
        operations = run_save_until(point, tag, monkeypatch)
        found.append(whole_version())
        listed = {each.name: each.stored is not None for each in find_tags(URL)}
        assert listed["tag"], "the previous one is whole"
        assert all(listed[name] for name in folder_at(URL).complete_tags())
        ENGINE.save(URL, tag, small(3), latest=True)
        assert whole_version() == 3
        files = {f"/bucket/run/{tag}/{name}" for name in ["checkpoint.json", *read(f"{URL}/{tag}").files]}
        assert {name for name in store if f"/{tag}/" in name} == files, "leftovers"
        if operations <= point:
            break
        point += 1
    assert found[0] == 1
    assert found[-1] == 2
    assert found == sorted(found)
    assert point >= 5


@pytest.mark.parametrize("error", [OSError(28, os.strerror(28)), RuntimeError("SlowDown"), PermissionError(13, "no")])
def test_one_put_that_fails_leaves_the_previous_whole(error, monkeypatch, store):
    save(1)
    before = dict(store)
    count = 0

    def write(file, data):
        nonlocal count
        count += 1
        if count == 4:
            raise error
        return real(file, data)

    real = MemoryFile.write
    monkeypatch.setattr(MemoryFile, "write", write, raising=False)
    with pytest.raises(CheckpointError, match="did not take a file") as caught:
        save(2)
    monkeypatch.undo()
    assert str(error) in caught.value.what
    assert caught.value.where.startswith(f"{URL}/tag/rank_00000_")
    assert store == before, "what was put of it is gone again"
    check_content(ENGINE, URL, "tag", 1)


def test_the_manifest_is_put_last_and_in_one(monkeypatch):
    done: list[str] = []
    write, pipe = MemoryFile.write, MemoryFileSystem.pipe_file

    def noted_write(file, data):
        done.append("a part")
        return write(file, data)

    def noted_pipe(fs, path, value, **options):
        done.append(path)
        return pipe(fs, path, value, **options)

    monkeypatch.setattr(MemoryFile, "write", noted_write, raising=False)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", noted_pipe)
    save(1)
    assert done[-2:] == ["/bucket/run/tag/checkpoint.json", "/bucket/run/latest"]
    assert set(done[:-2]) == {"a part"}


def test_files_of_others_stay(store):
    put("tag/notes.txt", b"mine")
    put("tag/rank_00009_1-0123456789ab.safetensors", b"torn")
    put("tag/rank_00008_1-0123456789ab.safetensors/odd", b"mine")
    save(1)
    assert {"/bucket/run/tag/notes.txt", "/bucket/run/tag/rank_00008_1-0123456789ab.safetensors/odd"} < set(store)
    assert "/bucket/run/tag/rank_00009_1-0123456789ab.safetensors" not in store


def test_leftovers_that_cannot_be_removed_are_told_and_do_no_harm(monkeypatch, caplog):
    save(1)
    [old, *_] = read(f"{URL}/tag").files

    def refused(fs, path):
        raise PermissionError(13, "no deletions here")

    monkeypatch.setattr(MemoryFileSystem, "rm_file", refused)
    with caplog.at_level("WARNING", logger="ds_core"):
        save(2)
    check_content(ENGINE, URL, "tag", 2)
    assert any(old in record.getMessage() and "no deletions here" in record.getMessage() for record in caplog.records)


# -- damage -----------------------------------------------------------------------------------------------------------


def damages() -> dict[str, str]:
    return {damage.file: damage.what for damage in find_damage(read(f"{URL}/tag"), lambda _count: None)}


def test_damage_of_every_file_is_reported():
    save(1, "other", latest=False)
    save(2)
    for name in ["checkpoint.json", *read(f"{URL}/tag").files]:
        whole = content(f"tag/{name}")
        for broken in (None, whole[:-1], whole[: len(whole) // 2], whole + b"x", b""):
            if broken is None:
                fsspec.filesystem("memory").rm_file(f"/bucket/run/tag/{name}")
            else:
                put(f"tag/{name}", broken)
            with pytest.raises(CheckpointError) as caught:
                read(f"{URL}/tag")
            assert "other" in caught.value.fix
            assert name in str(caught.value)
            put(f"tag/{name}", whole)
    check_content(ENGINE, URL, "tag", 2)
    assert damages() == {}


def test_a_flipped_bit_is_reported_with_file_and_tensor():
    save(1)
    stored = read(f"{URL}/tag")
    for tensor in stored.tensors.values():
        for chunk in tensor.chunks:
            if not chunk.nbytes:
                continue
            whole = bytearray(content(f"tag/{chunk.file}"))
            whole[chunk.offset + chunk.nbytes // 2] ^= 4
            put(f"tag/{chunk.file}", bytes(whole))
            [(file, what)] = damages().items()
            assert (file, what.split(" of rank")[0]) == (chunk.file, f"{tensor.of.kind} {tensor.of.name!r}")
            with ds_ckpt.open(f"{URL}/tag") as checkpoint, pytest.raises(CheckpointError) as caught:
                checkpoint.tensor(tensor.of.name, tensor.of.kind, rank=tensor.of.rank)
            assert f"{tensor.of.kind} {tensor.of.name!r}" in caught.value.what
            assert caught.value.where == f"{URL}/tag/{chunk.file}"
            whole[chunk.offset + chunk.nbytes // 2] ^= 4
            put(f"tag/{chunk.file}", bytes(whole))
            break


def test_an_object_that_changes_while_it_is_open_is_reported():
    save(1)
    given = snapshot(1, parts=5).pieces
    with ds_ckpt.open(f"{URL}/tag") as checkpoint, ENGINE.open(URL, "tag") as reader:
        for name, kind, rank in checkpoint.stored.tensors:
            checkpoint.tensor(name, kind, rank=rank)  # every file is open from here on
        reader.read(given)
        names = list(checkpoint.stored.files)
        for name in names:
            put(f"tag/{name}", content(f"tag/{name}")[:10])
        with pytest.raises(CheckpointError, match=r"weight 'float32\.matrix' is damaged"):
            checkpoint.tensor("float32.matrix", "weight")
        with pytest.raises(CheckpointError, match=r"'float32\.matrix' is damaged"):
            reader.read([piece for piece in given if piece.of.name == "float32.matrix"])
        for name in names:
            fsspec.filesystem("memory").rm_file(f"/bucket/run/tag/{name}")
        with pytest.raises(CheckpointError, match="missing") as caught:
            checkpoint.tensor("float32.matrix", "weight")
        assert caught.value.where in [f"{URL}/tag/{name}" for name in names]


@pytest.mark.parametrize(
    "name", ["../other/x", "/etc/passwd", "a//b", ".", "", "a\\b", "x?y", "x%2e%2e", "a\0", "s3::x"]
)
def test_a_name_that_leads_elsewhere_is_refused(name, tmp_path):
    PlainCheckpoint(None, None).save(tmp_path, "tag", snapshot(1), latest=True)
    manifest = json.loads((tmp_path / "tag" / "checkpoint.json").read_text())
    manifest["files"] = {name: 100}
    put("tag/checkpoint.json", json.dumps(manifest).encode())
    put("other/x", b"x" * 100)
    with pytest.raises(CheckpointError, match="name"):
        ds_ckpt.open(URL, "tag")
    for act in (folder_at(URL).has, folder_at(URL).remove, folder_at(URL).__truediv__, folder_at(URL).open):
        with pytest.raises(CheckpointError, match="name"):
            act(name)
    with pytest.raises(CheckpointError, match="name"):
        folder_at(URL).replace(name, b"x")


# -- the tools --------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> tuple[int, str, Exception | None]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})
    return done.exit_code, done.stdout, done.exception


def test_ls_show_and_verify_take_a_url():
    ENGINE.save(URL, "one", Snapshot(snapshot(1).pieces, {"global_steps": 7}, {}), latest=False)
    save(2, "two")
    put("torn/rank_00000_0-0123456789ab.safetensors", b"half")
    put("logs/events", b"x")
    code, out, _ = command("ls", URL)
    lines = out.splitlines()
    assert code == 0
    assert {line.split()[0] for line in lines[1:]} >= {"one", "two", "torn"}
    assert any(line.startswith("two (latest)") and "ds-sharded 1" in line for line in lines)
    assert any(line.split()[:2] == ["one", "7"] for line in lines)
    assert "logs" not in out
    assert "not complete" in " ".join(out.split())
    code, out, _ = command("show", URL)
    assert code == 0
    assert f"{URL}/two" in out
    assert command("verify", URL, "one")[0] == 0
    name = next(iter(read(f"{URL}/two").files))
    put(f"two/{name}", content(f"two/{name}")[:-1] + b"\xff")
    code, _, error = command("verify", URL)
    assert code == 1
    assert isinstance(error, CheckpointError)
    assert error.where == f"{URL}/two/{name}"


def test_nothing_there_is_said():
    for arguments in (("ls", URL), ("show", URL), ("verify", URL)):
        code, _, error = command(*arguments)
        assert code == 1
        assert "no such folder" in error.what
    with pytest.raises(NoCheckpointError, match="does not exist"):
        ENGINE.read_latest(URL)
    put("torn/notes.txt", b"x")
    with pytest.raises(NoCheckpointError, match="no file 'latest'"):
        ENGINE.read_latest(URL)
    save(1)
    with pytest.raises(CheckpointError, match="this is the checkpoint 'tag' itself") as caught:
        ENGINE.read_latest(f"{URL}/tag")
    assert caught.value.fix == f"load_checkpoint({URL!r}, tag='tag')"
    with pytest.raises(CheckpointError, match="no checkpoint 'nowhere'") as caught:
        ENGINE.open(URL, "nowhere")
    assert "complete checkpoints there: tag" in caught.value.fix
    with pytest.raises(CheckpointError):
        folder_of(URL, "../elsewhere")


def test_a_store_that_does_not_answer_says_why(monkeypatch):
    save(1)

    def forbidden(fs, path, **options):
        raise RuntimeError("403 Forbidden")

    for name in ("info", "ls", "cat_file"):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, name, forbidden)
            with pytest.raises(CheckpointError, match="403 Forbidden"):
                ds_ckpt.open(URL).tensor("float32.matrix")


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_and_removed(store):
    save(1)
    folder = folder_at(URL) / "tag"
    assert (folder.name, str(folder), str(folder.parent)) == ("tag", f"{URL}/tag", URL)
    assert folder.parent.folders() == ["tag"]
    assert folder.parent.files() == ["latest"]
    assert folder.parent.complete_tags() == ["tag"]
    times = [folder.changed_ns(name) for name in folder.files()]
    assert folder.changed_ns() == max(times)
    assert min(times) > 1.7e18
    with pytest.raises(OSError, match="not empty"):
        folder.drop()
    for name in folder.files():
        folder.remove(name)
        folder.remove(name)
    folder.drop()
    folder.drop()
    assert list(store) == ["/bucket/run/latest"]
    assert not folder.is_there()
    assert (folder.files(), folder.folders(), folder.changed_ns()) == ([], [], None)


def test_a_time_without_a_zone_is_not_that_of_this_machine(monkeypatch):
    put("file", b"x")
    times = []
    for zone in (None, timezone.utc, timezone(timedelta(hours=9))):
        there = datetime(2026, 1, 2, 3 + 9 * (zone not in (None, timezone.utc)), tzinfo=zone)
        monkeypatch.setattr(MemoryFileSystem, "modified", lambda fs, path, there=there: there)
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        times.append(folder_at(URL).changed_ns("file"))
    monkeypatch.undo()
    time.tzset()
    assert times == [1767322800 * 10**9] * 3


def test_folders_of_a_store_that_has_such_are_made_and_removed(monkeypatch):
    """The memory filesystem as one of real folders: nothing is put into one that is not there."""
    real = MemoryFileSystem._open

    def strict(fs, path, mode="rb", **options):
        if mode == "wb" and not fs.isdir(fs._parent(path)):
            raise FileNotFoundError(path)
        return real(fs, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", strict)
    save(1)
    check_content(ENGINE, URL, "tag", 1)
    folder = folder_at(URL) / "tag"
    for name in folder.files():
        folder.remove(name)
    assert folder.is_there()
    folder.drop()
    assert not folder.is_there()


def save_on_rank(path: str) -> None:
    import torch.distributed as dist

    engine = ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=256), dist.group.WORLD)
    folder = RemoteFolder(fsspec.filesystem("file"), path, "other://run")
    for version in (1, 2):
        given = snapshot(version, parts=3, rank=dist.get_rank(), world_size=2)
        engine.save(folder, "tag", given, latest=True)
    check_content(engine, folder, "tag", 2, parts=2)


def test_ranks_put_their_own_objects(tmp_path):
    run_ranks([partial(save_on_rank, f"{tmp_path}/run")], 2)
    folder = RemoteFolder(fsspec.filesystem("file"), f"{tmp_path}/run", "other://run")
    check_content(ENGINE, folder, "tag", 2, parts=5)
    files = read(folder / "tag").files
    assert {name[:10] for name in files} == {"rank_00000", "rank_00001"}
    assert (folder / "tag").files() == sorted(["checkpoint.json", *files])


NO_FOLDERS = [
    "memory://",
    "memory:///",
    "memory://a/../b",
    "memory://a//b",
    "memory://./a",
    "memory://a/..",
    "s3://a?b",
]
NO_FOLDERS += ["s3://a\\b", "s3://a\0b", "file://relative/path", "file:///a/../b", "local://x"]


def test_another_filesystem_of_fsspecs(tmp_path):
    """Its local one, as a store: with real folders, listings of another form, and links."""
    folder = RemoteFolder(fsspec.filesystem("file"), f"{tmp_path}/run", "other://run")
    for version in (1, 2):
        ENGINE.save(folder, "tag", snapshot(version), latest=True)
        check_content(ENGINE, folder, "tag", version, parts=3)
    assert (folder.complete_tags(), folder.read_latest(), folder.files()) == (["tag"], "tag", ["latest"])
    assert sorted(os.listdir(tmp_path / "run" / "tag")) == sorted(["checkpoint.json", *read(folder / "tag").files])  # noqa: PTH208
    path = tmp_path / "run" / "tag" / next(iter(read(folder / "tag").files))
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="no regular file"):
        read(folder / "tag")
    for name in (folder / "tag").files():
        (folder / "tag").remove(name)
    (folder / "tag").drop()
    assert folder.folders() == []
    assert (tmp_path / "outside").exists()


@pytest.mark.parametrize("url", NO_FOLDERS)
def test_a_url_that_names_no_folder_is_refused(url):
    with pytest.raises(CheckpointError, match="cannot name a folder"):
        folder_at(url)


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(CheckpointError, match="password") as caught:
        folder_at("sftp://somebody:hunter2@host/run")
    assert "hunter2" not in str(caught.value)


def test_what_is_missing_for_a_url_is_named(monkeypatch):
    from fsspec.registry import known_implementations

    monkeypatch.setitem(known_implementations, "nostore", {"class": "nostorefs.Store", "err": "Install nostorefs"})
    with pytest.raises(CheckpointError, match="not installed") as caught:
        folder_at("nostore://bucket/run")
    assert caught.value.fix == "pip install nostorefs"
    monkeypatch.setitem(
        known_implementations, "nossh", {"class": "fsspec.implementations.nothing.Store", "err": "no ssh"}
    )
    with pytest.raises(CheckpointError, match="not installed") as caught:
        folder_at("nossh://host/run")
    assert caught.value.fix == 'pip install "fsspec[nossh]"'
    with pytest.raises(CheckpointError, match="nobody"):
        folder_at("nobody://bucket/run")


def test_a_file_url_is_a_folder_of_this_machine(tmp_path):
    url = f"file://{tmp_path}/run"
    assert folder_at(f"{url}/") == LocalFolder(tmp_path / "run")
    ENGINE.save(url, "tag", snapshot(1), latest=True)
    check_content(ENGINE, url, "tag", 1, parts=3)
    check_content(ENGINE, tmp_path / "run", "tag", 1)
    assert ds_ckpt.open(url).path == tmp_path / "run" / "tag"
    assert command("verify", url)[0] == 0
    assert folder_at("file:///data/my%20run%23") == LocalFolder(Path("/data/my run#"))
    for hostile in ("file:///a/%2e%2e/b", "file:///a%2f%2e%2e/b", "file:///a%00"):
        with pytest.raises(CheckpointError, match="cannot name a folder"):
            folder_at(hostile)


def test_neither_torch_nor_fsspec_is_loaded_before_it_is_needed(tmp_path):
    save_code = (
        f"import sys, ds_ckpt\nds_ckpt.open({str(tmp_path)!r})\nassert not {{'torch', 'fsspec'}} & set(sys.modules)\n"
    )
    ENGINE.save(tmp_path, "tag", snapshot(1), latest=True)
    subprocess.run([sys.executable, "-c", save_code], check=True, timeout=60)
    code = (
        "import sys\nfrom ds_ckpt.tags import find_tags\nfrom ds_ckpt.storage import folder_at\n"
        "folder_at('memory://a').replace('latest', b'x')\nassert not find_tags('memory://a')\n"
        "assert 'torch' not in sys.modules and 'fsspec' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
