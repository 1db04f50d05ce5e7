"""What tests of several modules share."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

if TYPE_CHECKING:
    import torch


@pytest.fixture
def compiled_backwards() -> tuple[Any, list[Counter[str]]]:
    """A backend for ``torch.compile``, and the operations of each graph that it was given for a backward."""
    backwards: list[Counter[str]] = []

    def forward_compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    def backward_compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        backwards.append(Counter(str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=forward_compiler, bw_compiler=backward_compiler), backwards
