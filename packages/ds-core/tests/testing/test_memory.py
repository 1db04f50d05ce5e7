import gc

import pytest
import torch
from torch import nn

from ds_core.testing.memory import LiveStorage

F = 4  # bytes of a float32
BATCH, IN, HIDDEN, OUT = 8, 16, 32, 4
WEIGHTS = (HIDDEN * IN + HIDDEN + OUT * HIDDEN + OUT) * F


@pytest.fixture(autouse=True)
def _no_garbage():
    # What earlier tests left in reference cycles must not be freed in the middle of a count.
    gc.collect()


def mlp():
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUT))


def test_a_freed_temporary_counts_in_the_peak_only():
    with LiveStorage() as live:
        kept = torch.zeros(10)
        other = torch.ones(10)
        assert live.live_bytes == 2 * 10 * F
        del other
        assert live.live_bytes == 10 * F
    assert live.peak_bytes == 2 * 10 * F
    assert kept.sum() == 0


def test_views_and_in_place_ops_add_nothing():
    with LiveStorage() as live:
        tensor = torch.zeros(6, 4)
        view = tensor.view(24)[3:].view(3, 7).t()
        view.add_(1).mul_(2)
        tensor.detach().zero_()
        parts = tensor.split(2)
        assert live.live_bytes == live.peak_bytes == 24 * F
        del tensor, view
        assert live.live_bytes == 24 * F, "a view keeps the storage"
        del parts
        assert live.live_bytes == 0


def test_every_way_to_make_a_tensor_is_seen():
    with LiveStorage() as live:
        made = [torch.tensor([1.0, 2.0]), torch.empty(3), torch.arange(4.0), torch.zeros(2, dtype=torch.bfloat16)]
        assert live.live_bytes == (2 + 3 + 4) * F + 2 * 2
        made.append(made[0].clone())
        assert live.live_bytes == (2 + 3 + 4 + 2) * F + 2 * 2


def test_set_moves_a_tensor_to_another_storage():
    with LiveStorage() as live:
        first, second = torch.zeros(10), torch.zeros(20)
        first.set_(second)
        assert live.live_bytes == 20 * F
        del second
        assert live.live_bytes == 20 * F
        del first
        assert live.live_bytes == 0


def test_data_swaps_free_the_old_storage():
    with LiveStorage() as live:
        param = nn.Parameter(torch.zeros(10))
        param.data = torch.zeros(2)
        assert live.live_bytes == 2 * F


def test_resized_storages_count_their_new_size():
    original = torch.UntypedStorage.resize_
    with LiveStorage() as live:
        tensor = torch.zeros(10)
        tensor.untyped_storage().resize_(0)
        assert live.live_bytes == 0
        tensor.untyped_storage().resize_(400)
        assert live.live_bytes == 400
        tensor.resize_(200)
        assert live.live_bytes == 200 * F
        out = torch.empty(0)
        torch.add(tensor, tensor, out=out)
        assert live.live_bytes == 400 * F
    assert torch.UntypedStorage.resize_ is original, "the wrapper is gone"


def test_existing_tensors_count_from_when_they_are_tracked():
    model = mlp()
    before = torch.zeros(10)
    with LiveStorage() as live:
        before.add_(1)
        before.view(2, 5).mul_(2)
        assert live.live_bytes == 0
        live.track(model, "parameters")
        live.track(model)
        live.track({"a": [before, before[2:]], "note": "text", "number": 3})
        assert live.live_bytes == WEIGHTS + 10 * F
        assert live.by_label == {"parameters": WEIGHTS, "": 10 * F}
        del before
        assert live.live_bytes == WEIGHTS
    assert live.by_label == {"parameters": WEIGHTS}


def test_forward_and_backward_of_an_mlp():
    model, inputs = mlp(), torch.randn(BATCH, IN)
    with LiveStorage() as live:
        loss = model(inputs).square().sum()
        # relu keeps its output for backward, square its input; the first layer's output is gone.
        assert live.live_bytes == (BATCH * HIDDEN + BATCH * OUT + 1) * F
        # ... but was there together with the relu's.
        assert live.peak_bytes == 2 * BATCH * HIDDEN * F
        loss.backward()
        del loss
        assert live.live_bytes == WEIGHTS, "what is left are the gradients"
        with live.label("second"):
            model(inputs).square().sum().backward()
        assert live.live_bytes == WEIGHTS, "further gradients are added in place"
        live.reset_peak()
        assert live.peak_bytes == WEIGHTS
        model.zero_grad(set_to_none=True)
        assert live.live_bytes == 0
        assert live.peak_bytes == WEIGHTS


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.zeros(100))
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        scratch = torch.zeros(1000)
        return grad * 2 + scratch.sum()


def test_custom_functions_are_seen_in_both_directions():
    weight = torch.ones(5, requires_grad=True)
    with LiveStorage() as live:
        out = Doubled.apply(weight)
        assert live.live_bytes == (100 + 5) * F
        live.reset_peak()
        out.backward(torch.ones(5))
        assert live.peak_bytes >= (100 + 5 + 1000 + 5) * F
        del out
        assert live.live_bytes == 5 * F


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_state(fused):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with LiveStorage() as live, live.label("optimizer"):
        optimizer.step()
        # Two moments per weight and one step counter per parameter.
        assert live.live_bytes == 2 * WEIGHTS + 4 * F
        assert live.by_label == {"optimizer": 2 * WEIGHTS + 4 * F}
        live.reset_peak()
        optimizer.step()
        assert live.live_bytes == 2 * WEIGHTS + 4 * F
        if fused:
            assert live.peak_bytes == live.live_bytes, "the update is one kernel"
        optimizer.state.clear()
        assert live.live_bytes == 0
    with LiveStorage() as live:
        optimizer.step()
    with LiveStorage() as live:
        live.track(optimizer)
        assert live.live_bytes == 2 * WEIGHTS + 4 * F


def test_labels_say_what_the_peak_was_made_of():
    with LiveStorage() as live:
        with live.label("weights"):
            weight = torch.zeros(10)
            with live.label("inner"):
                inner = torch.zeros(1)
        temporary = torch.zeros(30)
        del temporary
        live.track(inner, "moved")
        assert live.by_label == {"weights": 10 * F, "moved": F}
        assert live.at_peak == {"weights": 10 * F, "inner": F, "": 30 * F}
    assert weight.sum() + inner.sum() == 0


def test_fake_and_meta_tensors_hold_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with LiveStorage() as live, FakeTensorMode():
        fake = torch.zeros(100) + 1
    with live:
        meta = torch.zeros(100, device="meta") + 1
    assert live.peak_bytes == 0
    assert fake.shape == meta.shape


def test_sparse_gradients_count_indices_and_values():
    embedding = nn.Embedding(50, 6, sparse=True)
    index = torch.tensor([3, 4])
    with LiveStorage() as live:
        embedding(index).sum().backward()
        gc.collect()
        indices = embedding.weight.grad._indices()
        # Two rows, and their numbers unless they are a view of the ones given, which was there before.
        is_view = indices.untyped_storage().data_ptr() == index.untyped_storage().data_ptr()
        assert live.live_bytes == 2 * 6 * F + (0 if is_view else 2 * 8)


def test_numbers_stay_after_the_end():
    with LiveStorage() as live:
        tensor = torch.zeros(10)
    del tensor
    assert live.live_bytes == 10 * F
    assert live.by_label == {"": 10 * F}
    with live:
        assert live.live_bytes == live.peak_bytes == 0, "it begins anew"
