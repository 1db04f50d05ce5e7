"""Sections ``inference`` (what ``init_inference`` takes), ``hybrid_engine`` and ``weight_quantization``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field

from ds_core.config.section import DtypeName, Int, NoEffect, PositiveInt, Section, key
from ds_core.config.sections.moved import Moved, move
from ds_core.config.sections.values import OneOf, OrSwitch
from ds_core.config.sections.zero import ZeroSection

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "CheckpointFilesSection",
    "GroupQuantizationSection",
    "HybridEngineSection",
    "InferenceRanksSection",
    "InferenceSection",
    "MoeSection",
    "QkvQuantSection",
    "QuantSection",
    "QuantizerSection",
    "WeightQuantSection",
    "WeightQuantizationSection",
]


class HybridEngineSection(Section):
    """One engine that trains a model and generates text with it, as reinforcement learning needs."""

    source = "spec/core.md 2.18, spec/inference.md 10"
    comes_with = "ds-inference"

    enabled: bool = False
    """Make the engine one that generates."""
    max_out_tokens: PositiveInt = 512
    """Tokens of prompt and answer together, at most."""
    inference_tp_size: PositiveInt = 1
    """Ranks that share a layer while text is generated (ZeRO stage 3 with ``pin_parameters``)."""
    release_inference_cache: bool = False
    """Free the memory of keys and values after each generation."""
    pin_parameters: bool = True
    """At stage 3, gather all weights for a whole generation; false: layer by layer."""
    tp_gather_partition_size: PositiveInt = 8
    """Layers gathered at one time where ranks share layers."""
    enable_cuda_graph: bool = False
    """Record the generation of a token as a CUDA graph and replay it."""


class GroupQuantizationSection(Section):
    """How weights are quantized: numbers of one group share a scale and an offset."""

    num_bits: Literal[4, 8] | None = None
    """Bits per number: 4 or 8."""
    group_numel: PositiveInt | None = key("group_size", default=None)
    """Elements per group."""
    group_dim: Int | None = None
    """Dim along which the elements of a group lie; its length must be a multiple of ``group_size``."""
    symmetric: bool = False
    """Have zero in the middle of the range, without an offset; DeepSpeed refuses true where it would be used."""


class QuantizerSection(Section):
    """How numbers are quantized."""

    enabled: bool = True
    """Quantize them."""
    num_bits: PositiveInt = 8
    """Bits per number."""
    q_type: Literal["symmetric", "asymmetric"] = "symmetric"
    """Have zero in the middle of the range, or use the range from the smallest to the largest number."""
    q_groups: PositiveInt = 1
    """Groups of numbers with a scale of their own, per tensor."""


class WeightQuantSection(QuantizerSection):
    """How weights are quantized."""

    quantized_initialization: GroupQuantizationSection = Field(default_factory=GroupQuantizationSection)
    """Quantize each weight as soon as it is made (inside ``zero.Init``)."""
    post_init_quant: dict[str, GroupQuantizationSection] = Field(default_factory=dict)
    """Quantize the weights of a finished model: a part of the module's name -> how."""


class WeightQuantizationSection(WeightQuantSection):
    """Keeps weights quantized, and restores them for each forward."""

    source = "spec/core.md 2.23, spec/inference.md 9"
    comes_with = "ds-inference"

    def is_on(self) -> bool:
        """Return whether anything is asked for; ``enabled``, which is true by default, quantizes nothing alone."""
        return self.enabled and self != type(self)()


class InferenceRanksSection(Section):
    """Which ranks divide the layers among themselves."""

    enabled: bool = True
    """Divide layers where ``tp_size`` is more than 1."""
    tp_size: PositiveInt = 1
    """Ranks that share a layer."""
    tp_grain_size: PositiveInt = 64
    """Rows or columns that stay together where a layer is divided."""
    mpu: Any = None
    """Object that knows the groups of ranks; only from Python."""
    tp_group: Any = None
    """Process group of those ranks; only from Python."""

    def is_on(self) -> bool:
        """Return whether layers are divided: among ``tp_size`` ranks, or those that a given object knows."""
        return self.enabled and (self.tp_size > 1 or self.mpu is not None or self.tp_group is not None)


class MoeSection(Section):
    """How experts of a mixture are divided among ranks."""

    enabled: bool = True
    """Divide the experts where the model has any."""
    ep_size: PositiveInt = 1
    """Ranks that share the experts of a layer."""
    moe_experts: tuple[PositiveInt, ...] = key("moe_experts", "num_experts", default=(1,))
    """Experts per layer, in all."""
    type: Literal["standard", "residual"] = "standard"
    """Experts in place of the dense block, or added to it (``residual``)."""
    ep_mp_group: Any = None
    """Process group of ranks that share one expert; only from Python."""
    ep_group: Any = key("ep_group", "expert_group", default=None)
    """Process group of ranks that share the experts of a layer; only from Python."""


class QkvQuantSection(Section):
    """Quantization of the projections to queries, keys and values."""

    enabled: bool = True
    """Quantize them."""


class QuantSection(Section):
    """Quantization; DeepSpeed checks these keys and acts on none of them."""

    enabled: bool = True
    """Quantize the model."""
    activation: QuantizerSection = Field(default_factory=QuantizerSection)
    """How activations are quantized."""
    weight: WeightQuantSection = Field(default_factory=WeightQuantSection)
    """How weights are quantized."""
    qkv: QkvQuantSection = Field(default_factory=QkvQuantSection)
    """Quantization of the projections to queries, keys and values."""


class CheckpointFilesSection(Section):
    """Where a checkpoint's files are; DeepSpeed checks these keys and acts on none of them."""

    checkpoint_dir: str | None = None
    """Folder of the checkpoint."""
    save_mp_checkpoint_path: str | None = None
    """Folder to write the divided weights to."""
    base_dir: str | None = None
    """Folder that names of files start from."""


