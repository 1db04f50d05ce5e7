"""The forward that stands in for a block's own: caches, copies to the host, statistics; any tree, any decisions."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import itertools
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ds_activation import forwards as forwards_module
from ds_activation.blocks import find_blocks
from ds_activation.choice import Decision
from ds_activation.forwards import attach_forwards
from ds_activation.profile import profile
from ds_core.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, x: torch.Tensor, cache: Any = None, *, use_cache: bool = True) -> torch.Tensor:
        self.seen = (cache, use_cache)
        wide = torch.tanh(self.norm(self.one(x)))
        return x * self.two(F.dropout(wide * self.scale * wide, 0.3))


class Host:
    """Copies that are counted, the originals let go of."""

    def __init__(self) -> None:
        self.sent: list[torch.Tensor] = []

    def __call__(self, device: torch.device, keep_last: int) -> Host:
        assert keep_last == 0, "what stays is not in the budget"
        return self

    def to_host(self, tensor: torch.Tensor) -> Any:
        self.sent.append(tensor.detach().clone())
        sent = self.sent[-1]

        class Handle:
            def restore(self) -> torch.Tensor:
                return sent.clone()

        return Handle()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(forwards_module, "host_copies", host)
    return host


def pair(decision: Decision) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = Block()
    other = copy.deepcopy(plain)
    attach_forwards([("", other)], [decision])
    return plain, other


def gradients(block: nn.Module, times: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(5, 6, requires_grad=True)
    y = block(x * 1)
    for left in reversed(range(times)):
        y.square().sum().backward(retain_graph=left > 0)
    return [y.detach(), x.grad, *(param.grad for param in block.parameters()), *block.buffers()]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("decision", [Decision.KEEP, Decision.RECOMPUTE, Decision.OFFLOAD])
def test_gradients_and_running_statistics_are_the_same(decision: Decision, times: int, host: Host) -> None:
    plain, other = pair(decision)
    for left, right in zip(gradients(plain, times), gradients(other, times), strict=True):
        assert torch.equal(left, right)
    assert bool(host.sent) is (decision is Decision.OFFLOAD)


@pytest.mark.parametrize("what", ["input", "weight"])
def test_offload_sees_what_is_changed_before_backward(what: str, host: Host) -> None:
    _, other = pair(Decision.OFFLOAD)
    h = torch.randn(5, 6, requires_grad=True) * 1
    loss = other(h).square().sum()
    changed = h if what == "input" else next(param for param in other.parameters() if param.dim() > 1)
    with torch.no_grad():
        changed.add_(100)
    with pytest.raises(EngineError, match="modified in place"):
        loss.backward()


def test_selective_keeps_running_statistics(host: Host) -> None:
    plain, other = pair(Decision.SELECTIVE)
    for left, right in zip(gradients(plain), gradients(other), strict=True):
        assert torch.equal(left, right)


def test_offload_sends_each_tensor_once_and_neither_weights_nor_inputs(host: Host) -> None:
    _, other = pair(Decision.OFFLOAD)
    x = torch.randn(5, 6, requires_grad=True)
    other(x)
    stay = [x.detach(), *(param.detach() for param in other.parameters()), *other.buffers()]
    for sent in host.sent:
        assert not any(sent.shape == one.shape and torch.equal(sent, one) for one in stay)
    alike = [
        (at, to)
        for at, one in enumerate(host.sent)
        for to, another in enumerate(host.sent[:at])
        if one.shape == another.shape and torch.equal(one, another)
    ]
    assert alike == []  # the result of tanh is saved by three ops


def test_offload_sends_a_tensor_again_after_a_change(host: Host) -> None:
    class Changing(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            middle = x * 2
            first = middle.detach() * x
            middle.detach().add_(1)
            return first, middle.detach() * x

    block = Changing()
    attach_forwards([("", block)], [Decision.OFFLOAD])
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    first, second = block(x)
    (first + second).sum().backward()
    assert len(host.sent) == 2
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([2.0 + 3.0, 6.0 + 7.0]))


class Cache:
    """By its module, one of transformers'."""

    def __bool__(self) -> bool:
        raise AssertionError("caches are looked at by their class alone")


