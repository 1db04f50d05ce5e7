"""Did the kernel kill for lack of memory? Counters read before and after a job (Linux)."""

from __future__ import annotations

from pathlib import Path

__all__ = ["explain", "read_counters"]

HOST = "/proc/vmstat"


def read_counters(root: Path = Path("/")) -> dict[str, int]:
    """Return file -> its count of out-of-memory kills, for this process's cgroups and the whole host.

    Args:
        root: where ``/proc`` and ``/sys`` are found; tests give their own.
    """
    counters = {}
    for path in (*_cgroup_files(root), root / HOST.lstrip("/")):
        count = _count(path)
        if count is not None:
            counters["/" + str(path.relative_to(root))] = count
    return counters


def explain(before: dict[str, int], after: dict[str, int]) -> str:
    """Return one sentence on what changed between two readings.

    >>> explain({"/proc/vmstat": 3}, {"/proc/vmstat": 3})
    'the kernel reported no out-of-memory kill'
    """
    if not after:
        return "whether memory ran out cannot be read on this system"
    grown = {path: count - before.get(path, 0) for path, count in after.items() if count > before.get(path, 0)}
    cgroups = {path: count for path, count in grown.items() if path != HOST}
    if cgroups:
        path, count = max(cgroups.items(), key=lambda item: item[1])
        return f"out of memory: the job's cgroup reported {_kills(count)} meanwhile ({path})"
    if grown:
        return f"probably out of memory: the kernel reported {_kills(grown[HOST])} on this host meanwhile ({HOST})"
    return "the kernel reported no out-of-memory kill"


def _kills(count: int) -> str:
    return f"{count} out-of-memory kill{'s' if count > 1 else ''}"


def _cgroup_files(root: Path) -> list[Path]:
    """Candidates in both cgroup versions; in a container the own cgroup is often mounted at the top."""
    files = [root / "sys/fs/cgroup/memory.events", root / "sys/fs/cgroup/memory/memory.oom_control"]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files.append(root / "sys/fs/cgroup" / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(root / "sys/fs/cgroup/memory" / path.lstrip("/") / "memory.oom_control")
    return list(dict.fromkeys(files))


def _count(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(" ")
        if key == "oom_kill":
            return int(value)
    return None
