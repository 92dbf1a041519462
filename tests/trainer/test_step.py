"""However a batch is split, its gradient is that of the whole."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colossus.data import IGNORED
from colossus.data import Batch as Arrays
from colossus.models import Decoder
from colossus.spec.model import ModelSpec, MoeSpec
from colossus.spec.run import Routing
from colossus.trainer.step import accumulate_gradients, loss_sums, split, take_expert_loads
from tests.helpers import VARIETIES, scrambled
from tests.trainer.runs import MODEL, SEQUENCES, random_batch, small_run

SPLITS = [1, 2, 3, 4, 5, 8]


def of_the_whole(model: Decoder, batch: Arrays, z_loss: float) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the batch in one piece, float64, torch's own cross-entropy."""
    model = deepcopy(model).double()
    hidden = model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.documents), dtype=torch.float64)
    logits = hidden @ model.head_weight.T * model.spec.logit_multiplier
    if model.spec.logit_soft_cap is not None:
        logits = model.spec.logit_soft_cap * torch.tanh(logits / model.spec.logit_soft_cap)
    logits, targets = logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED)
    z = logits[targets != IGNORED].logsumexp(-1).square().mean()
    (loss + z_loss * z).backward()
    return loss.item(), {name: p.grad.to_dense() for name, p in model.named_parameters() if p.requires_grad}


def assert_gradients(model: Decoder, expected: dict[str, Tensor]) -> None:
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if name not in expected:  # balancing biases
            assert parameter.grad is None
            continue
        torch.testing.assert_close(
            parameter.grad.to_dense().double(),
            expected[name],
            rtol=1e-4,
            atol=1e-5 * largest,
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.mark.parametrize("ignored", [False, True], ids=["all counted", "some ignored"])
@pytest.mark.parametrize("sequences", SPLITS)
def test_any_split_gives_the_gradient_of_the_whole(sequences: int, ignored: bool) -> None:
    model, batch = scrambled(MODEL), random_batch(0, ignored=ignored)
    loss, expected = of_the_whole(model, batch, z_loss=0.01)
    sums = accumulate_gradients(model, batch, small_run(sequences).plan, z_loss=0.01)
    assert sums.num_tokens == int((batch.targets != IGNORED).sum())
    assert sums.loss.item() / sums.num_tokens == pytest.approx(loss, rel=1e-5)
    assert_gradients(model, expected)


@pytest.mark.parametrize("spec", VARIETIES.values(), ids=VARIETIES)
def test_every_kind_of_model(spec: ModelSpec) -> None:
    model, batch = scrambled(spec), random_batch(1, spec, ignored=True)
    _, expected = of_the_whole(model, batch, z_loss=0.0)
    accumulate_gradients(model, batch, small_run(2).plan)
    assert_gradients(model, expected)


MIXTURES = [name for name, spec in VARIETIES.items() if isinstance(spec.mlp, MoeSpec)]


@pytest.mark.parametrize("name", MIXTURES)
def test_any_split_gives_the_routers_losses_of_the_whole(name: str) -> None:
    """Losses over sequences add up; one over the micro-batch, as is common, would depend on the split."""
    model, batch = scrambled(VARIETIES[name]), random_batch(1, VARIETIES[name], ignored=True)
    routing = Routing(balance_loss=0.7, z_loss=0.2)
    results = []
    for sequences in (SEQUENCES, 2, 1):
        model.zero_grad()
        accumulate_gradients(model, batch, small_run(sequences).plan, routing=routing)
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    for other in results[1:]:
        for n, gradient in results[0].items():
            torch.testing.assert_close(
                other[n], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}"
            )
    model.zero_grad()
    accumulate_gradients(model, batch, small_run(SEQUENCES).plan)
    router = "layers.1.mlp.router.weight"
    assert not torch.allclose(model.get_parameter(router).grad, results[0][router], rtol=1e-3)


def test_the_busiest_expert_is_told_once() -> None:
    model, batch = scrambled(VARIETIES["mixture"]), random_batch(1, VARIETIES["mixture"])
    accumulate_gradients(model, batch, small_run(2).plan)
    loads = [layer.mlp.load.clone() for layer in model.layers]
    top_k = model.spec.mlp.top_k
    assert all(load.sum() == batch.tokens.size * top_k for load in loads)
    assert take_expert_loads(model) == pytest.approx(max(float(load.max() / load.mean()) for load in loads))
    assert all(layer.mlp.load.sum() == 0 for layer in model.layers)
    assert take_expert_loads(scrambled(MODEL)) is None


def test_sums_of_parts_are_the_sum_of_the_whole() -> None:
    model, batch, plan = scrambled(MODEL), random_batch(2, ignored=True), small_run(SEQUENCES).plan
    with torch.no_grad():
        whole = loss_sums(model, batch, plan)[1]
        parts = [loss_sums(model, row, plan)[1] for row in split(batch, 1)]
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-6)
    assert parts[2].num_tokens == 0


def test_bfloat16_gradients_point_the_same_way() -> None:
    model, batch = scrambled(MODEL), random_batch(0)
    _, expected = of_the_whole(model, batch, z_loss=0.0)
    accumulate_gradients(model, batch, small_run(2).plan.model_copy(update={"dtype": "bfloat16"}))
    actual = torch.cat([p.grad.to_dense().flatten() for p in model.parameters()])
    assert actual.dtype == torch.float32
    wanted = torch.cat([gradient.flatten() for gradient in expected.values()]).float()
    assert torch.cosine_similarity(actual, wanted, dim=0) > 0.995
    assert actual.norm().item() == pytest.approx(wanted.norm().item(), rel=0.03)
