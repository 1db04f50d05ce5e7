"""Let a trained model write: it continues a prompt, byte by byte.

    python sample.py --out runs/gpt --prompt "def read(" --temperature 0.8

It needs nothing but the folder that train.py wrote.
"""

from __future__ import annotations

import argparse
import codecs
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from model import GPT, GPTConfig
from train import MODEL_FILE

import ds_core

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

PROMPT = "class Reader:\n    def __init__(self, path):\n        self."


def load_model(folder: Path) -> GPT:
    """Return the model of the last checkpoint in ``folder``; it may have been saved by any number of ranks."""
    model = GPT(GPTConfig(**json.loads((folder / MODEL_FILE).read_text())))
    # Without an optimizer an engine only runs forward, and without a precision it does so in fp32: after training in a
    # lower one the weights are those of the optimizer, its fp32 masters.
    engine, *_ = ds_core.initialize(model=model, config={"train_batch_size": 1, "log_level": "warning"})
    path, _ = engine.load_checkpoint(folder, load_module_only=True)
    if path is None:
        raise SystemExit(f"there is no checkpoint in {folder}: train.py saves one")
    return engine.module.eval()


@torch.inference_mode()
def generate(model: GPT, prompt: bytes, *, count: int, temperature: float, seed: int = 0) -> Iterator[int]:
    """Yield the ``count`` bytes that the model writes after ``prompt``, one by one.

    Each costs a pass over the whole context: slow, but there is only one way through the model to understand.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    text = torch.tensor([list(prompt)], device=device)
    for _ in range(count):
        logits = model(text[:, -model.config.context :])[0, -1]
        # Drawn on the CPU, so that a seed gives the same draws on every device.
        following = draw(logits.float().cpu(), temperature, generator)
        text = torch.cat([text, following.view(1, 1).to(device)], dim=1)
        yield int(following)


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Return a byte drawn by its probability; a temperature below 1 prefers likely ones, 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax()
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder that train.py wrote")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--bytes", type=int, default=500, help="how many to write")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # Products of a single sequence are too small to be worth waiting for a second thread.
    torch.set_num_threads(1)
    prompt = args.prompt.encode() or PROMPT.encode()  # there must be one byte to go on from
    written = generate(load_model(args.out), prompt, count=args.bytes, temperature=args.temperature, seed=args.seed)
    # A character may take several bytes; bytes that make no character are shown as a replacement, not as an error.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for byte in itertools.chain(prompt, written):
        print(decoder.decode(bytes([byte])), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
