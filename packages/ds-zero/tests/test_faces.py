"""``engine.optimizer`` at stages 1 and 2: DeepSpeed's names over the parts of an engine."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import registry, utils
from ds_core.comm import values_of_ranks
from ds_core.errors import CheckpointError, EngineError, NotBuiltError
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.ranks import run_ranks
from ds_zero.faces import DeepSpeedZeroOptimizer

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 6, "hysteresis": 1}},
}
INSTALLED = [name for name in PRECISIONS if name in registry.names("precision")]
MISSING = sorted(DeepSpeedZeroOptimizer._INSTEAD)


def start(stage: int, precision: str = "fp32", **changes: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    model[0].bias.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "log_level": "error",
        "optimizer": {"type": "AdamW", "params": {"lr": 0.125}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 7},
        **PRECISIONS[precision],
        **changes,
    }
    groups = [{"params": [model[0].weight, model[2].bias]}, {"params": [model[2].weight], "lr": 0.25}]
    return ds_core.initialize(model=model, model_parameters=groups, config=config)[0]


def backward(engine: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(10 * seed + engine.global_rank)
    x = torch.randn(2, 3, generator=generator).to(engine.module[0].weight.dtype)
    engine.backward(engine(x).float().square().mean())


def weights(engine: Any) -> list[torch.Tensor]:
    return [param.detach().clone() for param in engine.module.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def check_attributes(stage: int, precision: str) -> None:
    engine = start(stage, precision)
    face, rank = engine.optimizer, engine.global_rank
    assert type(face) is DeepSpeedZeroOptimizer
    assert isinstance(face, ds_core.DeepSpeedOptimizer)
    assert face is engine.optimizer
    assert face.optimizer is engine.basic_optimizer
    assert face.partition_gradients is (stage == 2)
    assert face.partition_count == [engine.world_size] * 2
    assert face.groups_padding == [0, 0]
    assert (face.cpu_offload, face.offloaded_states) == (False, set())
    assert face.dp_process_group is engine.data_parallel_group
    assert face.real_dp_process_group == [engine.data_parallel_group] * 2
    first, _, last = engine.module
    wanted = [[first.weight, last.bias], [last.weight]]
    assert [[id(param) for param in group] for group in face.bit16_groups] == [[id(p) for p in own] for own in wanted]
    assert [list(flat.shape) for flat in face.bit16_groups_flat] == [[16], [5]]
    assert face.param_names[last.weight] == "2.weight"
    sizes = values_of_ranks(face.partition_size, engine.data_parallel_group)
    assert [sum(each) for each in zip(*sizes, strict=True)] == [16, 5]
    own = [torch.cat([utils.safe_get_local_fp32_param(param) for param in group]) for group in wanted]
    assert same(face.single_partition_of_fp32_groups, own)
    assert [len(flat) for flat in own] == sizes[rank]

    assert face.averaged_gradients == {}
    with pytest.raises(EngineError, match="no reduced gradients now"):
        face.scaled_global_norm()
    backward(engine)
    for index, group in enumerate(wanted):
        for param, part in zip(group, face.averaged_gradients[index], strict=True):
            local = utils.safe_get_local_grad(param)
            assert torch.equal(part.float() / face.cur_scale, local)
    scaled = face.scaled_global_norm()
    utils.safe_update_full_grad_vectorized(wanted[0] + wanted[1], lambda full, _: full)
    face.step()
    assert scaled == face.loss_scale * engine.get_global_grad_norm()
    assert face._global_grad_norm == engine.get_global_grad_norm()
    assert face.averaged_gradients == {}
    assert not face.overflow

    face.set_lr(0.5)
    assert engine.get_lr() == [0.5, 0.5]
    for param in engine.module.parameters():
        param.data.fill_(0.75)
    face.refresh_fp32_params()
    assert all(bool((flat == 0.75).all()) for flat in face.single_partition_of_fp32_groups)
    with torch.no_grad():
        for group in face.param_groups:
            for tensor in group["params"]:
                tensor.fill_(0.25)
    face.update_lp_params()
    assert all(bool((param == 0.25).all()) for group in wanted for param in group)
    assert bool((first.bias == 0.75).all()), "frozen"
    face.destroy()


def check_overflow(stage: int) -> None:
    engine = start(stage, "fp16")
    face = engine.optimizer
    before = weights(engine)
    engine.backward(engine(torch.ones(2, 3).half()).float().sum() * (float("inf") if engine.global_rank == 0 else 1.0))
    engine.step()
    assert face.overflow
    assert face.loss_scale == face.cur_scale == 32.0
    assert same(weights(engine), before)
    face.override_loss_scale(8.0)
    assert (face.loss_scale, face.external_loss_scale, engine.cur_scale) == (8.0, 8.0, 8.0)
    backward(engine)
    wanted = utils.safe_get_full_grad(engine.module[0].weight)
    engine.zero_grad()
    plain = start(stage, "fp16")
    backward(plain)
    torch.testing.assert_close(utils.safe_get_full_grad(plain.module[0].weight), wanted, rtol=2**-8, atol=2**-12)


def check_state(stage: int, precision: str) -> None:
    engine = start(stage, precision)
    backward(engine)
    engine.step()
    saved = io.BytesIO()
    torch.save(engine.optimizer.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    kept = [weights(engine)]
    backward(engine, seed=1)
    engine.step()
    kept.append(weights(engine))
    for given in (state, values_of_ranks(state, engine.data_parallel_group)):
        engine.optimizer.load_state_dict(given)
        assert same(weights(engine), kept[0])
        backward(engine, seed=1)
        engine.step()
        assert same(weights(engine), kept[1]), "masters, moments and step count go on"
    wrong = copy.deepcopy(state)
    if engine.global_rank == 1:
        wrong["param_slice_mappings"][0]["0.weight"] = (0, 3)
    with pytest.raises(CheckpointError, match="is of other parameters or parts than here, one of 2"):
        engine.optimizer.load_state_dict(wrong)
    with pytest.raises(CheckpointError, match="the states are those of 3 ranks, this job has 2"):
        engine.optimizer.load_state_dict([state] * 3)
    with pytest.raises(CheckpointError, match="the state has no 'param_slice_mappings'"):
        engine.optimizer.load_state_dict({key: state[key] for key in state if key != "param_slice_mappings"})
    assert same(weights(engine), kept[1])
    check_fails_together(engine, state)
    engine.optimizer.load_state_dict(state)
    assert same(weights(engine), kept[0])


def check_fails_together(engine: Any, state: dict[str, Any]) -> None:
    """What is found on one rank alone, by the scaler or by torch, is raised on both; none waits for the other."""
    broken: list[dict[str, Any]] = [{"optimizer_state_dict": {**state["optimizer_state_dict"], "state": None}}]
    if state["loss_scaler"]:
        broken.append({"loss_scaler": {**state["loss_scaler"], "scale": -1.0}})
    for change in broken:
        before = copy.deepcopy(engine.optimizer.state_dict())
        with pytest.raises(Exception) as caught:  # noqa: PT011 - torch's own on rank 1
            engine.optimizer.load_state_dict({**state, **change} if engine.global_rank else state)
        if engine.global_rank == 0:
            assert "rank 1 failed" in str(caught.value)
            if "loss_scaler" in change:
                now = engine.optimizer.state_dict()
                assert all(map(same, now["parameters"], before["parameters"])), "the other rank changed nothing either"


def test_on_ranks() -> None:
    cases = [(stage, precision) for stage in (1, 2) for precision in INSTALLED]
    checks = [partial(check_attributes, *case) for case in cases]
    checks += [partial(check_state, *case) for case in cases if case[1] != "bf16"]
    if "fp16" in INSTALLED:
        checks += [partial(check_overflow, stage) for stage in (1, 2)]
    run_ranks(checks, 2)


@pytest.mark.parametrize("name", MISSING)
def test_what_cannot_be_says_what_to_use(name: str) -> None:
    face = start(2).optimizer
    with pytest.raises(NotBuiltError, match=f"DeepSpeedZeroOptimizer has no '{name}' here") as caught:
        getattr(face, name)
    assert caught.value.fix
    assert not hasattr(face, name)


def test_a_name_nobody_knows_is_an_attribute_error() -> None:
    face = start(1).optimizer
    with pytest.raises(AttributeError, match="'DeepSpeedZeroOptimizer' object has no attribute 'bit16'"):
        face.bit16  # noqa: B018
    copy.copy(face)  # asks for names before there is anything


def test_names_that_clients_read_are_there() -> None:
    face = start(2).optimizer
    names = """
        bit16_groups bit16_groups_flat single_partition_of_fp32_groups averaged_gradients groups_padding partition_count
        partition_size partition_gradients cpu_offload loss_scaler overflow clip_grad param_names dp_process_group
        real_dp_process_group offloaded_states step zero_grad state_dict load_state_dict refresh_fp32_params
        update_lp_params set_lr get_lr override_loss_scale scaled_global_norm destroy state param_groups loss_scale
        cur_scale optimizer _global_grad_norm
    """.split()  # noqa: SIM905, as in the core's test
    assert [name for name in names if not hasattr(face, name)] == []
    assert not set(names) & set(MISSING)


def test_other_norms_are_refused() -> None:
    with pytest.raises(EngineError, match="norm_type is inf"):
        start(1).optimizer.scaled_global_norm(norm_type=float("inf"))


def test_clipping_is_that_of_the_face() -> None:
    engine = start(2)
    engine.optimizer.clip_grad = 0.5
    assert engine.report()["clipping"] == "norm above 0.5"


@pytest.mark.parametrize("stage", [1, 2])
def test_the_accessors_of_the_engine(stage: int) -> None:
    engine = start(stage)
    assert engine.zero_optimization()
    assert engine.zero_optimization_stage() == stage
    assert engine.zero_optimization_partition_gradients() is (stage == 2)
    assert not engine.zero_optimization_partition_weights()
    assert not engine.zero_cpu_offload()
    assert engine.zero_reduce_bucket_size() == 7
    with pytest.raises(NotBuiltError, match="no_sync is not built") as caught:
        engine.no_sync()
    assert "from stage 2 on a rank keeps its share alone" in caught.value.fix
