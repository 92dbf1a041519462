"""Small models of several architectures, with random weights by name and no built model."""

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colossus.checkpoint import save
from colossus.checkpoint.hugging_face import Directory
from colossus.data import Tokenizer
from colossus.observe.run_directory import RunDirectory
from colossus.spec.data import DataConfig, LoadedTokenizer
from colossus.spec.model import ModelSpec
from colossus.spec.run import Batch, RunConfig
from colossus.zoo.hugging_face import model_of

_SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **_SIZES},
    "tied": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **_SIZES,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **_SIZES,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 300,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "activation_function": "gelu_new",
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **_SIZES,
        "hidden_size": 32,
        "intermediate_size": 32,
    },
    "deepseek": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{key: value for key, value in _SIZES.items() if key != "head_dim"},
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
    },
}


def model(kind: str) -> ModelSpec:
    return model_of(CONFIGS[kind], kind)


def weights(spec: ModelSpec) -> dict[str, Tensor]:
    """Random, the same for the same names; one of them -0, one a denormal."""
    made = {}
    for parameter in spec.parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(parameter.name.encode()))
        made[parameter.name] = torch.randn(parameter.shape, generator=generator) / 8
        made[parameter.name].view(-1)[0] = -0.0
        made[parameter.name].view(-1)[-1] = 1e-40
    return made


def read_all(directory: Directory) -> dict[str, Tensor]:
    return dict(directory.parameters())


def make_run(runs: Path, spec: ModelSpec, tensors: dict[str, Tensor], *, step: int = 7) -> RunDirectory:
    """A run directory with a checkpoint of these weights."""
    run = RunDirectory.create(runs, spec.name)
    tokenizer = Tokenizer.train(["some words, and some more words\n"] * 5, 280).save(run.tokenizer_path)
    facts = {
        "progress": {"steps": step, "tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0},
        "skipped_in_a_row": 0,
    }
    state = {f"model.{name}": tensor for name, tensor in tensors.items()}
    save(run.checkpoints_path, step, {**state, "optimizer.x": torch.ones(3)}, facts, model=spec)
    data = DataConfig(tokenizer=LoadedTokenizer(path=str(tokenizer)))
    config = RunConfig(name=spec.name, model=spec, data=data, batch=Batch(sequences=2, sequence_tokens=32))
    run.write_description(config, ["/usr/bin/colossus", "train", "it's mine.toml"])
    return run
