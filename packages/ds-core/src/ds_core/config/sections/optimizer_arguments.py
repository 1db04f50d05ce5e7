"""Arguments of the optimizers that DeepSpeed names, ``optimizer.params``."""

from __future__ import annotations

from typing import Annotated, Literal

from ds_core.config.section import NoEffect, NotBuilt
from ds_core.config.sections.argument_types import Arguments, Betas, Flag, Rate, Real, Share, StepCount, Steps

__all__ = [
    "AdagradArguments",
    "AdamArguments",
    "LambArguments",
    "LionArguments",
    "MuAdamArguments",
    "MuAdamWArguments",
    "MuSgdArguments",
    "MuonArguments",
    "OnebitAdamArguments",
    "OnebitLambArguments",
    "ZeroOneAdamArguments",
]

NoAmsgrad = Annotated[Flag, NotBuilt(False, why="which DeepSpeed's optimizer does not have")]
Float32States = Annotated[
    Flag,
    NoEffect("optimizer state has the dtype of the master weights; bf16.bf16_optimizer_states is what changes it"),
]
AdamWStays = NoEffect(
    '"AdamW" stays AdamW, as in DeepSpeed',
    when=lambda config: config.optimizer is not None and config.optimizer.type.lower() == "adamw",
)
SetsGradNone = Annotated[Flag, NotBuilt(True, why="which is not built yet: gradients become None after a step")]


class _Moments(Arguments):
    """What every optimizer with two moments takes."""

    source = "spec/core.md 3.4"

    lr: Rate = 1e-3
    """Learning rate; a schedule moves it."""
    bias_correction: Flag = True
    """Correct the moments for having begun at 0."""
    betas: Betas = (0.9, 0.999)
    """Decay of the mean of the gradient and of its square, per step."""
    eps: Rate = 1e-8
    """Added to the root of the mean square, so that it can divide."""
    weight_decay: Rate = 0.0
    """Share of a weight that is taken from it per step, times the learning rate."""


class AdamArguments(_Moments):
    """Adam and AdamW. ``Adam`` is AdamW too, unless ``adam_w_mode`` is false."""

    source = "spec/core.md 3.4, spec/kernels.md 2"

    bias_correction: Flag = True
    """Correct the moments for having begun at 0; false is refused when the optimizer is built."""
    amsgrad: Flag = False
    """Divide by the largest mean square so far (AMSGrad)."""
    set_grad_none: SetsGradNone = True
    """Gradients become None after a step, not zeros."""
    torch_adam: Annotated[Flag, NoEffect("Adam and AdamW are torch's in any case")] = False
    """Take torch's own class."""
    adam_w_mode: Annotated[Flag, AdamWStays] = True
    """``Adam`` only: weight decay acts on the weights (AdamW); false: through the moments (L2). ``AdamW`` stays one."""
    fp32_optimizer_states: Float32States = True
    """Keep the moments in fp32 where the optimizer runs on the CPU."""
    fused: Flag = True
    """Update in one kernel; DeepSpeed has no such key."""


class _OfTorch(Arguments):
    """What torch's optimizers take besides their numbers."""

    foreach: Flag | None = None
    """Update many tensors at once; null lets torch choose."""
    maximize: Flag = False
    """Step along the gradient instead of against it."""
    differentiable: Flag = False
    """Let autograd see the step."""
    fused: Flag | None = None
    """Update in one kernel; null lets torch choose."""


class AdagradArguments(_OfTorch):
    """torch's Adagrad; with offload to the CPU, DeepSpeed's."""

    source = "spec/core.md 3.4, spec/kernels.md 5"

    lr: Rate = 1e-2
    """Learning rate; a schedule moves it."""
    lr_decay: Rate = 0.0
    """How fast the rate falls, per step; without offload only."""
    weight_decay: Rate = 0.0
    """Share of a weight that is added to its gradient."""
    initial_accumulator_value: Rate = 0.0
    """What the sum of squares begins at; without offload only."""
    eps: Rate = 1e-10
    """Added to the root of the sum of squares, so that it can divide."""
    amsgrad: NoAmsgrad = False
    """With offload only: stored, and nothing else."""
    fp32_optimizer_states: Flag = True
    """With offload only: keep the sum of squares in fp32."""


class LambArguments(_Moments):
    """LAMB: Adam whose steps are scaled by the norm of each weight."""

    source = "spec/core.md 3.4, spec/kernels.md 3"

    eps_inside_sqrt: Flag = False
    """Add ``eps`` under the root."""
    amsgrad: NoAmsgrad = False
    """AMSGrad, which LAMB does not have."""
    max_coeff: Rate = 10.0
    """Largest ratio of a weight's norm to its step's."""
    min_coeff: Rate = 0.01
    """Smallest ratio of a weight's norm to its step's."""


class LionArguments(Arguments):
    """Lion: steps of one size, along the sign of a mean gradient."""

    source = "spec/core.md 3.4, spec/kernels.md 4"

    lr: Rate = 1e-3
    """Learning rate; a schedule moves it."""
    betas: Betas = (0.9, 0.999)
    """Weight of the mean gradient in a step, and decay of that mean, per step."""
    weight_decay: Rate = 0.0
    """Share of a weight that is taken from it per step, times the learning rate."""
    set_grad_none: SetsGradNone = True
    """Gradients become None after a step, not zeros."""
    fp32_optimizer_states: Float32States = True
    """Keep the mean in fp32 where the optimizer runs on the CPU."""


