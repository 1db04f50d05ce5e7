"""Training on N ranks against a plain single-process PyTorch loop: the same data, the same bound everywhere (P03).

A :class:`Case` names what is trained; :func:`train` runs it through an engine on this rank, :func:`reference` in plain
PyTorch over the data of all ranks, :func:`differences` compares every loss, gradient and weight element by element.

Note: the bound
    Both sides add the same numbers in another order. A gradient here is a sum of at most 2**7 products, so orders
    differ by at most 2**7 * 2**-24 = 2**-17 of the largest partial sum, which is of the size of the tensor's largest
    gradient (at least of 1, the size of what is backpropagated). Measured are 2**-24: rounding errors mostly cancel,
    which leaves room for layers below each other. A step moves a weight by at most lr times the gradient's error with
    SGD, and lr / eps times it with Adam, whose update has slope at most 1 / eps; ``ADAM_EPS`` is large so that this
    stays small. Over the few steps of a case errors add up. A halved or doubled share of one rank is larger than this
    by orders of magnitude.

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
from ds_core.interfaces.logical import MASTER

__all__ = [
    "Case",
    "Trace",
    "build_model",
    "differences",
    "every_case",
    "logical_values",
    "loss_of",
    "micro_batch",
    "reference",
    "start",
    "train",
]

MODELS = ("plain", "tied", "frozen", "unused", "zero_size", "all")
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


@dataclass(frozen=True)
class Case:
    """What is trained."""

    model: str = "all"
    output: str = "tensor"
    accumulation: int = 1
    clipping: float = 0.0
    optimizer: str = "SGD"
    precision: str = "fp32"
    """``fp32``, ``fp16``, ``bf16``, ``autocast bf16`` or ``autocast fp16``."""
    accumulate: str | None = None
    """``data_types.grad_accum_dtype``."""
    reduce: str | None = None
    """``communication_data_type``."""

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
            "optimizer": {"type": self.optimizer, "params": self.options},
        }
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
        return found

    @property
    def options(self) -> dict[str, Any]:
        if self.optimizer == "SGD":
            return {"lr": LR, "momentum": 0.9, "weight_decay": 0.01}
        return {"lr": LR, "eps": ADAM_EPS, "weight_decay": 0.01}

    @property
    def step_bound(self) -> float:
        """How far a weight may be off per step, per unit of gradient error."""
        return LR * 10 if self.optimizer == "SGD" else LR / ADAM_EPS * 2


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
    """Return rank ``rank``'s input: tokens ``[2, 5]``, and whether it uses the parameter not all do."""
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


def reference(case: Case, world_size: int, rank: int = 0) -> Trace:
    """Train in plain PyTorch on the data of all ranks; ``losses`` are those of ``rank``."""
    model, trace = build_model(case), Trace()
    cls = getattr(torch.optim, case.optimizer)
    trainable = [param for param in model.parameters() if param.requires_grad]
    optimizer = cls(trainable, **case.options)
    for step in range(STEPS):
        losses = []
        for micro, r in product(range(case.accumulation), range(world_size)):
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
    engine = ds_core.initialize(model=build_model(case), config={**case.config, **(config or {})})[0]
    if case.precision == "autocast fp16":
        # There is no key for it, and the first steps at torch's 2**16 would be lost.
        scaler = engine.parts.precision.scaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**SCALE_POWER})
    return engine


def logical_values(engine: Any, kind: str) -> dict[str, Tensor]:
    """Return the whole tensors of ``kind``, in whatever chunks the ranks hold them. Collective."""
    mine = [
        (piece.of, piece.chunk, piece.data.detach().flatten())
        for piece in engine.parts.partition.pieces()
        if piece.of.kind == kind
    ]
    every: list[Any] = [None] * comm.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    found: dict[str, Tensor] = {}
    for of, chunk, data in (piece for pieces in every for piece in pieces):
        whole = found.setdefault(of.name, torch.full(of.shape, float("nan"), dtype=data.dtype))
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
    gradients: Callable[[nn.Module], dict[str, Tensor | None]] = _gradients,
    weights: Callable[[nn.Module], dict[str, Tensor]] = _weights,
) -> Trace:
    """Train through an engine, on every rank of the process group.

    Args:
        case: what.
        config: sections to add, such as ``{"zero_optimization": {"stage": 1}}``.
        steps: how many.
        tamper: applied to the loss before backward; for showing that the comparison notices.
        before_backward: called with the engine, the step and the micro-batch.
        data: returns the model's arguments for a step, micro-batch and rank.
        gradients: how to read the reduced gradients, still scaled, between the last backward and the step.
        weights: how to read the weights by name, after a step.
    """
    engine = start(case, config)
    trace, rank = Trace(start_weights=weights(engine.module), start_masters=_masters(engine, case)), comm.get_rank()
    for step in range(steps):
        trace.scales.append(engine.cur_scale)
        losses = []
        for micro in range(case.accumulation):
            loss = loss_of(engine(*data(step, micro, rank)))
            losses.append(loss.item())
            before_backward(engine, step, micro)
            engine.backward(tamper(loss))
            if micro == case.accumulation - 1:
                trace.gradients.append(gradients(engine.module))
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
    """Return what is outside the bound, in words; empty when all is right."""
    found = []
    error = 0.0
    for step in range(STEPS):
        for name, want in expected.gradients[step].items():
            got = mine.gradients[step][name]
            if want is None or got is None:
                if (want is None) != (got is None):
                    found.append(f"step {step}: gradient of {name} is {got}, expected {want}")
                continue
            # An earlier step's difference in the weights moves this gradient by about as much.
            allowed = GRADIENT_BOUND * (1 + _largest(want)) * (1 + step)
            error = max(error, allowed)
            if (off := _largest(got - want)) > allowed:
                found.append(f"step {step}: gradient of {name} is off by {off:.2e}, allowed {allowed:.2e}")
        for name, weight in expected.weights[step].items():
            allowed = case.step_bound * error * (1 + step)
            if (off := _largest(mine.weights[step][name] - weight)) > allowed:
                found.append(f"step {step}: weight {name} is off by {off:.2e}, allowed {allowed:.2e}")
        if abs(mine.norms[step] - expected.norms[step]) > GRADIENT_BOUND * 4 * (1 + expected.norms[step]):
            found.append(f"step {step}: norm is {mine.norms[step]}, expected {expected.norms[step]}")
        for got_loss, want_loss in zip(mine.losses[step], expected.losses[step], strict=True):
            if abs(got_loss - want_loss) > GRADIENT_BOUND * 4 * (1 + step):
                found.append(f"step {step}: loss is {got_loss}, expected {want_loss}")
    return found


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
