"""Devices that the extension does not know, such as Apple's and Intel's GPUs: plain autograd, one warning, no float64.

Each check runs in a process of its own, since a device cannot be unregistered.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ilvae_fast as il

TESTS = Path(__file__).parents[1]


def _operators() -> None:
    from fake_device import KIND, FakeDevice

    torch.manual_seed(0)
    here = il.BrenierMap(3, (8, 7), inverse_lipschitz=0.5)
    x, v = torch.randn(5, 3), torch.randn(5, 3)
    with FakeDevice(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        there = copy.deepcopy(here).to(KIND)
        results = []
        for layer, device in ((here, "cpu"), (there, KIND)):
            a = x.detach().to(device).requires_grad_()
            phi, t = layer.potential_and_map(a)
            (gradient,) = torch.autograd.grad(t.square().sum() + phi.sum(), a, create_graph=True)
            (gradient.square().sum() + phi.square().sum()).backward()
            values = [phi, t, gradient, a.grad, *layer.jvp(a, v.to(device)), layer.inverse(t.detach())]
            values += [p.grad for p in layer.parameters() if p.grad is not None]
            assert all(value.device.type == device for value in values)
            results.append([value.detach().cpu() for value in values])
        assert len(results[0]) > 10
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
        plan = there.plan(x.to(KIND))
    assert (plan.route, plan.reason) == ("reference", f"ilvae_fast has no kernels for {KIND} devices")
    messages = [str(w.message) for w in caught if "plain autograd" in str(w.message)]
    assert len(messages) == 1, messages
    assert f"got a tensor on {KIND}:0, and ilvae_fast has no kernels for {KIND} devices" in messages[0]


def _asked_for() -> None:
    from fake_device import KIND, FakeDevice

    with FakeDevice(), warnings.catch_warnings(), il.use_backend("reference"):
        warnings.simplefilter("error")
        il.BrenierMap(2, (4,)).to(KIND)(torch.randn(3, 2).to(KIND))


def _models() -> None:
    """All of training and evaluation that computes in float64 elsewhere."""
    from fake_device import KIND, FakeDevice

    from ilvae_fast.data import Dataset
    from ilvae_fast.training import evaluate
    from ilvae_fast.vae import VAE, VAEConfig

    torch.manual_seed(0)
    grey, counts, tokens = torch.rand(30, 6), torch.poisson(3 * torch.rand(30, 6)), torch.randint(3, (30, 6))
    variants = {
        "bernoulli": (grey.round(), {}),
        "continuous_bernoulli": (grey, {}),
        "gaussian": (grey, {"likelihood_options": {"variance": "trained"}}),
        "poisson": (counts, {}),
        "negative_binomial": (counts, {"prior": "gaussian_mixture"}),
        "categorical": (tokens, {"likelihood_options": {"num_categories": 3}}),
    }
    few = {"num_importance_samples": 3, "fisher_samples": 2}
    made = torch.Generator
    for likelihood, (x, options) in variants.items():
        small = {"encoder_hidden": (8,), "decoder_hidden": ((8,), (8,)), **options}
        config = VAEConfig(data_dim=6, latent_dim=2, likelihood=likelihood, **small)
        dataset = Dataset(x, x, None, None, (6,))
        encoder = None  # torch has one kernel for an LSTM on a GPU, which a device that is none cannot run
        if likelihood == "categorical":
            encoder = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Flatten(), torch.nn.Linear(12, 4))
        model = VAE(config, encoder)
        model.initialize(x)
        here = evaluate(model, dataset, **few)
        with FakeDevice(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.Generator = lambda device="cpu": made()  # a device has to bring its own
            try:
                model.to(KIND)
                there = evaluate(model, dataset, **few)
                model(x[:8].to(KIND)).loss.backward()
                model.initialize(x.to(KIND))
                assert all(p.device.type == KIND for p in model.parameters())
            finally:
                torch.Generator = made
        assert there.keys() == here.keys()
        for name in ("elbo_kl", "gain", "certified", "active_units"):
            assert there[name] == pytest.approx(here[name], rel=0.2, abs=1e-3), (likelihood, name)


@pytest.mark.parametrize("check", [_operators, _asked_for, _models], ids=lambda check: check.__name__.strip("_"))
def test_on_a_device_without_kernels_and_without_float64(check):
    code = f"import sys; sys.path[:0] = {[str(TESTS), str(Path(__file__).parent)]}; import test_devices as t; "
    # autograd's thread of a device that Python implements must not meet the end of the interpreter (torch 2.14)
    command = [sys.executable, "-c", f"{code}t.{check.__name__}(); import os; os._exit(0)"]
    result = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
