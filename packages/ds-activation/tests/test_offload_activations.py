"""Hidden states of checkpointed layers on the host: what is marked, moved and counted, and that gradients stay."""

from __future__ import annotations

import importlib.util
import sys
import threading
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_activation import offload_activations
from ds_activation.offload_activations import (
    CheckpointHiddenStatesOffload,
    get_checkpoint_hidden_states_offloading_ctx_manager,
    patch_gradient_checkpointing_layer,
    unpatch_gradient_checkpointing_layer,
)
from ds_core import log
from ds_core.errors import DsError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

WIDTH, DEPTH = 8, 4


def _module(name: str) -> ModuleType:
    """Return the module of that name beside this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FakeDevice = _module("fake_device").FakeDevice


class Layer(nn.Module):
    """Stands in for the class of ``transformers``, and checkpoints as that does since 4.52."""

    gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(super().__call__, hidden, *args, use_reentrant=False, **kwargs)
        return super().__call__(hidden, *args, **kwargs)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        out = nn.functional.dropout(torch.tanh(self.inner(hidden)), 0.3) * scale
        return hidden + (out if mask is None else out * mask)


@pytest.fixture(autouse=True)
def layer_class(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    call = Layer.__call__
    monkeypatch.setattr(offload_activations, "_layer_class", lambda: Layer)
    yield
    assert Layer.__call__ is call  # whatever a test did, it is left as it was


def stack() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(DEPTH))


def forward(layers: nn.ModuleList) -> torch.Tensor:
    torch.manual_seed(1)
    hidden = torch.randn(64, WIDTH, requires_grad=True) * 1
    mask = torch.ones(64, WIDTH)
    for layer in layers:
        hidden = layer(hidden, mask, scale=0.5)
    return hidden.square().sum()


def gradients(layers: nn.ModuleList) -> list[torch.Tensor]:
    found = [param.grad for param in layers.parameters() if param.grad is not None]
    layers.zero_grad()
    return found


def offload(device: Any = None, **options: Any) -> CheckpointHiddenStatesOffload:
    return CheckpointHiddenStatesOffload(**options, driver=FakeDevice() if device is None else device)


@pytest.mark.parametrize("keep_last", [0, 1, 2, DEPTH + 1])
@pytest.mark.parametrize("stash", [0, 2])
def test_gradients_are_the_same_bit_for_bit(keep_last: int, stash: int) -> None:
    layers, device = stack(), FakeDevice()
    forward(layers).backward()
    expected = gradients(layers)
    with offload(device, keep_last_count=keep_last, max_fwd_stash_count=stash) as context:
        forward(layers).backward()
    found = gradients(layers)
    assert len(found) == len(expected) == 2 * DEPTH
    assert all(map(torch.equal, found, expected))
    kept = min(keep_last, DEPTH)
    moved, nbytes = DEPTH - kept, 64 * WIDTH * 4
    stats = asdict(context.stats)
    # Of each layer the hidden states and the mask, and what is saved outside of them.
    assert stats.pop("saved_tensors_seen") >= 2 * DEPTH
    assert stats == {
        "marked_tensors": DEPTH,
        "skipped_marked_tensors": 0,
        "kept_last_tensors": kept,
        "offloaded_tensors": moved,
        "restored_tensors": moved,
        "offloaded_bytes": moved * nbytes,
        "restored_bytes": moved * nbytes,
    }
    assert device.log.count("to host") == moved


def test_the_graph_can_be_kept_and_used_again() -> None:
    layers, device = stack(), FakeDevice()
    loss = forward(layers)
    loss.backward(retain_graph=True)
    loss.backward()
    expected = gradients(layers)
    with offload(device, max_fwd_stash_count=0) as context:
        loss = forward(layers)
        loss.backward(retain_graph=True)
        copies = list(device.log)
        loss.backward()
    assert device.log == copies == ["to host"] * (DEPTH - 1) + ["to device"] * (DEPTH - 1)
    assert all(map(torch.equal, gradients(layers), expected))
    assert context.stats.restored_tensors == DEPTH - 1


def test_buffers_serve_step_after_step() -> None:
    layers, device = stack(), FakeDevice()
    with offload(device, max_fwd_stash_count=0) as context:
        for _ in range(3):
            forward(layers).backward()
    assert len(device.buffers) == DEPTH - 1
    assert context.stats.offloaded_tensors == 3 * (DEPTH - 1)


def test_an_instance_can_be_entered_again_after_it_was_left() -> None:
    layers, context = stack(), offload()
    for times in (1, 2):
        with context:
            forward(layers).backward()
        assert context.stats.marked_tensors == times * DEPTH


def test_tensors_of_the_host_are_skipped() -> None:
    layers = stack()
    with get_checkpoint_hidden_states_offloading_ctx_manager() as context:
        forward(layers).backward()
    stats = context.stats
    assert (stats.marked_tensors, stats.skipped_marked_tensors) == (DEPTH, DEPTH)
    assert (stats.offloaded_tensors, stats.kept_last_tensors, stats.restored_tensors) == (0, 0, 0)


@pytest.mark.parametrize(
    ("given", "options", "streams"),
    [
        (nn.Parameter(torch.ones(600)), {}, True),
        (nn.Buffer(torch.ones(600)), {}, True),
        (torch.ones(255), {}, True),
        (torch.ones(600), {"min_offload_bytes": 2401}, True),
        (torch.ones(1, 600).expand(2, 600), {}, True),
        (torch.ones(600), {}, False),
    ],
    ids=["parameter", "buffer", "1020 bytes", "2400 bytes", "repeated", "no streams"],
)
def test_some_kinds_are_skipped(given: torch.Tensor, options: dict[str, int], streams: bool) -> None:
    device = FakeDevice(streams=streams)
    weight = torch.ones((), requires_grad=True)
    with offload(device, keep_last_count=0, **options) as context, context.marking(given):
        out = (weight * given).sum()
        out.backward()
    assert (context.stats.marked_tensors, context.stats.skipped_marked_tensors) == (1, 1)
    assert device.log == []
    assert weight.grad is not None
    assert weight.grad.item() == given.numel()


def test_with_blocking_copies_gradients_are_the_same() -> None:
    layers, device = stack(), FakeDevice()
    forward(layers).backward()
    expected = gradients(layers)
    with offload(device, use_streams=False, use_pin_memory=False):
        forward(layers).backward()
    assert all(map(torch.equal, gradients(layers), expected))
    assert device.log.count("to host") == DEPTH - 1
    assert not any(pinned for _, pinned in device.buffers)


@pytest.mark.parametrize("what", ["evaluation", "no gradients", "not checkpointed", "by keyword"])
def test_only_inputs_of_checkpointed_calls_are_marked(what: str) -> None:
    layers = stack()
    layers.train(what != "evaluation")
    layers[0].gradient_checkpointing = what != "not checkpointed"
    hidden = torch.ones(64, WIDTH, requires_grad=True)
    with offload() as context, torch.set_grad_enabled(what != "no gradients"):
        if what == "by keyword":
            layers[0](hidden=hidden)
        else:
            layers[0](hidden)
    assert context.stats.marked_tensors == 0


def test_an_input_that_a_wrapper_passes_on_as_another_tensor_is_marked() -> None:
    layers = stack()
    hidden = torch.ones(64, WIDTH, requires_grad=True)
    with offload(keep_last_count=0) as context, context.marking(hidden):
        checkpoint(layers[0].forward, hidden.view_as(hidden), use_reentrant=False).sum().backward()
    assert (context.stats.marked_tensors, context.stats.offloaded_tensors) == (1, 1)


def test_a_mark_is_for_one_saving_inside_of_its_call() -> None:
    layer, hidden = stack()[0], torch.ones(64, WIDTH, requires_grad=True)
    with offload(keep_last_count=0) as context:
        layer(hidden, hidden)  # the same tensor is the mask
        assert context.stats.marked_tensors == 1
        with context.marking(hidden):
            pass
        (hidden * hidden).sum().backward()
    assert context.stats.marked_tensors == 1


def test_nothing_is_held_after_the_context() -> None:
    device = FakeDevice()
    hidden = device.tensor(torch.ones(64, WIDTH)).requires_grad_()
    with offload(device, keep_last_count=0) as context:
        stack()[0](hidden)
        del hidden
        assert len(device._blocks) == 1  # its copy has only begun
    assert device._blocks == {}
    assert context.stats.offloaded_tensors == 1


def test_the_innermost_context_takes_them() -> None:
    layers = stack()
    with offload() as outer, offload() as inner:
        forward(layers).backward()
    assert (outer.stats.saved_tensors_seen, inner.stats.marked_tensors) == (0, DEPTH)


def test_another_thread_is_left_alone() -> None:
    layers = stack()
    with offload() as context:
        thread = threading.Thread(target=lambda: forward(layers).backward())
        thread.start()
        thread.join()
    assert len(gradients(layers)) == 2 * DEPTH
    assert context.stats.saved_tensors_seen == 0


def test_an_error_inside_leaves_all_as_it_was() -> None:
    layers = stack()
    context = offload()

    def broken() -> None:
        with context:
            forward(layers)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        broken()
    with context:
        with pytest.raises(TypeError):
            layers[0](torch.ones(64, WIDTH), nothing=1)
        forward(layers).backward()
    assert context.stats.marked_tensors == 2 * DEPTH + 1


def test_a_saved_tensor_that_was_modified_in_place_is_an_error() -> None:
    weight = torch.ones(3, requires_grad=True)
    factor = torch.ones(3)
    with offload():
        out = (weight * factor).sum()
        factor.add_(1)
        with pytest.raises(RuntimeError, match="modified in place"):
            out.backward()


def test_saved_outputs_make_no_cycle() -> None:
    device = FakeDevice()
    given = device.tensor(torch.ones(3)).requires_grad_()
    with offload(device) as context:
        out = given.exp()  # saves its output
        assert context.stats.saved_tensors_seen == 1
        del out
    del given
    assert device._blocks == {}


@pytest.mark.parametrize(
    "name", ["min_offload_bytes", "max_fwd_stash_count", "max_cpu_buffer_pool_count", "keep_last_count"]
)
def test_negative_numbers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1"):
        get_checkpoint_hidden_states_offloading_ctx_manager(**{name: -1})
    get_checkpoint_hidden_states_offloading_ctx_manager(**{name: 0})


def test_entering_twice_is_an_error() -> None:
    with offload() as context:
        with pytest.raises(RuntimeError, match="entered already") as caught:
            context.__enter__()
        assert isinstance(caught.value, DsError)
        forward(stack()).backward()
    assert context.stats.marked_tensors == DEPTH


@pytest.mark.parametrize("again", [True, False])
def test_backward_after_the_context_is_an_error(again: bool) -> None:
    with offload() as context:
        loss = forward(stack())
    if again:
        context.__enter__()
    with pytest.raises(RuntimeError, match="backward came after the context"):
        loss.backward()
    if again:
        context.__exit__(None, None, None)


def test_the_class_is_patched_until_the_last_context_is_left() -> None:
    own = Layer.__call__
    with offload():
        patched = Layer.__call__
        assert patched is not own
        with offload():
            assert Layer.__call__ is patched
        assert Layer.__call__ is patched
        patch_gradient_checkpointing_layer()
    assert Layer.__call__ is patched
    unpatch_gradient_checkpointing_layer()
    assert Layer.__call__ is own
    unpatch_gradient_checkpointing_layer()  # once more than patched
    with offload():
        assert Layer.__call__ is not own


def test_a_class_without_a_call_of_its_own_has_none_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(nn.Linear):
        gradient_checkpointing = True

    monkeypatch.setattr(offload_activations, "_layer_class", lambda: Plain)
    layer = Plain(3, 3)
    with offload(min_offload_bytes=0) as context:
        assert "__call__" in vars(Plain)
        layer(torch.ones(2, 3)).sum().backward()
    assert "__call__" not in vars(Plain)
    assert context.stats.marked_tensors == 1


def test_who_wrapped_it_meanwhile_is_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    before = Layer.__call__
    with offload():
        ours = Layer.__call__

        def theirs(self: Layer, *args: Any, **kwargs: Any) -> Any:
            calls.append(self)
            return ours(self, *args, **kwargs)

        Layer.__call__ = theirs  # type: ignore[method-assign]
    assert Layer.__call__ is theirs
    forward(stack()).backward()
    with offload() as context:
        forward(stack()).backward()
    assert context.stats.marked_tensors == DEPTH
    assert len(calls) == 2 * DEPTH
    Layer.__call__ = before  # type: ignore[method-assign]


@pytest.fixture
def real_class(monkeypatch: pytest.MonkeyPatch, layer_class: None) -> Iterator[None]:
    monkeypatch.undo()
    offload_activations._layer_class.cache_clear()
    yield
    offload_activations._layer_class.cache_clear()


def test_without_transformers_nothing_is_marked(
    real_class: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log.reset()  # an engine of another test may have given the logger a handler of its own
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.modeling_layers", None)
    for _ in range(2):
        with offload() as context:
            forward(stack()).backward()
        assert context.stats.marked_tensors == 0
    assert caplog.text.count("no hidden states are offloaded by themselves: that takes transformers>=4.52") == 1
    with pytest.raises(RuntimeError, match=r"pip install 'transformers>=4\.52'"):
        patch_gradient_checkpointing_layer()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_hugging_face_model(kind: str, real_class: None) -> None:
    transformers = pytest.importorskip("transformers")
    layer_class = pytest.importorskip("transformers.modeling_layers").GradientCheckpointingLayer
    torch.manual_seed(0)
    if kind == "gpt2":  # with dropout
        config = transformers.GPT2Config(vocab_size=11, n_positions=16, n_embd=32, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, **sizes))
    model.train()
    ids = torch.randint(0, 11, (2, 16))

    def run() -> list[torch.Tensor]:
        torch.manual_seed(1)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found = [param.grad for param in model.parameters()]
        model.zero_grad()
        return found

    plain = run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name is to go
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(map(torch.equal, run(), plain))
    before = vars(layer_class).get("__call__")
    device = FakeDevice()
    with offload(device, keep_last_count=1, max_fwd_stash_count=0) as context:
        assert vars(layer_class).get("__call__") is not before
        found = run()
    assert vars(layer_class).get("__call__") is before
    assert all(map(torch.equal, found, plain))
    stats = context.stats
    assert (stats.marked_tensors, stats.skipped_marked_tensors, stats.kept_last_tensors) == (2, 0, 1)
    assert (stats.offloaded_tensors, stats.restored_tensors) == (1, 1)
    assert stats.offloaded_bytes == stats.restored_bytes == 2 * 16 * 32 * 4
    assert device.log == ["to host", "to device"]
