"""Contract suites are worth what they catch: each broken plugin here must fail the named test."""

import contextlib
import math
import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.config import CsvMonitorSection, load_config
from ds_core.interfaces.activation import ActivationCheckpointing
from ds_core.interfaces.logical import Chunk, Piece
from ds_core.interfaces.partition import SquaredNorm
from ds_core.interfaces.precision import PrecisionPlan
from ds_core.interfaces.runner import Runner
from ds_core.monitor.csv_monitor import CsvMonitor
from ds_core.ops.torch_ops import TorchOps
from ds_core.partition.replicated import ReplicatedPartition
from ds_core.precision.fp32 import Fp32, NoScaling
from ds_core.testing import partition as partition_contract
from ds_core.testing.activation import ActivationContract
from ds_core.testing.checkpoint import CheckpointEngineContract
from ds_core.testing.monitor import MonitorContract
from ds_core.testing.ops import OpsContract, core_cases
from ds_core.testing.optimizer import OptimizerContract
from ds_core.testing.partition import PartitionContract
from ds_core.testing.precision import PrecisionContract
from ds_core.testing.ranks import run_ranks
from ds_core.testing.runner import RunnerContract
from ds_core.testing.scheduler import SchedulerContract


class SumsInsteadOfMeans(ReplicatedPartition):
    @property
    def loss_factor(self):
        return 1.0


class DropsOneRank(ReplicatedPartition):
    def end_backward(self):
        if torch.distributed.get_rank() == 1:
            for param in self.inputs.module.parameters():
                if param.grad is not None:
                    param.grad.zero_()
        super().end_backward()


class CountsTheNormTwice(ReplicatedPartition):
    def reduce(self):
        norm = super().reduce()
        return SquaredNorm(norm.value, (self.inputs.group,))


class ForgetsToClear(ReplicatedPartition):
    def clear_gradients(self):
        pass


class ForgetsTheWindow(ReplicatedPartition):
    def restore_gradients(self, pieces):
        pass


class LeavesHooks(ReplicatedPartition):
    def destroy(self):
        pass


class SavesTooLittle(ReplicatedPartition):
    def pieces(self):
        return [piece for piece in super().pieces() if piece.of.name != "b.bias"]


class EveryRankWrites(ReplicatedPartition):
    def pieces(self):
        rank = torch.distributed.get_rank()
        return [Piece(piece.of, piece.chunk, piece.data, rank) for piece in super().pieces()]


class GivesUnusedOnesZeros(ReplicatedPartition):
    def reduce(self):
        norm = super().reduce()
        for group in self.optimizer_groups():
            for param in group["params"]:
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
        return norm


class ShowsCopiesOfGradients(ReplicatedPartition):
    def reduced_gradient(self, param):
        found = super().reduced_gradient(param)
        return None if found is None else found.clone()


class UsesGradientsInTheWrongDtype(ReplicatedPartition):
    def reduced_gradient(self, param):
        found = super().reduced_gradient(param)
        return None if found is None else found.double()


BROKEN_PARTITIONS = [
    (ShowsCopiesOfGradients, "check_reduced_gradient"),
    (UsesGradientsInTheWrongDtype, "check_low_precision"),
    (SumsInsteadOfMeans, "check_mean_over_ranks"),
    (DropsOneRank, "check_mean_over_ranks"),
    (CountsTheNormTwice, "check_mean_over_ranks"),
    (ForgetsToClear, "check_cleared"),
    (ForgetsTheWindow, "check_gradient_pieces"),
    (LeavesHooks, "check_destroy"),
    (SavesTooLittle, "check_coverage"),
    (EveryRankWrites, "check_coverage"),
    (GivesUnusedOnesZeros, "check_unused"),
]


def fails(broken, check):
    with pytest.raises(AssertionError):
        getattr(partition_contract, check)(broken, {}, PrecisionPlan())


def test_broken_partitions_are_caught():
    run_ranks([partial(fails, broken, check) for broken, check in BROKEN_PARTITIONS], 2)


