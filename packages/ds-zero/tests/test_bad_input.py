"""Bad input at stages 1 and 2: one clear error on every rank, never a hang; and unusual input that is not bad."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import ConfigError
from ds_core.testing.ranks import expect_rank_errors, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STAGES = (1, 2)
LR = 0.1


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    net.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    return net


def config(stage: int, accumulation: int = 1, **sections: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5},
        **sections,
    }


def start(stage: int, accumulation: int = 1, **arguments: Any) -> Any:
    return ds_core.initialize(**{"model": model(), "config": config(stage, accumulation), **arguments})[0]


def batch(seed: int, rank: int | None = None) -> torch.Tensor:
    rank = comm.get_rank() if rank is None else rank
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(10 * seed + rank))


def loss_of(net: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return net(x).square().mean()


def micro(engine: Any, seed: int) -> None:
    engine.backward(loss_of(engine, batch(seed).to(engine.module[0].weight.dtype)))
    engine.step()


def error_of(call: Callable[[], object]) -> str:
    """Return what ``call`` raises, as ``"Class: text"``; empty if nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def trained_plainly(windows: list[list[int]], divisor: int, world_size: int, factor: float = 1.0) -> nn.Module:
    """Return the model after plain SGD steps on the data of all ranks, each window a list of seeds."""
    net = model()
    optimizer = torch.optim.SGD([param for param in net.parameters() if param.requires_grad], lr=LR)
    for seeds in windows:
        for seed in seeds:
            for rank in range(world_size):
                (loss_of(net, batch(seed, rank)) * factor / (divisor * world_size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def is_close(found: dict[str, torch.Tensor], expected: nn.Module) -> bool:
    # A dozen of products of numbers near 1, in another order.
    return all(torch.allclose(found[name], p, rtol=0, atol=2**-18) for name, p in expected.named_parameters())


# -- what is refused before anything is built -------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "text"), [(4, "got 4"), (-1, "got -1"), ("two", "two")])
def test_there_is_no_such_stage(stage, text):
    with pytest.raises(ConfigError) as caught:
        ds_core.initialize(model=model(), config=config(stage))
    assert "zero_optimization.stage" in str(caught.value)
    assert text in str(caught.value)


def param_offload(stage: int) -> str:
    section = {"stage": stage, "offload_param": {"device": "cpu"}}
    return error_of(lambda: start(stage, config={**config(stage), "zero_optimization": section}))


# -- ranks that differ ------------------------------------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    """Nobody knows how it updates, so it gets whole tensors."""

    def __init__(self, params: Any, lr: float = LR) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


def reordered() -> nn.Module:
    net = model()
    net._modules["0"], net._modules["2"] = net[2], net[0]
    return net


def partly_frozen() -> nn.Module:
    net = model()
    net[0].requires_grad_(False)
    return net


def in_two_groups(net: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters())}]


def odd_arguments(stage: int, difference: str) -> dict[str, Any]:
    """Return what the last rank passes to ``initialize`` instead."""
    net = model()
    optimizers: dict[str, Any] = {"other optimizer": torch.optim.Adam, "whole tensors": Lion}
    return {
        "other model": lambda: {"model": nn.Linear(3, 1)},
        "other order": lambda: {"model": reordered()},
        "other requires_grad": lambda: {"model": partly_frozen()},
        "other groups": lambda: {"model": net, "model_parameters": in_two_groups(net)},
        "other lr of a group": lambda: {
            "model": net,
            "model_parameters": [{"params": list(net.parameters()), "lr": 0.7}],
        },
        "other optimizer": lambda: {"optimizer": optimizers["other optimizer"]},
        "whole tensors": lambda: {"optimizer": optimizers["whole tensors"]},
        "other stage": lambda: {"config": config(3 - stage)},
        "other bucket": lambda: {"config": config(stage, zero_optimization={"stage": stage, "reduce_bucket_size": 50})},
        "other accumulation": lambda: {"config": config(stage, 2)},
        "other division": lambda: {"config": config(stage, gradient_predivide_factor=2.0)},
        "other lr": lambda: {"config": config(stage, optimizer={"type": "SGD", "params": {"lr": 0.2}})},
    }[difference]()


