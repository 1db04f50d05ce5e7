"""ZeRO stages 1 and 2: every rank has the whole weights, and updates its share of them.

torch is imported where it is used: ``ds config`` asks the stages what they refuse, and does without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ds_core.comm import all_or_none
from ds_core.errors import ConfigError, EngineError, few
from ds_core.interfaces.logical import GRADIENT, MASTER, WEIGHT, Chunk, LogicalTensor, Piece, logical_name
from ds_core.interfaces.partition import OverflowSource, Partition, PartitionInputs, SquaredNorm
from ds_core.ops import best
from ds_core.partition.arithmetic import plan_buckets
from ds_core.partition.changes import ModelWatch
from ds_core.partition.division import division_of
from ds_zero.layout import cut, whole_each

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from ds_core.config import Config
    from ds_zero.weights import Shard

__all__ = ["ZeroStage1", "ZeroStage2"]

MOST_BUCKET_BYTES, LEAST_BUCKET_BYTES = 25 * 2**20, 2**20
"""Of a bucket, where the configuration does not say. Larger ones are no faster, smaller ones cost a message each."""
BUCKETS_OF_A_SMALL_MODEL = 8
"""A model whose gradients are less than so many of the largest buckets has smaller ones, where a few buckets have
memory at a time: else they would be all of its gradients."""


class _Stage12(Partition):
    """What both stages do; they differ in when gradients are reduced."""

    divides = True
    every_backward: ClassVar[bool]

    @classmethod
    def check_config(cls, config: Config) -> None:
        zero = config.zero_optimization
        asked = None
        if zero.offload_optimizer is not None and zero.offload_optimizer.device != "none":
            asked = f'offload_optimizer: device is "{zero.offload_optimizer.device}"'
        elif zero.zenflow is not None:
            asked = "zenflow: a section is given"
        if asked is not None:
            key = asked.partition(":")[0]
            raise ConfigError(
                f"zero_optimization.{asked}, which is not built yet",
                where=config.where,
                fix=f'remove "{key}": optimizer state is divided over the ranks, and stays on their devices',
            )

    def __init__(self, inputs: PartitionInputs) -> None:
        import torch.distributed as dist

        from ds_core.partition.stored import cast_stored, trainable_but_not_optimized
        from ds_zero.gradients import ShardBucket, ShardedGradients
        from ds_zero.weights import ShardedWeights

        super().__init__(inputs)
        group = inputs.group
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._division = division_of(inputs.config, self._world_size)
        self._sum_of_squares = best("sum_of_squares", inputs.device).implementation
        self._params = [param for each in inputs.param_groups for param in each["params"]]
        known = set(self._params)
        self._outside = trainable_but_not_optimized(inputs.module, self._params)
        planned = self._plan([param for param in reversed(list(inputs.names)) if param in known])
        numels = [[param.numel() for param in params] for params in planned]
        cut_each = [cut(of_bucket, self._world_size) for of_bucket in numels]
        layouts = whole_each(numels, self._world_size) if inputs.whole_tensors else cut_each
        buckets = [
            ShardBucket(index, params, inputs.dtypes[params[0]], layout)
            for index, (params, layout) in enumerate(zip(planned, layouts, strict=True))
        ]
        self._weights = ShardedWeights(
            [(bucket.params, bucket.layout) for bucket in buckets],
            inputs.dtypes,
            group,
            keep_shapes=inputs.whole_tensors,
        )
        cast_stored(inputs.module, inputs.dtypes, inputs.plan)
        self._weights.note_versions()
        self._watch = ModelWatch(inputs.module, self._params, inputs.names, keeps_data=True)
        self._place = {param: (bucket, at) for bucket in buckets for at, param in enumerate(bucket.params)}
        self._gradients = ShardedGradients(
            buckets,
            inputs.names,
            inputs.dtypes,
            group,
            after=self._division.after,
            every_backward=self.every_backward,
            find_sources=inputs.find_sources,
        )
        self.clear_gradients()

    def _plan(self, ordered: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Return the parameters of each bucket, in the order in which backward fills them."""
        dtypes = self.inputs.dtypes
        section = self.inputs.config.zero_optimization
        sizes = [param.numel() * dtypes[param].reduce.itemsize for param in ordered]
        bucket_bytes = MOST_BUCKET_BYTES
        if "reduce_bucket_numel" in section.model_fields_set:
            itemsize = max((dtypes[param].reduce.itemsize for param in ordered), default=4)
            bucket_bytes = section.reduce_bucket_numel * itemsize
        elif self.every_backward and not self.inputs.whole_tensors:
            bucket_bytes = min(MOST_BUCKET_BYTES, max(LEAST_BUCKET_BYTES, sum(sizes) // BUCKETS_OF_A_SMALL_MODEL))
        plan = plan_buckets(
            sizes,
            [(dtypes[param], param.device) for param in ordered],
            max(1, bucket_bytes),
            max(1, bucket_bytes // 25),
        )
        return [[ordered[index] for index in items] for items in plan]

    @property
    def loss_factor(self) -> float:
        return self._division.before

    def optimizer_groups(self) -> list[dict[str, object]]:
        return [
            {**group, "params": [self._shard(param).updated for param in group["params"]]}
            for group in self.inputs.param_groups
        ]

    def _shard(self, param: nn.Parameter) -> Shard:
        return self._weights.shards[param]

    def optimizer_pieces(self) -> Sequence[Piece]:
        return [self._piece(self._shard(param)) for param in self._params]

    def _piece(self, shard: Shard) -> Piece:
        """Return what the optimizer updates of a parameter: a flat interval of it, on some ranks an empty one."""
        shape = tuple(shard.param.shape)
        of = LogicalTensor(
            logical_name(self.inputs.names[shard.param]),
            MASTER if shard.has_master else WEIGHT,
            shape,
            str(shard.updated.dtype).removeprefix("torch."),
        )
        chunk = Chunk(Chunk.whole(shape).box, shard.share.start, shard.share.length)
        bucket, place = self._place[shard.param]
        # What is stored once for the whole parameter, such as a step count, the owner of its beginning writes.
        writer = self._rank if shard.share.length else bucket.layout.owner(place)
        return Piece(of, chunk, shard.updated, writer)

    def begin_backward(self, *, reduce: bool) -> None:
        self._gradients.begin(reduce=reduce, change=self._watch.change() if reduce else None)

    def end_backward(self) -> None:
        self._gradients.end()

    def abort_backward(self) -> None:
        self._gradients.abort()

    def reduce(self) -> SquaredNorm:
        import torch

        self._gradients.check_whole()
        self._gradients.wait()
        if not self.inputs.config.zero_optimization.ignore_unused_parameters:
            self._check_used()
        self._weights.follow_writes()
        copies: list[Tensor] = []
        sources: list[Tensor] = []
        for param, (bucket, place) in self._place.items():
            piece = self.piece_of(param)
            assert piece is not None  # it is one of the optimizer's
            updated = piece.data
            updated.grad = None
            if not self._gradients.is_used(bucket, place) or self.is_elsewhere(piece):
                continue
            gradient = self._gradients.own(bucket, place).view(updated.shape)
            if gradient.dtype != updated.dtype:
                sources.append(gradient)
                gradient = torch.empty_like(gradient, dtype=updated.dtype)
                copies.append(gradient)
            updated.grad = gradient
        if copies:
            torch._foreach_copy_(copies, sources)
        return SquaredNorm(self._sum_of_squares(self._gradients.flats()), (self.inputs.group,))

    def _check_used(self) -> None:
        unused = [
            self.inputs.names[param] for param in self._params if not self._gradients.is_used(*self._place[param])
        ]
        if unused:
            raise EngineError(
                f"{len(unused)} parameters got no gradient on any rank in this step: {few(unused)}",
                where="step, with zero_optimization.ignore_unused_parameters false",
                fix="use them in every step, freeze them with requires_grad_(False) before initialize, or leave the "
                "key out; to go on without this step call engine.zero_grad(), its gradients are still there",
            )

    def reduced_gradient(self, param: nn.Parameter) -> Tensor | None:
        bucket, place = self._place[param]
        if not self._gradients.is_reduced or not self._gradients.is_used(bucket, place):
            return None
        return self._gradients.own(bucket, place)

    def find_overflow(self) -> OverflowSource:
        found = self._gradients.non_finite()
        return OverflowSource(None, ()) if found is None else OverflowSource(self.inputs.names[found[0]], found[1])

    def publish(self) -> None:
        self._weights.publish()

    def clear_gradients(self) -> None:
        self._gradients.clear()
        self._weights.drop_gradients()
        for param in self._outside:
            param.grad = None

    def pieces(self) -> Iterable[Piece]:
        from ds_core.partition.stored import stored_pieces

        # Anew at each call: a model may rebind its buffers.
        masters = [self._piece(shard) for shard in self._weights.shards.values() if shard.has_master]
        return [*stored_pieces(self.inputs.module, self._world_size), *masters]

    def gradient_pieces(self) -> Iterable[Piece]:
        # All or none: what follows may be a collective.
        all_or_none(self._gradients.check_whole, self.inputs.group)
        for param, gradient in self._gradients.unfinished():
            shape = tuple(gradient.shape)
            name = logical_name(self.inputs.names[param])
            dtype = str(gradient.dtype).removeprefix("torch.")
            of = LogicalTensor(name, GRADIENT, shape, dtype, rank=self._rank)
            yield Piece(of, Chunk.whole(shape), gradient, writer=self._rank)

    def restore_gradients(self, pieces: Iterable[Piece]) -> None:
        by_name = {piece.of.name: piece.data for piece in pieces}
        names = {param: logical_name(self.inputs.names[param]) for param in self._params}
        self._gradients.restore({param: by_name[name] for param, name in names.items() if name in by_name})

    def after_load(self) -> None:
        self._weights.publish()

    def refresh_masters(self) -> None:
        self._weights.refresh()

    def optimizer_face(self, engine: Any) -> Any:
        from ds_zero.faces import DeepSpeedZeroOptimizer

        return DeepSpeedZeroOptimizer(engine)

    def report(self) -> Mapping[str, str]:
        sizes = [bucket.layout.total * bucket.dtypes.reduce.itemsize for bucket in self._gradients.buckets]
        when = "in every backward" if self.every_backward else "at the end of a window"
        found = {"gradient buckets": f"{len(sizes)}, {sum(sizes)} bytes in all, reduced {when}, while it runs"}
        found["buffers of collectives"] = f"at most {self._gradients.buffer_bytes()} bytes"
        if self._outside and self._params:
            listing = ", ".join(self.inputs.names[param] for param in self._outside)
            found["trainable parameters without an optimizer"] = f"not reduced, not updated: {listing}"
        return found

    def destroy(self) -> None:
        self._gradients.detach()
        self._weights.drop_gradients()


class ZeroStage1(_Stage12):
    """Optimizer state is divided over the ranks; gradients are reduced at the end of an accumulation window."""

    every_backward = False


class ZeroStage2(_Stage12):
    """Optimizer state and reduced gradients are divided: each backward reduces, and keeps only this rank's share."""

    every_backward = True
