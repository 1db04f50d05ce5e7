"""Run functions on N gloo ranks of one spawn, and say clearly what went wrong.

Note: how functions reach a rank
    A rank is a plain subprocess. Functions travel by pickle, that is by module and name. A test file imported by
    pytest with ``--import-mode=importlib`` has a module name nobody else can import, so the caller sends, beside the
    pickles, the file of every such module; the rank loads that file once, under the caller's name for it. Results
    come back by pickle too, so a class of the test file may be in them.

Note: what is counted
    ``timeout_s`` is for each function; starting the ranks (importing torch N times) has a limit of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import types
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["RankError", "expect_rank_errors", "run_ranks"]

START_TIMEOUT_S = 120.0
"""For N interpreters to import torch, on a machine that does other things too."""
GRACE_S = 2.0
"""How long the other ranks are waited for once one has failed."""
_DUMP_S = 2.0
_SETTLE_S = 0.1
_POLL_S = 0.01
_TAG = "DS_TESTING_RANKS"
_BOOT = (
    "import json, sys; sys.path[:] = json.load(open(sys.argv[1] + '/job.json'))['sys_path']; "
    "from ds_core.testing._worker import main; main(sys.argv[1], int(sys.argv[2]))"
)


class RankError(RuntimeError):
    """A function failed on some ranks, or did not end; the text holds every rank's traceback.

    Attributes:
        function: name of the function that ran.
        errors: rank -> ``"ValueError: text"`` for the ranks that raised or died.
        stuck: rank -> stack of all its threads, for the ranks that did not end.
        tracebacks: rank -> traceback text of the ranks that raised.
    """

    def __init__(
        self, what: str, *, function: str, errors: dict[int, str], tracebacks: dict[int, str], stuck: dict[int, str]
    ) -> None:
        self.function, self.errors, self.tracebacks, self.stuck = function, errors, tracebacks, stuck
        parts = [what]
        parts += [f"--- rank {rank} raised {errors[rank]}\n{tracebacks.get(rank, '')}" for rank in sorted(errors)]
        parts += [f"--- rank {rank} did not end, it was here:\n{stuck[rank]}" for rank in sorted(stuck)]
        super().__init__("\n".join(parts))


def run_ranks(
    functions: Sequence[Callable[[], Any]],
    world_size: int,
    *,
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
) -> list[list[Any]]:
    """Run ``functions`` one after another on ``world_size`` gloo ranks, and return what they returned.

    Every function runs on every rank with torch.distributed's default group initialised on 127.0.0.1, RANK,
    LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE set, one torch thread, and random generators seeded with 0. Between
    functions the ranks wait for each other, the group is made anew and :func:`ds_core.testing.state.reset_globals`
    runs. ``init_process_group()`` without arguments works too, after a function destroyed the group it was given.

    Args:
        functions: called without arguments; functions of a module or ``functools.partial`` of them.
        world_size: number of ranks, at least 1.
        timeout_s: for each function.
        env: set in the ranks' environment, over the caller's.

    Returns:
        ``result[i][rank]`` is what ``functions[i]`` returned on ``rank``. Tensors are copies.

    Raises:
        RankError: a function raised on a rank, a rank died, or not all ended in time. No later function runs.
        TypeError: a function cannot be pickled.
    """
    results: list[list[Any]] = []
    with _job(functions, world_size, timeout_s, env) as job:
        for index in range(len(functions)):
            outcome = job.wait(index, grace_s=GRACE_S)
            if outcome.errors or outcome.stuck:
                raise outcome.error()
            results.append([outcome.results[rank] for rank in range(world_size)])
    return results


def expect_rank_errors(
    function: Callable[[], Any], world_size: int, *, timeout_s: float = 60.0, env: Mapping[str, str] | None = None
) -> dict[int, str]:
    """Run one function that is supposed to fail, and return ``"ValueError: text"`` of each rank that failed.

    Every rank has the whole ``timeout_s`` to end by itself. A rank that died is there as ``"ExitCode: 3"`` or
    ``"Signal: SIGKILL"``; one that returned is not there.

    Raises:
        RankError: a rank did not end: a hang is never expected.
    """
    with _job([function], world_size, timeout_s, env) as job:
        outcome = job.wait(0, grace_s=None)
        if outcome.stuck:
            raise outcome.error()
        return outcome.errors


@dataclass
class _Outcome:
    """How one function ended on each rank."""

    function: str
    timeout_s: float
    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    tracebacks: dict[int, str] = field(default_factory=dict)
    stuck: dict[int, str] = field(default_factory=dict)

    def missing(self, world_size: int) -> list[int]:
        return [rank for rank in range(world_size) if rank not in self.results and rank not in self.errors]

    def error(self) -> RankError:
        raised, stuck = (", ".join(map(str, sorted(ranks))) for ranks in (self.errors, self.stuck))
        said = []
        if raised:
            said.append(f"failed on rank {raised}")
        if stuck:
            after = "after that" if raised else f"within {self.timeout_s:g} s"
            said.append(f"did not end {after} on rank {stuck}")
        return RankError(
            f"{self.function} " + ", ".join(said),
            function=self.function,
            errors=self.errors,
            tracebacks=self.tracebacks,
            stuck=self.stuck,
        )


class _Job:
    """The ranks of one spawn. They talk to the caller through files in a folder, which outlive a killed rank."""

    def __init__(
        self, folder: Path, names: Sequence[str], world_size: int, timeout_s: float, env: Mapping[str, str]
    ) -> None:
        self.folder, self.names, self.world_size, self.timeout_s = folder, names, world_size, timeout_s
        self.tag = uuid.uuid4().hex
        self.env = {**os.environ, **env, _TAG: self.tag}
        self.procs: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for rank in range(self.world_size):
            with (self.folder / f"rank{rank}.log").open("wb") as log:
                self.procs.append(
                    subprocess.Popen(
                        [sys.executable, "-c", _BOOT, str(self.folder), str(rank)],
                        env=self.env,
                        # A rank reads its standard input, and ends itself when the caller's end is gone.
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        # Ctrl-C is for the caller, which then ends the ranks.
                        start_new_session=True,
                    )
                )

    def wait(self, index: int, *, grace_s: float | None) -> _Outcome:
        """Collect how function ``index`` ended; after a failure wait only ``grace_s`` more."""
        outcome = _Outcome(self.names[index], self.timeout_s)
        started = index > 0
        deadline = time.monotonic() + (self.timeout_s if started else START_TIMEOUT_S)
        while missing := outcome.missing(self.world_size):
            for rank in missing:
                self._collect(index, rank, outcome)
            now = time.monotonic()
            if not started and all((self.folder / f"started.{rank}").exists() for rank in range(self.world_size)):
                started, deadline = True, now + self.timeout_s
            if outcome.errors and grace_s is not None:
                deadline, grace_s = min(deadline, now + grace_s), None
            if now > deadline:
                break
            time.sleep(_POLL_S)
        outcome.stuck = self._where(outcome.missing(self.world_size))
        return outcome

    def _collect(self, index: int, rank: int, outcome: _Outcome) -> None:
        # Asked before looking for the file: a rank may write its result and die between the two.
        code = self.procs[rank].poll()
        done, failed = (self.folder / f"{kind}.{index}.{rank}" for kind in ("done", "failed"))
        if done.exists():
            outcome.results[rank] = pickle.loads(done.read_bytes())
        elif failed.exists():
            error = json.loads(failed.read_text())
            outcome.errors[rank] = error["error"]
            outcome.tracebacks[rank] = error["traceback"]
        elif code is not None:
            outcome.errors[rank] = f"ExitCode: {code}" if code >= 0 else f"Signal: {signal.Signals(-code).name}"
            outcome.tracebacks[rank] = self._log_tail(rank)

    def _where(self, ranks: Sequence[int]) -> dict[int, str]:
        """Return the stacks of ``ranks``, which faulthandler writes when asked by a signal."""
        dumps = {rank: self.folder / f"stack.{rank}" for rank in ranks}
        for rank, dump in dumps.items():
            # The file exists once the handler is in place; the signal would end the process before.
            if dump.exists():
                with contextlib.suppress(ProcessLookupError):
                    self.procs[rank].send_signal(signal.SIGUSR1)
        until, before = time.monotonic() + _DUMP_S, dict.fromkeys(ranks, 0)
        while time.monotonic() < until:
            # Written in many small pieces: it is whole once it has not grown for a while.
            time.sleep(_SETTLE_S)
            sizes = {rank: dump.stat().st_size if dump.exists() else 1 for rank, dump in dumps.items()}
            if all(sizes.values()) and sizes == before:
                break
            before = sizes
        return {
            rank: (dump.read_text() if dump.exists() else "still starting\n") + self._log_tail(rank)
            for rank, dump in dumps.items()
        }

    def _log_tail(self, rank: int) -> str:
        lines = (self.folder / f"rank{rank}.log").read_text(errors="replace").splitlines()[-20:]
        return "".join(f"  | {line}\n" for line in lines)

    def stop(self) -> None:
        """Kill the ranks and whatever they started, and reap them."""
        for _ in range(5):
            alive = [*self._tree(), *self._tagged()]
            if not alive:
                break
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            for proc in self.procs:
                proc.wait()
            psutil.wait_procs(alive, timeout=5)
        for proc in self.procs:
            proc.wait()
            if proc.stdin is not None:
                proc.stdin.close()

    def _tree(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for proc in self.procs:
            if proc.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    parent = psutil.Process(proc.pid)
                    found += [*parent.children(recursive=True), parent]
        return found

    def _tagged(self) -> list[psutil.Process]:
        """Return what carries this job's mark in its environment: also orphans in a session of their own."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_TAG) == self.tag:
                    found.append(process)
        return found