DIFFERENCES = {
    "other model": "rank 0 has frozen [2] torch.float32, rank 1 has weight [1, 3] torch.float32",
    "other order": "rank 0 has 0.weight [4, 3] torch.float32, rank 1 has 0.weight [1, 4] torch.float32",
    "other requires_grad": "rank 0 has parameter '0.weight' in group 0, rank 1 has parameter '2.weight' in group 0",
    "other groups": "rank 0 has parameter '2.weight' in group 0, rank 1 has group 0 with {}",
    "other lr of a group": "rank 0 has group 0 with {}, rank 1 has group 0 with {'lr': 0.7}",
    "other optimizer": "rank 0 has the optimizer SGD, element-wise, rank 1 has the optimizer Adam, element-wise",
    "whole tensors": "rank 0 has the optimizer SGD, element-wise, rank 1 has the optimizer Lion, of whole tensors",
    "other stage": "zero_optimization.stage",
    "other bucket": "zero_optimization.reduce_bucket",
    "other accumulation": "rank 0 has gradient_accumulation_steps 1, rank 1 has gradient_accumulation_steps 2",
    "other division": "rank 0 has gradient_predivide_factor 1.0, rank 1 has gradient_predivide_factor 2.0",
    "other lr": "rank 1 has optimizer.params {'lr': 0.2}",
}


def ranks_that_differ(stage: int) -> dict[str, str]:
    found = {}
    for difference in DIFFERENCES:
        odd = odd_arguments(stage, difference) if comm.get_rank() == comm.get_world_size() - 1 else {}
        if comm.get_rank() == 0 and difference in ("other optimizer", "whole tensors"):
            odd = {"optimizer": torch.optim.SGD}
        callable_optimizer = odd.get("optimizer")
        if callable_optimizer is not None:
            odd = {"optimizer": partial(callable_optimizer, lr=LR), "config": config(stage)}
            del odd["config"]["optimizer"]
        found[difference] = error_of(partial(start, stage, **odd))
    return found


# -- a group that one rank adds ---------------------------------------------------------------------------------------


def added_on_one_rank(stage: int) -> tuple[str, str, dict[str, torch.Tensor], str]:
    """The last rank adds a group where the others begin to train; then all add it, and train; and it adds once more."""
    net = model()
    engine = start(stage, model=net, model_parameters=list(net[0].parameters()))
    alone = comm.get_rank() == comm.get_world_size() - 1

    def add() -> None:
        engine.optimizer.add_param_group({"params": list(net[2].parameters())})

    error = error_of(add if alone else partial(micro, engine, 0))
    again = error_of(add)
    micro(engine, 0)
    return error, again, weights(engine), error_of(add) if alone else ""


# -- a model that is changed ------------------------------------------------------------------------------------------


def freeze(net: nn.Module) -> None:
    net[0].bias.requires_grad_(False)


def unfreeze(net: nn.Module) -> None:
    net.frozen.requires_grad_(True)


def add(net: nn.Module) -> None:
    net[2].register_parameter("extra", nn.Parameter(torch.ones(1)))


def replace_data(net: nn.Module) -> None:
    net[2].weight.data = net[2].weight.data.clone()


def cast(net: nn.Module) -> None:
    net.double()


CHANGES = {
    freeze: "a parameter that is trained was frozen after initialize\n  where: parameter '0.bias'",
    unfreeze: "a frozen parameter requires grad since initialize: no optimizer would update it\n  where: parameter",
    add: "a parameter was added to the model after initialize: no optimizer would update it\n  where: parameter '2.ex",
    replace_data: "a parameter was given other memory after initialize: the engine does not see it\n  where: parameter",
    cast: "a parameter was given other memory after initialize, [4, 3] torch.float64 on cpu instead of [4, 3]",
}
ELSEWHERE = "EngineError: another rank changed its model after initialize"


