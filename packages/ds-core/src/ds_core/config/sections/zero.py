"""Section ``zero_optimization``, checked here and carried out by the partition plugins ``1``, ``2`` and ``3``."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ds_core.config.section import Count, Fraction, Int, NoEffect, NotBuilt, PositiveInt, Section, key

__all__ = [
    "LeafModuleSection",
    "OffloadOptimizerSection",
    "OffloadParamSection",
    "ZenFlowSection",
    "ZeroSection",
    "ZeroppLocoSection",
]

Device = Literal["none", "cpu", "nvme"]


def _only_at(*stages: int) -> NoEffect:
    """Mark a key that only ``stages`` read."""
    words = " and ".join(map(str, stages))
    return NoEffect(
        f"only stage{'s' if len(stages) > 1 else ''} {words} read{'' if len(stages) > 1 else 's'} it",
        when=lambda config: config.zero_optimization.stage not in stages,
    )


AT_1_AND_2 = _only_at(1, 2)
AT_3 = _only_at(3)
EVERY_CHECKPOINT_IS = NoEffect("every checkpoint loads at any world size")
ALWAYS_FLAT = NoEffect("a gradient is copied into a flat bucket as soon as it is there, whatever this says")
ALWAYS_SCATTERED = NoEffect("every bucket is divided over all ranks by the primitive that is fastest on the backend")
ALWAYS_GATHERED = NoEffect("every bucket of weights is divided over all ranks, so it is all-gathered")
GATHERED_BY_BUCKET = NoEffect("weights are gathered in the buckets that gradients are reduced in: reduce_bucket_size")
ALWAYS_OVERLAPPED = NoEffect(
    "at stages 1 and 2 buckets are reduced while backward runs, which takes no more memory",
    when=lambda config: config.zero_optimization.stage < 3,
)
ALWAYS_EVEN = NoEffect("every rank owns an equal part of each bucket, so none has more gradients to copy than another")


class _OffloadSection(Section):
    """What both kinds of offload have."""

    device: Device = "none"
    """``cpu`` memory, files (``nvme``), or not at all."""
    nvme_path: str | None = None
    """Folder of the files."""

    def is_on(self) -> bool:
        return self.device != "none"

    def why_off(self) -> str:
        return "" if self.is_on() else 'device is "none"'


class OffloadParamSection(_OffloadSection):
    """Where parameters wait between their uses (stage 3). Not built yet."""

    buffer_count: PositiveInt = 5
    """Buffers for reading and writing files."""
    buffer_numel: Count = key("buffer_size", default=100_000_000)
    """Elements in each of them."""
    max_in_cpu: Count = 1_000_000_000
    """Elements kept in CPU memory when the device is ``nvme``."""
    pin_memory: bool = True
    """Page-locked CPU memory: faster copies, more memory."""


class OffloadOptimizerSection(_OffloadSection):
    """Where optimizer state lives (stages 1 to 3). Not built yet: ``initialize`` refuses any device."""

    buffer_count: PositiveInt = 4
    """Buffers for reading and writing files: one per state tensor, and one each for weight and gradient."""
    pin_memory: bool = True
    """Page-locked CPU memory: faster copies, more memory."""
    pipeline_read: bool = False
    """Read the next tile while this one is updated."""
    pipeline_write: bool = False
    """Write the last tile while this one is updated."""
    fast_init: bool = False
    """Initialise the files without going through the CPU optimizer."""
    ratio: Fraction = 1.0
    """Share of the parameters that are updated on the CPU; below 1 at stage 3 only."""
    super_offload: bool = False
    """DeepSpeed's SuperOffload."""
    cpuadam_cores_perc: Fraction = 0.8
    """Share of the CPU cores given to the optimizer under SuperOffload."""

    @property
    def pipeline(self) -> bool:
        """Whether reading or writing overlaps with the update."""
        return self.pipeline_read or self.pipeline_write


