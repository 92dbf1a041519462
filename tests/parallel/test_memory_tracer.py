"""Bytes of live storages, by hand and beside what torch's profiler sees its allocator do."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from colossus.models import build, chunked_cross_entropy
from colossus.parallel.memory import MemoryTracer
from tests.helpers import random_tokens, tiny

MIB = 2**20


def test_views_count_once_and_what_is_gone_does_not() -> None:
    with MemoryTracer() as tracer:
        x = torch.empty(MIB, dtype=torch.uint8)
        y = x.view(2, -1)[0]
        assert tracer.live_bytes == MIB
        del x
        assert tracer.live_bytes == MIB  # the view keeps it
        z = y + 1
        assert tracer.live_bytes == MIB + MIB // 2
        del y, z
    assert tracer.live_bytes == 0
    assert tracer.peak_bytes == MIB + MIB // 2


def test_a_storage_that_is_freed_by_resizing_is_free() -> None:
    with MemoryTracer() as tracer:
        x = torch.empty(MIB, dtype=torch.uint8)
        x.untyped_storage().resize_(0)
        assert tracer.live_bytes == 0
        x.untyped_storage().resize_(MIB)
        assert tracer.live_bytes == MIB
        assert tracer.live_parts == {"gathered": MIB}


def test_kinds() -> None:
    with MemoryTracer() as tracer:
        weight = torch.nn.Parameter(torch.empty(256, 256))
        tracer.own("weights", [weight])
        with tracer.during("activations"):
            made = torch.empty(4, 256) @ weight
        made.sum().backward()
        tracer.own("gradients", [weight.grad])
        parts = tracer.live_parts
    assert parts["weights"] == parts["gradients"] == 4 * 256 * 256
    assert parts["activations"] >= 4 * 4 * 256


def _forward_and_backward(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    hidden = model(tokens, torch.zeros_like(tokens)).flatten(0, 1)
    objective, _ = chunked_cross_entropy(hidden, model.head_weight, tokens.flatten(), chunk_tokens=256)
    objective.backward()


def test_a_step_on_a_cpu_is_what_its_allocator_was_asked_for() -> None:
    spec = tiny(hidden_size=128, num_layers=3, vocab_size=2000, context_tokens=256)
    model, tokens = build(spec, seed=0), random_tokens(spec, 4, 256)
    with MemoryTracer() as tracer:
        tracer.own("weights", model.parameters())
        tracer.own("activations", [tokens])
        before = tracer.live_bytes
        _forward_and_backward(model, tokens)
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _forward_and_backward(model, tokens)
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert most > MIB
    assert abs((tracer.peak_bytes - before) / most - 1) < 0.01


def test_tensors_without_data_count_as_if_they_had_some() -> None:
    def work() -> torch.Tensor:
        x = torch.zeros(512, 512, requires_grad=True)
        made = (x @ x).relu().sum()
        made.backward()
        return x

    with MemoryTracer() as real:
        work()
    with FakeTensorMode(), MemoryTracer() as fake:
        work()
    assert fake.peak_bytes == real.peak_bytes > 0
