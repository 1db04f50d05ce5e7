"""Training in low precision on N ranks against one plain PyTorch process with the same dtypes (P03).

:func:`emulate` is that process: it holds the model in the stored dtype, computes each rank's and micro-batch's gradient
in it, adds in the accumulation and reduce dtypes, and updates fp32 masters with torch's optimizer. It knows neither
plans nor partitions; what each precision means is written down here once more (:class:`Meaning`).
:func:`differences` compares, :func:`check` does both for a case, on every rank.

Note: following. A rounding of a weight that falls the other way changes the next gradients by more than any bound of
one step. So gradients of a step are computed at the weights the engine had before it (``follow``), and are compared in
each step on their own; losses are then those of equal weights. Masters run on by themselves: they add up what the
steps may be off.

Note: the gradient bound. With equal weights, both sides have the same gradient of each backward, bit for bit. They may
add them in another order: n = ranks x accumulation x backwards terms g in a dtype of unit roundoff u, one rounding per
addition, so that each side is within (n - 1) u' sum|g| of the true sum, u' = u / (1 - n u), element by element (Higham,
Accuracy and Stability of Numerical Algorithms, section 4.2). The bound of the relative L2 error of a tensor is

    2 (n - 1) u' |sum|g|| / |sum g|

and one rounding more, on each side, for

- each cast to the reduce dtype where that is the coarser one,
- each cast back to an accumulation dtype that is another one,
- each share that a window which was reduced already is divided into, before it is reduced again (stage 0).

With one backward per micro-batch, a gradient is sent once, at any stage: at stage 2 the sum of a window is one of sums
that were sent. With b backwards what the first one reduced may be sent b times, and divided b - 1 times. (A stage that
puts each reduced element back on one rank adds zeros to it, which rounds nothing: b sums over w ranks and the additions
of a window are at most n - 1 roundings together.) u is 2**-8 in bf16, 2**-11 in fp16: the larger of the accumulation
and the reduce dtype's. On one rank with one backward the bound is 0, and nothing is cast for a journey that there is
not. Adding in fp16 brings no other error below its normal range, where sums are exact; a cast to it from another dtype
does, and a division, of half its least number, 2**-25, per element, rank, backward and side. A parameter used twice in
one forward has a gradient of two terms, which autograd may add in the dtype it is stored or accumulated in: one
rounding, where these differ. In which order and dtype a backend adds is within this, see "orders of summing" in
:mod:`ds_core.testing.reference`.

Note: the weight bound. A master moves by lr (1 + 0.9 + ... + 0.9**(k - 1)) times the gradient's error after k steps of
SGD with momentum 0.9, by at most 2 lr / eps times it with Adam, whose update has slope 1 / eps in a gradient and
another in its square's root, and by 2.25 lr times it with ``WholeSGD``. The sum of these over the steps bounds its
error; clipping adds the relative error of the norm. A weight with a master equals the master, cast, bit for bit. What
the optimizer itself rounds is u of the updated dtype: up to 16 roundings of the weight and of what it was moved by.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ds_core import comm
from ds_core.testing.reference import (
    ADAM_EPS,
    BATCH_NORM,
    GRADIENT_BOUND,
    LR,
    MIXED_MODELS,
    MODELS,
    OUTPUTS,
    SCALE_POWER,
    STEPS,
    Case,
    Trace,
    build_model,
    loss_of,
    micro_batch,
    reference,
    train,
)
from ds_core.testing.reference import differences as elementwise_differences

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

__all__ = [
    "FACTORS",
    "PRECISIONS",
    "Expected",
    "Meaning",
    "Measured",
    "Scaler",
    "case_of",
    "check",
    "differences",
    "emulate",
    "measure",
    "measured_cases",
    "shared_out",
    "unnoticed",
    "wrong_cases",
]

PRECISIONS = ("fp16", "bf16", "autocast bf16", "autocast fp16")
FACTORS: dict[str, tuple[Any, ...]] = {
    "precision": PRECISIONS,
    "model": (*MODELS, *MIXED_MODELS, BATCH_NORM),
    "output": OUTPUTS,
    "accumulation": (1, 2, 3),
    "clipping": (0.0, 0.05),
    "optimizer": ("SGD", "AdamW"),
    "accumulate": (None, "float32"),
    "reduce": (None, "fp32", "fp16", "bf16"),
}
"""Of the matrix of P03 at one world size: fields of :class:`Case`."""
OPTIMIZER_ROUNDINGS = 16
FP16_UNDERFLOW = 2.0**-25
MOMENTUM = 0.9
_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def case_of(row: Mapping[str, Any]) -> Case:
    """Return the case of a combination of ``FACTORS``, or the nearest one that can be trained.

    Without masters, what was given in 16 bits cannot accumulate in another dtype: that is refused.
    """
    case = Case(**row)
    if not Meaning.of(case).has_masters and case.model in MIXED_MODELS:
        case = replace(case, accumulate=None)
    return case


@dataclass
class Scaler:
    """Dynamic loss scaling as in spec section 4; two is its factor, one its least."""

    scale: float
    window: int
    hysteresis: int = 2
    left: int = 0
    iteration: int = 0
    last_overflow: int = -1

    def __post_init__(self) -> None:
        self.left = self.hysteresis

    def update(self, overflowed: bool) -> None:
        if overflowed:
            if self.left == 1:
                self.scale = max(self.scale / 2, 1.0)
            else:
                self.left -= 1
            self.last_overflow = self.iteration
        else:
            stable = self.iteration - self.last_overflow - 1
            if stable > 0 and stable % self.window == 0:
                self.left = self.hysteresis
                self.scale *= 2
        self.iteration += 1


@dataclass(frozen=True)
class Meaning:
    """What a precision means, as a user would say it."""

    stored: torch.dtype | None = None
    """None: as the model was given."""
    autocast: torch.dtype | None = None
    has_masters: bool = True
    skips: bool = True

    @staticmethod
    def of(case: Case) -> Meaning:
        if case.precision.startswith("autocast "):
            return Meaning(autocast=_DTYPES[case.precision.removeprefix("autocast ")], has_masters=False)
        if case.precision == "fp32":
            return Meaning(has_masters=False, skips=False)
        return Meaning(stored=_DTYPES[case.precision])


@dataclass
class Expected(Trace):
    """A trace, and how far another one may be from it in L2 norm."""

    gradient_bounds: list[dict[str, float]] = field(default_factory=list)
    norm_bounds: list[float] = field(default_factory=list)
    weight_bounds: list[dict[str, float]] = field(default_factory=list)
    """Of what the optimizer updates: the master, or the weight that has none."""


@dataclass(frozen=True)
class Measured:
    """How far a case is off."""

    gradient: tuple[float, float] = (0.0, 0.0)
    """The largest L2 error of a gradient in any step, relative to its norm, and what that tensor may be off by."""
    weight: tuple[float, float] = (0.0, 0.0)
    """The same of what the optimizer updates: masters, and weights that have none."""
    share: float = 0.0
    """The largest part of its bound that any tensor used, 1 at most."""

    def __or__(self, other: Measured) -> Measured:
        """Return the larger of both."""
        return Measured(
            max(self.gradient, other.gradient), max(self.weight, other.weight), max(self.share, other.share)
        )


def emulate(
    case: Case,
    world_size: int,
    rank: int = 0,
    *,
    steps: int = STEPS,
    follow: Trace | None = None,
    never: Collection[int] = (),
    zero: Collection[int] = (),
    data: Callable[[int, int, int], tuple[Tensor, bool]] = micro_batch,
    scaler: Scaler | None = None,
) -> Expected:
    """Train in plain PyTorch on the data of all ranks; ``losses`` are those of ``rank``.

    Args:
        case: what.
        world_size: whose data.
        rank: for ``losses``.
        steps: how many.
        follow: take the weights before each step from here, see the module's note.
        never: steps that overflow, whatever their gradients are: nothing of them reaches the weights.
        zero: steps whose losses are multiplied by zero before backward.
        data: returns the model's arguments for a step, micro-batch and rank.
        scaler: instead of the one the case's configuration asks for.
    """
    return _Emulation(case, world_size, rank, scaler, zero, data).run(steps, follow, never)


class _Emulation:
    def __init__(
        self,
        case: Case,
        world_size: int,
        rank: int,
        scaler: Scaler | None,
        zero: Collection[int],
        data: Callable[[int, int, int], tuple[Tensor, bool]],
    ) -> None:
        self.case, self.world_size, self.rank, self.zero, self.data = case, world_size, rank, zero, data
        self.meaning = Meaning.of(case)
        self.model = build_model(case)
        self.params = dict(self.model.named_parameters())
        given = {name: param.detach().clone() for name, param in self.params.items()}
        if self.meaning.stored is not None:
            for param in self.params.values():
                param.data = param.data.to(self.meaning.stored)
        self.buffers = dict(self.model.named_buffers())
        if case.buffer is not None:
            for buffer in self.buffers.values():
                if buffer.is_floating_point():
                    buffer.data = buffer.data.to(_DTYPES[case.buffer])
        self.buffers_of = [_copies(self.buffers) for _ in range(world_size)]
        """Each rank's own: the one model here takes turns with them."""
        self.masters = {
            name: nn.Parameter(given[name].float())
            for name, param in self.params.items()
            if self.meaning.has_masters and param.requires_grad and param.dtype != torch.float32
        }
        self.updated = {
            name: self.masters.get(name, param) for name, param in self.params.items() if param.requires_grad
        }
        self.optimizer = case.build_optimizer(list(self.updated.values()))
        self.scaler = scaler or _scaler_of(case)
        self.reduced_low = _low_when_reduced(self.model)
        self.used_twice = {name for name in self.params if name.startswith("block.")}
        if self.model.get_parameter("head.weight") is self.model.get_parameter("embed.weight"):
            self.used_twice.add("embed.weight")
        self.applied = 0
        self.error = dict.fromkeys(self.updated, 0.0)
        """Sum over the steps of what each tensor's gradient may have been off by, unscaled and clipped."""
        self.moved = dict.fromkeys(self.updated, 0.0)
        """Sum over the steps of the norm of each tensor's gradient, unscaled and clipped."""
        self.trace = Expected(start_weights=_copies(self.params), start_masters=_copies(self.masters))

    def run(self, steps: int, follow: Trace | None, never: Collection[int]) -> Expected:
        for step in range(steps):
            if follow is not None:
                weights = follow.start_weights if step == 0 else follow.weights[step - 1]
                for name, param in self.params.items():
                    param.data.copy_(weights[name])
            if step in never:
                self._overflow(step)
            else:
                self._step(step)
            self.trace.weights.append(_copies(self.params))
            self.trace.masters.append(_copies(self.masters))
            self.trace.buffers.append(_copies(self.buffers_of[self.rank]))
            self.trace.weight_bounds.append({name: self._weight_bound(name) for name in self.updated})
        return self.trace

    def _accumulate_dtype(self, name: str) -> torch.dtype:
        return self.params[name].dtype if self.case.accumulate is None else _DTYPES[self.case.accumulate]

    def _reduce_dtype(self, name: str) -> torch.dtype:
        if self.case.reduce is not None:
            return _DTYPES[self.case.reduce]
        if self.meaning.autocast is not None and name in self.reduced_low:
            return self.meaning.autocast
        return self.params[name].dtype

    def _overflow(self, step: int) -> None:
        trace = self.trace
        trace.scales.append(self.scaler.scale)
        trace.losses.append([])
        trace.gradients.append({})
        trace.gradient_bounds.append({})
        trace.norms.append(float("nan"))
        trace.norm_bounds.append(0.0)
        trace.skipped.append(True)
        # Its forward was computed all the same: there is a loss, and batch statistics have moved.
        self._local(step, self.rank, self.scaler.scale)
        self.scaler.update(True)

    def _step(self, step: int) -> None:
        trace, scale = self.trace, self.scaler.scale
        trace.scales.append(scale)
        trace.losses.append([])
        sums: dict[str, Tensor] = {}
        sizes: dict[str, Tensor] = {}
        for rank in range(self.world_size):
            for name, (local, size) in self._local(step, rank, scale).items():
                # In one process nothing travels, so nothing is cast for it.
                sent = local.to(self._reduce_dtype(name)) if self.world_size > 1 else local
                sums[name] = sums[name] + sent if name in sums else sent
                sizes[name] = sizes[name] + size if name in sizes else size
        gradients = {name: value.to(self._accumulate_dtype(name)) for name, value in sums.items()}
        bounds = {name: self._gradient_bound(name, value, sizes[name]) for name, value in gradients.items()}
        trace.gradients.append({name: gradients.get(name) for name in self.params})
        trace.gradient_bounds.append(bounds)
        norm = sum(float(value.double().square().sum()) for value in gradients.values()) ** 0.5
        norm_bound = sum(bound**2 for bound in bounds.values()) ** 0.5
        trace.norms.append(norm / scale)
        trace.norm_bounds.append(norm_bound / scale + 2.0**-20 * norm / scale)
        skipped = self.meaning.skips and not norm < float("inf")
        trace.skipped.append(skipped)
        if not skipped:
            self._update(gradients, bounds, norm, norm_bound, scale)
        self.scaler.update(skipped)

    def _local(self, step: int, rank: int, scale: float) -> dict[str, tuple[Tensor, Tensor]]:
        """Return ``rank``'s gradients, each with the sum of the micro-batches' magnitudes."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        # Several backwards of a micro-batch are summed, as calls of loss.backward() are.
        factor = 0.0 if step in self.zero else scale / (self.case.accumulation * self.world_size)
        for name, buffer in self.buffers.items():
            buffer.copy_(self.buffers_of[rank][name])
        for micro in range(self.case.per_window):
            with torch.autocast("cpu", self.meaning.autocast, enabled=self.meaning.autocast is not None):
                output = self.model(*self.data(step, micro, rank))
            loss = loss_of(output)
            torch.autograd.backward(loss, torch.full_like(loss, factor))
            if rank == self.rank:
                self.trace.losses[-1].append(loss.item())
            for name, param in self.params.items():
                if param.grad is None:
                    continue
                gradient, size = param.grad.to(self._accumulate_dtype(name)), param.grad.double().abs()
                if name in found:
                    gradient, size = found[name][0] + gradient, found[name][1] + size
                found[name] = gradient, size
                param.grad = None
        self.buffers_of[rank] = _copies(self.buffers)
        return found

    def _gradient_bound(self, name: str, gradient: Tensor, size: Tensor) -> float:
        accumulate, reduce = self._accumulate_dtype(name), self._reduce_dtype(name)
        if self.world_size == 1:
            reduce = accumulate
        backwards = self.case.backwards
        terms = self.world_size * self.case.per_window
        u = max(_roundoff(accumulate), _roundoff(reduce))
        roundings = terms - 1
        if self.world_size > 1:
            roundings += backwards - 1
        if _roundoff(reduce) > _roundoff(accumulate):
            roundings += backwards
        bound = 2 * roundings * u / (1 - terms * u) * _norm(size)
        if accumulate != reduce:
            bound += 2 * backwards * u * _norm(size)
        if torch.float16 in (accumulate, reduce) and (accumulate != reduce or backwards > 1):
            bound += 2 * terms * FP16_UNDERFLOW * gradient.numel() ** 0.5
        if name in self.used_twice and accumulate != self.params[name].dtype:
            bound += _roundoff(self.params[name].dtype) * _norm(size)
        return bound

    def _update(
        self, gradients: Mapping[str, Tensor], bounds: Mapping[str, float], norm: float, norm_bound: float, scale: float
    ) -> None:
        factor, clipped = 1.0 / scale, 0.0
        limit = self.case.clipping
        if limit > 0 and not limit / (norm / scale + 1e-6) >= 1:
            factor *= limit / (norm / scale + 1e-6)
            clipped = norm_bound / norm
        for name, target in self.updated.items():
            gradient = gradients.get(name)
            if gradient is not None:
                target.grad = gradient.to(target.dtype) * factor
                self.moved[name] += _norm(gradient) * factor
                self.error[name] += (bounds[name] + _norm(gradient) * clipped) * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.applied += 1
        for name, master in self.masters.items():
            self.params[name].data.copy_(master.data)

    def _weight_bound(self, name: str) -> float:
        target = self.updated[name]
        if self.case.optimizer == "SGD":
            slope = LR * (1 - MOMENTUM**self.applied) / (1 - MOMENTUM)
        elif self.case.optimizer == "WholeSGD":
            slope = 2.25 * LR
        else:
            slope = 2 * LR / ADAM_EPS
        own = OPTIMIZER_ROUNDINGS * _roundoff(target.dtype) * (_norm(target) + slope * self.moved[name])
        return slope * self.error[name] + own


def _scaler_of(case: Case) -> Scaler:
    if case.precision == "fp16":
        return Scaler(2.0**SCALE_POWER, window=1)
    if case.precision == "autocast fp16":
        return Scaler(2.0**SCALE_POWER, window=2000, hysteresis=1)
    return Scaler(1.0, window=10**9)


def _low_when_reduced(model: nn.Module) -> set[str]:
    """Return the parameters that autocast reduces in its own dtype: those of ``Linear``.

    One that several modules share goes by the first of them, whose name is the parameter's first name.
    """
    modules = dict(model.named_modules())
    return {name for name, _ in model.named_parameters() if type(modules[name.rpartition(".")[0]]) is nn.Linear}


def check(
    case: Case, config: Mapping[str, Any] | None = None, *, tamper: Callable[[Tensor], Tensor] | None = None, **how: Any
) -> list[str]:
    """Train ``case`` on every rank of the process group and return what is outside the bounds; empty: all is right.

    Args:
        case: what.
        config: sections to add, see :func:`ds_core.testing.reference.train`.
        tamper: for showing that the comparison notices, as there.
        how: ``weights``, as there.
    """
    if tamper is not None:
        how["tamper"] = tamper
    return _problems(case, train(case, config, **how), {})


def unnoticed(mutations: Iterable[tuple[Case, float]]) -> dict[tuple[Case, float], list[str]]:
    """Train with rank 1's loss times a factor; return what a comparison takes for right in the first step.

    The mutation check of P03: each gradient and each weight alone must notice, in every comparison that is made of the
    case. Collective.

    Args:
        mutations: cases, with SGD and without clipping, each with a factor.
    """
    found = {}
    for case, factor in mutations:
        mine = train(case, steps=1, tamper=partial(torch.mul, other=factor) if comm.get_rank() == 1 else torch.clone)
        names = [name for name, param in build_model(case).named_parameters() if param.requires_grad]
        missed = [
            f"{what} {name}"
            for problems in _comparisons(case, mine, {})
            for name in names
            for what in ("gradient of", "weight")
            if not any(problem.startswith(f"step 0: {what} {name} is off by ") for problem in problems)
        ]
        if missed:
            found[case, factor] = missed
    return found


def _problems(case: Case, mine: Trace, measured: dict[Case, Measured]) -> list[str]:
    return [problem for found in _comparisons(case, mine, measured) for problem in found]


def _comparisons(case: Case, mine: Trace, measured: dict[Case, Measured]) -> list[list[str]]:
    """Return what each comparison finds: in norm, and by element where all is in fp32."""
    world_size, rank = comm.get_world_size(), comm.get_rank()
    expected = emulate(case, world_size, rank, steps=len(mine.losses), follow=mine)
    measured[case] = measure(mine, expected)
    found = [differences(mine, expected)]
    if any(expected.skipped):
        found.append(["a step overflowed in plain PyTorch too, so its gradients were not compared"])
    if case.is_elementwise_comparable:
        found.append(elementwise_differences(case, mine, reference(case, world_size, rank)))
    return found


def wrong_cases(cases: Iterable[Case], config: Mapping[str, Any] | None = None, **how: Any) -> dict[str, list[str]]:
    """Train every case on every rank of the process group; return those that are off, with what is.

    Ranks must agree bit for bit, so each compares its share of the cases with plain PyTorch: in norm, and where all is
    in fp32 by element too.

    Args:
        cases: the same on every rank.
        config: sections to add, see :func:`ds_core.testing.reference.train`.
        how: ``weights``, as there.
    """
    return measured_cases(cases, config, **how)[0]


def measured_cases(
    cases: Iterable[Case], config: Mapping[str, Any] | None = None, **how: Any
) -> tuple[dict[str, list[str]], dict[Case, Measured]]:
    """Do as :func:`wrong_cases`; return also how far each case is off that this rank compared."""
    measured: dict[Case, Measured] = {}
    traces = [(case, train(case, config, **how)) for case in cases]
    wrong = shared_out([(str(case), trace, partial(_problems, case, trace, measured)) for case, trace in traces])
    return wrong, measured


def shared_out(trained: Sequence[tuple[str, Trace, Callable[[], list[str]]]]) -> dict[str, list[str]]:
    """Compare traces of every rank with each other, and each on one rank with what is expected. Collective.

    Args:
        trained: per case a name, this rank's trace, and what compares it; the same cases on every rank.

    Returns:
        the names of those that are off, with what is.
    """
    rank, world_size = comm.get_rank(), comm.get_world_size()
    digests = [_digest(trace) for _, trace, _ in trained]
    of_ranks: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(of_ranks, digests)
    found = {}
    for index, (name, _, compare) in enumerate(trained):
        problems = [
            f"rank {other} has other numbers" for other in range(world_size) if of_ranks[other][index] != digests[index]
        ]
        if index % world_size == rank:
            problems += compare()
        if problems:
            found[name] = problems
    return found


def _digest(trace: Trace) -> str:
    """Return a hash of every number that all ranks must have alike: all but the losses and the buffers."""
    found = hashlib.blake2b(repr([trace.scales, trace.skipped, trace.norms]).encode())
    everything: list[Mapping[str, Tensor | None]] = [trace.start_weights, trace.start_masters]
    everything += [*trace.gradients, *trace.weights, *trace.masters]
    for tensors in everything:
        for name, tensor in tensors.items():
            found.update(f"{name} {None if tensor is None else tensor.dtype}".encode())
            if tensor is not None:
                found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def differences(mine: Trace, expected: Expected) -> list[str]:
    """Return what is outside the bounds, in words; empty when all is right."""
    found = _unequal("weight", "before any step", mine.start_weights, expected.start_weights)
    found += _unequal("master", "before any step", mine.start_masters, expected.start_masters)
    for step in range(len(expected.skipped)):
        for what in ("scales", "skipped"):
            got, want = getattr(mine, what)[step], getattr(expected, what)[step]
            if got != want:
                found.append(f"step {step}: {what} is {got}, expected {want}")
        found += _loss_differences(step, mine, expected)
        if not expected.skipped[step]:
            found += _gradient_differences(step, mine, expected)
        found += _weight_differences(step, mine, expected)
        # The same batches in the same forward: nothing of them is summed over the ranks.
        found += _unequal("buffer", f"step {step}", mine.buffers[step], expected.buffers[step])
    return found


def _unequal(what: str, when: str, mine: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    if mine.keys() != expected.keys():
        return [f"{when}: there is a {what} of {sorted(mine)}, expected {sorted(expected)}"]
    return [
        f"{when}: {what} {name} is not equal bit for bit"
        for name, want in expected.items()
        if mine[name].dtype != want.dtype or not torch.equal(mine[name], want)
    ]


def _loss_differences(step: int, mine: Trace, expected: Expected) -> list[str]:
    # The same numbers through the same kernels: all that is left is what fp32 sums of another order may be off.
    return [
        f"step {step}: loss is {got}, expected {want}"
        for got, want in zip(mine.losses[step], expected.losses[step], strict=True)
        if not abs(got - want) <= GRADIENT_BOUND
    ]


def measure(mine: Trace, expected: Expected) -> Measured:
    """Return the largest errors of all steps that were not skipped in plain PyTorch."""
    found = Measured()
    for step in range(len(expected.skipped)):
        if not expected.skipped[step]:
            for _, off, allowed, norm in _gradient_errors(step, mine, expected):
                found |= Measured(gradient=(off / norm, allowed / norm), share=_share(off, allowed))
        for _, off, allowed, norm in _weight_errors(step, mine, expected):
            found |= Measured(weight=(off / norm, allowed / norm), share=_share(off, allowed))
    return found


def _share(off: float, allowed: float) -> float:
    if off == 0.0:
        return 0.0
    return off / allowed if allowed > 0 else float("inf")


def _gradient_errors(step: int, mine: Trace, expected: Expected) -> Iterator[tuple[str, float, float, float]]:
    """Yield name, error, bound and norm (1 for nothing) of each gradient that both have."""
    for name, want in expected.gradients[step].items():
        got = mine.gradients[step][name]
        if want is not None and got is not None:
            off = _norm(got.double() - want.double())
            yield name, off, expected.gradient_bounds[step][name], _norm(want) or 1.0


def _weight_errors(step: int, mine: Trace, expected: Expected) -> Iterator[tuple[str, float, float, float]]:
    """Yield the same of each weight, or its master."""
    masters = mine.masters[step]
    for name, weight in mine.weights[step].items():
        got, want = masters.get(name, weight), expected.masters[step].get(name, expected.weights[step][name])
        off = _norm(got.double() - want.double())
        yield name, off, expected.weight_bounds[step].get(name, 0.0), _norm(want) or 1.0


def _gradient_differences(step: int, mine: Trace, expected: Expected) -> list[str]:
    found = []
    for name, want in expected.gradients[step].items():
        got = mine.gradients[step][name]
        if (want is None) != (got is None):
            found.append(f"step {step}: gradient of {name} is {got}, expected {want}")
        elif want is not None and got is not None and got.dtype != want.dtype:
            found.append(f"step {step}: gradient of {name} is in {got.dtype}, expected {want.dtype}")
    for name, off, allowed, of in _gradient_errors(step, mine, expected):
        if not off <= allowed:
            found.append(f"step {step}: gradient of {name} is off by {off / of:.2e}, allowed {allowed / of:.2e}")
    if not abs(mine.norms[step] - expected.norms[step]) <= expected.norm_bounds[step]:
        found.append(
            f"step {step}: norm is {mine.norms[step]}, expected {expected.norms[step]} "
            f"within {expected.norm_bounds[step]:.1e}"
        )
    return found


def _weight_differences(step: int, mine: Trace, expected: Expected) -> list[str]:
    found = []
    masters = mine.masters[step]
    if masters.keys() != expected.masters[step].keys():
        found.append(f"step {step}: masters of {sorted(masters)}, expected {sorted(expected.masters[step])}")
    for name, master in masters.items():
        weight = mine.weights[step][name]
        if not torch.equal(weight, master.to(weight.dtype)):
            found.append(f"step {step}: weight {name} is not its master, cast")
    for name, off, allowed, _ in _weight_errors(step, mine, expected):
        if not off <= allowed:
            found.append(f"step {step}: weight {name} is off by {off:.2e}, allowed {allowed:.2e}")
    return found


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _norm(tensor: Tensor) -> float:
    return float(tensor.detach().double().norm())
