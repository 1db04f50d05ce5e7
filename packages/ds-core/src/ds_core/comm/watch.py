"""See every collective of this process, whoever starts it: what, in which group, how many bytes, whether it is done.

Note: how it sees them. Every method of a process group, called from Python, from DDP's reducer or from a functional
collective, goes through one operator of torch's dispatcher (``c10d::allreduce_`` and its like). While something
watches, each of these operators has one more kernel, at the dispatch key that comes before the device's, which notes
the call and passes it on. It is there in all threads, those of autograd included, for groups made before and after,
and costs about 50 microseconds a collective. It is registered when the first watch starts and taken away when the last
one ends; without one there is nothing. What was rejected, and why: docs/design/collectives.md.

Note: what it does not see. A process group that is a Python class of its own and calls no backend of torch's; code that
calls a backend itself, as ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` does for its checks; kernels that reach into the memory
of other GPUs. What runs under a FakeTensorMode moves nothing, and is not seen either.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ds_core.comm.groups import destroy_at_exit
from ds_core.errors import CommError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed import ProcessGroup, Work

__all__ = ["Collective", "CollectiveWatch", "Traffic"]


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: how many, and what this rank handed over and was given.

    Bytes are those of the tensors a collective reads and writes on this rank, its payload. What a backend sends to
    carry it out is another number: a ring moves ``2 (n-1)/n`` of an all-reduce's bytes out of each of ``n`` ranks, and
    ``(n-1)/n`` of the whole for a reduce-scatter, an all-gather or an all-to-all.
    """

    count: int = 0
    bytes_in: int = 0
    """Read on this rank."""
    bytes_out: int = 0
    """Written on this rank."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.count + other.count, self.bytes_in + other.bytes_in, self.bytes_out + other.bytes_out)

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.count * times, self.bytes_in * times, self.bytes_out * times)


class Collective:
    """One collective that this rank started."""

    def __init__(self, sequence: int, name: str, group: str, bytes_in: int, bytes_out: int, *, is_p2p: bool) -> None:
        self.sequence = sequence
        """Its number among those of its group since the watch started: 1, 2, ...; equal on ranks that do the same.
        Messages from one rank to another are numbered apart."""
        self.name = name
        """As the function of ``torch.distributed`` is called."""
        self.group = group
        """Name of the process group, the same on all its ranks."""
        self.bytes_in, self.bytes_out = bytes_in, bytes_out
        """See :class:`Traffic`."""
        self.is_p2p = is_p2p
        """A send or a receive."""
        self.is_failed = False
        """Starting it raised. What goes wrong later is raised to whoever waits for it; here it is done then."""
        self._work: Work | None = None
        self._is_started = False
        """The call that starts it has ended."""

    @property
    def is_done(self) -> bool:
        """Whether this rank's part has ended, well or not. On a GPU: whether the device is through with it.

        Gloo (torch 2.13) has two handles that only say what they were waited for: of messages, which are therefore
        done once this rank has waited; and of reduce-scatters, which it makes of all-reduces and whose handle says
        nothing even then: they are done here once they were started.
        """
        work = self._work
        if work is not None and (work.is_completed() or not (self.is_p2p or _can_be_asked(work))):
            # It holds the tensors.
            self._work = work = None
        return self._is_started and work is None

    def __repr__(self) -> str:
        state = "failed" if self.is_failed else "done" if self.is_done else "under way"
        sizes = f"{self.bytes_in} bytes in, {self.bytes_out} out"
        return f"<{self.name} {self.sequence} of group {self.group!r}: {sizes}, {state}>"


def _can_be_asked(work: Work) -> bool:
    try:
        work.get_future()
    except RuntimeError:
        return False
    return True


class CollectiveWatch:
    """Records the collectives that this process starts between :meth:`start` and :meth:`destroy`, or inside ``with``.

    A collective that is done is let go of when the next one starts or somebody looks; until then its tensors stay.

    >>> import torch
    >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    >>> with CollectiveWatch() as watch:
    ...     torch.distributed.all_reduce(torch.ones(10))
    >>> watch.records
    [<all_reduce 1 of group '0': 40 bytes in, 40 out, done>]
    >>> torch.distributed.destroy_process_group()
    """

    def __init__(self, *groups: ProcessGroup, keep: int = 1024) -> None:
        """Watch ``groups``, all of this process where none is given; ``keep`` that many records, the last ones."""
        self._groups = frozenset(group.group_name for group in groups)
        self._records: deque[Collective] = deque(maxlen=keep)
        self._under_way: list[Collective] = []
        self._totals: dict[tuple[str, str], Traffic] = {}
        self._sequences: dict[tuple[str, bool], int] = {}
        # Collectives start in the threads of autograd and in those of checkpoints, too.
        self._lock = threading.Lock()

    @property
    def records(self) -> list[Collective]:
        """The last collectives, in the order in which they were started."""
        with self._lock:
            self._settle()
            return list(self._records)

    @property
    def under_way(self) -> list[Collective]:
        """Those that were started and are not done, however long ago."""
        with self._lock:
            self._settle()
            return list(self._under_way)

    @property
    def totals(self) -> dict[tuple[str, str], Traffic]:
        """Everything since the start or :meth:`clear`, by the names of group and collective."""
        with self._lock:
            return dict(self._totals)

    def traffic(self, group: ProcessGroup) -> dict[str, Traffic]:
        """Return :attr:`totals` of one group, by the name of the collective."""
        return {name: sum_ for (of, name), sum_ in self.totals.items() if of == group.group_name}

    def clear(self) -> None:
        """Begin :attr:`records` and :attr:`totals` anew; numbers go on, and what is under way stays known."""
        with self._lock:
            self._records.clear()
            self._totals.clear()

    def start(self) -> None:
        """Begin to record. A process that wants to compare numbers between ranks starts at the same place on each."""
        _tap.add(self)
        destroy_at_exit(self)

    def destroy(self) -> None:
        """Stop recording; what was recorded stays. Safe to repeat. A process that ends in order does it by itself."""
        _tap.remove(self)
        with self._lock:
            self._settle()

    def __enter__(self) -> CollectiveWatch:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.destroy()

    def _settle(self) -> None:
        self._under_way = [each for each in self._under_way if not each.is_done]

    def _note(self, operator: _Operator, group: ProcessGroup, bytes_in: int, bytes_out: int) -> Collective | None:
        name = group.group_name
        if self._groups and name not in self._groups:
            return None
        with self._lock:
            self._settle()
            sequence = self._sequences[name, operator.is_p2p] = self._sequences.get((name, operator.is_p2p), 0) + 1
            noted = Collective(sequence, operator.name, name, bytes_in, bytes_out, is_p2p=operator.is_p2p)
            self._records.append(noted)
            self._under_way.append(noted)
            key = (name, operator.name)
            self._totals[key] = self._totals.get(key, Traffic()) + Traffic(1, bytes_in, bytes_out)
        return noted


class _Operator(NamedTuple):
    """An operator of torch's dispatcher: its name in ``torch.distributed``, and the places of its arguments."""

    name: str
    reads: int | None
    writes: int | None
    root: int | None = None
    """Place of the rank that alone reads (where it reads and writes in place: the one whose tensor all get)."""
    is_p2p: bool = False

    def bytes_moved(self, args: tuple[Any, ...], rank: int) -> tuple[int, int]:
        """Return what ``rank`` of the group hands over and is given."""
        reads = 0 if self.reads is None else sum(_sizes(args[self.reads]))
        writes = 0 if self.writes is None else sum(_sizes(args[self.writes]))
        if self.root is not None:
            is_root = args[self.root] == rank
            if self.name == "broadcast":
                return (reads, 0) if is_root else (0, writes)
            return reads, writes if is_root else 0
        return reads, writes


