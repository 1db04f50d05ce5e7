"""What the model stores and what the optimizer updates: casting parameters, and masters of those that were cast."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from ds_core.interfaces.precision import ParameterDtypes, PrecisionPlan

__all__ = ["Masters", "cast_stored"]


class Masters:
    """The optimizer's own copies of trained parameters, where the plan asks for them.

    A parameter that has the master's dtype before it is cast gives its storage to the master: the same bits, no copy.
    So a ``Masters`` is made before :func:`cast_stored`.

    Low precision alone loses updates: a weight near 1 ignores steps below 2**-9 in bf16 and 2**-11 in fp16
    (Micikevicius et al., arXiv:1710.03740, section 3.1).
    """

    def __init__(self, params: Sequence[nn.Parameter], dtypes: Mapping[nn.Parameter, ParameterDtypes]) -> None:
        """``params``: those the optimizer updates."""
        self._of: dict[nn.Parameter, Tensor] = {}
        for param in params:
            dtype = dtypes[param].master
            if dtype is not None:
                self._of[param] = param.data if param.dtype == dtype else param.data.to(dtype)

    def __len__(self) -> int:
        return len(self._of)

    def of(self, param: nn.Parameter) -> Tensor:
        """Return what the optimizer updates for ``param``: its master, or the parameter itself."""
        return self._of.get(param, param)

    def items(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the parameters that have a master, each with it."""
        return list(self._of.items())

    def take_gradients(self) -> None:
        """Give each master its parameter's gradient: the same tensor where the dtypes agree, else a copy in its own."""
        copies: list[Tensor] = []
        sources: list[Tensor] = []
        for param, master in self._of.items():
            gradient = param.grad
            if gradient is not None and gradient.dtype != master.dtype:
                sources.append(gradient)
                gradient = torch.empty_like(gradient, dtype=master.dtype)
                copies.append(gradient)
            master.grad = gradient
        if copies:
            torch._foreach_copy_(copies, sources)

    def drop_gradients(self) -> None:
        """Let the gradients go."""
        for master in self._of.values():
            master.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Cast every master into its parameter."""
        if self._of:
            torch._foreach_copy_(list(self._of), list(self._of.values()))

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy every parameter that is not its master, cast, into its master.

        One that is was not written to, and the master keeps the digits that the parameter does not have.
        """
        for param, master in self._of.items():
            if not torch.equal(param, master.to(param.dtype)):
                master.copy_(param)


@torch.no_grad()
def cast_stored(module: nn.Module, dtypes: Mapping[nn.Parameter, ParameterDtypes], plan: PrecisionPlan) -> None:
    """Cast parameters of ``module``, frozen ones too, to what the plan stores; its buffers only where the plan says so.

    In place: every parameter stays the object it is, whoever holds it.
    """
    for param, of_param in dtypes.items():
        if param.dtype != of_param.stored:
            param.data = param.data.to(of_param.stored)
    if plan.buffer is None:
        return
    # A buffer that several modules share stays one.
    cast: dict[Tensor, Tensor] = {}
    for submodule in module.modules():
        for name, buffer in submodule.named_buffers(recurse=False, remove_duplicate=False):
            if buffer.is_floating_point() and buffer.dtype != plan.buffer:
                if buffer not in cast:
                    cast[buffer] = buffer.to(plan.buffer)
                setattr(submodule, name, cast[buffer])
