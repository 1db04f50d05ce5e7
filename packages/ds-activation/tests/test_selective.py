"""Which results selective recomputation keeps."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ds_activation.choice import Decision
from ds_activation.forwards import attach_forwards
from ds_activation.selective import explained_contexts, is_kept, selective_contexts
from ds_core.errors import EngineError

ATEN = torch.ops.aten
ATTENTION = ATEN._scaled_dot_product_flash_attention_for_cpu.default


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", ["mm", "addmm", "bmm", "convolution"])
def test_products_are_kept(op: str) -> None:
    assert is_kept(getattr(ATEN, op).default, (), {})


def test_attention_with_dropout_is_not_kept() -> None:
    q = torch.zeros(1, 1, 2, 2)
    assert is_kept(ATTENTION, (q, q, q), {})
    assert is_kept(ATTENTION, (q, q, q, 0.0), {})
    assert not is_kept(ATTENTION, (q, q, q, 0.1), {})
    assert not is_kept(ATTENTION, (q, q, q), {"dropout_p": 0.1})
    assert not is_kept(ATEN._scaled_dot_product_efficient_attention.default, (q, q, q, None, True, 0.1), {})


def test_the_rest_is_not_kept() -> None:
    assert not any(is_kept(op, (), {}) for op in (ATEN.gelu.default, ATEN.native_layer_norm.default, ATEN.add.Tensor))


def test_a_recomputation_leaves_products_and_attention_out() -> None:
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(2, 4, 8)

    def function(x: torch.Tensor) -> torch.Tensor:
        q = F.gelu(x @ weight).unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).exp().sin().exp()

    with Count() as forward:
        out = checkpoint(function, x, use_reentrant=False, context_fn=selective_contexts)
    with Count() as backward:
        out.sum().backward()
    assert forward.ops[ATTENTION] == 1
    assert forward.ops[ATEN.mm.default] + forward.ops[ATEN.bmm.default] == 1
    assert backward.ops[ATTENTION] == 0
    assert backward.ops[ATEN.mm.default] + backward.ops[ATEN.bmm.default] == 1  # the gradient of the weight
    assert backward.ops[ATEN.gelu.default] == 1


def checkpointed(function: Any) -> torch.Tensor:
    return checkpoint(
        function,
        torch.ones(2, 3, requires_grad=True),
        use_reentrant=False,
        context_fn=partial(explained_contexts, "it"),
    )


def test_a_kept_result_that_is_changed_in_place_is_an_error_with_a_way_out() -> None:
    weight = torch.ones(3, 3)
    out = checkpointed(lambda x: F.relu(x @ weight, inplace=True).exp())
    with pytest.raises(EngineError, match='policy to "full"') as caught:
        out.sum().backward()
    assert type(caught.value.__cause__) is RuntimeError


def test_a_second_backward_is_an_error_with_a_way_out() -> None:
    loss = checkpointed(lambda x: (x @ torch.ones(3, 3)).exp()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(EngineError, match="kept of it"):
        loss.backward()


@pytest.mark.parametrize("kind", [RuntimeError, EngineError])
def test_an_error_of_the_second_run_itself_arrives_as_it_is(kind: type[Exception]) -> None:
    runs = []

    def function(x: torch.Tensor) -> torch.Tensor:
        runs.append(x)
        if len(runs) > 1:
            raise kind("its own")
        return (x @ torch.ones(3, 3)).exp()

    out = checkpointed(function)
    with pytest.raises(kind, match=r"^its own"):
        out.sum().backward()


def test_a_compiled_block_computes_no_product_again(compiled_backwards: tuple[Any, list[Counter[str]]]) -> None:
    """As under torch's own: in what is compiled for backward are the cheap operations, and the products' gradients."""
    backend, backwards = compiled_backwards
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(2)))
    x, found = torch.randn(3, 4), []
    attach_forwards(list(model.named_children()), [Decision.SELECTIVE] * 2)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for one in (model, compiled):
        model.zero_grad()
        one(x).square().sum().backward()
        found.append([param.grad for param in model.parameters()])
    torch.compiler.reset()
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)
    (ops,) = backwards
    assert ops["aten.addmm.default"] == 0  # of a linear layer's forward; its gradients are products without a sum
    assert (ops["aten.tanh.default"], ops["aten.tanh_backward.default"]) == (2, 2)
