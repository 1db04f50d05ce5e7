"""One rank of :func:`ds_core.testing.ranks.run_ranks`."""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

    from torch.distributed import Store  # type: ignore[attr-defined]

HOST = "127.0.0.1"
# The caller decides how long anything may take; a rank only must not give up earlier.
_FOREVER = timedelta(days=1)


def main(folder_name: str, rank: int) -> None:
    """Run every function of the job in ``folder_name`` as ``rank``, then wait to be ended by the caller."""
    folder = Path(folder_name)
    # Functions must not take this rank's arguments for their own.
    del sys.argv[1:]
    job = json.loads((folder / "job.json").read_text())
    threading.Thread(target=_end_with_caller, args=(folder,), daemon=True).start()
    stack = (folder / f"stack.{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    world_size: int = job["world_size"]
    _set_environment(rank, world_size)
    _import_by_path(job["files"])

    import torch

    torch.set_num_threads(1)
    store = _store(folder, rank)
    (folder / f"started.{rank}").touch()
    for index in range(job["count"]):
        try:
            _prepare(index, rank, world_size, store)
            function = pickle.loads((folder / f"function.{index}").read_bytes())
            result = pickle.dumps(function())
        except BaseException as error:
            _fail(folder / f"failed.{index}.{rank}", error)
            break
        _write(folder / f"done.{index}.{rank}", result)
        # Before anybody's group goes away: another rank may still be receiving from this one.
        _barrier(store, f"end.{index}", world_size)
    # Rank 0 holds the store, and a rank that goes away would look like a failure to the others.
    while True:
        signal.pause()


def _end_with_caller(folder: Path) -> None:
    # The pipe closes when the caller is gone, however it went; the process group is this rank and its children.
    while os.read(0, 1):
        pass
    # A caller that ended in order has killed this rank before closing the pipe, and removes the folder itself.
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _set_environment(rank: int, world_size: int) -> None:
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": HOST,
            # init_process_group() without arguments then joins the store that rank 0 already holds.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    )
    interface = _loopback()
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def _loopback() -> str | None:
    import psutil

    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == HOST for address in addresses):
            return str(interface)
    return None


def _store(folder: Path, rank: int) -> Store:
    """Return the store of the job. Rank 0 lets the system pick the port, so that no two jobs can want the same."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address = folder / "port"
    if rank == 0:
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=_FOREVER)
        _write(address, str(store.port).encode())
    else:
        while not address.exists():
            time.sleep(0.005)
        store = TCPStore(HOST, int(address.read_bytes()), is_master=False, wait_for_workers=False, timeout=_FOREVER)
    os.environ["MASTER_PORT"] = str(store.port)
    return store


def _prepare(index: int, rank: int, world_size: int, store: Store) -> None:
    """Make what a function finds independent of the functions before it."""
    import numpy
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    from ds_core.testing.state import reset_globals

    reset_globals()
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(index)
    named = PrefixStore(f"group.{index}", store)
    dist.init_process_group("gloo", store=named, rank=rank, world_size=world_size, timeout=_FOREVER)


def _barrier(store: Store, key: str, world_size: int) -> None:
    if store.add(f"{key}.count", 1) == world_size:
        store.set(f"{key}.all", "1")
    store.wait([f"{key}.all"], _FOREVER)


def _fail(path: Path, error: BaseException) -> None:
    text = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    _write(path, json.dumps(text).encode())


def _write(path: Path, content: bytes) -> None:
    # The caller reads as soon as the name is there.
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.rename(path)


def _import_by_path(files: Mapping[str, str]) -> None:
    main_file = files.get("__main__")
    sys.meta_path.insert(0, _ByPath(files))
    if main_file is not None:
        # As multiprocessing does: the caller's script under another name, so that its main part does not run again.
        spec = importlib.util.spec_from_file_location("__mp_main__", main_file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["__mp_main__"] = sys.modules["__main__"] = module
        spec.loader.exec_module(module)


class _ByPath(MetaPathFinder):
    """Finds the modules whose files the caller sent, and stands in for parents that are no packages."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = files

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in self.files:
            return importlib.util.spec_from_file_location(fullname, self.files[fullname])
        if any(name.startswith(f"{fullname}.") for name in self.files):
            return PathFinder.find_spec(fullname, path) or ModuleSpec(fullname, None, is_package=True)
        return None