def changed(stage: int, change: Callable[[nn.Module], None], ranks: tuple[int, ...]) -> tuple[str, str, str]:
    """Change the model on ``ranks``; return the error of the next window, and those of going on without clearing."""
    engine = start(stage, 2 if change is not cast else 1)
    for seed in range(2):
        micro(engine, seed)
    if comm.get_rank() in ranks:
        change(engine.module)
    error = error_of(lambda: [micro(engine, seed) for seed in range(2)])
    blocked = error_of(engine.step) if stage == 1 else error_of(lambda: micro(engine, 0))
    return error, blocked, error_of(engine.zero_grad)


def cast_inside_a_window(stage: int) -> str:
    engine = start(stage, 2)
    engine.module.double()
    return error_of(lambda: micro(engine, 0))


def undone(stage: int) -> dict[str, torch.Tensor]:
    """Rank 1 freezes a parameter for one step, which is refused; the steps around it are as if nothing had been."""
    engine = start(stage)
    micro(engine, 0)
    bias = engine.module[0].bias
    bias.requires_grad_(comm.get_rank() != 1)
    assert error_of(lambda: micro(engine, 1))
    bias.requires_grad_(True)
    engine.zero_grad()
    micro(engine, 2)
    return weights(engine)


# -- a rank that raises -----------------------------------------------------------------------------------------------


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("broken on purpose")


def raise_in_the_middle(stage: int, folder: Path, place: str) -> None:
    """Train; rank 1 fails inside a window; every rank does what an uncaught exception does: its process ends."""
    rank = comm.get_rank()
    try:
        engine = start(stage, 2)
        for seed in range(8):
            loss = loss_of(engine, batch(seed))
            if seed == 5 and rank == 1:
                if place == "forward":
                    raise ValueError("broken on purpose")
                loss = Breaks.apply(loss)
            engine.backward(loss)
            engine.step()
    except Exception as error:
        (folder / f"rank{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(7)


@pytest.mark.parametrize(("stage", "place"), [(1, "backward"), (2, "forward")])
def test_a_rank_that_ends_ends_all(stage, place, tmp_path):
    ends = expect_rank_errors(partial(raise_in_the_middle, stage, tmp_path, place), 2)
    assert ends == {0: "ExitCode: 7", 1: "ExitCode: 7"}
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in range(2))
    assert second == "ValueError: broken on purpose"
    assert first.startswith("CommError: the gradients could not be summed over the ranks")
    assert "another rank has ended" in first


def one_rank_stays_away(stage: int) -> tuple[str, str]:
    """Rank 1 raises and lives on; the others are ended by the timeout of the group."""
    torch.distributed.barrier()  # else a rank that is ahead meets one that still has the old group
    comm.destroy_process_group()
    # Long enough for ranks of a busy machine to find each other.
    ds_core.init_distributed(timeout=timedelta(seconds=8))
    engine = start(stage)
    micro(engine, 0)
    loss = loss_of(engine, batch(1))
    error = error_of(lambda: engine.backward(Breaks.apply(loss) if comm.get_rank() == 1 else loss))
    return error, error_of(engine.zero_grad)


def all_raise_before_anything_is_sent(stage: int) -> tuple[str, str, dict[str, torch.Tensor]]:
    """A window that broke and was cleared leaves no trace."""
    engine = start(stage, 2)
    micro(engine, 9)
    error = error_of(lambda: engine.backward(Breaks.apply(loss_of(engine, batch(1)))))
    blocked = error_of(lambda: micro(engine, 1))
    engine.zero_grad()
    micro(engine, 0)
    return error, blocked, weights(engine)


