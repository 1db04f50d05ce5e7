"""Checkpoints written from the description of the format give the tensors they were made of, whatever the layout."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import shutil
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ds_ckpt
from ds_ckpt.formats.deepspeed import is_deepspeed, jsonable, layout, read_deepspeed, torchfile, universal
from ds_ckpt.formats.deepspeed.stage0 import assign
from ds_ckpt.formats.deepspeed.torchfile import TorchFile
from ds_ckpt.formats.deepspeed.values import Global, Record
from ds_ckpt.loading import StoredReader
from ds_core.checkpoint.jsonable import decode
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import Chunk, Piece


def _module(name: str) -> Any:
    # Tests are no package (--import-mode=importlib), so a file beside is loaded by its path.
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


w = _module("deepspeed_writer")
WORLDS = pytest.mark.parametrize("world", [1, 2, 3, 4])


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def example(stored: torch.dtype = torch.float32) -> Any:
    """Tied, frozen, two groups, sizes that nothing divides, one without elements, a scalar."""
    return w.Model(
        groups=[
            {
                "emb.weight": tensor(11, 5),
                "none.weight": tensor(0, 3),
                "l1.weight": tensor(7, 5),
                "l2.weight": tensor(5, 3),
                "gain": tensor(seed=4),
            },
            {"l1.bias": tensor(7), "l2.bias": tensor(5)},
        ],
        frozen={"fz.weight": tensor(3, 7), "fz.bias": tensor(3)},
        buffers={"scale": torch.tensor([1.5]), "mask": torch.ones(3, 4).tril().bool().t(), "count": torch.tensor(7)},
        aliases={"head.weight": "emb.weight"},
        stored=stored,
    )


def read_all(folder: Path) -> tuple[dict[tuple[str, str], torch.Tensor], Any]:
    stored = read_deepspeed(folder)
    with StoredReader(stored) as reader:
        pieces = [
            Piece(of, Chunk.whole(of.shape), torch.empty(of.shape, dtype=getattr(torch, of.dtype)))
            for of in reader.tensors()
        ]
        reader.read(pieces)
    return {(piece.of.name, piece.of.kind): piece.data for piece in pieces}, stored


def check(folder: Path, model: Any, *, weights: bool, frozen: bool = True, masters: bool = True) -> Any:
    found, stored = read_all(folder)
    expected = {(name, "buffer"): value for name, value in model.buffers.items()}
    if masters:
        expected |= {(name, "master"): value for name, value in model.trained.items()}
    expected |= model.slots
    if weights:
        expected |= {(name, "weight"): model.weight(name) for name in model.trained}
    if frozen:
        expected |= {(name, "weight"): model.weight(name) for name in model.frozen}
    counted = {(name, "step") for name in model.trained}
    assert set(found) - counted == set(expected)
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(found[key], value), key
    values = stored.state["optimizer"]["values"]
    for name in model.trained:
        step = found[name, "step"].reshape(()).item() if (name, "step") in found else values[name]["step"]
        assert step == float(model.step)
    groups = stored.state["optimizer"]["groups"]
    assert [set(group["names"]) for group in groups] == [set(group) for group in model.groups]
    return stored


def options_of(stored: Any) -> list[Any]:
    return [
        {key: decode(value) for key, value in group["options"].items()} for group in stored.state["optimizer"]["groups"]
    ]


@WORLDS
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("round_robin", [False, True])
def test_partitions(world: int, stage: int, round_robin: bool, tmp_path: Path) -> None:
    model = example(torch.bfloat16)
    w.write_partitions(tmp_path / "t", model, world, stage=stage, round_robin=round_robin, prefix="bf16_")
    stored = check(tmp_path / "t", model, weights=True)
    assert (stored.world_size, stored.state["stage"], stored.state["precision"]) == (world, stage, "Bf16")
    assert options_of(stored)[1] == {"lr": 0.2, "betas": (0.9, 0.98), "weight_decay": 0.0}


@WORLDS
@pytest.mark.parametrize("sub_group_size", [1, 8, 20, 10**9])
def test_slices(world: int, sub_group_size: int, tmp_path: Path) -> None:
    model = example(torch.float16)
    w.write_slices(tmp_path / "t", model, world, sub_group_size=sub_group_size)
    stored = check(tmp_path / "t", model, weights=False)
    assert (stored.world_size, stored.state["stage"], stored.state["excluded"]) == (world, 3, [])
    assert [options["weight_decay"] for options in options_of(stored)] == [0.01, 0.0]


@WORLDS
def test_the_optimizer_that_accumulates_in_fp32_keeps_its_padding(world: int, tmp_path: Path) -> None:
    model = example(torch.bfloat16)
    w.write_partitions(tmp_path / "t", model, world, stage=1, bf16_optimizer=True, prefix="bf16_")
    assert check(tmp_path / "t", model, weights=True).state["stage"] == 1


@WORLDS
def test_elastic_checkpoints_have_no_options(world: int, tmp_path: Path) -> None:
    model = example()
    w.write_partitions(tmp_path / "t", model, world, elastic=True)
    assert options_of(check(tmp_path / "t", model, weights=True)) == [{}, {}]


@pytest.mark.parametrize("zipped", [True, False])
def test_old_files_lack_keys_and_have_other_names(zipped: bool, tmp_path: Path) -> None:
    model = example()
    model.step = 7
    w.write_partitions(tmp_path / "t", model, 2, old_names=True, zipped=zipped)
    stored = check(tmp_path / "t", model, weights=True)
    assert stored.state["global_samples"] == 8 * 8


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_ranks_are_in_the_order_of_their_numbers(count: int, tmp_path: Path) -> None:
    model = example()
    w.write_partitions(tmp_path / "partitions", model, count)
    check(tmp_path / "partitions", model, weights=True)
    w.write_slices(tmp_path / "slices", model, count)
    check(tmp_path / "slices", model, weights=False)


def test_excluded_parameters_are_not_there(tmp_path: Path) -> None:
    model = example()
    w.write_partitions(tmp_path / "partitions", model, 2, excluded=True)
    check(tmp_path / "partitions", model, weights=True, frozen=False)
    w.write_slices(tmp_path / "slices", model, 2, excluded=True)
    check(tmp_path / "slices", model, weights=False, frozen=False)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("sub_group_size", [8, 10**9])
def test_universal_folders(stage: int, sub_group_size: int, tmp_path: Path) -> None:
    model = example()
    w.write_universal(tmp_path / "t", model, stage=stage, sub_group_size=sub_group_size)
    assert is_deepspeed(tmp_path / "t")
    stored = check(tmp_path / "t", model, weights=stage < 3, frozen=stage < 3)
    # Every group keeps its own options.
    assert [options["weight_decay"] for options in options_of(stored)] == [0.01, 0.0]
    if stage == 3:
        assert stored.state["excluded"] == sorted(model.frozen)


def plain_optimizer(model: Any, groups: list[list[str]]) -> dict[str, Any]:
    numbers = iter(range(100))
    members = [[next(numbers) for _ in group] for group in groups]
    flat = [name for group in groups for name in group]
    return {
        "state": {
            index: {"step": model.step, **{slot: model.slots[name, slot] for slot in w.SLOTS}}
            for index, name in enumerate(flat)
        },
        "param_groups": [{**model.options(index), "params": each} for index, each in enumerate(members)],
    }


def whole(stored: torch.dtype = torch.float32) -> Any:
    """One group, nothing frozen, tied."""
    model = example(stored)
    return w.Model([model.trained], buffers=model.buffers, aliases=model.aliases, stored=stored)


def write_stage0(folder: Path, model: Any, optimizer: Any, **changes: Any) -> Path:
    folder.mkdir()
    value = w.model_states(model, 2, optimizer=optimizer, **changes)
    w.save(value, folder / "mp_rank_00_model_states.pt")
    return folder


def test_stage_0_with_a_plain_optimizer(tmp_path: Path) -> None:
    model = whole()
    folder = write_stage0(tmp_path / "t", model, plain_optimizer(model, [list(model.trained)]))
    stored = check(folder, model, weights=True, masters=False)
    assert (stored.state["stage"], stored.state["precision"], stored.world_size) == (0, "Fp32", 2)
    assert stored.state["client_state"] == {"epoch": 3, "ds_version": "0.19.6"}


def test_stage_0_with_the_fused_wrapper(tmp_path: Path) -> None:
    model = whole(torch.float16)

    def flat(tensors: Any) -> torch.Tensor:
        return torch.cat([each.reshape(-1) for each in tensors])

    slots = {slot: flat(model.slots[name, slot] for name in model.trained) for slot in w.SLOTS}
    optimizer = {
        "dynamic_loss_scale": True,
        "cur_scale": 256.0,
        "cur_iter": 8,
        "last_overflow_iter": 3,
        "scale_factor": 2.0,
        "scale_window": 100,
        "optimizer_state_dict": {
            "state": {0: {"step": model.step, **slots}},
            "param_groups": [{**model.options(0), "params": [0]}],
        },
        "fp32_groups_flat": [flat(model.trained.values())],
        "clip_grad": 1.0,
    }
    folder = write_stage0(tmp_path / "t", model, optimizer)
    state = check(folder, model, weights=True).state
    assert (state["precision"], state["loss_scale"]) == ("Fp16", 256.0)
    assert state["scaler"] == {"scale": 256.0, "iteration": 8, "last_overflow_iteration": 3}


def test_stage_0_with_the_unfused_wrapper(tmp_path: Path) -> None:
    model = whole(torch.bfloat16)
    optimizer = {
        "dynamic_loss_scale": False,
        "cur_scale": 1.0,
        "cur_iter": 8,
        "optimizer_state_dict": plain_optimizer(model, [list(model.trained)]),
        "fp32_groups": [list(model.trained.values())],
    }
    folder = write_stage0(tmp_path / "t", model, optimizer, ds_config={"bf16": {"enabled": True}})
    state = check(folder, model, weights=True).state
    assert (state["precision"], state["loss_scale"], state["scaler"]) == ("Bf16", 1.0, {})
    assert state["plan"] == {"stored": "bfloat16", "reduce": "bfloat16", "master": "float32"}


def test_stage_0_groups_whose_shapes_tell_who_is_who(tmp_path: Path) -> None:
    model = example()
    folder = write_stage0(tmp_path / "t", model, plain_optimizer(model, [list(group) for group in model.groups]))
    check(folder, model, weights=True, masters=False)


def test_stage_0_groups_that_cannot_be_told_apart_leave_the_weights(tmp_path: Path) -> None:
    model = w.Model([{"a.weight": tensor(3), "b.weight": tensor(3)}, {"a.bias": tensor(3)}])
    names = ["a.weight", "b.weight"], ["a.bias"]
    folder = write_stage0(tmp_path / "t", model, plain_optimizer(model, [list(each) for each in names]))
    found, stored = read_all(folder)
    assert set(found) == {(name, "weight") for name in model.trained}
    assert "optimizer" not in stored.state
    assert "numbers the parameters of a stage-0 optimizer" in stored.state["optimizer_missing"]


def test_stage_0_without_an_optimizer(tmp_path: Path) -> None:
    model = whole()
    found, stored = read_all(write_stage0(tmp_path / "t", model, None, dp_world_size=4))
    assert {kind for _, kind in found} == {"weight", "buffer"}
    assert "optimizer" not in stored.state
    assert "optimizer_missing" not in stored.state


@given(st.lists(st.integers(0, 3), max_size=9), st.data())
@settings(max_examples=200, deadline=None)
def test_assignments_are_found_exactly_if_there_is_one(kinds: list[int], data: st.DataObject) -> None:
    candidates = {f"p{index}": (kind,) for index, kind in enumerate(kinds)}
    owners = [data.draw(st.integers(-1, 2)) for _ in kinds]
    truth = [[f"p{i}" for i, owner in enumerate(owners) if owner == group] for group in range(3)]
    groups = [[candidates[name] for name in names] for names in truth]
    ways: list[list[list[str]]] = []

    def search(index: int, taken: list[list[str]]) -> None:
        if index == len(kinds):
            if [len(names) for names in taken] == [len(group) for group in groups]:
                ways.append([list(names) for names in taken])
            return
        search(index + 1, taken)
        for group, names in zip(groups, taken, strict=True):
            if len(names) < len(group) and group[len(names)] == (kinds[index],):
                names.append(f"p{index}")
                search(index + 1, taken)
                names.pop()

    search(0, [[], [], []])
    found = assign(candidates, groups)
    assert truth in ways
    assert (found == truth) if len(ways) == 1 else isinstance(found, str)


def test_an_assignment_that_does_not_fit_is_told() -> None:
    assert "no assignment" in str(assign({"a": (2,)}, [[(3,)]]))
    assert "no assignment" in str(assign({"a": (2,)}, [[(2,), (2,)]]))
    assert "no assignment" in str(assign({"a": (2,), "b": (3,)}, [[(3,)], [(3,)]]))
    assert assign({"a": (2,), "b": (3,)}, [[(3,)], [(2,)]]) == [["b"], ["a"]]
    many = {f"p{index}": (1,) for index in range(5000)}
    assert "more than one" in str(assign(many, [[(1,)] * 2000, [(1,)] * 2000]))


def test_a_scaler_that_moves(tmp_path: Path) -> None:
    model = example(torch.float16)
    values = {
        "cur_scale": 1024,
        "cur_iter": 8,
        "last_overflow_iter": 2,
        "scale_factor": 2.0,
        "scale_window": 100,
        "min_scale": 1,
        "delayed_shift": 2,
        "cur_hysteresis": 1,
        "consecutive_hysteresis": False,
        "raise_error_at_min_scale": True,
        "dynamic": True,
        "dtype": torch.float16,
    }
    w.write_partitions(tmp_path / "t", model, 2, scaler=w.DynamicLossScaler(**values))
    state = check(tmp_path / "t", model, weights=True).state
    assert (state["precision"], state["loss_scale"]) == ("Fp16", 1024.0)
    assert state["scaler"] == {"scale": 1024.0, "iteration": 8, "last_overflow_iteration": 2, "hysteresis": 1}


def test_client_state_comes_back(tmp_path: Path) -> None:
    model = example()
    mine = {
        "best": {"loss": 0.5, 3: (1, float("inf"))},
        "rng": torch.arange(20, dtype=torch.uint8),
        "order": OrderedDict(a=1),
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
    }
    w.write_partitions(tmp_path / "t", model, 2, **mine)
    found = decode(read_deepspeed(tmp_path / "t").state["client_state"])
    assert torch.equal(found.pop("rng"), mine["rng"])  # type: ignore[arg-type]
    assert found == {
        "ds_version": "0.19.6",
        "epoch": 3,
        "best": mine["best"],
        "order": mine["order"],
        "args": {"lr": 0.1, "layers": [1, 2]},
    }


class OfTheCaller:
    pass


def test_a_class_of_the_caller_is_refused_by_name(tmp_path: Path) -> None:
    w.write_partitions(tmp_path / "t", example(), 2, mine={"a": [OfTheCaller()]})
    with pytest.raises(CheckpointError, match=r"OfTheCaller.* is not on the list"):
        read_deepspeed(tmp_path / "t")


def test_a_value_that_json_cannot_hold_is_missed_when_it_is_asked_for(tmp_path: Path) -> None:
    model = example()
    large = torch.zeros(2**18 + 1)
    module = OrderedDict([*model.module().items(), ("l1._extra_state", large), ("_extra_state", (1,))])
    w.write_partitions(tmp_path / "t", model, 2, mine={"a": [torch.float16]}, large=large, module=module)
    state = check(tmp_path / "t", model, weights=True).state
    assert decode(state["extra_state"]) == {"": (1,)}
    assert state["extra_state_missing"].keys() == {"l1"}
    with ds_ckpt.open(tmp_path / "t") as reader:
        found = reader.client_state
    assert found == {"ds_version": "0.19.6", "epoch": 3}
    reasons = {"mine": r"type torch\.float16 .*client_state\.mine\.a\[0\]", "large": "tensor of 1048580 bytes"}
    for key, why in reasons.items():
        assert key in found
        with pytest.raises(CheckpointError, match=why) as caught:
            found[key]
        assert caught.value.where == f"client_state[{key!r}]"


def test_a_value_that_takes_all_there_is_room_for_takes_it_from_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonable, "_MAX_VALUES", 1000)
    w.write_partitions(tmp_path / "t", example(), 2, a=list(range(2000)))
    state = check(tmp_path / "t", example(), weights=True).state
    assert "a" in state["client_state_missing"]
    assert state["schedule"] == {"last_batch_iteration": 6}


def test_extra_state_of_modules_is_kept_apart(tmp_path: Path) -> None:
    model = example()
    module = OrderedDict([*model.module().items(), ("l1._extra_state", {"calls": 3}), ("_extra_state", (1,))])
    w.write_partitions(tmp_path / "t", model, 2, module=module)
    stored = check(tmp_path / "t", model, weights=True)
    assert decode(stored.state["extra_state"]) == {"l1": {"calls": 3}, "": (1,)}


def test_names_of_compiled_modules_are_those_of_the_model(tmp_path: Path) -> None:
    compiled = w.Model([{"_orig_mod.l1.weight": tensor(3, 3)}])
    w.write_partitions(tmp_path / "t", compiled, 2)
    stored = read_deepspeed(tmp_path / "t")
    assert {name for name, _, _ in stored.tensors} == {"l1.weight"}
    assert stored.state["optimizer"]["groups"][0]["names"] == ["l1.weight"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts": [4]}, "mixture-of-experts"),
        ({"ds_autoep_layers": [{}]}, "mixture-of-experts"),
        ({"mp_world_size": 2}, "tensor or pipeline"),
        ({"checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 2}}, "tensor or pipeline"),
        ({"module": None}, "pipeline"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(changes: Any, named: str, tmp_path: Path) -> None:
    w.write_partitions(tmp_path / "t", example(), 2, **changes)
    with pytest.raises(CheckpointError, match=named):
        read_deepspeed(tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("mp_rank_01_model_states.pt", "tensor or pipeline"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor or pipeline"),
        ("layer_00-model_states.pt", "pipeline"),
        ("layer_00-model_00-model_states.pt", "pipeline"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "mixture-of-experts"),
        ("expert_3_mp_rank_00_model_states.pt", "mixture-of-experts"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "mixture-of-experts"),
        ("offloaded_tensors", "NVMe"),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "two saves are mixed: in two precisions"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "two saves are mixed: of stage 3 and below"),
        ("zero_pp_rank_2_mp_rank_00_optim_states.pt", "left by an earlier save"),
    ],
)
def test_files_that_say_so_are_refused_by_name(name: str, named: str, tmp_path: Path) -> None:
    w.write_partitions(tmp_path / "t", example(), 2)
    (tmp_path / "t" / name).touch()
    with pytest.raises(CheckpointError, match=named):
        read_deepspeed(tmp_path / "t")


def test_experts_in_a_group_are_refused(tmp_path: Path) -> None:
    model = example()
    model.options = lambda group: {"lr": 0.1, "moe": True}
    w.write_partitions(tmp_path / "t", model, 2)
    with pytest.raises(CheckpointError, match="mixture-of-experts"):
        read_deepspeed(tmp_path / "t")


def test_missing_ranks_are_named(tmp_path: Path) -> None:
    w.write_slices(tmp_path / "t", example(), 4)
    (tmp_path / "t" / "zero_pp_rank_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"by 4 ranks and has 3 model-states files; missing is that of rank 2"):
        read_deepspeed(tmp_path / "t")
    for path in (tmp_path / "t").glob("*optim_states.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"by 4 ranks and has 0 optimizer files; missing is that of rank 0, 1"):
        read_deepspeed(tmp_path / "t")


@pytest.mark.parametrize("world", [2, 3])
def test_shards_of_another_model_are_refused(world: int, tmp_path: Path) -> None:
    other = w.Model([{"emb.weight": tensor(4, 5)}, {"bias": tensor(2)}])
    for name, write in (("partitions", w.write_partitions), ("slices", w.write_slices)):
        write(tmp_path / name, example(), world)
        write(tmp_path / "other" / name, other, world)
        shutil.copy(tmp_path / "other" / name / "zero_pp_rank_1_mp_rank_00_optim_states.pt", tmp_path / name)
        with pytest.raises(CheckpointError, match=r"elements|expected"):
            read_deepspeed(tmp_path / name)


def test_a_universal_parameter_cannot_lead_elsewhere(tmp_path: Path) -> None:
    model = w.Model([{"a": tensor(3)}])
    w.write_universal(tmp_path / "t", model, stage=2)
    changed = w.model_states(model, 2, param_shapes=[OrderedDict({"../../a": torch.Size([3])})])
    w.save(changed, tmp_path / "t" / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="cannot be a folder"):
        read_deepspeed(tmp_path / "t")
    w.save(
        w.model_states(model, 2, param_shapes=[w.shapes(model.trained)]), tmp_path / "t" / "mp_rank_00_model_states.pt"
    )
    shutil.move(tmp_path / "t" / "zero" / "a", tmp_path / "elsewhere")
    (tmp_path / "t" / "zero" / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="or a link"):
        read_deepspeed(tmp_path / "t")


def edited(folder: Path, edit: Any) -> None:
    """Change the inner dictionary of rank 0's optimizer file."""
    path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    with w.its_classes():
        value = torch.load(path, weights_only=False)
    edit(value["optimizer_state_dict"])
    w.save(value, path)


