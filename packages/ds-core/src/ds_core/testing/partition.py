"""Contract of the seam ``partition``; inherit :class:`PartitionContract` in a plugin's tests.

Every check runs on 1 and on 2 ranks. The reference is the same model in plain PyTorch, which sees the batches of all
ranks; gradients are compared by logical name and chunk, so where a partition keeps them does not matter.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from ds_core.config import load_config
from ds_core.interfaces.logical import BUFFER, GRADIENT, MASTER, WEIGHT, Chunk, LogicalTensor, Piece
from ds_core.interfaces.partition import Partition, PartitionInputs
from ds_core.interfaces.precision import PrecisionPlan
from ds_core.testing.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = ["PartitionContract", "PartitionModel"]

# A gradient is a sum of at most a few dozen products, in another order than the reference's; 24 bits, 6 lost.
RTOL = ATOL = 2**-18
LR = 0.125


class PartitionModel(nn.Module):
    """Small, with everything that goes wrong: tied, frozen, zero-size, 0-d and unused parameters, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.tied = nn.Linear(5, 7, bias=False)
        self.tied.weight = self.first.weight
        self.a = nn.Linear(7, 3)
        self.b = nn.Linear(7, 3)
        self.never = nn.Parameter(torch.ones(11))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.full((7,), 2.0), requires_grad=False)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor, branches: str = "ab") -> Tensor:
        hidden = torch.tanh(self.first(x) + self.tied(x)) * self.frozen * self.scalar
        parts = [layer(hidden) for name, layer in (("a", self.a), ("b", self.b)) if name in branches]
        return torch.stack(parts).square().mean() + self.empty.sum()


class PartitionContract:
    """What every partition promises."""

    @pytest.fixture
    def partition_class(self) -> type[Partition]:
        """Override: the class under test, importable by name."""
        raise NotImplementedError

    @pytest.fixture
    def config_data(self) -> Mapping[str, Any]:
        """Override if needed: the configuration that chooses it."""
        return {}

    @pytest.fixture
    def variants(self, config_data: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], bool]]:
        """Override if needed: configurations, each with whether the optimizer needs whole tensors."""
        return [(config_data, False)]

    @pytest.fixture
    def plan(self) -> PrecisionPlan:
        """Override if needed; the comparisons are made for fp32."""
        return PrecisionPlan()

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_on_ranks(
        self,
        partition_class: type[Partition],
        variants: list[tuple[Mapping[str, Any], bool]],
        plan: PrecisionPlan,
        world_size: int,
    ) -> None:
        """All of :data:`CHECKS`, in one spawn; the error names the check that failed."""
        run_ranks(
            [
                partial(check, partition_class, dict(data), plan, whole_tensors)
                for data, whole_tensors in variants
                for check in CHECKS
            ],
            world_size,
        )


