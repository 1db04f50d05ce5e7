"""What loading makes of a checkpoint that is not this engine's own: errors, warnings, and what stays as it was."""

from __future__ import annotations

import logging
import os
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import CheckpointError
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path

SGD = {"type": "SGD", "params": {"lr": 0.5}}
ADAMW = {"type": "AdamW", "params": {"lr": 0.25}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}


class Wrapped(nn.Module):
    """A model whose names begin with ``net.``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


def layers(*sizes: int) -> nn.Sequential:
    torch.manual_seed(sum(sizes))
    return nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(sizes)))


def start(model: nn.Module | None = None, **config: Any) -> Any:
    config = {"train_batch_size": 2, "checkpoint": {"engine": "plain"}, **config}
    return ds_core.initialize(model=model or layers(3, 2, 1), config=config)[0]


def step(engine: Any) -> None:
    engine.backward(engine(torch.ones(2, 3)).square().mean())
    engine.step()


def saved(folder: Path, model: nn.Module | None = None, **config: Any) -> Any:
    engine = start(model, **{"optimizer": SGD, **config})
    step(engine)
    engine.save_checkpoint(folder)
    return engine


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def weights(engine: Any) -> list[torch.Tensor]:
    return [value.clone() for value in engine.module.state_dict().values()]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


# -- nothing to load --------------------------------------------------------------------------------------------------


def test_without_a_checkpoint_a_warning_and_nothing(tmp_path, caplog):
    engine = start(optimizer=SGD)
    step(engine)
    before = weights(engine)
    (tmp_path / "torn" / "global_step1").mkdir(parents=True)
    (tmp_path / "torn" / "global_step1" / "rank_00000-0123456789ab.safetensors").write_bytes(b"half")
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty", "torn"):
        caplog.clear()
        assert engine.load_checkpoint(tmp_path / folder) == (None, None)
        (warning,) = warnings(caplog)
        assert warning.startswith("nothing is loaded: ")
        assert folder in warning
    assert equal(weights(engine), before)
    assert engine.global_steps == 1


def load_what_rank_1_has(folder: Path) -> tuple[Any, int]:
    """Load from a folder of which every rank has its own; return what came of it, and how many warnings were told."""
    os.chdir(folder / f"of_rank_{comm.get_rank()}")
    engine = start(optimizer=SGD)
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: told.append(entry.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_core").addHandler(handler)
    return engine.load_checkpoint("run"), len(told)


def test_all_ranks_agree_that_there_is_nothing(tmp_path):
    (tmp_path / "of_rank_0").mkdir()
    saved(tmp_path / "of_rank_1" / "run")
    assert run_ranks([partial(load_what_rank_1_has, tmp_path)], 2) == [[((None, None), 1), ((None, None), 0)]]


def test_checkpoints_without_latest_are_named(tmp_path):
    saved(tmp_path)
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"no file 'latest'[\s\S]*pass tag=, one of global_step1"):
        start().load_checkpoint(tmp_path)
    other = tmp_path / "of_deepspeed"
    (other / "step5").mkdir(parents=True)
    (other / "step5" / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError, match=r"no file 'latest'[\s\S]*one of step5"):
        start().load_checkpoint(other)


def test_a_tag_that_is_not_there_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="there is no checkpoint 'global_step7'"):
            start().load_checkpoint(folder, tag="global_step7")


def test_the_folder_of_a_tag_comes_with_the_right_call(tmp_path):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match="this is the checkpoint 'global_step1' itself") as caught:
        start().load_checkpoint(tmp_path / "global_step1")
    assert caught.value.fix == f"load_checkpoint({str(tmp_path)!r}, tag='global_step1')"


def test_what_may_not_be_read_is_an_error_of_checkpoints(tmp_path, monkeypatch):
    saved(tmp_path)

    def denied(path, *_args, **_options):
        raise PermissionError(13, "Permission denied", str(path))

    engine = start()
    monkeypatch.setattr("pathlib.Path.read_text", denied)
    with pytest.raises(CheckpointError, match="the manifest cannot be read: Permission denied"):
        engine.load_checkpoint(tmp_path)


@pytest.mark.parametrize("path", [None, "", 5, b"run"])
def test_what_is_no_path_is_refused(path):
    engine = start()
    with pytest.raises(CheckpointError, match="path") as caught:
        engine.load_checkpoint(path)
    assert caught.value.where == "load_checkpoint(load_dir)"
    with pytest.raises(CheckpointError) as caught:
        engine.save_checkpoint(path)
    assert caught.value.where == "save_checkpoint(save_dir)"


@pytest.mark.parametrize("client_state", [[1], "text", 0])
def test_client_state_is_a_dictionary(client_state, tmp_path):
    with pytest.raises(CheckpointError, match=r"client_state is a .*, not a dictionary"):
        start().save_checkpoint(tmp_path, client_state=client_state)
    assert list(tmp_path.iterdir()) == []


# -- another model ----------------------------------------------------------------------------------------------------


def test_another_model_is_told_by_its_weights(tmp_path):
    saved(tmp_path)
    other = start(layers(3, 2, 1, 1, 1, 1, 1), optimizer=SGD)
    before = weights(other)
    with pytest.raises(CheckpointError, match="only in the model '2") as caught:
        other.load_checkpoint(tmp_path)
    assert "'4.bias' and 3 more, only in the checkpoint nothing" in caught.value.what
    assert equal(weights(other), before)


def test_a_prefix_that_would_make_them_equal_is_suggested(tmp_path):
    saved(tmp_path / "bare")
    saved(tmp_path / "wrapped", Wrapped(layers(3, 2, 1)))
    for model, folder, whose in ((Wrapped(layers(3, 2, 1)), "bare", "model"), (None, "wrapped", "checkpoint")):
        engine = start(model, optimizer=SGD)
        for strict in (True, False):
            with pytest.raises(CheckpointError) as caught:
                engine.load_checkpoint(tmp_path / folder, load_module_strict=strict, load_optimizer_states=False)
            fix = caught.value.fix
            assert fix.startswith(f"the {whose}'s names begin with 'net.': pass custom_load_fn=lambda src, dst: ")
            assert ("not one weight" in caught.value.what) is not strict
        # The fix is code that does it.
        custom = eval(fix.partition("custom_load_fn=")[2])
        engine.load_checkpoint(tmp_path / folder, custom_load_fn=custom)
        assert equal(weights(engine), weights(saved(tmp_path / "again")))


def test_other_names_by_a_function_start_the_optimizer_anew(tmp_path, caplog):
    saved(tmp_path, optimizer=ADAMW)
    engine = start(Wrapped(layers(3, 2, 1)), optimizer=ADAMW)
    step(engine)
    engine.load_checkpoint(tmp_path, custom_load_fn=lambda src, dst: dst.net.load_state_dict(src))
    (warning,) = warnings(caplog)
    assert warning.startswith("the optimizer starts anew: group 0 of the optimizer differs")
    step(engine)
    caplog.clear()
    same = start(optimizer=ADAMW)
    same.load_checkpoint(tmp_path, custom_load_fn=lambda src, dst: dst.load_state_dict(src))
    assert warnings(caplog) == []
    assert next(iter(same.basic_optimizer.state.values()))["step"] == 1


def test_what_is_left_as_it_is_is_counted(tmp_path, caplog):
    original = saved(tmp_path, layers(3, 2, 1, 1))
    other = start(layers(3, 2))
    other.load_checkpoint(tmp_path, load_module_strict=False)
    (warning,) = warnings(caplog)
    assert warning == (
        "model and checkpoint differ: 2 tensors are loaded; 0 are only in the model and left as they are: nothing; "
        "4 are only in the checkpoint: '1.bias', '1.weight', '2.bias', '2.weight'"
    )
    assert equal(weights(other), weights(original)[:2])


def test_frozen_weights_that_were_not_saved_are_told(tmp_path, caplog):
    model = layers(3, 2, 1)
    model[0].requires_grad_(False)
    engine = start(model, optimizer=SGD)
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    engine.load_checkpoint(tmp_path)
    told = "the checkpoint was saved without 2 frozen weights, which are left as they are: '0.bias', '0.weight'"
    assert warnings(caplog) == [told]


# -- another optimizer, another schedule ------------------------------------------------------------------------------


def test_state_of_another_optimizer_is_not_kept(tmp_path, caplog):
    saved(tmp_path / "adamw", optimizer=ADAMW)
    engine = start(optimizer=SGD)
    engine.load_checkpoint(tmp_path / "adamw")
    (warning,) = warnings(caplog)
    assert "the checkpoint's optimizer is AdamW, this job's is SGD" in warning
    engine.save_checkpoint(tmp_path / "sgd")
    with engine.parts.checkpoint.open(tmp_path / "sgd", "global_step1") as reader:
        assert {of.kind for of in reader.tensors()} == {"weight"}
        assert "betas" not in reader.state["optimizer"]["groups"][0]["options"]
        assert reader.state["optimizer"]["class"] == "SGD"


def test_a_schedule_on_one_side_only_is_told_with_the_rate(tmp_path, caplog):
    saved(tmp_path / "without")
    saved(tmp_path / "with", scheduler=WARMUP)
    engine = start(optimizer=SGD, scheduler=WARMUP)
    engine.load_checkpoint(tmp_path / "without")
    (warning,) = warnings(caplog)
    assert warning.startswith("the checkpoint has no learning-rate schedule: WarmupLR starts at its beginning; ")
    assert warning.endswith("the rate is 0.5 until it sets one")
    caplog.clear()
    engine = start(optimizer=SGD)
    engine.load_checkpoint(tmp_path / "with")
    (warning,) = warnings(caplog)
    assert warning.startswith("the checkpoint's learning-rate schedule is not used, there is none here; the rate stays")
    assert f"{engine.get_lr()[0]:g}" in warning
    caplog.clear()
    start(optimizer=SGD, scheduler=WARMUP).load_checkpoint(tmp_path / "with")
    start(optimizer=SGD).load_checkpoint(tmp_path / "with", load_lr_scheduler_states=False)
    start().load_checkpoint(tmp_path / "with")  # trains nothing, so no rate is missed
    assert warnings(caplog) == []