def one_rank_forgets(stage: int) -> tuple[str, dict[str, torch.Tensor]]:
    """Rank 1 drops a micro-batch that the others have summed with it; then all drop the window and go on."""
    engine = start(stage, 2)
    micro(engine, 8)
    if comm.get_rank() == 1:
        error_of(lambda: engine.backward(Breaks.apply(loss_of(engine, batch(1)))))
        engine.zero_grad()
    error = error_of(lambda: engine.backward(loss_of(engine, batch(9))))
    engine.zero_grad()
    engine.backward(loss_of(engine, batch(0)))
    engine.step()
    return error, weights(engine)


def all_raise_after_something_was_sent(stage: int) -> tuple[str, str]:
    """Breaks below the first layer, when the buckets of the last one are under way. The group is of no use any more."""
    engine = start(stage)
    error = error_of(lambda: engine.backward(loss_of(engine, Breaks.apply(batch(1).requires_grad_()))))
    return error, error_of(engine.zero_grad)


# -- calls in the wrong order -----------------------------------------------------------------------------------------


def wrong_order(stage: int) -> dict[str, str]:
    engine = start(stage)
    found = {"step first": error_of(engine.step), "no loss": error_of(lambda: engine.backward(1.0))}
    found["no graph"] = error_of(lambda: engine.backward(torch.ones(())))
    found["loss.backward"] = error_of(loss_of(engine, batch(0)).backward)
    engine.zero_grad()
    loss = loss_of(engine, batch(0))
    engine.backward(loss)
    found["same graph"] = error_of(lambda: engine.backward(loss))
    found["after it"] = error_of(engine.step)
    engine.zero_grad()
    loss = loss_of(engine, batch(0))
    micro(engine, 0)
    found["old graph"] = error_of(lambda: engine.backward(loss))
    engine.zero_grad()
    micro(engine, 1)
    found["weights"] = "right" if is_close(weights(engine), trained_plainly([[0], [1]], 1, 2)) else "wrong"
    engine.destroy()
    found["destroyed"] = error_of(engine.step)
    return found


# -- unusual, and right -----------------------------------------------------------------------------------------------


def double(param: torch.Tensor) -> None:
    assert param.grad is not None
    param.grad *= 2


def user_hooks(stage: int) -> bool:
    """Hooks on gradients, before and after initialize, do what they do in plain PyTorch."""
    net = model()
    seen: list[torch.Size] = []
    net[0].weight.register_hook(lambda gradient: gradient * 2)
    net[0].bias.register_post_accumulate_grad_hook(double)
    engine = start(stage, model=net)
    net[2].weight.register_hook(lambda gradient: gradient * 2)
    net[2].bias.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.shape))
    net[2].bias.register_hook(lambda gradient: gradient * 2)
    micro(engine, 0)
    assert seen == [torch.Size([1])]
    return is_close(weights(engine), trained_plainly([[0]], 1, comm.get_world_size(), factor=2.0))


def zero_grad_inside_a_window(stage: int) -> bool:
    engine = start(stage, 3)
    micro(engine, 0)
    engine.zero_grad()
    micro(engine, 1)
    micro(engine, 2)
    return is_close(weights(engine), trained_plainly([[1, 2]], 3, comm.get_world_size()))


def eval_between(stage: int) -> bool:
    engine = start(stage, 2)
    for seed in range(4):
        engine.eval()
        with torch.no_grad():
            before = engine(batch(7))
        engine.train()
        loss = loss_of(engine, batch(seed))
        engine.backward(loss)
        with torch.no_grad():
            assert torch.equal(engine(batch(7)), before)
        engine.step()
    return is_close(weights(engine), trained_plainly([[0, 1], [2, 3]], 2, comm.get_world_size()))


