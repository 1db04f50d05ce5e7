"""Every collective is seen, whoever starts it; its numbers are right, and nothing is left when nobody watches."""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_core.comm import CollectiveWatch, Traffic, init_distributed, watch
from ds_core.errors import CommError
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.ranks import run_ranks
from ds_core.testing.state import reset_globals

if TYPE_CHECKING:
    from collections.abc import Callable

N = 3
GATHER_SINGLE = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
SCATTER_SINGLE = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def kernels() -> int:
    """Return how many operators of the dispatcher have a kernel of ours."""
    names = [name for name, _, _ in watch._group_operators()]
    return sum(torch._C._dispatch_has_kernel_for_dispatch_key(f"c10d::{name}", "BackendSelect") for name in names)


def floats(count: int) -> torch.Tensor:
    return torch.ones(count)


def parts(count: int) -> list[torch.Tensor]:
    return [floats(count) for _ in range(N)]


def at(rank: int, value: Any) -> Any:
    return value if dist.get_rank() == rank else None


# Of the collective, on a rank that is not its root, and on its root: bytes in and out. Tensors have 8 floats, 32 bytes,
# or as many for each rank.
CASES: list[tuple[str, Callable[[], Any], tuple[int, int], tuple[int, int]]] = [
    ("all_reduce", lambda: dist.all_reduce(floats(8)), (32, 32), (32, 32)),
    ("all_gather", lambda: dist.all_gather(parts(8), floats(8)), (32, 96), (32, 96)),
    ("all_gather_into_tensor", lambda: GATHER_SINGLE(floats(24), floats(8)), (32, 96), (32, 96)),
    ("reduce_scatter", lambda: dist.reduce_scatter(floats(8), parts(8)), (96, 32), (96, 32)),
    ("reduce_scatter_tensor", lambda: SCATTER_SINGLE(floats(8), floats(24)), (96, 32), (96, 32)),
    ("all_to_all_single", lambda: dist.all_to_all_single(floats(24), floats(24)), (96, 96), (96, 96)),
    ("broadcast", lambda: dist.broadcast(floats(8), src=1), (0, 32), (32, 0)),
    ("reduce", lambda: dist.reduce(floats(8), dst=1), (32, 0), (32, 32)),
    ("gather", lambda: dist.gather(floats(8), at(1, parts(8)), dst=1), (32, 0), (32, 96)),
    ("scatter", lambda: dist.scatter(floats(8), at(1, parts(8)), src=1), (0, 32), (96, 32)),
    ("barrier", dist.barrier, (0, 0), (0, 0)),
    ("all_reduce", lambda: dist.all_reduce(torch.ones(3, dtype=torch.bfloat16)), (6, 6), (6, 6)),
]


def plain_ones() -> list[tuple[str, int, int, int, bool]]:
    with CollectiveWatch() as seen:
        for _, run, _, _ in CASES:
            run()
    return [(each.name, each.sequence, each.bytes_in, each.bytes_out, each.is_done) for each in seen.records]


def of_torch_itself() -> dict[str, list[tuple[str, int, int]]]:
    """Return what a DDP model, functional collectives and objects start; DDP in the hooks of autograd."""
    import torch.distributed._functional_collectives as functional

    # Renamed in torch 2.13.
    scatter = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
    made: dict[str, list[tuple[str, int, int]]] = {}

    def note(what: str) -> None:
        made[what] = [(each.name, each.bytes_in, each.bytes_out) for each in seen.records]
        seen.clear()

    with CollectiveWatch() as seen:
        model = nn.parallel.DistributedDataParallel(nn.Linear(5, 3))
        note("ddp made")
        model(torch.ones(2, 5)).sum().backward()
        note("ddp backward")
        functional.wait_tensor(functional.all_reduce(floats(8), "sum", dist.group.WORLD))
        functional.wait_tensor(scatter(floats(24), "sum", 0, dist.group.WORLD))
        note("functional")
        dist.all_gather_object([None] * N, dist.get_rank())
        dist.broadcast_object_list([dist.get_rank()], src=0)
        note("objects")
        rank = dist.get_rank()
        if rank < 2:
            peer = 1 - rank
            (dist.send if rank else dist.recv)(floats(8), peer)
            (dist.recv if rank else dist.send)(floats(4), peer)
        note("messages")
        thread = threading.Thread(target=lambda: dist.all_reduce(floats(8)))
        thread.start()
        thread.join()
        with torch.inference_mode():
            dist.all_reduce(floats(8))
        note("thread and inference mode")
    return made


