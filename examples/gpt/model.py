"""A byte-level GPT in plain PyTorch, small enough to read in ten minutes.

There is no tokenizer: a token is one byte, so the vocabulary has 256 entries and any file is training data.

Shapes, as suffixes of tensor names where they help:

    B  sequences in the batch
    T  positions in a sequence, at most ``context``
    C  channels (the width of the model)
    H  heads
    D  channels per head, ``C = H * D``
    V  vocabulary, 256 bytes
"""

# Names that end in a shape have capitals.
# ruff: noqa: N803, N806

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Size of the model. The defaults give 4.9 million parameters."""

    context: int = 256
    """Bytes the model can look back on."""
    layers: int = 6
    heads: int = 4
    channels: int = 256
    vocabulary: int = 256


class Attention(nn.Module):
    """Each position mixes in what earlier positions offer; ``H`` heads look for different things."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        # One matrix for queries, keys and values: one large product is faster than three small ones.
        self.qkv = nn.Linear(config.channels, 3 * config.channels, bias=False)
        self.out = nn.Linear(config.channels, config.channels, bias=False)

    def forward(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        B, T, C = x_BTC.shape
        q_BHTD, k_BHTD, v_BHTD = self.qkv(x_BTC).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        # PyTorch chooses the kernel (flash attention where there is one); is_causal hides the future, without which
        # the model would copy the next byte instead of predicting it.
        y_BHTD = F.scaled_dot_product_attention(
            rotate(q_BHTD, rotation), rotate(k_BHTD, rotation), v_BHTD, is_causal=True
        )
        return self.out(y_BHTD.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Each position thinks for itself, in a space four times as wide."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.channels, 4 * config.channels, bias=False)
        self.down = nn.Linear(4 * config.channels, config.channels, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTC)))


class Block(nn.Module):
    """Attention, then MLP; both add to the stream ``x`` rather than replace it, so gradients reach every layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        # Normalising the input of a layer instead of its output keeps training stable without a long warmup.
        self.norm_1 = nn.LayerNorm(config.channels)
        self.attention = Attention(config)
        self.norm_2 = nn.LayerNorm(config.channels)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x_BTC = x_BTC + self.attention(self.norm_1(x_BTC), rotation)
        return x_BTC + self.mlp(self.norm_2(x_BTC))


class GPT(nn.Module):
    """Bytes in, a distribution over the next byte out, at every position at once."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.channels)
        self.head = nn.Linear(config.channels, config.vocabulary, bias=False)
        # Tied: a byte is recognised on the way out by the vector it had on the way in.
        self.head.weight = self.embedding.weight

        cos_TD, sin_TD = rotation_tables(config.context, config.channels // config.heads)
        # Not persistent: they follow from the configuration, so a checkpoint need not carry them.
        self.register_buffer("cos_TD", cos_TD, persistent=False)
        self.register_buffer("sin_TD", sin_TD, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue  # the norms start as ones and zeros already
            # The stream is a sum of 2 x layers outputs; shrinking each bounds their sum (GPT-2, section 2.3).
            is_output = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if is_output else 0.02)

    def forward(self, idx_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Return the mean loss in nats per byte if there are targets, else the logits ``[B, T, V]``."""
        T = idx_BT.shape[1]
        rotation = (self.cos_TD[:T], self.sin_TD[:T])
        x_BTC = self.embedding(idx_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, rotation)
        logits_BTV = self.head(self.norm(x_BTC))
        if targets_BT is None:
            return logits_BTV
        # In fp32 whatever the model computes in: a sum of 256 exponentials loses too much in half precision.
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def rotation_tables(positions: int, head_channels: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each ``[positions, head_channels / 2]``, of the angle of each position and channel pair.

    Reference:
        Su et al. 2021, "RoFormer", arXiv:2104.09864: rotating queries and keys by their position makes their product
        depend on the distance between them alone, which a model learns faster than a table of positions.
    """
    speed_D = 10_000.0 ** -torch.linspace(0, 1, head_channels // 2)
    angle_TD = torch.arange(positions)[:, None] * speed_D
    return angle_TD.cos(), angle_TD.sin()


def rotate(x_BHTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of channels (first half, second half) by the angle of its position."""
    cos_TD, sin_TD = rotation
    a, b = x_BHTD.chunk(2, dim=-1)
    return torch.cat((a * cos_TD - b * sin_TD, a * sin_TD + b * cos_TD), dim=-1).type_as(x_BHTD)
