"""The bucketer: what is started when, and that gradients are right whatever autograd does.

Most of it runs in one process: the collective is an argument, and a stand-in can play the other rank.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_core import comm
from ds_core.errors import CommError, EngineError, NotBuiltError
from ds_core.interfaces.precision import PrecisionPlan
from ds_core.partition.buckets import Bucketer
from ds_core.testing.ranks import run_ranks


@pytest.fixture(autouse=True)
def forget_collectives_given_up_on():
    yield
    comm.destroy_process_group()


class Work:
    """A collective that is finished when it is waited for."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def wait(self) -> None:
        if self.fails:
            raise RuntimeError("connection closed by peer\nand much more")


@dataclass
class Wire:
    """Plays torch.distributed and the other rank, which has given ``theirs``."""

    theirs: dict[nn.Parameter, torch.Tensor | None] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    fails: str = ""

    def start(self, bucket) -> Work:
        self.events.append(f"start {bucket.index}")
        if self.fails == "start":
            raise RuntimeError("connection closed by peer\nand much more")
        for place, param in enumerate(bucket.params):
            other = self.theirs.get(param)
            if other is not None:
                bucket.slots[place].add_(other)
                bucket.flags[place] += 1
        return Work(self.fails == "wait")


def bucketer(
    module: nn.Module,
    wire: Wire,
    bucket_bytes: int = 10**6,
    world_size: int = 2,
    plan: PrecisionPlan = PrecisionPlan(),  # noqa: B008  frozen
    find_sources: bool = False,
) -> Bucketer:
    names = {param: name for name, param in module.named_parameters()}
    return Bucketer(
        list(names),
        names,
        plan.dtypes_of(module),
        bucket_bytes=bucket_bytes,
        rank=0,
        world_size=world_size,
        after=1.0,
        find_sources=find_sources,
        start=wire.start,
    )


def backward(gradients: Bucketer, loss: torch.Tensor, *, reduce: bool = True) -> None:
    gradients.begin(reduce=reduce)
    loss.backward()
    gradients.end()


def names_by_bucket(gradients: Bucketer) -> list[list[str]]:
    return [[gradients._names[param] for param in bucket.params] for bucket in gradients.buckets]


def three_layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))


# -- which parameters share a bucket ----------------------------------------------------------------------------------


def test_buckets_go_from_the_last_parameter_to_the_first():
    wire = Wire()
    assert names_by_bucket(bucketer(three_layers(), wire)) == [
        ["2.bias", "2.weight", "1.bias", "1.weight", "0.bias", "0.weight"]
    ]
    # 36 bytes a weight, 12 a bias; the first is closed at a 25th.
    assert names_by_bucket(bucketer(three_layers(), wire, 40)) == [
        ["2.bias"],
        ["2.weight", "1.bias"],
        ["1.weight", "0.bias"],
        ["0.weight"],
    ]


def test_every_dtype_has_buckets_of_its_own():
    module = nn.ParameterList(
        [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64) * 2]
    )
    gradients = bucketer(module, Wire())
    # One cut for the first of each kind (12, 16 or 4 bytes are below a 25th of this size), the rest open to the end.
    assert sorted(names_by_bucket(gradients)) == [["3", "0"], ["4", "1"], ["5", "2"]]
    for bucket in gradients.buckets:
        assert {param.dtype for param in bucket.params} == {bucket.storage.dtype}
        assert bucket.storage.shape == (4 + 2,)
    loss = torch.stack([param.double().square().sum() + param.double().sum() for param in module]).sum()
    backward(gradients, loss)
    for param in module:
        assert param.grad.dtype == param.dtype
        assert param.grad.tolist() == [1.0, 1.0]


def test_a_bucket_for_each_parameter():
    module, wire = three_layers(), Wire()
    gradients = bucketer(module, wire, bucket_bytes=1)
    assert [len(bucket.params) for bucket in gradients.buckets] == [1] * 6
    expected = torch.autograd.grad(module(torch.ones(2, 3)).sum(), list(module.parameters()))
    backward(gradients, module(torch.ones(2, 3)).sum())
    for param, gradient in zip(module.parameters(), expected, strict=True):
        assert torch.equal(param.grad, gradient)
    assert wire.events == [f"start {index}" for index in range(6)]