def by_flight_recorder() -> tuple[list[tuple[str, int, int]], list[tuple[str, int, int]]]:
    """Return name, bytes in and out of what torch's own recorder saw and of what we saw.

    It notes tensors of a collective with a root on every rank, whether they are read there or not, and of the others
    those that gloo does not make of other ones.
    """
    from torch._C._distributed_c10d import _dump_fr_trace_json

    widths = {"Float": 4, "BFloat16": 2, "Byte": 1, "Int": 4, "Long": 8}

    def size(entry: dict[str, Any], which: str) -> int:
        shapes, dtypes = entry[f"{which}_sizes"], entry[f"{which}_dtypes"]
        return sum(torch.Size(shape).numel() * widths[dtypes[0]] for shape in shapes)

    before = json.loads(_dump_fr_trace_json(True, False)).get("entries", [])
    known = {entry["record_id"] for entry in before}
    with CollectiveWatch() as seen:
        for name, run, _, _ in CASES:
            if name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single"):
                run()
        model = nn.parallel.DistributedDataParallel(nn.Linear(5, 3))
        model(torch.ones(2, 5)).sum().backward()
    after = json.loads(_dump_fr_trace_json(True, False))["entries"]
    theirs = [
        (entry["profiling_name"], size(entry, "input"), size(entry, "output"))
        for entry in after
        if entry["record_id"] not in known
    ]
    return theirs, [(each.name, each.bytes_in, each.bytes_out) for each in seen.records]


def under_way_until_the_others_come() -> tuple[list[str], list[str], list[str]]:
    """Rank 0 starts a collective that the others join once it was seen; nobody sleeps."""
    group = dist.new_group(list(range(N)))
    with CollectiveWatch(group) as seen:
        work = None
        if dist.get_rank() == 0:
            work = dist.all_reduce(floats(4), group=group, async_op=True)
        before = [repr(each) for each in seen.under_way]
        dist.barrier()
        if work is None:
            work = dist.all_reduce(floats(4), group=group, async_op=True)
        work.wait()
        return before, [repr(each) for each in seen.under_way], [each.name for each in seen.records]


def two_watches() -> tuple[dict[str, Traffic], dict[str, Traffic], int, int]:
    """Return what a watch of one group and one of all see, and the kernels while one is left and afterwards."""
    group = dist.new_group([0, 1])
    with CollectiveWatch(keep=2) as all_of_them:
        if dist.get_rank() < 2:
            with CollectiveWatch(group) as one:
                for _ in range(3):
                    dist.all_reduce(floats(2), group=group)
                dist.all_reduce(floats(1))
            mine = one.traffic(group)
        else:
            mine = {}
            dist.all_reduce(floats(1))
        dist.all_reduce(floats(1))
        assert len(all_of_them.records) <= 2
        left = kernels()
    return mine, all_of_them.traffic(dist.group.WORLD), left, kernels()


def messages_under_way() -> list[bool]:
    """Return whether a message is done before this rank has waited for it, and after."""
    rank = dist.get_rank()
    with CollectiveWatch() as seen:
        if rank == 2:
            return []
        work = (dist.isend if rank else dist.irecv)(floats(4), 1 - rank)
        before = seen.under_way == seen.records
        work.wait()
        return [before, seen.under_way == []]


def errors(*, watched: bool) -> list[str]:
    """Return the texts of errors at the start of a collective, and of one that comes later; the group is then gone."""
    alone = dist.new_group(list(range(N)), timeout=timedelta(milliseconds=200))
    seen = CollectiveWatch()
    if watched:
        seen.start()
    said = []
    for wrong in (
        lambda: GATHER_SINGLE(floats(4), floats(8)),
        lambda: dist.all_gather(parts(4), floats(8)),
    ):
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as caught:
            wrong()
        said.append(f"{type(caught.value).__name__}: {str(caught.value).splitlines()[0]}")
    if watched:
        assert [each.is_failed for each in seen.records] == [True] * 2
        assert all(each.is_done for each in seen.records)
    if dist.get_rank() == 0:
        work = dist.all_reduce(floats(4), group=alone, async_op=True)
        with pytest.raises(RuntimeError) as late:
            work.wait()
        said.append(type(late.value).__name__)
        if watched:
            assert seen.under_way == []
            assert seen.records[-1].is_done
    seen.destroy()
    dist.barrier()
    return said


@pytest.fixture(scope="module")
def ran() -> dict[str, list[Any]]:
    functions = {
        "plain": plain_ones,
        "torch": of_torch_itself,
        "recorder": by_flight_recorder,
        "under way": under_way_until_the_others_come,
        "messages": messages_under_way,
        "two": two_watches,
        "errors": partial(errors, watched=False),
        "errors watched": partial(errors, watched=True),
    }
    return dict(zip(functions, run_ranks(list(functions.values()), N), strict=True))


@pytest.mark.parametrize("rank", range(N))
def test_each_collective_is_recorded_once_with_its_payload(ran: dict[str, list[Any]], rank: int) -> None:
    expected = [
        (name, number, *(at_root if rank == 1 else elsewhere), True)
        for number, (name, _, elsewhere, at_root) in enumerate(CASES, 1)
    ]
    assert ran["plain"][rank] == expected


