"""From the optimizer's configuration and the model's table of parameters to optimizers."""

import torch
from torch import Tensor, nn

from colossus.optim.balancing import Balancing
from colossus.optim.muon import Muon, polynomials
from colossus.optim.row_adagrad import RowAdagrad, rows_and_values
from colossus.spec.model import ModelSpec, Role
from colossus.spec.run import AdamW
from colossus.spec.run import Muon as MuonConfig

Optimizers = tuple[torch.optim.Optimizer, ...]


def build_optimizers(
    model: nn.Module,
    spec: ModelSpec,
    config: AdamW | MuonConfig,
    *,
    balancing_step: float = 0.001,
    dtype: torch.dtype = torch.float32,
) -> Optimizers:
    """One optimizer per rule that the configuration uses; every parameter is in exactly one of them.

    Each parameter group remembers its peak learning rate as `peak_lr`. `dtype` is what Muon's matmuls run in,
    `balancing_step` how far a step moves the biases that balance experts.
    """
    parameters = dict(model.named_parameters())
    by_role: dict[Role, list[nn.Parameter]] = {}
    for parameter in spec.parameters():
        by_role.setdefault(parameter.role, []).append(parameters[parameter.name])

    adamw = config.rest if isinstance(config, MuonConfig) else config
    rates = {"embedding": adamw.embedding_learning_rate, "head": adamw.head_learning_rate}
    adamw_groups = [
        {
            "params": by_role[role],
            "lr": rates.get(role) or adamw.learning_rate,
            "weight_decay": adamw.weight_decay if role in ("matrix", "head") else 0.0,
        }
        for role in ("embedding", "head", "vector", "matrix")
        if role in by_role and not (role == "matrix" and isinstance(config, MuonConfig))
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if isinstance(config, MuonConfig):
        optimizers.append(
            Muon(
                by_role["matrix"],
                lr=config.learning_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                coefficients=polynomials(config.newton_schulz_steps),
                dtype=dtype,
            )
        )
    if adamw_groups:
        optimizers.append(
            torch.optim.AdamW(adamw_groups, betas=tuple(adamw.betas), eps=adamw.epsilon, fused=True)
        )
    if "sparse_embedding" in by_role:
        optimizers.append(RowAdagrad(by_role["sparse_embedding"], lr=config.sparse_learning_rate))
    if "balance" in by_role:
        names = [parameter.name for parameter in spec.parameters() if parameter.role == "balance"]
        # Beside each bias stands the load that moves it.
        loads = {parameters[name]: model.get_buffer(f"{name.removesuffix('balance')}load") for name in names}
        optimizers.append(Balancing(loads, lr=balancing_step))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return tuple(optimizers)


def set_learning_rates(optimizers: Optimizers, multiplier: float) -> None:
    """Every group's learning rate becomes its peak times `multiplier`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * multiplier


def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm of the whole gradient, dense and sparse, in float32; makes sparse gradients coalesced."""
    parts = []
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            parts.append(rows_and_values(parameter.grad)[1])
        else:
            parts.append(parameter.grad)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts)))


def scale_gradients(model: nn.Module, factor: Tensor) -> None:
    """Multiplies every gradient, dense and sparse, in place."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            (parameter.grad.values() if parameter.grad.is_sparse else parameter.grad).mul_(factor)
