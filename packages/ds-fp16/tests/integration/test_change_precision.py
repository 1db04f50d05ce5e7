"""A checkpoint of one precision in another: what is kept, what is cast, what starts anew, and what is said."""

from __future__ import annotations

import logging
from itertools import permutations
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import MASTER, WEIGHT
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.resume import ResumeModel, everything, start, train, unequal
from ds_core.testing.state import reset_globals

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10}},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, fp32 sums": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "autocast bf16": {"torch_autocast": {"enabled": True, "dtype": "bf16"}},
    "autocast fp16": {"torch_autocast": {"enabled": True, "dtype": "fp16"}},
}
FIRST_SCALES = {"fp16": 1024.0, "autocast fp16": 65536.0}
WITH_MASTERS = ("fp16", "bf16", "bf16, fp32 sums")
LOSS_BOUND = 2.0**-6
"""Relative. Input, weights and three products are rounded, each by at most 2**-8 in bf16, and the loss is a square:
2**-5 if all roundings went one way, which 13 terms and 3 samples do not. Measured are 2**-8 and less."""


def build(precision: str, *, seed: int = 1, **more: Any) -> Any:
    return start({**PRECISIONS[precision], **more}, seed=seed, dropout=0.0)


def name_of(precision: str) -> str:
    """Return what the engine calls it."""
    kind = precision.split(",")[0].split()[0]
    return {"fp32": "Fp32", "fp16": "Fp16", "bf16": "Bf16", "autocast": "TorchAutocast"}[kind]


def full_weights(found: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return every weight with all its digits: the master, or what has none."""
    weights = {key.removeprefix(f"{WEIGHT} "): value for key, value in found.items() if key.startswith(f"{WEIGHT} ")}
    masters = {key.removeprefix(f"{MASTER} "): value for key, value in found.items() if key.startswith(f"{MASTER} ")}
    return {**weights, **masters}


def trained_weights(found: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in full_weights(found).items() if not name.startswith("frozen.")}


def optimizer_state(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key.split()[0] in ("step", "exp_avg", "exp_avg_sq")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Train each precision two windows, save; return its folder, what it had there, and the losses it went on with."""
    found = {}
    for precision in PRECISIONS:
        reset_globals()
        folder = tmp_path_factory.mktemp("saved")
        engine = build(precision, seed=0)
        train(engine, 6, overflows={1: 0} if precision in FIRST_SCALES else None)
        engine.save_checkpoint(folder)
        had = everything(engine)
        # A fresh engine again: data goes on from where the checkpoint was.
        reset_globals()
        engine = build(precision)
        engine.load_checkpoint(folder)
        found[precision] = (folder, had, train(engine, 6))
    reset_globals()
    return found


@pytest.mark.parametrize(("by", "into"), list(permutations(PRECISIONS, 2)))
def test_masters_optimizer_and_counters_are_kept(by, into, saved, caplog):
    folder, had, losses = saved[by]
    engine = build(into)
    with caplog.at_level(logging.INFO, "ds_core"):
        engine.load_checkpoint(folder)
    loaded = everything(engine)
    mine, theirs = full_weights(loaded), full_weights(had)
    assert mine.keys() == theirs.keys()
    assert unequal(trained_weights(loaded), trained_weights(had)) == []
    for name, value in theirs.items():
        weight = loaded[f"{WEIGHT} {name}"]
        assert torch.equal(weight, value.to(weight.dtype))
        assert (weight.dtype != torch.float32) == (into in WITH_MASTERS)
    assert unequal(optimizer_state(loaded), optimizer_state(had)) == []
    for key in ("groups", "schedule", "counters", "buffer mean", "buffer count"):
        assert unequal({key: loaded[key]}, {key: had[key]}) == []
    assert engine.cur_scale == FIRST_SCALES.get(into, 1.0)
    assert any(f"{name_of(by)} -> {name_of(into)}" in text for text in caplog.messages) == (
        name_of(by) != name_of(into)
    )
    assert sum("written in another precision" in text for text in caplog.messages) == 1
    differences = [abs(a - b) / b for a, b in zip(train(engine, 6), losses, strict=True)]
    assert max(differences) <= LOSS_BOUND, differences


def test_without_the_checkpoint_losses_are_elsewhere(saved):
    """The bound tells a model that was loaded from one that was not."""
    _, _, losses = saved["bf16"]
    differences = [abs(a - b) / b for a, b in zip(train(build("bf16"), 6), losses, strict=True)]
    assert min(differences) > LOSS_BOUND


def said_while_loading(engine: Any, folder: Path, caplog: Any, **options: Any) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, "ds_core"):
        engine.load_checkpoint(folder, **options)
    return "\n".join(text for text in caplog.messages if "precision" in text)