_OPERATORS = {
    "broadcast_": _Operator("broadcast", 0, 0, root=2),
    "allreduce_": _Operator("all_reduce", 0, 0),
    "allreduce_coalesced_": _Operator("all_reduce_coalesced", 0, 0),
    "reduce_": _Operator("reduce", 0, 0, root=3),
    "allgather_": _Operator("all_gather", 1, 0),
    "_allgather_base_": _Operator("all_gather_into_tensor", 1, 0),
    "allgather_coalesced_": _Operator("all_gather_coalesced", 1, 0),
    "allgather_into_tensor_coalesced_": _Operator("all_gather_into_tensor_coalesced", 1, 0),
    "gather_": _Operator("gather", 1, 0),
    "scatter_": _Operator("scatter", 1, 0),
    "reduce_scatter_": _Operator("reduce_scatter", 1, 0),
    "_reduce_scatter_base_": _Operator("reduce_scatter_tensor", 1, 0),
    "reduce_scatter_tensor_coalesced_": _Operator("reduce_scatter_tensor_coalesced", 1, 0),
    "alltoall_base_": _Operator("all_to_all_single", 1, 0),
    "alltoall_": _Operator("all_to_all", 1, 0),
    "barrier": _Operator("barrier", None, None),
    "monitored_barrier_": _Operator("monitored_barrier", None, None),
    "send": _Operator("send", 0, None, is_p2p=True),
    "recv_": _Operator("recv", None, 0, is_p2p=True),
    "recv_any_source_": _Operator("recv", None, 0, is_p2p=True),
}