class Case:
    """A partition on this rank, and the plain model beside it."""

    def __init__(
        self, cls: type[Partition], data: Mapping[str, Any], plan: PrecisionPlan, whole_tensors: bool = False
    ) -> None:
        import torch.distributed as dist

        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(5)
        self.model = PartitionModel()
        self.reference = copy.deepcopy(self.model)
        self.hooks_before = _count_hooks(self.model)
        trainable = [param for param in self.model.parameters() if param.requires_grad]
        assert dist.group.WORLD is not None
        self.partition = cls(
            PartitionInputs(
                module=self.model,
                param_groups=[
                    {"params": trainable[:3], "lr": LR},
                    {"params": trainable[3:], "lr": LR, "mark": "second"},
                ],
                names={param: name for name, param in self.model.named_parameters()},
                plan=plan,
                group=dist.group.WORLD,
                device=torch.device("cpu"),
                config=load_config({"train_micro_batch_size_per_gpu": 1, **data}, dp_world_size=self.world_size),
                find_sources=True,
                whole_tensors=whole_tensors,
            )
        )

    def loss(self, seed: int, branches: str = "ab") -> Tensor:
        return self._loss(self.model, seed, self.rank, branches) * self.partition.loss_factor

    def backward_in(self, dtype: torch.dtype, seed: int, *, reduce: bool) -> None:
        """One micro-batch with inputs of ``dtype`` here, in fp32 in the reference."""
        x = [torch.randn(4, 5, generator=torch.Generator().manual_seed(9 * seed + r)) for r in range(self.world_size)]
        loss: Tensor = self.model(x[self.rank].to(dtype))
        self.partition.begin_backward(reduce=reduce)
        (loss * self.partition.loss_factor).backward()
        self.partition.end_backward()
        torch.stack([self.reference(each) for each in x]).mean().backward()

    def trained(self) -> list[nn.Parameter]:
        return [param for group in self.partition.inputs.param_groups for param in group["params"]]

    @staticmethod
    def _loss(model: nn.Module, seed: int, rank: int, branches: str) -> Tensor:
        generator = torch.Generator().manual_seed(100 * seed + rank)
        loss: Tensor = model(torch.randn(4, 5, generator=generator), branches)
        return loss

    def backward(self, seed: int, *, reduce: bool, branches: Mapping[int, str] | None = None) -> None:
        """One micro-batch, here and (with the mean over all ranks) in the reference."""
        branches = branches or {}
        loss = self.loss(seed, branches.get(self.rank, "ab"))
        self.partition.begin_backward(reduce=reduce)
        loss.backward()
        self.partition.end_backward()
        losses = [self._loss(self.reference, seed, rank, branches.get(rank, "ab")) for rank in range(self.world_size)]
        total = torch.stack(losses).sum()
        (total if self.partition.inputs.config.gradient_allreduce_op == "sum" else total / self.world_size).backward()

    def tensors(self) -> list[tuple[Tensor, Piece]]:
        tensors = [tensor for group in self.partition.optimizer_groups() for tensor in group["params"]]
        return list(zip(tensors, self.partition.optimizer_pieces(), strict=True))

    def check_gradients(self) -> None:
        """Reduce, and compare gradients and norm with the reference."""
        norm = self.partition.reduce()
        expected = {name: param.grad for name, param in self.reference.named_parameters()}
        for tensor, piece in self.tensors():
            wanted = expected[piece.of.name]
            if wanted is None:
                assert tensor.grad is None, f"{piece.of.name}: no rank used it"
            elif tensor.numel():
                assert tensor.grad is not None, f"{piece.of.name}: has no gradient"
                close(tensor.grad.reshape(-1), part_of(wanted, piece.chunk), piece.of.name)
        total = norm.value.clone()
        assert total.shape == ()
        assert total.dtype in (torch.float32, torch.float64)
        for group in norm.groups:
            torch.distributed.all_reduce(total, group=group)
        squares = [gradient.double().square().sum() for gradient in expected.values() if gradient is not None]
        close(total.double(), torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64), "norm")

    def clear(self) -> None:
        self.partition.clear_gradients()
        self.reference.zero_grad(set_to_none=True)


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(
        actual, expected.to(actual.dtype), rtol=RTOL, atol=ATOL, msg=lambda text: f"{name}: {text}"
    )


def part_of(whole: Tensor, chunk: Chunk) -> Tensor:
    """Return what ``chunk`` holds of ``whole``, flat."""
    box = whole[tuple(slice(s, s + n) for s, n in zip(chunk.box.start, chunk.box.size, strict=True))]
    return box.reshape(-1)[chunk.offset : chunk.offset + chunk.length]


def check_groups(*setup: Any) -> None:
    case = Case(*setup)
    groups = case.partition.optimizer_groups()
    assert [group.get("mark") for group in groups] == [None, "second"]
    assert all(group["lr"] == LR for group in groups)
    for tensor, piece in case.tensors():
        assert type(tensor) in (torch.Tensor, nn.Parameter), "a plain local tensor"
        assert tensor.numel() == piece.chunk.length
        assert tensor.data_ptr() == piece.data.data_ptr()
    assert [piece.of.name for _, piece in case.tensors()] == [case.partition.inputs.names[p] for p in case.trained()]
    if case.partition.inputs.whole_tensors:
        for param, (tensor, piece) in zip(case.trained(), case.tensors(), strict=True):
            assert tensor.shape in (param.shape, (0, *param.shape[1:])), f"{piece.of.name}: whole, or nothing"
    assert isinstance(case.partition.loss_factor, float)
    assert case.world_size > 1 or case.partition.loss_factor == 1.0
    assert all(isinstance(text, str) for item in case.partition.report().items() for text in item)


