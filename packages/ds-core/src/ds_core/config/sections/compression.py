"""Sections ``compression_training``, ``quantize_training`` and ``sparse_attention``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from ds_core.config.section import Count, Number, PositiveInt, Section
from ds_core.config.sections.techniques import (
    ActivationQuantizationSection,
    ChannelPruningSection,
    HeadPruningSection,
    Names,
    RowPruningSection,
    SparsePruningSection,
    WeightQuantizationTrainingSection,
)

__all__ = [
    "CompressionTrainingSection",
    "EigenvalueSection",
    "LayerReductionSection",
    "QuantizeTrainingSection",
    "SparseAttentionSection",
]


class LayerReductionSection(Section):
    """A student with fewer layers, which begins as some of the teacher's."""

    source = "spec/core.md 2.22"

    enabled: bool = False
    """Copy layers of the teacher into the student."""
    keep_number_layer: PositiveInt | None = None
    """Layers of the student."""
    module_name_prefix: str | None = None
    """Name of the module that holds the layers, such as ``bert.encoder.layer``."""
    teacher_layer: tuple[Count, ...] | None = None
    """Indexes of the teacher's layers that are copied, from 0."""
    other_module_name: Names | None = None
    """Names of further modules that are copied."""


class CompressionTrainingSection(Section):
    """Training of a smaller model: quantization, pruning, fewer layers. On as soon as one technique is enabled."""

    source = "spec/core.md 2.22"
    comes_with = "ds-core"

    weight_quantization: WeightQuantizationTrainingSection = Field(default_factory=WeightQuantizationTrainingSection)
    """Weights of few bits."""
    activation_quantization: ActivationQuantizationSection = Field(default_factory=ActivationQuantizationSection)
    """Activations of few bits."""
    sparse_pruning: SparsePruningSection = Field(default_factory=SparsePruningSection)
    """Single weights become zero."""
    row_pruning: RowPruningSection = Field(default_factory=RowPruningSection)
    """Rows of weights become zero."""
    head_pruning: HeadPruningSection = Field(default_factory=HeadPruningSection)
    """Attention heads become zero."""
    channel_pruning: ChannelPruningSection = Field(default_factory=ChannelPruningSection)
    """Channels of convolutions become zero."""
    layer_reduction: LayerReductionSection = Field(default_factory=LayerReductionSection)
    """Fewer layers."""

    def is_on(self) -> bool:
        return any(isinstance(technique, Section) and technique.is_on() for _, technique in self)


class EigenvalueSection(Section):
    """Largest eigenvalues of the layers' Hessians, which set how fast bits fall.

    In DeepSpeed it is part of ``quantize_training``, and can never be on: there it is refused once it is enabled.
    """

    source = "spec/core.md 2.23"
    comes_with = "ds-core"

    enabled: bool = False
    """Compute the eigenvalues."""
    verbose: bool = False
    """Log them."""
    max_iter: PositiveInt = 100
    """Power iterations at most."""
    tol: Annotated[Number, Field(ge=0)] = 1e-2
    """Relative change of an eigenvalue below which the iteration ends."""
    stability: Annotated[Number, Field(ge=0)] = 1e-6
    """Added to a norm before it divides."""
    gas_boundary_resolution: PositiveInt = 1
    """Optimizer steps between two computations."""
    layer_name: str = "bert.encoder.layer"
    """Name of the module that holds the layers."""
    layer_num: Count = 0
    """Layers it holds."""


class QuantizeTrainingSection(Section):
    """DeepSpeed's first quantization while training (MoQ); ``compression_training`` replaced it.

    Keys beside the two below are kept as they are given.
    """

    model_config = ConfigDict(extra="allow")

    source = "spec/core.md 2.23"
    comes_with = "ds-core"

    enabled: bool = False
    """Quantize weights while training."""
    eigenvalue: EigenvalueSection = Field(default_factory=EigenvalueSection)
    """Eigenvalues that set how fast bits fall."""

    def is_on(self) -> bool:
        # Without its switch, any further key asks for something that nobody would do.
        asked = bool(self.__pydantic_extra__) and "enabled" not in self.model_fields_set
        return self.enabled or self.eigenvalue.is_on() or asked


class SparseAttentionSection(Section):
    """Layout of a sparse attention. DeepSpeed only parses it too: a model reads it and builds its attention."""

    source = "spec/core.md 2.23, spec/kernels.md 12"
    no_effect = "it is only kept for the model to read, as in DeepSpeed; no attention is replaced"

    mode: Literal["fixed", "dense", "variable", "bigbird", "bslongformer"] = "fixed"
    """Pattern of the blocks that are computed."""
    block: PositiveInt = 16
    """Rows and columns of a block, in tokens."""
    different_layout_per_head: bool = False
    """Every head may have a layout of its own."""
    num_local_blocks: PositiveInt = 4
    """``fixed``: blocks of a local window."""
    num_global_blocks: PositiveInt = 1
    """``fixed``, ``bigbird``: blocks that every token attends to; of each window in ``fixed``."""
    attention: Literal["bidirectional", "unidirectional"] = "bidirectional"
    """Whether a token attends to later ones."""
    horizontal_global_attention: bool = False
    """``fixed``, ``variable``: global blocks attend to every token too; bidirectional only."""
    num_different_global_patterns: PositiveInt = 1
    """``fixed``: choices of global blocks, spread over the heads; above 1 with a layout per head only."""
    num_random_blocks: Count = 0
    """``variable``, ``bigbird``: random blocks per row of blocks."""
    local_window_blocks: tuple[PositiveInt, ...] = (4,)
    """``variable``: blocks of each local window; the last size repeats."""
    global_block_indices: tuple[Count, ...] = (0,)
    """``variable``, ``bslongformer``: indexes of the global blocks, or of the first of each range of them."""
    global_block_end_indices: tuple[Count, ...] | None = None
    """``variable``, ``bslongformer``: index after the last of each range; null for single blocks."""
    num_sliding_window_blocks: PositiveInt = 3
    """``bigbird``, ``bslongformer``: blocks of the window around each row of blocks."""
