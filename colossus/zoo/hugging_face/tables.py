"""Tables of stored tensors, written as rows: what a tensor is called within a layer, and which parameters fill it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from colossus.spec.model import ModelSpec
from colossus.zoo.hugging_face.tensors import Part, StoredTensor

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of every layer that has its parameters, or one for each expert where the name has `{expert}`."""

    name: str
    """Within the layer: `self_attn.q_proj.weight`."""
    parameters: tuple[str, ...]
    """Within the layer, too: `attention.query.weight`. Several fill the tensor's outputs one after the other."""
    transposed: bool = False
    """The file stores (inputs, outputs)."""
    alternating: bool = False
    """Outputs of several parameters take turns: one of the first, one of the second, and again."""
    order: tuple[int, ...] | None = None
    """Row i in the file is the parameter's row `order[i]`."""


def row(name: str, *parameters: str) -> Row:
    """A tensor that holds its parameters as they are."""
    return Row(name, parameters)


# What Llama has, and with it most others. Biases and norms are there or not; their rows are passed over if not.
ATTENTION = (
    row("self_attn.q_proj.weight", "attention.query.weight"),
    row("self_attn.q_proj.bias", "attention.query.bias"),
    row("self_attn.k_proj.weight", "attention.key.weight"),
    row("self_attn.k_proj.bias", "attention.key.bias"),
    row("self_attn.v_proj.weight", "attention.value.weight"),
    row("self_attn.v_proj.bias", "attention.value.bias"),
    row("self_attn.o_proj.weight", "attention.output.weight"),
    row("self_attn.o_proj.bias", "attention.output.bias"),
    row("self_attn.q_norm.weight", "attention.query_norm.weight"),
    row("self_attn.k_norm.weight", "attention.key_norm.weight"),
)
MLP = (
    row("mlp.gate_proj.weight", "mlp.gate.weight"),
    row("mlp.gate_proj.bias", "mlp.gate.bias"),
    row("mlp.up_proj.weight", "mlp.up.weight"),
    row("mlp.up_proj.bias", "mlp.up.bias"),
    row("mlp.down_proj.weight", "mlp.down.weight"),
    row("mlp.down_proj.bias", "mlp.down.bias"),
)
PRE_NORMS = (
    row("input_layernorm.weight", "attention_norm.weight"),
    row("post_attention_layernorm.weight", "mlp_norm.weight"),
)
EXPERTS = (
    row("mlp.gate.weight", "mlp.router.weight"),
    row("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.gate.weight"),
    row("mlp.experts.{expert}.up_proj.weight", "mlp.experts.up.weight"),
    row("mlp.experts.{expert}.down_proj.weight", "mlp.experts.down.weight"),
)

# Before and after the layers.
FIRST = (row("model.embed_tokens.weight", "embedding.weight"),)
LAST = (row("model.norm.weight", "final_norm.weight"), row("lm_head.weight", "head.weight"))


def decoder(
    model: ModelSpec,
    layer: Sequence[Row],
    first: Sequence[Row] = FIRST,
    last: Sequence[Row] = LAST,
    layers: str = "model.layers.",
) -> Iterator[StoredTensor]:
    """All tensors of a file: embeddings, layers in order, final norm and head."""
    yield from _stored(first, {p.name: p.shape for p in model.input_parameters()})
    for group in model.layer_groups():
        shapes = {p.name: p.shape for p in group.parameters}
        for i in range(group.first_layer, group.first_layer + group.num_layers):
            yield from _stored(layer, shapes, f"{layers}{i}.", f"layers.{i}.")
    yield from _stored(last, {p.name: p.shape for p in model.output_parameters()})


def _stored(
    rows: Sequence[Row], shapes: Shapes, stored_prefix: str = "", parameter_prefix: str = ""
) -> Iterator[StoredTensor]:
    for one in rows:
        if one.parameters[0] not in shapes:
            continue
        name = stored_prefix + one.name
        if "{expert}" not in name:
            yield _joined(name, one, shapes, parameter_prefix)
            continue
        num_experts, *shape = shapes[one.parameters[0]]
        for expert in range(num_experts):
            part = Part(parameter_prefix + one.parameters[0], expert=expert)
            yield StoredTensor(name.format(expert=expert), tuple(shape), (part,))


def _joined(name: str, one: Row, shapes: Shapes, prefix: str) -> StoredTensor:
    shape = list(shapes[one.parameters[0]])
    # The parameters' outputs are the last dim of a vector and of biases, else the one before it.
    outputs = -1 if len(shape) == 1 or one.parameters[0].endswith(".bias") else -2
    sizes = [shapes[parameter][outputs] for parameter in one.parameters]
    if one.transposed:
        shape[-2:] = reversed(shape[-2:])
    axis = len(shape) + (-1 if one.transposed else outputs)
    shape[axis] = sum(sizes)
    parts, start = [], 0
    for i, parameter in enumerate(one.parameters):
        box: tuple[slice, ...] = ()
        if len(sizes) > 1:
            taken = slice(i, None, len(sizes)) if one.alternating else slice(start, start + sizes[i])
            box = tuple(taken if dim == axis else slice(None) for dim in range(len(shape)))
        parts.append(Part(prefix + parameter, rows=one.order, transposed=one.transposed, box=box))
        start += sizes[i]
    return StoredTensor(name, tuple(shape), tuple(parts))
