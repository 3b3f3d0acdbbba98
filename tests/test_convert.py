"""Decoders of LIDVAE, converted: the same function, the same gradients."""

import pytest
import torch

import ilvae_fast as il
from benchmarks.lidvae import LIDVAEDecoder


@pytest.fixture
def theirs():
    torch.manual_seed(1)
    return LIDVAEDecoder(3, 9, ((8, 6), (7, 5, 4)), inverse_lipschitz=0.5).double()


def test_outputs_and_gradients_are_equal_to_rounding(theirs):
    ours = il.convert.from_lidvae(theirs.state_dict(), inverse_lipschitz=0.5)
    assert float(ours.inverse_lipschitz_bound()) == 0.25
    z = torch.randn(16, 3, dtype=torch.float64, requires_grad=True)
    a, b = ours(z), theirs(z)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x.cos().sum(), z)[0] for x in (a, b)), rtol=1e-11, atol=1e-12)
    for decoder in (ours, theirs):
        decoder(z.detach()).cos().sum().backward()
    for mine, their in zip((ours.latent_map, ours.data_map), theirs.decoder, strict=True):
        skips = [their.A0, *their.A]
        torch.testing.assert_close(mine.skip_weight.grad, torch.cat([s.weight.grad for s in skips]))
        torch.testing.assert_close(mine.bias.grad, torch.cat([s.bias.grad for s in skips]))
        for raw, weight in zip(mine.raw_weights, their.W, strict=True):
            torch.testing.assert_close(raw.grad, weight.param.grad)


def test_the_state_of_a_whole_model_keeps_its_dtype(theirs):
    state = {f"model.{k}": v.float() for k, v in theirs.state_dict().items()} | {"encoder.weight": torch.ones(1)}
    decoder = il.convert.from_lidvae(state, 0.0)
    assert decoder.data_map.skip_weight.dtype == torch.float32
    assert decoder(torch.randn(2, 3)).shape == (2, 9)


def test_the_constant_has_no_default(theirs):
    with pytest.raises(TypeError, match="inverse_lipschitz"):
        il.convert.from_lidvae(theirs.state_dict())


def test_refusals(theirs):
    with pytest.raises(ValueError, match=r"state_dict: got keys .*wanted the layout of LIDVAE"):
        il.convert.from_lidvae({"weight": torch.ones(1)}, 0.5)
    state = theirs.state_dict()
    with pytest.raises(ValueError, match=r"no key 'decoder\.1\.A\.1\.bias'"):
        il.convert.from_lidvae({k: v for k, v in state.items() if k != "decoder.1.A.1.bias"}, 0.5)
    state["decoder.1.W.1.param"] = torch.zeros(5, 6)
    with pytest.raises(ValueError, match=r"W\.1 of a map has shape \(5, 6\), wanted \(4, 5\)"):
        il.convert.from_lidvae(state, 0.5)
