"""The process group: joined once, from the launcher's environment, or for one process alone."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
import traceback
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ds_core.errors import CommError, NotBuiltError
from ds_core.log import logger

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "barrier",
    "destroy_at_exit",
    "destroy_process_group",
    "expected_world_size",
    "get_local_rank",
    "get_rank",
    "get_world_size",
    "init_distributed",
    "is_initialized",
    "leave_collectives_alone",
    "wait_before_destroy",
]

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Join the job's process group; every rank calls it. Returns at once where the user already did.

    Without a launcher's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) this process is a job of one rank,
    which needs no address: two such jobs on one host cannot meet.

    Args:
        dist_backend: torch.distributed's name; None: the accelerator's (``nccl`` or ``gloo``).
        auto_mpi_discovery: accepted for DeepSpeed's signature; ranks started by MPI come with ds-launcher.
        distributed_port: used with ``rank`` and ``world_size`` where MASTER_PORT is not set.
        verbose: log which backend is used.
        timeout: of a collective; None: environment ``DEEPSPEED_TIMEOUT`` in minutes, else 10 minutes.
        init_method: torch's address of the rendezvous, instead of the environment.
        dist_init_required: False: it must be initialised already.
        config: accepted for DeepSpeed's signature; configures the communication logger, which is not built yet.
        rank, world_size: instead of the environment.

    Raises:
        CommError: ``dist_init_required`` is False and it is not initialised, the environment is incomplete, or one of
            ``rank`` and ``world_size`` is given without the other.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise CommError(
            "torch.distributed is not initialised, and dist_init_required=False forbids to do it",
            where="init_distributed",
            fix="call torch.distributed.init_process_group before, or leave dist_init_required out",
        )
    if (rank >= 0) != (world_size > 0):
        raise CommError(
            f"rank and world_size belong together, given are rank {rank} and world_size {world_size}",
            where="init_distributed",
            fix="pass both, or neither: then the launcher's environment says",
        )
    # Its functions keep the default group of the moment of their import as default arguments, for good (torch 2.13).
    # Before there is a group they keep None; see "threads of gloo at the end".
    importlib.import_module("torch.distributed.nn.functional")
    from torch._C._distributed_c10d import HashStore

    from ds_core.accelerator import get_accelerator

    backend = dist_backend or get_accelerator().communication_backend_name()
    timeout = timeout or _timeout_of_environment()
    present = [name for name in _LAUNCHER if name in os.environ]
    if init_method is not None or len(present) == len(_LAUNCHER):
        dist.init_process_group(backend, init_method=init_method, timeout=timeout, rank=rank, world_size=world_size)
    elif rank >= 0 and world_size > 0:
        address = (
            f"tcp://{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', distributed_port)}"
        )
        dist.init_process_group(backend, init_method=address, timeout=timeout, rank=rank, world_size=world_size)
    elif "OMPI_COMM_WORLD_SIZE" in os.environ and int(os.environ["OMPI_COMM_WORLD_SIZE"]) > 1:
        raise NotBuiltError(
            "this process was started by MPI; finding the ranks of an MPI job is not built yet",
            where="init_distributed",
            fix=f"set {', '.join(_LAUNCHER)} for each rank, or start the job with 'ds run'",
        )
    elif present:
        missing = [name for name in _LAUNCHER if name not in os.environ]
        raise CommError(
            f"the environment of a job is incomplete: {', '.join(present)} set, {', '.join(missing)} missing",
            where="init_distributed",
            fix="start the script with 'ds run' or torchrun, or unset them all to run as one process",
        )
    else:
        dist.init_process_group(backend, store=HashStore(), timeout=timeout, rank=0, world_size=1)
    _leave_at_exit()
    if verbose and dist.get_rank() == 0 and dist.get_world_size() > 1:
        logger.info("%d ranks, backend %s", dist.get_world_size(), backend)


def _timeout_of_environment() -> timedelta:
    value = os.environ.get("DEEPSPEED_TIMEOUT", "10")
    try:
        timeout = timedelta(minutes=float(value))
    except (ValueError, OverflowError):
        timeout = timedelta(0)
    if timeout <= timedelta(0):
        raise CommError(f"DEEPSPEED_TIMEOUT is {value!r}", where="environment", fix="a positive number of minutes")
    return timeout


_owners: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
"""What holds on to a process group and lets it go in ``destroy()``, in the order they came: the same on every rank."""


def destroy_at_exit(owner: Any) -> None:
    """Have ``owner.destroy()`` called when the interpreter ends, before the process group goes."""
    _owners[owner] = None


_unfinished: weakref.WeakSet[Any] = weakref.WeakSet()
"""What talks to other ranks from a thread of its own."""


def wait_before_destroy(work: Any) -> None:
    """Have ``work.wait()`` called before :func:`destroy_process_group` takes away the group that it needs."""
    _unfinished.add(work)


_left_alone: bool = False
"""A collective was started whose peers may never come."""


def leave_collectives_alone() -> None:
    """Say that a collective is under way that this process gave up on, because it raised in between.

    When the script ends, the process ends at once, with exit code 1: torch would wait for the collective until its
    timeout, and this rank's failure would not be noticed until then.
    """
    global _left_alone
    _left_alone = True
    # Also where the caller made the process group, and we had no reason to be there at the end.
    _leave_at_exit()


def _leave_at_exit() -> None:
    """Have :func:`_leave_in_order` called at the end: once, however many groups there were, and before others."""
    atexit.unregister(_leave_in_order)
    atexit.register(_leave_in_order)


def _leave_in_order() -> None:
    """Destroy the process group that we made, at the end of a script that did not.

    Note: threads of gloo at the end
        A gloo thread that lets go of a finished collective may need Python's lock for it. If it asks while the
        interpreter is being taken down, it is ended in the middle of a C++ destructor and the process dies with
        "terminate called without an active exception" (seen at torch 2.13 in 1 of 20 short jobs). The threads are
        joined when the last reference to the group goes, so its owners let go first.

    After an uncaught exception nothing is joined: a collective whose peers never come would keep the process, and with
    it the job, from ending.
    """
    if _left_alone:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    if hasattr(sys, "last_value"):
        return
    failed = False
    for owner in list(_owners):
        try:
            owner.destroy()
        except Exception:
            # Such as a checkpoint that could not be completed. Out of an atexit function it would be printed, and the
            # exit code stay 0.
            traceback.print_exc()
            failed = True
    gc.collect()
    destroy_process_group()
    if failed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def is_initialized() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def expected_world_size() -> int:
    """Return the number of ranks of the job, also before the process group is joined."""
    if is_initialized():
        return get_world_size()
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal() or int(value) < 1:
        raise CommError(f"WORLD_SIZE is {value!r}", where="environment", fix="a positive whole number")
    return int(value)


def _needs_group() -> None:
    if not is_initialized():
        raise CommError(
            "the process group is not initialised", where="ds_core.comm", fix="call ds_core.init_distributed() first"
        )


def get_rank(group: ProcessGroup | None = None) -> int:
    """Return this process's place in ``group``, the whole job if None."""
    import torch.distributed as dist

    _needs_group()
    return dist.get_rank(group)


def get_world_size(group: ProcessGroup | None = None) -> int:
    import torch.distributed as dist

    _needs_group()
    return dist.get_world_size(group)


def get_local_rank() -> int:
    """Return this process's place on its host, from the launcher's environment; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")))


def barrier(group: ProcessGroup | None = None) -> None:
    """Wait until every rank of ``group`` is here."""
    import torch.distributed as dist

    _needs_group()
    dist.barrier(group)


def destroy_process_group(group: ProcessGroup | None = None) -> None:
    """Let ``group`` go, all groups if None, once what still writes a checkpoint in the background has ended."""
    global _left_alone
    import torch.distributed as dist

    if is_initialized():
        if group is None:
            for work in list(_unfinished):
                work.wait()
        dist.destroy_process_group(group)
    if group is None:
        _left_alone = False
