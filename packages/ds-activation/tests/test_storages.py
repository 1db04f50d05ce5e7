"""Storages: whose they are, their numbers, and what autograd holds of them."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from ds_activation.storages import SavedTensors, StorageNumbers, fixed_storages, storages_of


def test_storages_of_views_containers_and_others() -> None:
    base = torch.zeros(4, 4)
    found = list(storages_of({"a": base[1], "b": (base.t(), None, 3)}, torch.zeros(0), torch.zeros(2, device="meta")))
    assert [storage.nbytes() for storage in found] == [64, 64]
    assert len({storage._cdata for storage in found}) == 1
    sparse = torch.eye(3).to_sparse()
    assert sum(storage.nbytes() for storage in storages_of(sparse)) == 3 * 4 + 2 * 3 * 8


def test_parameters_and_buffers_are_fixed() -> None:
    norm = nn.BatchNorm1d(3)
    fixed = fixed_storages(norm)
    assert len(fixed) == 5
    assert norm.weight.t().untyped_storage()._cdata in fixed


def test_numbers_last_as_long_as_storages() -> None:
    known = StorageNumbers()
    kept = torch.zeros(8)
    assert known.number(kept.untyped_storage()) == 0
    numbers = set()
    for size in range(1, 9):
        # Freed at once, so that the next one may take its place.
        numbers.add(known.number(torch.zeros(size).untyped_storage()))
    assert len(numbers) == 8
    assert known.number(kept.view(2, 4).untyped_storage()) == 0
    assert known.sizes[0] == 32


def test_what_autograd_lets_go_of_is_gone() -> None:
    saved = SavedTensors()
    x = torch.ones(3, requires_grad=True)
    with saved.hooks():
        kept = x.exp()
        saved.place = 1
        _ = (x.sin() * kept).sum()
        del _
    assert [place for place, _ in saved.alive()] == [0]
    kept.sum().backward()
    assert saved.alive() == []
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach().exp())


def test_no_cycle_through_an_op_that_saves_its_own_result() -> None:
    gc.disable()
    try:
        for is_on in (True, False):
            saved = SavedTensors()
            saved.is_on = is_on
            with saved.hooks():
                result = torch.ones(3, requires_grad=True).tanh()
            storage = weakref.ref(result.untyped_storage())
            del result
            assert storage() is None
    finally:
        gc.enable()


def test_second_derivatives_pass_through() -> None:
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with SavedTensors().hooks():
        y = x.tanh() * x
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    t = x.detach().tanh()
    torch.testing.assert_close(second, 2 * (1 - t**2) * (1 - x.detach() * t))
