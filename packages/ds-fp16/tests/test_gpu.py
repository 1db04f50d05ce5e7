"""Every precision on a GPU, against the same engine on the CPU: the same steps, and the same record of an overflow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ds_core
from ds_core import accelerator, comm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SECTIONS = {
    "fp16": {"fp16": {"enabled": True, "auto_cast": True, "initial_scale_power": 8}},
    "bf16": {"bf16": {"enabled": True, "auto_cast": True}},
    "bf16, summed in fp32": {"bf16": {"enabled": True, "auto_cast": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "autocast bf16": {"torch_autocast": {"enabled": True}},
    "autocast fp16": {"torch_autocast": {"enabled": True, "dtype": "fp16"}},
}
STEPS = 6
LOSS_TOLERANCE = 2.0**-5
"""Relative: products of 8 digits, differently rounded on the two devices in each layer and step."""


@pytest.fixture(autouse=True)
def leave_no_accelerator():
    yield
    accelerator.set_accelerator(None)
    comm.destroy_process_group()


def run(module: nn.Module, section: dict) -> tuple[list[float], list[float | None], str]:
    """Train on the device that DS_ACCELERATOR names; return losses, norms, and the record of a step that overflowed."""
    accelerator.set_accelerator(None)
    engine, *_ = ds_core.initialize(
        model=module,
        config={
            "train_batch_size": 16,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            **section,
        },
    )
    generator = torch.Generator().manual_seed(1)
    losses, norms = [], []
    for _ in range(STEPS):
        for _ in range(2):
            x = torch.randn(8, 16, generator=generator).to(engine.device)
            loss = engine(x).float().square().mean()
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
        norms.append(engine.get_global_grad_norm())
    assert engine.skipped_steps == 0
    assert all(t.dtype == torch.float32 for group in engine.basic_optimizer.param_groups for t in group["params"])
    before = copy.deepcopy(engine.module_state_dict())
    for _ in range(2):
        engine.backward(engine(torch.full((8, 16), float("nan"), device=engine.device)).float().mean())
        engine.step()
    assert engine.skipped_steps == 1
    assert all(torch.equal(value, before[name]) for name, value in engine.module_state_dict().items())
    record = engine.overflows[-1]
    engine.destroy()
    comm.destroy_process_group()
    return losses, norms, f"{record.step} {record.parameter} {record.module} {record.ranks}"


@pytest.mark.parametrize("name", SECTIONS)
def test_a_gpu_trains_as_a_cpu(name, monkeypatch):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 4))
    runs = {}
    for kind in ("cpu", "cuda"):
        monkeypatch.setenv("DS_ACCELERATOR", kind)
        runs[kind] = run(copy.deepcopy(module), SECTIONS[name])
    assert runs["cuda"][0] == pytest.approx(runs["cpu"][0], rel=LOSS_TOLERANCE)
    assert runs["cuda"][1] == pytest.approx(runs["cpu"][1], rel=2 * LOSS_TOLERANCE)
    assert runs["cuda"][2] == runs["cpu"][2] == f"{STEPS + 1} 3.weight 3 (0,)"
