"""P17: a hundred engines, one after another, leave nothing behind."""

from __future__ import annotations

import gc

import pytest
import torch

import ds_core
from ds_core import comm
from ds_core.testing.ranks import run_ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
}
CYCLES = 100
BUCKET_BYTES = 4 * (3 * 50 + 50 + 50 + 1 + 4)
"""Gradients and flags of the model below."""


def storages() -> tuple[int, int]:
    """Return how many tensor storages are alive, and their bytes."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.layout is torch.strided:
            found[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
            if thing.is_leaf and thing.grad is not None:
                found[thing.grad.untyped_storage()._cdata] = thing.grad.untyped_storage().nbytes()
    return len(found), sum(found.values())


def one_engine(model: torch.nn.Module, *, how: str) -> None:
    data = [torch.full((3,), float(index)) for index in range(8)]
    engine = ds_core.initialize(model=model, config=CONFIG, training_data=data)[0]
    engine.backward(engine(torch.ones(2, 3)).square().mean())
    engine.step()
    if how == "inside a window":
        engine.backward(engine(torch.ones(2, 3)).square().mean())
    if how != "dropped":
        engine.destroy()


def build() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Linear(50, 1))


def cycles(how: str, same_model: bool) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the storages alive after the first engines and after all, and the hooks then on the model."""
    kept = build()
    found = []
    for cycle in range(CYCLES):
        one_engine(kept if same_model else build(), how=how)
        if cycle in (4, CYCLES - 1):
            found.append(storages())
    hooks = [len(param._post_accumulate_grad_hooks or ()) for param in kept.parameters()]
    comm.barrier()
    return found, hooks


def destroyed() -> tuple:
    return cycles("destroyed", same_model=True)


def destroyed_inside_a_window() -> tuple:
    return cycles("inside a window", same_model=True)


def dropped() -> tuple:
    # Never destroyed, but nobody refers to it or to its model: the collector must be able to tell.
    return cycles("dropped", same_model=False)


def dropped_while_the_model_is_kept() -> list[float]:
    """Return the gradient of plain PyTorch on a model whose engine is gone."""
    kept = torch.nn.Linear(3, 1)
    one_engine(kept, how="dropped")
    gc.collect()
    kept.zero_grad()
    kept(torch.ones(2, 3)).sum().backward()
    return kept.weight.grad.flatten().tolist()


@pytest.mark.parametrize("world_size", [1, 2])
def test_engines_that_are_gone_hold_nothing(world_size):
    functions = [destroyed, destroyed_inside_a_window, dropped]
    *results, gradients = run_ranks([*functions, dropped_while_the_model_is_kept], world_size)
    assert gradients == [[2.0, 2.0, 2.0]] * world_size
    for function, of_ranks in zip(functions, results, strict=True):
        for (early, late), hooks in of_ranks:
            # A thread of gloo may still be letting go of the last engine's bucket; 95 engines that leak one storage
            # each would be 95 more.
            text = f"{function.__name__}: (storages, bytes) grew from {early} to {late}"
            assert late[0] <= early[0] + 1, text
            assert late[1] <= early[1] + BUCKET_BYTES, text
            assert hooks == [0] * 4
