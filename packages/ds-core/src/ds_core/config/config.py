"""The whole configuration: :class:`Config`, the top-level keys and one field per section."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, PrivateAttr

from ds_core.config.problems import Problem, raise_problems, validate
from ds_core.config.section import Count, DtypeName, Int, NoEffect, NotBuilt, Number, PositiveInt, Section, lowered
from ds_core.config.sections.choices import (
    PLAIN,
    SHARDED,
    CheckpointSection,
    ChoiceSection,
    PartitionSection,
    PrecisionSection,
)
from ds_core.config.sections.monitors import CsvMonitorSection
from ds_core.config.sections.optimizer import OptimizerSection, SchedulerSection
from ds_core.config.sections.precision import Bf16Section, DataTypesSection, Fp16Section, TorchAutocastSection
from ds_core.config.sections.zero import ZeroSection
from ds_core.config.showing import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BatchKeys", "Config"]

S = TypeVar("S", bound=Section)


class BatchKeys(Section):
    """The three batch sizes as the user gave them; ``batch.resolve_batch`` finds the ones left out."""

    train_batch_size: PositiveInt | None = None
    """Samples of one optimizer step, over all ranks."""
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    """Samples of one forward on one rank."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Forwards per optimizer step."""


def _never(value: Any) -> Any:
    # Accelerate writes infinity for "never print".
    is_infinite = value in ("inf", "Infinity") or (isinstance(value, float) and math.isinf(value))
    return None if is_infinite else value


def _offloads_nothing(config: Config) -> bool:
    offload = config.zero_optimization.offload_optimizer
    return offload is None or offload.device == "none" or config.zero_optimization.stage == 0


_UNDIVIDED = NoEffect(
    'gradient_allreduce_op is "sum", so nothing is divided', when=lambda config: config.gradient_allreduce_op == "sum"
)
_BEFORE_ANYWAY = NoEffect(
    "gradient_predivide_factor is 1, so all of the division is before the sum anyway",
    when=lambda config: config.gradient_predivide_factor == 1,
)
_PRESCALED = NoEffect(
    "prescale_gradients is true, so all of the division is before the sum",
    when=lambda config: config.prescale_gradients,
)
Steps = Annotated[PositiveInt | None, BeforeValidator(_never)]
Lowered = BeforeValidator(lowered)


