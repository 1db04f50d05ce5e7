"""Helpers for training in half precision by hand, under the names that NVIDIA's apex and Megatron-LM gave them.

An engine does all of this itself. These are for scripts with a loop of their own: half the network, keep fp32 masters,
copy gradients up before the optimizer's step and values down after it.

Example::

    model = network_to_half(model)
    model_params, master_params = prep_param_lists(model)
    optimizer = torch.optim.SGD(master_params, lr=0.1)
    (loss_fn(model(x)) * scale).backward()
    model_grads_to_master_grads(model_params, master_params)  # still scaled
    for master in master_params:
        master.grad.div_(scale)
    optimizer.step()
    master_params_to_model_params(model_params, master_params)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# For fp32 masters: over fp16 gradients torch takes the norm in fp16, which overflows at 65504.
from torch.nn.utils import clip_grad_norm_ as clip_grad_norm

from ds_core.errors import EngineError
from ds_fp16.loss_scaler import to_python_float

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "BN_convert_float",
    "clip_grad_norm",
    "convert_module",
    "convert_network",
    "master_params_to_model_params",
    "model_grads_to_master_grads",
    "network_to_half",
    "prep_param_lists",
    "to_python_float",
    "tofp16",
]

M = TypeVar("M", bound=nn.Module)


class tofp16(nn.Module):  # noqa: N801 - apex's name
    """Returns its input in fp16; one that is not floating point stays as it is."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` in fp16."""
        return input.half() if input.is_floating_point() else input


def network_to_half(network: nn.Module) -> nn.Sequential:
    """Return ``network`` in fp16, in place, behind a :class:`tofp16` that casts its one positional input.

    Affine batch norms keep their dtype, see :func:`convert_network`. Names in the state dict begin with ``1.``.
    """
    return nn.Sequential(tofp16(), convert_network(network, torch.float16))


def convert_network(network: M, dtype: torch.dtype) -> M:
    """Cast ``network`` to ``dtype`` in place, all but affine batch norms, and return it.

    Those are never cast, so fp32 statistics and weights keep their bits.
    """
    for module in network.modules():
        if not _is_affine_batch_norm(module):
            convert_module(module, dtype)
            if isinstance(module, nn.RNNBase):
                # Its weights are one chunk of memory on a GPU; after a cast they are not.
                module.flatten_parameters()
    return network


