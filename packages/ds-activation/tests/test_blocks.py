"""Which modules patterns find, and which blocks are found without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_activation.blocks import LEAST_SHARE, find_blocks, places
from ds_core.errors import ConfigError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.mlp = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


class Other(Layer):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.h = nn.ModuleList([Layer(), Other(), Layer(), Other()])
        self.side = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.again = self.h[0]


def names(module: nn.Module, *patterns: str) -> list[str]:
    return [name for name, _ in find_blocks(module, patterns)]


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["Layer"], ["h.0", "h.2"]),
        (["h.3", "h.1"], ["h.1", "h.3"]),
        (["h.*"], ["h.0", "h.1", "h.2", "h.3"]),  # and all that is inside of them
        (["h"], ["h.0", "h.1", "h.2", "h.3"]),
        (["h.0.mlp", "h.0", "*.mix"], ["h.0", "h.1.mix", "h.2.mix", "h.3.mix"]),
        (["again"], ["h.0"]),
        (["*.mlp"], ["h.0.mlp", "h.1.mlp", "h.2.mlp", "h.3.mlp"]),
        (["Model"], [""]),
    ],
)
def test_patterns(patterns: list[str], found: list[str]) -> None:
    assert names(Model(), *patterns) == found


def test_what_is_found_is_what_has_the_name() -> None:
    model = Model()
    assert all(model.get_submodule(name) is block for name, block in find_blocks(model, ["Other"]))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("layer", "did you mean 'Layer'"),
        ("embd", "did you mean 'embed'"),
        ("transformer.x.*", "give names such as 'embed'"),
    ],
)
def test_an_unknown_pattern(pattern: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        names(Model(), "h.*", pattern)
    assert repr(pattern) in str(caught.value)
    assert words in str(caught.value)


def test_single_layers_count_where_nothing_else_repeats() -> None:
    assert names(Model()) == ["h.0", "h.1", "h.2", "h.3"]  # and not those of `side`
    assert names(Model().side) == ["0", "1"]


def test_of_a_sequence_the_blocks_and_not_its_ends() -> None:
    model = nn.Sequential(nn.Linear(2, 4), Layer(), Layer(), nn.ReLU(), nn.Linear(4, 1))
    assert names(model) == ["1", "2"]


class Tower(nn.Module):
    """By its names, a stack of T5: what a block has inside is a list, and some of it repeats."""

    def __init__(self, depth: int, *, cross: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(self.Block(cross=cross) for _ in range(depth))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    class Block(nn.Module):
        def __init__(self, *, cross: bool) -> None:
            super().__init__()
            self.layer = nn.ModuleList([Layer(), *([Layer()] if cross else []), nn.Linear(4, 4)])


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(500, 4)
        self.encoder, self.decoder = Tower(2, cross=False), Tower(3, cross=True)
        self.encoder.embed = self.decoder.embed = self.shared


def test_the_blocks_of_both_towers() -> None:
    assert names(TwoTowers()) == [
        *(f"encoder.block.{at}" for at in range(2)),
        *(f"decoder.block.{at}" for at in range(3)),
    ]


class Bottleneck(nn.Module):
    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide)) if channels != wide else None
        )


def stage(depth: int, channels: int, wide: int) -> list[nn.Module]:
    return [Bottleneck(channels if at == 0 else wide, wide) for at in range(depth)]


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = nn.Sequential(*stage(2, 4, 8)), nn.Sequential(*stage(3, 8, 16))
        self.layer3 = nn.Sequential(*stage(8, 16, 48))
        self.fc = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 10))


def test_all_stages_of_a_resnet() -> None:
    model = ResNet()
    share = sum(p.numel() for p in model.layer1.parameters()) / sum(p.numel() for p in model.layer3.parameters())
    assert share < 0.01
    expected = [f"layer{stage}.{at}" for stage, depth in ((1, 2), (2, 3), (3, 8)) for at in range(depth)]
    assert names(model) == expected
    # As one sequence: its stages are no blocks either.
    sequence = nn.Sequential(model.conv1, model.bn1, model.layer1, model.layer2, model.layer3, nn.Flatten(), model.fc)
    assert names(sequence) == [f"{stage + 1}.{at}" for stage, depth in ((1, 2), (2, 3), (3, 8)) for at in range(depth)]


@pytest.mark.parametrize("path", ["transformer.h", "model.layers", "model.decoder.layers", "gpt_neox.layers"])
def test_names_of_known_models(path: str) -> None:
    model = holder = nn.Module()
    *outer, last = path.split(".")
    for name in outer:
        holder.add_module(name, nn.Module())
        holder = holder.get_submodule(name)
    holder.add_module("wte", nn.Embedding(100, 4))
    holder.add_module(last, nn.ModuleList(Layer() for _ in range(3)))
    holder.add_module("ln_f", nn.LayerNorm(4))
    model.add_module("lm_head", nn.Linear(4, 100, bias=False))
    assert names(model) == [f"{path}.{at}" for at in range(3)]
    assert places(names(model)) == f"3 in {path}"


def test_lists_in_a_list_have_the_blocks() -> None:
    pairs = nn.ModuleList(nn.ModuleList([Layer(), Other()]) for _ in range(2))
    assert names(pairs) == ["0.0", "0.1", "1.0", "1.1"]
    by_name = nn.ModuleList(nn.ModuleDict({"mix": Layer(), "norm": nn.LayerNorm(4)}) for _ in range(2))
    assert names(by_name) == ["0.mix", "1.mix"]


def test_a_dictionary_with_a_forward_is_a_block() -> None:
    class Dense(nn.ModuleDict):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self["mix"](x)

    model = nn.Sequential(*(Dense({"mix": Layer()}) for _ in range(2)))
    assert names(model) == ["0", "1"]
    assert names(model, "Dense") == ["0", "1"]


@pytest.mark.parametrize(("wide", "found"), [(1, False), (2, True)])
def test_a_negligible_list_is_left_out(wide: int, found: bool) -> None:
    class Wide(nn.Module):
        def __init__(self, numel: int) -> None:
            super().__init__()
            self.part = nn.Linear(numel, 1, bias=False)

    model = nn.ModuleDict({"h": nn.ModuleList(Wide(1500) for _ in range(2))})
    model["small"] = nn.ModuleList([Wide(wide), Wide(1)])  # 2 or 3 of 3000
    assert round(1 / LEAST_SHARE) == 1000
    assert names(model) == ["h.0", "h.1", *(["small.0", "small.1"] if found else [])]


def test_a_module_that_comes_twice_in_a_list_is_one_block() -> None:
    layer = Layer()
    assert names(nn.ModuleList([layer, Layer(), layer])) == ["0", "1"]


def test_no_repeated_blocks() -> None:
    with pytest.raises(ConfigError, match='say which modules: "modules"'):
        names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2)))
