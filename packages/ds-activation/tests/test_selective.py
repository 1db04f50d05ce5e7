"""Which results selective recomputation keeps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ds_activation.selective import is_kept, selective_contexts

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