class Sharded(ReplicatedPartition):
    """A toy stage 1: every rank's optimizer has a flat slice of every parameter."""

    def __init__(self, inputs):
        super().__init__(inputs)
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.groups = [{**group, "params": [self.shard(p) for p in group["params"]]} for group in inputs.param_groups]

    def bounds(self, param, rank):
        each = math.ceil(param.numel() / self.ranks)
        return min(each * rank, param.numel()), min(each * (rank + 1), param.numel())

    def shard(self, param):
        low, high = self.bounds(param, self.rank)
        return self._masters.of(param).detach().view(-1)[low:high].requires_grad_()

    def params_and_shards(self):
        for whole, parts in zip(self.inputs.param_groups, self.groups, strict=True):
            yield from zip(whole["params"], parts["params"], strict=True)

    def optimizer_groups(self):
        return [dict(group) for group in self.groups]

    def optimizer_pieces(self):
        found = []
        for (param, shard), whole in zip(self.params_and_shards(), super().optimizer_pieces(), strict=True):
            low, high = self.bounds(param, self.rank)
            found.append(Piece(whole.of, Chunk(whole.chunk.box, low, high - low), shard, self.rank))
        return found

    def pieces(self):
        mine = {(piece.of.name, piece.of.kind): piece for piece in self.optimizer_pieces()}
        return [mine.get((piece.of.name, piece.of.kind), piece) for piece in super().pieces()]

    def reduce(self):
        super().reduce()
        squares = []
        for param, shard in self.params_and_shards():
            shard.grad = None
            gradient = self._masters.of(param).grad
            if gradient is not None:
                low, high = self.bounds(param, self.rank)
                shard.grad = gradient.view(-1)[low:high].clone()
                squares.append(shard.grad.double().square().sum())
        return SquaredNorm(torch.stack(squares).sum(), (self.inputs.group,))

    def reduced_gradient(self, param):
        gradient = super().reduced_gradient(param)
        low, high = self.bounds(param, self.rank)
        return None if gradient is None else gradient.view(-1)[low:high]

    def publish(self):
        with torch.no_grad():
            for param, _ in self.params_and_shards():
                for rank in range(self.ranks):
                    low, high = self.bounds(param, rank)
                    if high > low:
                        torch.distributed.broadcast(self._masters.of(param).view(-1)[low:high], rank)
        super().publish()

    def after_load(self):
        self.publish()


class TestSharded(PartitionContract):
    """The suite fits a partition that shards, not only the one that replicates."""

    @pytest.fixture
    def partition_class(self):
        return Sharded


class Scaling(NoScaling):
    """Halves at an overflow, doubles after three good steps."""

    def __init__(self):
        self.scale, self.good = 2.0**16, 0

    def update(self, *, overflowed):
        self.good = 0 if overflowed else self.good + 1
        if overflowed:
            self.scale /= 2
        elif self.good == 3:
            self.scale, self.good = self.scale * 2, 0

    def state_dict(self):
        return {"scale": self.scale, "good": self.good}

    def load_state_dict(self, state):
        self.scale, self.good = state["scale"], state["good"]


class Scaled(Fp32):
    plan = PrecisionPlan(stored=torch.float16, master=torch.float32)
    skips_overflow = True

    def __init__(self, config):
        super().__init__(config)
        self.scaler = Scaling()

    def overflowed(self, norm):
        return not math.isfinite(norm)


class TestScaled(PrecisionContract):
    @pytest.fixture
    def precision_class(self):
        return Scaled


class SharesItsScaler(Scaled):
    SHARED = Scaling()

    def __init__(self, config):
        super().__init__(config)
        self.scaler = self.SHARED


class ForgetsToCount(Scaled):
    def __init__(self, config):
        super().__init__(config)
        self.scaler.state_dict = lambda: {"scale": self.scaler.scale, "good": 0}


class NeverSkips(Scaled):
    def overflowed(self, norm):
        return False


class SkipsUnannounced(Scaled):
    skips_overflow = False


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (SharesItsScaler, partial(PrecisionContract.test_engines_do_not_share_a_scaler, PrecisionContract())),
        (ForgetsToCount, partial(PrecisionContract.test_state_continues_exactly, PrecisionContract(), saved_at=8)),
        (
            NeverSkips,
            lambda cls, config: PrecisionContract().test_a_scaled_loss_that_overflowed_is_skipped(cls(config)),
        ),
        (SkipsUnannounced, lambda cls, config: PrecisionContract().test_what_may_skip_says_so(cls(config))),
    ],
)
def test_broken_precisions_are_caught(broken, test):
    with pytest.raises(AssertionError):
        test(broken, config=load_config({"train_batch_size": 1}))


class WritesInPlace(PlainCheckpoint):
    """Removes what was there before it writes the new one."""

    def save(self, directory, tag, snapshot, *, latest):
        manifest = Path(directory) / tag / "checkpoint.json"
        if manifest.exists():
            os.unlink(manifest)  # noqa: PTH108  audited under this name
        super().save(directory, tag, snapshot, latest=latest)


class NamesLatestFirst(PlainCheckpoint):
    def save(self, directory, tag, snapshot, *, latest):
        if latest:
            (Path(directory) / "latest").write_text(tag)
        super().save(directory, tag, snapshot, latest=latest)


class PassesOverMissingTensors(PlainCheckpoint):
    def open(self, directory, tag):
        reader = super().open(directory, tag)
        read, stored = reader.read, {(of.name, of.kind) for of in reader.tensors()}
        reader.read = lambda wanted: read([piece for piece in wanted if (piece.of.name, piece.of.kind) in stored])
        return reader


class FillsOtherShapes(PlainCheckpoint):
    def open(self, directory, tag):
        reader = super().open(directory, tag)
        reader.read = lambda wanted: [piece.data.zero_() for piece in wanted]
        return reader