def check_mean_over_ranks(*setup: Any) -> None:
    case = Case(*setup)
    for seed in range(3):
        case.backward(seed, reduce=True)
        case.check_gradients()
        case.clear()


DIVISIONS: tuple[dict[str, Any], ...] = (
    {"prescale_gradients": True, "gradient_predivide_factor": 3},
    {"gradient_predivide_factor": 3},
    {"gradient_allreduce_op": "sum"},
    {"communication_data_type": "fp32", "gradient_predivide_factor": 0.5},
)


def check_divisions(*setup: Any) -> None:
    """The mean is the mean wherever the division is, also of what is added to a sum; and a sum is not divided."""
    for division in DIVISIONS:
        case = Case(setup[0], {**setup[1], **division}, setup[2])
        for seed, reduce in enumerate((False, True, True, False, True)):
            case.backward(seed, reduce=reduce)
        case.check_gradients()
        case.clear()
        case.backward(5, reduce=True)
        case.check_gradients()
        case.partition.destroy()


def check_window(*setup: Any) -> None:
    case = Case(*setup)
    for seed in range(3):
        case.backward(seed, reduce=seed == 2)
    case.check_gradients()


def check_reduced_twice(*setup: Any) -> None:
    """A second backward with ``reduce`` in one window adds to the gradients of the first."""
    case = Case(*setup)
    for seed, reduce in enumerate((True, True, False, True)):
        case.backward(seed, reduce=reduce)
    case.check_gradients()


def check_reduced_gradient(*setup: Any) -> None:
    """It is there from the end of a window until it is cleared, and what is written to it is what the step gets."""
    case = Case(*setup)
    read = case.partition.reduced_gradient

    def are_none() -> bool:
        return all(read(param) is None for param in case.trained())

    assert are_none()
    case.backward(0, reduce=False, branches={0: "a", 1: "a"})
    assert are_none(), "inside a window"
    case.backward(1, reduce=True, branches={0: "a", 1: "a"})
    expected = {name: param.grad for name, param in case.reference.named_parameters()}
    for param, (tensor, piece) in zip(case.trained(), case.tensors(), strict=True):
        found, wanted = read(param), expected[piece.of.name]
        if wanted is None:
            assert found is None, f"{piece.of.name}: no rank used it"
        else:
            assert found is not None
            assert found.numel() == tensor.numel()
            close(found.reshape(-1), part_of(wanted, piece.chunk), piece.of.name)
            found.fill_(2.0)
    case.partition.reduce()
    for tensor, piece in case.tensors():
        if tensor.numel() and expected[piece.of.name] is not None:
            assert tensor.grad is not None
            assert torch.equal(tensor.grad, torch.full_like(tensor, 2.0)), f"{piece.of.name}: was written to"
    case.clear()
    assert are_none(), "cleared"
    case.backward(2, reduce=True)
    case.check_gradients()


def check_unused(*setup: Any) -> None:
    case = Case(*setup)
    uses: list[list[dict[int, str]]] = [
        [{1: "a"}],  # unused on one rank
        [{0: "a", 1: "a"}],  # on all
        [{0: "a", 1: "b"}],
        [{0: "b", 1: "b"}, {0: "a", 1: "a"}],  # in one micro-batch of a window
        [{0: "b", 1: "a"}, {0: "a", 1: "a"}],
        [{}],
    ]
    for window in uses:
        for seed, branches in enumerate(window):
            case.backward(seed, reduce=seed == len(window) - 1, branches=branches)
        case.check_gradients()
        case.clear()


