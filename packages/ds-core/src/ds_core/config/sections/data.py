"""Sections ``data_efficiency``, the legacy ``curriculum_learning``, and ``progressive_layer_drop``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ds_core.config.section import Count, Fraction, Int, NotBuilt, Number, PositiveInt, Section

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

    difficulty: tuple[Int, ...] | None = None
    """``fixed_discrete``: the difficulties, one more than ``max_step`` has entries."""
    max_step: tuple[Count, ...] | None = None
    """``fixed_discrete``: the last step of every difficulty but the last."""
    total_curriculum_step: PositiveInt | None = None
    """``fixed_root``, ``fixed_linear``: steps until the largest difficulty is reached."""
    difficulty_step: PositiveInt | None = None
    """``fixed_root``, ``fixed_linear``: difficulties are multiples of this."""
    root_degree: PositiveInt | None = None
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

    min_difficulty: Int | None = None
    """Difficulty of the first steps, in the metric's own unit; needed where the curriculum is enabled."""
    max_difficulty: Int | None = None
    """Difficulty at the end of the schedule, in the metric's own unit; needed where the curriculum is enabled."""
    schedule_type: Literal["fixed_discrete", "fixed_linear", "fixed_root", "custom"] | None = None
    """How the difficulty rises: a list, a line, a root, or a function set in code; needed where it is enabled."""
    schedule_config: DifficultyScheduleSection = Field(default_factory=DifficultyScheduleSection)
    """Numbers of the schedule."""

    def mistakes(self) -> list[str]:
        """Return what keeps the schedule from running, in the words of an error."""
        keys = ("min_difficulty", "max_difficulty", "schedule_type")
        absent = [f'"{key}"' for key in keys if getattr(self, key) is None]
        config = self.schedule_config
        needed = NEEDED[self.schedule_type] if self.schedule_type else ()
        missing = [f'"schedule_config.{key}"' for key in needed if getattr(config, key) is None]
        found = [f"needs {_listed(absent + missing)}"] if absent or missing else []
        if missing:
            found[0] += f' for schedule_type "{self.schedule_type}"'
        elif self.schedule_type == "fixed_discrete" and config.difficulty is not None and config.max_step is not None:
            values, steps = len(config.difficulty), len(config.max_step)
            if values != steps + 1:
                found.append(f'has {values} values in "difficulty" for {steps} in "max_step", which takes one less')
        return found


def _listed(keys: list[str]) -> str:
    return f"{', '.join(keys[:-1])} and {keys[-1]}" if len(keys) > 1 else keys[0]


def _refuse(mistakes: list[str]) -> None:
    if mistakes:
        text = f"{' and '.join(mistakes)} while it is enabled"
        raise PydanticCustomError("needs", "{text}", {"text": text})


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
    curriculum_metrics: dict[str, CurriculumMetricSection] = Field(default_factory=dict)
    """Your name of a metric -> its files and schedule; at least one is needed where this is enabled."""

    @model_validator(mode="after")
    def _is_whole(self) -> SamplingCurriculumSection:
        if not self.enabled:
            return self
        if not self.curriculum_metrics:
            raise PydanticCustomError("needs", 'needs "curriculum_metrics" while it is enabled')
        mistakes = [
            f'"curriculum_metrics.{name}" {mistake}'
            for name, metric in self.curriculum_metrics.items()
            for mistake in metric.mistakes()
        ]
        _refuse(mistakes)
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
    max_tokens: PositiveInt | None = None
    """Tokens of a batch at most; needed where this is enabled."""
    metrics_path: str | None = None
    """Folder of the files that tell how many tokens a sample has."""
    verbose: bool = False
    """Log how the batches were formed."""

    @model_validator(mode="after")
    def _is_whole(self) -> DynamicBatchingSection:
        if self.enabled and self.max_tokens is None:
            raise PydanticCustomError("needs", 'needs "max_tokens" while it is enabled')
        return self


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

    @model_validator(mode="after")
    def _is_whole(self) -> CurriculumLearningSection:
        if self.enabled:
            _refuse(self.mistakes())
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
