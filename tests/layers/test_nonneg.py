"""Parametrisations of non-negative weights: values, inverses, derivatives, refusals."""

import pytest
import torch

import ilvae_fast as il
from ilvae_fast.layers.nonneg import as_nonnegative

KINDS = [il.NonNegative(n) for n in ("softplus", "exp", "clamp", "abs", "square")] + [il.NonNegative("clamp", 1e-3)]
RAW = torch.linspace(-30, 30, 601, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_effective_weights_are_non_negative_and_raw_inverts(kind):
    assert (kind(RAW) >= (kind.parameter or 0)).all()
    effective = torch.logspace(-2, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(kind(kind.raw(effective)), effective, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_derivatives(kind):
    raw = RAW[torch.arange(0, 601, 7)] + 0.013  # away from the kinks
    assert torch.autograd.gradcheck(kind, (raw.requires_grad_(),))


def test_none_leaves_the_weights_as_they_are():
    torch.testing.assert_close(il.NonNegative("none")(RAW), RAW)


def test_softplus_is_exact_in_float64():
    exact = torch.tensor(25.0 + 1.3887943864771144e-11, dtype=torch.float64)  # 25 + log1p(exp(-25))
    ours = il.NonNegative("softplus")(torch.tensor(25.0, dtype=torch.float64))
    torch.testing.assert_close(ours, exact, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("softmax",), "nonneg: got 'softmax'.*nearest: 'softplus'"),
        (("clamp", -1.0), "got minimum -1.0, wanted a finite one >= 0"),
        (("exp", 1.0), "got parameter 1.0, wanted none"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        il.NonNegative(*arguments)


def test_refuses_other_types():
    with pytest.raises(TypeError, match="nonneg: got int"):
        as_nonnegative(3)
