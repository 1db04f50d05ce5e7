"""Choosing the accelerator of a process: ds_core.accelerator."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

import ds_core.accelerator as chosen
from ds_core import registry
from ds_core.accelerator.cpu import CpuAccelerator
from ds_core.errors import EngineError, PluginError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    chosen.set_accelerator(None)
    yield
    chosen.set_accelerator(None)


class _Other(CpuAccelerator):
    """A device of some third package, there or not."""

    there = True

    def is_available(self) -> bool:
        return self.there

    def device_name(self, device_index: int | None = None) -> str:
        return "other"


def _install(monkeypatch: pytest.MonkeyPatch, **classes: type) -> None:
    monkeypatch.setattr(registry, "names", lambda seam: tuple(sorted(classes)))
    monkeypatch.setattr(registry, "load", lambda seam, name, needed_by=None: classes[name])


def test_one_object_per_process() -> None:
    assert chosen.get_accelerator() is chosen.get_accelerator()


def test_cpu_where_there_is_no_gpu() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert chosen.get_accelerator().device_name() == expected
    assert chosen.is_current_accelerator_supported()


def test_the_variable_picks_by_entry_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert isinstance(chosen.get_accelerator(), CpuAccelerator)


def test_an_unknown_name_lists_the_installed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cdua")
    with pytest.raises(PluginError, match=r"(?s)'cdua'.*DS_ACCELERATOR.*cpu, cuda.*did you mean 'cuda'"):
        chosen.get_accelerator()


def test_a_named_accelerator_without_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(EngineError, match=r"(?s)'cuda' has no device.*DS_ACCELERATOR=cuda.*one of cpu"):
        chosen.get_accelerator()


def test_cuda_comes_before_other_packages_and_they_before_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda(_Other):
        def device_name(self, device_index: int | None = None) -> str:
            return "cuda"

    _install(monkeypatch, cpu=CpuAccelerator, cuda=Cuda, another=_Other)
    assert chosen.get_accelerator().device_name() == "cuda"
    chosen.set_accelerator(None)
    monkeypatch.setattr(Cuda, "there", False)
    assert chosen.get_accelerator().device_name() == "other"
    chosen.set_accelerator(None)
    monkeypatch.setattr(_Other, "there", False)
    assert chosen.get_accelerator().device_name() == "cpu"


def test_set_accelerator() -> None:
    own = _Other()
    chosen.set_accelerator(own)
    assert chosen.get_accelerator() is own
    assert not chosen.is_current_accelerator_supported()
    with pytest.raises(EngineError, match="got a str, expected an Accelerator"):
        chosen.set_accelerator("cpu")  # type: ignore[arg-type]
    assert chosen.get_accelerator() is own


def test_the_import_loads_no_torch_and_chooses_nothing() -> None:
    code = (
        "import sys, ds_core.accelerator as a; assert a._active is None;"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'torch']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
