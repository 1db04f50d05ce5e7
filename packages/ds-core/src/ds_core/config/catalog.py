"""Which class checks which top-level section: those of :class:`Config`, the rarer ones below, and plugins' own.

The rarer ones are imported when a configuration has them: together they are most of the keys, and an import that checks
one configuration should not pay for all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ds_core.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ds_core.config.section import Section

__all__ = ["OFF_IF_FALSE", "RARE", "all_sections", "rare_section", "plugin_section"]

_SECTIONS = "ds_core.config.sections."
RARE: dict[str, str] = {
    "activation_checkpointing": "activation:ActivationCheckpointingSection",
    "aio": "storage:AioSection",
    "amp": "amp:AmpSection",
    "autotuning": "autotuning:AutotuningSection",
    "comet": "monitors:CometSection",
    "comms_logger": "profiling:CommsLoggerSection",
    "compile": "compilation:CompileSection",
    "compression_training": "compression:CompressionTrainingSection",
    "curriculum_learning": "data:CurriculumLearningSection",
    "data_efficiency": "data:DataEfficiencySection",
    "datastates_ckpt": "storage:DatastatesSection",
    "elasticity": "elasticity:ElasticitySection",
    "expert_parallel": "parallel:ExpertParallelSection",
    "flops_profiler": "profiling:FlopsProfilerSection",
    "hybrid_engine": "inference:HybridEngineSection",
    "inference": "inference:InferenceSection",
    "nebula": "storage:NebulaSection",
    "pipeline": "parallel:PipelineSection",
    "progressive_layer_drop": "data:ProgressiveLayerDropSection",
    "quantize_training": "compression:QuantizeTrainingSection",
    "sparse_attention": "compression:SparseAttentionSection",
    "tensor_parallel": "parallel:TensorParallelSection",
    "tensorboard": "monitors:TensorboardSection",
    "timers": "profiling:TimersSection",
    "wandb": "monitors:WandbSection",
    "weight_quantization": "inference:WeightQuantizationSection",
}
"""Top-level key -> module of ``ds_core.config.sections`` and class."""
OFF_IF_FALSE = ("datastates_ckpt",)
"""Sections that ``false`` leaves out, as null does: without a switch of their own, their presence turns them on."""


def rare_section(name: str) -> type[Section]:
    """Return the class of section ``name`` of :data:`RARE`."""
    module, _, class_name = RARE[name].partition(":")
    found: type[Section] = getattr(import_module(_SECTIONS + module), class_name)
    return found


def plugin_section(name: str) -> type[Section]:
    """Return the class that a plugin of the seam ``config`` brings for section ``name``.

    Raises:
        PluginError: it cannot be loaded, or is not a section.
    """
    from ds_core import registry  # slow to import, and few configurations need it
    from ds_core.config.section import Section

    found = registry.load("config", name)
    if not (isinstance(found, type) and issubclass(found, Section)):
        raise PluginError(
            f"the class of a section must derive from ds_core.config.Section, got {found!r}",
            where=f"entry point {name!r} of group 'ds_core.config'",
            fix="report it to the package's authors",
        )
    return found


def all_sections() -> Mapping[str, type[Section]]:
    """Return every top-level section of DeepSpeed's and ours -> its class, in alphabetical order; plugins' left out."""
    from ds_core.config.config import Config
    from ds_core.config.paths import sections_of

    return dict(sorted({**sections_of(Config), **{name: rare_section(name) for name in RARE}}.items()))
