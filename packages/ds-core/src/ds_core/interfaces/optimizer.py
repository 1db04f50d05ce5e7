"""Seam ``optimizer``: a name in ``optimizer.type`` -> something that builds a torch optimizer.

The entry is usually an optimizer class. Contract: ``ds_core.testing.optimizer``. Names are matched in lower case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["ELEMENTWISE", "OptimizerFactory", "ScaledStep"]

ELEMENTWISE = "elementwise"
"""Optional, an attribute of the class or of the function that builds it: whether each element is updated from its own
gradient and state alone, such as by Adam.

True: a partition may give it any interval of a parameter, flat. The contract checks that this changes nothing.
False, or no such attribute: it gets whole parameters in their shape, each on one rank, as those need that look at a
matrix (Muon), at rows and columns (Adafactor) or at a norm per parameter (LAMB). One that looks at several parameters
at once, such as at a norm over all, cannot be divided: it runs where every rank updates everything (stage 0).
"""


class OptimizerFactory(Protocol):
    """Builds an optimizer over plain local tensors."""

    def __call__(self, param_groups: list[dict[str, Any]], /, **params: Any) -> Optimizer:
        """Return the optimizer; ``params`` are the keys of ``optimizer.params``, passed on as they are.

        Raises:
            TypeError: for a key it does not know. The engine turns it into an error naming the key.
        """


@runtime_checkable
class ScaledStep(Protocol):
    """Optional: an optimizer that multiplies its gradients by a factor in the same pass as the update."""

    def step_scaled(self, factor: float) -> None:
        """Update as ``step()`` would on gradients multiplied by ``factor``; what it leaves in ``.grad`` is its own."""