def longer(inner: Any) -> None:
    inner["single_partition_of_fp32_groups"][0] = torch.zeros(1000)


def with_gaps(inner: Any) -> None:
    inner["single_partition_of_fp32_groups"] = [
        part.repeat_interleave(2)[::2] for part in inner["single_partition_of_fp32_groups"]
    ]


def square(inner: Any) -> None:
    state = inner["base_optimizer_state"]["state"][0]
    state["exp_avg"] = state["exp_avg"].view(-1, 2)


def without_slot(inner: Any) -> None:
    del inner["base_optimizer_state"]["state"][0]["exp_avg"]


def of_another_dtype(inner: Any) -> None:
    inner["base_optimizer_state"]["state"][0]["exp_avg"] = inner["base_optimizer_state"]["state"][0]["exp_avg"].half()


def of_another_stage(inner: Any) -> None:
    inner["zero_stage"] = w.ZeroStageEnum.optimizer_states


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (longer, "elements on all ranks together"),
        (with_gaps, "one dimension without gaps"),
        (square, "one dimension without gaps"),
        (without_slot, "it on rank 0 as well"),
        (of_another_dtype, "one dtype on all ranks, not float16, float32"),
        (of_another_stage, "as in the file of rank 0"),
    ],
)
def test_ranks_must_agree(edit: Any, named: str, tmp_path: Path) -> None:
    w.write_partitions(tmp_path / "t", example(), 2)
    edited(tmp_path / "t", edit)
    with pytest.raises(CheckpointError, match=named):
        read_deepspeed(tmp_path / "t")


