"""Which package brings which name: the small table behind every "pip install ..." in an error."""

from __future__ import annotations

__all__ = ["PACKAGE_OF_ATTRIBUTE", "PACKAGE_OF_PLUGIN", "LATER"]

PACKAGE_OF_PLUGIN: dict[tuple[str, str], str] = {
    ("precision", "fp16"): "ds-fp16",
    ("precision", "bf16"): "ds-fp16",
    ("precision", "torch_autocast"): "ds-fp16",
    ("partition", "1"): "ds-zero",
    ("partition", "2"): "ds-zero",
    ("partition", "3"): "ds-zero",
    ("optimizer", "lamb"): "ds-kernels",
    ("optimizer", "lion"): "ds-kernels",
    ("optimizer", "muon"): "ds-kernels",
    ("optimizer", "onebitadam"): "ds-kernels",
    ("optimizer", "onebitlamb"): "ds-kernels",
    ("optimizer", "zerooneadam"): "ds-kernels",
    ("checkpoint", "sharded"): "ds-ckpt",
    ("checkpoint", "async"): "ds-ckpt",
    ("activation", "deepspeed"): "ds-activation",
    ("ops", "triton"): "ds-kernels",
    ("engine", "pipeline"): "ds-pipe",
    ("engine", "hybrid"): "ds-inference",
    ("cli", "run"): "ds-launcher",
    ("cli", "ckpt"): "ds-ckpt",
    ("cli", "activation"): "ds-activation",
    **{
        ("runner", name): "ds-launcher"
        for name in ("local", "ssh", "pdsh", "slurm", "openmpi", "mpich", "impi", "mvapich")
    },
}
"""(seam, entry name) -> distribution."""

PACKAGE_OF_ATTRIBUTE: dict[str, tuple[str, str]] = {
    "zero": ("ds-zero", "ds_zero"),
    "pipe": ("ds-pipe", "ds_pipe"),
    "PipelineModule": ("ds-pipe", "ds_pipe"),
    "PipelineEngine": ("ds-pipe", "ds_pipe"),
    "DeepSpeedTransformerLayer": ("ds-kernels", "ds_kernels"),
    "DeepSpeedTransformerConfig": ("ds-kernels", "ds_kernels"),
    "init_inference": ("ds-inference", "ds_inference"),
    "default_inference_config": ("ds-inference", "ds_inference"),
    "InferenceEngine": ("ds-inference", "ds_inference"),
    "DeepSpeedInferenceConfig": ("ds-inference", "ds_inference"),
    "DeepSpeedHybridEngine": ("ds-inference", "ds_inference"),
    "module_inject": ("ds-inference", "ds_inference.module_inject"),
    "replace_transformer_layer": ("ds-inference", "ds_inference"),
    "revert_transformer_layer": ("ds-inference", "ds_inference"),
    "tp_model_init": ("ds-inference", "ds_inference"),
    "set_autotp_mode": ("ds-inference", "ds_inference"),
    "inference": ("ds-inference", "ds_inference"),
    "model_implementations": ("ds-inference", "ds_inference.model_implementations"),
}
"""Root name -> (distribution, module that has it: itself, where the module is called like the name)."""

LATER: dict[str, str] = {
    "OnDevice": "ds-core",
    "add_tuning_arguments": "ds-core",
    "set_optimizer_flags": "ds-kernels",
    "profiling": "ds-core",
    "autotuning": "ds-core",
    "compression": "ds-core",
    "linear": "ds-kernels",
    "moe": "ds-zero",
    "domino": "ds-zero",
    "compile": "ds-core",
    "DeepSpeedOptimizerCallable": "ds-core",
    "DeepSpeedSchedulerCallable": "ds-core",
    "is_compile_supported": "ds-core",
    "HAS_TRITON": "ds-kernels",
    "io": "ds-ckpt",
    "nebula": "ds-ckpt",
    "constants": "ds-compat",
    "dist": "ds-compat",
    "runtime": "ds-compat",
}
"""Root names of DeepSpeed's that come with a later release of the named package."""
