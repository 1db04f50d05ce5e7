"""What a run says: lines every so many steps, events for monitors, all from rank 0, and little of it (P19)."""

from __future__ import annotations

import csv
import logging
import os
import re
import socket
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ds_core
from ds_core import comm
from ds_core.engine.observers import MonitorObserver, ProgressLine
from ds_core.engine.parts import Outcome, StepRecord
from ds_core.interfaces.monitor import Monitor
from ds_core.testing.ranks import run_ranks

if TYPE_CHECKING:
    from pathlib import Path


def record(step: int = 1, **changes: Any) -> StepRecord:
    given = {"skipped_steps": 0, "outcome": Outcome.UPDATED, "norm": 1.25, "lr": [0.1], "loss_scale": 1.0}
    return StepRecord(step, 8 * step, **{**given, **changes})


def test_a_line_every_so_many_steps(caplog):
    line = ProgressLine(3)
    with caplog.at_level(logging.INFO, "ds_core"):
        for step in range(1, 8):
            line(record(step))
    assert caplog.messages == [f"step={step}, lr=[0.1], grad_norm=1.25" for step in (3, 6)]


def test_a_line_tells_all_rates_and_skipped_steps(caplog):
    with caplog.at_level(logging.INFO, "ds_core"):
        ProgressLine(1)(record(lr=[0.1, 1e-5], norm=123456.0, skipped_steps=2))
        ProgressLine(1)(record(lr=[], norm=float("nan")))
    assert caplog.messages == [
        "step=1, lr=[0.1, 1e-05], grad_norm=1.235e+05, skipped=2",
        "step=1, lr=[], grad_norm=nan",
    ]


class Noted(Monitor):
    def __init__(self) -> None:
        self.events: list[tuple[str, float, int]] = []
        self.closed = 0

    def write_events(self, events) -> None:
        self.events += events

    def close(self) -> None:
        self.closed += 1


def test_monitors_get_events_by_samples():
    monitors = [Noted(), Noted()]
    observer = MonitorObserver(monitors)
    observer(record(2))
    observer(record(3, lr=[]))
    observer(record(4, loss_scale=256.0, norm=0.5))
    observer(record(5, outcome=Outcome.SKIPPED, norm=float("inf")))
    expected = [
        *[("Train/Samples/lr", 0.1, 16), ("Train/Samples/grad_norm", 1.25, 16)],
        ("Train/Samples/grad_norm", 1.25, 24),
        *[("Train/Samples/lr", 0.1, 32), ("Train/Samples/grad_norm", 0.5, 32), ("Train/Samples/loss_scale", 256.0, 32)],
        ("Train/Samples/lr", 0.1, 40),
        *[("Train/Samples/grad_norm", float("inf"), 40), ("Train/Samples/loss_scale", 1.0, 40)],
    ]
    assert [monitor.events for monitor in monitors] == [expected] * 2
    observer.close()
    assert [monitor.closed for monitor in monitors] == [1, 1]


# -- in an engine -----------------------------------------------------------------------------------------------------


def train(folder: Path) -> tuple[int, list[str]]:
    """Train three steps with a monitor and a line every second step; return observers and the messages here."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda entry: messages.append(entry.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_core").addHandler(handler)
    engine = ds_core.initialize(
        model=torch.nn.Linear(3, 1),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "steps_per_print": 2,
            "log_level": "info",
            "csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": f"of_rank_{comm.get_rank()}"},
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        },
    )[0]
    messages.clear()
    for _ in range(6):
        engine.backward(engine(torch.ones(2, 3)).mean())
        engine.step()
    count = len(engine.parts.observers)
    engine.destroy()
    logging.getLogger("ds_core").removeHandler(handler)
    return count, messages


def test_rank_0_alone_writes_and_speaks(tmp_path):
    [(first, second)] = run_ranks([partial(train, tmp_path)], 2)
    assert first == (2, ["step=2, lr=[0.5], grad_norm=2"])
    assert second == (0, [])
    assert [path.name for path in tmp_path.iterdir()] == ["of_rank_0"]
    rows = {path.name: list(csv.reader(path.read_text().splitlines())) for path in (tmp_path / "of_rank_0").iterdir()}
    samples = ["8", "16", "24"]  # 2 ranks x 2 samples x 2 micro-batches each
    assert rows == {
        "Train_Samples_lr.csv": [["step", "lr"], *[[at, "0.5"] for at in samples]],
        "Train_Samples_grad_norm.csv": [["step", "grad_norm"], *[[at, "2.0"] for at in samples]],
    }


SCRIPT = """
import sys, torch, ds_core
engine, _, loader, _ = ds_core.initialize(
    model=torch.nn.Linear(3, 1),
    training_data=[torch.ones(3)] * 40,
    config={
        "train_batch_size": 8,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": 5}},
    },
)
for batch in loader:
    engine.backward(engine(batch).square().mean())
    engine.step()
engine.save_checkpoint(sys.argv[1])
engine.load_checkpoint(sys.argv[1])
assert engine.global_steps == 5
engine.destroy()
ds_core.comm.destroy_process_group()
"""


@pytest.fixture
def output_of_four_ranks(tmp_path) -> list[str]:
    """What each of 4 ranks of a default run wrote to stdout and stderr."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "default", str(script), str(tmp_path / "saved")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        output = [rank.communicate(timeout=100)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * 4, "\n".join(output)
    return output


def test_a_default_run_of_four_ranks_is_quiet(output_of_four_ranks):
    first, *others = output_of_four_ranks
    assert others == [""] * 3
    lines = first.splitlines()
    assert 1 <= len(lines) <= 5, first
    assert all(re.fullmatch(r"\[\d\d:\d\d:\d\d\] \[(INFO|WARNING)\] \[ds\] .+", line) for line in lines), first