def test_every_sub_group_belongs_to_one_group(tmp_path: Path) -> None:
    def without(inner: Any) -> None:
        inner["optimizer_state_dict"]["param_groups"].pop()

    def twice(inner: Any) -> None:
        inner["optimizer_state_dict"]["param_groups"][1]["params"] = [0]

    for edit, named in ((without, "all 2 sub-groups"), (twice, "every sub-group once")):
        w.write_slices(tmp_path / edit.__name__, example(), 2)
        edited(tmp_path / edit.__name__, edit)
        with pytest.raises(CheckpointError, match=named):
            read_deepspeed(tmp_path / edit.__name__)


def test_a_step_may_have_one_dimension(tmp_path: Path) -> None:
    model = example()
    model.step = torch.tensor([7.0])
    w.write_partitions(tmp_path / "t", model, 2)
    check(tmp_path / "t", model, weights=True)


JUNK: list[Any] = [None, True, -1, 2**61, 10**30, 1.5, "x", "../x", b"x", [], [1], [[]], (), (-1,), (2**40, 2**40)]
JUNK += [{}, {1: 2}, {"a": {}}, set(), Global("torch", "float16"), Record(Global("argparse", "Namespace"), {"a": 1})]


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value inside."""
    inner = value.fields if type(value) is Record else value
    if not isinstance(inner, dict | list):
        return []
    keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
    return [(inner, key) for key in keys] + [place for key in keys for place in places_in(inner[key])]


@pytest.mark.parametrize("kind", ["partitions", "slices", "universal 2", "universal 3", "stage 0"])
def test_files_with_other_values_are_read_or_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Well-formed files whose values are not what they should be; 200 of each kind."""
    model = example()
    if kind == "stage 0":
        write_stage0(tmp_path / "t", model, plain_optimizer(model, [list(group) for group in model.groups]))
    elif kind.startswith("universal"):
        w.write_universal(tmp_path / "t", model, stage=int(kind[-1]))
    else:
        {"partitions": w.write_partitions, "slices": w.write_slices}[kind](tmp_path / "t", model, 2)
    rng, number = random.Random(1), len(list((tmp_path / "t").rglob("*.pt")))
    parsed: dict[str, TorchFile] = {}

    def changed(folder: Path, name: str) -> TorchFile:
        if name not in parsed:
            parsed[name] = torchfile.read_torch_file(folder, name)
        file = parsed[name]
        value = copy.deepcopy(file.value)
        places = places_in(value)
        if places and rng.random() < 1 / number:
            container, key = rng.choice(places)
            if rng.random() < 0.2:
                del container[key]
            else:
                container[key] = copy.deepcopy(rng.choice(JUNK))
        return TorchFile(file.name, file.nbytes, value)

    monkeypatch.setattr(layout, "read_torch_file", changed)
    monkeypatch.setattr(universal, "read_torch_file", changed)
    refusals = 0
    for _ in range(200):
        try:
            read_deepspeed(tmp_path / "t")
        except CheckpointError:
            refusals += 1
    assert 0 < refusals < 200