def check_cleared(*setup: Any) -> None:
    case = Case(*setup)
    assert list(case.partition.gradient_pieces()) == []
    case.backward(0, reduce=False)
    case.clear()
    assert list(case.partition.gradient_pieces()) == [], "a window that was given up"
    case.backward(1, reduce=True)
    case.partition.reduce()
    case.clear()
    assert list(case.partition.gradient_pieces()) == [], "a boundary"
    case.backward(2, reduce=True)
    case.check_gradients()


def check_gradient_pieces(*setup: Any) -> None:
    case = Case(*setup)
    case.backward(0, reduce=False, branches={0: "a"})
    case.backward(1, reduce=False, branches={0: "a"})
    kept = []
    for piece in case.partition.gradient_pieces():
        assert (piece.of.kind, piece.of.rank, piece.writer) == (GRADIENT, case.rank, case.rank)
        kept.append(Piece(piece.of, piece.chunk, piece.data.detach().clone(), piece.writer))
    assert kept
    case.partition.clear_gradients()
    case.partition.restore_gradients(kept)
    again = {(piece.of, piece.chunk): piece.data for piece in case.partition.gradient_pieces()}
    assert again.keys() == {(piece.of, piece.chunk) for piece in kept}
    assert all(torch.equal(again[piece.of, piece.chunk], piece.data) for piece in kept)
    case.backward(2, reduce=True)
    case.check_gradients()


def check_step(*setup: Any) -> None:
    case = Case(*setup)
    optimizer = torch.optim.SGD(case.partition.optimizer_groups())
    plain = torch.optim.SGD(case.reference.parameters(), lr=LR)
    for step in range(3):
        for seed in (2 * step, 2 * step + 1):
            case.backward(seed, reduce=seed % 2 == 1, branches={1: "a"})
        case.check_gradients()
        optimizer.step()
        case.partition.publish()
        plain.step()
        case.clear()
        mine, theirs = (case._loss(model, 50, case.rank, "ab") for model in (case.model, case.reference))
        close(mine.detach(), theirs.detach(), "loss after the step")


def check_abort(*setup: Any) -> None:
    case = Case(*setup)
    case.backward(0, reduce=False)
    loss = _Broken.apply(case.loss(1))  # type: ignore[no-untyped-call]
    case.partition.begin_backward(reduce=True)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    case.partition.abort_backward()
    case.clear()
    case.backward(2, reduce=True)
    case.check_gradients()


def check_coverage(*setup: Any) -> None:
    """Over the ranks, the chunks they write hold every element of every stored tensor exactly once."""
    case = Case(*setup)
    mine = [(p.of, p.chunk, p.writer) for p in case.partition.pieces()]
    assert all(p.data.numel() == p.chunk.length for p in case.partition.pieces())
    everyone: list[list[tuple[LogicalTensor, Chunk, int]]] = [[] for _ in range(case.world_size)]
    torch.distributed.all_gather_object(everyone, mine)
    expected = {(name, WEIGHT): tuple(param.shape) for name, param in case.reference.named_parameters()}
    expected["count", BUFFER] = (2,)
    counts = {key: torch.zeros(shape, dtype=torch.int64) for key, shape in expected.items()}
    seen = set()
    for rank, rows in enumerate(everyone):
        for of, chunk, writer in rows:
            if of.kind not in (WEIGHT, BUFFER):
                continue
            seen.add((of.name, of.kind))
            assert of.shape == expected[of.name, of.kind]
            if writer == rank:
                _mark(counts[of.name, of.kind], chunk)
    assert seen == set(expected)
    for key, count in counts.items():
        assert torch.equal(count, torch.ones_like(count)), f"{key}: {count}"


def check_loading(*setup: Any) -> None:
    """What is written into ``pieces`` is what the model and the optimizer have after ``after_load``."""
    case = Case(*setup)
    generator = torch.Generator().manual_seed(9)
    new = {name: torch.randn(param.shape, generator=generator) for name, param in case.reference.named_parameters()}
    with torch.no_grad():
        for piece in case.partition.pieces():
            if piece.of.kind != BUFFER:
                piece.data.copy_(part_of(new[piece.of.name], piece.chunk).view_as(piece.data))
        for name, param in case.reference.named_parameters():
            param.copy_(new[name])
    case.partition.after_load()
    close(case._loss(case.model, 1, 0, "ab").detach(), case._loss(case.reference, 1, 0, "ab").detach(), "loss")
    for tensor, piece in case.tensors():
        close(tensor.detach().reshape(-1), part_of(new[piece.of.name], piece.chunk), piece.of.name)
    case.backward(2, reduce=True)
    case.check_gradients()


