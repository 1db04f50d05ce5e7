"""The parts of the demo that a run of it would not show to be wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from types import ModuleType

GPT_FOLDER = Path(__file__).parents[1] / "examples" / "gpt"


def load(name: str) -> ModuleType:
    """Import a file of the demo under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", GPT_FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


model, data, progress = load("model"), load("data"), load("progress")


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return model.GPT(model.GPTConfig(context=16, layers=2, heads=2, channels=32)).double()


def test_the_model_cannot_see_the_future() -> None:
    gpt, text = tiny(), torch.randint(256, (1, 16))
    changed = text.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 256
    before, after = gpt(text), gpt(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_attention_knows_distances_not_places() -> None:
    """Rotation by position: the product of a query and a key depends on how far they are apart alone."""
    tables = model.rotation_tables(16, 8)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()
    rotated_q, rotated_k = (model.rotate(x.expand(1, 1, 16, 8), tables)[0, 0] for x in (q, k))
    products = rotated_q @ rotated_k.T
    torch.testing.assert_close(products[5, 2], products[12, 9])
    assert not torch.isclose(products[5, 2], products[5, 4])


def test_the_size_is_what_the_readme_says_and_the_head_is_tied() -> None:
    gpt = model.GPT(model.GPTConfig())
    assert sum(parameter.numel() for parameter in gpt.parameters()) == 4_790_784
    assert gpt.head.weight is gpt.embedding.weight


def test_the_target_of_a_byte_is_the_next_one(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"module_{number}.py").write_bytes(bytes([number]) * 10)
    windows = data.Windows("train", 7, root=tmp_path)
    x, y = windows[1]
    assert x.dtype == torch.int64
    assert x.tolist() == windows.text[7:14].tolist()
    assert y.tolist() == windows.text[8:15].tolist()
    assert len(windows[len(windows) - 1][1]) == 7


def test_held_out_files_are_not_trained_on_and_other_files_do_not_move_them(tmp_path: Path) -> None:
    for number in range(64):
        (tmp_path / f"module_{number}.py").write_bytes(bytes([number]))
    train, held_out = (set(data.Windows(split, 1, root=tmp_path).text.tolist()) for split in ("train", "validation"))
    assert train | held_out == set(range(64))
    assert train.isdisjoint(held_out)
    assert held_out
    (tmp_path / "another.py").write_bytes(bytes([200]))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "skipped.py").write_bytes(bytes([201]))
    after = [data.Windows(split, 1, root=tmp_path).text.tolist() for split in ("train", "validation")]
    assert held_out <= set(after[1]) <= held_out | {200}
    assert 201 not in after[0] + after[1]


@pytest.mark.parametrize("resumed_at", [2, 4])
def test_a_resumed_history_forgets_what_will_be_done_again(tmp_path: Path, resumed_at: int) -> None:
    first = progress.History(tmp_path, resumed_at=None)
    for step in range(1, 5):
        first.add(step, loss=float(step))
    first.close()
    second = progress.History(tmp_path, resumed_at=resumed_at)
    second.add(resumed_at + 1, loss=0.5)
    second.close()
    lines = list(progress.read_history(tmp_path))
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, resumed_at + 1), resumed_at + 1]
    assert {"step": resumed_at, "resumed": True} in lines


def test_a_new_run_starts_a_new_history(tmp_path: Path) -> None:
    for _ in range(2):
        history = progress.History(tmp_path, resumed_at=None)
        history.add(1, loss=1.0)
        history.close()
    assert list(progress.read_history(tmp_path)) == [{"step": 1, "loss": 1.0}]
