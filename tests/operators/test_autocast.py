"""The functions under torch.autocast on the CPU."""

from dataclasses import replace

import pytest
import torch

import ilvae_fast as il
from cases import SMALL
from ilvae_fast import functional, reference


@pytest.mark.parametrize("embedding", ["none", "identity", "dense"])
def test_autocast_rounds_products_only(embedding):
    tensors = replace(SMALL, width=24, hidden=(40, 30), leading=(64,), embedding=embedding).tensors(torch.float32)
    exact = tensors.double().outputs(reference)[1]
    low = _rounded(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        ours = tensors.outputs()
        linear = torch.nn.functional.linear(tensors.v, torch.eye(24))
    assert ours[0].dtype == ours[1].dtype == linear.dtype == torch.bfloat16
    # at least as accurate as a network that runs in bfloat16 throughout
    eager = low.outputs(reference)[1]
    assert (ours[1].double() - exact).abs().max() <= 2 * (eager.double() - exact).abs().max()


def _rounded(tensors):
    return type(tensors)(
        tensors.case,
        {n: t if n == "inverse_lipschitz" else t.bfloat16() for n, t in tensors.named.items()},
        tensors.u.bfloat16(),
        tensors.v.bfloat16(),
    )


def test_autocast_keeps_the_quadratic_term_in_float32():
    # a network without skip weights: T = L x to the last bit of the result's dtype
    x = torch.randn(50, 6)
    zero = torch.zeros(4, 6), torch.zeros(4), [torch.ones(1, 3)]
    with torch.autocast("cpu", torch.bfloat16):
        t = functional.brenier_map(x, *zero, activations=("softplus", "identity"), inverse_lipschitz=1.7)
    torch.testing.assert_close(t, (x * 1.7).bfloat16(), rtol=0, atol=0)


def test_autocast_gradients_have_the_dtypes_of_the_parameters_and_leave_float64_alone():
    tensors = replace(SMALL, leading=(16,)).tensors(torch.float32).requires_grad()
    with torch.autocast("cpu", torch.bfloat16):
        t = tensors.outputs()[1]
    gradients = torch.autograd.grad((t.float() * tensors.v).sum(), list(tensors.named.values()))
    assert all(g.dtype == torch.float32 for g in gradients)
    exact = tensors.double().gradients(reference, True, False)
    for name, g in zip(tensors.named, gradients, strict=True):
        scale = float(exact[name].abs().max())
        torch.testing.assert_close(g.double(), exact[name], rtol=0, atol=0.03 * scale, msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        assert tensors.double().outputs()[1].dtype == torch.float64


def test_autocast_accepts_mixed_low_and_single_precision():
    tensors = replace(SMALL, leading=(16,)).tensors(torch.float32)
    x, *rest = tensors.positional()
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.brenier_map(x.bfloat16(), *rest, **tensors.options()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="bfloat16"), torch.autocast("cpu", torch.float16):
        functional.brenier_map(x, *rest, **tensors.options())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients_and_results_under_autocast_have_their_dtypes(backend):
    layer, x = il.BrenierMap(3, (5,)).bfloat16(), torch.randn(2, 3).bfloat16()
    weights, options = layer.nonneg_weights(), {"activations": ["softplus", "identity"]}
    stacked = torch.stack([weights[0], 2 * weights[0]])
    constant = torch.ones(1)

    def of_weights(w):
        return functional.brenier_map(x, layer.skip_weight, layer.bias, [w], **options)

    with il.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        assert of_weights(weights[0]).dtype == torch.bfloat16
        assert torch.vmap(of_weights)(stacked).dtype == torch.bfloat16
        assert torch.vmap(of_weights)(stacked.float()).dtype == torch.bfloat16
        if backend == "reference":
            return
        g = functional.brenier_map_vjp(
            x, layer.skip_weight, layer.bias, weights, map_cotangent=x, inverse_lipschitz=constant, **options
        )
    assert {t.dtype for t in (g.x, g.skip_weight, g.bias, *g.weights)} == {torch.bfloat16}
    assert g.inverse_lipschitz.dtype == torch.float32
