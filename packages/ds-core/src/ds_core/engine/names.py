"""Names of a model's tensors: which share one, and which are not trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_core.interfaces.logical import logical_name

if TYPE_CHECKING:
    from torch import nn

__all__ = ["frozen_names", "shared_names"]


def shared_names(module: nn.Module) -> dict[str, str]:
    """Return alias -> the first name of the same parameter, or of the same persistent buffer.

    >>> import torch
    >>> model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    >>> model["head"].weight = model["embed"].weight
    >>> shared_names(model)
    {'head.weight': 'embed.weight'}
    """
    transient = {
        logical_name(f"{prefix}.{name}" if prefix else name)
        for prefix, submodule in module.named_modules(remove_duplicate=False)
        for name in submodule._non_persistent_buffers_set
    }
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for tensors in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for given, tensor in tensors:
            name = logical_name(given)
            if name not in transient and first.setdefault(id(tensor), name) != name:
                found[name] = first[id(tensor)]
    return found


def frozen_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that are not trained."""
    return [logical_name(name) for name, param in module.named_parameters() if not param.requires_grad]
