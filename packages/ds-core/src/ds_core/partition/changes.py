"""What a partition relies on once it is built: which parameters the model has, which of them train, where they are.

Looked at once per accumulation window, in a few microseconds per hundred parameters. What is found on one rank is told
to all by the collectives that come anyway, see ``GradientWindow.begin``: every rank raises, and none waits for another.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_core.errors import EngineError
from ds_core.interfaces.logical import logical_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

__all__ = ["Change", "ModelWatch", "changed_elsewhere"]

_ANEW = "do it before initialize, or call engine.destroy() and initialize again with the changed model"


@dataclass(frozen=True)
class Change:
    """What somebody did to the model of a living engine."""

    what: str
    name: str
    param: nn.Parameter
    fix: str = _ANEW

    def error(self) -> EngineError:
        """Return it as an error."""
        return EngineError(self.what, where=f"parameter {self.name!r}", fix=self.fix)


def changed_elsewhere(name: str) -> EngineError:
    """Return the error of a rank that did not change the model, but hears that another one did.

    Args:
        name: of the parameter that was changed, or of any, where it was no parameter that is trained.
    """
    return EngineError(
        "another rank changed its model after initialize, so the gradients of this window are of different models",
        where=f"that rank's error says what; it was noticed at parameter {name!r}",
        fix="do on every rank the same",
    )


class ModelWatch:
    """Notices parameters that were frozen, unfrozen, added, or given other data."""

    def __init__(
        self, module: nn.Module, params: Sequence[nn.Parameter], names: Mapping[nn.Parameter, str], *, keeps_data: bool
    ) -> None:
        """Take the model as it is now for what it should be.

        Args:
            module: the model.
            params: those that are trained.
            names: of every parameter of the model.
            keeps_data: trained parameters must stay where they are in memory; else they may move, in their dtype.
        """
        self._module, self._names, self._keeps_data = module, names, keeps_data
        # What has no elements cannot be trained or not; what trains outside the groups is its owner's business.
        self._trained = [param for param in params if param.numel()]
        known = set(params)
        self._frozen = [param for param in names if param not in known and not param.requires_grad]
        self._kinds = [(param.dtype, param.device, param.shape) for param in self._trained]
        self._note()

    def _note(self) -> None:
        self._places = [param.data_ptr() for param in self._trained]
        # Their dictionaries, not what named_parameters() yields: a walk through the modules takes ten times as long.
        self._dicts = [d for each in self._module.modules() for d in (each._parameters, each._modules)]
        self._held = self._holds()

    def _holds(self) -> list[object]:
        return [held for each in self._dicts for held in each.values()]

    def change(self) -> Change | None:
        """Return the first change that breaks what the partition relies on."""
        return self._frozen_now() or self._trains_now() or self._moved() or self._added()

    def _frozen_now(self) -> Change | None:
        for param in self._trained:
            if not param.requires_grad:
                return Change("a parameter that is trained was frozen after initialize", self._names[param], param)
        return None

    def _trains_now(self) -> Change | None:
        for param in self._frozen:
            if param.requires_grad:
                return Change(
                    "a frozen parameter requires grad since initialize: no optimizer would update it",
                    self._names[param],
                    param,
                )
        return None

    def _moved(self) -> Change | None:
        places = [param.data_ptr() for param in self._trained]
        if places == self._places:
            return None
        for param, now, before, kind in zip(self._trained, places, self._places, self._kinds, strict=True):
            if (self._keeps_data and now != before) or (param.dtype, param.device, param.shape) != kind:
                kinds = (kind, (param.dtype, param.device, param.shape))
                was, found = (f"{list(shape)} {dtype} on {device}" for dtype, device, shape in kinds)
                said = f", {found} instead of {was}" if found != was else ""
                return Change(
                    f"a parameter was given other memory after initialize{said}: the engine does not see it",
                    self._names[param],
                    param,
                    "write into it in place, param.copy_(...) under torch.no_grad(); move or cast the model "
                    "(param.data = ..., module.to(...)) before initialize",
                )
        self._places = places
        return None

    def _added(self) -> Change | None:
        held = self._holds()
        if len(held) == len(self._held) and all(map(operator.is_, held, self._held)):
            return None
        for name, param in self._module.named_parameters():
            if param not in self._names and param.requires_grad and param.numel():
                return Change(
                    "a parameter was added to the model after initialize: no optimizer would update it",
                    logical_name(name),
                    param,
                )
        self._note()
        return None