class MuonArguments(Arguments):
    """Muon for matrices, and Adam for the rest of the parameters."""

    source = "spec/core.md 3.4, spec/kernels.md 6"

    lr: Rate | None = None
    """Learning rate of both; null is 0.02 for Muon and 3e-4 for Adam."""
    muon_lr: Rate | None = None
    """Learning rate of Muon, in place of ``lr``."""
    adam_lr: Rate | None = None
    """Learning rate of Adam, in place of ``lr``."""
    momentum: Share = 0.95
    """Muon: decay of the mean gradient, per step."""
    weight_decay: Rate = 0.0
    """Share of a weight that is taken from it per step, times the learning rate."""
    ns_method: Literal["gram", "standard"] = "gram"
    """Muon: how the Newton-Schulz iteration is carried out."""
    ns_steps: Annotated[Steps, NoEffect("the Newton-Schulz iteration has 5 steps, here as in DeepSpeed")] = 5
    """Muon: steps of that iteration."""
    betas: Betas = (0.9, 0.95)
    """Adam: decay of the mean of the gradient and of its square, per step."""
    eps: Rate = 1e-10
    """Adam: added to the root of the mean square, so that it can divide."""


class _OneBit(Arguments):
    """What every optimizer that sends one bit per element takes."""

    cuda_aware: Flag = False
    """MPI can send from GPU memory."""
    comm_backend_name: Literal["nccl", "mpi", "hccl", "compressed"] = "nccl"
    """What sends the bits."""


class OnebitAdamArguments(_OneBit, _Moments):
    """Adam that sends one bit per element once its mean squares are frozen."""

    source = "spec/core.md 3.4, spec/fp16.md 12"

    eps_inside_sqrt: Flag = False
    """Add ``eps`` under the root."""
    amsgrad: NoAmsgrad = False
    """AMSGrad, which this optimizer does not have."""
    freeze_step: StepCount = 100_000
    """Step at which the mean squares are frozen and compression begins."""


class ZeroOneAdamArguments(_OneBit, _Moments):
    """Adam that sends one bit per element or none, from the first step on."""

    source = "spec/core.md 3.4, spec/fp16.md 12"

    amsgrad: NoAmsgrad = False
    """AMSGrad, which this optimizer does not have."""
    var_freeze_step: StepCount = 100_000
    """Step at which the mean squares are frozen."""
    var_update_scaler: Steps = 16
    """Updates of the mean squares after which the interval between two doubles."""
    local_step_scaler: Steps = 32678
    """Steps after which the interval between two exchanges doubles."""
    local_step_clipper: Steps = 16
    """Longest interval between two exchanges, in steps."""


class OnebitLambArguments(_OneBit, LambArguments):
    """LAMB that sends one bit per element once its mean squares are frozen."""

    source = "spec/core.md 3.4, spec/fp16.md 12"

    freeze_step: StepCount = 100_000
    """Step at which the mean squares are frozen and compression begins."""
    coeff_beta: Share = 0.9
    """Decay of the mean of a weight's ratio, per step."""
    factor_max: Rate = 4.0
    """Largest factor by which a frozen ratio is scaled."""
    factor_min: Rate = 0.5
    """Smallest factor by which a frozen ratio is scaled."""
    factor_threshold: Rate = 0.1
    """Largest change of that factor from one step to the next, as a share of it."""


class _Mup(_OfTorch):
    """What the optimizers of package ``mup`` take besides torch's arguments."""

    source = "spec/core.md 3.4"

    decoupled_wd: Flag = False
    """Leave the weight decay alone where ``mup`` scales the learning rate of a matrix."""


class MuAdamArguments(_Mup):
    """Adam under the maximal-update parametrization (package ``mup``)."""

    lr: Rate = 1e-3
    """Learning rate; a schedule moves it."""
    betas: Betas = (0.9, 0.999)
    """Decay of the mean of the gradient and of its square, per step."""
    eps: Rate = 1e-8
    """Added to the root of the mean square, so that it can divide."""
    weight_decay: Rate = 0.0
    """Share of a weight that is added to its gradient."""
    amsgrad: Flag = False
    """Divide by the largest mean square so far (AMSGrad)."""
    capturable: Flag = False
    """Let a CUDA graph hold the step."""


class MuAdamWArguments(MuAdamArguments):
    """AdamW under the maximal-update parametrization (package ``mup``)."""

    weight_decay: Rate = 0.01
    """Share of a weight that is taken from it per step, times the learning rate."""


class MuSgdArguments(_Mup):
    """SGD under the maximal-update parametrization (package ``mup``)."""

    lr: Rate = 1e-3
    """Learning rate; a schedule moves it."""
    momentum: Rate = 0.0
    """Decay of the sum of gradients, per step; 0 keeps none."""
    dampening: Real = 0.0
    """Share of a gradient that stays out of that sum."""
    weight_decay: Rate = 0.0
    """Share of a weight that is added to its gradient."""
    nesterov: Flag = False
    """Look ahead along the momentum."""
