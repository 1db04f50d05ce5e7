"""A run that is hard to resume, and everything of an engine that resuming must bring back.

:func:`start` makes it for a configuration, :func:`train` takes it some micro-steps further, :func:`everything` and
:func:`unequal` compare two engines bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import ds_core
from ds_core import comm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

__all__ = ["ResumeModel", "everything", "start", "train", "unequal"]

WIDTH = 13
"""Divided by no world size."""


class ResumeModel(nn.Module):
    """Uses the random generator and a buffer that changes; has a tied, a frozen and a zero-size parameter."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.inner = nn.Linear(5, WIDTH)
        self.tied = nn.Linear(5, WIDTH, bias=False)
        self.tied.weight = self.inner.weight
        self.outer = nn.Linear(WIDTH, 1)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.mean: Tensor
        self.count: Tensor

    def forward(self, x: Tensor, overflow: bool = False) -> Tensor:
        """Return the loss of a batch ``[n, 5]``; ``overflow``: its gradients are inf or NaN, the loss itself is not."""
        x = x.to(self.inner.weight.dtype)
        if self.training:
            with torch.no_grad():
                # Of the weights, not of the data: ranks must stay equal, a checkpoint holds rank 0's buffers.
                self.mean.lerp_(self.inner.weight.mean(1).to(self.mean.dtype), 0.25)
                self.count += 1
        hidden = torch.tanh(self.inner(x) + 0.5 * self.tied(x) - self.mean.to(x.dtype))
        if overflow:
            hidden.register_hook(lambda gradient: gradient * float("inf"))
        hidden = nn.functional.dropout(hidden, self.dropout, self.training)
        out = self.outer(hidden + 0.25 * self.frozen(hidden)).float().squeeze(-1)
        # So small that fp16 holds its gradients at every first loss scale.
        loss: Tensor = (out - x.float().sum(1)).square().mean() / 16 + self.empty.sum()
        return loss


def start(
    config: Mapping[str, Any],
    *,
    seed: int,
    dropout: float = 0.3,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    samples: int = 24,
) -> Any:
    """Return a new engine: 3 samples per micro-batch, windows of 3, AdamW under a schedule; ``config`` is added.

    Args:
        config: sections to add or to replace; None takes one away.
        seed: of the model's weights.
        dropout: of the model.
        model: another one.
        optimizer: instead of AdamW.
        samples: of the data; the default is so few that a run goes through several epochs, whose orders differ.
    """
    torch.manual_seed(seed)
    data = torch.randn(samples, 5, generator=torch.Generator().manual_seed(3))
    sections: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}} if optimizer is None else None,
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_num_steps": 2, "total_num_steps": 9, "warmup_min_lr": 0.001, "warmup_max_lr": 0.01},
        },
        **config,
    }
    engine, *_ = ds_core.initialize(
        model=ResumeModel(dropout) if model is None else model,
        optimizer=optimizer,
        training_data=data,
        config={key: value for key, value in sections.items() if value is not None},
    )
    torch.manual_seed(100 + comm.get_rank())
    return engine


def train(
    engine: Any,
    micro_steps: int,
    *,
    overflows: Mapping[int, int] | None = None,
    after_each: Callable[[Any], None] | None = None,
) -> list[float]:
    """Train on the engine's own data and return the losses.

    Args:
        engine: of :func:`start`.
        micro_steps: how many, from where it is.
        overflows: micro-step -> the rank whose gradients overflow in it; negative ones count from the last.
        after_each: called with the engine after each of them.
    """
    overflows = overflows or {}
    rank, world_size = comm.get_rank(), comm.get_world_size()
    losses, batches = [], _forever(engine.training_dataloader)
    for _ in range(micro_steps):
        place = overflows.get(engine.micro_steps)
        loss = engine(next(batches), overflow=place is not None and place % world_size == rank)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if after_each is not None:
            after_each(engine)
    return losses


def save_each(folder: Path) -> Callable[[Any], None]:
    """Return what :func:`train` calls to save a checkpoint ``micro<n>`` after each micro-step."""
    return lambda engine: engine.save_checkpoint(folder, tag=f"micro{engine.micro_steps}")


def _forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def everything(engine: Any) -> dict[str, Any]:
    """Return copies of all that training depends on: ``"kind name"`` -> tensor, and numbers by their names."""
    parts, optimizer = engine.parts, engine.basic_optimizer
    found: dict[str, Any] = {f"{piece.of.kind} {piece.of.name}": piece.data for piece in parts.partition.pieces()}
    for piece in parts.partition.optimizer_pieces():
        found.update({f"{slot} {piece.of.name}": value for slot, value in optimizer.state.get(piece.data, {}).items()})
    found.update({f"gradient {piece.of.name}": piece.data for piece in parts.partition.gradient_pieces()})
    found = {key: value.detach().clone() for key, value in found.items()}
    found["groups"] = [{key: value for key, value in group.items() if key != "params"} for group in engine._groups()]
    found["schedule"] = None if engine.lr_scheduler is None else dict(engine.lr_scheduler.state_dict())
    found["scaler"] = {"scale": engine.cur_scale, **parts.precision.scaler.state_dict()}
    found["counters"] = {
        name: getattr(engine, name) for name in ("micro_steps", "global_steps", "global_samples", "skipped_steps")
    }
    found["in window"] = parts.accumulation.in_window
    return found


def unequal(mine: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the keys that only one of them has, or whose values differ in any bit; a NaN equals itself."""
    differing = [key for key in mine if key in expected and not _same(mine[key], expected[key])]
    return sorted(mine.keys() ^ expected.keys()) + differing


def _same(mine: Any, expected: Any) -> bool:
    if isinstance(mine, Tensor):
        return (
            mine.dtype == expected.dtype and mine.shape == expected.shape and torch.equal(_bits(mine), _bits(expected))
        )
    return bool(mine == expected)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
