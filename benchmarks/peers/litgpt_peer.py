"""The litgpt peer: litgpt.pretrain's own entry point on a small custom Config.

litgpt always compiles its model; the eager figure switches torch.compile off by its environment variable.
The clock stops when litgpt turns to writing its final checkpoint, which is not counted and not written.
"""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import Job, StepClock, quiet_stdout, report

job = Job.from_argv()
clock = StepClock()
if not job.compile:
    os.environ["TORCH_COMPILE_DISABLE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from litgpt import pretrain  # noqa: E402
from litgpt.args import EvalArgs, TrainArgs  # noqa: E402
from litgpt.config import Config  # noqa: E402
from litgpt.data import DataModule  # noqa: E402
from litgpt.model import GPT  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402


class Blocks(Dataset):
    """The token stream cut into non-overlapping windows of one context plus the last target."""

    def __init__(self, path: str, context: int, ticking: bool) -> None:
        self.stream = np.load(path, mmap_mode="r")
        self.context = context
        self.served = 0 if ticking else None

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.context

    def __getitem__(self, i: int) -> torch.Tensor:
        if self.served is not None:
            if self.served % job.batch == 0:
                clock.tick()  # the loop asks for a batch at the start of each step
            self.served += 1
        start = i * self.context
        return torch.from_numpy(self.stream[start : start + self.context + 1].astype(np.int64))


class Tokens(DataModule):
    """Serves the prepared tokens in this process, without worker processes."""

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int = -1) -> None:
        self.batch_size, self.context = batch_size, max_seq_length

    def prepare_data(self) -> None:
        """Nothing to prepare: the tokens are on disk."""

    def setup(self, stage: str = "") -> None:
        """Nothing to set up."""

    def train_dataloader(self) -> DataLoader:
        blocks = Blocks(job.train, self.context, ticking=True)
        return DataLoader(blocks, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        blocks = Blocks(job.heldout, self.context, ticking=False)
        return DataLoader(blocks, self.batch_size, drop_last=True)


def train(out_dir: Path) -> torch.nn.Module:
    """Run litgpt.pretrain.setup and return the bare model it trained."""
    config = Config(
        name="peer",
        block_size=job.context,
        vocab_size=job.vocab,
        padded_vocab_size=job.vocab,
        n_layer=job.layers,
        n_head=job.heads,
        n_embd=job.width,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=round(job.width * 8 / 3 / 16) * 16,
    )
    kept: dict[str, Any] = {}

    def keep(fabric: Any, state: dict[str, Any], *_: Any) -> None:
        clock.stop()
        kept["model"] = state["model"]

    pretrain.save_checkpoint = keep
    pretrain.setup(
        model_name="peer",
        model_config=config,
        out_dir=out_dir,
        precision="bf16-mixed" if job.precision == "bf16" else "32-true",
        data=Tokens(),
        train=TrainArgs(
            save_interval=None,
            log_interval=50,
            global_batch_size=job.batch,
            micro_batch_size=job.batch,
            lr_warmup_steps=job.warmup_steps,
            max_tokens=job.steps * job.tokens_per_step,
            max_norm=job.clip,
            min_lr=job.lr * job.min_lr_ratio,
            tie_embeddings=job.tied,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": job.lr, "weight_decay": job.weight_decay, "betas": [job.beta1, job.beta2]},
        },
        devices=1,
        logger_name="csv",
        seed=job.seed,
    )
    if "model" not in kept:
        raise SystemExit("litgpt never reached its final checkpoint: its training loop has changed")
    bare = kept["model"]
    while not isinstance(bare, GPT):  # peel off the Fabric and torch.compile wrappers
        bare = bare._forward_module if hasattr(bare, "_forward_module") else bare._orig_mod
    return bare


with quiet_stdout(), tempfile.TemporaryDirectory() as folder:
    model = train(Path(folder))
    model.eval()
report(job, clock, model, model, versions={"litgpt": version("litgpt"), "lightning": version("lightning")})
