"""Host memory for what is saved in the background."""

from __future__ import annotations

import gc
import types

import pytest
import torch

from ds_ckpt import host
from ds_ckpt.host import HostMemory
from ds_core import log
from ds_core.interfaces.logical import Chunk, LogicalTensor, Piece
from ds_core.testing.memory import LiveStorage


def piece(data: torch.Tensor, dtype: str | None = None) -> Piece:
    of = LogicalTensor("w", "weight", tuple(data.shape), dtype or str(data.dtype).removeprefix("torch."))
    return Piece(of, Chunk.whole(of.shape), data)


DATA = [
    torch.arange(5, dtype=torch.uint8),
    torch.arange(24.0).view(4, 6).t(),
    torch.tensor(3.5, dtype=torch.float64),
    torch.empty(0, 4),
    torch.tensor([True, False, True]),
    torch.arange(7.0).to(torch.bfloat16),
]


def test_copies_equal_what_they_are_of_and_are_apart_from_it():
    given = [data.clone() for data in DATA]
    copies = HostMemory().copy([piece(data) for data in given])
    for data in given:
        data.zero_()
    for copied, data in zip(copies, DATA, strict=True):
        assert torch.equal(copied.data, data)
        assert copied.data.dtype == data.dtype
        assert copied.data.is_contiguous()


def test_copies_have_the_dtype_of_the_logical_tensor():
    (copied,) = HostMemory().copy([piece(torch.arange(3.0, dtype=torch.float64), "float32")])
    assert torch.equal(copied.data, torch.arange(3.0))
    assert copied.data.dtype == torch.float32


def test_a_parameter_is_copied_without_a_graph():
    (copied,) = HostMemory().copy([piece(torch.nn.Parameter(torch.ones(3)))])
    assert not copied.data.requires_grad


def test_memory_is_one_copy_and_is_used_again():
    memory, pieces = HostMemory(), [piece(torch.zeros(1000)), piece(torch.zeros(50, 20).t())]
    with LiveStorage() as live:
        first = memory.copy(pieces)
    assert live.peak_bytes == memory.nbytes == 2 * 4032  # each a multiple of 64
    address = first[0].data.data_ptr()
    with LiveStorage() as live:
        again = memory.copy(pieces[:1])
        more = memory.copy(pieces)
    assert live.peak_bytes == 0
    assert again[0].data.data_ptr() == more[0].data.data_ptr() == address
    memory.copy([*pieces, *pieces])
    assert memory.nbytes == 4 * 4032
    memory.release()
    memory.release()
    assert memory.nbytes == 0


def test_nothing_to_copy():
    memory = HostMemory()
    assert memory.copy([]) == []
    assert memory.copy([piece(torch.empty(0))])[0].data.shape == (0,)


@pytest.fixture
def driver(monkeypatch):
    """What is pinned: address -> bytes, as a CUDA driver would have it."""
    pinned: dict[int, int] = {}

    def register(address, nbytes, flags):
        pinned[address] = nbytes
        return 0

    def unregister(address):
        del pinned[address]
        return 0

    cudart = types.SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "check_error", _check)
    return pinned


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"CUDA error {code}")


def test_pinned_memory_is_exactly_as_large_and_is_let_go(driver):
    memory = HostMemory()
    buffer = memory._of(1000, pinned=True)
    assert driver == {buffer.data_ptr(): 1000}
    assert memory._of(900, pinned=True) is buffer
    larger = memory._of(2000, pinned=True)
    assert driver == {larger.data_ptr(): 2000}
    del buffer, larger, memory
    gc.collect()
    assert driver == {}


def test_memory_that_cannot_be_pinned_is_used_as_it_is(driver, monkeypatch, caplog):
    log.reset()  # an engine of another test may have given the logger a handler of its own
    asked = []
    monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", lambda *args: asked.append(args) or 2)
    memory = HostMemory()
    buffer = memory._of(1000, pinned=True)
    assert buffer.nbytes == 1000
    assert memory._of(900, pinned=True) is buffer
    assert memory._of(2000, pinned=True).nbytes == 2000
    assert len(asked) == 1
    assert caplog.text.count("is not pinned, copies are slower: CUDA error 2") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_of_a_device():
    memory = HostMemory()
    given = [piece(data.cuda()) for data in DATA]
    copies = memory.copy(given)
    for one in given:
        one.data.zero_()
    assert all(torch.equal(copied.data, data) for copied, data in zip(copies, DATA, strict=True))
    assert memory._pin is not None
    assert host.HostMemory().nbytes == 0
