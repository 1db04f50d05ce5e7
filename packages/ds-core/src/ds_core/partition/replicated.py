"""The built-in partition: every rank holds everything, gradients are averaged by all-reduce (stage 0)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_core.config.section import PositiveInt, Section
from ds_core.interfaces.logical import GRADIENT, LogicalTensor, Piece
from ds_core.interfaces.partition import OverflowSource, Partition, PartitionInputs, SquaredNorm
from ds_core.ops import best
from ds_core.partition.buckets import Bucketer
from ds_core.partition.changes import ModelWatch
from ds_core.partition.division import division_of
from ds_core.partition.stored import Masters, cast_stored, stored_pieces, trainable_but_not_optimized
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
    """Stage 0. The optimizer updates the model's own parameters, or their masters; all ranks write checkpoints.

    On one rank there is nothing to reduce: gradients stay where autograd leaves them.
    """

    Config = ReplicatedConfig

    def __init__(self, inputs: PartitionInputs) -> None:
        import torch.distributed as dist

        super().__init__(inputs)
        self._rank = dist.get_rank(inputs.group)
        self._world_size = dist.get_world_size(inputs.group)
        self._division = division_of(inputs.config, self._world_size)
        self._sum_of_squares = best("sum_of_squares", inputs.device).implementation
        self._params = [param for group in inputs.param_groups for param in group["params"]]
        self._outside = trainable_but_not_optimized(inputs.module, self._params)
        self._masters = Masters(self._params, inputs.dtypes)
        cast_stored(inputs.module, inputs.dtypes, inputs.plan)
        self._masters.note_versions()
        of_params = [inputs.dtypes[param] for param in self._params]
        self._copies = any(dtypes.accumulate != dtypes.updated for dtypes in of_params)
        """Whether the optimizer reads copies of gradients, in another dtype than they accumulate in."""
        # After cast_stored, which moves them. Masters would overwrite data that was replaced.
        self._watch = ModelWatch(inputs.module, self._params, inputs.names, keeps_data=len(self._masters) > 0)
        self._gradients: GradientWindow
        ordered = _in_model_order(self._params, inputs.names)
        if self._world_size > 1:
            options = inputs.config.options("partition", "replicated", ReplicatedConfig)
            assert isinstance(options, ReplicatedConfig)
            self._gradients = Bucketer(
                ordered,
                inputs.names,
                inputs.dtypes,
                bucket_bytes=options.bucket_bytes,
                rank=self._rank,
                world_size=self._world_size,
                after=self._division.after,
                find_sources=inputs.find_sources,
                start=self._all_reduce,
            )
        else:
            self._gradients = LocalGradients(ordered, inputs.names, inputs.dtypes)
        self._of = {piece.data: piece for piece in stored_pieces(inputs.module, self._world_size, self._masters)}
        # What a backward before this has left was neither scaled nor divided as ours are.
        self.clear_gradients()

    def _all_reduce(self, bucket: Bucket) -> Work:
        import torch.distributed as dist

        work: Work = dist.all_reduce(bucket.message, group=self.inputs.group, async_op=True)
        return work

    @property
    def loss_factor(self) -> float:
        return self._division.before

    def optimizer_groups(self) -> list[dict[str, Any]]:
        return [
            {**group, "params": [self._masters.of(param) for param in group["params"]]}
            for group in self.inputs.param_groups
        ]

    def optimizer_pieces(self) -> Sequence[Piece]:
        return [self._of[self._masters.of(param)] for param in self._params]

    def begin_backward(self, *, reduce: bool) -> None:
        self._gradients.begin(reduce=reduce, change=self._watch.change() if reduce else None)

    def end_backward(self) -> None:
        self._gradients.end()

    def abort_backward(self) -> None:
        self._gradients.abort()

    def reduce(self) -> SquaredNorm:
        self._gradients.check_whole()
        self._gradients.wait()
        self._masters.follow_writes()
        flats = self._gradients.flats()
        self._masters.take_gradients()
        # One read for norm and overflow: of what the optimizer will read, which on a CPU is faster than 16 bits.
        return SquaredNorm(self._sum_of_squares(self._copied_gradients() if self._copies else flats))

    def _copied_gradients(self) -> list[Tensor]:
        gradients = [self._masters.of(param).grad for param in self._params]
        return [gradient for gradient in gradients if gradient is not None]

    def reduced_gradient(self, param: nn.Parameter) -> Tensor | None:
        return param.grad if self._gradients.is_reduced else None

    def find_overflow(self) -> OverflowSource:
        # Reduced gradients are the same on every rank, so nobody has to ask the others.
        found = self._gradients.non_finite()
        return OverflowSource(None, ()) if found is None else OverflowSource(self.inputs.names[found[0]], found[1])

    def publish(self) -> None:
        # Without masters the optimizer updated the model's own parameters: there is nothing to bring anywhere.
        self._masters.publish()

    def clear_gradients(self) -> None:
        self._gradients.clear()
        self._masters.drop_gradients()
        for param in self._outside:
            param.grad = None

    def pieces(self) -> Iterable[Piece]:
        # Anew at each call: a model may rebind its buffers (self.count = self.count + 1).
        return list(stored_pieces(self.inputs.module, self._world_size, self._masters))

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
        # Every rank read the same bytes into its own copy; a weight follows its master, in whatever precision it was.
        self._masters.publish()

    def refresh_masters(self) -> None:
        self._masters.refresh()

    def report(self) -> Mapping[str, str]:
        found = {}
        if isinstance(self._gradients, Bucketer):
            sizes = [bucket.message_bytes for bucket in self._gradients.buckets]
            found["gradient buckets"] = f"{len(sizes)}, {sum(sizes)} bytes in all, summed while backward runs"
        elif "bucket_bytes" in self.inputs.config.partition.options.get("replicated", {}):
            found["partition.replicated.bucket_bytes"] = "no effect: one rank has nothing to reduce"
        if self._outside and self._params:
            listing = ", ".join(self.inputs.names[param] for param in self._outside)
            found["trainable parameters without an optimizer"] = f"not reduced, not updated: {listing}"
        return found

    def destroy(self) -> None:
        self._gradients.detach()
        self._masters.drop_gradients()


def _in_model_order(params: Sequence[nn.Parameter], names: Mapping[nn.Parameter, str]) -> list[nn.Parameter]:
    wanted = set(params)
    return [param for param in names if param in wanted]


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
