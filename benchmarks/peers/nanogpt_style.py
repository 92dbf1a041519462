"""The plain-torch peer: a GPT-2-like decoder and one short loop over random crops of a token stream."""

from __future__ import annotations

import contextlib
import sys

from common import Job, StepClock, cosine_scale, quiet_stdout, report

job = Job.from_argv()
clock = StepClock()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attn = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        qkv = self.qkv(self.norm_attn(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Decoder(nn.Module):
    """Token and learned position embeddings, blocks, final norm, output head."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.tokens = nn.Embedding(job.vocab, job.width)
        self.positions = nn.Embedding(job.context, job.width)
        self.blocks = nn.ModuleList(Block(job.width, job.heads) for _ in range(job.layers))
        self.norm = nn.LayerNorm(job.width, bias=False)
        self.head = nn.Linear(job.width, job.vocab, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("attn_out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * job.layers) ** 0.5 if residual else 0.02)
        if job.tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, or the mean loss in nats where targets are given."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train() -> tuple[Decoder, float]:
    """Run the loop; returns the model and the mean training loss (nats) of the last tenth of the steps."""
    torch.manual_seed(job.seed)
    rng = np.random.default_rng(job.seed)
    stream = np.load(job.train, mmap_mode="r")
    if len(stream) <= job.context + 1:
        sys.exit(f"{job.train} holds {len(stream)} tokens, too few for windows of {job.context}")
    model = Decoder(job)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": job.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=job.lr,
        betas=(job.beta1, job.beta2),
        fused=job.fused,
    )
    loss_of = torch.compile(model) if job.compile else model
    mixed = job.precision == "bf16"
    offsets = np.arange(job.context + 1)
    recent: list[float] = []
    for step in range(job.steps):
        clock.tick()
        starts = rng.integers(0, len(stream) - job.context - 1, size=job.batch)
        crops = torch.from_numpy(stream[starts[:, None] + offsets].astype(np.int64))
        for group in optimizer.param_groups:
            group["lr"] = job.lr * cosine_scale(step, job)
        with torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext():
            loss = loss_of(crops[:, :-1], crops[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), job.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= job.steps - max(1, job.steps // 10):
            recent.append(loss.item())
    clock.stop()
    return model, sum(recent) / len(recent)


with quiet_stdout():
    model, train_loss = train()
    model.eval()
report(job, clock, model, model, train_loss=train_loss)
