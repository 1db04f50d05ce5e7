"""What ``safe_get_*`` and ``safe_set_*`` promise, at any stage and in any precision; run by the ranks of a job.

The oracles are plain PyTorch for gradients, the recurrence of the optimizer for its state, and the values given for
what was set.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import utils
from ds_core.comm import values_of_ranks
from ds_core.errors import EngineError
from ds_core.testing.partition import PartitionModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

__all__ = ["PRECISIONS", "WholeTensors", "check_life", "check_refusals"]

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6}},
}
# Of the L2 norm of a gradient: a sum of a few dozen products in 24, 8 and 11 bits, each through three layers.
BOUND = {"fp32": 2**-18, "bf16": 2**-4, "fp16": 2**-7}
LR, BETA = 0.05, 0.9


class WholeTensors(torch.optim.Optimizer):
    """Momentum by the norm of the whole tensor, with every kind of state there is."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": LR})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(exp_avg=torch.zeros_like(param), step=0, size=torch.zeros(()), kind="momentum")
                    state["rows"] = torch.zeros(max(1, param.dim()), 3)
                state["step"] += 1
                state["size"].copy_(param.grad.norm())
                state["rows"] += 1
                state["exp_avg"].lerp_(param.grad, 1 - BETA)
                param.sub_(state["exp_avg"] * group["lr"] / (1 + state["size"]))


def _start(config: Mapping[str, Any], precision: str, whole: bool) -> tuple[Any, nn.Module]:
    """Return an engine and the same model in plain PyTorch."""
    torch.manual_seed(3)
    model, plain = PartitionModel(), PartitionModel()
    plain.load_state_dict(model.state_dict())
    adam = {"type": "AdamW", "params": {"lr": LR, "betas": [BETA, 0.99]}}
    every = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "log_level": "error",
        **({} if whole else {"optimizer": adam}),
        **PRECISIONS[precision],
        **config,
    }
    engine = ds_core.initialize(model=model, config=every, optimizer=WholeTensors if whole else None)[0]
    return engine, plain


def _batch(seed: int, rank: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * seed + rank))


def _window(engine: Any, plain: nn.Module, seed: int) -> dict[str, Tensor | None]:
    """Run one window up to its step; return its gradients in plain PyTorch."""
    dtype = engine.module.first.weight.dtype
    names = dict(engine.module.named_parameters())
    for micro in range(2):
        engine.backward(engine(_batch(seed + micro, engine.global_rank).to(dtype)))
        if micro == 0:
            assert all(utils.safe_get_full_grad(param) is None for param in names.values())
            assert all(utils.safe_get_local_grad(param) is None for param in names.values())
            engine.step()
    plain.zero_grad()
    batches = [_batch(seed + micro, rank) for micro in range(2) for rank in range(engine.world_size)]
    torch.stack([plain(batch) for batch in batches]).mean().backward()
    return {name: param.grad for name, param in plain.named_parameters()}


def _trained(engine: Any) -> dict[str, nn.Parameter]:
    return {name: param for name, param in engine.module.named_parameters() if param.requires_grad}


def _together(engine: Any, local: Tensor, shape: torch.Size) -> Tensor:
    """Put what each rank has together, without the code under test."""
    told = values_of_ranks(local, engine.data_parallel_group)
    if not engine.parts.partition.divides:
        assert all(torch.equal(each, local) for each in told)
        return local.view(shape)
    return torch.cat(told).view(shape)


def _digits(like: Tensor, seed: int) -> Tensor:
    """Return fp32 values of ``like``'s shape that no 16-bit type has, the same on every rank."""
    return 1 + torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)) / 3


