"""Which modules of a model are its blocks: by patterns, or the repeated ones.

Note: what repeats. Blocks are found in lists: an ``nn.ModuleList``, or an ``nn.Sequential``, that has several modules
of one class. The outermost list counts: what a block has inside is part of it. Lists that a list holds (stages of
blocks, pairs of attention and feed-forward) are looked into. Of all the groups of one class, in all lists:

- single layers of torch, such as ``nn.Linear``, count only where nothing else repeats: computed again from its input,
  such a layer saves nothing;
- a group with fewer parameters than :data:`LEAST_SHARE` of those of the largest one does not count.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from ds_core.errors import ConfigError, few, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["LEAST_SHARE", "find_blocks", "places"]

LEAST_SHARE = 1e-3
"""Small, because parameters say little of activations: the first stage of a ResNet has 0.5 % of those of its largest
stage, and the largest activations."""
_WHERE = "activation_checkpointing.modules"


def find_blocks(module: nn.Module, patterns: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """Return blocks with their names, in the order of the model; none is inside another.

    Args:
        module: the model.
        patterns: of qualified names (``"transformer.h.*"``) or class names (``"GPT2Block"``). A list of modules, which
            has no forward, stands for what is in it. Empty: the repeated blocks of the model, as above.

    Raises:
        ConfigError: a pattern matches nothing, or no blocks repeat.
    """
    blocks = _matching(module, patterns) if patterns else _repeated(module)
    chosen = {id(block) for block in blocks}
    inside = {id(inner) for outer in blocks for inner in outer.modules() if inner is not outer}
    return [(name, m) for name, m in module.named_modules() if id(m) in chosen and id(m) not in inside]


def places(names: Iterable[str]) -> str:
    """Return where the blocks of these names are, for a message.

    >>> places(["encoder.h.0", "encoder.h.1", "decoder.h.0"])
    '2 in encoder.h, 1 in decoder.h'
    """
    counts = Counter(name.rpartition(".")[0] or "the model itself" for name in names)
    shown = [f"{count} in {holder}" for holder, count in counts.items()]
    return ", ".join(shown[:4]) + (f" and {sum(list(counts.values())[4:])} elsewhere" if len(shown) > 4 else "")


def _matching(module: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    # A shared module has several names; it is found by any.
    named = list(module.named_modules(remove_duplicate=False))
    chosen: list[nn.Module] = []
    for pattern in patterns:
        found = [m for name, m in named if fnmatchcase(name, pattern) or fnmatchcase(type(m).__name__, pattern)]
        if not found:
            raise _unknown(pattern, named)
        chosen += [one for outer in found for one in (_members(outer) if _is_holder(outer) else [outer])]
    return chosen


def _is_holder(module: nn.Module) -> bool:
    # Some models have a class of their own from these, with a forward.
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward


def _members(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the children of ``module``; in place of a list what is in it."""
    for child in module.children():
        if _is_holder(child):
            yield from _members(child)
        else:
            yield child


def _unknown(pattern: str, named: Sequence[tuple[str, nn.Module]]) -> ConfigError:
    classes = list(dict.fromkeys(type(m).__name__ for _, m in named))
    close = nearest(pattern, [*classes, *(name for name, _ in named)])
    if close is None:
        repeated = [name for name, count in Counter(type(m).__name__ for _, m in named).most_common() if count > 1]
        fix = f"give names such as {few([name for name, _ in named if name], 3)}, or classes such as {few(repeated, 3)}"
    else:
        fix = f"did you mean {close!r}?"
    return ConfigError(f"{pattern!r} matches no name and no class of the model's modules", where=_WHERE, fix=fix)


def _repeated(module: nn.Module) -> list[nn.Module]:
    groups = list(_groups(module, set()))
    groups = [group for group in groups if not _is_layer(group[0])] or groups
    if not groups:
        raise ConfigError(
            f"{type(module).__name__} has no nn.ModuleList or nn.Sequential of repeated blocks",
            where="activation_checkpointing.policy",
            fix='say which modules: "modules": ["name.*", "ClassName"]',
        )
    numels = [sum(map(_numel, group)) for group in groups]
    least = LEAST_SHARE * max(numels)
    return [block for group, numel in zip(groups, numels, strict=True) if numel >= least for block in group]


def _groups(module: nn.Module, seen: set[nn.Module]) -> Iterator[list[nn.Module]]:
    """Yield the groups of the outermost lists in ``module``; ``seen`` are the modules looked at before."""
    seen.add(module)
    chosen: set[nn.Module] = set()
    for group in _own_groups(module):
        chosen.update(group)
        yield group
    for inner in _members(module) if _is_list(module) else module.children():
        if inner not in chosen and inner not in seen:
            yield from _groups(inner, seen)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _own_groups(module: nn.Module) -> list[list[nn.Module]]:
    """Return the modules of each class that comes more than once in ``module``, if that is a list."""
    if not _is_list(module):
        return []
    groups: dict[type[nn.Module], list[nn.Module]] = {}
    for member in dict.fromkeys(_members(module)):  # one may come several times
        if _numel(member) and not _has_blocks(member):
            groups.setdefault(type(member), []).append(member)
    return [group for group in groups.values() if len(group) > 1]


def _has_blocks(module: nn.Module) -> bool:
    """Return whether ``module`` is no block but a list of them."""
    if type(module) is not nn.Sequential:  # one of another class is more than a list
        return False
    return any(not _is_layer(group[0]) for group in _own_groups(module)) or any(map(_has_blocks, _members(module)))


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
