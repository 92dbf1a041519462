"""A bias per expert, moved by the expert's load."""

import torch

from colossus.models.moe import choose
from colossus.optim import Balancing
from colossus.spec.model import MoeSpec, RouterSpec


def test_busy_experts_fall_and_idle_ones_rise() -> None:
    bias, load = torch.nn.Parameter(torch.zeros(4), requires_grad=False), torch.tensor([9.0, 1.0, 5.0, 5.0])
    Balancing({bias: load}, lr=0.25).step()
    assert bias.tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_it_balances_a_router_that_prefers_some_experts() -> None:
    spec = MoeSpec(
        num_experts=8,
        top_k=2,
        intermediate_size=4,
        router=RouterSpec(scoring="sigmoid", balancing_bias=True),
    )
    generator = torch.Generator().manual_seed(0)
    preference = torch.linspace(-1, 1, 8)
    bias, load = torch.nn.Parameter(torch.zeros(8), requires_grad=False), torch.zeros(8)
    balancing = Balancing({bias: load}, lr=0.01)
    shares = []
    for _ in range(200):
        scores = (torch.randn(512, 8, generator=generator) + preference).sigmoid()
        chosen, _ = choose(scores, bias, spec)
        load.copy_(chosen.flatten().bincount(minlength=8))
        shares.append(float(load.max() / load.mean()))
        balancing.step()
    assert shares[0] > 1.7
    assert sum(shares[-20:]) / 20 < 1.2
