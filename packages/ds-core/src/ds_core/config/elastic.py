"""Elastic batch arithmetic: one batch size that divides evenly among many numbers of ranks. Pure; loads no torch.

Two numbers are kept apart here. *GPUs* is every GPU of the job; *data-parallel ranks* is the number of replicas of the
model, ``GPUs / model_parallel_size``. Batches divide among the second; the keys of the section count the first.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ds_core.config.problems import Problem, validate
from ds_core.config.section import show
from ds_core.config.sections.elasticity import ElasticitySection
from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "ElasticPlan",
    "ElasticityConfigError",
    "ElasticityError",
    "ElasticityIncompatibleWorldSize",
    "check_elasticity",
    "check_scheduler",
    "elastic_sizes",
]

SCHEDULER = "DEEPSPEED_ELASTICITY_CONFIG"

HIGHLY_COMPOSITE = (
    *(1, 2, 4, 6, 12, 24, 36, 48, 60, 120, 180, 240, 360, 720, 840, 1260, 1680, 2520, 5040, 7560, 10080, 15120, 20160),
    *(25200, 27720, 45360, 50400, 55440, 83160, 110880, 166320, 221760, 277200, 332640, 498960, 554400, 665280, 720720),
)
"""Numbers with more divisors than any smaller one: a multiple of such a number divides among many ranks."""


class ElasticityError(ConfigError):
    """The elastic batch size cannot be computed."""


class ElasticityConfigError(ElasticityError):
    """The section ``elasticity`` is missing, off, or contradicts itself."""


class ElasticityIncompatibleWorldSize(ElasticityError):  # noqa: N818 - DeepSpeed's name
    """No elastic batch size divides among the ranks that there are."""


@dataclass(frozen=True)
class ElasticPlan:
    """What the section ``elasticity`` comes to for one job."""

    train: int
    """Samples of one optimizer step, over all ranks."""
    micro: int | None
    """Samples of one forward on one rank; None where the number of ranks is not known."""
    accumulation: int | None
    """Forwards per optimizer step; None where the number of ranks is not known."""
    valid_dp_sizes: tuple[int, ...]
    """Numbers of data-parallel ranks, ascending, among which ``train`` divides."""
    is_shared: bool = True
    """False where ``train`` was found for this number of ranks alone (version 0.2): another job has another batch."""


def elastic_sizes(section: ElasticitySection, dp_world_size: int | None) -> ElasticPlan:
    """Return the batch sizes that ``section`` chooses.

    Args:
        section: the section, enabled.
        dp_world_size: data-parallel ranks, not GPUs; they differ by ``model_parallel_size``. None chooses the batch
            and the valid numbers of ranks only.

    Raises:
        ElasticityConfigError: keys contradict each other, or no number of GPUs in the range fits any batch.
        ElasticityIncompatibleWorldSize: the batch does not divide among ``dp_world_size`` ranks.

    >>> section = ElasticitySection(enabled=True, max_train_batch_size=100, micro_batch_sizes=(4, 6))
    >>> plan = elastic_sizes(section, 8)
    >>> plan.train, plan.micro, plan.accumulation, plan.valid_dp_sizes
    (96, 6, 2, (1, 2, 3, 4, 6, 8, 12, 16, 24))
    """
    for problem in _contradictions(section):
        raise ElasticityConfigError(f"{problem.path}: {problem.text}", fix=problem.fix)
    try:
        return _plan(section, dp_world_size)
    except _Misfit as misfit:
        repairs = [_repair(section, dp_world_size, change) for change in misfit.changes]
        words = [_in_words(repair, section) for repair in repairs if repair]
        raise misfit.error(f"{misfit.path}: {misfit.what}", fix=", or ".join(words) or None) from None


def check_elasticity(section: ElasticitySection) -> list[Problem]:
    """Return where keys of ``section`` contradict each other, whatever the number of ranks; none while it is off."""
    return list(_contradictions(section)) if section.enabled else []


def _contradictions(section: ElasticitySection) -> Iterator[Problem]:
    least, most = section.min_gpus, section.max_gpus
    parallel, node = section.model_parallel_size, section.num_gpus_per_node
    if least > most:
        yield Problem(
            ("elasticity", "min_gpus"),
            f"got {least}, more than max_gpus, {most}",
            f"set elasticity.min_gpus to {most}, or set elasticity.max_gpus to {least}",
        )
    if parallel > 1 and section.version != 0.2:
        newer = "set elasticity.version to 0.2, or " if node % parallel == 0 else ""
        yield Problem(
            ("elasticity", "model_parallel_size"),
            f"got {parallel}, more than 1 needs version 0.2, and version is {section.version}",
            f"{newer}set elasticity.model_parallel_size to 1",
        )
    elif node % parallel:
        below = next(size for size in range(min(parallel, node), 0, -1) if node % size == 0)
        yield Problem(
            ("elasticity", "num_gpus_per_node"),
            f"got {node}, not a multiple of model_parallel_size, {parallel}",
            f"set elasticity.num_gpus_per_node to {-(-node // parallel) * parallel},"
            f" or set elasticity.model_parallel_size to {below}",
        )


def check_scheduler(section: ElasticitySection, environ: Mapping[str, str]) -> list[Problem]:
    """Return where ``section`` differs from what a scheduler set in ``DEEPSPEED_ELASTICITY_CONFIG``.

    The scheduler picks the numbers of GPUs from its own copy of the section (JSON), so ``max_train_batch_size``,
    ``micro_batch_sizes`` and ``version`` must be the same there. Nothing is said where the variable is absent:
    DeepSpeed warns then, but a job started by hand has no scheduler to disagree with.
    """
    text = environ.get(SCHEDULER)
    if text is None:
        return []
    try:
        theirs = json.loads(text)
    except (ValueError, RecursionError):  # the second where it is nested thousands deep
        return [Problem((SCHEDULER,), f"got {show(text)}, which is not JSON", "correct it, or unset it")]
    if not isinstance(theirs, dict):
        return [Problem((SCHEDULER,), f"got {show(theirs)}, must be an object {{ ... }}", "correct it, or unset it")]
    shared = ("max_train_batch_size", "micro_batch_sizes", "version")
    seen, problems = validate(
        ElasticitySection, {key: theirs[key] for key in shared if key in theirs}, path=(SCHEDULER,)
    )
    if seen is None:
        return problems
    return [
        Problem(
            ("elasticity", key),
            f"got {show(getattr(section, key))}, and {SCHEDULER} says {show(getattr(seen, key))}",
            f"set elasticity.{key} to what the scheduler says, or unset {SCHEDULER}",
        )
        for key in shared
        if key in theirs and getattr(seen, key) != getattr(section, key)
    ]


class _Misfit(Exception):  # noqa: N818 - never leaves this module
    """Nothing fits; each of ``changes``, new values of keys or of ``ranks``, might help."""

    def __init__(self, error: type[ElasticityError], path: str, what: str, *changes: dict[str, Any]) -> None:
        super().__init__(what)
        self.error, self.path, self.what, self.changes = error, path, what, changes


def _repair(section: ElasticitySection, ranks: int | None, change: dict[str, Any]) -> dict[str, Any] | None:
    """Return ``change``, with what else must change then, so that a plan exists; None where no way is found."""
    keys = {key: value for key, value in change.items() if key != "ranks"}
    try:
        changed = ElasticitySection.model_validate({**section.model_dump(), **keys})
    except ValueError:  # a value that leaves its key's bounds
        return None
    if any(_contradictions(changed)):
        return None
    try:
        _plan(changed, change.get("ranks", ranks))
    except _Misfit as misfit:
        further = ({**change, **one} for one in misfit.changes if one.keys().isdisjoint(change))
        return next(filter(None, (_repair(section, ranks, both) for both in further)), None)
    return change


def _in_words(change: dict[str, Any], section: ElasticitySection) -> str:
    words = [f"set elasticity.{key} to {json.dumps(value)}" for key, value in change.items() if key != "ranks"]
    if "ranks" in change:
        gpus = f" ({change['ranks'] * section.model_parallel_size} GPUs)" if section.model_parallel_size > 1 else ""
        plural = "s" if change["ranks"] > 1 else ""
        words.append(f"run on {change['ranks']} data-parallel rank{plural}{gpus}")
    return " and ".join(words)


def _plan(section: ElasticitySection, ranks: int | None) -> ElasticPlan:
    """Return the plan of a section without contradictions.

    Version 0.2 is version 0.1 with a node in the place of a GPU: all batches are those of one replica per node, and
    batch and counts are multiplied by the replicas of a node in the end.
    """
    by_node = section.version == 0.2
    per_node = section.num_gpus_per_node // section.model_parallel_size if by_node else 1
    gpus = section.num_gpus_per_node if by_node else 1
    batch, counts = _shared_batch(section, per_node, gpus)
    train, valid = batch * per_node, tuple(count * per_node for count in counts)
    if ranks is None:
        return ElasticPlan(train, None, None, valid)
    if ranks < 1 or ranks % per_node:
        below = ranks - ranks % per_node
        near = dict.fromkeys((below, below + per_node, min(valid, key=lambda size: abs(size - ranks))))
        raise _Misfit(
            ElasticityIncompatibleWorldSize,
            "elasticity",
            f"{ranks} data-parallel ranks are not whole nodes of {per_node}"
            f" (num_gpus_per_node / model_parallel_size = {gpus} / {section.model_parallel_size})",
            *({"ranks": size} for size in near if size >= 1),
        )
    is_shared = ranks in valid
    if not is_shared and not by_node:
        around = [*[size for size in valid if size < ranks][-1:], *[size for size in valid if size > ranks][:1]]
        raise _Misfit(
            ElasticityIncompatibleWorldSize,
            "elasticity",
            f"{ranks} data-parallel ranks cannot share the elastic batch of {train}; valid are {_listed(valid)}",
            *({"ranks": size} for size in around),
        )
    if not is_shared:
        train, valid = _batch_of_one(section, ranks, per_node), (ranks,)
    # Version 0.2 documents "the first listed" for jobs that prefer small batches, 0.1 always takes the largest.
    fitting = [size for size in section.micro_batch_sizes if train // ranks % size == 0]
    micro = max(fitting) if section.prefer_larger_batch or not by_node else fitting[0]
    return ElasticPlan(train, micro, train // (micro * ranks), valid, is_shared)


def _shared_batch(section: ElasticitySection, per_node: int, gpus: int) -> tuple[int, list[int]]:
    """Return the batch of one replica per node that fits most numbers of nodes, and these numbers."""
    most = section.max_train_batch_size // per_node
    largest = max(section.micro_batch_sizes)
    if largest > most:
        samples = (
            f"{largest} x {per_node} data-parallel ranks of a node = {largest * per_node}" if per_node > 1 else largest
        )
        raise _Misfit(
            ElasticityConfigError,
            "elasticity.micro_batch_sizes",
            f"{samples} samples are more than max_train_batch_size, {section.max_train_batch_size}",
            {"max_train_batch_size": largest * per_node},
            {"micro_batch_sizes": [size for size in section.micro_batch_sizes if size <= most]},
        )
    least_nodes, most_nodes = section.min_gpus // gpus, section.max_gpus // gpus
    all_counts = {batch: _counts(batch, section.micro_batch_sizes) for batch in _candidates(section, most)}
    fitting = {
        batch: [count for count in counts if least_nodes <= count <= most_nodes] for batch, counts in all_counts.items()
    }
    sign = 1 if section.prefer_larger_batch else -1
    batch = max(fitting, key=lambda one: (len(fitting[one]), sign * one))
    if fitting[batch]:
        return batch, fitting[batch]
    every = sorted({count for counts in all_counts.values() for count in counts})
    below, above = [n for n in every if n <= most_nodes][-1:], [n for n in every if n >= least_nodes][:1]
    wanted = f"any number of GPUs from {section.min_gpus} to {section.max_gpus}"
    if section.min_gpus == section.max_gpus:
        wanted = f"{section.min_gpus} GPUs"
    nodes = f" in whole nodes of {gpus}" if gpus > 1 else ""
    raise _Misfit(
        ElasticityConfigError,
        "elasticity.max_train_batch_size",
        f"no batch up to {section.max_train_batch_size} of micro-batches {show(section.micro_batch_sizes)}"
        f" divides among {wanted}{nodes}",
        *({"min_gpus": count * gpus} for count in below),
        *({"max_gpus": count * gpus} for count in above),
    )


def _candidates(section: ElasticitySection, most: int) -> set[int]:
    """Return the batches worth trying: each micro-batch and their least common multiple, times a number that divides
    well."""
    common = 1
    for size in section.micro_batch_sizes:
        common = math.lcm(common, size)
        if common > most:  # it only grows, and with a hundred sizes to a thousand digits
            break
    bases = {size for size in (*section.micro_batch_sizes, common) if size <= most}
    return {base * max(factor for factor in HIGHLY_COMPOSITE if factor <= most // base) for base in bases}


def _counts(batch: int, micro_batch_sizes: tuple[int, ...]) -> list[int]:
    """Return every number of ranks among which ``batch`` divides into micro-batches of one of the sizes."""
    shares = {batch // size for size in micro_batch_sizes if batch % size == 0}
    return [count for count in _divisors(batch) if any(share % count == 0 for share in shares)]


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _batch_of_one(section: ElasticitySection, ranks: int, per_node: int) -> int:
    """Return the batch for ``ranks`` where the shared one does not divide among them: as much as the maximum allows."""
    most = section.max_train_batch_size
    # A micro-batch of which not even one per rank fits has no batch; counting it as 0 would let 0 win as the smallest.
    batches = [fit for size in section.micro_batch_sizes if (fit := most // (size * ranks) * size * ranks)]
    if batches:
        return max(batches) if section.prefer_larger_batch else min(batches)
    smallest = min(section.micro_batch_sizes)
    raise _Misfit(
        ElasticityIncompatibleWorldSize,
        "elasticity",
        f"{ranks} data-parallel ranks take {smallest} x {ranks} = {smallest * ranks} samples at the smallest of"
        f" micro_batch_sizes, more than max_train_batch_size, {most}",
        {"ranks": most // smallest // per_node * per_node},
        {"max_train_batch_size": smallest * ranks},
    )


def _listed(sizes: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, sizes[:20]))
    return shown if len(sizes) <= 20 else f"{shown}, ... {sizes[-1]} ({len(sizes)} of them)"
