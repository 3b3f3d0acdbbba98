"""Layers, models, likelihoods, measures and configurations: good arguments, of which one or two may be spoiled."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ilvae_fast as il
from ilvae_fast import annealing, data, metrics, vae
from ilvae_fast.training import TrainConfig

from . import Finding, Refused, call
from .operators import CLEAR, _spoiled

Call = tuple[Callable[..., Any], dict[str, Any]]
ODD: tuple[Any, ...] = (
    None, 0, 1, 3, -1, 2.5, -0.5, 1e-30, 1e30, math.nan, math.inf, "", "softplus", "nonsense", "1e-3", (), (2, 0),
    [3, [4]], {}, {"name": "celu"}, {"kind": "linear"}, b"x", True, object(), torch.float16, torch.tensor(2.0),
    torch.zeros(0), torch.ones(3, dtype=torch.int64),
)  # fmt: skip


def one(source: random.Random) -> str:
    """One call of a public function or method. Returns what became of it."""
    name = source.choice(sorted(TARGETS))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(source.randrange(2**31))
        function, arguments = TARGETS[name](source)
        spoiled = source.random() < 0.7
        parts = name in ("likelihoods", "priors")  # a model calls them, with tensors
        if spoiled:
            for _ in range(source.choice((1, 1, 2))):
                argument = source.choice(sorted(arguments))
                value = arguments[argument]
                if isinstance(value, torch.nn.Module):  # any object with its methods will do; others lack them
                    continue
                arguments[argument] = _spoiled(source, value, tensor=True) if parts else _other(source, value)
        try:
            call(function, clear=(*CLEAR, OSError), **arguments)
        except Refused as error:
            if not spoiled and name != "TrainConfig.updated":  # whose assignments may be bad by themselves
                raise Finding(f"{name}: refused good arguments: {error}") from error
            return "refused"
        except Finding as error:
            raise Finding(f"{name}: {error}") from error
    return "taken" if spoiled else "run"


def _other(source: random.Random, value: Any) -> Any:
    if isinstance(value, Tensor) and source.random() < 0.8:
        return _spoiled(source, value)
    if isinstance(value, dict) and value and source.random() < 0.8:
        key = source.choice(sorted(value, key=str))
        if source.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _other(source, value[key])}
    return source.choice(ODD)


# Good arguments


def _map_options(source: random.Random) -> dict[str, Any]:
    return {
        "in_features": source.randint(1, 6),
        "hidden_features": [source.randint(6, 12) for _ in range(source.randint(1, 3))],
        "activation": source.choice(("softplus", il.Activation("softplus", 10.0), "celu", "smooth_leaky_relu")),
        "output_activation": "identity",
        "nonneg": source.choice(("abs", "softplus", "exp", "square", "clamp")),
        "inverse_lipschitz": source.choice((0.3, 1.0, torch.tensor(0.5))),
        "initialization": source.choice(("random", "sparse", "identity")),
        "route": "auto",
        "recompute": None,
        "validate": source.random() < 0.3,
        "dtype": None,
    }


def _constructed(source: random.Random) -> Call:
    return il.BrenierMap, _map_options(source)


def _of_map(name: str) -> Callable[[random.Random], Call]:
    def make(source: random.Random) -> Call:
        layer = il.BrenierMap(**{**_map_options(source), "activation": "softplus"})
        x = torch.randn(*source.choice(((), (0,), (3,), (2, 5))), layer.in_features)
        arguments: dict[str, Any] = {"y" if name == "inverse" else "x": x}
        if name == "jvp":
            arguments["v"] = torch.randn_like(x)
        if name == "inverse":
            arguments["tolerance"] = None
        return getattr(layer, name), arguments

    return make


def _decoder(source: random.Random) -> Call:
    latent = source.randint(1, 3)
    arguments = {
        "latent_dim": latent,
        "data_dim": latent + source.randint(0, 5),
        "hidden_features": source.choice((((6, 5), (4,)), ((6,), (5, 4)))),
        "inverse_lipschitz": source.choice((0.7, (0.7, 1.3))),
        "embedding": source.choice(("orthogonal", "full_rank", "identity")),
    }
    return il.BrenierDecoder, arguments


def _of_decoder(name: str) -> Callable[[random.Random], Call]:
    def make(source: random.Random) -> Call:
        make_it, options = _decoder(source)
        decoder = make_it(**options)
        z = torch.randn(4, options["latent_dim"])
        arguments: dict[str, Any] = {"z": z}
        if name == "jvp":
            arguments["v"] = torch.randn_like(z)
        if name == "initialize":
            arguments = {
                "x": torch.rand(40, options["data_dim"]),
                "likelihood": source.choice(("gaussian", "bernoulli")),
            }
        return getattr(decoder, name), arguments

    return make


def _state(source: random.Random) -> Call:
    layer = il.BrenierMap(3, (4, 2))
    return lambda state: layer.load_state_dict(dict(state)), {"state": dict(layer.state_dict())}


def _plan(source: random.Random) -> Call:
    return il.plan, {
        "batch": source.choice((0, 1, 1000)), "in_features": 8, "hidden_features": (16, 16), "embedding_features": None,
        "embedding": "identity", "dtype": torch.float32, "route": "auto", "recompute": None, "device": "cpu",
        "recorded": None,
    }  # fmt: skip


def _advise(source: random.Random) -> Call:
    x = torch.rand(source.choice((20, 60)), 7)
    return il.advise, {"x": x, "latent_dim": 2, "likelihood": source.choice(("gaussian", "continuous_bernoulli"))}


_HIDDEN = {"il-lidvae": ((5,), (6, 4)), "il-lidmvae": ((5,), (4,)), "vae": (5, 4)}


@functools.cache
def _model(name: str = "il-lidvae") -> vae.VAE:
    torch.manual_seed(0)
    return vae.VAE(
        vae.VAEConfig.named(name, data_dim=6, latent_dim=2, encoder_hidden=(5,), decoder_hidden=_HIDDEN[name])
    )


def _of_model(name: str, **more: Any) -> Callable[[random.Random], Call]:
    def make(source: random.Random) -> Call:
        model = _model(source.choice(("il-lidvae", "il-lidmvae", "vae")))
        arguments: dict[str, Any] = {"x": torch.randn(5, 6)}
        if name == "decode":
            arguments = {"z": torch.randn(5, 2)}
        if name == "sample":
            arguments = {"num_samples": 3, "noise": True}
        if name == "interpolate":
            arguments = {"start": torch.randn(6), "end": torch.randn(6), "num_steps": 3}
        return getattr(model, name), {**arguments, **more}

    return make


def _measured(name: str, **more: Any) -> Callable[[random.Random], Call]:
    def make(source: random.Random) -> Call:
        arguments: dict[str, Any] = {"model": _model(), "data": torch.randn(12, 6), **more}
        return getattr(metrics, name), arguments

    return make


def _clusters(source: random.Random) -> Call:
    function = source.choice((metrics.clustering_accuracy, metrics.clustering_majority))
    return function, {"clusters": torch.randint(3, (20,)), "labels": torch.randint(4, (20,))}


def _config(source: random.Random) -> Call:
    name = source.choice([name for name in sorted(vae.CONFIGURATIONS) if "sv" not in name])
    fields = vae.VAEConfig.named(name, data_dim=6, latent_dim=2).to_dict()
    return lambda fields: vae.VAE(vae.VAEConfig.from_dict(fields)), {"fields": fields}


def _training(source: random.Random) -> Call:
    return TrainConfig.from_dict, {"fields": TrainConfig(data="toy", L=0.5).to_dict()}


def _assignment(source: random.Random) -> Call:
    name = source.choice((*TrainConfig().to_dict(), "model_options.likelihood", "annealing.L1.kind", "x.y", ""))
    value = source.choice(
        ("3", "no", "1e-3", "null", "[1, 2]", "{a: 1}", "!!python/name:os.system", "\t", "&a [*a]", "x")
    )
    return TrainConfig().updated, {"assignments": ["epochs=3", f"{name}={value}"][source.randrange(2) :]}


def _likelihood(source: random.Random) -> Call:
    name = source.choice(("bernoulli", "continuous_bernoulli", "gaussian", "poisson", "negative_binomial"))
    likelihood = vae.LIKELIHOODS[name]()
    method = source.choice(("log_prob", "mean", "sample", "score", "marginal", "fisher", "check"))
    x = torch.randint(2, (4, 6)).float()
    f = torch.randn(4, 6 * likelihood.parameters_per_value)
    given = {"log_prob": {"x": x, "f": f}, "score": {"x": x, "f": f}, "marginal": {"x": x}, "check": {"x": x}}
    return getattr(likelihood, method), given.get(method, {"f": f})


def _prior(source: random.Random) -> Call:
    prior = vae.PRIORS[source.choice(sorted(vae.PRIORS))](3)
    method = source.choice(("posterior", "log_prob", "sample"))
    if method == "sample":
        return prior.sample, {"num_samples": 4}
    if method == "log_prob":
        return prior.log_prob, {"z": torch.randn(4, 3)}
    return prior.posterior, {"parameters": torch.randn(4, prior.num_posterior_parameters)}


def _schedule(source: random.Random) -> Call:
    schedules = (
        {"kind": "linear", "start": 1.0, "end": 0.5, "steps": 10},
        {"kind": "cosine", "start": 1.0, "end": 0.1, "steps": 5}, 0.3,
    )  # fmt: skip
    schedule = source.choice(schedules)
    return lambda value, step: annealing.as_schedule(value).value(step), {
        "value": schedule,
        "step": source.randrange(20),
    }


def _annealed(source: random.Random) -> Call:
    schedules = {"L1": {"kind": "linear", "start": 1.0, "end": 0.5, "steps": 10}, "kl_weight": 0.5}
    return annealing.Annealer, {"model": _model(), "schedules": schedules}


def _data(source: random.Random) -> Call:
    name = source.choice(("toy", "pinwheel", "synthetic_text"))
    small = {"toy": {"num_train": 5, "num_test": 5, "sigma": 1.0}, "pinwheel": {"num_classes": 2, "num_per_class": 9}}
    options = small.get(name, {"num_sentences": 20, "length": 3, "vocabulary_size": 5, "hidden": 4})
    return lambda name, options, seed: data.load(name, seed=seed, **dict(options)), {
        "name": name, "options": options, "seed": 0,
    }  # fmt: skip


def _activation(source: random.Random) -> Call:
    return il.Activation, {"name": "celu", "parameter": 0.5}


TARGETS: dict[str, Callable[[random.Random], Call]] = {
    "BrenierMap": _constructed,
    **{f"BrenierMap.{n}": _of_map(n) for n in
       ("forward", "potential", "potential_and_map", "jvp", "jacobian", "logabsdet", "inverse", "plan")},
    "BrenierMap.load_state_dict": _state,
    "BrenierDecoder": _decoder,
    **{f"BrenierDecoder.{n}": _of_decoder(n) for n in ("forward", "jvp", "jacobian", "plan", "initialize")},
    "plan": _plan,
    "advise": _advise,
    "Activation": _activation,
    "VAE.forward": _of_model("forward"),
    **{f"VAE.{n}": _of_model(n) for n in ("encode", "decode", "reconstruct", "sample", "interpolate")},
    "VAE.log_likelihood": _of_model("log_likelihood", num_importance_samples=3),
    "metrics.active_units": _measured("active_units"),
    "metrics.kl_divergence": _measured("kl_divergence"),
    "metrics.elbo": _measured("elbo"),
    "metrics.negative_log_likelihood": _measured("negative_log_likelihood", num_importance_samples=3),
    "metrics.mutual_information": _measured("mutual_information"),
    "metrics.clustering": _clusters,
    "VAEConfig": _config,
    "TrainConfig": _training,
    "TrainConfig.updated": _assignment,
    "likelihoods": _likelihood,
    "priors": _prior,
    "annealing.as_schedule": _schedule,
    "annealing.Annealer": _annealed,
    "data": _data,
}  # fmt: skip
