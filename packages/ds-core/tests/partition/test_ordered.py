"""The order in which buckets are sent and received, whatever autograd does, and what happens when it raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_core import comm
from ds_core.errors import CommError, EngineError
from ds_core.interfaces.precision import PrecisionPlan
from ds_core.partition.changes import Change
from ds_core.partition.ordered import OrderedBuckets, SlotBucket


@pytest.fixture(autouse=True)
def forget_collectives_given_up_on():
    yield
    comm.destroy_process_group()


class Work:
    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def wait(self) -> str:
        if self.fails:
            raise RuntimeError("connection closed by peer\nand much more")
        return "received"


class Buckets(OrderedBuckets[SlotBucket]):
    """Notes what it is asked; a bucket has slots from its first gradient to its collective's end."""

    def __init__(self, module: nn.Module, per_bucket: int = 1) -> None:
        names = {param: name for name, param in module.named_parameters()}
        ordered = list(reversed(list(names)))
        cuts = [ordered[at : at + per_bucket] for at in range(0, len(ordered), per_bucket)]
        buckets = [SlotBucket(index, params) for index, params in enumerate(cuts)]
        super().__init__(buckets, names, PrecisionPlan().dtypes_of(module))
        self.events: list[str] = []
        self.fails = False

    def make_room(self, bucket: SlotBucket) -> None:
        self.events.append(f"room {bucket.index}")
        bucket.slots = tuple(torch.full(param.shape, 7.0) for param in bucket.params)

    def before_send(self) -> None:
        self.events.append("before")

    def send(self, bucket: SlotBucket) -> Work:
        if not bucket.slots:
            self.make_room(bucket)
        self.events.append(f"send {bucket.index} without {bucket.unfilled()}")
        return Work(self.fails)

    def after_last_send(self) -> None:
        self.events.append("after")

    def receive(self, bucket: SlotBucket, result: Any) -> None:
        self.events.append(f"{result} {bucket.index}")

    def reopen(self) -> None:
        self.events.append("reopen")

    def non_finite(self) -> None:
        return None

    def flats(self) -> list[torch.Tensor]:
        return []

    def restore(self, gradients: Any) -> None:
        """Not asked here."""

    def taken(self, *kinds: str) -> list[str]:
        """Return the events of these kinds since the last call."""
        found = [event for event in self.events if event.split()[0] in kinds]
        self.events.clear()
        return found


def layers(count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(count)))


def backward(buckets: Buckets, loss: torch.Tensor, *, reduce: bool = True) -> None:
    buckets.begin(reduce=reduce)
    loss.backward()
    buckets.end()


def test_a_bucket_is_sent_only_after_those_before_it():
    module = layers()
    buckets = Buckets(module)
    # Filled in the order 2, 0, 1: bucket 2 is full first, and has to wait.
    buckets.begin(reduce=True)
    module[0].weight.sum().backward()
    assert buckets.taken("send") == []
    module[2].weight.sum().backward()
    assert buckets.taken("send") == ["send 0 without []"]
    module[1].weight.sum().backward()
    assert buckets.taken("send") == ["send 1 without []", "send 2 without []"]
    buckets.end()
    assert buckets.taken("received") == ["received 0", "received 1", "received 2"]


def test_the_hooks_of_a_subclass_surround_each_send():
    module = layers(2)
    buckets = Buckets(module)
    backward(buckets, module(torch.ones(1, 2)).sum())
    assert buckets.events == [
        *("room 0", "before", "send 0 without []"),
        *("room 1", "before", "send 1 without []", "after"),
        *("received 0", "received 1"),
    ]


def test_what_is_not_used_is_sent_at_the_end():
    module = layers()
    buckets = Buckets(module, per_bucket=2)
    backward(buckets, module[1](torch.ones(1, 2)).sum())
    assert buckets.taken("send", "after") == ["send 0 without [0]", "send 1 without [0]", "after"]


def test_nothing_is_sent_inside_a_window_and_gradients_add_in_the_slot():
    module = layers(1)
    buckets = Buckets(module)
    backward(buckets, module(torch.ones(1, 2)).sum(), reduce=False)
    slot = module[0].weight.grad
    assert slot is buckets.buckets[0].slots[0]
    backward(buckets, module(torch.ones(1, 2)).sum(), reduce=True)
    assert module[0].weight.grad is slot
    assert slot.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert buckets.taken("room", "send", "reopen") == ["room 0", "send 0 without []"]


