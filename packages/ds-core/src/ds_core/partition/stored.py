"""What the model stores and what the optimizer updates: casting parameters, masters of those that were cast, pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ds_core.interfaces.logical import BUFFER, MASTER, WEIGHT, Chunk, LogicalTensor, Piece, logical_name
from ds_core.partition.arithmetic import assign_writers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from ds_core.interfaces.precision import ParameterDtypes, PrecisionPlan

__all__ = ["Masters", "cast_stored", "follow_weight", "stored_pieces", "trainable_but_not_optimized"]


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
                # Optimizers look at requires_grad, and at marks that their users put on parameters.
                self._of[param] = master = (
                    param.data if param.dtype == dtype else param.data.to(dtype)
                ).requires_grad_()
                vars(master).update(vars(param))
        self._versions: list[int] = []
        """torch's count of writes to each parameter, as of our own last one."""

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

    def note_versions(self) -> None:
        """Take the parameters as they are now for their masters, cast: later writes to them are somebody else's."""
        self._versions = [param._version for param in self._of]

    def follow_writes(self) -> None:
        """Begin anew from parameters that somebody else wrote to in place since the last :meth:`publish`.

        As in plain PyTorch: weights that are clamped, loaded or averaged stay so. A write through ``param.data`` does
        not count in torch's versions; :meth:`refresh` is for that.
        """
        if [param._version for param in self._of] == self._versions:
            return
        pairs = zip(self._of.items(), self._versions, strict=True)
        self._refresh([(param, master) for (param, master), version in pairs if param._version != version])
        self.note_versions()

    @torch.no_grad()
    def publish(self) -> None:
        """Cast every master into its parameter."""
        if self._of:
            torch._foreach_copy_(list(self._of), list(self._of.values()))
            self.note_versions()

    def refresh(self) -> None:
        """Let every master follow its parameter, see :func:`follow_weight`."""
        self._refresh(self.items())
        self.note_versions()

    def _refresh(self, pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        for param, master in pairs:
            follow_weight(master, param)


@torch.no_grad()
def follow_weight(master: Tensor, weight: Tensor) -> None:
    """Copy the elements of ``weight`` that are not those of ``master``, cast, into ``master``.

    The others were not written to, and keep the digits that the weight does not have. By element, so that it does not
    depend on how a parameter is divided, and NaN in one costs no other its digits.

    >>> master = torch.tensor([1.0001, 2.0001])
    >>> follow_weight(master, torch.tensor([1.0, float("nan")], dtype=torch.bfloat16))
    >>> master
    tensor([1.0001,    nan])
    """
    master.copy_(torch.where(weight == master.to(weight.dtype), master, weight))


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


def trainable_but_not_optimized(module: nn.Module, optimized: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters of ``module`` that autograd gives gradients that no optimizer takes."""
    known = set(optimized)
    return [param for param in module.parameters() if param.requires_grad and param not in known]


def stored_pieces(module: nn.Module, world_size: int, masters: Masters | None = None) -> Iterable[Piece]:
    """Yield weights, persistent buffers and ``masters``, which all ranks hold whole; shared ones once.

    Each has the rank that writes it, so that ranks write about equally much.
    """
    found: list[tuple[str, str, Tensor]] = []
    for name, param in module.named_parameters():
        found.append((logical_name(name), WEIGHT, param))
        if masters is not None and masters.of(param) is not param:
            found.append((logical_name(name), MASTER, masters.of(param)))
    transient = {
        logical_name(f"{prefix}.{name}" if prefix else name)
        for prefix, submodule in module.named_modules()
        for name in submodule._non_persistent_buffers_set
    }
    buffers = [(logical_name(name), BUFFER, buffer) for name, buffer in module.named_buffers()]
    found += [named for named in buffers if named[0] not in transient]
    writers = assign_writers([tensor.nbytes for _, _, tensor in found], world_size)
    for (name, kind, tensor), some_rank in zip(found, writers, strict=True):
        # Ranks may have different buffers (each its own batch statistics): those of one rank belong together.
        writer = 0 if kind == BUFFER else some_rank
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        yield Piece(LogicalTensor(name, kind, shape, dtype), Chunk.whole(shape), tensor, writer)
