"""The one place that turns a model's predictions into log-probabilities of what came."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from colossus.data import IGNORED
from colossus.models import Decoder

CHUNK_TOKENS = 1024
"""Tokens whose logits stand in memory at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Of each target, where there is one; 0 and False elsewhere."""

    log_probabilities: npt.NDArray[np.float64]
    """[rows, tokens]; natural logarithms. Negated they are losses in nats."""
    is_likeliest: npt.NDArray[np.bool_]
    """[rows, tokens]; whether the model thinks no token likelier than the target."""


@torch.no_grad()
def score(
    model: Decoder,
    tokens: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int32] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Scores:
    """What the model thinks of `targets`, each the token after the one of `tokens` at its place.

    tokens, targets, documents: [rows, tokens]; targets that are IGNORED get no logits. documents: as in
    `Decoder.forward`; None: each row is one. dtype: what matmuls run in; logits become float32.
    """
    device = model.embedding.weight.device
    counted = targets != IGNORED
    places = torch.from_numpy(np.flatnonzero(counted)).to(device)
    wanted = torch.from_numpy(targets[counted]).to(device)
    hidden = model(
        torch.from_numpy(tokens).to(device),
        None if documents is None else torch.from_numpy(documents).to(device),
        dtype=dtype,
    )
    hidden = hidden.flatten(0, 1)[places]
    found, likeliest = [], []
    for first in range(0, len(wanted), chunk_tokens):
        here = slice(first, first + chunk_tokens)
        logits = model.logits(hidden[None, here])[0]
        of_target = logits.gather(1, wanted[here, None])[:, 0]
        found.append((of_target - logits.logsumexp(-1)).cpu())
        likeliest.append((of_target >= logits.max(-1).values).cpu())
    log_probabilities = np.zeros(targets.shape)
    is_likeliest = np.zeros(targets.shape, bool)
    if found:
        log_probabilities[counted] = torch.cat(found).numpy()
        is_likeliest[counted] = torch.cat(likeliest).numpy()
    return Scores(log_probabilities, is_likeliest)
