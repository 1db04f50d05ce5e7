"""Training on N ranks against a plain single-process PyTorch loop: the same data, the same bound everywhere (P03).

A :class:`Case` names what is trained; :func:`train` runs it through an engine on this rank, :func:`reference` in plain
PyTorch over the data of all ranks, :func:`differences` compares every loss, gradient and weight element by element.

Note: the bound
    Both sides have the same gradient of each backward, from the same kernels, and add these n = ranks x accumulation x
    backwards <= 2**5 terms in another order: each is within (n - 1) 2**-24 of the sum of the terms' magnitudes (Higham,
    Accuracy and Stability of Numerical Algorithms, section 4.2), so they differ by 2**-18 of it. That sum is of the
    size of the tensor's largest gradient, or of 1, the size of what is backpropagated: the terms were divided by n
    before, or by n / b where a micro-batch has b backwards. The other half of 2**-17 b is for gradients at weights that
    already differ. Measured are 2**-24: rounding
    errors mostly cancel. A step moves a weight by at most lr times the gradient's error with SGD, and lr / eps times it
    with Adam, whose update has slope at most 1 / eps; ``ADAM_EPS`` is large so that this stays small. Over the few
    steps of a case errors add up. A halved or doubled share of one rank is larger than this by orders of magnitude.

Note: orders of summing
    What a partition may choose is the order of the additions, and that is all the bounds here and in
    :mod:`ds_core.testing.low_precision` leave open. A ring or a tree of an all-reduce, a reduce-scatter, an all-to-all
    with a local sum in the order of the ranks: w ranks' numbers take w - 1 additions in each, so one bound holds for
    all of them. One that adds 16-bit numbers in fp32 rounds to 16 bits once, where the others round up to w - 1 times.
    Whether the backwards of a window are added before the ranks (stages 0 and 1) or after (stage 2) is an order too.

Note: optimizers that look at a whole tensor
    :class:`WholeSGD` and :class:`WholeAdamW` do not say that they are element-wise, so a partition must give them whole
    parameters. The step of ``WholeSGD`` depends on the norm n of the whole gradient g: it is lr g (1 + s), with
    s = n / (1 + n) < 1. A part of g in its place has another s. Its slope is 1 + s in the element g_i and
    |g_i| / (1 + n)**2 <= 1 / 4 in n, which moves by at most sqrt(N) times the largest error of N <= 66 elements: a
    weight is moved by at most lr (2 + 8.2 / 4) < 5 lr times that error, and in L2 norm by 2.25 lr times.

Precisions other than fp32 are compared by :mod:`ds_core.testing.low_precision`, on the same models and traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import ds_core
from ds_core import comm
from ds_core.interfaces.logical import MASTER, Chunk

__all__ = [
    "Case",
    "Trace",
    "WholeAdamW",
    "WholeSGD",
    "build_model",
    "differences",
    "every_case",
    "logical_values",
    "loss_of",
    "micro_batch",
    "reduced_gradients",
    "reference",
    "start",
    "train",
]

MODELS = ("plain", "tied", "frozen", "unused", "zero_size", "scalar", "all")
MIXED_MODELS = ("mixed", "all_mixed")
"""Some parameters given in bf16 or fp16; no element-wise bound holds for them."""
BATCH_NORM = "batch_norm"
"""In train mode: each rank normalises by its own batches, and has running statistics of its own."""
OUTPUTS = ("tensor", "tuple", "dict", "dataclass")
LR = 0.05
ADAM_EPS = 0.05
GRADIENT_BOUND = 2.0**-17
"""Of the largest element of the tensor's gradient."""
STEPS = 3
SCALE_POWER = 10
"""Of two: the first loss scale in fp16. Gradients here are of size 1 to 30, so nothing overflows by itself."""


