"""DeepSpeed's API of the tensors behind a parameter: fp32 weight, optimizer state, gradient (``safe_get_*``).

The same functions at every stage: where ranks hold parts of a tensor, the parts are put together, so every rank of the
data-parallel group must call, with the same parameter. A parameter that no engine trains has none of them: None.

Reference: spec/zero.md 7, sharp edges 12.2 and 12.7.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from ds_core.comm import values_of_ranks
from ds_core.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

    from ds_core.engine.engine import DeepSpeedEngine
    from ds_core.interfaces.logical import Chunk, Piece

__all__ = [
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
    "train_by",
]

_ENGINE = "_ds_engine"


def train_by(engine: DeepSpeedEngine, params: Iterable[nn.Parameter]) -> None:
    """Let the functions of this module find ``engine`` by the parameters it trains; the last engine counts."""
    of_engine = weakref.ref(engine)
    for param in params:
        setattr(param, _ENGINE, of_engine)


class _Fragment:
    """What this rank updates of one parameter."""

    def __init__(self, engine: DeepSpeedEngine, param: nn.Parameter, piece: Piece) -> None:
        self.engine, self.param, self.piece = engine, param, piece

    @classmethod
    def of(cls, param: nn.Parameter) -> _Fragment | None:
        """Return that of ``param``; None where no living engine trains it."""
        found = getattr(param, _ENGINE, None)
        engine = None if found is None else found()
        if engine is None or engine.is_destroyed or engine.basic_optimizer is None:
            return None
        partition = engine.parts.partition
        params = [each for group in partition.inputs.param_groups for each in group["params"]]
        for each, piece in zip(params, partition.optimizer_pieces(), strict=True):
            if each is param:
                return cls(engine, param, piece)
        return None

    @property
    def master(self) -> Tensor:
        return self.piece.data.detach()

    def slot(self, key: str) -> Tensor:
        """Return a tensor of the optimizer's state.

        Raises:
            EngineError: there is none yet, or none of this name.
        """
        optimizer = self.engine.basic_optimizer
        assert optimizer is not None
        state = optimizer.state.get(self.piece.data, {})
        if key not in state:
            have = ", ".join(state) or "nothing before its first step with a gradient"
            raise EngineError(
                f"the optimizer has no state {key!r} of this parameter, it has {have}",
                where=f"parameter {self.piece.of.name!r}",
                fix="ask after a step, for one of the optimizer's own names",
            )
        value = state[key]
        return value if isinstance(value, torch.Tensor) else torch.tensor(value)

    def full_slot(self, key: str) -> Tensor:
        """Return a state of the optimizer, in fp32: put together, or as it is where it is no part of anything.

        Collective.

        Raises:
            EngineError: on every rank: no rank has it.
        """
        try:
            part, failure = self.slot(key), None
        except EngineError as error:
            part, failure = None, error
        is_part = part is not None and part.numel() == self.piece.chunk.length
        once = part.tolist() if part is not None and not is_part else None
        if not self.engine.parts.partition.divides:
            told = [(is_part, once)]
        else:
            # A rank that owns nothing of the parameter may have no state of it.
            told = values_of_ranks((part is not None and is_part and self.piece.chunk.length > 0, once), self.group)
        if any(whole for whole, _ in told):
            return self.full(part if part is not None and is_part else self.piece.data)
        kept = next((value for _, value in told if value is not None), None)
        if kept is not None:
            return torch.tensor(kept)
        raise failure or EngineError(
            f"the state {key!r} cannot be put together", where=f"parameter {self.piece.of.name!r}"
        )

    @property
    def group(self) -> ProcessGroup:
        return self.engine.parts.group

    def full(self, part: Tensor) -> Tensor:
        """Return the tensor of the parameter's shape of which each rank has its part, in fp32. Collective."""
        part = part.detach()
        full = torch.zeros(self.piece.of.shape, dtype=torch.float32, device=self.param.device)
        _interval(full, self.piece.chunk).copy_(part.reshape(-1))
        if self.engine.parts.partition.divides:
            # Added as whole numbers: of each element one rank has the bits, the others zeros.
            torch.distributed.all_reduce(full.view(torch.int32), group=self.group)
        return full

    def write(self, part: Tensor, value: Tensor, call: str) -> None:
        """Write this rank's part of the full tensor ``value``."""
        if value.shape != torch.Size(self.piece.of.shape):
            raise _wrong_shape(call, value, self.piece.of.shape, self.piece.of.name)
        with torch.no_grad():
            part.detach().view(-1).copy_(_interval(value.detach().contiguous(), self.piece.chunk).to(part))


