"""FP8 matmuls against the formats written on paper, against torchao, and against a single process."""

import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from colossus.errors import ConfigError
from colossus.models import Decoder, build, chunked_cross_entropy
from colossus.models.float8 import (
    LATENT_DOWN,
    ROWWISE,
    TENSORWISE,
    Float8Recipe,
    Splits,
    convert,
    end_layers,
    recipe_of,
    use_float8,
)
from colossus.models.float8.grouped import Float8Groups
from colossus.models.float8.matmul import Float8Matmul, narrow, scale_for
from colossus.models.float8.recipe import E4M3, E5M2
from colossus.models.parts import Linear
from colossus.spec.model import AttentionSpec, LatentAttentionSpec, MlpSpec, ModelSpec, MoeSpec
from tests.helpers import random_tokens, tiny

RECIPES = {
    "tensorwise": TENSORWISE,
    "tensorwise_e4m3": Float8Recipe(gradients="e4m3"),
    "rowwise": ROWWISE,
    "rowwise_e5m2": Float8Recipe(scaling="rowwise", gradients="e5m2"),
}
all_recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
emulated_or_not = pytest.mark.parametrize("emulate", [False, True], ids=["scaled_mm", "emulated"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])


def emulated(recipe: Float8Recipe, emulate: bool = True) -> Float8Recipe:
    return recipe.model_copy(update={"emulate": emulate})


# --- the formats, on paper ---


