"""Sections of parallelism beyond data: ``pipeline``, ``tensor_parallel`` and ``expert_parallel``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ds_core.config.section import Count, DtypeName, Int, NotBuilt, Number, PositiveInt, Section, key
from ds_core.config.sections.values import AutoCount, AutoNumber, OneOf, Pattern, compilable

__all__ = [
    "ExpertParallelSection",
    "LayerSpecSection",
    "PartitionConfigSection",
    "PipelineSection",
    "TensorParallelSection",
    "TensorRanksSection",
]


def _partition(method: str) -> str:
    # DeepSpeed lowers the whole word; here only the part that is not the user's expression.
    kind, colon, pattern = method.partition(":")
    kind = kind.lower()
    if colon and kind == "type":
        return f"type:{compilable(pattern)}"
    if colon or kind not in ("best", "uniform", "parameters"):
        raise PydanticCustomError("partition", 'allowed are "best", "uniform", "parameters" or "type:REGEX"')
    return kind


class PipelineSection(Section):
    """How a ``PipelineModule`` runs; DeepSpeed takes stages and their layers from the module, whatever stands here."""

    source = "spec/core.md 2.15, spec/pipeline.md 5"
    comes_with = "ds-pipe"

    stages: AutoCount = "auto"
    """Number of stages; DeepSpeed ignores it and asks the module."""
    partition: Annotated[str, AfterValidator(_partition)] = "best"
    """How layers are divided among stages: ``best``, ``uniform``, ``parameters`` or ``type:REGEX``, the expression
    for names of classes; DeepSpeed ignores it and asks the module."""
    seed_layers: bool = False
    """Seed the random numbers anew for each layer; DeepSpeed ignores it and asks the module."""
    activation_checkpoint_interval: Count = 0
    """Layers whose activations are computed again together in backward; 0 leaves it to the module."""
    pipe_partitioned: bool = True
    """Divide activations sent between stages among the model-parallel ranks."""
    grad_partitioned: bool = True
    """Divide gradients sent between stages among the model-parallel ranks."""
    use_reentrant: bool = True
    """Compute activations again by the reentrant kind of checkpointing; null is the default."""


class TensorRanksSection(Section):
    """Which ranks divide the layers among themselves."""

    tp_size: PositiveInt = 1
    """Ranks that share a layer: 1, or what ``autotp_size`` says."""
    tp_grain_size: PositiveInt = 1
    """Rows or columns that stay together where a layer is divided."""
    mpu: Any = None
    """Object that knows the groups of ranks; only from Python."""
    tp_group: Any = None
    """Process group of those ranks; only from Python."""


ShapeEntry = Int | tuple[PositiveInt, ...]


class LayerSpecSection(Section):
    """How the layers whose names match are divided."""

    patterns: tuple[Pattern, ...] = ()
    """Regular expressions for parameter names (``<path of the module>.weight``), matched from the start."""
    partition_type: Literal["column", "row", "skip"] = "column"
    """Divide the outputs (``column``), the inputs (``row``), or nothing (``skip``)."""
    shape: Annotated[
        tuple[ShapeEntry, ...] | None,
        OneOf("must be a list of whole numbers, one of which may be a list itself"),
    ] = None
    """Shape to view the weight in before it is divided, in elements: -1 is found, and a list inside gives blocks of
    unequal size along the dim that is divided. Null: the weight's own shape."""
    partition_dim: Annotated[Int, Field(ge=0)] | None = None
    """Dim of that shape that is divided; null is 0 for ``column`` and 1 for ``row``."""
    model_types: tuple[str, ...] | None = None
    """Values of ``config.model_type`` that the rule holds for, in any case; null is all models."""
    gather_output: bool = False
    """Gather the output on every rank (``column`` only, and without ``shape``)."""
    grad_allreduce: bool = False
    """Sum the gradient over the ranks that share the layer (``skip`` only)."""

    @field_validator("shape")
    @classmethod
    def _check_shape(cls, shape: tuple[ShapeEntry, ...] | None) -> tuple[ShapeEntry, ...] | None:
        entries = shape or ()
        if any(isinstance(entry, int) and entry < 1 and entry != -1 for entry in entries):
            raise PydanticCustomError("shape", "every number must be -1 or at least 1")
        if entries.count(-1) > 1:
            raise PydanticCustomError("shape", "-1 may stand there once")
        if sum(isinstance(entry, tuple) for entry in entries) > 1:
            raise PydanticCustomError("shape", "only one list may be inside: that of the dim that is divided")
        return shape

    @field_validator("gather_output")
    @classmethod
    def _check_gather(cls, gather_output: bool, info: ValidationInfo) -> bool:
        if gather_output and info.data.get("partition_type", "column") != "column":
            raise PydanticCustomError("gather_output", 'it is possible with "partition_type": "column" only')
        if gather_output and info.data.get("shape") is not None:
            raise PydanticCustomError("gather_output", 'it is not possible with "shape"')
        return gather_output

    @field_validator("grad_allreduce")
    @classmethod
    def _check_allreduce(cls, grad_allreduce: bool, info: ValidationInfo) -> bool:
        if grad_allreduce and info.data.get("partition_type", "skip") != "skip":
            raise PydanticCustomError("grad_allreduce", 'it is possible with "partition_type": "skip" only')
        return grad_allreduce


