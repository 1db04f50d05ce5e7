"""Which stored tensor fills which piece of a model, and in words what of both has no counterpart."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ds_core.errors import CheckpointError, few
from ds_core.interfaces.logical import BUFFER, MASTER, WEIGHT
from ds_core.log import log_dist

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from ds_core.interfaces.checkpoint import CheckpointReader
    from ds_core.interfaces.logical import LogicalTensor, Piece

__all__ = ["Matched", "check", "match", "tell"]


@dataclass(frozen=True)
class Matched:
    """A model beside a checkpoint; the same on every rank but for ``found``."""

    found: Sequence[Piece]
    """This rank's pieces, each of the stored tensor that fills it."""
    names: frozenset[str]
    """Weights and buffers that are loaded."""
    missing: Sequence[str]
    """Weights and buffers that only the model has."""
    extra: Sequence[str]
    """Weights and buffers that only the checkpoint has."""
    excluded: Sequence[str]
    """Weights that only the model has since they were left out when it was saved."""
    weights: frozenset[str]
    """The weights of the model."""


def match(wanted: Iterable[Piece], reader: CheckpointReader, *, masters: bool = True) -> Matched:
    """Look for a stored tensor for every piece.

    Args:
        wanted: the pieces of the model.
        reader: the checkpoint.
        masters: fill weights and masters from stored masters; if not, from stored weights, where both are there.

    Raises:
        CheckpointError: one has another shape.
    """
    stored = {(of.name, of.kind): of for of in reader.tensors()}
    wanted = list(wanted)
    found: list[Piece] = []
    missing: set[str] = set()
    for piece in wanted:
        of = _source(piece, stored, masters=masters)
        if of is None:
            missing.add(piece.of.name)
        elif of.shape != piece.of.shape:
            raise CheckpointError(
                f"{of.kind} {of.name!r} is {list(of.shape)} in the checkpoint and {list(piece.of.shape)} in the model",
                where="load_checkpoint",
                fix="load it into a model of the same sizes",
            )
        else:
            found.append(replace(piece, of=of))
    mine = {(piece.of.name, piece.of.kind) for piece in wanted}
    extra = {name for (name, kind) in stored if kind in (WEIGHT, BUFFER) and (name, kind) not in mine}
    excluded = missing.intersection(reader.state["excluded"])
    return Matched(
        found,
        frozenset(piece.of.name for piece in found),
        sorted(missing - excluded),
        sorted(extra),
        sorted(excluded),
        frozenset(name for name, kind in mine if kind == WEIGHT),
    )


def check(matched: Matched, *, strict: bool) -> None:
    """Refuse another model's checkpoint.

    Args:
        matched: what :func:`match` returned.
        strict: whether everything must have a counterpart; if not, one weight is enough.

    Raises:
        CheckpointError: the first names that differ, how many there are, and what makes them equal if a prefix does.
    """
    missing, extra = matched.missing, matched.extra
    if not missing and (not extra or not strict):
        return
    differing = f"only in the model {few(missing)}, only in the checkpoint {few(extra)}"
    if strict:
        raise CheckpointError(
            f"model and checkpoint differ: {differing}",
            where="load_checkpoint",
            fix=_prefixed(missing, extra) or "load it into the model that wrote it, or pass load_module_strict=False",
        )
    if matched.weights.intersection(missing) and not matched.weights.intersection(matched.names):
        raise CheckpointError(
            f"not one weight of the model is in the checkpoint: {differing}",
            where="load_checkpoint",
            fix=_prefixed(missing, extra) or "load it into the model that wrote it, or pass custom_load_fn",
        )


def tell(matched: Matched) -> None:
    """Warn of what keeps the values it had, or is not used; once, on rank 0."""
    if matched.excluded:
        log_dist(
            f"the checkpoint was saved without {len(matched.excluded)} frozen weights, which are left as they are: "
            f"{few(matched.excluded)}",
            level=logging.WARNING,
        )
    if matched.missing or matched.extra:
        log_dist(
            f"model and checkpoint differ: {len(matched.names)} tensors are loaded; {len(matched.missing)} are only in "
            f"the model and left as they are: {few(matched.missing)}; {len(matched.extra)} are only in the checkpoint: "
            f"{few(matched.extra)}",
            level=logging.WARNING,
        )


def _source(piece: Piece, stored: Mapping[tuple[str, str], LogicalTensor], *, masters: bool) -> LogicalTensor | None:
    """Return the stored tensor that fills ``piece``: a master, if there is one, is the weight before it was cast."""
    kinds: tuple[str, ...] = (piece.of.kind,)
    if piece.of.kind in (MASTER, WEIGHT):
        kinds = (MASTER, WEIGHT) if masters else (WEIGHT, MASTER)
    return next((stored[piece.of.name, kind] for kind in kinds if (piece.of.name, kind) in stored), None)


def _prefixed(missing: Sequence[str], extra: Sequence[str]) -> str | None:
    """Return what to do where most names are equal but for a prefix that one side has."""
    load = "pass custom_load_fn=lambda src, dst: dst.load_state_dict("
    prefix = _common_prefix(missing, extra)
    if prefix is not None:
        return f"the model's names begin with {prefix!r}: {load}{{{prefix!r} + name: src[name] for name in src}})"
    prefix = _common_prefix(extra, missing)
    if prefix is not None:
        return (
            f"the checkpoint's names begin with {prefix!r}: {load}"
            f"{{name.removeprefix({prefix!r}): src[name] for name in src}})"
        )
    return None


def _common_prefix(longer: Sequence[str], shorter: Collection[str]) -> str | None:
    """Return what most names of the smaller side lack to be among ``longer``.

    >>> _common_prefix(["net.a.weight", "net.a.bias", "head.bias"], ["a.weight", "a.bias"])
    'net.'
    """
    known = set(shorter)
    found = Counter(
        name[: at + 1] for name in longer for at, letter in enumerate(name) if letter == "." and name[at + 1 :] in known
    )
    if not found:
        return None
    prefix, times = found.most_common(1)[0]
    return prefix if 2 * times >= min(len(longer), len(known)) else None
