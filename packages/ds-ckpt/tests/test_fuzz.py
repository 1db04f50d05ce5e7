"""Hostile checkpoints of every format are refused by a ``CheckpointError``, or read: nothing else may happen.

Not reading outside the folder, not writing, importing or running anything, not taking more memory than a process of
600 MB has. ``fuzz_worker.py`` does it and is killed by the first thing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ds_ckpt
from ds_ckpt.config import ShardedConfig
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.errors import CheckpointError
from ds_core.testing.checkpoint import snapshot

HERE = Path(__file__).parent
# The same examples each time: a commit must not fail for what it has not changed. ``DS_FUZZ=10`` hunts for more: ten
# times as many, and others at each run.
FACTOR = int(os.environ.get("DS_FUZZ", "1"))
DEEPSPEED = ("plain-stage0-world2-fp32", "plain-stage2-world2-fp32", "plain-stage3-world2-bf16")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("base")
    ShardedCheckpoint(ShardedConfig(writers=2, chunk_bytes=64), None).save(
        base, "sharded", snapshot(1, parts=2), latest=False
    )
    PlainCheckpoint(None, None).save(base, "plain", snapshot(1, parts=2), latest=False)
    for name in DEEPSPEED:
        (source,) = (HERE / "deepspeed-0.19.6" / name).glob("global_step*")
        shutil.copytree(source, base / "deepspeed" / name)
    return base


@pytest.mark.timeout(60 + 60 * FACTOR)
@pytest.mark.parametrize(
    ("target", "reasons"),
    [("manifests", 15), ("latest", 6), ("plain_headers", 15), ("pickles", 15), ("archives", 8), ("large", 4)],
)
def test_what_is_hostile_is_refused_and_nothing_else_happens(target, reasons, base):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz_worker.py"), target, str(base), str(FACTOR)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50 + 60 * FACTOR,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    # Many different checks were reached, and not everything was refused.
    assert len(outcomes) >= reasons, outcomes
    if target != "large":
        assert outcomes.get("read", 0) + outcomes.get("damaged", 0) > 0, outcomes


WORDS = st.sampled_from(
    ["tensor", "float", "dict", "tuple", "Counter", "OrderedDict", "nn", "float32", "load", "", "AAAA"]
)
LEAVES = st.none() | st.booleans() | WORDS | st.sampled_from([0, -1, 1.5, 10**12, 10**400, float("nan")])
TAGGED = st.fixed_dictionaries({"$ds": WORDS}, optional={"dtype": WORDS, "shape": st.lists(LEAVES), "value": LEAVES})
STATES = st.recursive(
    LEAVES | TAGGED,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.fixed_dictionaries({"$ds": WORDS, "value": st.lists(st.lists(inner, min_size=2, max_size=2), max_size=3)})
    ),
    max_leaves=8,
)


@settings(deadline=None, derandomize=FACTOR == 1, max_examples=200 * FACTOR)
@given(STATES)
@example({"$ds": "float", "value": 10**400})
@example({"$ds": "tensor", "dtype": "float32", "shape": [10**12, 10**12], "value": ""})
@example({"$ds": "tensor", "dtype": "nn", "shape": [], "value": "AAAA"})
def test_a_hostile_state_is_read_or_refused(base, state):
    with ds_ckpt.open(base / "sharded") as checkpoint:
        hostile = ds_ckpt.Checkpoint(dataclasses.replace(checkpoint.stored, state={"client_state": state}))
        with contextlib.suppress(CheckpointError):
            assert hostile.state.keys() == {"client_state"}
