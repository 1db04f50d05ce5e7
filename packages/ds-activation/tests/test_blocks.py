"""Which modules patterns find, and which blocks are found without."""

from __future__ import annotations

import pytest
from torch import nn

from ds_activation.blocks import find_blocks
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


def test_without_patterns_the_largest_list_of_repeated_classes() -> None:
    assert names(Model()) == ["h.0", "h.1", "h.2", "h.3"]


def test_of_a_sequence_the_blocks_and_not_its_ends() -> None:
    model = nn.Sequential(nn.Linear(2, 4), Layer(), Layer(), nn.ReLU(), nn.Linear(4, 1))
    assert names(model) == ["1", "2"]


def test_a_module_that_comes_twice_in_a_list_is_one_block() -> None:
    layer = Layer()
    assert names(nn.ModuleList([layer, Layer(), layer])) == ["0", "1"]


def test_no_repeated_blocks() -> None:
    with pytest.raises(ConfigError, match='say which modules: "modules"'):
        names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2)))