def _sizes(value: Any) -> Iterator[int]:
    if isinstance(value, list | tuple):
        for each in value:
            yield from _sizes(each)
    else:
        yield value.numel() * value.element_size()


def _group_operators() -> Iterator[tuple[str, Any, int]]:
    """Yield name, operator and the place of the process group for every operator of torch that is given one."""
    import torch

    for qualified in torch._C._dispatch_get_all_op_names():
        space, _, name = qualified.partition("::")
        if space == "c10d" and "." not in name:
            operator = getattr(torch.ops.c10d, name).default
            for place, argument in enumerate(operator._schema.arguments):
                if str(argument.type).endswith(".ProcessGroup"):
                    yield name, operator, place


class _Tap:
    """The kernels, while anybody watches: one per process, as the dispatcher is."""

    def __init__(self) -> None:
        self._watches: tuple[CollectiveWatch, ...] = ()
        self._library: Any = None
        self._lock = threading.Lock()

    def add(self, watch: CollectiveWatch) -> None:
        with self._lock:
            if watch in self._watches:
                raise CommError("this watch was started already", where="CollectiveWatch.start", fix="start it once")
            if self._library is None:
                self._library = self._install()
            self._watches = (*self._watches, watch)

    def remove(self, watch: CollectiveWatch) -> None:
        with self._lock:
            self._watches = tuple(other for other in self._watches if other is not watch)
            if not self._watches:
                # The last reference: torch takes the kernels off when it goes.
                self._library = None

    def clear(self) -> None:
        """End what somebody has forgotten to end."""
        for watch in self._watches:
            watch.destroy()

    def _install(self) -> Any:
        import torch

        library = torch.library.Library("c10d", "IMPL")
        key = torch._C.DispatchKey.BackendSelect
        after = torch._C._dispatch_keyset_full_after(key)
        for name, function, place in _group_operators():
            # Of an operator that a later torch adds we know no bytes, but that it ran.
            operator = _OPERATORS.get(name, _Operator(name, None, None))
            library.impl(name, self._kernel(operator, function, place, after), key.name, with_keyset=True)
        return library

    def _kernel(self, operator: _Operator, function: Any, place: int, after: Any) -> Callable[..., Any]:
        from torch.distributed import ProcessGroup, Work

        def note_and_pass_on(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            group = ProcessGroup.unbox(args[place])
            moved = operator.bytes_moved(args, group.rank())
            noted = [each for watch in self._watches if (each := watch._note(operator, group, *moved)) is not None]
            try:
                result = function.redispatch(keyset & after, *args, **kwargs)
            except BaseException:
                for each in noted:
                    each._is_started = each.is_failed = True
                raise
            last = result[-1] if isinstance(result, tuple | list) and result else result
            for each in noted:
                # A barrier that waits returns nothing.
                each._work = None if last is None or isinstance(last, tuple | list) else Work.unbox(last)
                each._is_started = True
            return result

        return note_and_pass_on


_tap = _Tap()
