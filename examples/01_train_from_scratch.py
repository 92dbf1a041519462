"""Train a small Llama on the Python library's own source, and let it write."""

from pathlib import Path

from colossus import Duration, Sampling, load_model, train
from colossus.generate import generate
from recipes.families import small_llama

config = small_llama().model_copy(update={"budget": Duration.parse("40 steps")})
summary = train(config, runs_directory=Path("runs"), name="scratch")
print(f"{summary.num_params:,} parameters, {summary.tokens:,} tokens")
print(f"held-out text: {summary.heldout_bits_per_byte:.2f} bits per byte")

loaded = load_model(summary.run_dir)
text = "".join(generate(loaded.model, loaded.tokenizer, "import ", Sampling(max_tokens=40, seed=1)))
print(f"it writes: {text!r}")