def _int8(value: Any) -> Any:
    is_int8 = value == "torch.int8" or (type(value).__module__ == "torch" and str(value) == "torch.int8")
    return "int8" if is_int8 else value


InferenceDtype = Annotated[
    DtypeName | Literal["int8"],
    OneOf('allowed are "float16", "bfloat16", "float32" or "int8"'),
    BeforeValidator(_int8),
]
"""A dtype's own name as ``DtypeName`` reads it, or ``int8``."""


class InferenceSection(Section):
    """What ``init_inference`` takes. In a training configuration, clients read ``tensor_parallel.tp_size`` here."""

    source = "spec/core.md 2.24, spec/inference.md 2"
    comes_with = "ds-inference"

    replace_with_kernel_inject: bool = key("replace_with_kernel_inject", "kernel_inject", default=False)
    """Replace whole layers by fused ones."""
    dtype: InferenceDtype = "float16"
    """Dtype of the weights."""
    tensor_parallel: InferenceRanksSection = Field(
        default_factory=InferenceRanksSection,
        validation_alias=AliasChoices("tensor_parallel", "tp"),
        serialization_alias="tensor_parallel",
    )
    """Which ranks divide the layers among themselves."""
    enable_cuda_graph: bool = False
    """Record a forward as a CUDA graph and replay it; shapes of the inputs must not change."""
    use_triton: bool = False
    """Use Triton's kernels in replaced layers."""
    triton_autotune: bool = False
    """Find the fastest settings of those kernels first."""
    zero: ZeroSection = Field(default_factory=ZeroSection)
    """How the model's parameters are divided already; kept for the caller to read."""
    triangular_masking: bool = key("triangular_masking", "tm", default=True)
    """Each token sees those before it only; DeepSpeed goes by the kind of layer instead."""
    moe: Annotated[MoeSection, OrSwitch()] = Field(default_factory=MoeSection)
    """How experts of a mixture are divided among ranks; true or false is its ``enabled``."""
    keep_module_on_host: bool = False
    """Leave the weights in CPU memory."""
    quant: QuantSection = Field(default_factory=QuantSection)
    """Quantization."""
    checkpoint: Annotated[str | dict[str, Any] | None, OneOf("must be the path of a file, or an object")] = None
    """The checkpoint to load: the path of its JSON description, or the description."""
    base_dir: str = ""
    """Folder that names of files in that description start from."""
    set_empty_params: bool = False
    """Build replaced layers without memory for weights."""
    save_mp_checkpoint_path: str | None = None
    """Folder to write the divided weights to, so that the next start reads only its share; null writes none."""
    checkpoint_config: CheckpointFilesSection = Field(
        default_factory=CheckpointFilesSection,
        validation_alias=AliasChoices("checkpoint_config", "ckpt_config"),
        serialization_alias="checkpoint_config",
    )
    """Where a checkpoint's files are."""
    return_tuple: bool = True
    """Replaced layers return a tuple."""
    training_mp_size: PositiveInt = 1
    """Ranks that shared a layer when the weights were trained."""
    injection_policy: dict[Any, Any] | None = key("injection_policy", "injection_dict", default=None)
    """Class of a layer -> names of its linear layers whose outputs are summed over the ranks; only from Python."""
    injection_policy_tuple: tuple[Any, ...] | None = None
    """The same for one class; DeepSpeed's own use."""
    config: Any = key("config", "args", default=None)
    """Configuration of the model, in place of ``model.config``; only from Python."""
    max_out_tokens: PositiveInt = key("max_out_tokens", "max_tokens", default=1024)
    """Tokens of prompt and answer together, at most."""
    min_out_tokens: PositiveInt = key("min_out_tokens", "min_tokens", default=1)
    """Tokens that must fit into memory, else an error."""
    transposed_mode: bool = False
    """Weights are kept with their two dims swapped, as the hybrid engine does."""

    replace_method: Annotated[Any, NoEffect("DeepSpeed ignores it too")] = "auto"
    """Deprecated: how layers used to be found; any value is accepted."""
    mp_size: Annotated[PositiveInt, Moved("tensor_parallel", "tp_size")] = 1
    """Deprecated: read as ``tensor_parallel.tp_size``."""
    mpu: Annotated[Any, Moved("tensor_parallel", "mpu")] = None
    """Deprecated: read as ``tensor_parallel.mpu``."""
    ep_size: Annotated[PositiveInt, Moved("moe", "ep_size")] = 1
    """Deprecated: read as ``moe.ep_size``."""
    ep_group: Annotated[Any, Moved("moe", "ep_group")] = key("ep_group", "expert_group", default=None)
    """Deprecated: read as ``moe.ep_group``."""
    ep_mp_group: Annotated[Any, Moved("moe", "ep_mp_group")] = key("ep_mp_group", "expert_mp_group", default=None)
    """Deprecated: read as ``moe.ep_mp_group``."""
    moe_experts: Annotated[tuple[PositiveInt, ...], Moved("moe", "moe_experts")] = (1,)
    """Deprecated: read as ``moe.moe_experts``."""
    moe_type: Annotated[Literal["standard", "residual"], Moved("moe", "type")] = "standard"
    """Deprecated: read as ``moe.type``."""

    @classmethod
    def prepare(cls, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Read deprecated keys as their replacements; one that contradicts its replacement stays, and is refused."""
        return move(cls, super().prepare(data))

    def is_on(self) -> bool:
        """Return whether anything but the defaults is asked for, ``replace_method`` aside, which nobody reads."""
        return super(InferenceSection, self.model_copy(update={"replace_method": "auto"})).is_on()
