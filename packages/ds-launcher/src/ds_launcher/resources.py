"""What this machine has for ranks: visible GPUs, cores, a free port. Found without torch."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ds_core.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["check_port", "cores", "find_free_port", "visible_gpus"]


def visible_gpus(env: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """Return how many GPUs the ranks will see: the ids in ``CUDA_VISIBLE_DEVICES``, else the driver's device files.

    Ids are counted, not looked up: numbers, ``GPU-...`` and ``MIG-...`` are all fine. CUDA ignores what follows an
    id below 0.

    >>> visible_gpus({"CUDA_VISIBLE_DEVICES": "2,3"})
    2
    """
    named = env.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return sum(path.name[6:].isdigit() for path in devices.glob("nvidia[0-9]*"))
    count = 0
    for word in named.split(","):
        if not word.strip() or word.strip().startswith("-"):
            break
        count += 1
    return count


def cores() -> int:
    """Return the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_free_port() -> int:
    """Return a port nobody listens on. Rank 0 binds it a moment later; the system rarely gives it away in between."""
    with _bound(0) as server:
        port: int = server.getsockname()[1]
        return port


def check_port(port: int) -> None:
    """Check that rank 0 will be able to listen on ``port``.

    Raises:
        LaunchError: somebody listens there already, or it is not allowed.
    """
    try:
        _bound(port).close()
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        raise LaunchError(
            f"port {port} is already in use on this machine" if in_use else f"port {port} cannot be used: {error}",
            where="--master_port",
            fix="leave --master_port out to have a free port picked, or give another one",
        ) from error


def _bound(port: int) -> socket.socket:
    """Bind like torch's TCPStore does: all addresses, both families where there are two, reusing closed connections."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
