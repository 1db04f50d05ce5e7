"""Adam and AdamW as ``optimizer.type`` names them, on torch's fused kernels (spec/core.md section 3.4)."""

from __future__ import annotations

from typing import Any

import torch

from ds_core.log import log_dist

__all__ = ["adam", "adamw"]


def adam(
    param_groups: list[dict[str, Any]],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    amsgrad: bool = False,
    adam_w_mode: bool = True,
    torch_adam: bool = False,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Build ``"Adam"``, which in DeepSpeed is AdamW: weight decay acts on the weights, not through the moments.

    Args:
        param_groups: groups of floating-point tensors.
        lr, betas, eps, weight_decay, amsgrad: as torch's; the weight decay is 0 by default.
        bias_correction: only True; torch has no Adam without it.
        adam_w_mode: False gives Adam with L2 regularisation.
        torch_adam: accepted for DeepSpeed's sake: this is torch's Adam in any case.
        fused: torch's one-kernel update.

    Raises:
        ValueError: ``bias_correction`` is False.
    """
    if adam_w_mode and weight_decay:
        log_dist(
            f'optimizer "Adam" is AdamW here, as in DeepSpeed: weight_decay {weight_decay} acts on the weights; '
            '"adam_w_mode": false gives Adam with L2 regularisation'
        )
    elif adam_w_mode:
        log_dist('optimizer "Adam" is AdamW here, as in DeepSpeed ("adam_w_mode": false gives Adam)')
    return _build(
        torch.optim.AdamW if adam_w_mode else torch.optim.Adam,
        param_groups,
        bias_correction,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        fused=fused,
    )


def adamw(
    param_groups: list[dict[str, Any]],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    amsgrad: bool = False,
    torch_adam: bool = False,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Build ``"AdamW"`` (Loshchilov and Hutter, arXiv:1711.05101); arguments as of :func:`adam`."""
    return _build(
        torch.optim.AdamW,
        param_groups,
        bias_correction,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        fused=fused,
    )


def _build(
    cls: type[torch.optim.Adam], param_groups: list[dict[str, Any]], bias_correction: bool, **params: Any
) -> torch.optim.Optimizer:
    if not bias_correction:
        raise ValueError("bias_correction is false; torch's Adam always corrects")
    params["betas"] = tuple(params["betas"])
    return cls(param_groups, **params)
