"""The public names, by module. Users import them: a name is never lost, and an addition is listed here."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ilvae_fast as il

NAMES = {
    "ilvae_fast": "Activation Advice BrenierDecoder BrenierMap NonNegative Trained __version__ advise annealing "
    "build_info convert data export functional metrics plan reference use_backend vae",
    "ilvae_fast.functional": "BrenierGradients Operands brenier_map brenier_map_jvp brenier_map_vjp potential "
    "potential_and_map",
    "ilvae_fast.reference": "brenier_map convex_network embed potential potential_and_map",
    "ilvae_fast.convert": "from_lidvae",
    "ilvae_fast.export": "PlainDecoder PlainMap onnx plain",
    "ilvae_fast.annealing": "Annealer Constant Cosine Cyclical Linear Piecewise SCHEDULES Schedule as_schedule",
    "ilvae_fast.data": "DATASETS Dataset Parts digits "
    "fashion_mnist load mnist npz omniglot pinwheel synthetic_text text toy",
    "ilvae_fast.layers": "BrenierDecoder BrenierMap NonNegative Trained",
    "ilvae_fast.vae": "AutoregressiveDecoder Bernoulli CONFIGURATIONS Categorical ContinuousBernoulli DECODERS "
    "DiagonalGaussian ENCODERS Gaussian GaussianMixture GaussianMixturePosterior ImportanceSamples LIKELIHOODS "
    "Likelihood NegativeBinomial PRIORS Poisson Prior StandardNormal VAE VAEConfig VAEOutput",
    "ilvae_fast.metrics": "ActiveDirections ActiveUnits Advice Data EpsilonCollapse InverseLipschitz KLDivergence "
    "Reduce RelativeFisher active_directions active_units adapt advise certified_constant clustering_accuracy "
    "clustering_majority "
    "decoder_given decoder_jacobian diagnose elbo epsilon_collapse gain inverse_lipschitz kl_divergence "
    "mutual_information negative_log_likelihood nll_without_latent relative_fisher",
    "ilvae_fast.training": "Diverged Study TrainConfig advice_for build_model evaluate gather_in_methods load_dataset "
    "reproduce run_study shard "
    "sweep train",
    "ilvae_fast.training.toy_report": "draw",
    "ilvae_fast.training.study_report": "draw",
    "ilvae_fast.cli": "COLUMNS app main",
    "ilvae_fast._C": "Plan build_info map_jvp plan potential_and_map softplus training_terms",
}
METHODS = {
    "BrenierMap": "extra_repr forward get_extra_state inverse inverse_lipschitz jacobian jvp logabsdet nonneg_weights "
    "operands plan potential potential_and_map project_ reset_parameters set_extra_state",
    "BrenierDecoder": "embedding_matrix extra_repr forward get_extra_state initialize inverse_lipschitz "
    "inverse_lipschitz_bound jacobian jvp plan project_ reset_parameters set_extra_state",
    "Advice": "cost forced plot",
}
PLAN = "route reason recompute map_flops training_flops saved_bytes map_bytes training_bytes"


@pytest.mark.parametrize("module", NAMES)
def test_no_name_is_lost(module):
    there = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(there, name)] == []


@pytest.mark.parametrize("module", ["ilvae_fast", "ilvae_fast.vae", "ilvae_fast.metrics", "ilvae_fast.training"])
def test_what_a_package_re_exports_is_listed(module):
    """A package's ``__init__`` lists its public names; one that is new there belongs in the table above."""
    source = Path(importlib.import_module(module).__file__ or "").read_text()
    exported = {line.split(" as ")[1] for line in source.splitlines() if " as " in line and line.startswith("from .")}
    assert exported <= set(NAMES[module].split())


@pytest.mark.parametrize("name", METHODS)
def test_no_method_is_lost(name):
    assert [method for method in METHODS[name].split() if not hasattr(getattr(il, name), method)] == []


def test_arguments_keep_their_names_and_order():
    """Of what most users call; defaults are those that measurement favours and may change."""
    options = "activation first_activation output_activation nonneg inverse_lipschitz initialization route recompute"
    assert list(inspect.signature(il.BrenierMap).parameters) == [
        *["in_features", "hidden_features"], *options.split(), *["validate", "device", "dtype"]
    ]  # fmt: skip
    decoder = "latent_dim data_dim hidden_features inverse_lipschitz embedding data_shape device dtype options"
    assert list(inspect.signature(il.BrenierDecoder).parameters) == decoder.split()
    stateless = "x skip_weight bias weights activations inverse_lipschitz embedding route recompute validate"
    for function in (il.functional.brenier_map, il.functional.potential, il.functional.potential_and_map):
        assert list(inspect.signature(function).parameters) == stateless.split()
    assert [f.name for f in dataclasses.fields(type(il.plan(1, 2, (3,))))] == PLAN.split()


def test_the_module_runs_as_a_program():
    result = subprocess.run([sys.executable, "-m", "ilvae_fast", "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout


def test_importing_the_package_imports_no_training():
    """``import ilvae_fast`` stays light: it loads neither the training loop nor the command line."""
    heavy = ("ilvae_fast.training", "ilvae_fast.cli", "typer")
    code = f"import sys, ilvae_fast; print([m for m in sys.modules if m.startswith({heavy})])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