def check_life(config: Mapping[str, Any], precision: str, whole: bool) -> None:
    """Values before the first step, after backward, after step, and after each setter."""
    engine, plain = _start(config, precision, whole)
    names = _trained(engine)
    for name, param in names.items():
        found = utils.safe_get_full_fp32_param(param)
        assert found is not None
        assert found.dtype == torch.float32
        assert found.data_ptr() != param.data_ptr() or not found.numel()
        assert torch.equal(found, plain.get_parameter(name)), f"{name}: digits of the master"
        assert utils.safe_get_full_grad(param) is None
        with pytest.raises(EngineError, match="keeps no tensor 'exp_avg' of this parameter, it has none"):
            utils.safe_get_full_optimizer_state(param, "exp_avg")

    gradients = _window(engine, plain, seed=0)
    taken: dict[str, Tensor] = {}
    for name, param in names.items():
        full, local, wanted = utils.safe_get_full_grad(param), utils.safe_get_local_grad(param), gradients[name]
        if wanted is None:
            assert full is None
            assert local is None
            continue
        assert full is not None
        assert local is not None
        assert full.shape == param.shape
        assert (full - wanted).norm() <= BOUND[precision] * wanted.norm(), f"{name}: {full} is not {wanted}"
        assert torch.equal(_together(engine, local, param.shape), full), name
        taken[name] = full
    utils.safe_update_full_grad_vectorized(names.values(), lambda full, _: full * 2)
    engine.step()

    for name, param in names.items():
        assert utils.safe_get_full_grad(param) is None
        assert utils.safe_get_local_grad(param) is None
        if name not in taken:
            with pytest.raises(EngineError, match="it has none"):
                utils.safe_get_full_optimizer_state(param, "exp_avg")
            continue
        average = utils.safe_get_full_optimizer_state(param, "exp_avg")
        step = utils.safe_get_full_optimizer_state(param, "step")
        assert average is not None
        assert step is not None
        assert average.shape == param.shape
        torch.testing.assert_close(average, 2 * (1 - BETA) * taken[name], rtol=2**-6, atol=2**-20)
        assert (step.shape, step.item()) == ((), 1)
        local = utils.safe_get_local_optimizer_state(param, "exp_avg")
        assert local is not None
        assert torch.equal(_together(engine, local, param.shape), average)
        part = utils.safe_get_local_fp32_param(param)
        master = utils.safe_get_full_fp32_param(param)
        assert part is not None
        assert master is not None
        assert torch.equal(_together(engine, part, param.shape), master)
        assert torch.equal(param, master.to(param.dtype))
        if whole:
            rows = utils.safe_get_full_optimizer_state(param, "rows")
            assert rows is not None
            assert torch.equal(rows, torch.ones(max(1, param.dim()), 3))

    _set_everything(engine, plain, taken)
    engine.destroy()
    assert utils.safe_get_full_fp32_param(engine.module.scalar) is None


def _set_everything(engine: Any, plain: nn.Module, used: Mapping[str, Tensor]) -> None:
    names = {name: param for name, param in _trained(engine).items() if name in used}
    values = {name: _digits(param, seed) for seed, (name, param) in enumerate(names.items())}
    for name, param in names.items():
        utils.safe_set_full_fp32_param(param, values[name])
        assert torch.equal(param, values[name].to(param.dtype)), f"{name}: what the model computes with, at once"
        utils.safe_set_full_optimizer_state(param, values[name] * 2, "exp_avg")
        utils.safe_set_full_optimizer_state(param, torch.tensor(6.0), "step")
        _equals(utils.safe_get_full_fp32_param(param), values[name])
        _equals(utils.safe_get_full_optimizer_state(param, "exp_avg"), values[name] * 2)
        _equals(utils.safe_get_full_optimizer_state(param, "step"), torch.tensor(6.0))
        utils.safe_set_full_optimizer_state(param, torch.zeros(param.shape), "exp_avg")
    _window(engine, plain, seed=7)
    for param in names.values():
        utils.safe_set_full_grad(param, torch.full(param.shape, 0.5))
        _equals(utils.safe_get_full_grad(param), torch.full(param.shape, 0.5))
        local = utils.safe_get_local_grad(param)
        assert local is not None
        utils.safe_set_local_grad(param, torch.zeros_like(local))
        _equals(utils.safe_get_full_grad(param), torch.zeros(param.shape))
    engine.step()
    for name, param in names.items():
        # Nothing moved, so the master must have all the digits it was given, through the step.
        _equals(utils.safe_get_full_fp32_param(param), values[name])
        _equals(utils.safe_get_full_optimizer_state(param, "step"), torch.tensor(7.0))
        _set_parts(param)
    engine.parts.partition.publish()
    assert all(bool((param == 3).all()) for param in names.values())


