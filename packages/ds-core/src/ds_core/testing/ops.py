"""Contract of the seam ``ops``; inherit :class:`OpsContract` in a plugin's tests."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core import registry
from ds_core.interfaces.ops import Offer, OpProvider

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["OpsContract", "core_cases"]

LENGTHS = (0, 1, 63, 4096, 4097)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def core_cases() -> dict[str, list[tuple[Any, ...]]]:
    """Return argument tuples for every op of the core's torch reference: odd lengths, all dtypes, odd strides."""
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(n, generator=generator).to(dtype) for n in LENGTHS] for dtype in DTYPES]
    lists += [[torch.randn(5, 7, generator=generator).t()[1:], torch.randn((), generator=generator)], []]
    return {
        "sum_of_squares": [(tensors,) for tensors in lists],
        "scale_": [(tensors, factor) for tensors in lists for factor in (1.0, 0.25, 0.0)],
    }


class OpsContract:
    """What every provider of ops promises."""

    @pytest.fixture
    def provider_class(self) -> type[OpProvider]:
        """Override: the class under test."""
        raise NotImplementedError

    @pytest.fixture
    def cases(self) -> Mapping[str, Sequence[tuple[Any, ...]]]:
        """Override for ops the core does not have: op -> argument tuples, on a device where it is usable."""
        return core_cases()

    @pytest.fixture
    def references(self) -> Mapping[str, Any]:
        """Override for ops the core does not have: op -> plain torch."""
        torch_ops: OpProvider = registry.load("ops", "torch")()
        return {op: torch_ops.implementation(op) for op in torch_ops.ops()}

    @pytest.fixture
    def rtol(self) -> Mapping[torch.dtype, float]:
        """Override with the bound the provider states; equal by default."""
        return dict.fromkeys(DTYPES, 0.0)

    @pytest.fixture
    def provider(self, provider_class: type[OpProvider]) -> OpProvider:
        return provider_class()

    def test_ops_are_named(self, provider: OpProvider) -> None:
        ops = provider.ops()
        assert isinstance(ops, frozenset)
        assert ops
        assert all(isinstance(op, str) for op in ops)
        assert provider.ops() == ops
        assert isinstance(provider.priority, int)

    def test_naming_them_touches_no_device_and_no_compiler(self, provider_class: type[OpProvider]) -> None:
        module, name = provider_class.__module__, provider_class.__qualname__
        code = (
            "import importlib, sys, torch\n"
            f"importlib.import_module({module!r}).{name}().ops()\n"
            "assert not torch.cuda.is_initialized()\n"
            "assert 'triton.compiler.compiler' not in sys.modules, 'a kernel compiler was loaded'\n"
        )
        paths = f"import sys; sys.path[:] = {sys.path!r}\n"
        done = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:7", "meta", "mps", "xpu"])
    def test_an_offer_never_raises(self, provider: OpProvider, device: str) -> None:
        for op in provider.ops():
            offer = provider.offer(op, torch.device(device))
            assert isinstance(offer, Offer)
            assert isinstance(offer.usable, bool)
            assert offer.why.strip(), "the reason is for people"

    def test_the_usable_equal_the_reference(
        self,
        provider: OpProvider,
        cases: Mapping[str, Sequence[tuple[Any, ...]]],
        references: Mapping[str, Any],
        rtol: Mapping[torch.dtype, float],
    ) -> None:
        for op in sorted(provider.ops()):
            assert op in cases, f"no cases for {op}: override the fixture"
            for arguments in cases[op]:
                if not provider.offer(op, _device_of(arguments)).usable:
                    continue
                mine, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
                result, expected = provider.implementation(op)(*mine), references[op](*theirs)
                # The arguments too: an op may write to them, and then must write the same.
                _same((result, mine), (expected, theirs), rtol, op)


def _device_of(value: Any) -> torch.device:
    if isinstance(value, torch.Tensor):
        return value.device
    devices = [_device_of(item) for item in value] if isinstance(value, list | tuple) else []
    return devices[0] if devices else torch.device("cpu")


def _same(actual: Any, expected: Any, rtol: Mapping[torch.dtype, float], op: str) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor), op
        bound = rtol.get(expected.dtype, 0.0)
        torch.testing.assert_close(actual, expected, rtol=bound, atol=bound, msg=lambda text: f"{op}: {text}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), op
        for a, b in zip(actual, expected, strict=True):
            _same(a, b, rtol, op)
    else:
        assert actual == expected, op