LOW = PrecisionPlan(stored=torch.bfloat16, reduce=torch.bfloat16, master=torch.float32)


LOW_PLANS = (
    LOW,
    PrecisionPlan(stored=torch.bfloat16, accumulate=torch.float32, reduce=torch.bfloat16, master=torch.float32),
    PrecisionPlan(stored=torch.bfloat16, accumulate=torch.bfloat16, reduce=torch.float32, master=torch.float32),
    PrecisionPlan(stored=torch.float16, accumulate=torch.float32, reduce=torch.float32, master=torch.float32),
)


def check_low_precision(*setup: Any) -> None:
    """Gradients are kept, sent and used in the dtypes of the plan, over windows that are reduced once or twice."""
    for plan in LOW_PLANS:
        case = Case(setup[0], setup[1], plan, *setup[3:])
        assert plan.stored is not None
        for window in ((True,), (False, True), (True, False, True)):
            for seed, reduce in enumerate(window):
                case.backward_in(plan.stored, seed, reduce=reduce)
            for param in case.trained():
                found = case.partition.reduced_gradient(param)
                assert found is None or found.dtype == case.partition.inputs.dtypes[param].accumulate
            case.partition.reduce()
            for tensor, piece in case.tensors():
                wanted = dict(case.reference.named_parameters())[piece.of.name].grad
                assert (tensor.grad is None) == (wanted is None) or not tensor.numel(), piece.of.name
                if wanted is not None and tensor.grad is not None:
                    assert tensor.grad.dtype == plan.master
                    off = (tensor.grad.reshape(-1) - part_of(wanted, piece.chunk)).norm()
                    # bf16 rounds to 2**-9; a dozen roundings one after another, the terms of a gradient may cancel.
                    assert off <= 2**-4 * (1e-2 + wanted.norm()), f"{piece.of.name}: off by {off} of {wanted.norm()}"
            case.clear()


def check_masters(*setup: Any) -> None:
    """What is updated has the bits that were given; what is stored is that, cast."""
    case = Case(setup[0], setup[1], LOW, *setup[3:])
    given = dict(case.reference.named_parameters())
    for tensor, piece in case.tensors():
        assert (piece.of.kind, piece.of.dtype, tensor.dtype) == (MASTER, "float32", torch.float32)
        assert torch.equal(tensor.detach().reshape(-1), part_of(given[piece.of.name], piece.chunk)), piece.of.name
    check_stored(case, given)
    optimizer = torch.optim.SGD(case.partition.optimizer_groups())
    case.backward_in(torch.bfloat16, 0, reduce=True)
    case.partition.reduce()
    before = dict(_gathered(case))
    used = [tensor for tensor, _ in case.tensors() if tensor.grad is not None]
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in used)
    optimizer.step()
    case.partition.publish()
    case.partition.clear_gradients()
    after = dict(_gathered(case))
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    check_stored(case, after)


def check_stored(case: Case, masters: Mapping[str, Tensor]) -> None:
    """The partition's weights are these masters, cast."""
    for piece in case.partition.pieces():
        if piece.of.kind == WEIGHT and piece.of.name in masters:
            expected = part_of(masters[piece.of.name].detach(), piece.chunk).to(piece.data.dtype)
            assert piece.data.dtype == torch.bfloat16
            assert torch.equal(piece.data.detach().reshape(-1), expected), piece.of.name