class ZenFlowSection(Section):
    """Updates important gradients at once and the rest later, on the CPU."""

    topk_ratio: Fraction = 0.1
    """Share of the gradient columns that count as important."""
    select_strategy: Literal["auto", "step", "epoch"] = "auto"
    """What ``select_interval`` counts."""
    select_interval: PositiveInt | None = None
    """Steps or epochs between two selections; null chooses."""
    update_interval: PositiveInt | None = None
    """Steps between two updates of the rest; null chooses."""
    overlap_step: bool = False
    """Run the CPU update beside the next forward and backward."""
    offload: bool = False
    """Keep the selected optimizer state on the CPU."""
    auto_ratio: Fraction = 0.99
    """Share of the gradient that triggers an update where the interval is chosen."""
    full_warm_up_rounds: Count = 0
    """Rounds in which everything is updated at once."""
    pt_reserved_cores_perc: Fraction = 0.5
    """Share of the CPU cores kept for torch."""
    steps_per_epoch: PositiveInt | None = None
    """Steps per epoch, where the strategy counts epochs."""


class ZeroppLocoSection(Section):
    """Error feedback of the quantized gradients of ZeRO++."""

    err_beta: Fraction = 0.8
    """Decay of the carried error."""
    reset_T: PositiveInt = 1024  # noqa: N815 - the key users write
    """Steps after which the carried error is forgotten."""


def _names(value: Any) -> Any:
    # A string is one name, and a name twice is meant once.
    return list(dict.fromkeys([value] if isinstance(value, str) else value)) if _is_name_list(value) else value


def _is_name_list(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value))


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class LeafModuleSection(Section):
    """Modules whose parameters are gathered together, as experts are (stage 3)."""

    classes: Names = (
        "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
        "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
        "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
    )
    """Dotted class names."""
    names: Names = ()
    """Module names."""
    name_suffixes: Names = ()
    """Endings of module names."""