class WholeSGD(torch.optim.Optimizer):
    """SGD whose step depends on the norm of each parameter's whole gradient; see the module's note."""

    def __init__(self, params: Any, *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    norm = float(param.grad.double().norm())
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.sub_(param.grad, alpha=group["lr"] * (1 + norm / (1 + norm)))


class WholeAdamW(torch.optim.AdamW):
    """AdamW that nobody knows to be element-wise."""


_WHOLE = {"WholeSGD": WholeSGD, "WholeAdamW": WholeAdamW}


@dataclass(frozen=True)
class Case:
    """What is trained."""

    model: str = "all"
    output: str = "tensor"
    accumulation: int = 1
    clipping: float = 0.0
    optimizer: str = "SGD"
    """Of ``torch.optim``, or ``WholeSGD`` or ``WholeAdamW``."""
    precision: str = "fp32"
    """``fp32``, ``fp16``, ``bf16``, ``autocast bf16`` or ``autocast fp16``."""
    accumulate: str | None = None
    """``data_types.grad_accum_dtype``."""
    reduce: str | None = None
    """``communication_data_type``."""
    backwards: int = 1
    """Calls of ``backward`` per micro-batch, each with a batch of its own; the window sums them."""
    stage: int = 0
    """``zero_optimization.stage``."""
    bucket_numel: int | None = None
    """Elements in a gradient bucket; the default holds all of these models in one."""

    @property
    def buffer(self) -> str | None:
        """``data_types.buffer_dtype``: torch on a CPU has no batch norm of 16-bit weights with fp32 statistics."""
        return self.precision if self.model == BATCH_NORM and self.precision in ("fp16", "bf16") else None

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of an engine that trains this."""
        found: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clipping,
        }
        if self.optimizer not in _WHOLE:
            found["optimizer"] = {"type": self.optimizer, "params": self.options}
        if self.precision == "fp16":
            # A window of 1: the scale grows within the few steps of a case.
            found["fp16"] = {"enabled": True, "initial_scale_power": SCALE_POWER, "loss_scale_window": 1}
        elif self.precision == "bf16":
            found["bf16"] = {"enabled": True}
        elif self.precision != "fp32":
            found["torch_autocast"] = {"enabled": True, "dtype": self.precision.removeprefix("autocast ")}
        data_types = {"grad_accum_dtype": self.accumulate, "buffer_dtype": self.buffer}
        found["data_types"] = {key: dtype for key, dtype in data_types.items() if dtype is not None}
        if self.reduce is not None:
            found["communication_data_type"] = self.reduce
        if self.stage > 0:
            found["zero_optimization"] = {"stage": self.stage}
            if self.bucket_numel is not None:
                found["zero_optimization"]["reduce_bucket_size"] = self.bucket_numel
        elif self.bucket_numel is not None:
            found["partition"] = {"replicated": {"bucket_bytes": 4 * self.bucket_numel}}
        return found

    @property
    def is_elementwise_comparable(self) -> bool:
        """Whether :func:`differences` may compare it: all of it is computed and added in fp32, alike on every rank."""
        wide = (None, "fp32", "float32")
        in_fp32 = self.precision == "fp32" and self.accumulate in wide and self.reduce in wide
        return in_fp32 and self.model in MODELS

    @property
    def options(self) -> dict[str, Any]:
        if self.optimizer == "SGD":
            return {"lr": LR, "momentum": 0.9, "weight_decay": 0.01}
        if self.optimizer == "WholeSGD":
            return {"lr": LR, "weight_decay": 0.01}
        return {"lr": LR, "eps": ADAM_EPS, "weight_decay": 0.01}

    @property
    def step_bound(self) -> float:
        """How far a weight may be off per step, per unit of gradient error."""
        return {"SGD": LR * 10, "WholeSGD": LR * 5}.get(self.optimizer, LR / ADAM_EPS * 2)

    @property
    def per_window(self) -> int:
        """Calls of ``backward`` from one step to the next."""
        return self.accumulation * self.backwards

    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        """Return the plain optimizer."""
        made_by = _WHOLE.get(self.optimizer) or getattr(torch.optim, self.optimizer)
        built = made_by(params, **self.options)
        assert isinstance(built, torch.optim.Optimizer)
        return built


def every_case() -> Iterator[Case]:
    """Yield the full product of models, outputs, accumulation 1 to 3, clipping off and on, SGD and AdamW."""
    for case in product(MODELS, OUTPUTS, (1, 2, 3), (0.0, 0.05), ("SGD", "AdamW")):
        yield Case(*case)


@dataclass
class Output:
    """An output the engine knows nothing about."""

    loss: Tensor
    logits: Tensor


class OddModel(nn.Module):
    """A few hundred parameters with what real models have: see ``MODELS``."""

    WIDTH, VOCABULARY = 6, 11

    def __init__(self, kind: str, output: str) -> None:
        super().__init__()
        every = MODELS[1:-1]
        has = {"all": every, "all_mixed": (*every, "mixed"), BATCH_NORM: (BATCH_NORM, "unused")}.get(kind, (kind,))
        self.output = output
        self.embed = nn.Embedding(self.VOCABULARY, self.WIDTH)
        self.block = nn.Linear(self.WIDTH, self.WIDTH)  # used twice in one forward
        self.norm = nn.LayerNorm(self.WIDTH)
        self.head = nn.Linear(self.WIDTH, self.VOCABULARY, bias=False)
        if "tied" in has:
            self.head.weight = self.embed.weight
        if "frozen" in has:
            self.frozen = nn.Linear(self.WIDTH, self.WIDTH).requires_grad_(False)
        if "unused" in has:
            self.never = nn.Linear(3, 2)
            self.sometimes = nn.Linear(self.WIDTH, self.WIDTH)  # by some ranks, in some micro-batches
        if BATCH_NORM in has:
            self.batch = nn.BatchNorm1d(self.WIDTH)
        if "zero_size" in has:
            self.nothing = nn.Parameter(torch.empty(0, 4))
        if "scalar" in has:
            self.gain = nn.Parameter(torch.tensor(0.75))
        self.register_buffer("scale", torch.tensor([1.5]))
        if "mixed" in has:
            self.block.bfloat16()
            for name in {"frozen", "head"} - ({"head"} if "tied" in has else set()):
                if hasattr(self, name):
                    getattr(self, name).half()

    def forward(self, tokens: Tensor, use_sometimes: bool) -> Any:
        hidden = self.embed(tokens)
        hidden = hidden + torch.tanh(_into(self.block, hidden))
        hidden = hidden + torch.tanh(_into(self.block, _into(self.norm, hidden)))
        if hasattr(self, "batch"):
            hidden = hidden + self.batch(hidden.transpose(1, 2)).transpose(1, 2)
        if hasattr(self, "frozen"):
            hidden = hidden + _into(self.frozen, hidden)
        if hasattr(self, "sometimes") and use_sometimes:
            hidden = hidden + _into(self.sometimes, hidden)
        if hasattr(self, "gain"):
            hidden = hidden * self.gain
        logits = _into(self.head, hidden) * self.get_buffer("scale")
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        if hasattr(self, "nothing"):
            loss = loss + self.nothing.sum()
        forms = {"tuple": (loss, logits), "dict": {"loss": loss, "logits": logits}, "dataclass": Output(loss, logits)}
        return forms.get(self.output, loss)


def _into(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Call ``layer`` in the dtype of its own weight, as models of mixed dtypes do."""
    assert isinstance(layer.weight, Tensor)
    result = layer(hidden.to(layer.weight.dtype))
    assert isinstance(result, Tensor)
    return result


def build_model(case: Case) -> nn.Module:
    """Return the model of ``case``, the same values in every process."""
    state = torch.get_rng_state()
    torch.manual_seed(7)
    model = OddModel(case.model, case.output)
    torch.set_rng_state(state)
    return model


def micro_batch(step: int, micro: int, rank: int) -> tuple[Tensor, bool]:
    """Return rank ``rank``'s input: tokens ``[2, 5]``, and whether it uses the parameter not all do.

    ``micro`` counts the backwards of a window.
    """
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    tokens = torch.randint(OddModel.VOCABULARY, (2, 5), generator=generator)
    # In the last step nobody uses it: its gradient must be None there, not zero.
    return tokens, (step + micro + rank) % 3 == 0 and step < STEPS - 1


def loss_of(output: Any) -> Tensor:
    """Return the loss in any of the output forms."""
    if isinstance(output, tuple):
        loss = output[0]
    elif isinstance(output, Mapping):
        loss = output["loss"]
    else:
        loss = getattr(output, "loss", output)
    assert isinstance(loss, Tensor)
    return loss


@dataclass
class Trace:
    """What happened in each step."""

    losses: list[list[float]] = field(default_factory=list)
    """Per step, this rank's micro-batch losses."""
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)
    """Per step, before clipping."""
    norms: list[float] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    """Per step, after it."""
    masters: list[dict[str, Tensor]] = field(default_factory=list)
    """Per step, after it; of the parameters that have one."""
    scales: list[float] = field(default_factory=list)
    """Per step, the loss scale of its backwards."""
    skipped: list[bool] = field(default_factory=list)
    buffers: list[dict[str, Tensor]] = field(default_factory=list)
    """Per step, this rank's, after it."""
    start_weights: dict[str, Tensor] = field(default_factory=dict)
    start_masters: dict[str, Tensor] = field(default_factory=dict)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in module.named_parameters()}


