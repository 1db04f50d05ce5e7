"""ds_core.checkpointing: recomputation here, the rest from ds-activation."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from ds_core import checkpointing, registry
from ds_core.errors import MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Pair(NamedTuple):
    """One that must stay what it is."""

    first: Any
    second: Any = 1


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """ds-activation is not installed."""
    monkeypatch.setitem(sys.modules, "ds_activation", None)
    monkeypatch.setattr(registry, "names", lambda seam: ("torch",))
    checkpointing._built.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """ds-activation is installed."""

    class Theirs:
        def checkpoint(self, function: Any, *args: Any, **kwargs: Any) -> Any:
            return "theirs", function(*args, **kwargs)

    module = types.ModuleType("ds_activation")
    monkeypatch.setitem(sys.modules, "ds_activation", module)
    monkeypatch.setattr(registry, "names", lambda seam: ("deepspeed", "torch"))
    monkeypatch.setattr(registry, "load", _loader(Theirs))
    checkpointing._built.cache_clear()
    yield module
    checkpointing._built.cache_clear()


def _loader(cls: type) -> Any:
    def load(seam: str, name: str) -> type:
        assert (seam, name) == ("activation", "deepspeed")
        return cls

    return load


@pytest.mark.usefixtures("without")
def test_torch_recomputes_without_the_package() -> None:
    calls = []

    def function(x: torch.Tensor, factor: float) -> torch.Tensor:
        calls.append(factor)
        return (x * factor).exp()

    x = torch.zeros(2, requires_grad=True)
    checkpointing.checkpoint(function, x, factor=3.0).sum().backward()
    assert calls == [3.0, 3.0]
    assert torch.equal(x.grad, torch.full((2,), 3.0))


@pytest.mark.usefixtures("installed")
def test_the_package_recomputes_where_it_is_installed() -> None:
    assert checkpointing.checkpoint(max, 1, 2) == ("theirs", 2)


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (lambda x: [x, "text", None], lambda x: (x, "text", None)),
        (lambda x: (x,), lambda x: x),
        (lambda x: {"a": x}, lambda x: {"a": x}),
        (Pair, Pair),
        (lambda x: None, lambda x: None),
        (lambda x: (), lambda x: ()),
    ],
)
def test_outputs_have_the_shape_that_deepspeed_gives_them(output: Any, expected: Any) -> None:
    x = torch.ones((), requires_grad=True)
    found = checkpointing.checkpoint(output, x)
    assert type(found) is type(expected(x))
    assert found == expected(x)


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    "name",
    [
        "configure",
        "is_configured",
        "reset",
        "CheckpointFunction",
        "get_cuda_rng_tracker",
        "model_parallel_cuda_manual_seed",
        "non_reentrant_checkpoint",
        "partition_activations",
    ],
)
def test_a_name_of_the_missing_package(name: str) -> None:
    with pytest.raises(MissingPackageError, match=rf"{name} needs ds-activation: pip install ds-activation"):
        getattr(checkpointing, name)
    assert not hasattr(checkpointing, name)


def test_a_name_of_the_installed_package(installed: types.ModuleType) -> None:
    installed.configure = lambda: "configured"
    assert checkpointing.configure() == "configured"
    with pytest.raises(AttributeError, match="reset"):
        checkpointing.reset  # noqa: B018


def test_a_package_that_misses_something_itself(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds_activation.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ds_activation", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        checkpointing.configure  # noqa: B018


def test_every_name_of_the_installed_package_is_there(installed: types.ModuleType) -> None:
    installed.PARTITION_ACTIVATIONS = True
    assert checkpointing.PARTITION_ACTIVATIONS


def test_an_argument_may_be_called_like_ours() -> None:
    x = torch.ones(2, requires_grad=True)
    checkpointing.checkpoint(lambda x, function: x * function, x, function=3).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 3.0))


def test_it_is_compiled_without_a_break() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return checkpointing.checkpoint(lambda y: y.sin().exp(), x).sum()

    x, twin = (torch.linspace(0, 1, 8).requires_grad_() for _ in range(2))
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).backward()
    model(twin).backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.compiler.reset()


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'checkpiont'") as caught:
        checkpointing.checkpiont  # noqa: B018
    assert not isinstance(caught.value, MissingPackageError)
