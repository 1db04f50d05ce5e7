"""Sections ``data_efficiency``, the legacy ``curriculum_learning``, and ``progressive_layer_drop``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from ds_core.config.section import (
    Count,
    Fraction,
    Int,
    NeededWhenOn,
    NotBuilt,
    Number,
    PositiveInt,
    Section,
    needing,
)

__all__ = [
    "CurriculumLearningSection",
    "CurriculumMetricSection",
    "DataEfficiencySection",
    "DataRoutingSection",
    "DataSamplingSection",
    "DifficultyScheduleSection",
    "DynamicBatchingSection",
    "LayerTokenLrScheduleSection",
    "ProgressiveLayerDropSection",
    "RandomLtdScheduleSection",
    "RandomLtdSection",
    "RandomLtdStepsSection",
    "SamplingCurriculumSection",
]

SOURCE = "spec/core.md 2.21"


def _has_flag(section: Section) -> bool:
    """Return whether an ``enabled`` is true in ``section``, at any depth."""
    return any(
        value is True if name == "enabled" else isinstance(value, Section) and _has_flag(value)
        for name, value in section
    )


class DifficultyScheduleSection(Section):
    """Numbers of a difficulty schedule; which of them count depends on ``schedule_type``."""

    source = SOURCE

    difficulty: Annotated[tuple[Int, ...] | None, NeededWhenOn()] = None
    """``fixed_discrete``: the difficulties, one more than ``max_step`` has entries."""
    max_step: Annotated[tuple[Count, ...] | None, NeededWhenOn()] = None
    """``fixed_discrete``: the last step of every difficulty but the last."""
    total_curriculum_step: Annotated[PositiveInt | None, NeededWhenOn()] = None
    """``fixed_root``, ``fixed_linear``: steps until the largest difficulty is reached."""
    difficulty_step: Annotated[PositiveInt | None, NeededWhenOn()] = None
    """``fixed_root``, ``fixed_linear``: difficulties are multiples of this."""
    root_degree: Annotated[PositiveInt | None, NeededWhenOn()] = None
    """``fixed_root``: the difficulty grows with this root of the step."""


NEEDED = {
    "fixed_discrete": ("difficulty", "max_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "custom": (),
}
"""``schedule_type`` -> the keys that its ``schedule_config`` must have."""


class _Difficulty(Section):
    """A difficulty that rises with the steps."""

    min_difficulty: Annotated[Int | None, NeededWhenOn()] = None
    """Difficulty of the first steps, in the metric's own unit; needed where the curriculum is enabled."""
    max_difficulty: Annotated[Int | None, NeededWhenOn()] = None
    """Difficulty at the end of the schedule, in the metric's own unit; needed where the curriculum is enabled."""
    schedule_type: Annotated[
        Literal["fixed_discrete", "fixed_linear", "fixed_root", "custom"] | None, NeededWhenOn()
    ] = None
    """How the difficulty rises: a list, a line, a root, or a function set in code; needed where it is enabled."""
    schedule_config: DifficultyScheduleSection = Field(default_factory=DifficultyScheduleSection)
    """Numbers of the schedule."""

    def check_lengths(self, *path: str) -> None:
        """Raise if the lists of a discrete schedule do not fit; ``path`` leads to the difficulty."""
        values, steps = self.schedule_config.difficulty, self.schedule_config.max_step
        if self.schedule_type != "fixed_discrete" or values is None or steps is None or len(values) == len(steps) + 1:
            return
        what = "must have one value more than max_step, which has {steps}"
        error = PydanticCustomError("lengths", what, {"steps": len(steps)})
        location = (*path, "schedule_config", "difficulty")
        raise ValidationError.from_exception_data(
            type(self).__name__, [InitErrorDetails(type=error, loc=location, input=list(values))]
        )


def _in_use(difficulty: Any) -> Any:
    """Return what a difficulty is to be made of, so that what its schedule must have is an error where it lacks."""
    difficulty = needing(difficulty, ("min_difficulty", "max_difficulty", "schedule_type"))
    kind = difficulty.get("schedule_type") if isinstance(difficulty, Mapping) else None
    if isinstance(kind, str) and NEEDED.get(kind):
        difficulty["schedule_config"] = needing(difficulty.get("schedule_config") or {}, NEEDED[kind])
    return difficulty