def _gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in module.named_parameters()}


def reduced_gradients(engine: Any) -> dict[str, Tensor | None]:
    """Return the reduced gradients of all parameters as they accumulated, still scaled, whoever holds which part.

    Collective where ranks hold parts. Between the backward that ends a window and the step.
    """
    partition = engine.parts.partition
    params = [param for group in partition.inputs.param_groups for param in group["params"]]
    parts = []
    for param, piece in zip(params, partition.optimizer_pieces(), strict=True):
        gradient = partition.reduced_gradient(param)
        if gradient is not None:
            parts.append((piece.of.name, piece.of.shape, piece.chunk, gradient))
    found: dict[str, Tensor | None] = {name: None for name, _ in engine.module.named_parameters()}
    found.update(_put_together(engine, parts))
    return found


def reference(case: Case, world_size: int, rank: int = 0) -> Trace:
    """Train in plain PyTorch on the data of all ranks; ``losses`` are those of ``rank``."""
    model, trace = build_model(case), Trace()
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = case.build_optimizer(trainable)
    for step in range(STEPS):
        losses = []
        for micro, r in product(range(case.per_window), range(world_size)):
            loss = loss_of(model(*micro_batch(step, micro, r)))
            (loss / (case.accumulation * world_size)).backward()
            if r == rank:
                losses.append(loss.item())
        trace.losses.append(losses)
        trace.gradients.append(_gradients(model))
        limit = case.clipping if case.clipping > 0 else float("inf")
        trace.norms.append(nn.utils.clip_grad_norm_(trainable, limit).item())
        optimizer.step()
        optimizer.zero_grad()
        trace.weights.append(_weights(model))
    return trace


