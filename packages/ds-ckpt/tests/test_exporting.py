"""Exports of checkpoints of every format: the bits of the weights, ties, frozen ones, dtypes, memory, damage."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import ds_ckpt
import ds_core
from ds_ckpt.config import ShardedConfig
from ds_ckpt.formats import read
from ds_ckpt.sharded import ShardedCheckpoint
from ds_core.checkpoint.plain import PlainCheckpoint
from ds_core.errors import CheckpointError
from ds_core.interfaces.logical import BUFFER, MASTER, WEIGHT, Box, Chunk, LogicalTensor, Piece, Snapshot
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here

FIXTURES = Path(__file__).parent / "deepspeed-0.19.6"
CASES = sorted(path.parent for path in FIXTURES.glob("*/expected.json"))
TAG = "global_step4"


def _module(name: str) -> Any:
    # Tests are no package (--import-mode=importlib), so a file beside is loaded by its path.
    spec = importlib.util.spec_from_file_location(f"{name}_for_exports", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


w = _module("deepspeed_writer")


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def exported(path: Path, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    done = ds_ckpt.export(path, output, **options)
    found: dict[str, torch.Tensor] = {}
    for name in done.files:
        found.update(load_file(output / name) if name.endswith("safetensors") else torch.load(output / name))
    assert sorted(file.name for file in output.iterdir()) == sorted(
        [*done.files, *([done.index] if done.index else [])]
    )
    return found


# -- what DeepSpeed wrote ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fixtures_of_deepspeed(case, tmp_path):
    values = load_file(case / "expected.safetensors")
    fp32 = {key.split("|")[0]: value for key, value in values.items() if key.endswith(("|fp32", "|buffer"))}
    same(exported(case, tmp_path / "fp32", tag=TAG), fp32)
    same(exported(case, tmp_path / "bf16", tag=TAG, dtype="bfloat16"), {n: v.bfloat16() for n, v in fp32.items()})
    about = json.loads((case / "expected.json").read_text())
    model = {"fp32": torch.float32, "bf16": torch.bfloat16}[about["dtype"]]
    stored = exported(case, tmp_path / "stored", tag=TAG, dtype=None)
    buffers = {key.removesuffix("|buffer") for key in values if key.endswith("|buffer")}
    same(stored, {name: value if name in buffers else value.to(model) for name, value in fp32.items()})


def example(stored: torch.dtype) -> Any:
    """Tied, frozen, two groups, sizes that nothing divides, one without elements, a scalar."""
    return w.Model(
        groups=[
            {
                "emb.weight": tensor(11, 5),
                "none.weight": tensor(0, 3),
                "l1.weight": tensor(7, 5),
                "gain": tensor(seed=4),
            },
            {"l1.bias": tensor(7), "l2.bias": tensor(5)},
        ],
        frozen={"fz.weight": tensor(3, 7), "fz.bias": tensor(3)},
        buffers={"scale": torch.tensor([1.5]), "mask": torch.ones(3, 4).tril().bool().t(), "count": torch.tensor(7)},
        aliases={"head.weight": "emb.weight"},
        stored=stored,
    )


def write(kind: str, folder: Path, model: Any) -> None:
    if kind == "stage 3":
        w.write_slices(folder, model, 3)
    elif kind == "stage 0":
        folder.mkdir(parents=True)
        members = [[0, 1, 2, 3], [4, 5]]
        saved = {
            "state": {index: {"step": model.step} for index in range(6)},
            "param_groups": [{**model.options(group), "params": ids} for group, ids in enumerate(members)],
        }
        w.save(w.model_states(model, 2, optimizer=saved), folder / "mp_rank_00_model_states.pt")
    else:
        w.write_partitions(folder, model, 2, stage={"stage 1": 1, "stage 2": 2}[kind])


@pytest.mark.parametrize("kind", ["stage 1", "stage 2", "stage 3"])
def test_what_deepspeeds_own_export_gets_wrong(kind, tmp_path):
    """Frozen weights are there, in fp32; tied ones once; buffers of integers stay what they are."""
    model = example(torch.bfloat16)
    write(kind, tmp_path / "tag", model)
    expected = {
        **model.trained,
        **{name: value.bfloat16().float() for name, value in model.frozen.items()},
        **model.buffers,
    }
    same(exported(tmp_path / "tag", tmp_path / "out", max_shard_size=100), expected)
    done = ds_ckpt.export(tmp_path / "tag", tmp_path / "one")
    assert done.shared == {"head.weight": "emb.weight"}
    with safe_open(tmp_path / "one" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "emb.weight"}
    left = exported(tmp_path / "tag", tmp_path / "trained", exclude_frozen_parameters=True)
    assert left.keys() == expected.keys() - model.frozen.keys()
    stored = exported(tmp_path / "tag", tmp_path / "stored", dtype=None)
    for name in (*model.trained, *model.frozen):
        assert torch.equal(stored[name], model.weight(name)), name


def test_stage_0_without_groups_that_tell_does_not_say_what_is_trained(tmp_path):
    model = example(torch.float32)
    write("stage 0", tmp_path / "tag", model)
    assert exported(tmp_path / "tag", tmp_path / "out").keys() == {*model.trained, *model.frozen, *model.buffers}
    with pytest.raises(CheckpointError, match="does not say which weights are trained"):
        ds_ckpt.export(tmp_path / "tag", tmp_path / "out", exclude_frozen_parameters=True)


# -- ours -------------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.frozen = torch.nn.Linear(6, 6).requires_grad_(False)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.norm(self.embed(tokens)))).logsumexp(-1).mean()


def trained(engine_name: str) -> Any:
    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "checkpoint": {"engine": engine_name},
    }
    engine = ds_core.initialize(model=Model(), config=config)[0]
    engine.backward(engine(torch.tensor([1, 5])))
    engine.step()
    return engine


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 200}, {"dtype": "float16"}, {"dtype": None}])
def test_engine_and_folder_give_the_same_bytes(options, tmp_path):
    written = []
    for name in ("plain", "sharded"):
        engine = trained(name)
        engine.save_checkpoint(tmp_path / name)
        ds_ckpt.export(tmp_path / name, tmp_path / f"{name}_folder", **options)
        engine.export_weights(tmp_path / f"{name}_engine", **{"dtype": "float32", **options})
        written += [contents(tmp_path / f"{name}_{where}") for where in ("folder", "engine")]
    assert written[0]
    assert all(found == written[0] for found in written)
    expected = {name: value for name, value in engine.module.state_dict().items() if name != "head.weight"}
    wanted = {"float16": torch.float16}.get(options.get("dtype"), torch.float32)
    same(
        exported(tmp_path / "plain", tmp_path / "again", **options),
        {name: value.to(wanted) if value.is_floating_point() else value for name, value in expected.items()},
    )


def test_bin_files_keep_ties(tmp_path):
    engine = trained("sharded")
    engine.save_checkpoint(tmp_path / "checkpoints")
    found = exported(tmp_path / "checkpoints", tmp_path / "out", safe_serialization=False, max_shard_size=300)
    same(found, engine.module.state_dict())
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
    assert index["weight_map"]["head.weight"] == index["weight_map"]["embed.weight"]


def test_frozen_weights_that_were_not_saved_are_told(tmp_path, caplog):
    engine = trained("sharded")
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    with caplog.at_level(logging.WARNING, "ds_core"):
        found = exported(tmp_path, tmp_path / "out")
    assert not any(name.startswith("frozen") for name in found)
    assert "2 weights, such as 'frozen.bias', are not in the checkpoint" in caplog.text
    caplog.clear()
    ds_ckpt.export(tmp_path, tmp_path / "out", exclude_frozen_parameters=True)
    assert caplog.text == ""


def snapshot(pieces: list[Piece], **state: Any) -> Snapshot:
    return Snapshot(pieces, state, {})


def save(folder: Path, pieces: list[Piece], engine: Any = None, **state: Any) -> Path:
    (engine or ShardedCheckpoint(ShardedConfig(chunk_bytes=4096), None)).save(
        folder, "tag", snapshot(pieces, **state), latest=True
    )
    return folder


def piece(name: str, kind: str, data: torch.Tensor, chunk: Chunk | None = None, shape: Any = None) -> Piece:
    shape = tuple(data.shape) if shape is None else shape
    of = LogicalTensor(name, kind, shape, str(data.dtype).removeprefix("torch."))
    return Piece(of, chunk or Chunk.whole(shape), data)


DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "uint8", "bool")


@pytest.mark.parametrize("engine", [PlainCheckpoint(None, None), None], ids=["plain", "sharded"])
def test_boxes_dtypes_and_shapes(engine, tmp_path):
    """What other partitions will write: boxes of columns, intervals of boxes; every dtype; no element, no dimension."""
    full = tensor(6, 10)
    boxes = [
        piece("boxes", WEIGHT, full[:, :4].reshape(-1)[:7], Chunk(Box((0, 0), (6, 4)), 0, 7), (6, 10)),
        piece("boxes", WEIGHT, full[:, :4].reshape(-1)[7:], Chunk(Box((0, 0), (6, 4)), 7, 17), (6, 10)),
        piece("boxes", WEIGHT, full[:, 4:].contiguous(), Chunk(Box((0, 4), (6, 6)), 0, 36), (6, 10)),
    ]
    others = {f"of_{word}": (tensor(5, 3) * 3).to(getattr(torch, word)) for word in DTYPES}
    others |= {"none": torch.zeros(0, 3), "scalar": tensor()}
    pieces = [*boxes, *(piece(name, BUFFER, value) for name, value in others.items())]
    folder = save(tmp_path / "in", pieces, engine)
    same(exported(folder, tmp_path / "out", dtype=None), {"boxes": full, **others})
    as_bf16 = exported(folder, tmp_path / "bf16", dtype="bfloat16")
    same(
        as_bf16,
        {n: v.bfloat16() if v.is_floating_point() else v for n, v in {"boxes": full, **others}.items()},
    )


def test_masters_without_weights_are_cast_to_what_the_model_has(tmp_path):
    full = tensor(4, 3)
    folder = save(tmp_path / "in", [piece("w", MASTER, full)], plan={"stored": "bfloat16", "master": "float32"})
    same(exported(folder, tmp_path / "stored", dtype=None), {"w": full.bfloat16()})
    same(exported(folder, tmp_path / "fp32"), {"w": full})


def test_values_that_become_infinite_are_told(tmp_path, caplog):
    folder = save(tmp_path / "in", [piece("large", WEIGHT, torch.tensor([1e6])), piece("w", WEIGHT, tensor(3))])
    with caplog.at_level(logging.WARNING, "ds_core"):
        done = ds_ckpt.export(folder, tmp_path / "out", dtype="float16")
    assert done.beyond == ("large",)
    assert "'large', have values that float16 cannot hold: they are infinite now" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bf16", "BFloat16"])
def test_words_of_dtypes(dtype, tmp_path):
    folder = save(tmp_path / "in", [piece("w", WEIGHT, tensor(3))])
    done = ds_ckpt.export(folder, tmp_path / "out", dtype=dtype, max_shard_size="none")
    assert load_file(tmp_path / "out" / done.files[0])["w"].dtype == torch.bfloat16


def test_progress_counts_every_byte(tmp_path):
    folder = save(tmp_path / "in", [piece(f"w{n}", WEIGHT, tensor(100, 7)) for n in range(3)])
    for safe in (True, False):
        told: list[tuple[int, int]] = []
        done = ds_ckpt.export(
            folder,
            tmp_path / f"{safe}",
            dtype="bfloat16",
            safe_serialization=safe,
            progress=lambda *both: told.append(both),  # noqa: B023 - called at once
        )
        assert {total for _, total in told} == {done.nbytes}
        assert sum(count for count, _ in told) == done.nbytes == 3 * 1400


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_tensor_at_a_time_is_in_memory(dtype, tmp_path):
    one, block = 8 * 2**20, 2**20
    pieces = [piece(f"w{n}", WEIGHT, tensor(2**21)) for n in range(4)]
    folder = save(tmp_path / "in", pieces, ShardedCheckpoint(None, None))
    ds_ckpt.export(folder, tmp_path / "warm", dtype=dtype)
    tracemalloc.start()
    ds_ckpt.export(folder, tmp_path / dtype, dtype=dtype)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The tensor as it is stored, and the steps of casting a block of it.
    assert one < peak < one + (6 if dtype == "bfloat16" else 1) * block


# -- what is not right ------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_is_told_and_the_previous_export_stays(tmp_path):
    folder = save(tmp_path / "in", [piece("a", WEIGHT, tensor(40)), piece("b", WEIGHT, tensor(50))])
    ds_ckpt.export(folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    stored = read(folder / "tag")
    chunk = stored.tensors["b", WEIGHT, None].chunks[0]
    flip(folder / "tag" / chunk.file, chunk.offset + 9)
    with pytest.raises(CheckpointError, match="weight 'b' is damaged: its bytes are not what was written") as caught:
        ds_ckpt.export(folder, tmp_path / "out", dtype="bfloat16")
    assert caught.value.where == str(folder / "tag" / chunk.file)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"shared": ["a"]}, "state.shared: expected alias -> name"),
        ({"shared": {"a": 3}}, "state.shared: expected alias -> name"),
        ({"frozen": "a"}, "state.frozen: expected names"),
        ({"excluded": [1]}, "state.excluded: expected names"),
    ],
)
def test_a_state_that_says_what_cannot_be_is_refused(state, named, tmp_path):
    folder = save(tmp_path / "in", [piece("a", WEIGHT, tensor(4))], **{"frozen": [], **state})
    with pytest.raises(CheckpointError, match=named):
        ds_ckpt.export(folder, tmp_path / "out", exclude_frozen_parameters=True)


def test_aliases_of_nothing_and_of_other_names_are_left_out(tmp_path):
    folder = save(
        tmp_path / "in", [piece("a", WEIGHT, tensor(4)), piece("b", WEIGHT, tensor(4))], shared={"b": "a", "c": "gone"}
    )
    assert ds_ckpt.export(folder, tmp_path / "out").shared == {}


def test_wrong_arguments_are_told_before_anything_is_written(tmp_path):
    folder = save(tmp_path / "in", [piece("a", WEIGHT, tensor(4))])
    for options, named in (({"dtype": "int8"}, "exported as 'int8'"), ({"max_shard_size": "5 XB"}, "size of a shard")):
        with pytest.raises(CheckpointError, match=named):
            ds_ckpt.export(folder, tmp_path / "out", **options)
    for place in ("gs://bucket/out", Path("gs://bucket/out"), ""):
        with pytest.raises(CheckpointError, match=r"no URL such as gs://|lost one of its slashes|no path was given"):
            ds_ckpt.export(folder, place)
    assert not (tmp_path / "out").exists()
    assert not Path("gs:").exists()
    shutil.rmtree(folder / "tag")
    with pytest.raises(CheckpointError):
        ds_ckpt.export(folder, tmp_path / "out")


def test_it_loads_no_torch_and_says_so_where_it_needs_it(tmp_path):
    case = FIXTURES / "plain-stage3-world2-bf16"
    script = (
        "import sys; sys.modules['torch'] = None; import ds_ckpt\n"
        f"done = ds_ckpt.export({str(case)!r}, {str(tmp_path)!r}, {TAG!r}, 'bfloat16')\n"
        "assert done.tensors == 8\n"
        "try:\n"
        f"    ds_ckpt.export({str(case)!r}, {str(tmp_path / 'bin')!r}, {TAG!r}, safe_serialization=False)\n"
        "except ImportError as error:\n"
        "    raise\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error.what)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.strip() == "MissingPackageError a .bin file is written with torch, which is not installed"
    assert not (tmp_path / "bin").exists()
