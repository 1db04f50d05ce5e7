"""Adam and AdamW as ``optimizer.type`` names them, on torch's fused kernels (spec/core.md section 3.4)."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ds_core.log import log_dist
from ds_core.optim.elementwise import elementwise

__all__ = ["adam", "adamw"]


@elementwise
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
    set_grad_none: bool = True,
    fp32_optimizer_states: bool = True,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Build ``"Adam"``, which in DeepSpeed is AdamW: weight decay acts on the weights, not through the moments.

    Args:
        param_groups: groups of floating-point tensors.
        lr, betas, eps, weight_decay, amsgrad: as torch's; the weight decay is 0 by default.
        bias_correction: only True; torch has no Adam without it.
        adam_w_mode: False gives Adam with L2 regularisation.
        torch_adam: accepted for DeepSpeed's sake: this is torch's Adam in any case.
        set_grad_none: only True; gradients become None after a step.
        fp32_optimizer_states: accepted for DeepSpeed's sake: the moments have the dtype of the master weights.
        fused: torch's one-kernel update.

    Raises:
        ValueError: ``bias_correction`` or ``set_grad_none`` is False.
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
        set_grad_none,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        fused=fused,
    )


@elementwise
def adamw(
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
    set_grad_none: bool = True,
    fp32_optimizer_states: bool = True,
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Build ``"AdamW"`` (Loshchilov and Hutter, arXiv:1711.05101); arguments as of :func:`adam`.

    It stays AdamW even if ``adam_w_mode`` is False, as in DeepSpeed; a warning says so.
    """
    if not adam_w_mode:
        log_dist(
            'optimizer "AdamW" stays AdamW although "adam_w_mode" is false, as in DeepSpeed; "Adam" with it is Adam',
            level=logging.WARNING,
        )
    return _build(
        torch.optim.AdamW,
        param_groups,
        bias_correction,
        set_grad_none,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        fused=fused,
    )


def _build(
    cls: type[torch.optim.Adam],
    param_groups: list[dict[str, Any]],
    bias_correction: bool,
    set_grad_none: bool,
    **params: Any,
) -> torch.optim.Optimizer:
    if not bias_correction:
        raise ValueError("bias_correction is false; torch's Adam always corrects")
    if not set_grad_none:
        raise ValueError("set_grad_none is false; gradients become None after a step")
    params["betas"] = tuple(params["betas"])
    return cls(param_groups, **params)