Cache.__module__ = "transformers.cache_utils"


def test_caches_are_left_out_while_gradients_are_on() -> None:
    _, block = pair(Decision.RECOMPUTE)
    cache = Cache()
    block(torch.zeros(2, 6), cache, use_cache=True)
    assert block.seen == (None, False)
    block(torch.zeros(2, 6), cache=cache)
    assert block.seen == (None, True)
    with torch.no_grad():
        block(torch.zeros(2, 6), cache, use_cache=True)
    assert block.seen == (cache, True)


def test_the_signature_is_the_blocks_own() -> None:
    plain, other = pair(Decision.RECOMPUTE)
    assert inspect.signature(other.forward) == inspect.signature(plain.forward)


def test_one_that_is_wrapped_by_another_becomes_plain() -> None:
    plain, other = pair(Decision.RECOMPUTE)
    (first,) = [other.forward]
    other.forward = lambda x: first(x)
    first.detach()
    for left, right in zip(gradients(plain), gradients(other), strict=True):
        assert torch.equal(left, right)
    assert not isinstance(other.forward, forwards_module.CheckpointedForward)


def test_a_copy_of_a_copy_and_its_decision() -> None:
    _, block = pair(Decision.RECOMPUTE)
    other = copy.deepcopy(copy.deepcopy(block))
    assert other.forward is not block.forward
    assert other.forward.decision is Decision.RECOMPUTE
    other(torch.zeros(2, 6), 5)
    assert other.seen == (5, True)
    assert not hasattr(block, "seen")


class Tree(nn.Module):
    """Layers and branches of them in any order, residuals, layers that come again."""

    def __init__(self, parts: list[Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Tree(part) if isinstance(part, list) else LAYERS[part]() for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        for at, part in enumerate(self.parts):
            y = part(x)
            x = x + self.parts[0](y) if at % 3 == 2 else y
        return x


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 6),
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "norm": lambda: nn.LayerNorm(6),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "dropout": lambda: nn.Dropout(0.4),
}
TREES = st.recursive(
    st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=5),
    lambda inner: st.lists(inner | st.sampled_from(list(LAYERS)), min_size=1, max_size=4),
    max_leaves=12,
)


def test_any_tree_and_any_decisions(host: Host) -> None:
    # Inside, so that one host is there for all examples.
    @hypothesis.settings(max_examples=40, deadline=None)
    @hypothesis.given(
        TREES,
        st.lists(st.sampled_from(["Tree", "parts.0", "parts.*", "*.parts.1", "Linear"])),
        st.lists(st.sampled_from(list(Decision)), min_size=1, max_size=8),
    )
    @hypothesis.example(["dropout", "batch norm"], ["parts.*"], [Decision.OFFLOAD])
    def check(parts: list[Any], patterns: list[str], wanted: list[Decision]) -> None:
        torch.manual_seed(0)
        plain = Tree([*parts, ["linear", "tanh"]])
        model = copy.deepcopy(plain)
        names = [name for name, _ in model.named_modules()]
        kinds = {type(module).__name__ for module in model.modules()}
        patterns = [one for one in patterns if one in kinds or fnmatch.filter(names, one)] or ["parts.*"]
        blocks = find_blocks(model, patterns)
        x = torch.randn(4, 6)
        found = profile(model, (x,), {}, blocks)
        offered = [set(Decision) for _ in blocks]
        for call in found.calls:
            offered[call.block] &= {*call.costs, Decision.OFFLOAD}
        decisions = [
            one if one in some else Decision.RECOMPUTE
            for one, some in zip(itertools.cycle(wanted), offered, strict=False)
        ]
        attach_forwards(blocks, decisions)
        results = []
        for one in (plain, model):
            torch.manual_seed(2)
            one(x).square().sum().backward()
            results.append([*(param.grad for param in one.parameters()), *one.buffers(), torch.rand(2)])
        for left, right in zip(*results, strict=True):
            assert (left is None and right is None) or torch.equal(left, right)

    check()
    assert host.sent