@contextlib.contextmanager
def _job(
    functions: Sequence[Callable[[], Any]], world_size: int, timeout_s: float, env: Mapping[str, str] | None
) -> Iterator[_Job]:
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}, allowed is 1 or more")
    # A rank that is being killed may still be writing, so the folder is removed only after all of them are reaped.
    with tempfile.TemporaryDirectory(prefix="ds-ranks-") as name:
        folder = Path(name)
        modules: set[str] = set()
        for index, function in enumerate(functions):
            (folder / f"function.{index}").write_bytes(_pickled(function, modules))
        files = {module: file for module in modules if (file := _file_to_send(module)) is not None}
        job = {"sys_path": sys.path, "files": files, "world_size": world_size, "count": len(functions)}
        (folder / "job.json").write_text(json.dumps({**job, "timeout_s": timeout_s}))
        running = _Job(folder, [_name(function) for function in functions], world_size, timeout_s, env or {})
        try:
            running.start()
            yield running
        finally:
            running.stop()


class _Pickler(pickle.Pickler):
    """Notes the modules that the other side will have to import."""

    def __init__(self, file: io.BytesIO, modules: set[str]) -> None:
        super().__init__(file)
        self.modules = modules

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, type | types.FunctionType):
            self.modules.add(obj.__module__)
        return NotImplemented