def test_a_window_that_was_sent_is_reopened_once():
    module = layers(1)
    buckets = Buckets(module)
    for reduce in (True, False, True):
        backward(buckets, module(torch.ones(1, 2)).sum(), reduce=reduce)
    assert buckets.taken("send", "reopen") == ["send 0 without []", "reopen", "send 0 without []"]
    buckets.clear()
    backward(buckets, module(torch.ones(1, 2)).sum())
    assert buckets.taken("reopen") == []


def test_after_an_abort_with_nothing_under_way_clearing_is_enough():
    module = layers()
    buckets = Buckets(module)
    buckets.begin(reduce=True)
    module[0].weight.sum().backward()
    buckets.abort()
    with pytest.raises(EngineError, match="the backward before this one raised"):
        buckets.begin(reduce=True)
    buckets.clear()
    backward(buckets, module(torch.ones(1, 2)).sum())
    assert buckets.taken("send")[-1] == "send 2 without []"


def test_after_an_abort_with_a_collective_under_way_the_ranks_are_out_of_step():
    module = layers()
    buckets = Buckets(module)
    buckets.begin(reduce=True)
    module[2].weight.sum().backward()
    buckets.abort()
    with pytest.raises(EngineError, match="no longer in step"):
        buckets.clear()


def test_a_collective_that_fails_names_its_parameters():
    module = layers()
    buckets = Buckets(module, per_bucket=2)
    buckets.fails = True
    with pytest.raises(CommError, match=r"could not be summed over the ranks: connection closed by peer\n") as caught:
        backward(buckets, module(torch.ones(1, 2)).sum())
    assert caught.value.where == "bucket 0 of 2, parameters '2.weight' to '1.weight'"


def test_a_changed_model_is_told_to_the_others_before_it_is_raised():
    module = layers()
    buckets = Buckets(module, per_bucket=2)
    with pytest.raises(EngineError, match="frozen") as caught:
        buckets.begin(reduce=True, change=Change("frozen", "0.weight", module[0].weight))
    assert caught.value.where == "parameter '0.weight'"
    assert buckets.mark_of_change() == (1, 0)
    assert buckets.taken("send", "received", "after") == [
        *("send 0 without [0, 1]", "send 1 without [0]", "after", "received 0", "received 1")
    ]
    assert not buckets.is_reduced
    with pytest.raises(EngineError, match="raised"):
        buckets.check_whole()
    buckets.clear()
    backward(buckets, module(torch.ones(1, 2)).sum())
    assert buckets.is_reduced


def test_what_is_no_trained_parameter_is_told_by_the_first_that_has_elements():
    module = nn.ParameterList([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(0))])
    buckets = Buckets(module, per_bucket=1)
    with pytest.raises(EngineError, match="added"):
        buckets.begin(reduce=True, change=Change("added", "new", nn.Parameter(torch.ones(1))))
    assert buckets.mark_of_change() == (1, 0)


def test_the_other_ranks_hear_that_it_was_not_them():
    module = layers(1)
    buckets = Buckets(module)
    with pytest.raises(EngineError, match="another rank changed its model") as caught:
        buckets.refuse_change(module[0].weight)
    assert "'0.weight'" in caught.value.where


def test_a_cast_after_initialize_is_named_where_the_gradient_does_not_fit():
    module = layers(1)
    buckets = Buckets(module)
    module.double()
    with pytest.raises(EngineError, match=r"a parameter is \[2, 2\] torch.float64 on cpu") as caught:
        backward(buckets, module(torch.ones(1, 2, dtype=torch.float64)).sum(), reduce=False)
    assert caught.value.where == "parameter '0.weight'"
    assert "expected to be [2, 2] torch.float32 on cpu" in caught.value.what


def test_detaching_leaves_plain_pytorch():
    module = layers(1)
    buckets = Buckets(module)
    backward(buckets, module(torch.ones(1, 2)).sum())
    buckets.detach()
    buckets.detach()
    assert module[0].weight.grad is None
    module(torch.ones(1, 2)).sum().backward()
    assert module[0].weight.grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]
