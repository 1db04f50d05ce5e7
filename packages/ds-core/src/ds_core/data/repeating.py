"""A loader without end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["RepeatingLoader"]


class RepeatingLoader:
    """Start ``loader`` again whenever it ends. A loader that is empty ends this one too.

    ``state_dict`` and ``load_state_dict`` are there if ``loader`` has them, and are its own.

    >>> repeating = RepeatingLoader([1, 2])
    >>> [next(repeating) for _ in range(5)]
    [1, 2, 1, 2, 1]
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        # Begun by the first next(): a pass begun here would not see a position loaded in between.
        self.data_iter: Iterator[Any] | None = None

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        if self.data_iter is None:
            self.data_iter = iter(self.loader)
        try:
            return next(self.data_iter)
        except StopIteration:
            self.data_iter = iter(self.loader)
            return next(self.data_iter)

    def __getattr__(self, name: str) -> Any:
        # Only where the loader has it: callers ask with hasattr whether there is a position to save.
        if name == "state_dict":
            return self.loader.state_dict  # type: ignore[attr-defined]
        if name == "load_state_dict":
            load = self.loader.load_state_dict  # type: ignore[attr-defined]
            return lambda state: self._load(load, state)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _load(self, load: Any, state: Any) -> None:
        load(state)
        self.data_iter = None