def _pickled(function: Callable[[], Any], modules: set[str]) -> bytes:
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, modules).dump(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{_name(function)} cannot be sent to a rank: {error}; pass a function of a module, or functools.partial "
            "of one with arguments that can be pickled"
        ) from error
    return buffer.getvalue()


def _file_to_send(module: str) -> str | None:
    """Return the file of ``module`` if a fresh interpreter would not find it by name, else None."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return None
    file = str(Path(file).resolve())
    if module == "__main__":
        return file
    for finder in sys.meta_path:
        spec = finder.find_spec(module.partition(".")[0], None)
        if spec is None:
            continue
        # Only a package with an __init__.py owns what lies below it; a folder of the same name may be anybody's.
        if spec.origin is None or not spec.has_location:
            return file
        origin = Path(spec.origin).resolve()
        owned = origin.parent in Path(file).parents if spec.submodule_search_locations else origin == Path(file)
        return None if owned else file
    return file


def _name(function: Callable[[], Any]) -> str:
    inner = getattr(function, "func", None)
    if inner is not None:
        arguments = [*map(repr, getattr(function, "args", ()))]
        arguments += [f"{key}={value!r}" for key, value in getattr(function, "keywords", {}).items()]
        return f"{_name(inner)}({', '.join(arguments)})"[:200]
    return str(getattr(function, "__qualname__", function))
