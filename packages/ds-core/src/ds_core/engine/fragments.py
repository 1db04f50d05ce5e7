"""DeepSpeed's API of the tensors behind a parameter: fp32 weight, optimizer state, gradient (``safe_get_*``).

The same functions at every stage. Where ranks hold parts of a tensor the parts are put together, so every rank of the
data-parallel group calls, with the same parameter: all that get a full tensor, and the one that sets optimizer state,
are collective. A parameter that no engine trains (frozen, or not in the optimizer) has none of them: None.

Reference: spec/zero.md 7, sharp edges 12.2 and 12.7.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from ds_core.comm import values_of_ranks
from ds_core.errors import EngineError
from ds_core.optim.per_element import is_per_element, of_whole_parameters, shapes_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

    from ds_core.engine.engine import DeepSpeedEngine
    from ds_core.interfaces.logical import Chunk, Piece

__all__ = [
    "find_by_params",
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
]

_engines: weakref.WeakKeyDictionary[DeepSpeedEngine, None] = weakref.WeakKeyDictionary()
"""Oldest first. Not a mark on the parameters: pickle would store it with them."""


def find_by_params(engine: DeepSpeedEngine) -> None:
    """Let the functions of this module find ``engine`` by the parameters it trains; of several the newest counts."""
    _engines[engine] = None


class _Fragment:
    """What this rank updates of one parameter."""

    def __init__(self, engine: DeepSpeedEngine, param: nn.Parameter, piece: Piece) -> None:
        self.engine, self.param, self.piece = engine, param, piece
        self.partition = engine.parts.partition

    @classmethod
    def of(cls, param: nn.Parameter) -> _Fragment | None:
        """Return that of ``param``; None where no living engine trains it."""
        for engine in reversed(list(_engines)):
            if engine.is_destroyed or engine.parts.optimizer is None:
                continue
            piece = engine.parts.partition.piece_of(param)
            if piece is not None:
                return cls(engine, param, piece)
        return None

    @classmethod
    def required(cls, param: nn.Parameter, call: str) -> _Fragment:
        """Return that of ``param``, for ``call``.

        Raises:
            EngineError: no living engine trains it.
        """
        found = cls.of(param)
        if found is None:
            raise EngineError(
                "no engine trains this parameter, so there is nothing to set",
                where=call,
                fix="pass a parameter that requires grad and is in the optimizer, after initialize",
            )
        return found

    @property
    def name(self) -> str:
        return f"parameter {self.piece.of.name!r}"

    @property
    def master(self) -> Tensor:
        return self.piece.data.detach()

    @property
    def scale(self) -> float:
        """The loss scale that gradients carry."""
        return self.engine.parts.precision.scaler.scale

    # -- state of the optimizer -------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        optimizer = self.engine.basic_optimizer
        assert optimizer is not None
        found: dict[str, Any] = optimizer.state.get(self.piece.data, {})
        return found

    def slot(self, key: str) -> Tensor | None:
        """Return what the optimizer keeps under ``key`` here; None: nothing, or no number."""
        value = self._state().get(key)
        if isinstance(value, torch.Tensor):
            return value.detach()
        return torch.tensor(value) if isinstance(value, (bool, int, float)) else None

    def is_part(self, key: str, slot: Tensor) -> bool:
        """Return whether ``slot`` is of this rank's elements, as a moment is, and not of the parameter as a whole."""
        optimizer = self.engine.basic_optimizer
        assert optimizer is not None
        # What the other parameters have counts for one element alone, and looking at all of them takes its time.
        others = shapes_in(optimizer.state) if slot.numel() == 1 else ()
        return is_per_element(key, slot.shape, self.piece.data.shape, of_whole_parameters(others))

    def no_slot(self, key: str) -> EngineError:
        numbers = [name for name, value in self._state().items() if isinstance(value, (torch.Tensor, int, float))]
        return EngineError(
            f"the optimizer keeps no tensor {key!r} of this parameter, it has {', '.join(numbers) or 'none'}",
            where=self.name,
            fix="ask after a step in which the parameter had a gradient, for one of the optimizer's own names",
        )

    def slot_of_ranks(self, key: str) -> Tensor | None:
        """Return the value of ``key`` if it is of the parameter as a whole; None: ranks have parts of it. Collective.

        Raises:
            EngineError: on every rank: a rank that should have it does not.
        """
        slot = self.slot(key)
        is_part = slot is not None and self.is_part(key, slot)
        kept = None if slot is None or is_part else (slot.tolist(), slot.dtype)
        told = [(self.piece.chunk.length > 0, is_part, kept)]
        if self.partition.divides:
            told = values_of_ranks(told[0], self.engine.parts.group)
        # A rank that owns nothing of a parameter may keep nothing of it; of one without elements nobody owns anything.
        owners = [(part, value) for owns, part, value in told if owns] or [
            (part, value) for _, part, value in told if part or value is not None
        ]
        if not owners or not all(part or value is not None for part, value in owners):
            raise self.no_slot(key)
        found = next((value for _, value in owners if value is not None), None)
        return None if found is None else torch.tensor(found[0], dtype=found[1])

    # -- putting together and taking apart --------------------------------------------------------------------------

    def full(self, part: Tensor) -> Tensor:
        """Return the tensor of the parameter's shape of which each rank has its part, in fp32. Collective."""
        full = torch.zeros(self.piece.of.shape, dtype=torch.float32, device=self.param.device)
        _interval(full, self.piece.chunk).copy_(part.detach().reshape(-1))
        if self.partition.divides and full.numel():
            # Added as whole numbers: of each element one rank has the bits, the others zeros.
            torch.distributed.all_reduce(full.view(torch.int32), group=self.engine.parts.group)
        return full

    def part_of(self, value: Any, call: str) -> Tensor:
        """Return this rank's elements of the full tensor ``value``, flat.

        Raises:
            EngineError: it has not the parameter's shape.
        """
        checked = self._checked(value, self.piece.of.shape, "the full tensor, of the parameter's shape", call)
        return _interval(checked.contiguous(), self.piece.chunk)

    def own(self, value: Any, call: str) -> Tensor:
        """Return ``value``, which is this rank's elements, flat.

        Raises:
            EngineError: they are not as many.
        """
        flat = value.reshape(-1) if isinstance(value, torch.Tensor) else value
        return self._checked(flat, (self.piece.chunk.length,), "as many elements as this rank has", call)

    def _checked(self, value: Any, shape: tuple[int, ...], wanted: str, call: str) -> Tensor:
        if isinstance(value, torch.Tensor) and tuple(value.shape) == shape:
            return value.detach()
        given = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise EngineError(
            f"the value is {given}, expected is a tensor of shape {list(shape)}",
            where=f"{call}, {self.name}",
            fix=f"pass {wanted}",
        )

    def gradient(self, call: str) -> Tensor:
        """Return this rank's part of the reduced gradient, in place.

        Raises:
            EngineError: there is none.
        """
        part = self.partition.reduced_gradient(self.param)
        if part is None:
            raise EngineError(
                "this parameter has no reduced gradient now",
                where=f"{call}, {self.name}",
                fix="set it between the backward that ends a window and step(), if any rank used the parameter",
            )
        return part


