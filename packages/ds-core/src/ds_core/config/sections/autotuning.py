"""Section ``autotuning``: the search for a fast configuration by short real training jobs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ds_core.config.section import Count, PositiveInt, Section

__all__ = ["AutotuningSection", "ModelInfoSection"]


class ModelInfoSection(Section):
    """What is known of the model beforehand; with ``num_params`` no job is run to find it."""

    source = "spec/core.md 2.20, spec/launcher.md 10"

    profile: bool = False
    """Run a job that measures the model."""
    num_params: PositiveInt | None = None
    """Parameters of the whole model; null measures them."""
    hidden_size: PositiveInt | None = None
    """Width of a layer, in elements."""
    num_layers: PositiveInt | None = None
    """Layers of the model."""


class AutotuningSection(Section):
    """Search of the ZeRO stage, the micro-batch size and ZeRO's bucket sizes by short training jobs."""

    source = "spec/core.md 2.20, spec/launcher.md 10"
    comes_with = "ds-core"

    enabled: bool = False
    """Measure this run: it writes its metrics after ``end_profile_step`` and ends."""
    fast: bool = True
    """Search the stage and the micro-batch size only, not ZeRO's bucket sizes and switches."""
    results_dir: Annotated[str, Field(min_length=1)] = "autotuning_results"
    """Folder of the results, one sub-folder per experiment."""
    exps_dir: Annotated[str, Field(min_length=1)] = "autotuning_exps"
    """Folder of the descriptions of the experiments."""
    overwrite: bool = True
    """Delete both folders before the search."""
    start_profile_step: Count = 3
    """Step from which an experiment is measured."""
    end_profile_step: Count = 5
    """Step after which an experiment ends."""
    metric: Literal["throughput", "latency", "flops", "forward", "step"] = "throughput"
    """What is made better: samples per second, time per step, FLOPS per GPU, or the time of forward or of step."""
    metric_path: str | None = None
    """File that an experiment writes its metrics to; null is ``autotuning_metric.json`` in the working folder."""
    tuner_type: Literal["gridsearch", "random", "model_based"] = "gridsearch"
    """Order in which experiments are tried: all in turn, at random, or led by a cost model (needs xgboost)."""
    tuner_early_stopping: Count = 5
    """Experiments in a row without gain after which the search of a stage ends."""
    tuner_num_trials: PositiveInt = 50
    """Experiments tried at most in a stage."""
    arg_mappings: dict[str, str] | None = None
    """Key of this configuration -> flag of the training script that means the same, so that both are set."""
    model_info: ModelInfoSection | None = None
    """What is known of the model beforehand; null measures it."""
    model_info_path: str | None = None
    """File that the measured model is written to; null is ``autotuning_model_info.json`` in the working folder."""
    mp_size: PositiveInt = 1
    """Ranks that share one copy of the model (model parallelism)."""
    max_train_batch_size: PositiveInt | None = None
    """Largest global batch tried, in samples; null for no limit."""
    min_train_batch_size: PositiveInt = 1
    """Smallest global batch tried, in samples."""
    max_train_micro_batch_size_per_gpu: PositiveInt = 1024
    """Largest micro-batch tried, in samples."""
    min_train_micro_batch_size_per_gpu: PositiveInt = 1
    """Smallest micro-batch tried, in samples."""
    num_tuning_micro_batch_sizes: PositiveInt = 3
    """Micro-batch sizes tried per stage."""
