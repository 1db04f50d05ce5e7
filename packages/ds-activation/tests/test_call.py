"""One checkpointed call: every form of arguments and outputs, bit for bit what a plain call gives, in every mode."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import logging
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError, CheckpointPolicy, create_selective_checkpoint_contexts

from ds_activation import call as call_module
from ds_activation import kept
from ds_activation import settings as settings_module
from ds_activation.call import checkpoint, non_reentrant_checkpoint, run, shaped_checkpoint
from ds_activation.host_copies import HostCopies
from ds_activation.rng import get_cuda_rng_tracker
from ds_activation.settings import Settings
from ds_core.accelerator import set_accelerator
from ds_core.accelerator.cpu import CpuAccelerator
from ds_core.errors import EngineError
from ds_core.log import logger
from ds_core.testing.activation import ActivationContract
from ds_core.testing.memory import LiveStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

WIDTH = 8


class OneRank:
    """An mpu of one rank."""

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_group(self) -> None:
        return None


MODES: dict[str, Callable[[], Settings]] = {
    "default": Settings,
    "cpu": lambda: Settings(cpu_checkpointing=True),
    "partition": lambda: Settings(partition_activations=True, mpu=OneRank()),
    "contiguous": lambda: Settings(
        partition_activations=True, contiguous_memory_optimization=True, number_checkpoints=2, mpu=OneRank()
    ),
    "host": lambda: Settings(cpu_checkpointing=True),
    "watched": lambda: Settings(synchronize_checkpoint_boundary=True, profile=True, cpu_checkpointing=True),
}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Settings:
    if request.param == "host":
        # As on a GPU: each input leaves, on a stream that is behind until it is waited for.
        copies = HostCopies(keep_last=0, driver=_module("fake_device").FakeDevice())
        monkeypatch.setattr(kept, "host_copies", lambda device: copies)
    return MODES[request.param]()


def _module(name: str) -> ModuleType:
    """Return the module of that name beside this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_inputs_leave_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _module("fake_device").FakeDevice()
    copies = HostCopies(keep_last=0, driver=device)
    monkeypatch.setattr(kept, "host_copies", lambda device: copies)
    x = torch.ones(4, requires_grad=True)
    h = x * 2
    out = run(lambda a, b, mask: (a * b).exp() * mask, (h, h, h > 0), {}, Settings(cpu_checkpointing=True))
    assert device.log == ["to host"], "once, and the mask stays"
    out.sum().backward()
    assert copies.stats.restored_bytes == copies.stats.offloaded_bytes == 16


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    settings_module.forget()
    get_cuda_rng_tracker().reset()


@dataclass
class Adapter:
    """What the contract of the seam calls."""

    settings: Settings

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return run(function, args, kwargs, self.settings)


class TestContract(ActivationContract):
    @pytest.fixture
    def activation(self, mode: Settings) -> Any:
        return Adapter(mode)


def plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def by(mode: Settings) -> Callable[..., Any]:
    return Adapter(mode).checkpoint


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3))


