"""The techniques of ``compression_training``: numbers for all modules, and groups of modules with their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ds_core.config.section import Count, Fraction, NeededWhenOn, Number, PositiveInt, Section, needing

__all__ = [
    "Names",
    "ActivationBitsSection",
    "ActivationGroupSection",
    "ActivationQuantizationSection",
    "ActivationQuantizationSharedSection",
    "ChannelPruningSection",
    "DenseRatioSection",
    "HeadPruningSection",
    "HeadPruningSharedSection",
    "MixedQuantizeSection",
    "PruningGroupSection",
    "PruningSharedSection",
    "RowPruningSection",
    "SparsePruningSection",
    "SparsePruningSharedSection",
    "WeightBitsSection",
    "WeightGroupSection",
    "WeightQuantizationSharedSection",
    "WeightQuantizationTrainingSection",
]

SOURCE = "spec/core.md 2.22"


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _lists(value: Any) -> Any:
    return tuple(map(_one_or_more, value)) if isinstance(value, (list, tuple)) else _one_or_more(value)


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_more, json_schema_input_type=str | list[str])]
"""Names of modules; one alone may be written without a list."""
NameLists = Annotated[
    tuple[Names, ...], BeforeValidator(_lists, json_schema_input_type=str | list[str | list[str]] | None)
]
"""A list of names for each name."""


class _Group(Section):
    """Which modules get the same numbers."""

    modules: Names = ("*",)
    """Names of the modules, or patterns of them; ``*`` is all."""
    related_modules: NameLists | None = None
    """Modules that must be cut to fit, one list per entry of ``modules``; null for none."""


class _Technique(Section):
    """One way to make a model smaller: what holds for all modules, and groups of modules with their own numbers."""

    needed: ClassVar[tuple[str, ...]] = ()
    """Keys that the ``params`` of every group must have where the technique is enabled."""

    if TYPE_CHECKING:
        shared_parameters: Any
        different_groups: Any

    def is_on(self) -> bool:
        return bool(self.shared_parameters.enabled)

    @classmethod
    def prepare(cls, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Ask for groups, and each of them for what it needs, if this is on."""
        prepared = super().prepare(data)
        shared = prepared.get("shared_parameters", {})
        model = cls.model_fields["shared_parameters"].annotation
        assert isinstance(model, type)
        assert issubclass(model, Section)
        if not model.is_switched_on(shared):
            return prepared
        prepared = dict(needing(prepared, ("different_groups",)))
        groups = prepared["different_groups"]
        if isinstance(groups, Mapping):
            needed = cls.needed_in_groups(shared)
            prepared["different_groups"] = {name: _in_use(group, needed) for name, group in groups.items()}
        return prepared

    @classmethod
    def needed_in_groups(cls, shared: Mapping[Any, Any]) -> tuple[str, ...]:
        """Return the keys that the ``params`` of every group must have, beside these ``shared_parameters``."""
        return cls.needed


def _in_use(group: Any, needed: tuple[str, ...]) -> Any:
    if not isinstance(group, Mapping):
        return group
    params = group.get("params")
    return {**group, "params": needing({} if params is None else params, needed)}


class MixedQuantizeSection(Section):
    """A mix of the fp16 and the quantized weight, which goes from one to the other."""

    source = SOURCE

    enabled: bool = False
    """Mix them."""
    quantize_change_ratio: Fraction = 0.001
    """Share of the quantized weight that is added per step."""


class WeightQuantizationSharedSection(Section):
    """What holds for all modules whose weights are quantized."""

    source = SOURCE

    enabled: bool = False
    """Quantize weights while training."""
    quantizer_kernel: bool = False
    """Quantize with a kernel for GPUs, at the optimizer's step."""
    schedule_offset: Count = 0
    """Step at which quantization begins."""
    quantize_groups: PositiveInt = 1
    """Groups of a weight that have a scale each."""
    quantize_verbose: bool = False
    """Log the bits whenever they change."""
    quantization_type: Literal["symmetric", "asymmetric"] = "symmetric"
    """Whether 0 stays in the middle of the integers."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How a value becomes an integer."""
    quantize_weight_in_forward: bool = False
    """Quantize in forward, with a gradient straight through, instead of at the optimizer's step."""
    fp16_mixed_quantize: MixedQuantizeSection = Field(default_factory=MixedQuantizeSection)
    """Go from the fp16 to the quantized weight bit by bit."""


class WeightBitsSection(Section):
    """Bits of a group of weights."""

    source = SOURCE

    start_bits: Annotated[PositiveInt | None, NeededWhenOn()] = None
    """Bits of an element at first; needed where the technique is enabled."""
    target_bits: Annotated[PositiveInt | None, NeededWhenOn()] = None
    """Bits of an element in the end; needed where the technique is enabled."""
    quantization_period: PositiveInt = 1
    """Steps from one number of bits to the next lower one."""


class WeightGroupSection(_Group):
    """Modules whose weights are quantized alike."""

    source = SOURCE

    params: WeightBitsSection = Field(default_factory=WeightBitsSection)
    """Bits of the group."""


class WeightQuantizationTrainingSection(_Technique):
    """Weights of few bits while training."""

    source = SOURCE
    needed = ("start_bits", "target_bits")

    shared_parameters: WeightQuantizationSharedSection = Field(default_factory=WeightQuantizationSharedSection)
    """What holds for all modules."""
    different_groups: Annotated[dict[str, WeightGroupSection], NeededWhenOn()] = Field(default_factory=dict)
    """Your name of a group -> its modules and bits; at least one is needed where this is enabled."""


