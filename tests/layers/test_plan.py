"""``plan`` of a map and of a decoder: what a call does, for exactly its shape, dtype, device and autograd state."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ilvae_fast as il


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9,), (3, 4), (0,), ()])
def test_a_map_plans_its_own_shape(dtype, shape):
    layer, x = il.BrenierMap(5, (16, 8), dtype=dtype), torch.zeros(*shape, 5, dtype=dtype)
    assert layer.plan(x) == il.plan(torch.Size(shape).numel(), 5, (16, 8), dtype=dtype)


def test_options_of_the_layer_count():
    x = torch.zeros(9, 5)
    assert il.BrenierMap(5, (16,), route="matmul").plan(x) == il.plan(9, 5, (16,), route="matmul")
    kept = il.BrenierMap(5, (16,), recompute=False).plan(x)
    assert kept == il.plan(9, 5, (16,), recompute=False)
    assert kept.saved_bytes > 0


def test_autocast_counts():
    layer, x = il.BrenierMap(5, (16, 8)), torch.zeros(9, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.plan(x) == il.plan(9, 5, (16, 8), dtype=torch.bfloat16)
        assert layer.double().plan(x.double()) == il.plan(9, 5, (16, 8), dtype=torch.float64)


def test_an_embedding_counts():
    layer, z = il.BrenierMap(6, (16, 8)), torch.zeros(9, 2)
    assert layer.plan(z, 6) == il.plan(9, 6, (16, 8), embedding_features=2)
    dense = il.plan(9, 6, (16, 8), embedding_features=2, embedding="dense")
    assert layer.plan(z, torch.zeros(6, 2)) == dense


def test_autograd_counts():
    """Without autograd nothing is saved, and few rows of a wide network take another route."""
    layer, x = il.BrenierMap(784, (512, 512)), torch.randn(2, 784)
    recorded = layer.plan(x)
    assert (recorded.route, "few rows" in recorded.reason) == ("fused", False)
    assert recorded.saved_bytes > 0
    with torch.no_grad():
        alone, t = layer.plan(x), layer(x)
        assert (alone.route, "few rows" in alone.reason, alone.saved_bytes) == ("matmul", True, 0)
        layer.route = "matmul"
        assert torch.equal(t, layer(x))  # so it was
    frozen = il.BrenierMap(784, (512, 512)).requires_grad_(False)
    assert frozen.plan(x).route == "matmul"
    assert frozen.plan(x.requires_grad_()).route == "fused"


def test_bytes_are_those_of_inputs_parameters_and_results():
    layer, x = il.BrenierMap(5, (16, 8)), torch.zeros(9, 5)
    inputs = x.numel() + sum(p.numel() for p in layer.parameters())
    plan = layer.plan(x)
    assert plan.map_bytes == 4 * (inputs + x.numel())
    assert plan.training_bytes == 4 * (2 * inputs + x.numel())
    assert "KiB" in str(plan)


def test_the_reference_backend_is_named():
    with il.use_backend("reference"):
        plan = il.BrenierMap(5, (16,)).plan(torch.zeros(9, 5))
    assert plan.route == "reference"
    assert "use_backend" in plan.reason


def test_wrong_inputs_are_refused_as_by_the_call():
    layer = il.BrenierMap(5, (16,))
    with pytest.raises(ValueError, match=r"x: got shape \(9, 4\)"):
        layer.plan(torch.zeros(9, 4))
    with pytest.raises(ValueError, match=r"z: got shape \(9, 4\)"):
        il.BrenierDecoder(5, 9, ((4,), (4,))).plan(torch.zeros(9, 4))


@pytest.mark.parametrize("embedding", ["identity", "orthogonal", "full_rank"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_decoder_plans_both_maps(embedding, autocast):
    decoder, z = il.BrenierDecoder(3, 12, ((8,), (16, 16)), embedding=embedding), torch.zeros(2, 7, 3)
    dtype = torch.bfloat16 if autocast else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plan = decoder.plan(z)
    kind = "identity" if embedding == "identity" else "dense"
    assert plan.latent_map == il.plan(14, 3, (8,), dtype=dtype)
    assert plan.data_map == il.plan(14, 12, (16, 16), embedding_features=3, embedding=kind, dtype=dtype)
    for cost in ("map_flops", "training_flops", "map_bytes", "training_bytes", "saved_bytes"):
        assert getattr(plan, cost) == getattr(plan.latent_map, cost) + getattr(plan.data_map, cost)
    assert "latent map" in str(plan)
    assert "data map" in str(plan)


def test_a_decoder_records_what_its_latent_map_makes():
    """The second map is recorded by autograd where its input is, be its own parameters frozen."""
    decoder, z = il.BrenierDecoder(3, 12, ((8,), (512, 512)), embedding="identity"), torch.zeros(100, 3)
    decoder.data_map.requires_grad_(False)
    assert decoder.plan(z).data_map.saved_bytes > 0
    decoder.latent_map.requires_grad_(False)
    assert decoder.plan(z).data_map.saved_bytes == 0


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("embedding", [None, 8, "dense"])
def test_the_flop_counter_of_torch_counts_what_the_plan_says(recompute, embedding):
    layer = il.BrenierMap(8, (16, 12), recompute=recompute)
    x = torch.randn(5, 8 if embedding is None else 3, requires_grad=True)
    embedding = torch.randn(8, 3, requires_grad=True) if embedding == "dense" else embedding
    plan = layer.plan(x, embedding)
    with FlopCounterMode(display=False) as counter:
        t = layer(x, embedding)
        assert counter.get_total_flops() == plan.map_flops
        t.sum().backward()
        assert counter.get_total_flops() == plan.map_flops + plan.training_flops
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer.jvp(x, x, embedding)
        assert counter.get_total_flops() == 2 * plan.map_flops
    if embedding is None:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer.potential(x)
            assert counter.get_total_flops() == plan.map_flops / 2


def test_the_flop_counter_counts_no_products_of_weights_where_none_are_wanted():
    layer, x = il.BrenierMap(8, (16, 12), recompute=False), torch.randn(5, 8, requires_grad=True)
    t = layer(x)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(t.sum(), x)
    assert counter.get_total_flops() == layer.plan(x).map_flops
