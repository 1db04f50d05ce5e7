"""Tensors that wait on the host: values, memory and the order of copies, on a device that runs as a test says."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_activation.copy_driver import Driver
from ds_activation.host_copies import HostCopies, host_copies
from ds_core import log
from ds_core.errors import EngineError

if TYPE_CHECKING:
    from types import ModuleType

CPU = torch.device("cpu")


def _module(name: str) -> ModuleType:
    """Return the module of that name beside this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FakeDevice = _module("fake_device").FakeDevice


def values(number: int, numel: int = 4) -> torch.Tensor:
    return torch.full((numel,), float(number))


KINDS = {
    "one dimension": torch.arange(5.0),
    "no dimension": torch.tensor(2.5, dtype=torch.float64),
    "transposed": torch.arange(24.0).view(4, 6).t(),
    "channels last": torch.arange(48.0).view(2, 3, 2, 4).to(memory_format=torch.channels_last),
    "a part": torch.arange(24.0).view(4, 6)[1:3, ::2],
    "repeated": torch.arange(3.0).view(3, 1).expand(2, 3, 4),
    "repeated of a part": torch.arange(6.0)[::2].view(3, 1).expand(3, 4),
    "bfloat16": torch.arange(7).to(torch.bfloat16),
    "whole numbers": torch.arange(9, dtype=torch.int16),
    "truth": torch.tensor([True, False, True]),
    "complex": torch.complex(torch.arange(4.0), torch.ones(4)),
    "conjugate": torch.complex(torch.arange(4.0), torch.ones(4)).conj(),
    "not a number": torch.tensor([float("nan"), -0.0, float("inf")]),
    "of a graph": torch.ones(3, requires_grad=True) * 2,
    "a parameter": torch.nn.Parameter(torch.ones(3)),
}


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back_is_the_same(kind: str, streams: bool) -> None:
    given, device = KINDS[kind], FakeDevice(streams=streams)
    copies = HostCopies(keep_last=0, max_leaving=0, driver=device)
    found = copies.to_host(given).restore()
    assert device.log == ["to host", "to device"]
    bits = [t.detach().resolve_conj().contiguous().view(torch.uint8) for t in (found.reshape(-1), given.reshape(-1))]
    assert torch.equal(*bits)
    assert (found.shape, found.dtype, found.requires_grad) == (given.shape, given.dtype, False)
    if torch.empty_like(given, device="meta").stride() == given.stride() or kind == "repeated":
        assert found.stride() == given.stride()
    # Repeated memory crosses once.
    assert copies.stats.offloaded_bytes == (12 if "repeated" in kind else given.numel() * given.element_size())


def test_a_tensor_of_the_host_stays_by_reference() -> None:
    copies, given = HostCopies(keep_last=0), torch.ones(3, requires_grad=True)
    handle = copies.to_host(given)
    for _ in range(2):
        found = handle.restore()
        assert found.data_ptr() == given.data_ptr()
        assert not found.requires_grad
    assert copies.stats.offloaded_tensors == 0


class Odd(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "given",
    [torch.empty(0, 3), torch.ones(3).to_sparse(), torch.ones(3).as_subclass(Odd), torch.ones(2)],
    ids=["empty", "sparse", "a subclass", "small"],
)
def test_what_cannot_or_need_not_leave_stays(given: torch.Tensor) -> None:
    device = FakeDevice()
    copies = HostCopies(keep_last=0, min_bytes=12, driver=device)
    assert copies.to_host(given).restore().shape == given.shape
    assert device.log == []
    assert copies.can_leave(torch.ones(3))


@pytest.mark.parametrize("keep_last", [0, 1, 3])
def test_the_newest_stay(keep_last: int) -> None:
    device = FakeDevice()
    copies = HostCopies(keep_last, max_leaving=0, driver=device)
    handles = [copies.to_host(device.tensor(values(n))) for n in range(5)]
    assert device.log == ["to host"] * (5 - keep_last)
    assert (copies.stats.offloaded_tensors, copies.stats.kept_last_tensors) == (5 - keep_last, keep_last)
    assert len(device.freed) == 5 - keep_last
    assert [handle.restore()[0].item() for handle in reversed(handles)] == [4, 3, 2, 1, 0]
    assert device.log.count("to device") == 5 - keep_last


