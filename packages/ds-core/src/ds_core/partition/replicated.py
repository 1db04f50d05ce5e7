"""The built-in partition: every rank holds everything, gradients are averaged by all-reduce (stage 0)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_core.config.section import PositiveInt, Section
from ds_core.errors import NotBuiltError
from ds_core.interfaces.logical import BUFFER, GRADIENT, WEIGHT, Chunk, LogicalTensor, Piece, logical_name
from ds_core.interfaces.partition import Partition, PartitionInputs, SquaredNorm
from ds_core.ops import best
from ds_core.partition.arithmetic import assign_writers
from ds_core.partition.buckets import Bucketer
from ds_core.partition.window import LocalGradients

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.distributed import Work

    from ds_core.partition.buckets import Bucket
    from ds_core.partition.window import GradientWindow

__all__ = ["ReplicatedConfig", "ReplicatedPartition"]


class ReplicatedConfig(Section):
    """Options of ``replicated``, ``partition.replicated``."""

    bucket_bytes: PositiveInt = 25 * 2**20
    """Gradients are summed over the ranks in messages of about this many bytes, each as soon as it is complete."""


class ReplicatedPartition(Partition):
    """Stage 0. The optimizer updates the model's own parameters; a checkpoint's bytes are spread over the ranks.

    On one rank there is nothing to reduce: gradients stay where autograd leaves them.
    """

    Config = ReplicatedConfig

    def __init__(self, inputs: PartitionInputs) -> None:
        import torch.distributed as dist

        super().__init__(inputs)
        _refuse_what_is_not_executed(inputs)
        if inputs.plan.stored is not None:
            inputs.module.to(inputs.plan.stored)
        self._rank = dist.get_rank(inputs.group)
        self._world_size = dist.get_world_size(inputs.group)
        self._sum_of_squares = best("sum_of_squares", inputs.device).implementation
        self._params = [param for group in inputs.param_groups for param in group["params"]]
        self._outside = _trainable_but_not_optimized(inputs.module, self._params)
        self._gradients: GradientWindow
        if self._world_size > 1:
            options = inputs.config.options("partition", "replicated", ReplicatedConfig)
            assert isinstance(options, ReplicatedConfig)
            self._gradients = Bucketer(
                _in_model_order(self._params, inputs.names),
                inputs.names,
                bucket_bytes=options.bucket_bytes,
                world_size=self._world_size,
                start=self._all_reduce,
            )
        else:
            self._gradients = LocalGradients(self._params, inputs.names)
        self._of = {piece.data: piece for piece in _stored_tensors(inputs.module, self._world_size)}

    def _all_reduce(self, bucket: Bucket) -> Work:
        import torch.distributed as dist

        work: Work = dist.all_reduce(bucket.storage, group=self.inputs.group, async_op=True)
        return work

    @property
    def loss_factor(self) -> float:
        # Dividing the loss costs nothing; dividing the reduced gradients would be one more pass over them.
        return 1.0 / self._world_size

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return [dict(group) for group in self.inputs.param_groups]

    def optimizer_pieces(self) -> Sequence[Piece]:
        return [self._of[param] for param in self._params]

    def begin_backward(self, *, reduce: bool) -> None:
        self._gradients.begin(reduce=reduce)

    def end_backward(self) -> None:
        self._gradients.end()

    def abort_backward(self) -> None:
        self._gradients.abort()

    def reduce(self) -> SquaredNorm:
        self._gradients.check_whole()
        self._gradients.wait()
        return SquaredNorm(self._sum_of_squares(self._gradients.flats()))

    def publish(self) -> None:
        """The optimizer updated the model's own parameters: there is nothing to bring anywhere."""

    def clear_gradients(self) -> None:
        self._gradients.clear()
        for param in self._outside:
            param.grad = None

    def pieces(self) -> Iterable[Piece]:
        # Anew at each call: a model may rebind its buffers (self.count = self.count + 1).
        return list(_stored_tensors(self.inputs.module, self._world_size))

    def gradient_pieces(self) -> Iterable[Piece]:
        self._gradients.check_whole()
        for param in self._params:
            if param.grad is not None:
                yield self._gradient_piece(param, param.grad)

    def _gradient_piece(self, param: nn.Parameter, gradient: Tensor) -> Piece:
        weight = self._of[param]
        of = LogicalTensor(weight.of.name, GRADIENT, weight.of.shape, _dtype_name(gradient), rank=self._rank)
        return Piece(of, weight.chunk, gradient, writer=self._rank)

    def restore_gradients(self, pieces: Iterable[Piece]) -> None:
        by_name = {piece.of.name: piece.data for piece in pieces}
        names = {param: self._of[param].of.name for param in self._params}
        self._gradients.restore({param: by_name[name] for param, name in names.items() if name in by_name})

    def after_load(self) -> None:
        """Every rank read the same bytes into its own copy."""

    def report(self) -> Mapping[str, str]:
        found = {}
        if isinstance(self._gradients, Bucketer):
            sizes = [bucket.storage.nbytes for bucket in self._gradients.buckets]
            found["gradient buckets"] = f"{len(sizes)}, {sum(sizes)} bytes in all, summed while backward runs"
        if self._outside and self._params:
            listing = ", ".join(self.inputs.names[param] for param in self._outside)
            found["trainable parameters without an optimizer"] = f"not reduced, not updated: {listing}"
        return found

    def destroy(self) -> None:
        self._gradients.detach()


def _refuse_what_is_not_executed(inputs: PartitionInputs) -> None:
    plan = inputs.plan
    asked = [
        field
        for field in ("gradient", "reduce", "accumulate", "master")
        if getattr(plan, field) not in (None, plan.stored)
    ]
    if asked:
        raise NotBuiltError(
            f"the replicated partition does not execute a plan with its own {', '.join(asked)} dtype yet",
            where="precision",
            fix="upgrade ds-core, or use a precision that keeps gradients and weights in one dtype",
        )


def _trainable_but_not_optimized(module: nn.Module, optimized: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    known = set(optimized)
    return [param for param in module.parameters() if param.requires_grad and param not in known]


def _in_model_order(params: Sequence[nn.Parameter], names: Mapping[nn.Parameter, str]) -> list[nn.Parameter]:
    wanted = set(params)
    return [param for param in names if param in wanted]


def _stored_tensors(module: nn.Module, world_size: int) -> Iterable[Piece]:
    """Yield the weights and persistent buffers of ``module``, shared ones once, with the rank that writes each."""
    found: list[tuple[str, str, Tensor]] = [
        (logical_name(name), WEIGHT, param) for name, param in module.named_parameters()
    ]
    transient = {
        logical_name(f"{prefix}.{name}" if prefix else name)
        for prefix, submodule in module.named_modules()
        for name in submodule._non_persistent_buffers_set
    }
    buffers = [(logical_name(name), BUFFER, buffer) for name, buffer in module.named_buffers()]
    found += [named for named in buffers if named[0] not in transient]
    writers = assign_writers([tensor.nbytes for _, _, tensor in found], world_size)
    for (name, kind, tensor), some_rank in zip(found, writers, strict=True):
        # Ranks may have different buffers (each its own batch statistics): those of one rank belong together.
        writer = 0 if kind == BUFFER else some_rank
        shape = tuple(tensor.shape)
        yield Piece(LogicalTensor(name, kind, shape, _dtype_name(tensor)), Chunk.whole(shape), tensor, writer)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
