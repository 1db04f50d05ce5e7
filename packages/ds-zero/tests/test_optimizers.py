"""P21: any optimizer at stages 1 and 2 is what it is at stage 0, and at stage 0 what it is in plain PyTorch."""

from __future__ import annotations

import copy
import inspect
import logging
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import CommError, ConfigError, EngineError
from ds_core.optim.elementwise import OF_TORCH
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.ranks import run_ranks
from ds_core.utils import safe_get_full_fp32_param

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from ds_core import DeepSpeedEngine

WORLD_SIZES = (2, 3)
STAGES = (0, 1, 2)
STEPS = 3
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}}
if find_spec("ds_fp16") is not None:
    # Reduced in fp32, in which sums of three numbers of 16 bits are the same in any order.
    PRECISIONS["bf16"] = {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
SHAPES = {"a": (5, 4), "b": (6, 3), "c": (7, 9), "vector": (7,), "one": (1,), "scalar": (), "unused": (3,), "ice": (4,)}
MATRICES = {"a": (5, 4), "b": (6, 3), "c": (7, 9), "unused": (3, 2), "ice": (2, 2)}


class Model(nn.Module):
    """Gradients are the parameter plus whole numbers of the rank and step, none of them near zero."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, empty: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape, generator=generator)))
        if empty:
            self.register_parameter("empty", nn.Parameter(torch.rand(0, 2)))
        self.ice.requires_grad_(False)

    def forward(self, factor: float) -> Tensor:
        return torch.stack(
            [
                (param.square() / 2 + factor * (index + 1) * param).sum()
                for index, (name, param) in enumerate(self.named_parameters())
                if name != "unused"
            ]
        ).sum()


def factor_of(step: int, rank: int) -> float:
    return float(1 + step + 2 * rank)


class Lamb(torch.optim.Optimizer):
    """A step of a length that depends on a norm per tensor, and a count that is no tensor."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                state["count"] = state.get("count", 0) + 1
                moment = state.setdefault("moment", torch.zeros_like(param)).lerp_(param.grad, 0.5)
                update = moment + group["weight_decay"] * param
                ratio = param.norm() / update.norm() if param.numel() else 1.0
                param.sub_(group["lr"] / state["count"] * ratio * update)


class MyAdam(torch.optim.Adam):
    """Another constructor, the same update."""

    def __init__(self, params: Any, *, rate: float) -> None:
        super().__init__(params, lr=rate)


def groups_of(model: Model, **of_second: Any) -> list[dict[str, Any]]:
    """Return three groups; of the last, with one small tensor, some ranks own nothing at all."""
    last = model.scalar if hasattr(model, "scalar") else model.b
    first = [param for param in (model.a, model.b) if param is not last]
    others = [param for param in model.parameters() if not any(param is known for known in (*first, last))]
    return [{"params": first}, {"params": others, **of_second}, {"params": [last], "lr": 0.03}]


def cases() -> dict[str, tuple[dict[str, tuple[int, ...]], bool, Callable[[list[dict[str, Any]]], Any]]]:
    """Return, by name, the model's shapes, whether it has an empty parameter too, and what builds the optimizer."""
    found: dict[str, Any] = {}
    for cls in OF_TORCH:
        known = inspect.signature(cls).parameters
        options: dict[str, Any] = {"lr": 0.05}
        options |= {key: value for key, value in {"momentum": 0.9, "amsgrad": True}.items() if key in known}
        for way in ({}, {"foreach": True}, {"fused": True}):
            if set(way) <= set(known) and not (not way and "fused" in known):
                found[" ".join([cls.__name__, *way])] = SHAPES, True, partial(cls, **options, **way)
    # Its step divides by the number of elements, also in plain PyTorch.
    found["Adafactor"] = SHAPES, False, partial(torch.optim.Adafactor, lr=0.05)
    found["Muon"] = MATRICES, False, partial(torch.optim.Muon, lr=0.05)
    found["Lamb"] = SHAPES, True, Lamb
    found["MyAdam"] = SHAPES, True, partial(MyAdam, rate=0.05)
    return found


CASES = cases()
ONE_OF_EACH = [name for name in CASES if name.split()[-1] not in ("foreach", "fused") or name == "AdamW fused"]
WITH_MASTERS = ["SGD fused", "AdamW fused", "RMSprop", "Adafactor", "Muon", "Lamb"]


def start(stage: int, model: nn.Module, precision: str = "fp32", **arguments: Any) -> DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 40},
        **PRECISIONS[precision],
        **arguments.pop("sections", {}),
    }
    return ds_core.initialize(model=model, config=config, **arguments)[0]


