"""How often a step goes over the gradients, counted as ops on their memory. Nothing is timed.

A step in low precision needs of the gradients: copies in the dtype of the masters, the norm, which also says whether
they overflowed, and the update. That is all it does with them: unscaling and clipping are no pass of their own where
the optimizer takes the factor. With several ranks a precision that skips overflows reads them once more, in backward,
before they are sent: an inf that was summed is everybody's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ds_core
from ds_core import comm
from ds_core.testing.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True, "auto_cast": True}},
    "bf16, unchecked": {"bf16": {"enabled": True, "check_grad_overflow": False, "auto_cast": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 8, "auto_cast": True}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}
WITH_MASTERS = {"bf16", "bf16, unchecked", "fp16"}
SKIPPING = {"bf16", "fp16", "autocast"}
FUSED = {"type": "AdamW", "params": {"lr": 1e-3}}
UNFUSED = {"type": "AdamW", "params": {"lr": 1e-3, "fused": False}}
CLIPPING = 1e-4
"""So little that every step is clipped: the factor is not 1."""

NORM = {"linalg_vector_norm", "cat"}
"""What reads gradients for their sum of squares. ``cat`` copies small ones together, and the copy is read then."""
COPIES = {"_foreach_copy_", "_to_copy", "copy_", "clone"}
"""What makes a tensor that is a gradient too."""
SHAPES = {"empty_like"}
"""What looks at shape and dtype, not at values."""


@dataclass(frozen=True)
class Pass:
    """One op that read or wrote gradients."""

    op: str
    numel: int
    """Elements of gradients among its arguments, each as often as it is given."""
    writes: bool
    """Whether the op may write to one of them."""


class GradientPasses(TorchDispatchMode):
    """Records every op that touches the memory of gradients while it is entered; views touch none.

    Gradients are those given, and what is copied from them.
    """

    def __init__(self, gradients: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.found: list[Pass] = []
        # The storages themselves are kept, so that no other can get the address of one.
        self._storages = {gradient.untyped_storage()._cdata: gradient.untyped_storage() for gradient in gradients}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        read, written = [], []
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            (written if writes else read).extend(leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
        touched = [tensor for tensor in [*read, *written] if self._is_gradient(tensor)]
        writes = any(self._is_gradient(tensor) for tensor in written)
        result = func(*args, **kwargs)
        if touched and name not in SHAPES and not _is_view(func):
            self.found.append(Pass(name, sum(tensor.numel() for tensor in touched), writes))
            if name in COPIES:
                copies = [leaf for leaf in [*written, *tree_leaves(result)] if isinstance(leaf, torch.Tensor)]
                self._storages.update((copy.untyped_storage()._cdata, copy.untyped_storage()) for copy in copies)
        return result

    def _is_gradient(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages


def _is_view(func: Any) -> bool:
    returned = [value.alias_info for value in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


class Model(nn.Module):
    """Two large weights, and two small tensors that the norm reads from one copy of both."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False), nn.Linear(256, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


NUMEL = 2 * 256 * 256 + 3 * 256 + 3


class AminmaxInBackward(TorchDispatchMode):
    """Counts the elements whose least and greatest are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "aminmax":
            self.numel += args[0].numel()
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Counted:
    """What one optimizer step of two micro-batches did with its gradients."""

    in_backward: list[int]
    """Elements that each of the two backwards took the least and greatest of."""
    in_step: list[Pass]
    norm: float
    skipped: int

    def read_by(self, ops: set[str]) -> int:
        return sum(found.numel for found in self.in_step if found.op in ops)

    @property
    def others(self) -> Mapping[str, int]:
        """Elements touched by the op, for all but the norm."""
        counts: Counter[str] = Counter()
        for found in self.in_step:
            if found.op not in NORM:
                counts[found.op] += found.numel
        return counts

    @property
    def writing(self) -> list[tuple[str, int]]:
        return [(found.op, found.numel) for found in self.in_step if found.writes]


def count(precision: str, optimizer: Mapping[str, Any], clipping: float = CLIPPING) -> Counted:
    """Train two steps of two micro-batches and count in the second, when the optimizer's state exists."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": clipping,
        "optimizer": optimizer,
        **PRECISIONS[precision],
    }
    engine = ds_core.initialize(model=Model(), config=config)[0]
    in_backward = []
    for micro in range(4):
        loss = engine(torch.randn(4, 256))
        with AminmaxInBackward() as taken:
            engine.backward(loss)
        in_backward.append(taken.numel)
        # On several ranks these are views of the buckets.
        gradients = [parameter.grad for parameter in engine.module.parameters()]
        with GradientPasses(gradients) as passes:
            engine.step()
        if micro in (0, 2):
            assert passes.found == []
    found = Counted(in_backward[2:], passes.found, engine.get_global_grad_norm(), engine.skipped_steps)
    engine.destroy()
    return found


CASES = [(precision, optimizer) for precision in PRECISIONS for optimizer in (FUSED, UNFUSED)]


@pytest.fixture(scope="module", params=[1, 2])
def world_size(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def counted(world_size) -> dict[tuple[str, bool], Counted]:
    """(precision, whether the optimizer takes the factor) -> what rank 0 counted."""
    results = run_ranks([partial(count, *case) for case in CASES], world_size, timeout_s=60)
    return {
        (precision, optimizer is FUSED): by_rank[0]
        for (precision, optimizer), by_rank in zip(CASES, results, strict=True)
    }


@pytest.fixture
def one_process():
    yield
    comm.destroy_process_group()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_norm_and_overflow_check_read_the_gradients_once(counted, precision, fused):
    found = counted[precision, fused]
    assert found.norm > CLIPPING
    assert found.skipped == 0
    assert found.read_by(NORM) == NUMEL


@pytest.mark.parametrize("precision", PRECISIONS)
def test_unscale_and_clip_add_no_pass_where_the_optimizer_takes_the_factor(counted, precision):
    found = counted[precision, True]
    update = {"_fused_adamw_": NUMEL}
    # A copy in the masters' dtype touches the source, and each of its elements is one of a gradient from then on.
    assert found.others == ({"_foreach_copy_": NUMEL, **update} if precision in WITH_MASTERS else update)
    # torch's kernel may store the gradients it has multiplied, in the one pass that it makes anyway.
    assert found.writing == [("_fused_adamw_", NUMEL)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_unscale_and_clip_are_one_multiplication_where_it_does_not(counted, precision):
    assert counted[precision, False].writing == [("_foreach_mul_", NUMEL)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_a_factor_of_one_multiplies_nothing(precision, one_process):
    assert count(precision, UNFUSED, clipping=0.0).writing == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_which_rank_overflowed_costs_one_read_before_the_gradients_are_sent(counted, world_size, precision):
    """Only of several ranks, and only where steps are skipped: in the last backward of the window."""
    watched = world_size > 1 and precision in SKIPPING
    assert counted[precision, True].in_backward == [0, NUMEL if watched else 0]


def test_the_counter_sees_a_pass_that_is_one_too_many():
    gradient = torch.ones(4, 1024, dtype=torch.bfloat16)
    with GradientPasses([gradient]) as passes:
        wide = gradient[:2].float()
        wide.mul_(2.0)
        gradient.view(-1).isfinite()
        torch.ones(3).mul_(2.0)
    assert passes.found[0] == Pass("_to_copy", 2048, writes=False)
    assert passes.found[1] == Pass("mul_", 2048, writes=True)
    # isfinite is made of several ops, each of which reads.
    assert {found.op for found in passes.found[2:]} >= {"abs"}
    assert not any(found.writes for found in passes.found[2:])
