"""Which modules of a model are its blocks: by patterns, or the repeated ones."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from ds_core.errors import ConfigError, few, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["find_blocks"]

_WHERE = "activation_checkpointing.modules"
_LISTS = (nn.ModuleList, nn.ModuleDict)


def find_blocks(module: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return blocks with their names, in the order of the model; none is inside another.

    Args:
        module: the model.
        patterns: of qualified names (``"transformer.h.*"``) or class names (``"GPT2Block"``). A list of modules, which
            has no forward, stands for what is in it. Empty: of the ``nn.ModuleList`` or ``nn.Sequential`` with the most
            parameters those children whose class comes more than once; of an ``nn.Sequential`` those of one class.

    Raises:
        ConfigError: a pattern matches nothing, or no blocks repeat.
    """
    return _matching(module, patterns) if patterns else _repeated(module)


def _matching(module: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    # A shared module has several names; it goes by the first, and is found by any.
    named = list(module.named_modules(remove_duplicate=False))
    chosen: dict[int, nn.Module] = {}
    for pattern in patterns:
        found = [m for name, m in named if fnmatchcase(name, pattern) or fnmatchcase(type(m).__name__, pattern)]
        if not found:
            raise _unknown(pattern, named)
        chosen.update((id(one), one) for outer in found for one in _with_forward(outer))
    inside = {id(inner) for outer in chosen.values() for inner in outer.modules() if inner is not outer}
    return [(name, m) for name, m in module.named_modules() if id(m) in chosen and id(m) not in inside]


def _with_forward(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, _LISTS):
        for child in module.children():
            yield from _with_forward(child)
    else:
        yield module


def _unknown(pattern: str, named: Sequence[tuple[str, nn.Module]]) -> ConfigError:
    classes = list(dict.fromkeys(type(m).__name__ for _, m in named))
    close = nearest(pattern, [*classes, *(name for name, _ in named)])
    if close is None:
        repeated = [name for name, count in Counter(type(m).__name__ for _, m in named).most_common() if count > 1]
        fix = f"give names such as {few([name for name, _ in named if name], 3)}, or classes such as {few(repeated, 3)}"
    else:
        fix = f"did you mean {close!r}?"
    return ConfigError(f"{pattern!r} matches no name and no class of the model's modules", where=_WHERE, fix=fix)


def _repeated(module: nn.Module) -> list[tuple[str, nn.Module]]:
    best: list[tuple[str, nn.Module]] = []
    most = 0
    for name, holder in module.named_modules():
        if not isinstance(holder, (nn.ModuleList, nn.Sequential)):
            continue
        children = [(key, child) for key, child in holder.named_children() if _numel(child)]
        times = Counter(type(child) for _, child in children)
        repeated = [(key, child) for key, child in children if times[type(child)] > 1]
        if repeated and isinstance(holder, nn.Sequential):
            # It may have the first and the last layer of a model too, which are of one class as well.
            kind = max(times, key=lambda kind: sum(_numel(child) for _, child in repeated if type(child) is kind))
            repeated = [(key, child) for key, child in repeated if type(child) is kind]
        numel = _numel(holder)
        if repeated and numel > most:
            best, most = [(f"{name}.{key}" if name else key, child) for key, child in repeated], numel
    if not best:
        raise ConfigError(
            f"{type(module).__name__} has no nn.ModuleList or nn.Sequential of repeated blocks",
            where="activation_checkpointing.policy",
            fix='say which modules: "modules": ["name.*", "ClassName"]',
        )
    return best


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
