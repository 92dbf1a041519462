"""A dense model into a mixture of experts that starts where the dense one stopped (arXiv:2212.05055)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from colossus.checkpoint.hugging_face.tokenizer_files import keep_companions
from colossus.checkpoint.load import Loaded, load_newest
from colossus.checkpoint.new_run import run_from_weights
from colossus.data.progress import Progress
from colossus.errors import ConfigError
from colossus.models import initial_values
from colossus.observe.run_directory import RunDirectory
from colossus.spec.model import MlpSpec, ModelSpec, MoeSpec
from colossus.spec.run import RunConfig

MAX_EXPERTS = 65_536
"""Far beyond any model's; a slip of the finger does not fill the disk."""


def upcycled(model: ModelSpec, *, num_experts: int, top_k: int) -> ModelSpec:
    """The model with `num_experts` copies of its MLP in every layer, of which each token goes through `top_k`.

    Weights of the chosen experts add up to 1, so that with equal experts it computes what the dense model does.
    Raises ConfigError for a model that is a mixture already, or for fewer than two experts.
    """
    if not isinstance(model.mlp, MlpSpec):
        raise ConfigError(
            f"{model.name} is a mixture of experts already; upcycling starts from a dense model"
        )
    if not 2 <= num_experts <= MAX_EXPERTS:
        raise ConfigError(f"asked for {num_experts:,} experts; there may be 2 to {MAX_EXPERTS:,}")
    if not 1 <= top_k <= num_experts:
        raise ConfigError(
            f"asked for {num_experts} experts, {top_k} for each token; a token goes through 1 to {num_experts} of them"
        )
    experts = MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=model.mlp.intermediate_size,
        activation=model.mlp.activation,
        bias=model.mlp.bias,
    )
    return model.model_copy(update={"name": f"{model.name}-{num_experts}-experts", "mlp": experts})


def upcycle_run(
    run: RunDirectory,
    config: RunConfig,
    *,
    runs_directory: Path | str,
    name: str,
    progress: Progress | None = None,
) -> RunDirectory:
    """A new run from the newest good weights of `run`; `config.model` is its model, `upcycled`.

    Every expert starts as a copy of the dense MLP, the router at random from `config.seed`: experts grow apart
    because they are given different tokens. Raises CheckpointError, DataError or RunError; nothing is left then.
    """
    dense = run.config().model
    experts = config.model.mlp
    if not isinstance(experts, MoeSpec):
        raise ConfigError("the model to make has no experts; leave model.* as it is")
    expected = upcycled(dense, num_experts=experts.num_experts, top_k=experts.top_k)
    shapes = {parameter.name: parameter.shape for parameter in expected.parameters()}
    different = {
        parameter.name: parameter.shape for parameter in config.model.parameters()
    }.items() ^ shapes.items()
    if different:
        raise ConfigError(
            f"the settings make another model than {run.name} with {experts.num_experts} experts in every layer: "
            f"{min(different)[0]} differs. Leave model.* as it is"
        )
    loaded, _ = load_newest(run.checkpoints_path, expect=dense, prefix="model.")
    return run_from_weights(
        config,
        _parameters(config, loaded),
        tokenizer=run.tokenizer_path,
        keep_companions=partial(keep_companions, run.tokenizer_path),
        origin=f"{run.name}, step {loaded.step:,}, each MLP copied to {experts.num_experts} experts",
        runs_directory=runs_directory,
        name=name,
        progress=progress,
    )


def _parameters(config: RunConfig, dense: Loaded) -> Iterator[tuple[str, Tensor]]:
    for parameter in config.model.parameters():
        if parameter.name.endswith(("mlp.router.weight", "mlp.router.bias")):
            yield parameter.name, initial_values(parameter, config.seed)
            continue
        values = dense.tensors[f"model.{parameter.name.replace('.mlp.experts.', '.mlp.')}"]
        if parameter.expert:
            values = values.expand(parameter.shape)
        yield parameter.name, values.to(torch.float32)
        dense.forget_pages()