def test_one_that_has_died_is_not_copied() -> None:
    device = FakeDevice()
    copies = HostCopies(1, driver=device)
    for number in range(3):
        copies.to_host(device.tensor(values(number)))
    assert device.log == []
    assert len(device.freed) == 3


def test_a_source_is_held_until_its_copy_is_done_or_waited_for() -> None:
    device = FakeDevice(eager=False)
    copies = HostCopies(0, max_leaving=2, driver=device)
    handles = [copies.to_host(device.tensor(values(n))) for n in range(2)]
    assert device.freed == []
    handles.append(copies.to_host(device.tensor(values(2))))
    assert len(device.freed) == 1  # the computation waits before it writes there
    device.finish()
    handles.append(copies.to_host(device.tensor(values(3))))
    assert len(device.freed) == 3  # the rest was done
    found: list[torch.Tensor] = []
    for handle in reversed(handles):
        device.read(handle.restore(), found)
    device.finish()
    assert [one[0].item() for one in found] == [3, 2, 1, 0]


def test_sources_whose_copies_are_done_are_let_go_of_in_backward_too() -> None:
    device = FakeDevice(eager=False)
    copies = HostCopies(0, max_leaving=8, driver=device)
    handles = [copies.to_host(device.tensor(values(n))) for n in range(4)]
    device.finish()
    handles[3].restore()  # takes itself and the one before it
    assert len(device.freed) == 2


@pytest.mark.parametrize("is_cleared", [True, False])
def test_what_was_fetched_early_and_is_not_wanted_does_no_harm(is_cleared: bool) -> None:
    device = FakeDevice(eager=False)
    copies = HostCopies(1, max_leaving=0, driver=device)
    handles = [copies.to_host(device.tensor(values(n))) for n in range(2)]
    device.finish()
    del device.freed[:]
    handles[1].restore()
    if is_cleared:
        copies.clear()
    handles.pop(0)  # on its way
    handles[0].restore()
    assert len(device.freed) == 1
    other = device.tensor(values(5))  # in the same memory
    device.finish(device.compute)
    device.finish()
    assert other.equal(values(5))


def test_one_that_is_still_there_is_not_copied_back() -> None:
    device = FakeDevice(eager=False)
    copies = HostCopies(0, max_leaving=2, driver=device)
    handle = copies.to_host(device.tensor(values(7)))
    found: list[torch.Tensor] = []
    device.read(handle.restore(), found)
    assert device.log == ["to host"]
    device.finish()
    assert found[0].equal(values(7))
    assert (copies.stats.offloaded_tensors, copies.stats.restored_tensors) == (1, 1)


def test_the_one_that_is_wanted_next_comes_early() -> None:
    device = FakeDevice()
    copies = HostCopies(1, max_leaving=0, driver=device)
    handles = [copies.to_host(device.tensor(values(n))) for n in range(4)]
    del device.log[:]
    for wanted in (3, 2, 1, 0):
        handles[wanted].restore()
        # The newest was there; each brings the one before it, and none is copied twice.
        assert device.log == ["to device"] * min(4 - wanted, 3)
    assert copies.stats.restored_tensors == copies.stats.offloaded_tensors == 3
    assert copies.stats.restored_bytes == copies.stats.offloaded_bytes == 48


def test_several_tensors_of_a_layer_all_come_early() -> None:
    device = FakeDevice()
    copies = HostCopies(1, max_leaving=0, driver=device)
    handles = [copies.to_host(device.tensor(values(n))) for n in range(6)]
    wanted_here = []
    for layer in (4, 2, 0):  # of two each, in the order of forward
        for wanted in (layer, layer + 1):
            wanted_here.append(handles[wanted].state.tensor is not None)
            assert handles[wanted].restore()[0].item() == wanted
    assert wanted_here == [False, True, True, True, True, True]


