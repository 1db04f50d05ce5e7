"""How much memory the model state takes, before anything is allocated: DeepSpeed's estimators (spec/zero.md 6.7).

Model state is parameters, gradients, masters and optimizer state; activations and buffers of collectives come on top.
The formulas are of an Adam and of 16-bit weights with fp32 masters, unless the keyword-only arguments say otherwise.

What is counted, per element (``w`` = bytes of a stored weight, 2 or 4; ``s`` = optimizer state, 8 for Adam):

- every parameter: ``w`` for the weight, once for parameters that share memory (tied weights);
- every trained one: 4 for the fp32 master if ``w`` is 2, ``s``, and 4 for the fp32 gradient that the optimizer reads;
- where 16-bit gradients accumulate beside that one (stage 2 on the GPU): ``w`` more.

>>> estimate_zero2_model_states_mem_needs(1_000_000, num_gpus_per_node=2, cpu_offload=False)
(12000000, 11000000)
>>> estimate_zero2_model_states_mem_needs_all_cold(2851e6, num_gpus_per_node=8)
Estimated memory needed for params, optim states and gradients for a:
HW: Setup with 1 node, 8 GPUs per node.
SW: Model with 2851M total params.
  per CPU  |  per GPU |   Options
  127.45GB |   5.31GB | offload_optimizer=cpu
  127.45GB |  11.28GB | offload_optimizer=none
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from ds_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
]

_FP32 = 4
_GIB = 2**30


@dataclass(frozen=True)
class _Model:
    """What is counted, checked."""

    total: float
    """Elements of all parameters."""
    trained: float
    """Of those that the optimizer updates."""
    weight_bytes: int
    optimizer_bytes: int

    @classmethod
    def of(cls, total: float, trained: float | None, weight_bytes: int, optimizer_bytes: int) -> _Model:
        trained = total if trained is None else trained
        if not 0 <= trained <= total:
            raise ConfigError(
                f"{trained} of {total} parameters are trained",
                where="trainable_params",
                fix="pass numbers of elements, the trained ones among all",
            )
        if weight_bytes not in (2, 4):
            raise ConfigError(
                f"weights have {weight_bytes!r} bytes",
                where="bytes_per_weight",
                fix="pass 2 for fp16 or bf16, 4 for fp32",
            )
        if optimizer_bytes < 0:
            raise ConfigError(
                f"optimizer state has {optimizer_bytes!r} bytes per element",
                where="optimizer_bytes_per_param",
                fix="pass 8 for Adam, 4 for SGD with momentum or Lion, 0 for SGD",
            )
        return cls(total, trained, weight_bytes, optimizer_bytes)

    @property
    def weights(self) -> float:
        return self.total * self.weight_bytes

    @property
    def in_fp32(self) -> float:
        """Initialised, before it is cast."""
        return self.total * _FP32

    @property
    def divided(self) -> float:
        """Masters, optimizer state, and the gradients that the optimizer reads."""
        masters = _FP32 if self.weight_bytes < _FP32 else 0
        return self.trained * (masters + self.optimizer_bytes + _FP32)

    @property
    def offloaded(self) -> float:
        """The same away from the GPU, where masters are a copy also in fp32."""
        return self.trained * (_FP32 + self.optimizer_bytes + _FP32)

    @property
    def accumulating(self) -> float:
        """Gradients that accumulate beside those that the optimizer reads."""
        return self.trained * self.weight_bytes if self.weight_bytes < _FP32 else 0

    def describe(self) -> str:
        trained = "" if self.trained == self.total else f", {int(self.trained / 1e6)}M of them trained"
        return f"{int(self.total / 1e6)}M total params{trained}"


@dataclass(frozen=True)
class _Hardware:
    gpus_per_node: int
    nodes: int
    factor: float

    def __post_init__(self) -> None:
        for name, value in (("num_gpus_per_node", self.gpus_per_node), ("num_nodes", self.nodes)):
            if not value >= 1:
                raise ConfigError(f"{name} is {value!r}", where=name, fix="pass a whole number, at least 1")
        if not self.factor >= 0:
            raise ConfigError(
                f"additional_buffer_factor is {self.factor!r}", where="additional_buffer_factor", fix="pass 1 or more"
            )

    @property
    def gpus(self) -> int:
        return self.gpus_per_node * self.nodes

    def describe(self) -> str:
        nodes, gpus = "node" if self.nodes == 1 else "nodes", "GPU" if self.gpus_per_node == 1 else "GPUs"
        return f"HW: Setup with {self.nodes} {nodes}, {self.gpus_per_node} {gpus} per node."


# -- stage 2 ----------------------------------------------------------------------------------------------------------


def estimate_zero2_model_states_mem_needs(
    total_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    additional_buffer_factor: float = 1.5,
    *,
    trainable_params: float | None = None,
    bytes_per_weight: int = 2,
    optimizer_bytes_per_param: int = 8,
) -> tuple[int, int]:
    """Return bytes of model state (per CPU, that is per node; per GPU) at stage 2.

    On a CPU every rank initialises the model in fp32, and with offload there are masters, optimizer state and
    gradients: the larger of both, times a factor.

    Args:
        total_params: elements of all parameters, shared ones once.
        num_gpus_per_node: ranks of one node.
        num_nodes: nodes.
        cpu_offload: optimizer state and masters are in CPU memory.
        additional_buffer_factor: how much more CPU memory is needed than is counted.
        trainable_params: elements that are trained, the others have neither gradients nor optimizer state; None: all.
        bytes_per_weight: 2 for fp16 and bf16 with fp32 masters, 4 for a model all in fp32.
        optimizer_bytes_per_param: of optimizer state per trained element: 8 for Adam.

    Raises:
        ConfigError: a number that cannot be.
    """
    model = _Model.of(total_params, trainable_params, bytes_per_weight, optimizer_bytes_per_param)
    return _stage2(model, _Hardware(num_gpus_per_node, num_nodes, additional_buffer_factor), cpu_offload)


def _stage2(model: _Model, hardware: _Hardware, offload: bool) -> tuple[int, int]:
    if offload:
        return int(max(model.in_fp32 * hardware.gpus, model.offloaded) * hardware.factor), int(model.weights)
    shard = int((model.divided + model.accumulating) / hardware.gpus)
    return int(model.in_fp32 * hardware.gpus_per_node * hardware.factor), int(model.weights) + shard


def estimate_zero2_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
    *,
    bytes_per_weight: int = 2,
    optimizer_bytes_per_param: int = 8,
) -> None:
    """Print what stage 2 takes for ``model``, with and without offload.

    Parameters that share memory count once, frozen ones without gradients and optimizer state. The model may be on the
    meta device. Other arguments as of :func:`estimate_zero2_model_states_mem_needs`.
    """
    total, trained, _ = _count(model)
    counted = _Model.of(total, trained, bytes_per_weight, optimizer_bytes_per_param)
    _print_stage2(counted, _Hardware(num_gpus_per_node, num_nodes, additional_buffer_factor))


def estimate_zero2_model_states_mem_needs_all_cold(
    total_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
    *,
    trainable_params: float | None = None,
    bytes_per_weight: int = 2,
    optimizer_bytes_per_param: int = 8,
) -> None:
    """Print the table of :func:`estimate_zero2_model_states_mem_needs_all_live` for a number of parameters."""
    model = _Model.of(total_params, trainable_params, bytes_per_weight, optimizer_bytes_per_param)
    _print_stage2(model, _Hardware(num_gpus_per_node, num_nodes, additional_buffer_factor))


def _print_stage2(model: _Model, hardware: _Hardware) -> None:
    rows = [(*_stage2(model, hardware, device == "cpu"), f"offload_optimizer={device}") for device in ("cpu", "none")]
    _print(hardware, model.describe(), rows)


# -- stage 3 ----------------------------------------------------------------------------------------------------------


def estimate_zero3_model_states_mem_needs(
    total_params: float,
    largest_layer_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    cpu_offload: bool = True,
    cpu_offload_params: bool = True,
    zero_init: bool = True,
    additional_buffer_factor: float = 1.5,
    *,
    trainable_params: float | None = None,
    bytes_per_weight: int = 2,
    optimizer_bytes_per_param: int = 8,
) -> tuple[int, int, int]:
    """Return bytes of model state (per CPU, that is per node; per GPU; of the largest layer) at stage 3.

    The largest layer is on the GPU whole, with its gradients.

    Args:
        total_params: elements of all parameters, shared ones once.
        largest_layer_params: elements of the largest layer: the most that one module has of its own.
        num_gpus_per_node: ranks of one node.
        num_nodes: nodes.
        cpu_offload: optimizer state and masters are in CPU memory.
        cpu_offload_params: parameters too; only with ``cpu_offload``.
        zero_init: the model is built under ``zero.Init``, so that no rank ever has it whole.
        additional_buffer_factor: how much more CPU memory is needed than is counted.
        trainable_params, bytes_per_weight, optimizer_bytes_per_param: as of
            :func:`estimate_zero2_model_states_mem_needs`.

    Raises:
        ConfigError: a number that cannot be.
    """
    model = _Model.of(total_params, trainable_params, bytes_per_weight, optimizer_bytes_per_param)
    hardware = _Hardware(num_gpus_per_node, num_nodes, additional_buffer_factor)
    return _stage3(model, largest_layer_params, hardware, cpu_offload, cpu_offload_params, zero_init)


def _stage3(
    model: _Model, largest: float, hardware: _Hardware, offload: bool, offload_params: bool, zero_init: bool
) -> tuple[int, int, int]:
    if not 0 <= largest <= model.total:
        raise ConfigError(
            f"the largest layer has {largest} of {model.total} parameters",
            where="largest_layer_params",
            fix="pass the number of elements of its own that the largest module has",
        )
    layer = int(2 * largest * model.weight_bytes)
    if not offload:
        per_rank = largest * _FP32 if zero_init else model.in_fp32
        shard = int((model.weights + model.divided) / hardware.gpus)
        return int(per_rank * hardware.gpus_per_node * hardware.factor), layer + shard, layer
    held = model.offloaded + (model.weights if offload_params else 0)
    cpu = held / hardware.nodes
    if not zero_init:
        cpu = max(model.in_fp32 * hardware.gpus_per_node, cpu)
    gpu = layer if offload_params else layer + int(model.weights / hardware.gpus)
    return int(cpu * hardware.factor), gpu, layer


def estimate_zero3_model_states_mem_needs_all_live(
    model: nn.Module,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
    *,
    bytes_per_weight: int = 2,
    optimizer_bytes_per_param: int = 8,
) -> None:
    """Print what stage 3 takes for ``model``, for every choice of offload and of ``zero.Init``.

    Counted as by :func:`estimate_zero2_model_states_mem_needs_all_live`.
    """
    total, trained, largest = _count(model)
    counted = _Model.of(total, trained, bytes_per_weight, optimizer_bytes_per_param)
    _print_stage3(counted, largest, _Hardware(num_gpus_per_node, num_nodes, additional_buffer_factor))


def estimate_zero3_model_states_mem_needs_all_cold(
    total_params: float,
    largest_layer_params: float,
    num_gpus_per_node: int = 1,
    num_nodes: int = 1,
    additional_buffer_factor: float = 1.5,
    *,
    trainable_params: float | None = None,
    bytes_per_weight: int = 2,
    optimizer_bytes_per_param: int = 8,
) -> None:
    """Print the table of :func:`estimate_zero3_model_states_mem_needs_all_live` for numbers of parameters."""
    model = _Model.of(total_params, trainable_params, bytes_per_weight, optimizer_bytes_per_param)
    _print_stage3(model, largest_layer_params, _Hardware(num_gpus_per_node, num_nodes, additional_buffer_factor))


def _print_stage3(model: _Model, largest: float, hardware: _Hardware) -> None:
    rows = []
    for (params, optimizer), zero_init in product((("cpu", "cpu"), ("none", "cpu"), ("none", "none")), (True, False)):
        cpu, gpu, _ = _stage3(model, largest, hardware, optimizer == "cpu", params == "cpu", zero_init)
        choice = f"offload_param={params:<4}, offload_optimizer={optimizer:<4}, zero_init={int(zero_init)}"
        rows.append((cpu, gpu, choice))
    _print(hardware, f"{model.describe()}, {int(largest / 1e6)}M largest layer params", rows)


# -- counting and printing --------------------------------------------------------------------------------------------


def _count(model: nn.Module) -> tuple[int, int, int]:
    """Return elements of (all parameters, trained ones, the largest layer), those that share memory once."""
    numels: dict[tuple[int, int], int] = {}
    trained: dict[tuple[int, int], int] = {}
    largest = 0
    for module in model.modules():
        own: dict[tuple[int, int], int] = {}
        for param in module.parameters(recurse=False):
            _add(own, param)
            _add(numels, param)
            if param.requires_grad:
                _add(trained, param)
        largest = max(largest, sum(own.values()))
    return sum(numels.values()), sum(trained.values()), largest


def _add(numels: dict[tuple[int, int], int], param: Tensor) -> None:
    # Of the storage, not data_ptr(), which is 0 for all on the meta device. Of what begins at one place the largest
    # counts: a tensor without elements may lie where the next one begins.
    place = param.untyped_storage()._cdata, int(param.storage_offset())
    numels[place] = max(numels.get(place, 0), param.numel())


def _print(hardware: _Hardware, model: str, rows: list[tuple[int, int, str]]) -> None:
    print("Estimated memory needed for params, optim states and gradients for a:")
    print(hardware.describe())
    print(f"SW: Model with {model}.")
    print("  per CPU  |  per GPU |   Options")
    for cpu, gpu, choice in rows:
        print(f"  {cpu / _GIB:6.2f}GB | {gpu / _GIB:6.2f}GB | {choice}")
