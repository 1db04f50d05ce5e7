"""Choosing an implementation: ds_core.ops."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core import ops, registry
from ds_core.errors import PluginError
from ds_core.interfaces.ops import Offer, OpProvider

if TYPE_CHECKING:
    from collections.abc import Callable


def _provider(level: int, answers: dict[str, Offer]) -> type[OpProvider]:
    class Provider(OpProvider):
        priority = level

        def ops(self) -> frozenset[str]:
            return frozenset(answers)

        def offer(self, op: str, device: torch.device) -> Offer:
            assert isinstance(device, torch.device)
            return answers[op]

        def implementation(self, op: str) -> Callable[..., Any]:
            return lambda: (level, op)

    return Provider


YES, NO = Offer(True, "here"), Offer(False, "needs a GPU")


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[OpProvider]]:
    """The installed providers; a test puts its own in."""
    installed: dict[str, type[OpProvider]] = {}
    monkeypatch.setattr(registry, "names", lambda seam: tuple(sorted(installed)))
    monkeypatch.setattr(registry, "load", lambda seam, name: installed[name])
    return installed


def test_torch_is_built_in() -> None:
    choice = ops.best("sum_of_squares", "cpu")
    assert choice.provider == "torch"
    assert choice.implementation([torch.full((2,), 3.0)]).item() == 18.0
    assert str(choice).startswith("sum_of_squares on cpu: torch (plain torch")


def test_the_usable_one_of_highest_priority(providers: dict[str, type[OpProvider]]) -> None:
    providers.update(torch=_provider(0, {"op": YES}), fast=_provider(10, {"op": YES}), gpu=_provider(20, {"op": NO}))
    choice = ops.best("op", torch.device("cpu"))
    assert (choice.op, choice.device, choice.provider, choice.why) == ("op", "cpu", "fast", "here")
    assert choice.implementation() == (10, "op")
    assert choice.rejected == (("gpu", "needs a GPU"), ("torch", "priority 0 against fast's 10"))
    assert str(choice).splitlines() == [
        "op on cpu: fast (here)",
        "  not gpu: needs a GPU",
        "  not torch: priority 0 against fast's 10",
    ]


def test_equals_are_taken_by_name(providers: dict[str, type[OpProvider]]) -> None:
    providers.update(b=_provider(1, {"op": YES}), a=_provider(1, {"op": YES}))
    assert ops.best("op", "cpu").provider == "a"


def test_a_provider_without_the_op_is_no_candidate(providers: dict[str, type[OpProvider]]) -> None:
    providers.update(a=_provider(9, {"other": YES}), b=_provider(1, {"op": YES}))
    assert ops.best("op", "cpu").rejected == ()


def test_none_can_run_it(providers: dict[str, type[OpProvider]]) -> None:
    providers.update(a=_provider(9, {"op": NO}), b=_provider(1, {"op": Offer(False, "needs triton")}))
    with pytest.raises(PluginError, match="no provider can run 'op' on cpu: a: needs a GPU; b: needs triton"):
        ops.best("op", "cpu")


def test_an_unknown_op_names_the_nearest() -> None:
    with pytest.raises(PluginError, match=r"(?s)'sum_of_square'.*scale_.*did you mean 'sum_of_squares'"):
        ops.best("sum_of_square", "cpu")


def test_the_report_lists_every_op(providers: dict[str, type[OpProvider]]) -> None:
    providers.update(a=_provider(1, {"one": YES, "two": NO}), b=_provider(2, {"one": YES}))
    found = ops.report("cpu")
    assert list(found) == ["one", "two"]
    assert isinstance(found["one"], ops.Choice)
    assert found["one"].provider == "b"
    assert isinstance(found["two"], PluginError)
    assert "needs a GPU" in str(found["two"])


def test_the_import_loads_no_torch() -> None:
    code = "import sys, ds_core.ops; assert not [name for name in sys.modules if name.split('.')[0] == 'torch']"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
