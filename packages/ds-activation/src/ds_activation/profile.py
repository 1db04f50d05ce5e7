"""What each block of a model saves for backward, and how long it takes: measured during one forward.

A block runs for itself first, from the random state it would have, and what it saved is dropped; then it runs for good,
to be computed again in backward. So memory never exceeds that of recomputing every block by more than one block.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from ds_activation.choice import Call, Cost, Decision, Held, ModelProfile
from ds_activation.selective import selective_contexts
from ds_activation.storages import SavedTensors, StorageNumbers, fixed_storages, storages_of
from ds_activation.trial import Tally, as_before, seconds_per_byte, timed
from ds_core.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, UntypedStorage, nn

__all__ = ["Measurement", "profile"]

_SHARE = 0.05
"""Of the time of a copy, what the computation beside it loses."""


def profile(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], blocks: Sequence[tuple[str, nn.Module]]
) -> ModelProfile:
    """Run one forward of ``module`` with gradients on, and return what it saves and how long its blocks take.

    Random states, buffers and forwards are afterwards what they were; parameters get no gradients.

    Args:
        module: on its device.
        args: of its forward, with ``kwargs``.
        kwargs: of its forward.
        blocks: of :func:`ds_activation.blocks.find_blocks`.
    """
    from ds_activation.forwards import attach_forwards

    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    measurement = Measurement(module, [name for name, _ in blocks], device)
    forwards = attach_forwards(blocks, [Decision.RECOMPUTE] * len(blocks))
    try:
        for forward in forwards:
            forward.measurement = measurement
        with as_before(module, device), torch.enable_grad(), measurement:
            output = module(*args, **kwargs)
            # While the output is there: with it goes what was saved.
            found = measurement.result()
            del output
    finally:
        for forward in forwards:
            forward.detach()
    return found


class Measurement:
    """Measures the blocks of a model during one forward, which runs while this is entered.

    The seconds of a block are the least of two runs (of the first, in which tensors are noted and a device warms up,
    and of a plain one). Those of selective recomputation are of a second run with the kept results at hand. Those of
    offload are the copies, there and back, as far as each takes longer than the block's forward beside which it runs,
    and a twentieth of their time, because they share memory with the computation.

    Args:
        module: the model; what it has of parameters and buffers is not counted.
        names: of the blocks.
        device: of the model.
        can_offload: whether there is other memory than the device's; None: there is, but on a CPU.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], device: torch.device, *, can_offload: bool | None = None
    ) -> None:
        self._module, self._names, self._device = weakref.ref(module), tuple(names), device
        is_offered = device.type != "cpu" if can_offload is None else can_offload
        self._rates = seconds_per_byte(device) if is_offered else None
        self._known, self._saved = StorageNumbers(), SavedTensors()
        self._calls: list[Call] = []
        self._fixed: frozenset[int] = frozenset()
        self._is_inside = False
        self._hooks: Any = None

    def __enter__(self) -> Measurement:
        module = self._module()
        assert module is not None
        self._fixed = fixed_storages(module)
        self._hooks = self._saved.hooks()
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)
        self._saved.is_on = False

    def result(self) -> ModelProfile:
        """Return the profile; called when the forward has ended and its output is still there."""
        rest: list[set[int]] = [set() for _ in range(len(self._calls) + 1)]
        for place, tensor in self._saved.alive():
            rest[place].update(self._numbers(tensor))
        return ModelProfile(
            self._names, tuple(self._known.sizes), tuple(self._calls), tuple(frozenset(one) for one in rest)
        )

    def call(
        self,
        at: int,
        block: nn.Module,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        run: Callable[..., Any],
    ) -> Any:
        """Measure one call of the ``at``-th block, and return what ``run(function, args, kwargs)`` returns."""
        if self._is_inside:  # a block that another one has inside
            return function(*args, **kwargs)
        self._is_inside, self._saved.is_on = True, False
        try:
            inputs = self._numbers(args, kwargs)
            measured = self._measure(at, block, function, args, kwargs)
            output = run(function, args, kwargs)
        finally:
            self._is_inside, self._saved.is_on = False, True
        self._calls.append(self._priced(at, inputs, measured, output))
        self._saved.place = len(self._calls)
        return output

    def _numbers(self, *values: Any) -> frozenset[int]:
        return frozenset(self._known.number(one) for one in storages_of(values) if one._cdata not in self._fixed)

    def _measure(
        self, at: int, block: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Measured:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        versions = [tensor._version for tensor in tensors]

        def once(*contexts: Any) -> tuple[Any, float]:
            # With hooks of its own: those of a checkpoint around the block count what is saved.
            with as_before(block, self._device), SavedTensors().hooks():
                return timed(function, args, kwargs, self._device, contexts)

        saved = SavedTensors()
        output, seconds = once(saved.hooks())
        if versions != [tensor._version for tensor in tensors]:
            raise EngineError(
                "the block changes an input in place, so it cannot be computed again",
                where=self._names[at],
                fix='leave it out of "modules", or change a copy',
            )
        saves = self._sort([tensor for _, tensor in saved.alive()], output, tensors)
        del output, saved
        saves.settle(self._known)
        result = _Measured(saves, min(seconds, once()[1]))
        # Results are kept from the first run to the second: what is changed in place in between is of no use.
        tally, (first, second) = Tally(), selective_contexts()
        saved = SavedTensors()
        output, _ = once(saved.hooks(), tally, first)
        if not tally.is_changed:
            kept = self._sort(tally.results, output, tensors)
            work = self._sort([*tally.results, *(tensor for _, tensor in saved.alive())], output, tensors)
            del output, saved
            tally.results.clear()
            seconds = once(second)[1]
            del first, second
            kept.settle(self._known)
            work.settle(self._known)
            result.selective = _Selective(kept, work, seconds)
        return result

    def _sort(self, tensors: Sequence[Tensor], output: Any, inputs: Sequence[Tensor]) -> _Sorted:
        given = {storage._cdata for storage in storages_of(list(inputs))}
        leaves: dict[int, int] = {}
        for at, leaf in enumerate(tree_leaves(output)):
            for storage in storages_of(leaf):
                leaves.setdefault(storage._cdata, at)
        found = _Sorted()
        seen: set[int] = set()
        for storage in storages_of(list(tensors)):
            key = storage._cdata
            if key in self._fixed or key in seen:
                continue
            seen.add(key)
            if key in given:
                found.shared.add(self._known.number(storage))
            elif key in leaves:
                found.leaves.add(leaves[key])
            else:
                found.inner.append((weakref.ref(storage), storage.nbytes()))
        return found

    def _priced(self, at: int, inputs: frozenset[int], measured: _Measured, output: Any) -> Call:
        leaves = tree_leaves(output)

        def held(of: _Sorted, *also: frozenset[int]) -> Held:
            out = self._numbers([leaves[leaf] for leaf in of.leaves])
            return Held(frozenset(of.shared).union(out, *also), of.own_bytes)

        seconds = measured.seconds
        kept = held(measured.saves)
        again = Held(kept.shared | inputs, kept.own_bytes)
        costs = {
            Decision.KEEP: Cost(kept, kept),
            Decision.RECOMPUTE: Cost(Held(inputs), again, seconds),
        }
        part = measured.selective
        if part is not None:
            costs[Decision.SELECTIVE] = Cost(held(part.kept, inputs), held(part.work, inputs), part.seconds)
        if self._rates is not None:
            nbytes = kept.own_bytes + sum(
                self._known.sizes[one] for one in kept.shared - frozenset(measured.saves.shared)
            )
            copies = [rate * nbytes for rate in self._rates]
            waits = sum(max(0.0, one - seconds) + _SHARE * one for one in copies)
            costs[Decision.OFFLOAD] = Cost(Held(frozenset(measured.saves.shared)), kept, waits)
        return Call(at, costs)


@dataclass
class _Sorted:
    """The storages that a run of a block has saved, or some of them."""

    shared: set[int] = field(default_factory=set)
    """Those of its inputs, and of what else outlives the run."""
    leaves: set[int] = field(default_factory=set)
    """Those of its output, by places in it."""
    inner: list[tuple[weakref.ref[UntypedStorage], int]] = field(default_factory=list)
    """The rest, until it is known what outlives the run."""
    own_bytes: int = 0
    """Of the rest, afterwards."""

    def settle(self, known: StorageNumbers) -> None:
        """Find out, when the run and what it saved are gone, which storages are still there: they belong to others."""
        for reference, nbytes in self.inner:
            storage = reference()
            if storage is None:
                self.own_bytes += nbytes
            else:
                self.shared.add(known.number(storage))
        self.inner = []


@dataclass
class _Measured:
    saves: _Sorted
    seconds: float
    selective: _Selective | None = None


@dataclass
class _Selective:
    kept: _Sorted
    work: _Sorted
    """What is kept, and what backward needs beside it."""
    seconds: float
