from __future__ import annotations

import socket

import pytest

from ds_core.errors import LaunchError
from ds_launcher.resources import check_port, cores, find_free_port, visible_gpus


@pytest.mark.parametrize(
    ("value", "count"),
    [("0", 1), ("2,3", 2), ("GPU-1a,MIG-2b, 7", 3), ("", 0), ("-1", 0), ("0,-1,1", 1), ("NoDevFiles", 1)],
)
def test_visible_devices_are_counted(tmp_path, value, count):
    (tmp_path / "nvidia0").touch()
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": value}, tmp_path) == count


def test_device_files_are_counted(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia0x"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == 3
    assert visible_gpus({}, tmp_path / "nowhere") == 0


def test_there_is_a_core():
    assert cores() >= 1


def test_a_free_port_can_be_used():
    check_port(find_free_port())


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_a_port_in_use_is_refused(address):
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} is already in use on this machine") as caught:
            check_port(port)
    assert caught.value.where == "--master_port"