def values_of(format: torch.dtype) -> Tensor:
    """All that are not negative, ascending, float64: from the bits' meaning, not from torch."""
    mantissa_bits, bias, last = {E4M3: (3, 7, 0x7E), E5M2: (2, 15, 0x7B)}[format]
    values = []
    for code in range(last + 1):
        exponent, mantissa = code >> mantissa_bits, (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
        values.append(
            2.0 ** (1 - bias) * mantissa if exponent == 0 else 2.0 ** (exponent - bias) * (1 + mantissa)
        )
    return torch.tensor(values, dtype=torch.float64)


def rounded(x: Tensor, format: torch.dtype) -> Tensor:
    """The nearest value; of two as near, the one whose last bit is 0. float64."""
    values = values_of(format)
    above = torch.searchsorted(values, x.abs()).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = values[above] - x.abs(), x.abs() - values[below]
    goes_down = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    return torch.where(goes_down, values[below], values[above]) * x.sign()


def quantised(x: Tensor, format: torch.dtype, recipe: Float8Recipe, along: int) -> Tensor:
    """What x is rounded to, float64. `along`: the dim over which a row's largest is taken."""
    over = [along] if recipe.scaling == "rowwise" else [0, 1]
    largest = x.double().abs().amax(over, keepdim=True)
    scale = values_of(format)[-1] / largest
    if recipe.scaling == "rowwise":
        scale = 2.0 ** scale.log2().floor()
    # A scale is a float32 number, and so is what is rounded.
    scale = scale.float()
    return rounded((x.float() * scale).double(), format) / scale.double()


def products_on_paper(
    x: Tensor, weight: Tensor, g: Tensor, recipe: Float8Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dW in float64, of operands that are rounded exactly as FP8 rounds them."""
    of_g = E5M2 if recipe.gradients == "e5m2" else E4M3
    y = quantised(x, E4M3, recipe, 1) @ quantised(weight, E4M3, recipe, 1).t()
    dx = quantised(g, of_g, recipe, 1) @ quantised(weight, E4M3, recipe, 0)
    dw = quantised(g, of_g, recipe, 0).t() @ quantised(x, E4M3, recipe, 0)
    return y, dx, dw


def operands(
    dtype: torch.dtype, tokens: int = 48, inputs: int = 64, outputs: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and y's gradient; rows and columns of very different size, one of each all 0."""
    generator = torch.Generator().manual_seed(1)

    def uneven(*shape: int) -> Tensor:
        sizes = [torch.randn(size, generator=generator).mul(2).exp() for size in shape]
        made = torch.randn(shape, generator=generator) * sizes[0][:, None] * sizes[1]
        made[3:4], made[:, 5] = 0, 0
        return made

    return (
        uneven(tokens, inputs).to(dtype),
        uneven(outputs, inputs).to(dtype),
        1e-6 * uneven(tokens, outputs).to(dtype),
    )


def assert_near(actual: Tensor, expected: Tensor, relative: float) -> None:
    """By the size of the row and of the column that an entry stands in: sums of unlike terms lose no more."""
    size = torch.minimum(expected.abs().amax(0, keepdim=True), expected.abs().amax(1, keepdim=True))
    error = (actual.double() - expected).abs()
    assert (error <= relative * size).all(), (error / size).nan_to_num().max()


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_cast_rounds_as_on_paper(format: torch.dtype, power_of_two: bool) -> None:
    x = torch.cat([10.0 ** torch.linspace(-9, 2, 5000), values_of(format)[1:].float() / 7, torch.zeros(3)])
    scale = scale_for(x.amax(), format, power_of_two=power_of_two)
    assert x.amax() * scale <= torch.finfo(format).max * (1 + 1e-7)
    assert x.amax() * scale > torch.finfo(format).max / 2
    made = narrow(torch.cat([x, -x]), scale, format)
    expected = rounded((x * scale).double(), format)
    assert torch.equal(made.values.double(), torch.cat([expected, -expected]))
    if power_of_two:
        assert torch.frexp(scale).mantissa == 0.5
        assert torch.equal(made.wide().double() * scale, made.values.double())


@all_recipes
@emulated_or_not
@DTYPES
def test_output_and_gradients_are_those_of_exactly_rounded_operands(
    recipe: Float8Recipe, emulate: bool, dtype: torch.dtype
) -> None:
    x, weight, gradient = operands(dtype)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = Float8Matmul.of(emulated(recipe, emulate))(*leaves)
    y.backward(gradient)
    for made, expected in zip(
        (y, leaves[0].grad, leaves[1].grad), products_on_paper(x, weight, gradient, recipe), strict=True
    ):
        assert made.dtype == dtype
        # Twice where scales of rows are multiplied after a product in bfloat16: half a unit in the last place each.
        assert_near(made.detach(), expected, 2**-8 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 33])
@all_recipes
def test_any_number_of_tokens_in_any_shape(recipe: Float8Recipe, tokens: int) -> None:
    x, weight, gradient = operands(torch.float32, 3 * tokens)
    bias = torch.linspace(-1, 1, 32, requires_grad=True)
    x_leaf, weight_leaf = x.view(3, tokens, 64).clone().requires_grad_(), weight.clone().requires_grad_()
    y = Float8Matmul.of(recipe)(x_leaf, weight_leaf, bias)
    assert y.shape == (3, tokens, 32)
    y.backward(gradient.view(3, tokens, 32))
    expected = products_on_paper(x, weight, gradient, recipe)
    assert_near((y - bias).detach().flatten(0, 1), expected[0], 1e-4)
    assert_near(x_leaf.grad.flatten(0, 1), expected[1], 1e-5)
    assert_near(weight_leaf.grad, expected[2], 1e-5)
    torch.testing.assert_close(bias.grad, gradient.sum(0))


@all_recipes
def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden(recipe: Float8Recipe) -> None:
    how = Float8Matmul.of(recipe)
    x, weight, _ = operands(torch.float32)
    assert torch.equal(how(torch.zeros_like(x), weight), torch.zeros(48, 32))
    for bad in (torch.inf, torch.nan):
        broken = x.clone()
        broken[7, 9] = bad
        assert not how(broken, weight)[7].isfinite().any()
    smallest = torch.full_like(x, torch.finfo(torch.float32).tiny)
    assert how(smallest, weight).isfinite().all()


# --- torchao, as a second opinion ---


@pytest.mark.parametrize("name", ["tensorwise", "rowwise"])
@emulated_or_not
def test_torchao_computes_the_same(name: str, emulate: bool) -> None:
    float8 = pytest.importorskip("torchao.float8")
    from torchao.float8.float8_linear import (
        Float8Linear,
    )  # the module of its recipes, without a model around it

    config = float8.Float8LinearConfig.from_recipe_name(name)
    object.__setattr__(config, "emulate", emulate)
    x, weight, gradient = operands(torch.bfloat16)
    plain = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    plain.weight.data = weight.clone()
    theirs = Float8Linear.from_float(plain, config)
    their_x = x.clone().requires_grad_()
    theirs(their_x).backward(gradient)

    our_x, our_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = Float8Matmul.of(emulated(RECIPES[name], emulate))(our_x, our_weight)
    y.backward(gradient)
    with torch.no_grad():
        their_y = theirs(x)
    for ours, other in ((y, their_y), (our_x.grad, their_x.grad), (our_weight.grad, theirs.weight.grad)):
        assert_near(ours.detach(), other.double(), 2**-7)  # each rounds to bfloat16 at its own places
        # And most of it is the same to the bit.
        assert (ours == other).double().mean() > 0.7


# --- split over ranks ---


class Team:
    """Ranks as threads, which meet for the largest of what they bring."""

    def __init__(self, size: int) -> None:
        self.size, self.brought = size, [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=20)

    def largest_of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def largest(amax: Tensor) -> Tensor:
            self.brought[rank] = amax
            self.barrier.wait()
            made = torch.stack(self.brought).amax(0)
            self.barrier.wait()
            return made

        return largest

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            results[rank] = work(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def parts_of(split: str, rank: int, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """x, weight and y's gradient as this rank of two has them."""
    x, weight, g = tensors
    if split == "outputs":
        return x, weight.chunk(2, 0)[rank], g.chunk(2, 1)[rank]
    if split == "inputs":
        return x.chunk(2, 1)[rank], weight.chunk(2, 1)[rank], g
    return x.chunk(2, 0)[rank], weight, g.chunk(2, 0)[rank]


JOINED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], ...]] = {
    # y, dx, dW: side by side, or summed
    "outputs": (lambda a, b: torch.cat([a, b], 1), torch.add, lambda a, b: torch.cat([a, b], 0)),
    "inputs": (torch.add, lambda a, b: torch.cat([a, b], 1), lambda a, b: torch.cat([a, b], 1)),
    "tokens": (lambda a, b: torch.cat([a, b], 0), lambda a, b: torch.cat([a, b], 0), torch.add),
}