def start(case: Case, config: Mapping[str, Any] | None = None) -> Any:
    """Return an engine for ``case``; ``config`` are sections to add to its own."""
    client = case.build_optimizer if case.optimizer in _WHOLE else None
    engine = ds_core.initialize(model=build_model(case), optimizer=client, config={**case.config, **(config or {})})[0]
    if case.precision == "autocast fp16":
        # There is no key for it, and the first steps at torch's 2**16 would be lost.
        scaler = engine.parts.precision.scaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**SCALE_POWER})
    return engine


def logical_values(engine: Any, kind: str) -> dict[str, Tensor]:
    """Return the whole tensors of ``kind``, in whatever chunks ranks hold them. Collective where they hold parts."""
    parts = [
        (piece.of.name, piece.of.shape, piece.chunk, piece.data)
        for piece in engine.parts.partition.pieces()
        if piece.of.kind == kind
    ]
    return _put_together(engine, parts)


def _put_together(engine: Any, mine: list[tuple[str, tuple[int, ...], Chunk, Tensor]]) -> dict[str, Tensor]:
    """Return whole tensors, copies, from what this rank and, where the partition divides, the others hold of them.

    Where it does not, each rank's own are returned: that they are alike is for the caller to check. Elements that
    nobody holds are NaN.
    """
    of_ranks: list[Any] = [[(name, shape, chunk, data.detach().flatten()) for name, shape, chunk, data in mine]]
    if engine.parts.partition.divides:
        own = of_ranks[0]
        of_ranks = [None] * comm.get_world_size()
        torch.distributed.all_gather_object(of_ranks, own)
    found: dict[str, Tensor] = {}
    for name, shape, chunk, data in (part for parts in of_ranks for part in parts):
        whole = found.setdefault(name, torch.full(shape, float("nan"), dtype=data.dtype))
        for span in chunk.spans():
            box = tuple(slice(at, at + size) for at, size in zip(span.box.start, span.box.size, strict=True))
            whole[box] = data[span.offset : span.offset + span.box.numel].view(span.box.size)
    return found