def _set_parts(param: nn.Parameter) -> None:
    part = utils.safe_get_local_fp32_param(param)
    state = utils.safe_get_local_optimizer_state(param, "exp_avg")
    assert part is not None
    assert state is not None
    utils.safe_set_local_fp32_param(param, torch.full_like(part, 3))
    if part.numel():
        utils.safe_set_local_optimizer_state(param, torch.full_like(state, 4), "exp_avg")
    assert int((param == 3).sum()) >= part.numel(), "this rank computes with it at once"
    _equals(utils.safe_get_full_fp32_param(param), torch.full(param.shape, 3.0))
    _equals(utils.safe_get_full_optimizer_state(param, "exp_avg"), torch.full(param.shape, 4.0))


def _equals(found: Tensor | None, wanted: Tensor) -> None:
    assert found is not None
    assert torch.equal(found, wanted), f"{found} is not {wanted}"


def check_refusals(config: Mapping[str, Any], precision: str, whole: bool) -> None:
    """What has no engine is None or an error; a wrong value is an error on every rank, and changes nothing."""
    engine, plain = _start(config, precision, whole)
    model = engine.module
    for stranger in (model.frozen, nn.Parameter(torch.ones(2))):
        for get in (utils.safe_get_full_fp32_param, utils.safe_get_full_grad):
            assert get(stranger) is None
        assert utils.safe_get_full_optimizer_state(stranger, "exp_avg") is None
        assert utils.safe_get_local_fp32_param(stranger) is None
        assert utils.safe_get_local_grad(stranger) is None
        assert utils.safe_get_local_optimizer_state(stranger, "exp_avg") is None
        for setter in (utils.safe_set_full_fp32_param, utils.safe_set_full_grad, utils.safe_set_local_fp32_param):
            _refused(partial(setter, stranger, torch.ones(stranger.shape)), "no engine trains this")
    weight = model.first.weight
    _refused(lambda: utils.safe_set_full_grad(weight, torch.ones(weight.shape)), "has no reduced gradient now")
    _window(engine, plain, seed=0)
    engine.step()
    _window(engine, plain, seed=2)
    _refused(lambda: utils.safe_set_full_grad(model.never, torch.ones(11)), "has no reduced gradient now")
    before = [utils.safe_get_full_fp32_param(weight), utils.safe_get_full_grad(weight)]
    wrong: list[Any] = [torch.ones(3), torch.ones(weight.shape).t(), torch.tensor(1.0), [1.0], None]
    for value in wrong:
        for setter in (utils.safe_set_full_fp32_param, utils.safe_set_full_grad, utils.safe_set_local_fp32_param):
            # As many elements are enough for the part of a rank that has all of them.
            if setter is not utils.safe_set_local_fp32_param or not isinstance(value, torch.Tensor):
                _refused(partial(setter, weight, value), "expected is a tensor of shape")
        _refused(partial(utils.safe_set_full_optimizer_state, weight, value, "exp_avg"), "expected is a tensor")
    _refused(lambda: utils.safe_set_local_grad(weight, torch.ones(99)), "expected is a tensor of shape")
    _refused(lambda: utils.safe_set_full_optimizer_state(weight, torch.ones(2), "step"), "expected is a tensor")
    _refused(lambda: utils.safe_get_full_optimizer_state(weight, "moment"), "keeps no tensor 'moment'")
    _refused(lambda: utils.safe_set_full_optimizer_state(weight, torch.ones(weight.shape), "moment"), "keeps no")
    if whole:
        _refused(lambda: utils.safe_get_full_optimizer_state(weight, "kind"), "keeps no tensor 'kind'")
    after = [utils.safe_get_full_fp32_param(weight), utils.safe_get_full_grad(weight)]
    for old, new in zip(before, after, strict=True):
        assert old is not None
        _equals(new, old)
    engine.destroy()


def _refused(call: Callable[[], Any], what: str) -> None:
    with pytest.raises(EngineError, match=what) as caught:
        call()
    assert caught.value.where
    assert caught.value.fix