def _interval(full: Tensor, chunk: Chunk) -> Tensor:
    # Partitions that divide do so by intervals of the whole parameter.
    return full.view(-1)[chunk.offset : chunk.offset + chunk.length]


def _wrong_shape(call: str, value: Tensor, expected: Iterable[int], name: str) -> EngineError:
    return EngineError(
        f"a value of shape {list(value.shape)} was given for one of {list(expected)}",
        where=f"{call}, parameter {name!r}",
        fix="pass the full tensor to safe_set_full_*, this rank's part to safe_set_local_*",
    )


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Return the weight with all digits it is trained in, ``param``'s shape, fp32, a copy. Collective."""
    found = _Fragment.of(param)
    return None if found is None else found.full(found.master)


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Return a state of the optimizer, such as ``exp_avg``, ``param``'s shape, fp32, a copy. Collective."""
    found = _Fragment.of(param)
    return None if found is None else found.full_slot(optim_state_key)


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """Return the gradient that the coming step takes, not scaled and not clipped, fp32, a copy. Collective.

    Between the backward that ends a window and ``step()``; None before, and where no rank used the parameter.
    """
    found = _Fragment.of(param)
    if found is None:
        return None
    part = found.engine.parts.partition.reduced_gradient(param)
    if part is None:
        return None
    return found.full(part).div_(found.engine.parts.precision.scaler.scale)


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Set the weight: what is trained, and at once what the model computes with. All ranks pass the same value."""
    found = _fragment(param, "safe_set_full_fp32_param")
    found.write(found.master, value, "safe_set_full_fp32_param")
    with torch.no_grad():
        param.copy_(value)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set a state of the optimizer. All ranks pass the same value."""
    found = _fragment(param, "safe_set_full_optimizer_state")
    found.write(found.slot(optim_state_key), value, "safe_set_full_optimizer_state")


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Set the gradient that the coming step takes, not scaled. All ranks pass the same value."""
    found = _fragment(param, "safe_set_full_grad")
    found.write(_gradient(found), value * found.engine.parts.precision.scaler.scale, "safe_set_full_grad")


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Return this rank's part of the weight, flat, a copy; empty where it has none."""
    found = _Fragment.of(param)
    return None if found is None else found.master.reshape(-1).float().clone()


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Return this rank's part of a state of the optimizer, flat, a copy."""
    found = _Fragment.of(param)
    return None if found is None else found.slot(optim_state_key).detach().reshape(-1).float().clone()


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    """Return this rank's part of the gradient, as :func:`safe_get_full_grad`, flat."""
    found = _Fragment.of(param)
    part = None if found is None else found.engine.parts.partition.reduced_gradient(param)
    if found is None or part is None:
        return None
    return part.detach().reshape(-1).float() / found.engine.parts.precision.scaler.scale


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Set this rank's part of the weight; the model computes with it from the next step on."""
    found = _fragment(param, "safe_set_local_fp32_param")
    _write_local(found, found.master, value, "safe_set_local_fp32_param")


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set this rank's part of a state of the optimizer."""
    found = _fragment(param, "safe_set_local_optimizer_state")
    _write_local(found, found.slot(optim_state_key), value, "safe_set_local_optimizer_state")


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """Set this rank's part of the gradient that the coming step takes, not scaled."""
    found = _fragment(param, "safe_set_local_grad")
    scale = found.engine.parts.precision.scaler.scale
    _write_local(found, _gradient(found), value * scale, "safe_set_local_grad")


def safe_update_full_grad_vectorized(
    params: Iterable[nn.Parameter], update_func: Callable[[Tensor, nn.Parameter], Tensor]
) -> None:
    """Replace the gradient of each parameter by ``update_func(full gradient, param)``. Collective."""
    for param in params:
        full = safe_get_full_grad(param)
        if full is not None:
            safe_set_full_grad(param, update_func(full, param))


def _fragment(param: nn.Parameter, call: str) -> _Fragment:
    found = _Fragment.of(param)
    if found is None:
        raise EngineError(
            "no engine trains this parameter", where=call, fix="pass a parameter that requires grad, after initialize"
        )
    return found


def _gradient(found: _Fragment) -> Any:
    part = found.engine.parts.partition.reduced_gradient(found.param)
    if part is None:
        raise EngineError(
            "this parameter has no reduced gradient now",
            where=f"parameter {found.piece.of.name!r}",
            fix="set it between the backward that ends a window and step()",
        )
    return part


def _write_local(found: _Fragment, part: Tensor, value: Tensor, call: str) -> None:
    if value.numel() != part.numel():
        raise _wrong_shape(call, value, [part.numel()], found.piece.of.name)
    with torch.no_grad():
        part.detach().view(-1).copy_(value.reshape(-1).to(part))