class CurriculumMetricSection(_Difficulty):
    """One measure of difficulty, and which samples have how much of it."""

    source = SOURCE

    index_to_sample_path: str | None = None
    """File that lists the samples by value of the metric."""
    index_to_metric_path: str | None = None
    """File that lists the values of the metric."""
    difficulty_type: Literal["value", "percentile"] | None = None
    """What a difficulty is: a value of the metric, or a share of the samples in percent."""
    clustering_type: Annotated[str, Field(min_length=1)] | None = None
    """How samples are kept apart by difficulty, such as ``single_cluster`` for not at all."""


class SamplingCurriculumSection(Section):
    """Easy samples first, by any number of metrics."""

    source = SOURCE

    enabled: bool = False
    """Draw samples by difficulty."""
    data_cluster_path: str | None = None
    """Folder of the files that list samples by difficulty."""
    curriculum_metrics: Annotated[dict[str, CurriculumMetricSection], NeededWhenOn()] = Field(default_factory=dict)
    """Your name of a metric -> its files and schedule; at least one is needed where this is enabled."""

    @classmethod
    def prepare(cls, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Ask every metric for a whole schedule, if this is on."""
        prepared = super().prepare(data)
        metrics = prepared.get("curriculum_metrics")
        if cls.is_switched_on(data) and isinstance(metrics, Mapping):
            prepared["curriculum_metrics"] = {name: _in_use(metric) for name, metric in metrics.items()}
        return prepared

    @model_validator(mode="after")
    def _fits(self) -> SamplingCurriculumSection:
        for name, metric in self.curriculum_metrics.items() if self.enabled else ():
            metric.check_lengths("curriculum_metrics", name)
        return self


class DynamicBatchingSection(Section):
    """Batches of about as many tokens instead of as many samples."""

    source = SOURCE

    enabled: bool = False
    """Form batches by tokens."""
    lr_scaling_method: Literal["linear", "sqrt", "none"] = "linear"
    """How the learning rate follows the size of a batch."""
    min_batch_size: PositiveInt = 1
    """Samples in the smallest batch; smaller ones are left out."""
    max_batch_size: PositiveInt | None = None
    """Samples in the largest batch; null for no limit."""
    sequence_picking_order: Literal["dataloader", "random", "seqlen"] = "dataloader"
    """Order in which samples are put into batches: as they come, at random, or by length."""
    max_tokens: Annotated[PositiveInt | None, NeededWhenOn()] = None
    """Tokens of a batch at most; needed where this is enabled."""
    metrics_path: str | None = None
    """Folder of the files that tell how many tokens a sample has."""
    verbose: bool = False
    """Log how the batches were formed."""


class DataSamplingSection(Section):
    """Which samples are drawn, and how they form batches."""

    source = SOURCE

    enabled: bool = False
    """The sections below may be on; each has a switch of its own, which is what counts."""
    num_epochs: PositiveInt = 1000
    """Times the sampler goes through the data before it ends."""
    num_workers: Count = 0
    """Processes that load samples; 0 loads them in the training process."""
    pin_memory: bool = False
    """Load batches into page-locked CPU memory."""
    curriculum_learning: SamplingCurriculumSection = Field(default_factory=SamplingCurriculumSection)
    """Easy samples first."""
    dynamic_batching: DynamicBatchingSection = Field(default_factory=DynamicBatchingSection)
    """Batches by tokens."""


class RandomLtdStepsSection(Section):
    """Numbers of the linear schedule of random-LTD."""

    source = SOURCE

    require_steps: PositiveInt | None = None
    """Steps until every token is kept."""
    seq_per_step: PositiveInt | None = None
    """The number of kept tokens is a multiple of this."""


class RandomLtdScheduleSection(Section):
    """How the number of kept tokens rises."""

    source = SOURCE

    min_value: PositiveInt | None = None
    """Tokens of a sequence kept in the first steps."""
    max_value: PositiveInt | None = None
    """Tokens of a sequence kept at the end, usually all."""
    schedule_type: Literal["fixed_linear"] = "fixed_linear"
    """The number rises on a line."""
    schedule_config: RandomLtdStepsSection = Field(default_factory=RandomLtdStepsSection)
    """Numbers of the schedule."""


class LayerTokenLrScheduleSection(Section):
    """A learning rate that follows the number of kept tokens, which DeepSpeed has a key for and no code."""

    source = SOURCE

    enabled: Annotated[bool, NotBuilt(False, why="which DeepSpeed does not have either")] = False
    """Let the learning rate follow the tokens."""


class RandomLtdSection(Section):
    """Layers in the middle skip a random share of the tokens (random layerwise token dropping)."""

    source = SOURCE

    enabled: bool = False
    """Drop tokens."""
    total_layer_num: PositiveInt | None = None
    """Layers of the model."""
    random_ltd_layer_num: PositiveInt | None = None
    """Layers that drop tokens."""
    random_ltd_layer_id: tuple[Count, ...] = ()
    """Indexes of those layers, from 0."""
    model_mask_name: str | None = None
    """Argument of a layer that is its attention mask; null where it has none."""
    model_type: str | None = None
    """Kind of the model, such as ``decoder`` or ``encoder``."""
    hidden_state_order: str | None = None
    """Order of the dims of a layer's input, such as ``batch_seq_dim``."""
    random_ltd_schedule: RandomLtdScheduleSection = Field(default_factory=RandomLtdScheduleSection)
    """How the number of kept tokens rises."""
    layer_token_lr_schedule: LayerTokenLrScheduleSection = Field(default_factory=LayerTokenLrScheduleSection)
    """A learning rate that follows the tokens."""


class DataRoutingSection(Section):
    """Which tokens go through which layer."""

    source = SOURCE

    enabled: bool = False
    """The section below may be on; it has a switch of its own, which is what counts."""
    random_ltd: RandomLtdSection = Field(default_factory=RandomLtdSection)
    """Layers in the middle skip a random share of the tokens."""


class DataEfficiencySection(Section):
    """Curriculum learning, batches by tokens and random-LTD.

    On as soon as one ``enabled`` in it is true: DeepSpeed looks at the inner ones, whatever the outer one says.
    """

    source = SOURCE
    comes_with = "ds-core"

    enabled: bool = False
    """The sections below may be on; each has a switch of its own, which is what counts."""
    seed: Int = 1234
    """Seed of the sampler."""
    data_sampling: DataSamplingSection = Field(default_factory=DataSamplingSection)
    """Which samples are drawn, and how they form batches."""
    data_routing: DataRoutingSection = Field(default_factory=DataRoutingSection)
    """Which tokens go through which layer."""

    def is_on(self) -> bool:
        return _has_flag(self)


class CurriculumLearningSection(_Difficulty):
    """Curriculum learning of one metric, the form that ``data_efficiency`` replaced."""

    source = SOURCE
    comes_with = "ds-core"

    enabled: bool = False
    """Pass the difficulty of the step to forward."""
    curriculum_type: Annotated[str, Field(min_length=1)] | None = None
    """Metric of the difficulty; ``seqlen`` gives forward the keyword argument ``curriculum_seqlen``."""

    @classmethod
    def prepare(cls, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Ask for a whole schedule, if this is on."""
        prepared = super().prepare(data)
        return dict(_in_use(prepared)) if cls.is_switched_on(data) else prepared

    @model_validator(mode="after")
    def _fits(self) -> CurriculumLearningSection:
        if self.enabled:
            self.check_lengths()
        return self


class ProgressiveLayerDropSection(Section):
    """Layers are skipped more and more often as training goes on.

    At step t a layer is kept with a probability that depends on theta(t) = (1 - theta) exp(-gamma t) + theta; forward
    gets it as the keyword argument ``pld_theta``.
    """

    source = "spec/core.md 2.23"
    comes_with = "ds-core"

    enabled: bool = False
    """Skip layers."""
    theta: Fraction = 1.0
    """What theta(t) falls to; 1 keeps every layer."""
    gamma: Annotated[Number, Field(ge=0)] = 0.001
    """How fast theta(t) falls, per step."""
