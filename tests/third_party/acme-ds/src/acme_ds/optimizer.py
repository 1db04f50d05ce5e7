"""An optimizer of our own."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from acme_ds import journal


class AcmeSign(Optimizer):
    """Moves every weight by ``lr`` against the sign of its gradient."""

    def __init__(self, params: Any, lr: float = 0.125) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        journal.entries.append("optimizer step")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad.sign(), alpha=-group["lr"])