def test_the_computation_does_not_wait_for_what_comes_early() -> None:
    device = FakeDevice(eager=False)
    copies = HostCopies(1, max_leaving=0, driver=device)
    handles = [copies.to_host(device.tensor(values(n))) for n in range(3)]
    device.finish()
    found: list[torch.Tensor] = []
    device.read(handles[2].restore(), found)
    while device.step(device.compute):
        pass
    assert len(found) == 1
    assert device.done.count("to device") == 0
    device.finish()
    assert device.done.count("to device") == 1


def test_it_can_be_restored_again() -> None:
    device = FakeDevice()
    copies = HostCopies(0, max_leaving=0, driver=device)
    handle = copies.to_host(device.tensor(values(5)))
    first, again = handle.restore(), handle.restore()
    assert device.log == ["to host", "to device"]
    assert first.data_ptr() == again.data_ptr()
    assert first is not again  # requires_grad of one is not that of the other
    assert copies.stats.restored_tensors == 1
    address = first.data_ptr()
    del first, again, handle
    assert address in device.freed


def test_buffers_are_lent_again() -> None:
    device = FakeDevice()
    copies = HostCopies(0, max_leaving=0, driver=device)
    for _ in range(3):
        handles = [copies.to_host(device.tensor(values(n, 4 + n))) for n in range(3)]
        for number in (2, 1, 0):
            assert handles[number].restore().equal(values(number, 4 + number))
    assert device.buffers == [(16, True), (20, True), (24, True)]
    for _ in range(3):  # forwards without a backward
        handles = [copies.to_host(device.tensor(values(n, 4))) for n in range(3)]
        del handles
    assert len(device.buffers) == 3


def test_few_free_buffers_are_kept() -> None:
    device = FakeDevice()
    copies = HostCopies(0, max_pooled=2, max_leaving=0, driver=device)
    for made in (5, 8, 11):
        handles = [copies.to_host(device.tensor(values(n))) for n in range(5)]
        assert len(device.buffers) == made
        del handles
    copies.clear()
    copies.to_host(device.tensor(values(0)))
    assert len(device.buffers) == 12


def test_nothing_is_kept_of_what_is_no_longer_wanted() -> None:
    device = FakeDevice(eager=False)
    copies = HostCopies(0, max_leaving=8, driver=device)
    handles = [copies.to_host(device.tensor(values(n))) for n in range(4)]
    device.finish()
    copies.to_host(device.tensor(values(9)))
    handles[3].restore()  # and 2 is on its way
    del handles
    gc.collect()
    copies.clear()
    device.finish()
    assert device._blocks == {}


def test_handles_stay_good_after_clear() -> None:
    device = FakeDevice()
    copies = HostCopies(1, driver=device)
    handles = [copies.to_host(device.tensor(values(n))) for n in range(4)]
    copies.clear()
    handles[3].restore()
    copies.clear()
    handles.append(copies.to_host(device.tensor(values(4))))
    assert [handle.restore()[0].item() for handle in handles] == [0, 1, 2, 3, 4]


def test_without_streams_every_copy_is_done_when_its_call_returns() -> None:
    for device, use_streams in ((FakeDevice(streams=False), True), (FakeDevice(), False)):
        copies = HostCopies(1, use_streams=use_streams, driver=device)
        handles = [copies.to_host(device.tensor(values(n))) for n in range(3)]
        assert device.done == ["to host"] * 2
        assert handles[2].restore().equal(values(2))
        assert device.done == ["to host"] * 2  # nothing comes early: it would be waited for
        assert handles[1].restore().equal(values(1))
        assert device.done == ["to host"] * 2 + ["to device"]
        assert device.sides == []


@pytest.mark.parametrize("keep_last", [0, 1])
@pytest.mark.parametrize("max_leaving", [0, 1])
def test_what_was_modified_in_place_is_an_error(keep_last: int, max_leaving: int) -> None:
    device = FakeDevice(eager=False)
    copies = HostCopies(keep_last, max_leaving=max_leaving, driver=device)
    given = device.tensor(values(1))
    handle = copies.to_host(given)
    given.add_(1)
    others = [copies.to_host(device.tensor(values(n))) for n in range(3)]
    if keep_last == max_leaving == 0:
        # The computation waited for the copy before it wrote.
        assert device.log == ["to host"] * 4
    else:
        with pytest.raises(EngineError, match="modified in place after forward had saved it: shape \\(4,\\), dtype"):
            handle.restore()
    others[-1].restore()