@torch.no_grad()
def convert_module(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters, their gradients and the buffers that ``module`` itself has to ``dtype``, in place.

    Floating-point ones only; submodules are not touched. Parameters stay the same objects.
    """
    for param in module.parameters(recurse=False):
        if param.is_floating_point():
            grad, param.grad = param.grad, None
            param.data = param.data.to(dtype)
            param.grad = None if grad is None else grad.to(dtype)
    for buffer in module.buffers(recurse=False):
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


def BN_convert_float(module: M) -> M:  # noqa: N802 - apex's name
    """Cast the affine batch norms in ``module`` to fp32 in place, and return it.

    For a network that was cast as a whole by ``.half()``; the digits lost there stay lost.
    """
    for submodule in module.modules():
        if _is_affine_batch_norm(submodule):
            convert_module(submodule, torch.float32)
    return module


def _is_affine_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and bool(module.affine)


def prep_param_lists(model: nn.Module, flat_master: bool = False) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of ``model`` that require grad, and fp32 masters with copies of their values.

    Args:
        model: its parameters are not changed.
        flat_master: one 1-d master for all of them, in their order, with a gradient of zeros; else one for each, of
            its shape.

    Raises:
        EngineError: ``flat_master``, and the parameters differ in dtype or device; or one is complex.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    for name, param in model.named_parameters():
        if param.requires_grad and not param.is_floating_point():
            raise EngineError(
                f"the dtype is {param.dtype}, which has no fp32 master",
                where=f"prep_param_lists, parameter {name!r}",
                fix="keep it out with requires_grad_(False), or use real parameters",
            )
    if not flat_master:
        return params, [nn.Parameter(_copy(param)) for param in params]
    kinds = {(param.dtype, param.device): name for name, param in model.named_parameters() if param.requires_grad}
    if len(kinds) > 1:
        raise EngineError(
            "flat_master needs parameters of one dtype on one device, these are "
            + ", ".join(f"{dtype} on {device} ({name!r})" for (dtype, device), name in kinds.items()),
            where="prep_param_lists(flat_master=True)",
            fix="cast the whole model to one dtype, or use flat_master=False",
        )
    flat = torch.cat([_copy(param).reshape(-1) for param in params]) if params else torch.empty(0)
    master = nn.Parameter(flat)
    master.grad = torch.zeros_like(flat)
    return params, [master]


def _copy(param: Tensor) -> Tensor:
    # copy=True: a parameter that is fp32 already would be its own master.
    return param.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


@torch.no_grad()
def model_grads_to_master_grads(
    model_params: Sequence[Tensor], master_params: Sequence[Tensor], flat_master: bool = False
) -> None:
    """Copy the gradients of ``model_params`` to ``master_params``, in the masters' dtype.

    Args:
        model_params, master_params: as :func:`prep_param_lists` returned them.
        flat_master: as it was told there. Every parameter must have a gradient then; else a parameter without one
            takes its master's away.

    Raises:
        EngineError: the two lists do not belong together, or ``flat_master`` and a gradient is missing.
    """
    if flat_master:
        master = _flat(model_params, master_params, "model_grads_to_master_grads")
        for index, param in enumerate(model_params):
            if param.grad is None:
                raise EngineError(
                    "a flat master needs a gradient of every parameter, this one has none",
                    where=f"model_grads_to_master_grads, model_params[{index}] of shape {tuple(param.shape)}",
                    fix="freeze what the loss does not use before prep_param_lists, or use flat_master=False",
                )
        if master.grad is None:
            master.grad = torch.empty_like(master)
        for part, param in zip(_parts(master.grad, model_params), model_params, strict=True):
            assert param.grad is not None
            part.copy_(param.grad)
        return
    for param, master in _pairs(model_params, master_params, "model_grads_to_master_grads"):
        if param.grad is None:
            master.grad = None
            continue
        if master.grad is None:
            master.grad = torch.empty_like(master)
        master.grad.copy_(param.grad)


@torch.no_grad()
def master_params_to_model_params(
    model_params: Sequence[Tensor], master_params: Sequence[Tensor], flat_master: bool = False
) -> None:
    """Copy the values of ``master_params`` to ``model_params``, in the model's dtype.

    Args:
        model_params, master_params: as :func:`prep_param_lists` returned them.
        flat_master: as it was told there.

    Raises:
        EngineError: the two lists do not belong together.
    """
    if flat_master:
        master = _flat(model_params, master_params, "master_params_to_model_params")
        for part, param in zip(_parts(master, model_params), model_params, strict=True):
            param.copy_(part)
        return
    for param, master in _pairs(model_params, master_params, "master_params_to_model_params"):
        param.copy_(master)


def _pairs(params: Sequence[Tensor], masters: Sequence[Tensor], where: str) -> list[tuple[Tensor, Tensor]]:
    if [param.shape for param in params] != [master.shape for master in masters]:
        raise EngineError(
            f"{len(params)} model parameters and {len(masters)} masters do not have the same shapes",
            where=where,
            fix="pass both lists as prep_param_lists returned them, and flat_master=True if it was told so",
        )
    return list(zip(params, masters, strict=True))


def _flat(params: Sequence[Tensor], masters: Sequence[Tensor], where: str) -> Tensor:
    numel = sum(param.numel() for param in params)
    if len(masters) != 1 or masters[0].shape != (numel,):
        raise EngineError(
            f"expected is one flat master of {numel} elements, given are {[tuple(master.shape) for master in masters]}",
            where=f"{where}(flat_master=True)",
            fix="pass both lists as prep_param_lists(model, flat_master=True) returned them",
        )
    return masters[0]


def _parts(flat: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Return views of ``flat`` with the shapes of ``params``."""
    parts = flat.split([param.numel() for param in params])
    return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]