def forward_only(stage: int) -> tuple[str, str, bool]:
    """Without an optimizer, or with nothing to train, an engine runs forward, as at stage 0."""
    plain = {key: value for key, value in config(stage).items() if key != "optimizer"}
    engine = start(stage, config=plain)
    same = torch.equal(engine(batch(0)), model()(batch(0)))
    without = error_of(lambda: engine.backward(loss_of(engine, batch(0))))
    nothing = start(stage, model=model().requires_grad_(False))
    return without, error_of(nothing.step), same and torch.equal(nothing(batch(0)), model()(batch(0)))


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(0, 4)), nn.Parameter(torch.ones(3, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum() + self.a.sum() + self.b.sum()


def all_empty(stage: int) -> list[float | None]:
    engine = start(stage, model=Empty())
    for _ in range(2):
        engine.backward(engine(torch.ones(3)))
        engine.step()
    return [engine.get_global_grad_norm(), float(engine.global_steps), *engine.module.a.flatten().tolist()]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a * x + self.b).sum()


def fewer_elements_than_ranks(stage: int) -> list[float]:
    engine = start(stage, model=Tiny())
    for _ in range(2):
        engine.backward(engine(torch.tensor(1.0 + comm.get_rank())))
        engine.step()
    return [engine.module.a.item(), engine.module.b.item()]


# -- all of it, in one spawn ------------------------------------------------------------------------------------------

CASES: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    *((param_offload, (stage,)) for stage in STAGES),
    *((added_on_one_rank, (stage,)) for stage in (0, *STAGES)),
    *((ranks_that_differ, (stage,)) for stage in STAGES),
    *((changed, (stage, change, ranks)) for stage in STAGES for change in CHANGES for ranks in ((0, 1), (1,))),
    *((function, (stage,)) for stage in STAGES for function in (cast_inside_a_window, undone, wrong_order)),
    *((function, (stage,)) for stage in STAGES for function in (all_empty, forward_only)),
    *((function, (stage,)) for stage in STAGES for function in (user_hooks, zero_grad_inside_a_window, eval_between)),
    *((all_raise_before_anything_is_sent, (stage,)) for stage in STAGES),
    (one_rank_forgets, (2,)),
]