def computed(how: Float8Matmul, x: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = how(x, weight)
    y.backward(g)
    return y.detach(), x.grad, weight.grad


def lopsided_operands() -> tuple[Tensor, Tensor, Tensor]:
    """One half of each dim has numbers that are multiplied by 0, so large that beside them the rest is too small for
    FP8 and is rounded hard: which the other half cannot know by itself."""
    x, weight, g = operands(torch.float32)
    weight[:, 5] = weight[5] = 0
    x[:24, 5], x[3] = 2**30 * x.abs().amax(), 0
    g[:24, 5] = g[3] = 2**30 * g.abs().amax()
    return x, weight, g


@pytest.mark.parametrize("split", JOINED)
@all_recipes
def test_two_ranks_compute_what_one_does(recipe: Float8Recipe, split: str) -> None:
    """Column-parallel (outputs), row-parallel (inputs) and context-parallel (tokens) maps."""
    tensors, team = lopsided_operands(), Team(2)

    whole = computed(Float8Matmul.of(emulated(recipe)), *tensors)

    def assert_same(tolerance: float, *, knowing: bool) -> None:
        def work(rank: int) -> tuple[Tensor, ...]:
            splits = Splits(**{split: team.largest_of(rank)}) if knowing else Splits()
            return computed(Float8Matmul.of(emulated(recipe), splits), *parts_of(split, rank, tensors))

        for join, of_ranks, expected in zip(
            JOINED[split], zip(*team.run(work), strict=True), whole, strict=True
        ):
            assert_near(join(*of_ranks), expected.double(), tolerance)

    assert_same(1e-5, knowing=True)
    with pytest.raises(AssertionError):  # scales of each rank's own tensors
        assert_same(1e-3, knowing=False)


@pytest.mark.parametrize("split", ["outputs", "inputs"])
def test_two_ranks_compute_what_one_does_for_experts(split: str) -> None:
    x, weight, g, ends = grouped_operands(torch.float32)
    team = Team(2)

    def run(how: Float8Groups, x: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = how(x, weight, ends)
        y.backward(g)
        return y.detach(), x.grad, weight.grad

    def work(rank: int) -> tuple[Tensor, ...]:
        how = Float8Groups(emulate=True, splits=Splits(**{split: team.largest_of(rank)}))
        if split == "outputs":
            return run(how, x, weight.chunk(2, 1)[rank], g.chunk(2, 1)[rank])
        return run(how, x.chunk(2, 1)[rank], weight.chunk(2, 2)[rank], g)

    whole = run(Float8Groups(emulate=True), x, weight, g)
    (y0, dx0, dw0), (y1, dx1, dw1) = team.run(work)
    if split == "outputs":
        joined = torch.cat([y0, y1], 1), dx0 + dx1, torch.cat([dw0, dw1], 1)
    else:
        joined = y0 + y1, torch.cat([dx0, dx1], 1), torch.cat([dw0, dw1], 2)
    for made, expected in zip(joined, whole, strict=True):
        assert_near(made.flatten(0, -2), expected.double().flatten(0, -2), 1e-5)


# --- experts ---


def grouped_operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four experts, one of them without rows."""
    x, _, g = operands(dtype, 50)
    weight = torch.stack([operands(dtype)[1].roll(expert, 0) for expert in range(4)])
    return x, weight, g, torch.tensor([13, 13, 40, 50], dtype=torch.int32)


@DTYPES
def test_experts_rows_are_multiplied_as_on_paper(dtype: torch.dtype) -> None:
    x, weight, g, ends = grouped_operands(dtype)
    x_leaf, weight_leaf = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = Float8Groups(emulate=True)(x_leaf, weight_leaf, ends)
    y.backward(g)
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    start = 0
    for expert, end in enumerate(ends.tolist()):
        rows = slice(start, end)
        start = end
        of_weight = (x[rows].double().t() @ g[rows].double()).t()  # not rounded to FP8
        assert_near(weight_leaf.grad[expert], of_weight, tolerance)
        if rows.start == rows.stop:
            continue
        y_paper = quantised(x[rows], E4M3, ROWWISE, 1) @ quantised(weight[expert], E4M3, ROWWISE, 1).t()
        dx_paper = quantised(g[rows], E4M3, ROWWISE, 1) @ quantised(weight[expert], E4M3, ROWWISE, 0)
        assert_near(y[rows].detach(), y_paper, tolerance)
        assert_near(x_leaf.grad[rows], dx_paper, tolerance)


# --- whole decoders ---

DENSE = tiny(
    vocab_size=32,
    hidden_size=32,
    attention=AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=16),
    mlp=MlpSpec(intermediate_size=64),
)
MIXTURE = DENSE.model_copy(
    update={
        "name": "mixture",
        "mlp": MoeSpec(num_experts=4, top_k=2, intermediate_size=48),
    }
)
LATENT = DENSE.model_copy(
    update={
        "name": "latent",
        "attention": LatentAttentionSpec(
            num_heads=2, q_lora_rank=16, kv_lora_rank=16, nope_head_dim=16, rope_head_dim=8, value_head_dim=16
        ),
    }
)
MAPS = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)


def test_every_map_of_the_layers_is_converted_and_nothing_else_changes() -> None:
    model = build(DENSE, seed=0)
    before, parameters = (
        {key: value.clone() for key, value in model.state_dict().items()},
        dict(model.named_parameters()),
    )
    use = use_float8(model, TENSORWISE)
    assert use.converted == [f"layers.{layer}.{name}" for layer in (0, 1) for name in MAPS]
    assert list(use.kept) == ["head"]
    assert "logits" in use.kept["head"]
    assert str(use).splitlines()[0] == "14 of 15 linear maps in FP8"
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert list(after) == list(parameters)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_what_stays_out_and_why() -> None:
    model = build(MIXTURE, seed=0)
    use = use_float8(model, TENSORWISE, exclude=["*.attention.output", *end_layers(2, last=1)])
    assert use.converted == [f"layers.0.attention.{name}" for name in ("query", "key", "value")]
    assert use.kept["layers.0.attention.output"] == "excluded by '*.attention.output'"
    assert use.kept["layers.1.attention.query"] == "excluded by 'layers.1.*'"
    assert "float32" in use.kept["layers.0.mlp.router"]
    assert "on cpu" in use.kept["layers.0.mlp.experts.gate"]
    # Afresh, and this time the experts too.
    use = use_float8(model, emulated(TENSORWISE))
    assert "layers.1.mlp.experts.down" in use.converted
    assert sorted(use.kept) == ["head", "layers.0.mlp.router", "layers.1.mlp.router"]


def test_latents_and_sizes_that_fp8_cannot_have() -> None:
    model = build(LATENT, seed=0)
    use = use_float8(model, TENSORWISE, exclude=LATENT_DOWN)
    assert use.kept["layers.0.attention.query_down"] == "excluded by '*.query_down'"
    assert "layers.0.attention.key_value_up" in use.converted
    use = use_float8(model, TENSORWISE)
    assert "layers.0.attention.query_down" in use.converted
    # A latent of 16 and a rotated key of 8.
    assert (
        use.kept["layers.0.attention.key_value_down"]
        == "its 24 outputs and 32 inputs are not both multiples of 16"
    )
    assert "24 outputs" in str(use)
    with pytest.raises(ConfigError, match=r"24 is not a multiple of 16.*exclude"):
        Float8Matmul.of(TENSORWISE)(torch.randn(3, 32), torch.randn(24, 32))


def test_end_layers() -> None:
    assert end_layers(12, first=1, last=2) == ("layers.0.*", "layers.10.*", "layers.11.*")
    assert end_layers(2, first=2, last=1) == ("layers.0.*", "layers.1.*")
    assert end_layers(3) == ()


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(DENSE, seed=0)
    with pytest.raises(
        ConfigError, match=r"layers.0.atention.query.*Did you mean 'layers.0.attention.query'"
    ):
        use_float8(model, TENSORWISE, exclude=["layers.0.atention.query"])
    with pytest.raises(ConfigError, match="name the `device`"):
        use_float8(Decoder(DENSE).to("meta"), TENSORWISE)
    with pytest.raises(ConfigError, match="bfloat16 or float32 and got float64"):
        Float8Matmul.of(TENSORWISE)(torch.randn(2, 16).double(), torch.randn(16, 16).double())
    monkeypatch.setattr(convert, "_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"capability 8.0, and FP8 matmuls need 8.9"):
        use_float8(model, TENSORWISE, device="cuda")
    monkeypatch.setattr(convert, "_capability", lambda device: (10, 0))
    assert (
        "Hopper's (9.0)"
        in use_float8(build(MIXTURE, seed=0), TENSORWISE, device="cuda").kept["layers.0.mlp.experts.up"]
    )
    monkeypatch.setattr(convert, "_capability", lambda device: (9, 0))
    assert (
        "layers.0.mlp.experts.up" in use_float8(build(MIXTURE, seed=0), TENSORWISE, device="cuda").converted
    )


def test_the_precisions_of_plans() -> None:
    assert recipe_of("bfloat16") is None
    assert recipe_of("float32") is None
    assert recipe_of("fp8") == ROWWISE
    assert recipe_of("fp8", "tensorwise") == TENSORWISE
    assert recipe_of("fp8", "transformer_engine") == ENGINE
    assert recipe_of("bfloat16", "tensorwise") is None
    for name in ("mxfp8", "nvfp4"):
        with pytest.raises(ConfigError, match=rf"'{name}'.*Blackwell.*fp8"):
            recipe_of(name)


def loss_of(model: Decoder, tokens: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    hidden = model(tokens[:, :-1], dtype=dtype).flatten(0, 1)
    objective, _ = chunked_cross_entropy(hidden, model.head_weight, tokens[:, 1:].flatten(), chunk_tokens=64)
    return objective / hidden.shape[0]


def losses_of_training(spec: ModelSpec, recipe: Float8Recipe | None, num_steps: int) -> list[float]:
    model = build(spec, seed=0)
    if recipe is not None:
        assert use_float8(model, recipe).converted
    tokens = random_tokens(spec, 4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(num_steps):
        loss = loss_of(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        assert all(
            parameter.grad.dtype == torch.float32
            for parameter in model.parameters()
            if parameter.requires_grad
        )
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("spec", [DENSE, MIXTURE, LATENT], ids=lambda spec: spec.name)
def test_training_goes_down_as_in_bfloat16(spec: ModelSpec) -> None:
    wide = losses_of_training(spec, None, 20)
    assert wide[-1] < 0.5 * wide[0]
    for recipe in (TENSORWISE, ROWWISE):
        narrow = losses_of_training(spec, emulated(recipe), 20)
        assert narrow != wide
        for ours, theirs in zip(narrow, wide, strict=True):
            assert ours == pytest.approx(theirs, rel=0.06, abs=0.06)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@all_recipes
def test_checkpointed_layers_and_evaluation_compute_the_same(recipe: Float8Recipe) -> None:
    model, tokens = build(MIXTURE, seed=0), random_tokens(MIXTURE, 2, 17)
    use_float8(model, emulated(recipe))
    loss = loss_of(model, tokens)
    with torch.no_grad():
        assert torch.equal(loss_of(model, tokens), loss)
    plain = gradients(model, loss)
    for layer in model.layers:
        layer.forward = lambda *args, forward=layer.forward: checkpoint(forward, *args, use_reentrant=False)
    torch.testing.assert_close(gradients(model, loss_of(model, tokens)), plain, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [TENSORWISE, emulated(ROWWISE)], ids=["tensorwise_scaled_mm", "rowwise_emulated"]
)
def test_a_layer_compiles_without_a_break(recipe: Float8Recipe) -> None:
    torch._dynamo.reset()
    spec = MIXTURE.model_copy(update={"num_layers": 1})
    model, tokens = build(spec, seed=0), random_tokens(spec, 2, 17)
    use_float8(model, recipe)
    expected = gradients(model, loss_of(model, tokens))
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(gradients(model, loss_of(model, tokens)), expected, rtol=0, atol=0)


def eager_and_compiled(recipe: Float8Recipe, backend: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    torch._dynamo.reset()
    linear = Linear(64, 32)
    x, weight, g = operands(torch.bfloat16)
    linear.weight.data = weight.float() * 1.01
    linear.multiply = Float8Matmul.of(recipe)

    def run(forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        linear.zero_grad()
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.backward(g)
        return y.detach(), leaf.grad, linear.weight.grad.clone()

    compiled = torch.compile(linear.forward, fullgraph=True, dynamic=False, backend=backend)
    return run(linear), run(compiled)


@pytest.mark.parametrize(
    "recipe", [TENSORWISE, emulated(ROWWISE)], ids=["tensorwise_scaled_mm", "rowwise_emulated"]
)
def test_a_map_is_traced_without_a_break(recipe: Float8Recipe) -> None:
    eager, traced = eager_and_compiled(recipe, "aot_eager")
    torch.testing.assert_close(traced, eager, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [TENSORWISE, ROWWISE], ids=["tensorwise", "rowwise"])
@emulated_or_not
def test_compiled_code_finds_the_same_scales_and_casts(recipe: Float8Recipe, emulate: bool) -> None:
    """Where it rounds weights to bfloat16 as eager code does; by default it casts straight from float32 to FP8."""
    with torch._inductor.config.patch(emulate_precision_casts=True):
        eager, compiled = eager_and_compiled(emulated(recipe, emulate), "inductor")
    torch.testing.assert_close(compiled, eager, rtol=2**-8, atol=0)


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@all_recipes
def test_sharded_data_parallel_weights(recipe: Float8Recipe) -> None:
    """FSDP2 casts the weights before the layer sees them: the same numbers, and the weights' gradients in float32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    tokens = random_tokens(DENSE, 2, 17)
    plain, sharded = build(DENSE, seed=0), build(DENSE, seed=0)
    mesh = init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    for model in (plain, sharded):
        assert len(use_float8(model, recipe).converted) == 14
    expected = gradients(plain, loss_of(plain, tokens))
    for name, gradient in gradients(sharded, loss_of(sharded, tokens)).items():
        local = gradient.full_tensor() if name.startswith("layers.") else gradient
        assert local.dtype == torch.float32
        torch.testing.assert_close(
            local, expected[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- Transformer Engine ---

ENGINE = Float8Recipe(backend="transformer_engine")


def test_transformer_engine_is_asked_for_by_name_and_missed_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(DENSE, seed=0)
    with pytest.raises(ConfigError, match="runs on CUDA, and this is cpu"):
        use_float8(model, ENGINE)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ConfigError, match=r"not installed: `pip install"):
        use_float8(model, ENGINE, device="cuda")
    with pytest.raises(ConfigError, match="no rowwise scales"):
        use_float8(model, ENGINE.model_copy(update={"scaling": "rowwise"}), device="cuda")


def test_transformer_engine_is_given_our_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the engine's interface: what is tested is that weights and gradients stay the model's own."""
    inside = []

    class Autocast:
        def __init__(self, *, enabled: bool, fp8_recipe: Any) -> None:
            assert enabled
            assert fp8_recipe.fp8_format == "HYBRID"

        def __enter__(self) -> None:
            inside.append(True)

        def __exit__(self, *_: Any) -> None:
            inside.pop()

    class TheirLinear(nn.Linear):
        def __init__(
            self, inputs: int, outputs: int, *, bias: bool, params_dtype: torch.dtype, device: str
        ) -> None:
            super().__init__(inputs, outputs, bias=bias, dtype=params_dtype, device=device)

        def forward(self, x: Tensor) -> Tensor:
            assert inside
            return F.linear(x, self.weight)

    pytorch, recipes = (
        ModuleType("transformer_engine.pytorch"),
        ModuleType("transformer_engine.common.recipe"),
    )
    pytorch.Linear, pytorch.fp8_autocast = TheirLinear, Autocast
    recipes.Float8CurrentScaling = SimpleNamespace
    recipes.Format = SimpleNamespace(HYBRID="HYBRID", E4M3="E4M3")
    engine = ModuleType("transformer_engine")
    engine.pytorch = pytorch
    for name, module in (
        ("transformer_engine", engine),
        ("transformer_engine.pytorch", pytorch),
        ("transformer_engine.common", ModuleType("transformer_engine.common")),
        ("transformer_engine.common.recipe", recipes),
    ):
        monkeypatch.setitem(sys.modules, name, module)

    plain, model = build(DENSE, seed=0), build(DENSE, seed=0)
    monkeypatch.setattr(convert, "_capability", lambda device: (9, 0))
    use_float8(model, ENGINE, device="cuda")
    tokens = random_tokens(DENSE, 2, 17)
    expected = gradients(plain, loss_of(plain, tokens))
    torch.testing.assert_close(gradients(model, loss_of(model, tokens)), expected, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="`splits` work with the torch backend"):
        use_float8(model, ENGINE, splits=lambda name: Splits(tokens=torch.clone), device="cuda")


def test_a_map_has_its_own_matmul() -> None:
    one, other = Linear(16, 16), Linear(16, 16)
    for linear in (one, other):
        nn.init.ones_(linear.weight)
    one.multiply = Float8Matmul.of(TENSORWISE)
    x = torch.linspace(-1, 1, 16)[None]
    assert torch.equal(other(x), F.linear(x, other.weight))
    assert not torch.equal(one(x), other(x))
