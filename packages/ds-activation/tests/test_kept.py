"""Inputs divided over ranks, and in buffers: on 2 and 4 ranks what a plain call gives."""

from __future__ import annotations

import gc
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_activation.call import run
from ds_activation.kept import Buffers, Keeping, part
from ds_activation.model_parallel import Place
from ds_activation.settings import Settings
from ds_core.errors import ConfigError, EngineError
from ds_core.testing.memory import LiveStorage
from ds_core.testing.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH = 7
"""No size divides a tensor of such rows over 2 or 4 ranks without a rest."""


class Mpu:
    """Groups of ``size`` ranks that follow each other."""

    def __init__(self, size: int) -> None:
        groups = [dist.new_group(list(range(at, at + size))) for at in range(0, dist.get_world_size(), size)]
        self.size, self.index = size, dist.get_rank() // size
        self.group = groups[self.index]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank() % self.size

    def get_model_parallel_world_size(self) -> int:
        return self.size

    def get_model_parallel_group(self) -> Any:
        return self.group


def model(dtype: torch.dtype) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=dtype), nn.Dropout(0.4), nn.Tanh()) for _ in range(3)
    )


def trained(call: Callable[..., Any], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Return the output and all gradients; a block gets tensors of several kinds, one of them nested."""
    blocks = model(dtype)
    x = torch.randn(3, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    scale = torch.tensor(1.5, dtype=dtype, requires_grad=True)

    def block(inner: nn.Module, h: Tensor, turned: Tensor, pair: tuple[Tensor, Any], *, mask: Tensor) -> Tensor:
        kept: Tensor = call(inner, h) * mask
        return kept + turned.t() * pair[0]

    torch.manual_seed(seed)
    h = x * 2
    mask = torch.arange(WIDTH) > 1
    for inner in blocks:
        h = h + call(block, inner, h, h.t().contiguous(), (scale, None), mask=mask)
    h.float().square().sum().backward()
    gradients = [each.grad for each in (x, scale, *blocks.parameters())]
    assert all(each is not None for each in gradients)
    return [h.detach(), *(each for each in gradients if each is not None)]


def plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def by(settings: Settings) -> Callable[..., Any]:
    return lambda function, *args, **kwargs: run(function, args, kwargs, settings)


def divided(size: int, **flags: Any) -> None:
    mpu = Mpu(size)
    settings = Settings(partition_activations=True, mpu=mpu, **flags)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for step in range(2):
            seed = 10 * step + mpu.index  # each group has its own data
            wanted, got = trained(plain, dtype, seed), trained(by(settings), dtype, seed)
            for a, b in zip(wanted, got, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


def saved_bytes() -> dict[str, int]:
    """Return what lives between forward and backward, by mode; the input is large, and gone."""
    mpu = Mpu(dist.get_world_size())
    flags: dict[str, dict[str, Any]] = {
        "whole": {},
        "divided": {"partition_activations": True, "mpu": mpu},
        "buffers": {
            "partition_activations": True,
            "contiguous_memory_optimization": True,
            "number_checkpoints": 2,
            "mpu": mpu,
        },
    }
    found = {}
    for name, each in flags.items():
        settings = Settings(**each)
        weight = torch.ones(32, requires_grad=True)

        def function(x: Tensor, weight: Tensor = weight) -> Tensor:
            return (x * weight).exp().sum()

        run(function, (torch.ones(64, 32),), {}, settings).backward()  # checksums are of the first
        gc.collect()
        with LiveStorage() as live:
            for memory in (pool.memory for pool in settings.buffers._pools.values()):
                live.track(memory)
            outs = [run(function, (torch.ones(64, 32) * at,), {}, settings) for at in range(2)]
            found[name] = live.live_bytes
        torch.stack(outs).sum().backward()
    return found


def in_buffers() -> str:
    settings = Settings(
        partition_activations=True,
        contiguous_memory_optimization=True,
        number_checkpoints=2,
        mpu=Mpu(dist.get_world_size()),
    )
    x = torch.ones(9, requires_grad=True)

    def forward() -> list[Tensor]:
        return [run(lambda h: h.exp().exp(), (x * at,), {}, settings) for at in (1, 2)]

    for _ in range(3):
        torch.stack([out.sum() for out in forward()]).sum().backward()
    outs = forward()
    with pytest.raises(ConfigError) as caught:
        run(torch.exp, (x,), {}, settings)
    assert len(outs) == 2
    return str(caught.value)


def of_ranks_that_differ() -> list[str]:
    settings = Settings(partition_activations=True, mpu=Mpu(dist.get_world_size()))
    run(torch.exp, (torch.ones(9, requires_grad=True),), {}, settings, name="first")  # gets no backward
    value, order, alike = torch.ones(9), torch.arange(1024.0), torch.ones(9)
    # Only in the slice of the last rank: what is gathered is that rank's own input.
    value[-1] += dist.get_rank()
    order = order.roll(512 * dist.get_rank())
    texts = []
    for x, name in ((value, "first"), (order, "first"), (alike, "first"), (value, "second")):
        out = run(lambda h: h.exp().exp(), (x.requires_grad_(),), {}, settings, name=name)
        try:
            out.sum().backward()
            texts.append("no error")
        except EngineError as error:
            texts.append(str(error))
    return texts


def of_a_group_of_another_size() -> str:
    mpu = Mpu(dist.get_world_size())
    mpu.size = 3
    out = run(torch.exp, (torch.ones(9, requires_grad=True),), {}, Settings(partition_activations=True, mpu=mpu))
    with pytest.raises(EngineError) as caught:
        out.sum().backward()
    return str(caught.value)


BUFFERS = {"contiguous_memory_optimization": True, "number_checkpoints": 3}


def test_two_ranks() -> None:
    results = run_ranks(
        [
            partial(divided, 2),
            partial(divided, 2, cpu_checkpointing=True),
            partial(divided, 2, **BUFFERS),
            saved_bytes,
            in_buffers,
            of_ranks_that_differ,
            of_a_group_of_another_size,
        ],
        2,
    )
    *_, saved, buffers, differing, other_size = results
    for each in saved:
        assert each["whole"] - each["divided"] == 2 * 64 * 32 * 4 // 2
        assert each["whole"] - each["buffers"] == 2 * 64 * 32 * 4 // 2
    assert all("number_checkpoints is 2, and at least 3 checkpointed calls" in text for text in buffers)
    for value, order, alike, later in differing:
        assert "the ranks have different ones" in value
        assert "(9,)" in value
        assert "the ranks have different ones" in order
        assert alike == "no error"
        assert "the ranks have different ones" in later, "a later layer that differs where the first did not"
    assert all("the mpu says 3 ranks, and its group has 2" in text for text in other_size)


def test_four_ranks() -> None:
    *_, saved = run_ranks([partial(divided, 4), partial(divided, 2, **BUFFERS), saved_bytes], 4)
    for each in saved:
        assert each["whole"] - each["divided"] == 2 * 64 * 32 * 4 * 3 // 4


def test_slices_are_of_one_length_and_have_all() -> None:
    for numel in (4, 5, 7, 9, 63):
        flat = torch.arange(1.0, numel + 1)
        slices = [part(flat, Place(rank, 4, None)) for rank in range(4)]
        assert len({each.numel() for each in slices}) == 1
        whole = torch.cat(slices)
        assert torch.equal(whole[:numel], flat)
        assert whole[numel:].eq(0).all()


def test_without_a_process_group_the_error_says_so() -> None:
    kept = Keeping(Place(0, 2, None)).keep(torch.ones(4), 0)
    assert kept is not None
    with pytest.raises(EngineError, match="the mpu says 2 ranks, and there is no process group"):
        kept.restore()


def test_what_is_kept_as_it_is() -> None:
    keeping = Keeping(Place(0, 2, None), on_host=True)
    small, exempt = torch.ones(1), torch.ones(4)
    exempt.no_checkpointing = True  # type: ignore[attr-defined]
    for tensor in (small, exempt, nn.Parameter(torch.ones(4)), torch.ones(4, dtype=torch.int32), torch.ones(4) > 0):
        assert keeping.keep(tensor, 0) is None
    assert Keeping().keep(torch.ones(4), 0) is None


def test_buffers_of_each_shape_and_position() -> None:
    buffers = Buffers()
    rows = [buffers.put(torch.ones(numel), position, 2) for numel in (3, 4) for position in (0, 1)]
    rows += [buffers.put(torch.ones(3), 0, 2)]
    with pytest.raises(ConfigError, match="number_checkpoints is 2, and at least 3"):
        buffers.put(torch.ones(3), 0, 2)
    address = rows.pop().values.data_ptr()
    assert buffers.put(torch.ones(3), 0, 2).values.data_ptr() == address


def test_what_is_in_a_buffer_of_one_rank_may_be_written_to() -> None:
    keeping = Keeping(buffers=Buffers(), rows=1)
    kept = keeping.keep(torch.ones(4), 0)
    assert kept is not None
    kept.restore().add_(1)
    assert torch.equal(kept.restore(), torch.ones(4))
