"""Optimizer state through a checkpoint: every kind of slot torch's optimizers have, bit for bit."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import WEIGHT, Chunk, LogicalTensor, Piece, Snapshot
from ds_core.optim.slots import check_groups, group_state, merge_values, restore_optimizer, slot_pieces, slot_values

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {"matrix": (4, 3), "row": (1, 5), "column": (5, 1), "vector": (6,), "scalar": (), "empty": (0, 2)}

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "SGD without momentum": (torch.optim.SGD, {"lr": 0.1}),
    "fused AdamW": (torch.optim.AdamW, {"fused": True}),
    "Adam amsgrad": (torch.optim.Adam, {"amsgrad": True, "foreach": False}),
    "Adam with a tensor as lr": (torch.optim.Adam, {"lr": torch.tensor(0.01), "foreach": False}),
    "Adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    "RMSprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "NAdam": (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {}),
    "Rprop": (torch.optim.Rprop, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "Adamax": (torch.optim.Adamax, {}),
}


def build(name: str, **changes: object) -> tuple[torch.optim.Optimizer, list[Piece]]:
    """Return an optimizer with two groups, and the identity of its tensors."""
    cls, options = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(1)
    pieces = [
        Piece(
            LogicalTensor(key, WEIGHT, shape, "float32"),
            Chunk.whole(shape),
            torch.randn(shape, generator=generator).requires_grad_(),
        )
        for key, shape in SHAPES.items()
    ]
    tensors = [piece.data for piece in pieces]
    groups = [{"params": tensors[:2]}, {"params": tensors[2:], "lr": 0.02}]
    return cls(groups, **{**copy.deepcopy(options), **changes}), pieces


def run(optimizer: torch.optim.Optimizer, pieces: list[Piece], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for piece in pieces:
            gradient = torch.randn(piece.data.shape, generator=generator)
            # One has no gradient at first, and so no state; torch's Adafactor divides by the number of elements.
            unused = piece.of.name == "vector" and step == 0
            unused |= piece.of.name == "empty" and isinstance(optimizer, torch.optim.Adafactor)
            piece.data.grad = None if unused else gradient
        optimizer.step()


def save(optimizer: torch.optim.Optimizer, pieces: list[Piece], folder: Path) -> dict:
    state = json.loads(
        json.dumps(
            {"groups": group_state(optimizer, pieces), "values": slot_values(optimizer, pieces)}, allow_nan=False
        )
    )
    PlainCheckpoint(None, None).save(
        folder, "tag", Snapshot([*pieces, *slot_pieces(optimizer, pieces)], state, {}), latest=True
    )
    return state


def load(optimizer: torch.optim.Optimizer, pieces: list[Piece], folder: Path, state: dict) -> None:
    check_groups(optimizer, pieces, state["groups"])
    with PlainCheckpoint(None, None).open(folder, "tag") as reader:
        reader.read(pieces)
        restore_optimizer(optimizer, pieces, reader, state["groups"], state["values"])


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and a == b


def differing(one: tuple[torch.optim.Optimizer, list[Piece]], two: tuple[torch.optim.Optimizer, list[Piece]]) -> list:
    """Return the slots and options in which they differ."""
    found = []
    for a, b in zip(one[1], two[1], strict=True):
        mine, theirs = one[0].state.get(a.data, {}), two[0].state.get(b.data, {})
        found += [(a.of.name, "slots", list(mine), list(theirs))] if mine.keys() != theirs.keys() else []
        found += [(a.of.name, slot) for slot in mine.keys() & theirs.keys() if not same(mine[slot], theirs[slot])]
        found += [(a.of.name, "weight")] if not torch.equal(a.data, b.data) else []
    for mine, theirs in zip(one[0].param_groups, two[0].param_groups, strict=True):
        found += [key for key in mine if key != "params" and not same(mine[key], theirs[key])]
    return found


@pytest.mark.parametrize("saved_at", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_bit_for_bit(name, saved_at, tmp_path):
    original = build(name)
    run(*original, range(saved_at))
    state = save(*original, tmp_path)
    resumed = build(name)
    run(*resumed, range(7, 9))  # what it has of its own must be gone afterwards
    resumed[0].param_groups[0]["lr"] = 123.0
    load(*resumed, tmp_path, state)
    assert differing(original, resumed) == []
    run(*original, range(saved_at, saved_at + 3))
    run(*resumed, range(saved_at, saved_at + 3))
    assert differing(original, resumed) == []


def test_options_that_the_checkpoint_does_not_have_stay(tmp_path):
    original = build("Adam amsgrad", weight_decay=0.25)
    run(*original, range(2))
    state = save(*original, tmp_path)
    for group in state["groups"]:
        del group["options"]["decoupled_weight_decay"], group["options"]["eps"]
    resumed = build("Adam amsgrad", eps=1e-3)
    load(*resumed, tmp_path, state)
    for group in resumed[0].param_groups:
        assert (group["eps"], group["weight_decay"], group["decoupled_weight_decay"]) == (1e-3, 0.25, False)
        assert group["params"] == [piece.data for piece in resumed[1] if piece.data in set(group["params"])]
    run(*resumed, range(2, 3))


def with_odd_slots(slots: dict[str, torch.Tensor]) -> tuple[torch.optim.Optimizer, list[Piece]]:
    optimizer, pieces = build("SGD")
    optimizer.state[pieces[0].data].update({name: value.clone() for name, value in slots.items()})
    return optimizer, pieces


def test_slots_that_torch_would_cast_keep_their_dtype(tmp_path):
    slots = {
        "exact": torch.full((4, 3), 1 / 3, dtype=torch.float64),
        "low": torch.ones(4, 3, dtype=torch.bfloat16),
        "count": torch.tensor(2**53 + 1),
        "mask": torch.ones(4, 3, dtype=torch.bool),
    }
    state = save(*with_odd_slots(slots), tmp_path)
    optimizer, pieces = build("SGD")
    load(optimizer, pieces, tmp_path, state)
    loaded = optimizer.state[pieces[0].data]
    assert loaded.keys() == slots.keys()
    assert all(same(loaded[name], value) for name, value in slots.items())


def test_slots_follow_a_parameter_that_has_another_dtype_now(tmp_path):
    slots = {"average": torch.full((4, 3), 1 / 3), "count": torch.tensor(2**53 + 1)}
    state = save(*with_odd_slots(slots), tmp_path)
    optimizer, pieces = build("SGD")
    low = [replace(piece, data=piece.data.detach().bfloat16().requires_grad_()) for piece in pieces]
    for group, own in zip(optimizer.param_groups, (low[:2], low[2:]), strict=True):
        group["params"] = [piece.data for piece in own]
    load(optimizer, low, tmp_path, state)
    loaded = optimizer.state[low[0].data]
    assert same(loaded["average"], slots["average"].bfloat16())
    assert same(loaded["count"], slots["count"])


def test_a_slot_of_another_shape_belongs_to_the_whole_parameter():
    optimizer, pieces = build("Adafactor")
    run(optimizer, pieces, range(1, 2))
    found = {(piece.of.name, piece.of.kind): piece for piece in slot_pieces(optimizer, pieces)}
    assert found["matrix", "row_var"].of.shape == (4, 1)
    assert found["matrix", "col_var"].of.shape == (1, 3)
    assert found["matrix", "step"].of.shape == ()
    assert found["vector", "variance"].chunk == Chunk.whole((6,))
    assert all(piece.data.numel() == piece.chunk.length for piece in found.values())


def shards(scalar: float | None) -> tuple[torch.optim.Optimizer, list[Piece]]:
    """Return what a rank updates of a scalar, nothing or all of it, and of a vector, one element."""
    parts = {"scalar": [] if scalar is None else [scalar], "vector": [1.0]}
    chunks = {
        "scalar": Chunk(Chunk.whole(()).box, 0, len(parts["scalar"])),
        "vector": Chunk(Chunk.whole((6,)).box, 4, 1),
    }
    pieces = [
        Piece(LogicalTensor(name, WEIGHT, SHAPES[name], "float32"), chunks[name], torch.tensor(part).requires_grad_())
        for name, part in parts.items()
    ]
    return torch.optim.AdamW([piece.data for piece in pieces], fused=True), pieces


@pytest.mark.parametrize("scalar", [None, 2.0])
def test_a_rank_with_none_of_a_scalar_has_its_whole_step_count(scalar, tmp_path):
    original = build("fused AdamW")
    run(*original, range(2))
    state = save(*original, tmp_path)
    expected = original[0].state[original[1][4].data]
    state["groups"] = [{**state["groups"][0], "names": ["scalar", "vector"]}]
    optimizer, pieces = shards(scalar)
    with PlainCheckpoint(None, None).open(tmp_path, "tag") as reader:
        restore_optimizer(optimizer, pieces, reader, state["groups"], state["values"])
    loaded = optimizer.state[pieces[0].data]
    assert same(loaded["step"], torch.tensor(2.0))
    assert same(loaded["exp_avg"], expected["exp_avg"].reshape(1)[: pieces[0].data.numel()])
    found = {piece.of.kind: piece for piece in slot_pieces(optimizer, pieces) if piece.of.name == "scalar"}
    assert {piece.of.shape for piece in found.values()} == {()}
    assert (found["step"].chunk, found["exp_avg"].chunk) == (Chunk.whole(()), pieces[0].chunk)


def test_one_element_of_a_count_is_not_one_of_the_parameter():
    optimizer, pieces = shards(None)
    optimizer.state[pieces[0].data] = {"count": torch.zeros(1), "moment": torch.zeros(0)}
    optimizer.state[pieces[1].data] = {"count": torch.ones(1), "moment": torch.ones(1)}
    found = {(piece.of.name, piece.of.kind): piece for piece in slot_pieces(optimizer, pieces)}
    # Another rank has the beginning of the vector, and with it the count.
    assert ("vector", "count") not in found
    assert found["vector", "moment"].of.shape == (6,)
    assert found["scalar", "count"].of.shape == (1,)
    assert found["scalar", "moment"].of.shape == ()


def test_values_come_from_ranks_that_have_elements_and_first_from_the_beginning():
    optimizer, pieces = shards(None)
    for piece in pieces:
        optimizer.state[piece.data]["steps"] = 3
    assert slot_values(optimizer, pieces) == {"vector": {"steps": 3}}
    first, second = {"vector": {"steps": 3}, "scalar": {"steps": 1}}, {"vector": {"steps": 4}, "matrix": {"steps": 5}}
    assert merge_values([{}, first, second]) == {**second, **first}
    assert merge_values([]) == {}


def test_no_state_is_loaded_for_tensors_of_other_ranks(tmp_path):
    original = build("Adafactor")
    run(*original, range(1, 2))
    state = save(*original, tmp_path)
    optimizer, pieces = build("Adafactor")
    elsewhere = {piece.data for piece in pieces if piece.of.name in ("row", "vector")}
    with PlainCheckpoint(None, None).open(tmp_path, "tag") as reader:
        restore_optimizer(optimizer, pieces, reader, state["groups"], state["values"], elsewhere=elsewhere)
    assert {piece.of.name for piece in pieces if piece.data in optimizer.state} == {"matrix", "column", "scalar"}
    run(optimizer, pieces, range(2, 3))


def test_nothing_is_made_up_for_a_tensor_without_state():
    optimizer, pieces = build("fused AdamW")
    assert slot_pieces(optimizer, pieces) == []
    assert slot_values(optimizer, pieces) == {}
    assert len(optimizer.state) == 0, "looking must not create entries"


@pytest.mark.parametrize(
    ("here", "there"), [({"fused": True}, {"foreach": True}), ({"foreach": False}, {"fused": True})]
)
def test_how_an_update_is_computed_is_this_machines_choice(here, there, tmp_path):
    original = build("Adam amsgrad", **{"foreach": None, **there})
    run(*original, range(2))
    state = save(*original, tmp_path)
    assert not {"fused", "foreach", "capturable", "differentiable", "params"} & set(state["groups"][0]["options"])
    resumed = build("Adam amsgrad", **{"foreach": None, **here})
    before = [{key: group[key] for key in ("fused", "foreach", "capturable")} for group in resumed[0].param_groups]
    load(*resumed, tmp_path, state)
    assert [
        {key: group[key] for key in ("fused", "foreach", "capturable")} for group in resumed[0].param_groups
    ] == before
    assert [group["lr"] for group in resumed[0].param_groups] == [0.001, 0.02]
    run(*resumed, range(2, 4))


def test_groups_of_other_parameters_are_refused():
    optimizer, pieces = build("SGD")
    saved = group_state(optimizer, pieces)
    check_groups(optimizer, pieces, saved)
    check_groups(optimizer, pieces, [{**group, "names": group["names"][::-1]} for group in saved])
    with pytest.raises(CheckpointError) as caught:
        check_groups(optimizer, pieces, saved[:1])
    assert caught.value.what == "the checkpoint has 1 parameter groups, this optimizer 2"
    moved = [{**saved[0], "names": ["matrix"]}, {**saved[1], "names": ["row", *saved[1]["names"]]}]
    with pytest.raises(CheckpointError) as caught:
        check_groups(optimizer, pieces, moved)
    assert caught.value.what == "group 0 of the optimizer differs: only in the checkpoint nothing, only here 'row'"
    assert "load_optimizer_states=False" in caught.value.fix


def test_order_inside_a_group_does_not_matter(tmp_path):
    original = build("fused AdamW")
    run(*original, range(2))
    state = save(*original, tmp_path)
    _, pieces = build("fused AdamW")
    tensors = [piece.data for piece in pieces]
    turned = torch.optim.AdamW([{"params": tensors[1::-1]}, {"params": tensors[:1:-1], "lr": 0.02}], fused=True)
    order = [1, 0, 5, 4, 3, 2]
    load(turned, [pieces[place] for place in order], tmp_path, state)
    assert differing(original, (turned, pieces)) == []


def test_a_slot_that_is_called_as_a_kind_of_ours_is_refused():
    optimizer, pieces = build("SGD")
    optimizer.state[pieces[0].data] = {"master": torch.zeros(4, 3)}
    with pytest.raises(CheckpointError, match="calls a state 'master'") as caught:
        slot_pieces(optimizer, pieces)
    assert caught.value.where == "parameter 'matrix'"


def test_state_and_options_that_cannot_be_stored_are_named():
    optimizer, pieces = build("SGD")
    optimizer.state[pieces[0].data] = {"callback": print}
    with pytest.raises(CheckpointError) as caught:
        slot_values(optimizer, pieces)
    assert caught.value.where == "optimizer state 'callback' of 'matrix'"
    optimizer.param_groups[1]["hook"] = print
    with pytest.raises(CheckpointError) as caught:
        group_state(optimizer, pieces)
    assert caught.value.where == "optimizer group 1, option 'hook'"


def test_a_group_added_behind_the_engines_back_is_named():
    optimizer, pieces = build("SGD")
    optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    with pytest.raises(CheckpointError, match="group 2 of the optimizer holds a tensor"):
        group_state(optimizer, pieces)


def load_saved_by(
    saved_by: str | None, optimizer: torch.optim.Optimizer, pieces: list[Piece], folder: Path, state: dict
) -> None:
    with PlainCheckpoint(None, None).open(folder, "tag") as reader:
        reader.read(pieces)
        restore_optimizer(optimizer, pieces, reader, state["groups"], state["values"], saved_by)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("steps_here", [0, 2])
def test_what_another_optimizer_kept_is_left_out(steps_here, tmp_path, caplog):
    original = build("fused AdamW")
    run(*original, range(2))
    state = save(*original, tmp_path)
    resumed = build("SGD", lr=3.0)
    run(*resumed, range(steps_here))
    options = set(resumed[0].param_groups[0])
    load_saved_by("AdamW", *resumed, tmp_path, state)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "optimizer is AdamW, this job's is SGD: its state (exp_avg, exp_avg_sq, step)" in caplog.text
    assert "options amsgrad, betas, decoupled_weight_decay, eps; SGD starts anew" in caplog.text
    assert len(resumed[0].state) == 0
    assert [set(group) for group in resumed[0].param_groups] == [options, options]
    assert [group["lr"] for group in resumed[0].param_groups] == [0.001, 0.02], "what both have is the checkpoint's"
    run(*resumed, range(2, 3))
    assert {piece.of.kind for piece in slot_pieces(*resumed)} == {"momentum_buffer"}


@pytest.mark.parametrize("saved_by", ["AdamW", "Adam", "FasterAdamW", None])
def test_the_state_of_the_same_kind_of_optimizer_is_kept(saved_by, tmp_path, caplog):
    original = build("fused AdamW")
    run(*original, range(2))
    state = save(*original, tmp_path)
    resumed = build("fused AdamW")
    load_saved_by(saved_by, *resumed, tmp_path, state)
    assert differing(original, resumed) == []
    told = f"the checkpoint's optimizer is {saved_by}, this job's is AdamW: its state is loaded"
    assert warnings_of(caplog) == ([] if saved_by in ("AdamW", None) else [told])
