"""What is exported loads in ``transformers`` and gives the same logits: from an engine, and from its checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from safetensors import safe_open

import ds_ckpt
import ds_core
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = torch.arange(12).reshape(2, 6) % 11


def gpt2() -> transformers.PreTrainedModel:
    """Return a model whose output layer is its embedding."""
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama(tied: bool = False) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def tied_llama() -> transformers.PreTrainedModel:
    return llama(tied=True)


MODELS = {"gpt2": gpt2, "llama": llama, "llama, tied": tied_llama}


def trained(build, precision: str) -> ds_core.DeepSpeedEngine:
    """Return an engine after two steps, one weight frozen."""
    torch.manual_seed(0)
    model = build()
    next(p for name, p in model.named_parameters() if "norm" in name or "ln_1" in name).requires_grad_(False)
    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
    }
    engine = ds_core.initialize(model=model, config=config)[0]
    for _ in range(2):
        engine.backward(engine(input_ids=TOKENS, labels=TOKENS).loss)
        engine.step()
    return engine.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def loaded(engine, folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """Return the logits of what ``transformers`` finds in ``folder``, with everything it has to say being an error."""
    engine.module.config.save_pretrained(folder)
    model, info = type(engine.module).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return logits(model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same(name, precision, tmp_path):
    engine = trained(MODELS[name], precision)
    dtype = next(engine.module.parameters()).dtype
    expected = logits(engine.module)
    engine.save_checkpoint(tmp_path / "checkpoints")
    engine.export_weights(tmp_path / "engine", max_shard_size=2000)
    ds_ckpt.export(tmp_path / "checkpoints", tmp_path / "folder", dtype=None, max_shard_size=2000)
    ds_ckpt.export(tmp_path / "checkpoints", tmp_path / "masters")
    ds_ckpt.export(tmp_path / "checkpoints", tmp_path / "bin", dtype=None, safe_serialization=False)
    assert (tmp_path / "engine" / "model.safetensors.index.json").is_file()
    assert (tmp_path / "masters" / "model.safetensors").is_file()
    for folder in ("engine", "folder", "masters", "bin"):
        assert torch.equal(loaded(engine, tmp_path / folder, dtype), expected), folder
    assert engine.save_16bit_model(tmp_path / "16bit", "model.safetensors")
    assert torch.equal(loaded(engine, tmp_path / "16bit", dtype), expected)
    assert engine.save_16bit_model(tmp_path / "16bit_bin")
    assert torch.equal(loaded(engine, tmp_path / "16bit_bin", dtype), expected)


def test_a_tied_weight_is_there_once(tmp_path):
    engine = trained(gpt2, "fp32")
    engine.save_checkpoint(tmp_path / "checkpoints")
    done = ds_ckpt.export(tmp_path / "checkpoints", tmp_path / "out")
    assert done.shared == {"lm_head.weight": "transformer.wte.weight"}
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - no dictionary
        assert file.metadata() == {"format": "pt", "lm_head.weight": "transformer.wte.weight"}


def test_the_checkpoint_alone_fills_a_model(tmp_path):
    engine = trained(tied_llama, "bf16")
    engine.save_checkpoint(tmp_path)
    torch.manual_seed(1)
    model = ds_ckpt.load_state_dict_from_zero_checkpoint(tied_llama(), tmp_path)
    assert torch.equal(logits(model.bfloat16()), logits(engine.module))
    assert model.lm_head.weight is model.model.embed_tokens.weight