class Config(Section):
    """A checked configuration with resolved batch sizes. Made by ``load_config``.

    Keys not given have their defaults, so every attribute is there and has the type declared here. Attributes are
    frozen, at every depth; dicts and what is in them are not (:attr:`raw`).
    """

    source = "spec/core.md 2.2, 2.3"

    train_batch_size: PositiveInt
    """Samples of one optimizer step, over all ranks."""
    train_micro_batch_size_per_gpu: PositiveInt
    """Samples of one forward on one rank."""
    gradient_accumulation_steps: PositiveInt
    """Forwards per optimizer step."""
    managed_gradient_accumulation: Annotated[bool, NotBuilt(True)] = True
    """The engine counts forwards and knows where a step ends; false: the caller's ``step()`` ends it."""

    gradient_clipping: Number = 1.0
    """Largest L2 norm of all gradients together; 0 or less leaves them alone."""
    steps_per_print: Steps = None
    """Steps between two lines of progress; null or infinity prints none."""
    log_level: Annotated[Literal["debug", "info", "warning", "error", "critical"] | None, Lowered] = None
    """Level of the ``ds_core`` logger; null leaves it."""
    dataloader_drop_last: bool = False
    """Drop the last batch of an epoch where it is not full."""

    prescale_gradients: Annotated[bool, _UNDIVIDED, _BEFORE_ANYWAY] = False
    """Divide gradients by the number of ranks before they are summed, whatever ``gradient_predivide_factor`` says."""
    gradient_predivide_factor: Annotated[Number, Field(gt=0), _UNDIVIDED, _PRESCALED] = 1.0
    """Divide gradients by this before they are summed over the ranks, and by the rest after it, which is one more pass
    over them; 1: by all of it before."""
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], Lowered] = "mean"
    """What becomes of the gradients of different ranks."""
    communication_data_type: DtypeName | None = None
    """Dtype of gradients inside a collective; null is the precision's own."""
    seq_parallel_communication_data_type: Annotated[DtypeName, NotBuilt("float32")] = "float32"
    """The same, with sequence parallelism."""
    sparse_gradients: Annotated[bool, NotBuilt(False)] = False
    """Reduce gradients of embeddings as sparse tensors."""
    disable_allgather: Annotated[bool, NoEffect("DeepSpeed's engine reads it nowhere either")] = False
    """A switch of older releases."""
    allgather_size: Annotated[Count, NoEffect('it is read only beside the legacy "zero_optimization": true')] = (
        500_000_000
    )
    """Elements gathered at once, where ``zero_optimization`` is the legacy ``true``."""
    zero_allow_untested_optimizer: Annotated[bool, NoEffect("every optimizer is allowed")] = False
    """Allows any optimizer with ZeRO, which is the rule here."""
    zero_force_ds_cpu_optimizer: Annotated[bool, NoEffect("nothing is offloaded", when=_offloads_nothing)] = True
    """With offload, replace a plain Adam, Adagrad or Lion by its CPU variant."""
    wall_clock_breakdown: Annotated[bool, NotBuilt(False)] = False
    """Log the time of forward, backward and step."""
    memory_breakdown: Annotated[bool, NotBuilt(False)] = False
    """Log memory around forward, backward and step."""
    dump_state: Annotated[bool, NotBuilt(False)] = False
    """Log the engine's state once it is built."""
    vocabulary_size: PositiveInt | None = None
    """Entries of the model's vocabulary; ``initialize`` warns where they are no multiple of 8."""
    graph_harvesting: Annotated[bool, NotBuilt(False)] = False
    """CUDA graphs in the bf16 optimizer."""
    use_data_before_expert_parallelism: Annotated[bool, NotBuilt(False)] = False
    """Order of the ranks in expert groups."""
    sequence_parallel_size: Annotated[Int | None, NotBuilt(None, 1)] = None
    """Ranks that share one sequence."""
    data_parallel_size: Annotated[Int | None, NotBuilt(None, 1)] = None
    """Ranks that see different data."""

    optimizer: OptimizerSection | None = None
    """Which optimizer updates the weights."""
    scheduler: SchedulerSection | None = None
    """Which schedule moves the learning rate."""
    zero_optimization: ZeroSection = Field(default_factory=ZeroSection)
    """What is divided among the ranks."""
    fp16: Fp16Section = Field(default_factory=Fp16Section)
    """Half precision with loss scaling."""
    bf16: Bf16Section = Field(default_factory=Bf16Section)
    """bfloat16 weights and fp32 masters."""
    torch_autocast: TorchAutocastSection = Field(default_factory=TorchAutocastSection)
    """fp32 weights, forward under ``torch.autocast``."""
    data_types: DataTypesSection = Field(default_factory=DataTypesSection)
    """Dtypes that hold whatever the precision is."""
    precision: PrecisionSection = Field(default_factory=PrecisionSection)
    """A precision that is not DeepSpeed's."""
    partition: PartitionSection = Field(default_factory=PartitionSection)
    """A partition that is not DeepSpeed's."""
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    """How checkpoints are stored and loaded."""
    csv_monitor: CsvMonitorSection = Field(default_factory=CsvMonitorSection)
    """Writes every event to a CSV file."""

    # Set by `of` and `with_sections` alone, on a copy.
    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)
    _further: dict[str, Section] = PrivateAttr(default_factory=dict)
    _ignored: tuple[str, ...] = PrivateAttr(default=())
    _dropped: dict[str, str] = PrivateAttr(default_factory=dict)
    _where: str = PrivateAttr(default="config dict")

    def with_sections(self, further: Mapping[str, Section]) -> Config:
        """Return a copy that also has the sections ``further``."""
        config = self.model_copy()
        config._further = dict(further)
        return config

    def of(self, raw: dict[str, Any], *, where: str, ignored: tuple[str, ...], dropped: Mapping[str, str]) -> Config:
        """Return a copy that knows what it was made from; the arguments are the properties of the same names."""
        config = self.model_copy()
        config._raw, config._where, config._ignored, config._dropped = raw, where, ignored, dict(dropped)
        return config

    @property
    def raw(self) -> dict[str, Any]:
        """The configuration as given: a copy of the caller's dict, or what the file says.

        It is a plain dict, since clients read it as one, and so are ``optimizer.params`` and ``scheduler.params``.
        Nothing that was built reads them again, so what is written there later has no effect.
        """
        return self._raw

    @property
    def where(self) -> str:
        """Where the configuration came from: ``config dict``, ``base64 text``, or the path of a file."""
        return self._where

    @property
    def ignored(self) -> tuple[str, ...]:
        """Dotted paths of the keys that compatibility mode dropped."""
        return self._ignored

    @property
    def dropped(self) -> Mapping[str, str]:
        """Dotted path of each deprecated key that is read as nothing -> what to do about it."""
        return self._dropped

    @property
    def sections(self) -> Mapping[str, Section]:
        """All sections by their key: those declared here, with defaults for what is not given, and further ones given.

        Further ones are the rarer ones of ``catalog.RARE`` and plugins' own (seam ``config``).
        """
        declared = {name: value for name, value in self if isinstance(value, Section)}
        return {**declared, **self._further}

    def section(self, name: str) -> Section | None:
        """Return the section called ``name``, all defaults where it was not given; None for an optional one left out.

        >>> from ds_core.config import load_config
        >>> load_config({"train_batch_size": 1}).section("flops_profiler").profile_step
        1
        """
        found = self.sections.get(name)
        if found is not None or name in type(self).model_fields:
            return found
        from ds_core.config import catalog

        model = catalog.rare_section(name) if name in catalog.RARE else catalog.plugin_section(name)
        return model.model_validate({})

    def enables(self, name: str) -> bool:
        """Return whether section ``name`` is on; a precision also where ``precision.type`` names it."""
        section = self.sections.get(name)
        return section is not None and (section.is_on() or self.precision.type == name)

    def plugin(self, section: str) -> str:
        """Return the name of the plugin in force: what ``section`` says, else what the core chooses.

        Args:
            section: ``"checkpoint"``, ``"precision"`` or ``"partition"``.
        """
        chosen: str | None = getattr(self, section).chosen
        if chosen is not None:
            return chosen
        if section == "partition":
            return "replicated" if self.zero_optimization.stage == 0 else str(self.zero_optimization.stage)
        if section == "checkpoint":
            from ds_core import registry  # slow to import; it reads names, and imports no plugin

            return SHARDED if SHARDED in registry.names("checkpoint") else PLAIN
        return next((name for name in ("fp16", "bf16", "torch_autocast") if self.enables(name)), "fp32")

    def options(self, section: str, name: str, model: type[S] | None) -> S | None:
        """Return the options of plugin ``name``: its sub-section ``section.name``, checked.

        Args:
            section: ``"checkpoint"``, ``"precision"`` or ``"partition"``.
            name: the plugin's entry name.
            model: the plugin's class of options, or None where it has none.

        Returns:
            An instance of ``model``, all defaults where the user wrote no such sub-section; None without ``model``.

        Raises:
            ConfigError: the sub-section has problems, or has keys although the plugin takes none.
        """
        options, problems = self.checked_options(section, name, model)
        raise_problems(problems, where=self._where)
        return options

    def checked_options(self, section: str, name: str, model: type[S] | None) -> tuple[S | None, list[Problem]]:
        """Return what :meth:`options` returns, and the problems it would raise."""
        chooser = getattr(self, section)
        if not isinstance(chooser, ChoiceSection):
            raise TypeError(f"{section!r} is not a section that chooses a plugin")
        given = chooser.options.get(name, {})
        if model is not None:
            return validate(model, given, path=(section, name))
        if not given:
            return None, []
        text = f"{name!r} takes no options, got {', '.join(map(printable, given))}"
        return None, [Problem((section, name), text, f'remove "{name}" from "{section}"')]