CONTRACT = CheckpointEngineContract()


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (WritesInPlace, partial(CONTRACT.test_a_crash_at_any_point_leaves_a_whole_checkpoint, tag="same")),
        (NamesLatestFirst, partial(CONTRACT.test_a_crash_at_any_point_leaves_a_whole_checkpoint, tag="next")),
        (NamesLatestFirst, CONTRACT.test_a_save_that_fails_leaves_the_previous),
        (PassesOverMissingTensors, CONTRACT.test_a_missing_tensor_is_named),
        (FillsOtherShapes, partial(CONTRACT.test_another_shape_is_named, shape=(7, 6))),
        (FillsOtherShapes, partial(CONTRACT.test_any_chunks_are_read_in_any_others, written=2, read=2)),
    ],
)
def test_broken_checkpoints_are_caught(broken, test, tmp_path):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(engine=broken(None, None), tmp_path=tmp_path)


class Stateless(torch.optim.lr_scheduler.StepLR):
    def state_dict(self):
        return {}


class FirstGroupOnly(torch.optim.lr_scheduler.ExponentialLR):
    def get_last_lr(self):
        return super().get_last_lr()[:1]


def test_broken_schedules_are_caught():
    contract, params = SchedulerContract(), {"step_size": 4, "gamma": 0.5}
    with pytest.raises(AssertionError):
        contract.test_state_continues_exactly(Stateless, params, 2)
    contract.test_state_continues_exactly(torch.optim.lr_scheduler.StepLR, params, 2)
    with pytest.raises(AssertionError):
        contract.test_every_group_has_a_rate(FirstGroupOnly, {"gamma": 0.5})


class StepsScaled(torch.optim.SGD):
    def step_scaled(self, factor):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data.add_(param.grad, alpha=-group["lr"] * factor)


class IgnoresTheFactor(torch.optim.SGD):
    def step_scaled(self, factor):
        self.step()


class TestStepsScaled(OptimizerContract):
    @pytest.fixture
    def factory(self):
        return StepsScaled


def test_broken_optimizers_are_caught():
    with pytest.raises(AssertionError):
        OptimizerContract().test_a_factor_multiplies_the_gradients(IgnoresTheFactor, {"lr": 0.1})


class KeepsEverything(ActivationCheckpointing):
    def checkpoint(self, function, *args, **kwargs):
        return function(*args, **kwargs)


class DrawsAnew(ActivationCheckpointing):
    def checkpoint(self, function, *args, **kwargs):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def test_broken_activation_checkpointing_is_caught():
    contract = ActivationContract()
    with pytest.raises(AssertionError):
        contract.test_inner_activations_are_not_kept(KeepsEverything())
    with pytest.raises(AssertionError):
        contract.test_outputs_and_gradients_are_the_same(DrawsAnew(), 0.5)


class Buffers(CsvMonitor):
    def write_events(self, events):
        self.kept = [*getattr(self, "kept", []), *events]

    def close(self):
        super().write_events(getattr(self, "kept", []))
        super().close()


class BuffersContract(MonitorContract):
    def build(self, folder):
        return Buffers(CsvMonitorSection(enabled=True, output_path=str(folder), job_name="job"))

    def read(self, folder):
        return [(path.name, 0.0, 0) for path in folder.rglob("*.csv")]


def test_a_monitor_that_buffers_is_caught(tmp_path):
    with pytest.raises(AssertionError):
        BuffersContract().test_events_are_seen_on_return(tmp_path)


class TwiceTheSum(TorchOps):
    def implementation(self, op):
        right = super().implementation(op)
        return (lambda tensors: 2 * right(tensors)) if op == "sum_of_squares" else right


def test_a_wrong_op_is_caught():
    reference = TorchOps()
    with pytest.raises(AssertionError):
        OpsContract().test_the_usable_equal_the_reference(
            TwiceTheSum(), core_cases(), {op: reference.implementation(op) for op in reference.ops()}, {}
        )


class LeavesThemRunning(Runner):
    """Waits for the first rank to end, and no longer."""

    def problem(self):
        return None

    def commands(self, job):
        return {"here": list(job.command)}

    def run(self, job):
        place = {"WORLD_SIZE": str(job.nproc), "LOCAL_WORLD_SIZE": str(job.nproc)}
        self.started = [
            subprocess.Popen(job.command, env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(job.nproc)
        ]
        return self.started[1].wait()


def test_a_runner_that_leaves_processes_is_caught(tmp_path, capfd):
    runner = LeavesThemRunning()
    try:
        with pytest.raises(AssertionError):
            RunnerContract().test_one_rank_fails(runner, tmp_path, capfd, "sys.exit(3)", 3)
        pids = [int(pid) for file in tmp_path.glob("ready.*") for pid in file.read_text().split()]
        assert len(pids) == 4
    finally:
        for pid in (int(pid) for file in tmp_path.glob("ready.*") for pid in file.read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in runner.started:
            process.wait()
