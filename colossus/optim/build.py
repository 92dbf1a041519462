"""From the optimizer's configuration and the model's table of parameters to optimizers."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from colossus.optim.adamw import NarrowAdamW
from colossus.optim.balancing import Balancing
from colossus.optim.muon import Muon, Rounds, by_shape, polynomials
from colossus.optim.row_adagrad import RowAdagrad, rows_and_values
from colossus.spec.model import ModelSpec, Role
from colossus.spec.parameters import ParameterSpec
from colossus.spec.run import AdamW
from colossus.spec.run import Muon as MuonConfig

Optimizers = tuple[torch.optim.Optimizer, ...]


def build_optimizers(
    parameters: Mapping[str, nn.Parameter],
    specs: Mapping[str, ParameterSpec],
    config: AdamW | MuonConfig,
    *,
    loads: Mapping[str, Tensor] | None = None,
    balancing_step: float = 0.001,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype = torch.float32,
    rounds: Rounds = by_shape,
) -> Optimizers:
    """One optimizer per rule that the configuration uses; every parameter is in exactly one of them.

    `parameters`, by name: of a whole model, or what one rank holds of one; `specs` has those of at least these.
    `loads`: how many tokens each expert was given, by the name of its mixture's module. Each parameter group remembers
    its peak learning rate as `peak_lr`. `dtype` is what Muon's matmuls run in, `state_dtype` what averages of gradients
    are kept in, `balancing_step` how far a step moves the biases that balance experts, and `rounds` how matrices of
    which each rank holds a part come together.
    """
    by_role: dict[Role, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        by_role.setdefault(specs[name].role, []).append(parameter)

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
    if isinstance(config, MuonConfig) and "matrix" in by_role:
        optimizers.append(
            Muon(
                by_role["matrix"],
                lr=config.learning_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                coefficients=polynomials(config.newton_schulz_steps),
                dtype=dtype,
                state_dtype=state_dtype,
                rounds=rounds,
            )
        )
    if adamw_groups:
        kind = partial(torch.optim.AdamW, fused=True) if state_dtype == torch.float32 else NarrowAdamW
        optimizers.append(
            kind(adamw_groups, lr=adamw.learning_rate, betas=tuple(adamw.betas), eps=adamw.epsilon)
        )
    if "sparse_embedding" in by_role:
        optimizers.append(RowAdagrad(by_role["sparse_embedding"], lr=config.sparse_learning_rate))
    if "balance" in by_role:
        moved = {
            parameter: (loads or {})[name.removesuffix(".balance")]
            for name, parameter in parameters.items()
            if specs[name].role == "balance"
        }
        optimizers.append(Balancing(moved, lr=balancing_step))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return tuple(optimizers)


def optimizers_of(
    model: nn.Module, spec: ModelSpec, config: AdamW | MuonConfig, **settings: Any
) -> Optimizers:
    """Those of a whole model on one process. `settings`: as `build_optimizers` takes them."""
    loads = {name: buffer for name, buffer in model.named_buffers() if name.endswith(".load")}
    return build_optimizers(
        dict(model.named_parameters()),
        {parameter.name: parameter for parameter in spec.parameters()},
        config,
        loads={name.removesuffix(".load"): load for name, load in loads.items()},
        **settings,
    )


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


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiplies every gradient, dense and sparse, in place."""
    for parameter in parameters:
        if parameter.grad is not None:
            (parameter.grad.values() if parameter.grad.is_sparse else parameter.grad).mul_(factor)