def train(engine: DeepSpeedEngine, steps: range = range(STEPS)) -> None:
    for step in steps:
        engine.backward(engine(factor_of(step, comm.get_rank())))
        engine.step()


def train_plainly(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(STEPS)) -> None:
    """As :func:`train` on all ranks."""
    world_size = comm.get_world_size()
    for step in steps:
        optimizer.zero_grad()
        for rank in range(world_size):
            (model(factor_of(step, rank)) / world_size).backward()
        optimizer.step()


def weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Return every parameter with all digits it is trained in."""
    found = {}
    for name, param in engine.module.named_parameters():
        full = safe_get_full_fp32_param(param)
        found[name] = param.detach().clone() if full is None else full
    return found


def compare(names: Iterable[str], precision: str) -> dict[str, Any]:
    """Train with each optimizer at each stage; return what is wrong."""
    wrong: dict[str, Any] = {}
    for name in names:
        shapes, empty, build = CASES[name]
        of_second = {"lr": 0.02, "weight_decay": 0.25}
        if name.startswith("Rprop"):
            del of_second["weight_decay"]
        ends = []
        for stage in STAGES:
            model = Model(shapes, empty=empty)
            optimizer = build(groups_of(model, **of_second))
            engine = start(stage, model, precision, optimizer=optimizer)
            assert engine.basic_optimizer is optimizer
            train(engine)
            ends.append(weights(engine))
            state_of(engine, wrong, f"{name}, stage {stage}")
            engine.destroy()
        plain = Model(shapes, empty=empty)
        if precision == "fp32":
            train_plainly(plain, build(groups_of(plain, **of_second)))
            ends.insert(0, {key: param.detach() for key, param in plain.named_parameters()})
        for at, end in enumerate(ends[1:], 1):
            for key, value in end.items():
                if not is_close(value, ends[0][key]):
                    wrong[f"{name}, {at}, {key}"] = (value - ends[0][key]).abs().max()
        if all(torch.equal(ends[0][key], before) for key, before in Model(shapes, empty=empty).named_parameters()):
            wrong[name] = "nothing was trained"
    return wrong


def is_close(a: Tensor, b: Tensor) -> bool:
    """Weights are up to 2, steps up to 0.1.

    Of two ranks every sum is the same; of three it is another order, and a last vector of fewer elements is updated by
    other instructions: at most 8 roundings of 2**-24 in a gradient and as many in each of 3 updates.
    """
    return torch.allclose(a.float(), b.float(), rtol=2**-19, atol=2**-19)


def state_of(engine: DeepSpeedEngine, wrong: dict[str, Any], name: str) -> None:
    """Note where the optimizer is not what its user expects: groups, tensors, state and state dict."""
    optimizer = engine.basic_optimizer
    assert optimizer is not None
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    model = engine.module
    expected = [[param for param in group["params"] if param.requires_grad] for group in groups_of(model)]
    sizes = [len(group) for group in expected]
    if [len(group["params"]) for group in optimizer.param_groups] != sizes:
        wrong[f"{name}, groups"] = [len(group["params"]) for group in optimizer.param_groups]
    if set(optimizer.state) - set(tensors):
        wrong[f"{name}, state"] = "of others than it updates"
    # It was given in the second group; Adagrad makes its state before it knows.
    unused = tensors[sizes[0] + next(at for at, param in enumerate(expected[1]) if param is model.unused)]
    if optimizer.state.get(unused) and not isinstance(optimizer, torch.optim.Adagrad):
        wrong[f"{name}, unused"] = optimizer.state[unused]
    saved = optimizer.state_dict()
    if [len(group["params"]) for group in saved["param_groups"]] != sizes:
        wrong[f"{name}, state dict"] = saved["param_groups"]
    optimizer.load_state_dict(copy.deepcopy(saved))


WARM = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "AdamW fused": partial(torch.optim.AdamW, lr=0.05, fused=True),
    "NAdam": partial(torch.optim.NAdam, lr=0.05),
    "ASGD": partial(torch.optim.ASGD, lr=0.05),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.05),
    "Lamb": Lamb,
}


def go_on(*, adding: bool) -> dict[str, Any]:
    """Give optimizers that have made steps to engines, and maybe a group more; return what is wrong."""
    wrong: dict[str, Any] = {}
    for name, build in WARM.items():
        plain = Model(SHAPES, empty=False)
        optimizer = build(groups_of(plain, lr=0.02))
        train_plainly(plain, optimizer, range(2))
        saved = copy.deepcopy(plain.state_dict()), copy.deepcopy(optimizer.state_dict())
        extra = nn.Parameter(torch.full((5,), 0.5))
        if adding:
            plain.register_parameter("extra", nn.Parameter(extra.detach().clone()))
            optimizer.add_param_group({"params": [plain.extra], "lr": 0.01})
        train_plainly(plain, optimizer, range(2, 4))
        for stage in STAGES:
            model = Model(SHAPES, empty=False)
            model.load_state_dict(saved[0])
            optimizer = build(groups_of(model, lr=0.02))
            optimizer.load_state_dict(copy.deepcopy(saved[1]))
            optimizer.state["of all"] = {"kept": 1}
            if adding:
                model.register_parameter("extra", nn.Parameter(extra.detach().clone()))
            engine = start(stage, model, optimizer=optimizer)
            if adding:
                optimizer.add_param_group({"params": model.extra, "lr": 0.01})
            train(engine, range(2, 4))
            if optimizer.state.pop("of all") != {"kept": 1}:
                wrong[f"{name}, {stage}"] = "state of no parameter is gone"
            for key, value in weights(engine).items():
                if not is_close(value, dict(plain.named_parameters())[key]):
                    wrong[f"{name}, {stage}, {key}"] = (value - dict(plain.named_parameters())[key]).abs().max()
    return wrong


def add_groups(precision: str) -> list[str]:
    """Add a group to engines before their first step, in every way; return what is wrong."""
    wrong = []
    sections = {"optimizer": {"type": "AdamW", "params": {"lr": 0.05}}}
    warmup = {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.05}}}

    def of(stage: int, added: bool, frozen: bool = False) -> tuple[DeepSpeedEngine, list[nn.Parameter]]:
        model = Model(SHAPES)
        late = [model.b, model.scalar, model.empty]
        first = [param for param in model.parameters() if not any(param is other for other in late)]
        groups = [{"params": first}, *([{"params": late, "lr": 0.02}] if added else [])]
        for param in late if frozen else ():
            param.requires_grad_(False)
        return start(stage, model, precision, sections=sections | warmup, model_parameters=groups), late

    for stage in STAGES:
        expected, _ = of(stage, added=True)
        digits = weights(expected)
        train(expected)
        for way in ("engine.optimizer", "torch's", "after forward", "frozen until then"):
            engine, late = of(stage, added=False, frozen=way == "frozen until then")
            optimizer = engine.basic_optimizer
            if way == "after forward":
                engine(1.0)
            for param in late:
                param.requires_grad_()
            (engine.optimizer if way == "engine.optimizer" else optimizer).add_param_group(
                {"params": iter(late), "lr": 0.02}
            )
            assert engine.basic_optimizer is optimizer
            name = f"stage {stage}, {way}"
            here = weights(engine)
            # Those that were not trained until then were cast without a master: theirs is what was left.
            same = [key for key, param in engine.module.named_parameters() if not any(param is p for p in late)]
            if not all(torch.equal(here[key], digits[key]) for key in same):
                wrong.append(f"{name}: masters lost digits")
            train(engine)
            rates = [[group["lr"] for group in each.basic_optimizer.param_groups] for each in (engine, expected)]
            if rates[0] != rates[1]:
                wrong.append(f"{name}: the schedule gives {rates}")
            ends = weights(engine), weights(expected)
            for key, value in ends[0].items():
                exact = precision == "fp32" or key in same
                if not (is_close(value, ends[1][key]) if exact else torch.allclose(value, ends[1][key], atol=2**-6)):
                    wrong.append(f"{name}, {key}")
            engine.destroy()
    return wrong


def refuse_groups() -> list[str]:
    """Try what cannot be added; return what is wrong."""
    wrong = []
    for stage in STAGES:
        model = Model(SHAPES)
        optimizer = torch.optim.AdamW([{"params": [model.a]}, {"params": [model.b]}], lr=0.05)
        engine = start(stage, model, optimizer=optimizer)
        groups = optimizer.param_groups[:]
        mine = model.c if comm.get_rank() else model.vector
        for group, error, text in (
            ({"params": [nn.Parameter(torch.ones(2))]}, ConfigError, "not the model's"),
            ({"params": model.a}, ConfigError, "parameter 'a' is in the groups twice"),
            ({"params": [model.ice]}, ConfigError, "requires_grad_"),
            ({"params": [mine]}, CommError, "differ between ranks"),
            ({"params": {model.c}}, TypeError, "ordered collections"),
            ({"params": [model.c, model.c]}, ConfigError, "parameter 'c' is in the groups twice"),
        ):
            try:
                optimizer.add_param_group(group)
            except error as caught:
                if text not in str(caught):
                    wrong.append(f"stage {stage}: {caught}")
            else:
                wrong.append(f"stage {stage}: {text}: not raised")
        if optimizer.param_groups != groups:
            wrong.append(f"stage {stage}: groups have changed")
        # The engine goes on with the groups it had.
        plain = Model(SHAPES)
        train_plainly(plain, torch.optim.AdamW([plain.a, plain.b], lr=0.05))
        train(engine)
        for key, value in plain.named_parameters():
            if not is_close(dict(model.named_parameters())[key], value):
                wrong.append(f"stage {stage}: {key}")
        try:
            optimizer.add_param_group({"params": [model.c]})
        except EngineError as caught:
            if "after 3 steps" not in str(caught):
                wrong.append(f"stage {stage}: {caught}")
        else:
            wrong.append(f"stage {stage}: added after a step")
        engine.destroy()
        # It is torch's own again.
        optimizer.add_param_group({"params": [model.c]})
        if len(optimizer.param_groups) != 3:
            wrong.append(f"stage {stage}: {len(optimizer.param_groups)} groups")
    return wrong


def build_lamb(groups: list[dict[str, Any]]) -> Lamb:
    return Lamb(groups, lr=0.05)


class Keeps(torch.optim.SGD):
    """Has a list of what was, of which nobody can say what it is for a part."""

    elementwise = True

    def step(self, closure: None = None) -> None:
        super().step()
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["last"] = [param.detach().clone()]


def made_here() -> list[str]:
    """Let the engine make optimizers: by name, class and callable; return what is wrong."""
    wrong = []
    by_name = {
        "Adam": (torch.optim.AdamW, {}),
        "AdamW": (torch.optim.AdamW, {"betas": [0.8, 0.9]}),
        "SGD": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        "RMSprop": (torch.optim.RMSprop, {}),
        "Adafactor": (torch.optim.Adafactor, {}),
    }
    for name, given in [*by_name.items(), *((None, cls) for cls in (torch.optim.Adam, MyAdam, build_lamb))]:
        plain = Model(SHAPES, empty=False)
        if name is None:
            made_by: Any = partial(given, rate=0.05) if given is MyAdam else given
            expected, arguments = made_by(groups_of(plain)), {"optimizer": made_by}
        else:
            options = {"lr": 0.05, "weight_decay": 0.25, **given[1]}
            expected = given[0](groups_of(plain), **options)
            arguments = {"sections": {"optimizer": {"type": name, "params": options}}}
        train_plainly(plain, expected)
        for stage in STAGES[1:]:
            model = Model(SHAPES, empty=False)
            engine = start(stage, model, model_parameters=groups_of(model), **arguments)
            train(engine)
            if type(engine.basic_optimizer) is not type(expected):
                wrong.append(f"{name}, {stage}: {engine.basic_optimizer}")
            ends = weights(engine)
            wrong += [
                f"{name} {given}, {stage}: {key}"
                for key, value in plain.named_parameters()
                if not is_close(ends[key], value)
            ]
    for stage in STAGES[1:]:
        model = Model(SHAPES)
        optimizer = Keeps(model.parameters(), lr=0.05)
        train_plainly(model, optimizer, range(1))
        try:
            start(stage, model, optimizer=optimizer)
        except ConfigError as caught:
            if "'last' has neither a value per element" not in str(caught):
                wrong.append(str(caught))
        else:
            wrong.append("state was cut that cannot be")
    return wrong


def owners() -> list[str]:
    """Give state of whole tensors to engines; return which parameter has another than one rank with all of it."""
    wrong = []
    for stage in STAGES[1:]:
        model = Model(SHAPES)
        optimizer = Lamb(groups_of(model), lr=0.05)
        train_plainly(model, optimizer, range(1))
        engine = start(stage, model, optimizer=optimizer)
        partition = engine.parts.partition
        pieces = partition.optimizer_pieces()
        here = [not partition.is_elsewhere(piece) for piece in pieces]
        for at, of_ranks in enumerate(zip(*comm.values_of_ranks(here, engine.data_parallel_group), strict=True)):
            if sum(of_ranks) != 1:
                wrong.append(f"stage {stage}: {sum(of_ranks)} ranks update {pieces[at].of.name}")
        for when in ("given", "after a step"):
            for piece, is_here in zip(pieces, here, strict=True):
                if bool(optimizer.state.get(piece.data)) != (is_here and piece.of.name != "unused"):
                    wrong.append(f"stage {stage}, {when}: state of {piece.of.name} where it is {is_here}")
            train(engine, range(1, 2))
        engine.destroy()
    return wrong


JOBS: dict[str, dict[int, Callable[[], Any]]] = {
    "as in plain PyTorch": {2: partial(compare, list(CASES), "fp32"), 3: partial(compare, ONE_OF_EACH, "fp32")},
    "made by the engine": {2: made_here},
    "with state from before": {2: partial(go_on, adding=False), 3: partial(go_on, adding=False)},
    "with state, and a group more": {2: partial(go_on, adding=True)},
    "a group more": {2: partial(add_groups, "fp32")},
    "no such group": {2: refuse_groups},
    "one rank for each": {2: owners},
}
if "bf16" in PRECISIONS:
    JOBS["with masters"] = {world_size: partial(compare, WITH_MASTERS, "bf16") for world_size in WORLD_SIZES}
    JOBS["a group more, with masters"] = {3: partial(add_groups, "bf16")}


@pytest.fixture(scope="module", params=WORLD_SIZES)
def results(request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    """Everything of one world size in one spawn: what is asked -> what each rank found wrong."""
    jobs = {name: by_world[request.param] for name, by_world in JOBS.items() if request.param in by_world}
    return dict(zip(jobs, run_ranks(list(jobs.values()), request.param, timeout_s=240), strict=True))


@pytest.mark.parametrize("job", JOBS)
def test_any_optimizer(results: dict[str, list[Any]], job: str) -> None:
    if job in results:  # not every job runs at every world size
        assert not any(results[job]), results[job][0]


def test_every_job_runs_somewhere() -> None:
    assert all(by_world and set(by_world) <= set(WORLD_SIZES) for by_world in JOBS.values())


@pytest.mark.parametrize(
    ("stage", "optimizer", "is_told"),
    [(0, Lamb, False), (1, Lamb, True), (2, Keeps, False), (1, torch.optim.SGD, False)],
)
def test_an_optimizer_of_which_nothing_is_known_is_told(
    stage: int, optimizer: Any, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ds_core"):
        start(stage, Model(SHAPES), optimizer=partial(optimizer, lr=0.05))
    told = "Lamb does not say whether it is elementwise, so each parameter is updated whole, by one rank"
    found = [message for message in caplog.messages if told in message]
    assert bool(found) is is_told
    assert all("elementwise = True in its class" in message and "use stage 0" in message for message in found)