class ActivationQuantizationSharedSection(Section):
    """What holds for all modules whose inputs are quantized."""

    source = SOURCE

    enabled: bool = False
    """Quantize activations while training."""
    quantization_type: Literal["symmetric", "asymmetric"] = "symmetric"
    """Whether 0 stays in the middle of the integers."""
    range_calibration: Literal["dynamic", "static"] = "dynamic"
    """Find the range of the values for every batch, or keep a running one."""
    schedule_offset: Count = 1000
    """Step at which quantization begins."""


class ActivationBitsSection(Section):
    """Bits of a group of activations."""

    source = SOURCE

    bits: Annotated[PositiveInt | None, NeededWhenOn()] = None
    """Bits of an element; needed where the technique is enabled."""


class ActivationGroupSection(_Group):
    """Modules whose inputs are quantized alike."""

    source = SOURCE

    params: ActivationBitsSection = Field(default_factory=ActivationBitsSection)
    """Bits of the group."""


class ActivationQuantizationSection(_Technique):
    """Activations of few bits while training."""

    source = SOURCE
    needed = ("bits",)

    shared_parameters: ActivationQuantizationSharedSection = Field(default_factory=ActivationQuantizationSharedSection)
    """What holds for all modules."""
    different_groups: Annotated[dict[str, ActivationGroupSection], NeededWhenOn()] = Field(default_factory=dict)
    """Your name of a group -> its modules and bits; at least one is needed where this is enabled."""


class DenseRatioSection(Section):
    """How much of a group is kept."""

    source = SOURCE

    dense_ratio: Annotated[Fraction | None, NeededWhenOn()] = None
    """Share of the weights that is kept; needed where the technique is enabled, but not by ``snip_momentum``."""


class PruningGroupSection(_Group):
    """Modules that are pruned alike."""

    source = SOURCE

    params: DenseRatioSection = Field(default_factory=DenseRatioSection)
    """How much of the group is kept."""


class SparsePruningSharedSection(Section):
    """What holds for all modules whose single weights are pruned."""

    source = SOURCE

    enabled: bool = False
    """Set single weights to zero."""
    method: Literal["l1", "topk", "snip_momentum"] = "l1"
    """What goes first: small values, low learned scores, or blocks that matter little to the loss."""
    schedule_offset: Count = 1000
    """Step at which pruning begins."""
    schedule_offset_end: Count | None = None
    """``snip_momentum``: step at which pruning ends; null means ``schedule_offset``."""
    schedule_offset_stride: PositiveInt = 1
    """``snip_momentum``: steps between two cuts."""
    block_pattern: Annotated[str, Field(min_length=1)] = "4x1"
    """``snip_momentum``: rows and columns of the blocks that are pruned as one."""
    dense_ratio: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """``snip_momentum``: share of the weights that is kept."""
    excluded_modules: Names = ()
    """``snip_momentum``: names of modules that are left as they are, or patterns of them."""


class SparsePruningSection(_Technique):
    """Single weights, or small blocks of them, become zero."""

    source = SOURCE
    needed = ("dense_ratio",)

    shared_parameters: SparsePruningSharedSection = Field(default_factory=SparsePruningSharedSection)
    """What holds for all modules."""
    different_groups: Annotated[dict[str, PruningGroupSection], NeededWhenOn()] = Field(default_factory=dict)
    """Your name of a group -> its modules and ratio; at least one is needed where this is enabled."""

    @classmethod
    def needed_in_groups(cls, shared: Mapping[Any, Any]) -> tuple[str, ...]:
        """Return the keys that the ``params`` of every group must have; ``snip_momentum`` has one ratio for all."""
        return () if shared.get("method") == "snip_momentum" else cls.needed


class PruningSharedSection(Section):
    """What holds for all modules whose rows or channels are pruned."""

    source = SOURCE

    enabled: bool = False
    """Prune while training."""
    method: Literal["l1", "topk"] = "l1"
    """What goes first: small values, or low learned scores."""
    schedule_offset: Count = 1000
    """Step at which pruning begins."""


class RowPruningSection(_Technique):
    """Whole rows of weights become zero."""

    source = SOURCE
    needed = ("dense_ratio",)

    shared_parameters: PruningSharedSection = Field(default_factory=PruningSharedSection)
    """What holds for all modules."""
    different_groups: Annotated[dict[str, PruningGroupSection], NeededWhenOn()] = Field(default_factory=dict)
    """Your name of a group -> its modules and ratio; at least one is needed where this is enabled."""


class ChannelPruningSection(RowPruningSection):
    """Whole channels of convolutions become zero."""


class HeadPruningSharedSection(Section):
    """What holds for all modules whose attention heads are pruned."""

    source = SOURCE

    enabled: bool = False
    """Prune attention heads."""
    method: Literal["topk"] = "topk"
    """What goes first: low learned scores."""
    schedule_offset: Count = 1000
    """Step at which pruning begins."""
    num_heads: Annotated[PositiveInt | None, NeededWhenOn()] = None
    """Attention heads of a layer; needed where this is enabled."""


class HeadPruningSection(_Technique):
    """Whole attention heads become zero."""

    source = SOURCE
    needed = ("dense_ratio",)

    shared_parameters: HeadPruningSharedSection = Field(default_factory=HeadPruningSharedSection)
    """What holds for all modules."""
    different_groups: Annotated[dict[str, PruningGroupSection], NeededWhenOn()] = Field(default_factory=dict)
    """Your name of a group -> its modules and ratio; at least one is needed where this is enabled."""
