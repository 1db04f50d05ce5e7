"""The models the benchmarks train: a plain GPT over bytes in two sizes, and a small MLP.

Nothing here knows of any runtime: forward takes a batch and returns the loss, so every contender runs the same code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPT_SIZES", "Gpt", "GptSize", "Mlp", "byte_batches"]

BYTES = 256


@dataclass(frozen=True)
class GptSize:
    """Shape of a GPT and of its micro-batch."""

    layers: int
    width: int
    heads: int
    seq: int
    micro_batch: int
    """Samples per rank and micro-batch on a CPU core, where a micro-batch of 14 M takes 0.3 to 0.5 s."""
    micro_batch_gpu: int


# Parameters: 12 * layers * width**2, and about 1 % for embeddings, biases and the head.
GPT_SIZES = {
    "14m": GptSize(layers=8, width=384, heads=6, seq=128, micro_batch=2, micro_batch_gpu=32),
    "85m": GptSize(layers=12, width=768, heads=12, seq=128, micro_batch=1, micro_batch_gpu=32),
    "tiny": GptSize(layers=2, width=64, heads=2, seq=32, micro_batch=2, micro_batch_gpu=2),  # for --smoke
}


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:  # noqa: N803  shapes in suffixes: Batch, Time, width D, Head, head width K
        batch, time, width = x_BTD.shape
        qkv_3BHTK = (  # noqa: N806
            self.qkv(self.norm_attention(x_BTD))
            .view(batch, time, 3, self.heads, width // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        attended_BHTK = F.scaled_dot_product_attention(qkv_3BHTK[0], qkv_3BHTK[1], qkv_3BHTK[2], is_causal=True)  # noqa: N806
        x_BTD = x_BTD + self.out(attended_BHTK.transpose(1, 2).reshape(batch, time, width))  # noqa: N806
        residual: Tensor = x_BTD + self.down(F.gelu(self.up(self.norm_mlp(x_BTD))))
        return residual


class Gpt(nn.Module):
    """Next-byte prediction. ``forward(inputs, targets)``, both ``[B, T]`` int64, returns the mean loss in nats."""

    def __init__(self, size: GptSize) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, size.width)
        self.position = nn.Embedding(size.seq, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, BYTES, bias=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(inputs) + self.position.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        # The loss in fp32 whatever the precision, as autocast and most bf16 models have it; nothing in fp32.
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Mlp(nn.Module):
    """Three linear layers; so little work that what a runtime adds per micro-step is easy to see."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(self.layers(inputs), targets)


def byte_batches(
    count: int, micro_batch: int, seq: int, *, seed: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Return ``count`` pairs (inputs, targets) of random bytes, each ``[micro_batch, seq]`` int64; by seed."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        text = torch.randint(BYTES, (micro_batch, seq + 1), generator=generator).to(device)
        batches.append((text[:, :-1].contiguous(), text[:, 1:].contiguous()))
    return batches
