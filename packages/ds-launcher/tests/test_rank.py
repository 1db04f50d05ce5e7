from __future__ import annotations

import itertools

import pytest

from ds_launcher.output import Tail
from ds_launcher.rank import Rank, first_failed, rank_command, rank_environment
from ds_launcher.spec import AgentSpec


def make(rank, status, *, ended, traceback=None, was_asked=False):
    tail = Tail(itertools.count(1).__next__)
    tail.traceback_tick = traceback
    return Rank(rank, rank, None, tail, None, status=status, ended_tick=ended, was_asked=was_asked)


@pytest.mark.parametrize(
    ("ranks", "first"),
    [
        ([make(0, 0, ended=1), make(1, None, ended=0)], None),
        ([make(0, 2, ended=2), make(1, 3, ended=1)], 1),
        # The one that raised first, although it took longer to exit.
        ([make(0, 1, ended=3, traceback=2), make(1, 1, ended=4, traceback=1)], 1),
        # A traceback logged long ago says nothing about a death by signal.
        ([make(0, -9, ended=4, traceback=1), make(1, -9, ended=3)], 1),
        # Ended because we asked: a consequence, never the cause.
        ([make(0, -15, ended=1, was_asked=True), make(1, 1, ended=2)], 1),
        ([make(0, 5, ended=1, was_asked=True)], None),
    ],
)
def test_first_failed(ranks, first):
    found = first_failed(ranks)
    assert (found.rank if found else None) == first


def test_a_host_of_several():
    spec = AgentSpec(
        ["prog"], "id", nproc=2, world_size=6, first_rank=4, node_rank=2, nodes=3, env={"RANK": "9", "A": "b"}
    )
    env = rank_environment(spec, 1)
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == ("5", "1", "6", "2")
    assert (env["CROSS_RANK"], env["CROSS_SIZE"], env["A"]) == ("2", "3", "b")
    assert rank_command(spec, 1) == ["prog"]