def test_zero_size_and_0d_parameters_have_a_place():
    module = nn.ParameterList(
        [nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(0, 4)), nn.Parameter(torch.ones(3))]
    )
    gradients = bucketer(module, Wire())
    backward(gradients, torch.cat([param.reshape(-1) * 2 for param in module]).sum())
    assert [param.grad.tolist() for param in module] == [2.0, [], [2.0, 2.0, 2.0]]


# -- what is started when ---------------------------------------------------------------------------------------------


def note_gradients(module: nn.Module, events: list[str]) -> None:
    """Note when autograd has computed the gradient of each weight."""
    for name, param in module.named_parameters():
        if name.endswith("weight"):
            param.register_hook(lambda _, name=name: events.append(f"gradient {name}"))


def test_collectives_start_while_autograd_goes_on():
    module, wire = three_layers(), Wire()
    gradients = bucketer(module, wire, bucket_bytes=48)
    note_gradients(module, wire.events)
    assert names_by_bucket(gradients) == [["2.bias"], ["2.weight", "1.bias"], ["1.weight", "0.bias"], ["0.weight"]]
    gradients.begin(reduce=True)
    module(torch.ones(2, 3)).sum().backward()
    wire.events.append("autograd returned")
    gradients.end()
    at = wire.events.index
    assert at("start 0") < at("gradient 1.weight"), wire.events
    assert at("start 1") < at("gradient 0.weight"), wire.events
    assert at("start 2") < at("autograd returned"), wire.events
    assert at("start 3") < at("autograd returned"), wire.events


def test_nothing_is_started_inside_a_window():
    module, wire = three_layers(), Wire()
    gradients = bucketer(module, wire, bucket_bytes=1)
    for _ in range(2):
        backward(gradients, module(torch.ones(2, 3)).sum(), reduce=False)
    assert wire.events == []
    backward(gradients, module(torch.ones(2, 3)).sum())
    assert len(wire.events) == 6
    assert module[2].bias.grad.tolist() == [6.0] * 3


def test_a_bucket_waits_for_those_before_it():
    module, wire = three_layers(), Wire()
    gradients = bucketer(module, wire, bucket_bytes=1)
    gradients.begin(reduce=True)
    module[0](torch.ones(2, 3)).sum().backward()  # the buckets of the last layers stay empty
    assert wire.events == []
    gradients.end()
    assert wire.events == [f"start {index}" for index in range(6)]


def test_a_window_is_sent_by_wait_where_no_backward_did():
    module, wire = three_layers(), Wire()
    gradients = bucketer(module, wire)
    backward(gradients, module(torch.ones(2, 3)).sum(), reduce=False)
    gradients.wait()
    assert wire.events == ["start 0"]
    gradients.wait()
    assert wire.events == ["start 0"], "once"


# -- unused parameters ------------------------------------------------------------------------------------------------


def test_a_parameter_that_only_the_other_rank_used_gets_its_gradient():
    module = three_layers()
    wire = Wire(theirs={module[2].weight: torch.full((3, 3), 5.0), module[0].bias: torch.ones(3)})
    gradients = bucketer(module, wire)
    # What an earlier window left in the slots must not show through.
    backward(gradients, module(torch.ones(2, 3)).sum())
    gradients.clear()
    backward(gradients, module[:2](torch.ones(2, 3)).sum())
    assert module[2].weight.grad.tolist() == [[5.0] * 3] * 3
    assert module[2].bias.grad is None, "nobody used it"
    own = torch.autograd.grad(module[:2](torch.ones(2, 3)).sum(), module[0].bias)[0]
    assert torch.equal(module[0].bias.grad, own + 1)
    # Norm and clipping see the flat tensor: a slot that nobody filled is zero there.
    total = torch.cat(gradients.flats()).double().square().sum()
    parts = [param.grad.double().square().sum() for param in module.parameters() if param.grad is not None]
    torch.testing.assert_close(total, torch.stack(parts).sum())