def test_the_log_says_what_changed(saved, caplog):
    assert said_while_loading(build("fp16"), saved["bf16"][0], caplog) == (
        "the checkpoint was written in another precision: Bf16 -> Fp16; reduce dtype bfloat16 -> float16; "
        "stored dtype bfloat16 -> float16; weights are taken from the masters where there are any, and cast; "
        "optimizer state is kept; the loss scale starts anew, 1 -> 1024"
    )
    assert said_while_loading(build("bf16, fp32 sums"), saved["bf16"][0], caplog, load_optimizer_states=False) == (
        "the checkpoint was written in another precision: accumulate dtype not set -> float32; weights are taken from "
        "the masters where there are any, and cast; optimizer state is not loaded"
    )
    assert said_while_loading(build("fp32"), saved["autocast fp16"][0], caplog, load_module_only=True) == (
        "the checkpoint was written in another precision: TorchAutocast -> Fp32; autocast dtype float16 -> not set; "
        "reduce dtype float16 -> not set; weights are taken from the masters where there are any, and cast"
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_in_the_same_precision_nothing_is_said(precision, saved, caplog):
    assert said_while_loading(build(precision), saved[precision][0], caplog) == ""


# -- inside an accumulation window ------------------------------------------------------------------------------------

STATIC = {"fp16": {"enabled": True, "loss_scale": 128}}
IN_A_WINDOW = {
    "another precision": (
        PRECISIONS["bf16"],
        PRECISIONS["fp16"],
        "in Bf16, this job trains in Fp16; its unfinished gradients carry the other loss scale and dtype",
    ),
    "masters in both": (PRECISIONS["fp16"], PRECISIONS["fp32"], "in Fp16, this job trains in Fp32; its"),
    "another autocast": (
        PRECISIONS["autocast fp16"],
        PRECISIONS["autocast bf16"],
        "at loss scale 65536, this job's is 1;",
    ),
    "the other autocast": (
        PRECISIONS["autocast bf16"],
        PRECISIONS["autocast fp16"],
        "at loss scale 1, this job's is 65536;",
    ),
    "other sums": (
        PRECISIONS["bf16, fp32 sums"],
        PRECISIONS["bf16"],
        "whose gradients are float32, this job's are bfloat16",
    ),
    "another static scale": (
        STATIC,
        {"fp16": {"enabled": True, "loss_scale": 64}},
        "at loss scale 128, this job's is 64; its unfinished gradients carry the other one",
    ),
    "a static scale": (PRECISIONS["fp16"], STATIC, "at loss scale 1024, this job's is 128;"),
    "a higher minimum": (
        PRECISIONS["fp16"],
        {"fp16": {"enabled": True, "initial_scale_power": 12, "min_loss_scale": 2048}},
        "at loss scale 1024, this job's is 2048;",
    ),
}


@pytest.mark.parametrize("change", IN_A_WINDOW)
def test_a_window_goes_on_only_where_its_gradients_fit(change, tmp_path):
    by, into, message = IN_A_WINDOW[change]
    engine = start(by, seed=0, dropout=0.0)
    train(engine, 4)
    engine.save_checkpoint(tmp_path)
    had = everything(engine)
    engine = start(into, seed=1, dropout=0.0)
    before = everything(engine)
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(tmp_path)
    assert f"checkpoint was saved inside an accumulation window {message}" in str(caught.value)
    assert "save at a step boundary" in str(caught.value)
    assert unequal(everything(engine), before) == [], "nothing may change before it is refused"

    engine.load_checkpoint(tmp_path, load_optimizer_states=False)
    loaded = everything(engine)
    assert unequal(trained_weights(loaded), trained_weights(had)) == []
    assert loaded["in window"] == 0
    assert (engine.micro_steps, engine.global_steps) == (4, 1)
    assert not optimizer_state(loaded)
    assert not [key for key in loaded if key.startswith("gradient")]
    assert all(torch.isfinite(torch.tensor(train(engine, 3))))
    assert engine.global_steps == 2


@pytest.mark.parametrize("into", PRECISIONS)
def test_the_weights_alone_load_from_inside_a_window(into, tmp_path):
    engine = build("bf16", seed=0)
    train(engine, 4)
    engine.save_checkpoint(tmp_path)
    had = everything(engine)
    engine = build(into)
    before = everything(engine)
    engine.load_checkpoint(tmp_path, load_module_only=True)
    loaded = everything(engine)
    assert unequal(trained_weights(loaded), trained_weights(had)) == []
    for key in ("counters", "scaler", "schedule", "groups", "in window"):
        assert loaded[key] == before[key]
    assert all(torch.isfinite(torch.tensor(train(engine, 3))))


def test_the_sums_of_a_window_may_travel_in_another_dtype(tmp_path):
    """The reduce dtype says nothing about what has been added up so far."""
    engine = build("bf16", seed=0)
    train(engine, 4)
    engine.save_checkpoint(tmp_path)
    had = everything(engine)
    engine = build("bf16", communication_data_type="fp32")
    engine.load_checkpoint(tmp_path)
    assert unequal(everything(engine), had) == []


# -- the scaler -------------------------------------------------------------------------------------------------------


def fp16(**keys: Any) -> dict[str, Any]:
    return {"fp16": {"enabled": True, **keys}}


@pytest.mark.parametrize(
    ("saved_with", "loaded_with", "scale", "hysteresis"),
    [
        # Saved is a scale of 512 with 3 of hysteresis 4 used up, unless it says otherwise.
        ({}, {"initial_scale_power": 20}, 512.0, 1),
        ({}, {"initial_scale_power": 12, "min_loss_scale": 2048}, 2048.0, 1),
        ({"hysteresis": 8}, {"hysteresis": 2}, 1024.0, 2),
        ({}, {"loss_scale": 32}, 32.0, None),
        ({"loss_scale": 32}, {"initial_scale_power": 6, "hysteresis": 3}, 64.0, 3),
        ({"loss_scale": 32}, {"loss_scale": 16}, 16.0, None),
    ],
)
def test_the_new_configurations_settings_of_the_scaler_win(saved_with, loaded_with, scale, hysteresis, tmp_path):
    defaults = {"initial_scale_power": 10, "hysteresis": 4, "loss_scale_window": 7}
    engine = start(fp16(**{**defaults, **saved_with}), seed=0)
    train(engine, 15, overflows={0: 0, 3: 0, 6: 0, 9: 0})
    engine.save_checkpoint(tmp_path)
    engine = start(fp16(loss_scale_window=2, consecutive_hysteresis=True, **loaded_with), seed=1)
    settings = configured(engine)
    engine.load_checkpoint(tmp_path)
    assert engine.cur_scale == scale
    scaler = engine.parts.precision.scaler
    assert getattr(scaler, "cur_hysteresis", None) == hysteresis
    assert configured(engine) == settings
    assert engine.skipped_steps == 4
    train(engine, 3)
    assert engine.was_step_applied()


def configured(engine: Any) -> dict[str, Any]:
    names = (
        "min_scale",
        "scale_window",
        "delayed_shift",
        "consecutive_hysteresis",
        "raise_error_at_min_scale",
        "dynamic",
    )
    return {name: getattr(engine.parts.precision.scaler, name, None) for name in names}


def test_a_scaler_that_cannot_be_is_refused_before_anything_changes(tmp_path):
    engine = build("fp16", seed=0)
    train(engine, 3)
    engine.parts.precision.scaler.cur_hysteresis = 0
    engine.save_checkpoint(tmp_path)
    engine = build("fp16")
    before = everything(engine)
    with pytest.raises(CheckpointError, match="no loss scaler can be in this state"):
        engine.load_checkpoint(tmp_path)
    assert unequal(everything(engine), before) == []
    engine.load_checkpoint(tmp_path, load_module_only=True)


# -- parts of a model -------------------------------------------------------------------------------------------------


class Larger(ResumeModel):
    """Has one layer more."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.extra = torch.nn.Linear(3, 3)


@pytest.mark.parametrize("into", ["fp32", "bf16"])
def test_what_the_checkpoint_does_not_have_stays_with_its_digits(into, saved):
    folder, had, _ = saved["fp16"]
    engine = start(PRECISIONS[into], seed=1, model=Larger())
    own = full_weights(everything(engine))["extra.weight"]
    with pytest.raises(CheckpointError, match=r"only in the model 'extra\.bias', 'extra\.weight'"):
        engine.load_checkpoint(folder, load_optimizer_states=False)
    engine.load_checkpoint(folder, load_module_strict=False, load_optimizer_states=False)
    loaded = full_weights(everything(engine))
    assert unequal({"extra.weight": loaded["extra.weight"]}, {"extra.weight": own}) == []
    assert own.dtype == torch.float32
    assert unequal({"inner.weight": loaded["inner.weight"]}, {"inner.weight": full_weights(had)["inner.weight"]}) == []


@pytest.mark.parametrize("into", ["fp32", "fp16", "bf16"])
def test_masters_follow_what_a_custom_function_loads(into, saved):
    folder, had, _ = saved["bf16"]
    engine = build(into)
    own = full_weights(everything(engine))

    def load(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
        dst.inner.load_state_dict({name: src[f"inner.{name}"] for name in ("weight", "bias")})

    engine.load_checkpoint(folder, custom_load_fn=load)
    loaded, theirs = full_weights(everything(engine)), full_weights(had)
    low = next(engine.module.parameters()).dtype
    for name in ("inner.weight", "inner.bias"):
        # In fp32 the function is given all digits of the master.
        assert torch.equal(loaded[name], theirs[name].to(low).float())
    untouched = {"outer.weight", "outer.bias", "empty"}
    assert unequal({name: loaded[name] for name in untouched}, {name: own[name] for name in untouched}) == []
    train(engine, 3)


@pytest.mark.parametrize("precision", WITH_MASTERS)
def test_masters_follow_a_state_dict(precision):
    """The step after it starts from the loaded weights: it is that of an engine that was given them."""
    source, engine = build(precision, seed=7), build(precision)
    given = {name: value.clone() for name, value in source.module_state_dict().items()}
    engine.load_module_state_dict({"module": given})
    model = ResumeModel(0.0)
    model.load_state_dict(given)
    reset_globals()
    other = start(PRECISIONS[precision], seed=1, model=model)
    mine, expected = everything(engine), everything(other)
    assert unequal(mine, expected) == []
    assert train(engine, 3) == train(other, 3)
    assert unequal(everything(engine), everything(other)) == []


@pytest.mark.parametrize("into", WITH_MASTERS)
@pytest.mark.parametrize("given_by", ["fp32", "fp16"])
def test_masters_have_the_digits_of_a_state_dict_in_fp32(given_by, into, saved):
    given = trained_weights(saved[given_by][1])
    engine = build(into)
    engine.load_module_state_dict({"module": given}, strict=False)
    loaded = everything(engine)
    assert unequal(trained_weights(loaded), given) == []
    for name, value in given.items():
        weight = loaded[f"{WEIGHT} {name}"]
        assert weight.dtype != torch.float32
        assert torch.equal(weight, value.to(weight.dtype))
    train(engine, 3)


class Halving(ResumeModel):
    """Stores less than it is given."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.register_load_state_dict_post_hook(Halving.halve)

    def halve(self, keys: Any) -> None:
        self.outer.weight.data.mul_(0.5)


def test_masters_follow_a_model_that_changes_what_it_is_given():
    engine = start(PRECISIONS["bf16"], seed=1, model=Halving())
    engine.load_module_state_dict({"module": {"outer.weight": torch.full((1, 13), 1 / 3)}}, strict=False)
    assert everything(engine)["master outer.weight"].unique().item() == torch.tensor(1 / 6).bfloat16().item()


def test_a_state_dict_of_a_part_leaves_the_other_masters_their_digits():
    engine = build("bf16")
    own = full_weights(everything(engine))
    engine.load_module_state_dict({"module": {"outer.bias": torch.tensor([0.5])}}, strict=False)
    loaded = full_weights(everything(engine))
    assert loaded["outer.bias"].tolist() == [0.5]
    assert unequal(loaded, own) == ["outer.bias"]


@pytest.mark.parametrize(("by", "into"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")])
def test_frozen_parameters_are_stored_low_and_may_be_left_out(by, into, tmp_path):
    engine = build(by, seed=0)
    train(engine, 3)
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    had = everything(engine)
    assert "master frozen.weight" not in had
    engine = build(into)
    own = engine.module.frozen.weight.clone()
    assert own.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[into]
    engine.load_checkpoint(tmp_path)
    assert torch.equal(engine.module.frozen.weight, own)
    assert unequal(trained_weights(everything(engine)), trained_weights(had)) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tied_parameters_are_stored_once_and_stay_tied(precision, saved):
    folder, had, _ = saved[precision]
    assert not [key for key in had if "tied" in key]
    assert next(value.shape for key, value in had.items() if key.endswith(" empty")) == (0, 4)
    engine = build(precision)
    engine.load_checkpoint(folder)
    assert engine.module.tied.weight is engine.module.inner.weight
    train(engine, 3)
    assert engine.module.tied.weight is engine.module.inner.weight


class SharedBuffer(ResumeModel):
    """Two modules have one buffer."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.frozen.register_buffer("also", self.mean)


def test_buffers_have_the_dtype_they_are_to_have(tmp_path):
    low = {"data_types": {"buffer_dtype": "bf16"}}
    engines = {
        name: start({**PRECISIONS["bf16"], **sections}, seed=seed, model=SharedBuffer())
        for seed, (name, sections) in enumerate([("kept", {}), ("low", low)])
    }
    dtypes = {"kept": torch.float32, "low": torch.bfloat16}
    for by, into in (("kept", "low"), ("low", "kept")):
        train(engines[by], 3)
        engines[by].save_checkpoint(tmp_path / by)
        assert engines[by].module.mean.dtype == dtypes[by]
        assert engines[by].module.frozen.also is engines[by].module.mean
        engines[into].load_checkpoint(tmp_path / by)
        mean = engines[into].module.mean
        assert mean.dtype == dtypes[into]
        assert torch.equal(mean, engines[by].module.mean.to(mean.dtype))
        assert engines[into].module.frozen.also is mean
        assert engines[into].module.count.dtype == torch.int64


# -- what optimizers keep ---------------------------------------------------------------------------------------------


class Odd(torch.optim.Optimizer):
    """Keeps what torch's ``load_state_dict`` would cast: exact numbers, counts, a mask, a low average."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exact"] = torch.full_like(param, 1 / 3, dtype=torch.float64)
                    state["seen"] = torch.full_like(param, 2**53 + 1, dtype=torch.int64)
                    state["step"] = torch.tensor(2**53 + 1)
                    state["late"] = torch.tensor(1 / 3, dtype=torch.float64)
                    state["mask"] = torch.zeros_like(param, dtype=torch.bool)
                    state["low"] = torch.zeros_like(param, dtype=torch.bfloat16)
                state["exact"] += param.grad.double()
                state["seen"] += 1
                state["step"] += 1
                state["mask"] |= param.grad > 0
                state["low"].copy_(param.grad)
                param.sub_(state["exact"].to(param.dtype), alpha=group["lr"])


ODD_SLOTS = ("exact", "seen", "step", "late", "mask", "low")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_no_slot_of_an_optimizer_is_cast(precision, tmp_path):
    def build_odd(seed: int) -> Any:
        torch.manual_seed(seed)
        model = ResumeModel(0.0)
        return start_with(model, Odd([param for param in model.parameters() if param.requires_grad]), precision)

    engine = build_odd(0)
    train(engine, 3)
    engine.save_checkpoint(tmp_path)
    had = everything(engine)
    assert {key.split()[0] for key in had} >= set(ODD_SLOTS)
    engine = build_odd(1)
    engine.load_checkpoint(tmp_path)
    assert unequal(everything(engine), had) == []
    train(engine, 3)


def start_with(model: torch.nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> Any:
    """As ``start``, with an optimizer of the client's."""
    return start(PRECISIONS[precision], seed=1, model=model, optimizer=optimizer)


@pytest.mark.parametrize(("by", "into"), [({"fused": True}, {"foreach": True}), ({"foreach": False}, {"fused": True})])
def test_how_an_update_is_computed_is_this_jobs_own(by, into, tmp_path):
    def build_with(seed: int, flags: dict[str, bool]) -> Any:
        torch.manual_seed(seed)
        model = ResumeModel(0.0)
        params = [param for param in model.parameters() if param.requires_grad]
        return start_with(model, torch.optim.AdamW(params, **flags), "bf16")

    engine = build_with(0, by)
    train(engine, 3)
    engine.save_checkpoint(tmp_path)
    had = everything(engine)
    engine = build_with(1, into)
    engine.load_checkpoint(tmp_path)
    loaded = everything(engine)
    assert unequal(optimizer_state(loaded), optimizer_state(had)) == []
    [group] = loaded["groups"]
    assert {key: bool(group[key]) for key in ("fused", "foreach")} == {"fused": False, "foreach": False} | into
    train(engine, 3)
    assert everything(engine)["step outer.bias"].item() == 2


@pytest.mark.parametrize("into", ["fp32", "bf16"])
def test_a_model_given_in_bf16_changes_to_masters_and_back(into, tmp_path):
    """Without masters torch's Adam has its state in bf16, with them in fp32; each finds it as it needs it."""
    by = {"fp32": "bf16", "bf16": "fp32"}[into]

    def build_low(precision: str, seed: int) -> Any:
        torch.manual_seed(seed)
        return start(PRECISIONS[precision], seed=seed, model=ResumeModel(0.0).to(torch.bfloat16))

    engine = build_low(by, 0)
    train(engine, 3)
    engine.save_checkpoint(tmp_path)
    had = everything(engine)
    engine = build_low(into, 1)
    engine.load_checkpoint(tmp_path)
    loaded = everything(engine)
    assert loaded["exp_avg outer.weight"].dtype == {"fp32": torch.bfloat16, "bf16": torch.float32}[into]
    for key, value in optimizer_state(had).items():
        assert torch.equal(loaded[key], value.to(loaded[key].dtype))
    for name, value in full_weights(had).items():
        assert torch.equal(full_weights(loaded)[name], value.to(full_weights(loaded)[name].dtype))
    assert all(torch.isfinite(torch.tensor(train(engine, 3))))


# -- an optimizer of the client's that was used before ----------------------------------------------------------------


def used_before(given_in: torch.dtype) -> tuple[ResumeModel, torch.optim.Optimizer]:
    """Return a model and an optimizer of two groups that has taken two steps."""
    torch.manual_seed(0)
    model = ResumeModel(0.0).to(given_in)
    optimizer = torch.optim.AdamW(
        [
            {"params": model.inner.parameters(), "lr": 0.02, "mark": "first"},
            {"params": [*model.outer.parameters(), *model.frozen.parameters()], "weight_decay": 0.5},
        ],
        lr=0.01,
    )
    for seed in (1, 2):
        model(torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).to(given_in)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("given_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "bf16, fp32 sums"])
def test_state_of_an_optimizer_used_before_moves_to_the_masters(precision, given_in, tmp_path):
    model, optimizer = used_before(given_in)
    state = {name: optimizer.state[param] for name, param in model.named_parameters() if param in optimizer.state}
    had = {f"{slot} {name}": value.clone() for name, slots in state.items() for slot, value in slots.items()}
    assert len(had) == 4 * 3
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    engine = start_with(model, optimizer, precision)
    assert engine.basic_optimizer is optimizer
    assert not [param for param in model.parameters() if param in optimizer.state]
    now = everything(engine)
    assert optimizer_state(now).keys() == had.keys()
    for key, value in had.items():
        assert now[key].dtype == torch.float32
        assert torch.equal(now[key], value.float())
    # The schedule has begun: it has set the rate of each group.
    of_schedule = {"lr", "initial_lr"}
    assert [{k: v for k, v in group.items() if k not in of_schedule} for group in now["groups"]] == [
        {k: v for k, v in group.items() if k not in of_schedule} for group in groups
    ]
    train(engine, 3)
    assert everything(engine)["step inner.weight"].item() == 3
    engine.save_checkpoint(tmp_path)
    saved_state = everything(engine)
    other = start_with(*used_before(given_in), precision)
    other.load_checkpoint(tmp_path)
    assert unequal(everything(other), saved_state) == []
    assert train(engine, 0) == train(other, 0)


def test_its_next_step_is_that_of_plain_pytorch_on_masters():
    model, optimizer = used_before(torch.float32)
    # By hand: fp32 masters with that state, and a model whose weights are them, cast.
    plain, plain_optimizer = used_before(torch.float32)
    names = {param: name for name, param in plain.named_parameters()}
    masters = {name: param.detach().clone() for name, param in plain.named_parameters()}
    for group in plain_optimizer.param_groups:
        group["params"] = [param for param in group["params"] if param.requires_grad]
        for param in group["params"]:
            plain_optimizer.state[masters[names[param]]] = plain_optimizer.state.pop(param)
        group["params"] = [masters[names[param]] for param in group["params"]]
    for param in plain.parameters():
        param.data = param.data.to(torch.bfloat16)
    engine = start(
        {**PRECISIONS["bf16"], "gradient_accumulation_steps": 1, "gradient_clipping": 0.0, "scheduler": None},
        seed=1,
        model=model,
        optimizer=optimizer,
    )
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(5))
    engine.backward(engine(x))
    engine.step()
    plain(x).backward()
    for name, param in plain.named_parameters():
        masters[name].grad = None if param.grad is None else param.grad.float()
    plain_optimizer.step()
    mine = full_weights(everything(engine))
    for name in ("inner.weight", "inner.bias", "outer.weight", "outer.bias"):
        assert torch.equal(mine[name], masters[name]), name


@pytest.mark.parametrize("changed", [0.0, 0.5, float("nan")])
def test_a_state_dict_has_its_digits_also_where_the_weights_were_the_same(changed):
    engine = build("bf16")
    given = torch.full((1, 13), 1 / 3)
    engine.load_module_state_dict({"module": {"outer.weight": given}}, strict=False)
    given = given + 2**-14  # the same in bf16
    given[0, 5] += changed
    engine.load_module_state_dict({"module": {"outer.weight": given}}, strict=False)
    torch.testing.assert_close(everything(engine)["master outer.weight"], given, rtol=0, atol=0, equal_nan=True)