class ZeroSection(Section):
    """Which of optimizer state, gradients and parameters are divided among the ranks, and how."""

    source = "spec/core.md 2.8, spec/zero.md 2"

    stage: Annotated[Int, Field(ge=0, le=3)] = 0
    """0: nothing is divided; 1: optimizer state; 2: and gradients; 3: and parameters."""
    contiguous_gradients: Annotated[bool, ALWAYS_FLAT] = True
    """Copy gradients into one buffer as they appear, which is what always happens."""
    reduce_scatter: Annotated[bool, ALWAYS_SCATTERED] = True
    """Reduce-scatter gradients instead of all-reducing them, which is what always happens."""
    reduce_bucket_numel: Count = key("reduce_bucket_size", default=500_000_000)
    """Elements of gradient reduced at once, and of weights gathered; where the key is not given, up to 25 MiB."""
    use_multi_rank_bucket_allreduce: Annotated[bool, ALWAYS_SCATTERED] = True
    """One bucket may hold gradients of several owners: here each belongs to all ranks (stages 1 and 2)."""
    allgather_partitions: Annotated[bool, ALWAYS_GATHERED] = True
    """All-gather updated parameters instead of broadcasting them, which is what always happens."""
    allgather_bucket_numel: Annotated[Count, GATHERED_BY_BUCKET] = key("allgather_bucket_size", default=500_000_000)
    """Elements of parameters gathered at once; here ``reduce_bucket_size`` sets both."""
    overlap_comm: Annotated[bool | None, ALWAYS_OVERLAPPED] = None
    """Reduce gradients while backward still runs, which always happens; null reads as true at stage 3, false below."""
    load_from_fp32_weights: Annotated[bool, AT_1_AND_2] = True
    """Load the masters of 16-bit weights with all their digits; false: begin them from the weights."""
    elastic_checkpoint: Annotated[bool, EVERY_CHECKPOINT_IS] = False
    """Has no effect: every checkpoint loads at any world size."""
    offload_param: OffloadParamSection | None = None
    """Where parameters wait between their uses; not built yet."""
    offload_optimizer: OffloadOptimizerSection | None = None
    """Where optimizer state lives; not built yet: any device but ``none`` is refused at stages 1 and 2."""
    zenflow: ZenFlowSection | None = None
    """Split updates of important and other gradients; not built yet: refused at stages 1 and 2."""
    sub_group_numel: Annotated[Count, AT_3] = key("sub_group_size", default=1_000_000_000)
    """Elements updated at once (stage 3)."""
    prefetch_bucket_numel: Annotated[Count, AT_3] = key(
        "stage3_prefetch_bucket_size", "prefetch_bucket_size", default=50_000_000
    )
    """Elements gathered ahead of their use."""
    param_persistence_threshold: Annotated[Count, AT_3] = key("stage3_param_persistence_threshold", default=100_000)
    """Parameters with fewer elements stay whole on every rank."""
    model_persistence_threshold: Annotated[Count, AT_3] = key("stage3_model_persistence_threshold", default=sys.maxsize)
    """Elements that may stay whole in all."""
    max_live_parameters: Annotated[Count, AT_3] = key("stage3_max_live_parameters", default=1_000_000_000)
    """Elements that may be gathered at one time."""
    max_reuse_distance: Annotated[Count, AT_3] = key("stage3_max_reuse_distance", default=1_000_000_000)
    """A parameter used again within this many elements is kept gathered."""
    gather_16bit_weights_on_model_save: Annotated[bool, AT_3] = key(
        "stage3_gather_16bit_weights_on_model_save", default=False
    )
    """``save_16bit_model`` may gather the whole model."""
    module_granularity_threshold: Annotated[Count, AT_3] = key("stage3_module_granularity_threshold", default=0)
    """Modules with fewer elements per layer are gathered as one; 0 for none."""
    use_all_reduce_for_fetch_params: Annotated[bool, AT_3] = key(
        "stage3_use_all_reduce_for_fetch_params", default=False
    )
    """Gather parameters by all-reduce."""
    allgather_sequential: Annotated[bool, AT_3] = key("stage3_allgather_sequential", default=False)
    """Gather parameters one after another."""
    ignore_unused_parameters: Annotated[bool, AT_1_AND_2] = True
    """A parameter that no rank has a gradient of is no error; false: the step raises one with the names."""
    legacy_stage1: Annotated[bool, NotBuilt(False, why="which was removed from DeepSpeed")] = False
    """DeepSpeed's first stage 1."""
    round_robin_gradients: Annotated[bool, ALWAYS_EVEN] = False
    """Spread the copies of gradients to the CPU over the ranks."""
    zero_hpz_partition_size: Annotated[PositiveInt, AT_3] = 1
    """Ranks among which a second copy of the parameters is divided (ZeRO++)."""
    zero_quantized_weights: Annotated[bool, AT_3] = False
    """Gather int8 weights (ZeRO++)."""
    zero_quantized_nontrainable_weights: Annotated[bool, AT_3] = False
    """Keep frozen weights in int8 (ZeRO++)."""
    zero_quantized_gradients: Annotated[bool, AT_3] = False
    """Reduce int4 gradients (ZeRO++)."""
    zeropp_loco_param: Annotated[ZeroppLocoSection | None, AT_3] = None
    """Error feedback of the quantized gradients."""
    mics_shard_size: Annotated[Int, AT_3] = -1
    """Ranks among which everything is divided; -1 for all (MiCS)."""
    mics_hierarchical_params_gather: Annotated[bool, AT_3] = False
    """Gather inside a node first (MiCS)."""
    memory_efficient_linear: Annotated[bool, AT_3] = True
    """Linear layers save no gathered weight for backward (stage 3)."""
    pipeline_loading_checkpoint: Annotated[bool, AT_3] = False
    """Ranks load one after another (stage 3)."""
    override_module_apply: Annotated[bool, AT_3] = True
    """``module.apply`` sees gathered parameters (stage 3)."""
    log_trace_cache_warnings: Annotated[bool, AT_3] = False
    """Log when the order of modules changes."""
    enable_sanity_checks: Annotated[bool, AT_3] = False
    """Check what is gathered at every use."""
    save_muon_momentum_buffer_in_memory: Annotated[bool, AT_3] = False
    """Keep Muon's momentum on the device."""
    leaf_module: Annotated[LeafModuleSection, AT_3] = Field(default_factory=LeafModuleSection)
    """Modules whose parameters are gathered together."""

    def is_on(self) -> bool:
        return self.stage > 0

    def why_off(self) -> str:
        return "" if self.is_on() else "zero_optimization.stage is 0"

    @model_validator(mode="after")
    def _derive(self) -> ZeroSection:
        if self.overlap_comm is None:
            # Straight into __dict__: the section is frozen, and the key must not count as given by the user.
            self.__dict__["overlap_comm"] = self.stage == 3
        return self
