"""Import modules, each in a fork of its own, and report what the import did: ``python hygiene_probe.py MODULE...``.

Third-party packages are imported before, so that only what our modules do themselves is seen. With ``--without-torch``
torch is not among them, and a module that loads it is reported. Prints JSON: module -> list of findings.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from typing import Any

THIRD_PARTY = ("numpy", "packaging.requirements", "psutil", "pydantic", "rich.console", "typer", "hjson")
WITH_TORCH = ("torch", "torch.distributed", "torch.utils.checkpoint", "torch.utils.data", "safetensors.torch")
ON_FIRST_USE = ("torch.distributed.fsdp", "triton")
"""Loaded when they are needed, never by an import of ours."""

FORBIDDEN_EVENTS = (
    "os.exec",
    "os.fork",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.symlink",
    "os.system",
    "os.truncate",
    "os.unsetenv",
    "shutil.",
    "signal.pthread_kill",
    "socket.",
    "subprocess.",
    "tempfile.",
)
"""Audit events; a name that ends with a dot stands for all that begin with it."""

DEVICE_CALLS = {
    "torch.cuda": (
        "_lazy_init",
        "current_device",
        "current_stream",
        "device_count",
        "get_device_capability",
        "get_device_name",
        "get_device_properties",
        "init",
        "is_available",
        "is_bf16_supported",
        "set_device",
        "synchronize",
    ),
    "torch.accelerator": ("current_accelerator", "current_device_index", "device_count", "is_available"),
}
PATCHABLE = ("torch", "torch.autograd", "torch.cuda", "torch.distributed", "torch.nn", "torch.nn.functional")
PATCHABLE_CLASSES = ("torch.Tensor", "torch.nn.Module", "torch.nn.Parameter", "torch.optim.Optimizer")


def watch(module: str, *, torch_allowed: bool) -> list[str]:
    """Import ``module`` here and now, and return what it did that an import must not."""
    found: list[str] = []
    recording = True

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not recording:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
                found.append(f"opens {path!r} for writing")
        elif any(event == name or (name.endswith(".") and event.startswith(name)) for name in FORBIDDEN_EVENTS):
            found.append(f"{event} {arguments!r:.200}")

    if torch_allowed:
        _record_device_calls(found)
    before = state()
    with captured_output() as output:
        sys.addaudithook(audit)
        importlib.import_module(module)
        recording = False
    after = state()
    found += [f"changes {name}" for name in before if before[name] != after[name]]
    if output:
        found.append(f"prints {output[0]!r:.200}")
    loaded = ("torch",) if not torch_allowed else ON_FIRST_USE
    found += [f"loads {name}" for name in loaded if name in sys.modules]
    return found


def state() -> dict[str, Any]:
    """Return everything global that an import could change; the values compare equal when nothing did."""
    found: dict[str, Any] = {
        "the environment": dict(os.environ),
        "the working directory": os.getcwd(),  # noqa: PTH109, the fact itself
        "sys.path": list(sys.path),
        "import hooks": (list(map(id, sys.meta_path)), list(map(id, sys.path_hooks))),
        "exception hooks": (id(sys.excepthook), id(threading.excepthook), id(sys.unraisablehook), id(sys.displayhook)),
        "the standard streams": (id(sys.stdout), id(sys.stderr), id(sys.stdin)),
        "trace functions": (id(sys.gettrace()), id(sys.getprofile())),
        "the recursion limit": sys.getrecursionlimit(),
        "signal handlers": {int(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "the root logger": (logging.root.level, list(map(id, logging.root.handlers)), logging.root.manager.disable),
        "the logging classes": (id(logging.getLoggerClass()), id(logging.getLogRecordFactory())),
        "the warning filters": list(warnings.filters),
        "threads": {thread.name for thread in threading.enumerate()},
        "builtins": {name: id(value) for name, value in vars(builtins).items() if name != "_"},
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch's defaults"] = (
            str(torch.get_default_dtype()),
            str(torch.get_default_device()),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
        )
        found["torch's random state"] = torch.random.get_rng_state().numpy().tobytes()
        for name in PATCHABLE:
            # A submodule that is loaded for the first time becomes an attribute: that is no patch.
            found[name] = {key: id(value) for key, value in vars(sys.modules[name]).items() if not _is_module(value)}
        for name in PATCHABLE_CLASSES:
            owner, _, attribute = name.rpartition(".")
            found[name] = {key: id(value) for key, value in vars(getattr(sys.modules[owner], attribute)).items()}
    return found


def _is_module(value: object) -> bool:
    return type(value) is type(sys)


def _record_device_calls(found: list[str]) -> None:
    def recorder(name: str, original: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            found.append(f"calls {name}")
            return original(*args, **kwargs)

        return record

    for owner, names in DEVICE_CALLS.items():
        module = sys.modules[owner]
        for name in names:
            setattr(module, name, recorder(f"{owner}.{name}", getattr(module, name)))


class captured_output(contextlib.AbstractContextManager[list[str]]):  # noqa: N801, reads as a function
    """Collect what is written to file descriptors 1 and 2, at whatever level."""

    def __enter__(self) -> list[str]:
        sys.stdout.flush()
        sys.stderr.flush()
        self.text: list[str] = []
        # A file, not a pipe: a pipe that is full would stop the import for ever.
        self.file = tempfile.TemporaryFile()
        self.saved = os.dup(1), os.dup(2)
        os.dup2(self.file.fileno(), 1)
        os.dup2(self.file.fileno(), 2)
        return self.text

    def __exit__(self, *exc: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(self.saved[0], 1)
        os.dup2(self.saved[1], 2)
        os.close(self.saved[0])
        os.close(self.saved[1])
        self.file.seek(0)
        self.text += filter(None, [self.file.read().decode(errors="replace")])
        self.file.close()


def in_fork(module: str, *, torch_allowed: bool) -> list[str]:
    """Return the findings for ``module`` from a fork, so that each import starts from the same state."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            found = watch(module, torch_allowed=torch_allowed)
        except BaseException:
            found = [f"fails: {traceback.format_exc(limit=-3)}"]
        with os.fdopen(writer, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else ["the process died"]


def main() -> None:
    arguments = sys.argv[1:]
    torch_allowed = "--without-torch" not in arguments
    sys.dont_write_bytecode = True
    for name in (*THIRD_PARTY, *(WITH_TORCH if torch_allowed else ())):
        importlib.import_module(name)
    modules = [name for name in arguments if not name.startswith("--")]
    print(json.dumps({name: in_fork(name, torch_allowed=torch_allowed) for name in modules}))


if __name__ == "__main__":
    main()