def _gathered(case: Case) -> list[tuple[str, Tensor]]:
    """Return every master as a whole, from what the ranks hold."""
    everyone: list[Any] = [None] * case.world_size
    mine = [(piece.of, piece.chunk, tensor.detach().clone()) for tensor, piece in case.tensors()]
    torch.distributed.all_gather_object(everyone, mine)
    whole: dict[str, Tensor] = {}
    for rows in everyone:
        for of, chunk, data in rows:
            full = whole.setdefault(of.name, torch.empty(of.shape))
            box = full[tuple(slice(s, s + n) for s, n in zip(chunk.box.start, chunk.box.size, strict=True))]
            flat = box.reshape(-1).clone()
            flat[chunk.offset : chunk.offset + chunk.length] = data.reshape(-1)
            box.copy_(flat.view(chunk.box.size))
    return list(whole.items())


def check_masters_from_outside(*setup: Any) -> None:
    """Masters that were loaded reach the weights; weights that were written to reach the masters."""
    case = Case(setup[0], setup[1], LOW, *setup[3:])
    generator = torch.Generator().manual_seed(3)
    new = {name: torch.randn(param.shape, generator=generator) for name, param in case.reference.named_parameters()}
    trained = {piece.of.name for _, piece in case.tensors()}
    with torch.no_grad():
        for piece in case.partition.pieces():
            if piece.of.kind == MASTER:
                piece.data.copy_(part_of(new[piece.of.name], piece.chunk).view_as(piece.data))
    case.partition.after_load()
    check_stored(case, {name: value for name, value in new.items() if name in trained})
    with torch.no_grad():
        for piece in case.partition.pieces():
            if piece.of.kind == WEIGHT:
                piece.data.fill_(0.75)
    case.partition.refresh_masters()
    assert all(torch.equal(tensor, torch.full_like(tensor, 0.75)) for tensor, _ in case.tensors())


def check_overflow_source(*setup: Any) -> None:
    """The first parameter from the loss on, and the rank whose gradient it was."""
    for bad in (math.inf, math.nan):
        case = Case(*setup)
        last = case.world_size - 1
        if case.rank == last:
            for param in (case.model.a.weight, case.model.first.weight):
                param.register_hook(partial(torch.mul, bad))
        case.partition.begin_backward(reduce=True)
        case.loss(0).backward()
        case.partition.end_backward()
        assert not math.isfinite(case.partition.reduce().value.item()) or case.world_size > 1
        source = case.partition.find_overflow()
        assert source.parameter == "a.weight"
        assert source.ranks in (None, (last,))
        case.partition.clear_gradients()


def check_two_partitions(*setup: Any) -> None:
    """Two engines in one process do not touch each other."""
    one, two = Case(*setup), Case(*setup)
    one.backward(0, reduce=False)
    two.backward(7, reduce=True, branches={0: "a"})
    one.backward(1, reduce=True)
    two.check_gradients()
    two.partition.destroy()
    one.check_gradients()


def check_destroy(*setup: Any) -> None:
    case = Case(*setup)
    case.backward(0, reduce=True)
    case.partition.reduce()
    case.partition.destroy()
    assert _count_hooks(case.model) == case.hooks_before
    case.partition.destroy()


CHECKS: tuple[Callable[..., None], ...] = (
    check_groups,
    check_mean_over_ranks,
    check_divisions,
    check_window,
    check_reduced_twice,
    check_reduced_gradient,
    check_unused,
    check_cleared,
    check_gradient_pieces,
    check_step,
    check_abort,
    check_coverage,
    check_loading,
    check_low_precision,
    check_masters,
    check_masters_from_outside,
    check_overflow_source,
    check_two_partitions,
    check_destroy,
)


class _Broken(torch.autograd.Function):
    """Fails in backward, after nothing but the loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ZeroDivisionError("in backward")


def _mark(count: Tensor, chunk: Chunk) -> None:
    for span in chunk.spans():
        count[tuple(slice(s, s + n) for s, n in zip(span.box.start, span.box.size, strict=True))] += 1


def _count_hooks(model: nn.Module) -> int:
    of_modules = sum(
        len(hooks)
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and hooks is not None
    )
    of_tensors = sum(
        len(hooks or ())
        for param in model.parameters()
        for hooks in (param._backward_hooks, getattr(param, "_post_accumulate_grad_hooks", None))
    )
    return of_modules + of_tensors
