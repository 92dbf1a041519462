"""The Hugging Face peer: transformers.Trainer over a small Llama- or GPT-2-configuration, fresh weights."""

from __future__ import annotations

import tempfile
from typing import Any

from common import Job, StepClock, quiet_stdout, report

job = Job.from_argv()
clock = StepClock()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Blocks(torch.utils.data.Dataset):
    """The token stream cut into non-overlapping windows of one context plus the last target."""

    def __init__(self, path: str, length: int) -> None:
        self.stream = np.load(path, mmap_mode="r")
        self.length = length

    def __len__(self) -> int:
        return (len(self.stream) - 1) // (self.length - 1)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        start = i * (self.length - 1)
        ids = torch.from_numpy(self.stream[start : start + self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class Ticks(TrainerCallback):
    """Marks the start of every optimizer step."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        clock.tick()


def build() -> torch.nn.Module:
    """The model at the job's shape; Llama's gated MLP is sized to the FLOP of a 4x MLP."""
    common = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False, "tie_word_embeddings": job.tied}
    if job.family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=job.vocab,
                n_positions=job.context + 1,
                n_embd=job.width,
                n_layer=job.layers,
                n_head=job.heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **common,
            )
        )
    if job.family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=job.vocab,
                hidden_size=job.width,
                intermediate_size=round(job.width * 8 / 3 / 16) * 16,
                num_hidden_layers=job.layers,
                num_attention_heads=job.heads,
                num_key_value_heads=job.heads,
                max_position_embeddings=job.context + 1,
                **common,
            )
        )
    raise SystemExit(f"family is {job.family!r}; it has to be 'llama' or 'gpt2'")


def train(out_dir: str) -> tuple[torch.nn.Module, float]:
    """Train with Trainer; returns the model and its mean training loss over the run (nats)."""
    transformers.set_seed(job.seed)
    model = build()
    arguments = TrainingArguments(
        output_dir=out_dir,
        max_steps=job.steps,
        per_device_train_batch_size=job.batch,
        learning_rate=job.lr,
        lr_scheduler_type="cosine_with_min_lr" if job.min_lr_ratio else "cosine",
        lr_scheduler_kwargs={"min_lr_rate": job.min_lr_ratio} if job.min_lr_ratio else None,
        warmup_steps=job.warmup_steps,
        weight_decay=job.weight_decay,
        adam_beta1=job.beta1,
        adam_beta2=job.beta2,
        max_grad_norm=job.clip,
        optim="adamw_torch_fused" if job.fused else "adamw_torch",
        bf16=job.precision == "bf16",
        torch_compile=job.compile,
        use_cpu=True,
        seed=job.seed,
        save_strategy="no",
        logging_steps=100,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        dataloader_drop_last=True,
    )
    # A causal model shifts the labels itself, so a window of context + 1 tokens trains `context` targets.
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Blocks(job.train, job.context + 1),
        callbacks=[Ticks()],
    )
    outcome = trainer.train()
    clock.stop()
    return model, float(outcome.training_loss)


with quiet_stdout(), tempfile.TemporaryDirectory() as folder:
    model, train_loss = train(folder)
    model.eval()
report(
    job,
    clock,
    model,
    lambda ids: model(input_ids=ids).logits,
    train_loss=train_loss,
    versions={"transformers": transformers.__version__},
)
