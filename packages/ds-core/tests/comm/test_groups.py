"""Joining the job: from the launcher's environment, from arguments, or as one process alone."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import psutil
import pytest
import torch

from ds_core import comm
from ds_core.errors import CommError, NotBuiltError
from ds_core.testing.state import reset_globals

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "DEEPSPEED_TIMEOUT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    reset_globals()
    yield
    reset_globals()


def test_without_a_launcher_this_process_is_the_whole_job():
    before = dict(os.environ)
    assert not comm.is_initialized()
    comm.init_distributed()
    assert comm.is_initialized()
    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (0, 1, 0)
    values = torch.ones(3)
    comm.all_reduce(values)
    comm.barrier()
    assert values.tolist() == [1, 1, 1]
    assert dict(os.environ) == before


def test_alone_no_port_of_a_job_is_used():
    comm.init_distributed(distributed_port=29500)
    # gloo itself listens on a port that the system picks; what jobs would fight over is the port of their store.
    assert 29500 not in {connection.laddr.port for connection in psutil.Process().net_connections("tcp")}


def test_a_second_call_leaves_the_first_alone():
    comm.init_distributed()
    group = torch.distributed.group.WORLD
    comm.init_distributed(dist_backend="nccl", init_method="tcp://nowhere:1", rank=3, world_size=7)
    assert torch.distributed.group.WORLD is group
    comm.init_distributed(dist_init_required=False)
    assert comm.get_world_size() == 1


def test_it_can_be_left_and_joined_again():
    for _ in range(3):
        comm.init_distributed()
        comm.destroy_process_group()
        assert not comm.is_initialized()
    comm.destroy_process_group()


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_environment_is_named(missing, monkeypatch):
    launcher = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name in launcher.keys() - {missing}:
        monkeypatch.setenv(name, launcher[name])
    with pytest.raises(CommError) as caught:
        comm.init_distributed()
    assert caught.value.what.endswith(f"set, {missing} missing")
    assert "ds run" in caught.value.fix
    assert not comm.is_initialized()


@pytest.mark.parametrize("given", [{"rank": 0}, {"world_size": 2}, {"rank": 1}])
def test_a_rank_without_a_world_size_is_refused(given):
    # Ignoring it would quietly make every process a job of its own.
    with pytest.raises(CommError, match="rank and world_size") as caught:
        comm.init_distributed(**given)
    assert not comm.is_initialized()
    assert caught.value.fix


def test_rank_and_world_size_may_be_arguments():
    comm.init_distributed(rank=0, world_size=1, distributed_port=0)
    assert comm.get_world_size() == 1


def test_an_environment_that_is_complete_is_used(monkeypatch):
    launcher = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": "5"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    comm.init_distributed()
    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (0, 1, 5)


def test_ranks_of_mpi_are_not_built_yet(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(NotBuiltError, match="started by MPI"):
        comm.init_distributed()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    comm.init_distributed()
    assert comm.get_world_size() == 1


def test_it_can_be_required_to_exist():
    with pytest.raises(CommError, match="dist_init_required=False"):
        comm.init_distributed(dist_init_required=False)


@pytest.mark.parametrize("call", ["get_rank", "get_world_size", "barrier"])
def test_before_joining_the_error_says_how(call):
    with pytest.raises(CommError, match="not initialised") as caught:
        getattr(comm, call)()
    assert "init_distributed" in caught.value.fix


def timeout_of_a_group() -> timedelta:
    group = torch.distributed.group.WORLD
    return group._get_backend(torch.device("cpu")).options._timeout


def test_the_timeout_comes_from_the_argument_then_the_environment(monkeypatch):
    comm.init_distributed()
    assert timeout_of_a_group() == timedelta(minutes=10)
    comm.destroy_process_group()
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "1.5")
    comm.init_distributed()
    assert timeout_of_a_group() == timedelta(seconds=90)
    comm.destroy_process_group()
    comm.init_distributed(timeout=timedelta(seconds=7))
    assert timeout_of_a_group() == timedelta(seconds=7)


@pytest.mark.parametrize("value", ["soon", "", "-1", "0", "nan"])
def test_a_timeout_that_is_none_is_refused(value, monkeypatch):
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", value)
    with pytest.raises(CommError, match="DEEPSPEED_TIMEOUT") as caught:
        comm.init_distributed()
    assert repr(value) in caught.value.what


def test_the_expected_world_size_is_known_before_joining(monkeypatch):
    assert comm.expected_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert comm.expected_world_size() == 4
    monkeypatch.delenv("WORLD_SIZE")
    comm.init_distributed()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert comm.expected_world_size() == 1, "the group that was joined counts"


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_a_world_size_that_is_none_is_refused(value, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(CommError, match="WORLD_SIZE is"):
        comm.expected_world_size()


def test_names_of_torch_are_passed_on():
    assert comm.all_gather is torch.distributed.all_gather
    assert comm.ReduceOp is torch.distributed.ReduceOp
    for name in comm._TORCH:
        assert getattr(comm, name) is getattr(torch.distributed, name)
    with pytest.raises(AttributeError, match="no attribute 'all_reduced'"):
        comm.all_reduced  # noqa: B018


def test_importing_loads_no_torch():
    code = "import sys, ds_core.comm; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