def test_a_gradient_the_caller_took_away_counts_as_none():
    module, wire = three_layers(), Wire()
    gradients = bucketer(module, wire)
    backward(gradients, module(torch.ones(2, 3)).sum(), reduce=False)
    module[1].weight.grad = None
    gradients.wait()
    assert module[1].weight.grad is None
    gradients.clear()
    backward(gradients, module(torch.ones(2, 3)).sum(), reduce=False)
    module.zero_grad()
    backward(gradients, module(torch.ones(2, 3)).sum())
    assert module[2].bias.grad.tolist() == [2.0] * 3


# -- several gradients for one parameter in one backward --------------------------------------------------------------


class Shared(nn.Module):
    """``shared`` is used by two segments that are recomputed apart, each of which delivers a gradient for it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(3, 3)
        self.shared = nn.Linear(3, 3, bias=False)

    def forward(self, x: torch.Tensor, reentrant: bool | None) -> torch.Tensor:
        hidden = self.first(x)
        for _ in range(2):
            if reentrant is None:
                hidden = torch.tanh(self.shared(hidden))
            else:
                hidden = checkpoint(lambda h: torch.tanh(self.shared(h)), hidden, use_reentrant=reentrant)
        return hidden.sum()


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_deliveries_to_an_open_bucket_add_up(reentrant):
    module, wire = Shared(), Wire()
    gradients = bucketer(module, wire)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(module(x, None), list(module.parameters()))
    for _ in range(2):
        backward(gradients, module(x, reentrant), reduce=False)
        backward(gradients, module(x, reentrant))
        for param, gradient in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(param.grad, 2 * gradient)
        gradients.clear()
    assert wire.events == ["start 0"] * 2


def test_a_second_delivery_after_the_bucket_was_sent_is_an_error_that_names_the_parameter():
    module, wire = Shared(), Wire()
    gradients = bucketer(module, wire, bucket_bytes=1)
    x = torch.ones(4, 3)
    backward(gradients, module(x, True), reduce=False)  # nothing is sent inside a window
    gradients.begin(reduce=True)
    with pytest.raises(EngineError, match="a second gradient in one backward") as caught:
        module(x, True).backward()
    assert caught.value.where == "parameter 'shared.weight'"
    assert "use_reentrant=False" in caught.value.fix
    gradients.abort()
    with pytest.raises(EngineError, match="no longer in step"):
        gradients.clear()


# -- when something goes wrong ----------------------------------------------------------------------------------------


def test_a_gradient_outside_a_backward_of_the_engine_is_refused():
    module = three_layers()
    gradients = bucketer(module, Wire())
    with pytest.raises(EngineError, match=r"call engine\.backward"):
        module(torch.ones(2, 3)).sum().backward()
    gradients.clear()
    backward(gradients, module(torch.ones(2, 3)).sum())
    with pytest.raises(EngineError, match="outside this engine's backward"):
        module(torch.ones(2, 3)).sum().backward()


def test_after_an_abort_with_collectives_under_way_the_window_stays_refused():
    module, wire = three_layers(), Wire()
    gradients = bucketer(module, wire, bucket_bytes=48)
    gradients.begin(reduce=True)
    module(torch.ones(2, 3)).sum().backward()  # collectives are under way, and never awaited
    gradients.abort()
    with pytest.raises(EngineError, match="the backward before this one raised"):
        gradients.begin(reduce=False)
    with pytest.raises(EngineError, match="the ranks are no longer in step"):
        gradients.clear()


def test_after_an_abort_before_any_collective_the_window_is_refused_until_cleared():
    module, wire = three_layers(), Wire()
    gradients = bucketer(module, wire, bucket_bytes=48)
    gradients.begin(reduce=False)
    module(torch.ones(2, 3)).sum().backward()
    gradients.abort()
    with pytest.raises(EngineError, match="the backward before this one raised"):
        gradients.begin(reduce=True)
    gradients.clear()
    assert all(param.grad is None for param in module.parameters())
    backward(gradients, module(torch.ones(2, 3)).sum())
    expected = torch.autograd.grad(module(torch.ones(2, 3)).sum(), list(module.parameters()))
    for param, gradient in zip(module.parameters(), expected, strict=True):
        assert torch.equal(param.grad, gradient)


@pytest.mark.parametrize("fails", ["start", "wait"])
def test_a_lost_rank_is_an_error_that_names_the_bucket(fails):
    module = three_layers()
    gradients = bucketer(module, Wire(fails=fails), bucket_bytes=48)
    with pytest.raises(CommError) as caught:  # from the hook, or at the end
        backward(gradients, module(torch.ones(2, 3)).sum())
    assert caught.value.what == "the gradients could not be summed over the ranks: connection closed by peer"
    assert caught.value.where == "bucket 0 of 4, parameters '2.bias' to '2.bias'"
    with pytest.raises(EngineError, match="the backward before this one raised"):
        gradients.begin(reduce=True)


def test_a_sparse_gradient_is_refused_with_its_parameter():
    module = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    gradients = bucketer(module, Wire())
    gradients.begin(reduce=True)
    with pytest.raises(NotBuiltError, match="sparse") as caught:
        module(torch.tensor([1, 2])).sum().backward()
    assert caught.value.where == "parameter '0.weight'"


# -- the end ----------------------------------------------------------------------------------------------------------


def test_detaching_takes_hooks_and_buffers_away():
    module = three_layers()
    gradients = bucketer(module, Wire())
    backward(gradients, module(torch.ones(2, 3)).sum())
    storage = weakref.ref(gradients.buckets[0].storage)
    gradients.detach()
    gradients.detach()
    gc.collect()
    assert storage() is None
    for param in module.parameters():
        assert param.grad is None
        assert not param._post_accumulate_grad_hooks
    module(torch.ones(2, 3)).sum().backward()  # plain PyTorch again
    assert module[2].bias.grad.tolist() == [2.0] * 3


def test_restored_gradients_are_copied_and_go_on():
    module, wire = three_layers(), Wire()
    gradients = bucketer(module, wire)
    mine = torch.full((3,), 7.0)
    gradients.restore({module[2].bias: mine})
    backward(gradients, module(torch.ones(2, 3)).sum())
    assert module[2].bias.grad.tolist() == [9.0] * 3
    assert mine.tolist() == [7.0] * 3
    gradients.restore({})
    assert all(param.grad is None for param in module.parameters())


# -- two ranks --------------------------------------------------------------------------------------------------------

ORDERS = [("abc", "cba"), ("abc", "ab"), ("b", "cab"), ("a", "c"), ("", "abc"), ("cba", "")]
"""The layers each rank uses, from the input on."""


class Freely(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})
        self.low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor, order: str) -> torch.Tensor:
        for name in order:
            x = torch.tanh(self.layers[name](x))
        return x.sum() + self.low.float().sum()


def start_order_on_ranks() -> list[tuple[list[int], list[str]]]:
    """Run every pair of orders; return per pair what was started here, and the parameters that are wrong."""
    import torch.distributed as dist

    rank, found = dist.get_rank(), []
    for bucket_bytes in (1, 100, 10**6):
        for orders in ORDERS:
            module, reference, started = Freely(), Freely(), []

            def start(bucket, started=started):
                started.append(bucket.index)
                return dist.all_reduce(bucket.storage, async_op=True)

            names = {param: name for name, param in module.named_parameters()}
            gradients = Bucketer(
                list(names),
                names,
                PrecisionPlan().dtypes_of(module),
                bucket_bytes=bucket_bytes,
                rank=rank,
                world_size=2,
                after=1.0,
                find_sources=False,
                start=start,
            )
            for seed in range(2):
                x = [torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * seed + r)) for r in range(2)]
                gradients.begin(reduce=seed == 1)
                module(x[rank], orders[rank]).backward()
                gradients.end()
                for r in range(2):
                    reference(x[r], orders[r]).backward()
            wrong = []
            for (name, param), expected in zip(module.named_parameters(), reference.parameters(), strict=True):
                if expected.grad is None or param.grad is None:
                    wrong += [name] if expected.grad is not param.grad else []
                elif not torch.allclose(param.grad, expected.grad, rtol=2**-18, atol=2**-18):
                    wrong.append(name)
            found.append((started, wrong))
            gradients.detach()
    return found


def test_ranks_start_in_the_same_order_whatever_their_graphs_look_like():
    [(mine, theirs)] = run_ranks([start_order_on_ranks], 2)
    for (started, wrong), (started_there, wrong_there) in zip(mine, theirs, strict=True):
        assert started == started_there == list(range(len(started)))
        assert wrong == wrong_there == []
    assert {len(started) for started, _ in mine} == {9, 4, 2}, "one each, several, one of a kind"


class HalfWire(Wire):
    """Notes what is sent, and plays one more rank that sends the same."""

    def start(self, bucket) -> Work:
        self.events.append(str(bucket.message.dtype))
        bucket.message[: bucket.numel].mul_(2)
        return Work()


PLANS = {
    "as stored": (PrecisionPlan(stored=torch.bfloat16), torch.bfloat16, torch.bfloat16),
    "summed in fp32": (
        PrecisionPlan(stored=torch.bfloat16, accumulate=torch.float32, reduce=torch.bfloat16, master=torch.float32),
        torch.float32,
        torch.bfloat16,
    ),
    "reduced in fp32": (
        PrecisionPlan(stored=torch.bfloat16, reduce=torch.float32, master=torch.float32),
        torch.bfloat16,
        torch.float32,
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_bucket_accumulates_in_one_dtype_and_travels_in_another(name):
    plan, accumulate, reduce = PLANS[name]
    module, wire = nn.Linear(3, 2).to(torch.bfloat16), HalfWire()
    gradients = bucketer(module, wire, plan=plan)
    # 1 + 2**-9 takes more digits than bf16 has: a second micro-batch is lost in bf16 and kept in fp32.
    for scale, reduces in ((1.0, False), (2.0**-9, True)):
        backward(gradients, module(torch.ones(1, 3, dtype=torch.bfloat16)).sum() * scale, reduce=reduces)
    assert wire.events == [str(reduce)]
    assert module.weight.grad.dtype == accumulate
    exact = 2 * (1 + 2**-9)
    expected = exact if accumulate == reduce == torch.float32 else 2.0
    assert module.weight.grad.tolist() == [[expected] * 3] * 2
    gradients.detach()
    assert module.weight.grad is None
    assert module.weight.grad_dtype == torch.bfloat16, "as it was before"
    module(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    assert module.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_rank_with_inf_or_nan_is_remembered(value, dtype):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(dtype)
    gradients = bucketer(module, Wire(), bucket_bytes=1, find_sources=True, world_size=3)
    assert gradients.non_finite() is None
    module[0].weight.register_hook(lambda grad: torch.where(torch.eye(2, dtype=torch.bool), value, grad))
    backward(gradients, module(torch.ones(1, 2, dtype=dtype)).sum())
    assert gradients.non_finite() == (module[0].weight, (0,))
    gradients.clear()


def test_an_overflow_of_the_cast_for_the_collective_is_the_ranks_own():
    plan = PrecisionPlan(reduce=torch.float16)
    module = nn.Linear(2, 2)
    gradients = bucketer(module, HalfWire(), plan=plan, find_sources=True)
    backward(gradients, (module.weight * 1e5).sum())
    assert gradients.non_finite() == (module.weight, (0,))
    gradients.clear()


def test_an_overflow_of_the_sum_alone_is_nobodys():
    module = nn.Linear(2, 2).to(torch.float16)
    big = torch.full((2, 2), 6e4, dtype=torch.float16)
    gradients = bucketer(module, Wire({module.weight: big}), find_sources=True)
    backward(gradients, (module.weight * big).sum())
    assert gradients.non_finite() == (module.weight, ())
    gradients.clear()


def test_without_being_asked_no_rank_is_named():
    module = nn.Linear(2, 2)
    gradients = bucketer(module, Wire())
    backward(gradients, module(torch.full((1, 2), float("nan"))).sum())
    found, ranks = gradients.non_finite()
    assert found is module.weight
    assert ranks is None


def test_a_window_that_was_reduced_twice_names_no_rank():
    module = nn.Linear(2, 2)
    gradients = bucketer(module, Wire(), find_sources=True)
    backward(gradients, module(torch.full((1, 2), float("nan"))).sum())
    assert gradients.non_finite()[1] == (0,)
    backward(gradients, module(torch.ones(1, 2)).sum())  # sends what the first one summed: everybody's NaN
    assert gradients.non_finite()[1] is None
    gradients.clear()
    backward(gradients, module(torch.full((1, 2), float("nan"))).sum())
    assert gradients.non_finite()[1] == (0,)
