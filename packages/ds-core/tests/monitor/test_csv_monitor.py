"""The CSV monitor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ds_core.errors import ConfigError
from ds_core.monitor.csv_monitor import CsvMonitor


@dataclass
class Section:
    output_path: str
    enabled: bool = True
    job_name: str = "job"


def test_one_file_per_event_name(tmp_path: Path) -> None:
    monitor = CsvMonitor(Section(str(tmp_path)))
    monitor.write_events([("Train/Samples/lr", 0.001, 32), ("Train/Samples/loss scale", 1024, 32)])
    monitor.write_events([("Train/Samples/lr", 0.0005, 64)])
    # Before close(): a reader, or a crash, finds the rows.
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == [
        "Train_Samples_loss_scale.csv",
        "Train_Samples_lr.csv",
    ]
    assert (tmp_path / "job/Train_Samples_lr.csv").read_text() == "step,lr\n32,0.001\n64,0.0005\n"
    assert (tmp_path / "job/Train_Samples_loss_scale.csv").read_text() == "step,loss scale\n32,1024.0\n"
    monitor.close()


def test_a_restart_appends_without_a_second_header(tmp_path: Path) -> None:
    for step in (1, 2):
        monitor = CsvMonitor(Section(str(tmp_path)))
        monitor.write_events([("loss", step / 2, step)])
        monitor.close()
    assert (tmp_path / "job/loss.csv").read_text() == "step,loss\n1,0.5\n2,1.0\n"


def test_values_keep_all_their_digits(tmp_path: Path) -> None:
    monitor = CsvMonitor(Section(str(tmp_path)))
    monitor.write_events([("loss", 0.1 + 0.2, 1), ("loss", torch.tensor(0.25), 2), ("loss", float("nan"), 3)])
    monitor.close()
    assert (tmp_path / "job/loss.csv").read_text().splitlines()[1:] == ["1,0.30000000000000004", "2,0.25", "3,nan"]


def test_a_comma_in_a_name(tmp_path: Path) -> None:
    monitor = CsvMonitor(Section(str(tmp_path)))
    monitor.write_events([("a/b,c", 1, 1)])
    monitor.close()
    assert (tmp_path / "job/a_b,c.csv").read_text() == 'step,"b,c"\n1,1.0\n'


def test_closing_twice_and_writing_again(tmp_path: Path) -> None:
    monitor = CsvMonitor(Section(str(tmp_path)))
    monitor.write_events([("loss", 1, 1)])
    monitor.close()
    monitor.close()
    monitor.write_events([("loss", 2, 2)])
    monitor.close()
    assert (tmp_path / "job/loss.csv").read_text() == "step,loss\n1,1.0\n2,2.0\n"


def test_an_empty_path_is_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monitor = CsvMonitor(Section(""))
    monitor.write_events([("loss", 1, 1)])
    monitor.close()
    assert (tmp_path / "job/loss.csv").exists()


def test_off_means_nothing_is_written(tmp_path: Path) -> None:
    monitor = CsvMonitor(Section(str(tmp_path / "new"), enabled=False))
    monitor.write_events([("loss", 1, 1)])
    monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"(?s)cannot be made.*csv_monitor\.output_path"):
        CsvMonitor(Section(str(tmp_path / "file")))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_many_monitors_leave_no_open_files(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        monitor = CsvMonitor(Section(str(tmp_path)))
        monitor.write_events([("a", 1, 1), ("b", 1, 1)])
        monitor.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
