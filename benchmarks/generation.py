"""Tokens per CPU second of generation, beside `transformers.generate` on the same weights.

    python benchmarks/generation.py [--rounds 7] [--threads 1]

Both write the same number of tokens greedily, in float32, with a cache, in one process, in turn: ours, theirs, ours, …
So other work on the machine meets both alike, and the ratio of neighbours is what is reported.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from colossus.checkpoint.hugging_face import write_directory
from colossus.generate import Engine, Sampling
from colossus.generate.load import unfilled
from colossus.models import Decoder
from colossus.spec.model import AttentionSpec, MlpSpec, ModelSpec, MoeSpec, NormSpec

PROMPT_TOKENS, NEW_TOKENS = 32, 128
_ATTENTION = AttentionSpec(num_heads=8, num_kv_heads=4, head_dim=64)
_SIZES: dict[str, Any] = {"vocab_size": 8192, "context_tokens": 1024, "num_layers": 6, "hidden_size": 512}
MODELS = {
    "dense, 6 layers x 512 (Llama)": ModelSpec(
        name="dense", attention=_ATTENTION, mlp=MlpSpec(intermediate_size=1408), **_SIZES
    ),
    "mixture, 2 of 8 experts (Mixtral)": ModelSpec(
        name="mixture",
        attention=_ATTENTION,
        mlp=MoeSpec(num_experts=8, top_k=2, intermediate_size=512),
        norm=NormSpec(epsilon=1e-5),
        **_SIZES,
    ),
}


def ours(model: Decoder, prompts: torch.Tensor) -> list[list[int]]:
    engine = Engine(model)
    rows = [engine.join(prompt, Sampling(temperature=0)) for prompt in prompts.tolist()]
    texts: dict[Any, list[int]] = {row: [] for row in rows}
    for _ in range(NEW_TOKENS):
        for written in engine.step():
            texts[written.row].append(written.token)
    return [texts[row] for row in rows]


def theirs(model: Any, prompts: torch.Tensor) -> list[list[int]]:
    with torch.inference_mode():
        written = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            use_cache=True,
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
    return written[:, prompts.shape[1] :].tolist()


def cpu_seconds(write: Callable[[Any, torch.Tensor], object], model: Any, prompts: torch.Tensor) -> float:
    """Of this process: what others do on the machine then counts less."""
    started = time.process_time()
    write(model, prompts)
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(
        "| model | batch | ours, tok per CPU s | transformers, tok per CPU s | ratio, median | ratio, range |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    for title, spec in MODELS.items():
        mine = unfilled(spec).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in mine.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.05, generator=generator)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            write_directory(spec, dict(mine.named_parameters()).__getitem__, path)
            peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for num_rows in (1, 16):
            prompts = torch.randint(0, 8192, (num_rows, PROMPT_TOKENS), generator=generator)
            assert ours(mine, prompts) == theirs(peer, prompts), "the two write different tokens"
            times = [
                (cpu_seconds(ours, mine, prompts), cpu_seconds(theirs, peer, prompts))
                for _ in range(arguments.rounds)
            ]
            ratios = sorted(their / our for our, their in times)
            rates = [num_rows * NEW_TOKENS / statistics.median(one) for one in zip(*times, strict=True)]
            print(
                f"| {title} | {num_rows} | {rates[0]:,.0f} | {rates[1]:,.0f} | {statistics.median(ratios):.2f} "
                f"| {ratios[0]:.2f} to {ratios[-1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