def test_on_the_host_too_what_was_modified_in_place_is_an_error() -> None:
    given = torch.ones(3)
    handle = HostCopies().to_host(given)
    given.zero_()
    with pytest.raises(EngineError, match="fix: replace the in-place operation"):
        handle.restore()


def test_tensors_of_inference_mode_pass() -> None:
    device = FakeDevice()
    with torch.inference_mode():
        handles = [
            HostCopies(0, max_leaving=0, driver=device).to_host(torch.ones(3)),
            HostCopies().to_host(torch.ones(3)),
        ]
        assert all(handle.restore().equal(torch.ones(3)) for handle in handles)


def test_memory_that_cannot_be_pinned_is_used_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    log.reset()  # an engine of another test may have given the logger a handler of its own
    device = FakeDevice(can_pin=False)
    copies = HostCopies(0, max_leaving=0, driver=device)
    handles = [copies.to_host(device.tensor(values(n))) for n in range(2)]
    assert [handle.restore()[0].item() for handle in handles] == [0, 1]
    assert device.buffers == [(16, False)] * 2
    assert caplog.text.count("is not pinned, copies are slower: CUDA error: out of memory") == 1


def test_memory_is_not_pinned_where_that_is_not_wanted() -> None:
    device = FakeDevice()
    HostCopies(0, pin_memory=False, driver=device).to_host(device.tensor(values(0)))
    assert device.buffers == [(16, False)]


def test_a_device_has_one_instance_per_process() -> None:
    assert host_copies(CPU) is host_copies(CPU)
    assert host_copies(CPU) is not host_copies(torch.device("cuda", 1))
    given = torch.ones(2)
    assert host_copies(CPU).to_host(given).restore().data_ptr() == given.data_ptr()
    host_copies(CPU).clear()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["save", "save", "restore newest", "restore any", "drop newest", "drop any", "side", "compute", "clear"]
        ),
        st.integers(0, 5),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, keep_last=st.integers(0, 2), max_leaving=st.integers(0, 3), max_pooled=st.integers(0, 3))
def test_however_streams_and_calls_interleave_the_computation_reads_what_was_saved(
    steps: list[tuple[str, int]], keep_last: int, max_leaving: int, max_pooled: int
) -> None:
    device = FakeDevice(eager=False)
    copies = HostCopies(keep_last, max_pooled=max_pooled, max_leaving=max_leaving, driver=device)
    handles, expected, found, saved, at_once = [], [], [], 0, 0
    for step, number in steps:
        if step == "save":
            saved += 1
            handles.append((saved, 3 + number, copies.to_host(device.tensor(values(saved, 3 + number)))))
            at_once = max(at_once, len(handles))
        elif step == "clear":
            copies.clear()
        elif step in ("side", "compute"):
            streams = device.sides if step == "side" else [device.compute]
            for _ in range(number + 1):
                any(device.step(stream) for stream in streams)
        elif handles:
            at = -1 if "newest" in step else number % len(handles)
            if "drop" in step:
                handles.pop(at)
            else:
                value, numel, handle = handles[at]
                expected.append(values(value, numel))
                device.read(handle.restore(), found)
                del handle
    copies.clear()
    device.finish()
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert sum(len(pool._free) for pool in copies._pools.values()) <= max_pooled
    handles.clear()
    copies.clear()
    device.finish()
    assert device._blocks == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_device() -> None:
    copies = HostCopies(keep_last=1)
    given = [torch.randn(1000, 100 + n, device="cuda") for n in range(8)]
    wanted = [one.clone() for one in given]
    handles = [copies.to_host(one) for one in given]
    del given
    for handle, one in zip(reversed(handles), reversed(wanted), strict=True):
        assert torch.equal(handle.restore(), one)
    assert copies.stats.offloaded_tensors == 7
    assert Driver().has_streams(torch.device("cuda"))