def test_what_torch_starts_itself_is_seen(ran: dict[str, list[Any]]) -> None:
    for rank, made in enumerate(ran["torch"]):
        # DDP compares the shapes of the ranks, then rank 0 sends them its model: 18 floats.
        assert [name for name, _, _ in made["ddp made"]][-1] == "broadcast"
        assert made["ddp made"][-1] == ("broadcast", 72 * (rank == 0), 72 * (rank != 0))
        assert made["ddp backward"] == [("all_reduce", 72, 72)]
        # Which of its reduce-scatters torch takes is its own affair.
        first, (name, *moved) = made["functional"]
        assert first == ("all_reduce", 32, 32)
        assert (name.removesuffix("_coalesced"), moved) == ("reduce_scatter_tensor", [96, 32])
        assert [name for name, _, _ in made["objects"]] == ["all_gather", "all_gather", "broadcast", "broadcast"]
        assert made["thread and inference mode"] == [("all_reduce", 32, 32)] * 2
    assert [made["messages"] for made in ran["torch"]] == [
        [("recv", 0, 32), ("send", 16, 0)],
        [("send", 32, 0), ("recv", 0, 16)],
        [],
    ]


def test_torchs_flight_recorder_saw_the_same(ran: dict[str, list[Any]]) -> None:
    for theirs, ours in ran["recorder"]:
        assert len(theirs) == len(ours) > 6
        for (called, *their_bytes), (name, *our_bytes) in zip(theirs, ours, strict=True):
            assert called.removeprefix("gloo:").split("_")[:2] == name.split("_")[:2]
            if name != "broadcast":
                assert their_bytes == our_bytes


def test_a_collective_is_under_way_until_all_ranks_have_come(ran: dict[str, list[Any]]) -> None:
    for rank, (before, after, names) in enumerate(ran["under way"]):
        assert [text.split(", ")[-1] for text in before] == ["under way>"] * (rank == 0)
        assert after == []
        assert names == ["all_reduce"]


def test_a_message_is_under_way_until_it_was_waited_for(ran: dict[str, list[Any]]) -> None:
    assert ran["messages"] == [[True, True], [True, True], []]


def test_a_watch_sees_its_groups_only_and_the_last_one_takes_the_kernels_away(ran: dict[str, list[Any]]) -> None:
    for rank, (of_group, of_world, left, afterwards) in enumerate(ran["two"]):
        assert of_group == ({"all_reduce": Traffic(3, 24, 24)} if rank < 2 else {})
        assert of_world == {"all_reduce": Traffic(2, 8, 8)}
        assert left == len(watch._OPERATORS)
        assert afterwards == 0


def test_errors_pass_through_unchanged(ran: dict[str, list[Any]]) -> None:
    assert ran["errors watched"] == ran["errors"]
    assert [len(said) for said in ran["errors"]] == [3, 2, 2]


def test_every_operator_of_this_torch_is_known() -> None:
    assert {name for name, _, _ in watch._group_operators()} == set(watch._OPERATORS)


def test_an_operator_that_is_not_known_is_recorded_without_bytes(
    one_process: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    init_distributed()
    monkeypatch.delitem(watch._OPERATORS, "allreduce_")
    with CollectiveWatch() as seen:
        dist.all_reduce(floats(8))
    assert [(each.name, each.bytes_in, each.bytes_out, each.is_done) for each in seen.records] == [
        ("allreduce_", 0, 0, True)
    ]


def test_without_a_watch_there_are_no_kernels(one_process: None) -> None:  # noqa: F811
    init_distributed()
    assert kernels() == 0
    seen = CollectiveWatch()
    dist.all_reduce(floats(8))
    assert kernels() == 0
    seen.start()
    with pytest.raises(CommError, match="started already"):
        seen.start()
    dist.all_reduce(floats(8))
    seen.destroy()
    seen.destroy()
    assert kernels() == 0
    dist.all_reduce(floats(8))
    assert seen.traffic(dist.group.WORLD) == {"all_reduce": Traffic(1, 32, 32)}


def test_a_watch_that_was_forgotten_ends_with_all_that_a_process_has_one_of(one_process: None) -> None:  # noqa: F811
    CollectiveWatch().start()
    assert kernels() == len(watch._OPERATORS)
    reset_globals()
    assert kernels() == 0


def test_what_is_done_is_let_go_of(one_process: None) -> None:  # noqa: F811
    init_distributed()
    with CollectiveWatch() as seen:
        dist.all_reduce(floats(8))
        dist.all_reduce(floats(8))
        assert [each._work for each in seen.records] == [None, None]
        assert repr(seen.records[0]) == "<all_reduce 1 of group '0': 32 bytes in, 32 out, done>"


def test_traffic_adds_up() -> None:
    assert Traffic(1, 2, 3) + Traffic(10, 20, 30) == Traffic(11, 22, 33)
    assert Traffic(1, 2, 3) * 4 == Traffic(4, 8, 12)