class PartitionConfigSection(Section):
    """Rules of one's own for dividing layers; the first that matches a layer holds."""

    use_default_specs: bool = True
    """Let the rules of ``preset_model`` follow these."""
    strict_mode: bool = False
    """A linear layer that no rule matches is an error instead of being kept whole."""
    tp_size: PositiveInt | None = None
    """Ranks that share a layer; null is what ``autotp_size`` says."""
    embedding_partition_dim: Annotated[Int, Field(ge=0)] = 1
    """Dim along which embeddings are divided; DeepSpeed never reads it."""
    lm_head_patterns: tuple[str, ...] = ("lm_head", "embed_out")
    """Names of the layer that makes logits; DeepSpeed never reads them."""
    layer_specs: tuple[LayerSpecSection, ...] = ()
    """The rules."""


class TensorParallelSection(Section):
    """Divides linear layers and embeddings among ranks while training (AutoTP)."""

    source = "spec/core.md 2.16, spec/inference.md 7"
    comes_with = "ds-inference"

    autotp_size: Count = 0
    """Ranks that share a layer; 0 and 1 divide nothing."""
    dtype: DtypeName = "float16"
    """Dtype of the divided layers; DeepSpeed takes a ``torch.dtype`` only."""
    tp_overlap_comm: bool = False
    """Sum gradients of inputs over the ranks while those of weights are computed."""
    tensor_parallel: TensorRanksSection = Field(
        default_factory=TensorRanksSection,
        validation_alias=AliasChoices("tensor_parallel", "tp"),
        serialization_alias="tensor_parallel",
    )
    """Which ranks divide the layers among themselves."""
    preset_model: Literal["llama", "bloom", "chatglm", "mixtral", "deepseek_v2", "qwen2", "phi3"] | None = None
    """Family of models whose rules are used; null finds rules by the model."""
    partition_config: PartitionConfigSection | None = None
    """Rules of one's own, before those of ``preset_model``."""
    injection_policy_tuple: tuple[Any, ...] | None = None
    """Names of layers whose outputs are summed, for models that no rule fits."""
    keep_module_on_host: bool = False
    """Leave the divided weights in CPU memory."""
    replace_with_kernel_inject: bool = key("replace_with_kernel_inject", "kernel_inject", default=False)
    """Replace whole layers by fused ones."""

    @field_validator("tensor_parallel")
    @classmethod
    def _check_size(cls, ranks: TensorRanksSection, info: ValidationInfo) -> TensorRanksSection:
        allowed = info.data.get("autotp_size", ranks.tp_size)
        if ranks.tp_size not in (1, allowed):
            raise PydanticCustomError(
                "tp_size",
                '"tp_size" must be 1 or equal "autotp_size", which is {allowed}',
                {"allowed": allowed},
            )
        return ranks

    def is_on(self) -> bool:
        """Return whether more than one rank shares a layer; without that the other keys mean nothing."""
        return self.autotp_size > 1 or self.tensor_parallel.tp_size > 1


class ExpertParallelSection(Section):
    """Replaces mixture-of-experts blocks of Hugging Face models by ones whose experts are divided (AutoEP)."""

    source = "spec/core.md 2.23, spec/pipeline.md 9.4"
    comes_with = "ds-zero"

    enabled: bool = False
    """Replace the blocks."""
    autoep_size: PositiveInt = 1
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel_size: PositiveInt = 1
    """Ranks that share one expert."""
    validate_folding_routing: bool = False
    """Check that ranks which share an expert route alike."""
    preset_model: Literal["mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3"] | None = None
    """Family of models whose names are used; null finds it by the model. A key below that is given replaces its own."""
    moe_layer_pattern: Pattern | None = None
    """Regular expression for the paths of the blocks to replace."""
    expert_pattern: str | None = None
    """Name of the experts inside a block."""
    router_pattern: str | None = None
    """Name of the router inside a block."""
    use_grouped_mm: bool = True
    """Multiply for all experts of a rank at once."""
    disable_triton_grouped_mm: bool = False
    """Do that without Triton."""
    route_norm: bool | None = None
    """Scale the weights of the chosen experts to a sum of 1; null is as the model does."""
    route_scale: Number = 1.0
    """Factor of the weights of the chosen experts."""
    score_apply: Literal["auto", "pre", "post"] = "auto"
    """Multiply the weights before (``pre``) or after (``post``) the experts."""
    combine_impl: Literal["auto", "weighted_sum", "legacy_bmm"] = "auto"
    """How the outputs of the chosen experts are added up."""
    score_func: Literal["auto", "softmax", "sigmoid"] = "auto"
    """From the router's outputs to weights."""
    top_k: AutoCount = "auto"
    """Experts per token; ``"auto"`` is as the model does."""
    routed_scaling_factor: AutoNumber = "auto"
    """The model's own factor of the routed experts' output; ``"auto"`` is as the model does."""
    num_expert_groups: PositiveInt | None = None
    """Groups that experts are chosen from; null is one."""
    num_limited_groups: PositiveInt | None = None
    """Groups of those that one token may choose from; null is all."""
    load_balance_coeff: Annotated[Number | None, NotBuilt(None, why="which DeepSpeed refuses too")] = None
    """Weight of a loss that evens out the experts; must be null."""
    expert_w1: str | None = None
    """Name of an expert's gate weight; null is the preset's."""
    expert_w2: str | None = None
    """Name of an expert's down weight; null is the preset's."""
    expert_w3: str | None = "auto"
    """Name of an expert's up weight; ``"auto"`` is the preset's, null says that ``expert_w1`` holds both."""
    num_experts_attr: str | None = None
    """Attribute of the model's config that has the number of experts; null is the preset's."""
    top_k_attr: str | None = None
    """Attribute of the model's config that has the experts per token; null is the preset's."""
    has_shared_experts: bool | None = None
    """Whether a block has experts that every token uses; null is as the preset says."""
    shared_experts_pattern: str | None = None
    """Name of those experts inside a block; null is the preset's."""
    shared_experts_gate_pattern: str | None = None
    """Name of their gate inside a block; null is the preset's."""