def _masters(engine: Any, case: Case) -> dict[str, Tensor]:
    return {} if case.precision == "fp32" else logical_values(engine, MASTER)


def train(
    case: Case,
    config: Mapping[str, Any] | None = None,
    *,
    steps: int = STEPS,
    tamper: Callable[[Tensor], Tensor] = lambda loss: loss,
    before_backward: Callable[[Any, int, int], None] = lambda engine, step, micro: None,
    data: Callable[[int, int, int], tuple[Tensor, bool]] = micro_batch,
    weights: Callable[[nn.Module], dict[str, Tensor]] = _weights,
) -> Trace:
    """Train through an engine, on every rank of the process group.

    Args:
        case: what.
        config: sections to add, such as ``{"zero_optimization": {"stage": 1}}``.
        steps: how many.
        tamper: applied to the loss before backward; for showing that the comparison notices.
        before_backward: called with the engine, the step and the place of the backward in the window.
        data: returns the model's arguments for a step, place of the backward in the window, and rank.
        weights: how to read the weights by name, after a step.
    """
    engine = start(case, config)
    trace, rank = Trace(start_weights=weights(engine.module), start_masters=_masters(engine, case)), comm.get_rank()
    for step in range(steps):
        trace.scales.append(engine.cur_scale)
        losses = []
        for micro in range(case.accumulation):
            places = range(micro * case.backwards, (micro + 1) * case.backwards)
            # All forwards of a micro-batch first: several graphs are alive when the first backward reduces.
            graphs = [loss_of(engine(*data(step, place, rank))) for place in places]
            for place, loss in zip(places, graphs, strict=True):
                losses.append(loss.item())
                before_backward(engine, step, place)
                engine.backward(tamper(loss))
            if micro == case.accumulation - 1:
                trace.gradients.append(reduced_gradients(engine))
            engine.step()
        trace.losses.append(losses)
        trace.norms.append(engine.get_global_grad_norm())
        trace.skipped.append(not engine.was_step_applied())
        trace.weights.append(weights(engine.module))
        trace.masters.append(_masters(engine, case))
        trace.buffers.append({name: buffer.clone() for name, buffer in engine.module.named_buffers()})
    engine.destroy()
    return trace


def differences(case: Case, mine: Trace, expected: Trace) -> list[str]:
    """Return what is outside the bound in the steps of ``mine``, in words; empty when all is right."""
    found = []
    error = 0.0
    bound = GRADIENT_BOUND * case.backwards
    for step in range(len(mine.losses)):
        for name, want in expected.gradients[step].items():
            got = mine.gradients[step][name]
            if want is None or got is None:
                if (want is None) != (got is None):
                    found.append(f"step {step}: gradient of {name} is {got}, expected {want}")
                continue
            # An earlier step's difference in the weights moves this gradient by about as much.
            allowed = bound * (1 + _largest(want)) * (1 + step)
            error = max(error, allowed)
            if (off := _largest(got - want)) > allowed:
                found.append(f"step {step}: gradient of {name} is off by {off:.2e}, allowed {allowed:.2e}")
        for name, weight in expected.weights[step].items():
            allowed = case.step_bound * error * (1 + step)
            if (off := _largest(mine.weights[step][name] - weight)) > allowed:
                found.append(f"step {step}: weight {name} is off by {off:.2e}, allowed {allowed:.2e}")
        if abs(mine.norms[step] - expected.norms[step]) > bound * 4 * (1 + expected.norms[step]):
            found.append(f"step {step}: norm is {mine.norms[step]}, expected {expected.norms[step]}")
        for got_loss, want_loss in zip(mine.losses[step], expected.losses[step], strict=True):
            if abs(got_loss - want_loss) > bound * 4 * (1 + step):
                found.append(f"step {step}: loss is {got_loss}, expected {want_loss}")
    return found


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
