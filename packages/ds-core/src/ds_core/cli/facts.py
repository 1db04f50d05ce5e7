"""What is installed and what the machine offers, as plain data: the content of ``ds report``.

Everything is reported rather than raised: this is what people run when something is broken. Torch is imported only by
:func:`torch_facts` and by the plugins that :func:`plugin_facts` tries.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import sys
from typing import Any

from packaging.utils import canonicalize_name

from ds_core import registry
from ds_core._packages import PACKAGE_OF_PLUGIN
from ds_core.errors import DsError

__all__ = ["collect", "machine_facts", "missing_facts", "package_facts", "plugin_facts", "torch_facts"]


def collect() -> dict[str, Any]:
    """Return all facts; the values are what JSON can hold."""
    return {
        "machine": machine_facts(),
        "packages": package_facts(),
        "torch": torch_facts(),
        "plugins": plugin_facts(),
        "missing": missing_facts(),
    }


def machine_facts() -> dict[str, Any]:
    """Return Python, system, cores and memory."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "cpu_cores_usable": usable,
        "memory_bytes": int(psutil.virtual_memory().total),
    }


def package_facts() -> dict[str, str]:
    """Return the version of ds-core and of every package that brings a plugin."""
    found = {registry.CORE: metadata.version(registry.CORE)}
    for seam in registry.SEAMS:
        found.update({plugin.package: plugin.version for plugin in registry.installed(seam)})
    # A ds-* package without a plugin, such as one that pins a tested set.
    for dist in metadata.distributions():
        name = canonicalize_name(dist.metadata["Name"] or "")
        if name.startswith("ds-") and any(line.startswith(("ds-core", "ds_core")) for line in dist.requires or ()):
            found.setdefault(name, dist.version)
    return dict(sorted(found.items()))


def plugin_facts() -> list[dict[str, Any]]:
    """Return every plugin of every seam; ``problem`` is None for one that can be used."""
    return [
        {
            "seam": seam,
            "name": plugin.name,
            "package": plugin.package,
            "version": plugin.version,
            "built_in": plugin.package == registry.CORE,
            "problem": _problem(plugin),
        }
        for seam in registry.SEAMS
        for plugin in registry.installed(seam)
    ]


def _problem(plugin: registry.Plugin) -> str | None:
    try:
        # Both: find sees duplicates, load imports. Whatever a plugin's import raises is what the user needs to read.
        registry.find(plugin.seam, plugin.name)
        plugin.load()
    except DsError as error:
        return error.what
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def torch_facts() -> dict[str, Any]:
    """Return torch's version, backends and devices; ``problem`` says why where torch cannot be imported."""
    facts: dict[str, Any] = {"version": None, "problem": None, "cuda": None, "backends": {}, "accelerator": None}
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:  # a broken install raises OSError and others, too
        facts["problem"] = f"torch cannot be imported: {type(error).__name__}: {error}"
        return facts
    facts["version"] = torch.__version__
    facts["cuda"] = torch.version.cuda
    if dist.is_available():
        facts["backends"] = {
            "gloo": dist.is_gloo_available(),
            "nccl": dist.is_nccl_available(),
            "mpi": dist.is_mpi_available(),
        }
    facts["accelerator"] = _accelerator_facts()
    return facts


def _accelerator_facts() -> dict[str, Any]:
    try:
        from ds_core.accelerator import get_accelerator

        accelerator = get_accelerator()
        return {
            "kind": accelerator.device_name(),
            "backend": accelerator.communication_backend_name(),
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in accelerator.supported_dtypes()],
            "devices": [
                {"name": accelerator.device_name(index), "memory_bytes": int(accelerator.total_memory(index))}
                for index in range(accelerator.device_count())
            ],
            "problem": None,
        }
    except Exception as error:  # a driver that does not answer is a finding, not a reason to stop
        return {"problem": error.what if isinstance(error, DsError) else f"{type(error).__name__}: {error}"}


def missing_facts() -> list[dict[str, Any]]:
    """Return the known packages that are not installed, with what they would bring."""
    brings: dict[str, list[str]] = {}
    for (seam, name), package in PACKAGE_OF_PLUGIN.items():
        brings.setdefault(package, []).append(f"{seam} {name}")
    installed = package_facts()
    return [
        {"package": package, "brings": names, "install": f"pip install {package}"}
        for package, names in sorted(brings.items())
        if package not in installed
    ]