@pytest.fixture(scope="module")
def results() -> dict[tuple[Any, ...], list[Any]]:
    """What each case returned on two ranks."""
    found = run_ranks([partial(function, *arguments) for function, arguments in CASES], 2, timeout_s=30)
    return {(function, *arguments): of_ranks for (function, arguments), of_ranks in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("stage", STAGES)
def test_offloaded_parameters_need_stage_3(results, stage):
    for error in results[param_offload, stage]:
        assert error.startswith("ConfigError: zero_optimization.offload_param")
        assert "needs ZeRO stage 3" in error


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_ranks_that_differ_are_told_in_what(results, stage, difference):
    for found in results[ranks_that_differ, stage]:
        assert found[difference].startswith("CommError: model, parameter groups or configuration differ between ranks")
        assert "[1] differ from rank 0" in found[difference]
        assert DIFFERENCES[difference] in found[difference]


@pytest.mark.parametrize("stage", [0, *STAGES])
def test_a_group_that_one_rank_adds_is_told_on_every_rank(results, stage):
    for rank, (error, again, found, late) in enumerate(results[added_on_one_rank, stage]):
        assert error.startswith(
            "CommError: the ranks do different things before the first step: ranks [0] are in engine.backward, "
            "ranks [1] are in optimizer.add_param_group"
        )
        assert again == ""
        assert is_close(found, trained_plainly([[0]], 1, 2))
        # Nobody waits for it: the other rank is not there.
        assert late.startswith("EngineError: a parameter group was added after 1 steps") == (rank == 1)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_named_on_every_rank(results, stage, change):
    for ranks in ((0, 1), (1,)):
        for rank, (error, blocked, clearing) in enumerate(results[changed, stage, change, ranks]):
            assert error.startswith(f"EngineError: {CHANGES[change]}" if rank in ranks else ELSEWHERE), error
            assert "the backward before this one raised" in blocked or "step() without a backward" in blocked
            assert clearing == ""


@pytest.mark.parametrize("stage", STAGES)
def test_a_cast_is_named_also_inside_a_window(results, stage):
    for error in results[cast_inside_a_window, stage]:
        assert error.startswith("EngineError: a parameter is [")
        assert "torch.float64 on cpu, and its gradients are expected to be" in error


@pytest.mark.parametrize("stage", STAGES)
def test_a_change_that_was_undone_leaves_no_trace(results, stage):
    for found in results[undone, stage]:
        assert is_close(found, trained_plainly([[0], [2]], 1, 2))


@pytest.mark.parametrize("stage", STAGES)
def test_the_timeout_of_the_group_ends_who_waits(stage):
    [((first, cleared), (second, cleared_there))] = run_ranks([partial(one_rank_stays_away, stage)], 2, timeout_s=60)
    assert first.startswith("CommError: the gradients could not be summed over the ranks")
    assert second == "ValueError: broken on purpose"
    assert "the ranks are no longer in step" in cleared
    assert cleared_there == "", "it had sent nothing"


@pytest.mark.parametrize("stage", STAGES)
def test_a_window_that_broke_can_be_cleared(results, stage):
    for error, blocked, found in results[all_raise_before_anything_is_sent, stage]:
        assert error == "ValueError: broken on purpose"
        assert blocked.startswith("EngineError: the backward before this one raised")
        assert is_close(found, trained_plainly([[0]], 2, 2))


def test_sums_of_different_micro_batches_are_noticed(results):
    for error, found in results[one_rank_forgets, 2]:
        assert error.startswith(
            "EngineError: the ranks hold sums of different backwards of this window: rank 0 2, rank 1 1"
        )
        assert is_close(found, trained_plainly([[0]], 2, 2))


@pytest.mark.parametrize("stage", STAGES)
def test_calls_in_the_wrong_order_are_named(results, stage):
    expected = {
        "step first": "EngineError: step() without a backward before it",
        "no loss": "EngineError: the loss is a float, not a tensor",
        "no graph": "EngineError: the loss does not depend on anything that can be trained",
        "loss.backward": "EngineError: a gradient arrived outside this engine's backward(loss)",
        "same graph": "RuntimeError: Trying to backward through the graph a second time",
        "after it": "EngineError: the backward before this one raised",
        "old graph": "RuntimeError: one of the variables needed for gradient computation has been modified",
        "weights": "right",
        "destroyed": "EngineError: this engine was destroyed",
    }
    for found in results[wrong_order, stage]:
        assert found.keys() == expected.keys()
        for key, text in expected.items():
            assert found[key].startswith(text), key


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("function", [user_hooks, zero_grad_inside_a_window, eval_between])
def test_numbers_are_those_of_plain_pytorch(results, stage, function):
    assert results[function, stage] == [True, True]


@pytest.mark.parametrize("stage", STAGES)
def test_without_an_optimizer_it_runs_forward(results, stage):
    for without, nothing, same in results[forward_only, stage]:
        assert without.startswith("EngineError: this engine has no optimizer")
        assert nothing.startswith("EngineError: this engine has no optimizer")
        assert same


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_without_elements_are_trained_to_nothing(results, stage):
    assert results[all_empty, stage] == [[0.0, 2.0]] * 2


def test_there_may_be_more_ranks_than_elements_and_a_collective_given_up_on_cannot_be_cleared():
    # The second one last: it leaves collectives behind that nobody waits for.
    functions = [*(partial(fewer_elements_than_ranks, stage) for stage in STAGES)]
    *found, given_up = run_ranks([*functions, partial(all_raise_after_something_was_sent, 2)], 3)
    # The mean of the gradients 1, 2, 3 of the first parameter, and 1 of the second.
    assert found == [[[pytest.approx(1 - 2 * LR * 2), pytest.approx(1 - 2 * LR)]] * 3] * 2
    for error, again in given_up:
        assert error == "ValueError: broken on purpose"
        assert again.startswith("EngineError: a gradient collective was under way when this rank gave up")
