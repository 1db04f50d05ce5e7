"""Random generators go on from where they were captured, through JSON."""

from __future__ import annotations

import json
import random

import numpy
import torch

from ds_core.checkpoint.jsonable import decode, encode
from ds_core.engine.rng import capture_rng, restore_rng

CPU = torch.device("cpu")


def draw() -> list[float]:
    # An odd count of normals: each generator keeps the second one of a pair for later.
    return [
        *(random.random(), random.gauss(0, 1)),
        *(float(numpy.random.rand()), float(numpy.random.randn())),
        *torch.randn(3).tolist(),
        float(torch.rand(())),
    ]


def test_every_generator_goes_on_exactly():
    draw()
    captured = json.loads(json.dumps(encode(capture_rng(CPU), "rng"), allow_nan=False))
    expected = [draw() for _ in range(3)]
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    assert draw() != expected[0]
    for _ in range(2):
        restore_rng(decode(captured), CPU)
        assert [draw() for _ in range(3)] == expected


def test_capturing_moves_nothing():
    before = capture_rng(CPU)
    first = draw()
    restore_rng(before, CPU)
    capture_rng(CPU)
    assert draw() == first


def test_a_generator_that_was_not_captured_is_left_alone():
    captured = capture_rng(CPU)
    del captured["numpy"]
    numpy.random.seed(5)
    expected = numpy.random.rand()
    numpy.random.seed(5)
    restore_rng(captured, CPU)
    assert numpy.random.rand() == expected