def _interval(full: Tensor, chunk: Chunk) -> Tensor:
    # Partitions that divide do so by intervals of the whole parameter.
    return full.view(-1)[chunk.offset : chunk.offset + chunk.length]


@torch.no_grad()
def _write(target: Tensor, values: Tensor) -> None:
    """Write a flat tensor into one of as many elements, whatever its shape and strides."""
    target.detach().copy_(values.view(target.shape))


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Return the weight with all digits it is trained in, ``param``'s shape, fp32, a copy. Collective."""
    found = _Fragment.of(param)
    return None if found is None else found.full(found.master)


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Return a state of the optimizer, such as ``exp_avg``, ``param``'s shape, fp32, a copy. Collective.

    State of another shape, such as a step count, is returned as it is.

    Raises:
        EngineError: on every rank: there is none of this name, or none before the first step.
    """
    found = _Fragment.of(param)
    if found is None:
        return None
    value = found.slot_of_ranks(optim_state_key)
    if value is not None:
        return value.to(param.device)
    slot = found.slot(optim_state_key)
    # A rank that owns nothing of the parameter may have no state of it.
    return found.full(slot if slot is not None and found.piece.chunk.length else found.master)


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """Return the gradient that the coming step takes, not scaled and not clipped, fp32, a copy. Collective.

    Between the backward that ends a window and ``step()``; None before, and where no rank used the parameter.
    """
    found = _Fragment.of(param)
    part = None if found is None else found.partition.reduced_gradient(param)
    return None if found is None or part is None else found.full(part).div_(found.scale)


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Set the weight: what is trained, and at once what the model computes with. All ranks pass the same value.

    Raises:
        EngineError: not of the parameter's shape, or no engine trains it.
    """
    call = "safe_set_full_fp32_param"
    found = _Fragment.required(param, call)
    part = found.part_of(value, call)
    _write(found.master, part)
    # By way of the master's dtype, so that the weight is the master, cast, to the bit.
    _write(param, value.detach().to(found.master.dtype).reshape(-1))


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set a state of the optimizer, of the shape that :func:`safe_get_full_optimizer_state` returns. Collective.

    All ranks pass the same value.

    Raises:
        EngineError: on every rank: there is no such state, or the value has another shape.
    """
    call = "safe_set_full_optimizer_state"
    found = _Fragment.required(param, call)
    whole = found.slot_of_ranks(optim_state_key)
    if whole is None:
        values = found.part_of(value, call)
    else:
        values = found._checked(value, tuple(whole.shape), "a value of the state's own shape", call).reshape(-1)
    _write_slot(found, optim_state_key, values)


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Set the gradient that the coming step takes, not scaled. All ranks pass the same value.

    Raises:
        EngineError: there is no gradient now, or the value has another shape than the parameter.
    """
    call = "safe_set_full_grad"
    found = _Fragment.required(param, call)
    _write(found.gradient(call), found.part_of(value, call) * found.scale)


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Return this rank's part of the weight, flat, fp32, a copy; empty where it has none."""
    found = _Fragment.of(param)
    return None if found is None else _flat_copy(found.master)


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Return what this rank has of a state of the optimizer, flat, fp32, a copy; empty where it has nothing.

    Raises:
        EngineError: a rank that owns a part of the parameter has none of this name.
    """
    found = _Fragment.of(param)
    if found is None:
        return None
    slot = found.slot(optim_state_key)
    if slot is None and found.piece.chunk.length:
        raise found.no_slot(optim_state_key)
    return _flat_copy(found.master if slot is None else slot)


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    """Return this rank's part of the gradient, as :func:`safe_get_full_grad`, flat."""
    found = _Fragment.of(param)
    part = None if found is None else found.partition.reduced_gradient(param)
    return None if found is None or part is None else _flat_copy(part).div_(found.scale)


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Set this rank's part of the weight.

    This rank's model computes with it at once. Where ranks hold parts, the others follow in the next step, or when
    every rank calls ``engine.optimizer.update_lp_params()``.

    Raises:
        EngineError: not as many elements as this rank has, or no engine trains the parameter.
    """
    call = "safe_set_local_fp32_param"
    found = _Fragment.required(param, call)
    values = found.own(value, call).to(found.master)
    _write(found.master, values)
    with torch.no_grad():
        if param.is_contiguous():
            _interval(param, found.piece.chunk).copy_(values)
        else:  # only where the rank has all of it: what is divided lies in flat memory
            _write(param, values)


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set what this rank has of a state of the optimizer.

    Raises:
        EngineError: there is no such state here, or it has another number of elements.
    """
    call = "safe_set_local_optimizer_state"
    found = _Fragment.required(param, call)
    slot = found.slot(optim_state_key)
    if slot is None:
        raise found.no_slot(optim_state_key)
    flat = value.reshape(-1) if isinstance(value, torch.Tensor) else value
    values = found._checked(flat, (slot.numel(),), "as many elements as this rank has", call)
    _write_slot(found, optim_state_key, values)


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """Set this rank's part of the gradient that the coming step takes, not scaled.

    Raises:
        EngineError: there is no gradient now, or it has another number of elements.
    """
    call = "safe_set_local_grad"
    found = _Fragment.required(param, call)
    _write(found.gradient(call), found.own(value, call) * found.scale)


def safe_update_full_grad_vectorized(
    params: Iterable[nn.Parameter], update_func: Callable[[Tensor, nn.Parameter], Tensor]
) -> None:
    """Replace the gradient of each parameter that has one by ``update_func(full gradient, param)``. Collective."""
    for param in params:
        full = safe_get_full_grad(param)
        if full is not None:
            safe_set_full_grad(param, update_func(full, param))


def _flat_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).to(torch.float32, copy=True)


def _write_slot(found: _Fragment, key: str, values: Tensor) -> None:
    state = found._state()
    if isinstance(state.get(key), torch.Tensor):
        _write(state[key], values)
    elif key in state:  # a plain number
        state[key] = type(state[key])(values.item())