def with_nested_arguments(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    def function(pair: Any, options: Any) -> Tensor:
        return layer(pair[0] + pair[1][0]) * options["scale"][0]

    return call(function, [x, (y,)], {"scale": [y]})


def with_other_values(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    def function(none: None, x: Tensor, flag: bool, mask: Tensor, text: str, y: Tensor, kind: type) -> Tensor:
        assert none is None
        assert flag is True
        assert text == "text"
        assert kind is Settings
        return layer(x).masked_fill(mask == 1, 0.0) + y

    mask = (torch.arange(WIDTH) % 2).to(torch.int32)
    return call(function, None, x, True, mask, "text", y, Settings)


def with_bool_mask(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    return call(lambda x, mask, y: torch.where(mask, layer(x), y), x, torch.arange(WIDTH) > 3, y)


def with_keywords(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    # All are the function's own, those too that torch's checkpoint takes for itself.
    def function(x: Tensor, *, y: Tensor, use_reentrant: bool, function: str) -> Tensor:
        assert use_reentrant
        return layer(x) * y

    return call(lambda x, **kwargs: function(x, function="f", **kwargs), x, y=y, use_reentrant=True)


def other_outputs(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    def function(x: Tensor) -> Any:
        out = layer(x)
        return out, out.argmax(-1), out > 0, None, "text", {"inner": [out * y, 3]}

    return call(function, x)


def a_dict(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    return call(lambda x: {"out": layer(x), "none": None}, x)


def a_list_of_one(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    return call(lambda x: [layer(x)], x)


def residual(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    return x + call(layer, x)


def reused(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    return call(layer, call(layer, x) + y)


def nested(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    def outer(x: Tensor, y: Tensor) -> Tensor:
        return call(layer, x) * y + call(lambda z: call(layer, z), y)

    return call(outer, x, y)


def frozen_input(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    return call(layer, x.detach()) * y + x


def same_tensor_twice(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    return call(lambda a, b: layer(a) * b, x, x) + y


def transposed(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    # A view of the transposed one works only if its memory is in the same order again.
    return call(lambda a: layer(a.t().view(-1).view(-1, WIDTH)), x.t()) + y


def with_gaps_and_repeats(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    return call(lambda a, b: layer(torch.cat([a, a], 1) + b), x[:, ::2], y[:1].expand(len(x), -1))


def no_grad_inside(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = layer(x).abs().mean()
        return layer(x) / scale

    return call(function, x) + y


def autocast(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call(layer, x) + y


def fork_inside(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("one", 4)

    def function(x: Tensor) -> Tensor:
        with tracker.fork("one"):
            x = nn.functional.dropout(x, 0.5)
        return layer(x)

    with tracker.fork("one"):
        out = call(function, x) * torch.rand(WIDTH) + y
    return out + call(function, x)


def a_container_that_the_function_changes(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    stack = [x, y]

    def function(stack: list[Tensor]) -> Tensor:
        return layer(stack.pop() * stack.pop())

    out = call(function, stack)
    assert not stack, "the caller's list in the first run, and not again in the second"
    return out


def no_checkpointing(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
    x.no_checkpointing = True  # type: ignore[attr-defined]
    return call(lambda a, b: layer(a) + b, x, y)


FORMS = [
    *(with_nested_arguments, with_other_values, with_bool_mask, with_keywords, other_outputs, a_dict, a_list_of_one),
    *(residual, reused, nested, frozen_input, same_tensor_twice, transposed, with_gaps_and_repeats, no_grad_inside),
    *(autocast, fork_inside, a_container_that_the_function_changes, no_checkpointing),
]


def measured(form: Callable[..., Any], call: Callable[..., Any]) -> list[Any]:
    """Return the outputs of ``form``, all gradients, and a random number drawn afterwards."""
    layer = layers()
    x, y = (torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    inputs = [x.requires_grad_(), y.requires_grad_()]
    torch.manual_seed(3)
    # What the call gets is no leaf: gradients go on through the graph around it.
    output = tree_leaves(form(call, layer, x * 2, y * 3))
    differentiable = [each for each in output if isinstance(each, Tensor) and each.requires_grad]
    total = sum((each.float().square().sum() for each in differentiable), torch.zeros(()))
    total.backward()
    found = [each.detach() if isinstance(each, Tensor) else each for each in output]
    return [*found, *(each.grad for each in (*inputs, *layer.parameters())), torch.rand(2)]


def assert_same(left: list[Any], right: list[Any]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_what_a_plain_call_gives(form: Callable[..., Any], mode: Settings) -> None:
    assert_same(measured(form, plain), measured(form, by(mode)))


def test_outputs_have_the_form_that_the_function_gave_them(mode: Settings) -> None:
    call = by(mode)
    weight = torch.ones(2, requires_grad=True)
    thing = object()
    assert call(lambda x: thing, weight) is thing
    assert call(lambda x: x, weight) is weight
    assert call(lambda x: None, weight) is None
    assert call(lambda x: (), weight) == ()
    assert type(call(lambda x: [x], weight)) is list
    named = torch.return_types.max((weight, weight))
    assert call(lambda x: named, weight) is named


def test_public_calls_have_the_shape_that_deepspeed_gives_outputs() -> None:
    weight = torch.ones(2, requires_grad=True)
    for call in (shaped_checkpoint, non_reentrant_checkpoint):
        assert call(lambda x: [x], weight) is weight
        assert call(lambda x: [x, 1], weight) == (weight, 1)
        assert call(lambda x: None, weight) is None
    assert checkpoint(lambda x: [x], weight) == [weight]


def test_what_is_lent_to_the_call_is_left_alone(mode: Settings) -> None:
    layer, x = layers(), torch.randn(5, WIDTH, requires_grad=True)
    h = x * 2
    before = h.detach().clone()
    with torch.no_grad():
        by(mode)(layer, h)
    assert torch.equal(h, before)
    out = by(mode)(layer, h)
    assert torch.equal(h, before)
    out.sum().backward()
    assert torch.equal(h, before)
    assert h.shape == before.shape


def test_inputs_are_let_go_after_backward(mode: Settings) -> None:
    layer = layers()
    h = torch.randn(5, WIDTH, requires_grad=True) * 2
    out = by(mode)(lambda x: layer(x), h)
    ref = weakref.ref(h)
    del h
    out.sum().backward()
    del out
    gc.disable()  # no cycle may hold it
    try:
        assert ref() is None
    finally:
        gc.enable()


def test_backward_twice(mode: Settings) -> None:
    def grads(call: Callable[..., Any]) -> list[Tensor]:
        layer, x = layers(), torch.ones(5, WIDTH, requires_grad=True)
        torch.manual_seed(1)
        out = call(lambda z: call(layer, z), x * 2).square().sum()
        out.backward(retain_graph=True)
        out.backward()
        return [x.grad, *(param.grad for param in layer.parameters())]  # type: ignore[list-item]

    assert_same(grads(plain), grads(by(mode)))


def test_gradients_of_some_inputs(mode: Settings) -> None:
    def grads(call: Callable[..., Any]) -> list[Any]:
        layer, x = layers(), torch.ones(5, WIDTH, requires_grad=True)
        torch.manual_seed(1)
        out = call(layer, x * 2).square().sum()
        found = [*torch.autograd.grad(out, [x, layer[0].weight], retain_graph=True)]
        out.backward(inputs=[x])
        return [*found, x.grad, layer[0].weight.grad]

    assert_same(grads(plain), grads(by(mode)))


@pytest.mark.parametrize("depth", [1, 3])
def test_an_error_inside_leaves_no_trace(mode: Settings, depth: int) -> None:
    call = by(mode)

    def broken(x: Tensor) -> Tensor:
        raise KeyError(x.exp().sum().item())

    function = broken
    for _ in range(depth):
        function = functools.partial(call, function)
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(KeyError) as caught:
        function(x)
    # The error is still held here, and with it all frames; what is saved now is nobody's but autograd's.
    y = x.exp()
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y)
    assert caught.value.args
    assert not call_module._is_inside.get()


def test_an_error_in_the_second_run_arrives_as_it_is(mode: Settings) -> None:
    runs: list[int] = []

    def function(x: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) == 2:
            raise KeyError("second")
        return x.exp().exp()

    out = by(mode)(function, torch.ones(2, requires_grad=True))
    with pytest.raises(KeyError, match="second"):
        out.sum().backward()
    assert not call_module._is_inside.get()


@pytest.mark.parametrize("second", [lambda x: x * 2, lambda x: (x[:1] * 2).exp().exp()], ids=["fewer", "other"])
def test_a_second_run_that_differs_is_an_error(mode: Settings, second: Callable[[Tensor], Tensor]) -> None:
    runs: list[int] = []

    def function(x: Tensor) -> Tensor:
        runs.append(1)
        return (x * 2).exp().exp() if len(runs) == 1 else second(x)

    out = by(mode)(function, torch.ones(2, requires_grad=True))
    with pytest.raises(CheckpointError, match=r"function, computed again in backward,.*\n?.*different") as raised:
        out.sum().backward()
    assert isinstance(raised.value, EngineError)
    assert "Tip" not in str(raised.value)


def test_an_input_changed_in_place_afterwards_is_an_error(mode: Settings) -> None:
    x = torch.ones(2, requires_grad=True)
    h = x * 2
    out = by(mode)(lambda z: z.exp().exp(), h)
    h.add_(1)
    if mode.contiguous_memory_optimization:  # it has a copy
        out.sum().backward()
        expected = torch.full((2,), 2.0).exp()
        assert x.grad is not None
        assert torch.allclose(x.grad, 2 * expected * expected.exp())
    else:
        with pytest.raises((RuntimeError, EngineError), match=r"in.?place"):
            out.sum().backward()


def test_the_second_run_is_under_the_autocast_of_the_first(mode: Settings) -> None:
    layer, dtypes = nn.Linear(WIDTH, WIDTH), []

    def function(x: Tensor) -> Tensor:
        out = layer(x)
        dtypes.append(out.dtype)
        return out.exp().exp()

    with torch.autocast("cpu", torch.bfloat16):
        out = by(mode)(function, torch.ones(2, WIDTH, requires_grad=True))
    out.sum().backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16]


def test_inputs_of_inner_calls_are_not_held(mode: Settings) -> None:
    """The outer call computes them again."""
    call = by(mode)
    x = torch.ones(10_000, requires_grad=True)

    def held(function: Callable[[Tensor], Tensor]) -> tuple[int, Tensor]:
        with LiveStorage() as live:
            out = call(function, x)
            return live.live_bytes, out

    def without(z: Tensor) -> Tensor:
        return z.exp().sin().cos()

    def within(z: Tensor) -> Tensor:
        out: Tensor = call(lambda h: h.sin().cos(), z.exp())
        return out

    held(without)[1].sum().backward()  # buffers are made once
    (expected, out), x.grad = held(without), None
    out.sum().backward()
    wanted, x.grad = x.grad, None
    del out
    found, out = held(within)
    assert found - expected < 10_000, "a quarter of one tensor: random states are held"
    out.sum().backward()
    assert wanted is not None
    assert x.grad is not None
    assert torch.equal(x.grad, wanted)


def test_a_context_of_the_caller_sees_the_function_alone(mode: Settings) -> None:
    """Selective checkpointing: products are kept, the rest is computed again; restoring inputs is not counted."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        products = (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(function: Callable[..., Any], *args: Any) -> Any:
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return run(function, args, {}, mode, context_fn=contexts)

    get_cuda_rng_tracker().add("any", 4)

    def outer(call: Any, layer: nn.Module, x: Tensor, y: Tensor) -> Any:
        return call(layer, x) + call(lambda z: layer(z).exp(), y)

    assert_same(measured(outer, plain), measured(outer, selective))


def test_settings_in_force_are_those_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(call_module, "run", lambda function, args, kwargs, settings: seen.append(settings))
    mine = Settings(cpu_checkpointing=True)
    with settings_module.in_force(mine):
        checkpoint(torch.exp, torch.ones(1))
    settings_module.configure(None, profile=False)
    checkpoint(torch.exp, torch.ones(1))
    assert seen[0] is mine
    assert seen[1] is settings_module.current()


class Counting(CpuAccelerator):
    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def synchronize(self, device_index: int | None = None) -> None:
        self.waits += 1


@pytest.fixture
def counting() -> Iterator[Counting]:
    accelerator = Counting()
    set_accelerator(accelerator)
    yield accelerator
    set_accelerator(None)


def test_the_device_is_waited_for_at_both_ends_of_both_runs(
    counting: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.ones(2, requires_grad=True)
    with caplog.at_level(logging.INFO, logger.name):
        out = run(torch.exp, (x,), {}, Settings(synchronize_checkpoint_boundary=True))
        assert counting.waits == 2
        out.sum().backward()
    assert counting.waits == 4
    assert not caplog.records


def test_profile_logs_both_runs(counting: Counting, caplog: pytest.LogCaptureFixture) -> None:
    def block(x: Tensor) -> Tensor:
        return x.exp().exp()

    with caplog.at_level(logging.INFO, logger.name):
        out = run(functools.partial(block), (torch.ones(2, requires_grad=True),), {}, Settings(profile=True))
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        with torch.no_grad():
            run(nn.Identity(), (out,), {}, Settings(profile=True))
    said = [record.getMessage().rpartition(":")[0] for record in caplog.records]
    name = block.__qualname__
    again = f"recomputation of {name}"
    assert said == [f"forward of {name}", again, again, "forward of Identity"]
    assert all(record.getMessage().endswith(" ms") for record in caplog.records)
    assert counting.waits == 8


class Tree(nn.Module):
    """Layers in a random tree, of which some nodes are checkpointed."""

    def __init__(self, shape: Any, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call
        self.is_checkpointed, inner = shape
        self.kind = inner if isinstance(inner, str) else ""
        if self.kind:
            self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.4)])
        else:
            self.parts = nn.ModuleList(Tree(each, call) for each in inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inside, x) if self.is_checkpointed else self.inside(x)

    def inside(self, x: Tensor) -> Tensor:
        h = x
        for part in self.parts:
            h = part(h)
        if self.kind == "residual":
            return x + h.tanh()
        return h.relu() if self.kind == "relu" else h


trees = st.recursive(
    st.tuples(st.booleans(), st.sampled_from(["residual", "relu", "plain"])),
    lambda inner: st.tuples(st.booleans(), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(shape=trees, mode=st.sampled_from(["default", "cpu", "contiguous"]), needs_grad=st.booleans())
def test_random_trees(shape: Any, mode: str, needs_grad: bool) -> None:
    flags = MODES[mode]()
    if flags.contiguous_memory_optimization:
        flags = Settings(
            partition_activations=True, contiguous_memory_optimization=True, number_checkpoints=20, mpu=OneRank()
        )
    torch.manual_seed(0)
    tree = Tree(shape, by(flags))
    found = []
    for call in (plain, by(flags)):
        twin = copy.deepcopy(tree)
        for module in twin.modules():
            if isinstance(module, Tree):
                module.call = call
        torch.manual_seed(1)
        x = torch.randn(3, 4, requires_grad=needs_grad)
        out = twin(x)
        if out.requires_grad:
            out.square().sum().backward()
        found.append([out.detach(), x.grad, *(param.grad for param in twin.parameters()), torch.rand(1)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_inside_of_a_compiled_region_the_call_is_torchs() -> None:
    layer, x = nn.Linear(WIDTH, WIDTH), torch.randn(3, WIDTH, requires_grad=True)

    def block(x: Tensor, *, scale: float) -> Tensor:
        return layer(x).tanh() * scale

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return checkpoint(block, x, scale=2.0).sum()

    step(x).backward()
    got = [x.grad, layer.weight.grad]
    x.grad, layer.weight.grad = None, None
    block(x, scale=2.0).sum().backward()
    for a, b in zip(got, (x.grad, layer.weight.grad), strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b)


def test_the_random_state_of_a_device_is_kept_where_only_the_function_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps the states of its arguments' devices; meta stands for one here."""
    device = SimpleNamespace(_initialized=True)
    monkeypatch.setattr(call_module, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "meta"))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: device)
    on_host, on_device = torch.ones(2), torch.ones(2, device="meta")
    (anchor,) = call_module._anchor([on_host, None])
    assert anchor.device.type == "meta"
    assert anchor.numel() == 0
    assert call_module._anchor([on_host, on_device]) == []
    device._initialized = False
    assert call_module._anchor([on_host]) == [], "it is not started for this"
