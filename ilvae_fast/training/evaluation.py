"""All measures of a trained model in one call."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from .._support.devices import has_float64
from ..data import Dataset
from ..metrics.batches import Reduce
from ..vae import VAE, GaussianMixturePosterior

_INFORMATION = 2000  # data for the mutual information, whose cost is their square
_ELBO_SAMPLES = 10  # of z, for each datum
_JACOBIANS = 200  # latents where the smallest singular value is looked for


@torch.no_grad()
def evaluate(
    model: VAE,
    dataset: Dataset,
    *,
    num_importance_samples: int = 100,
    fisher_samples: int = 16,
    limit: int | None = 1000,
    seed: int = 0,
    process: int = 0,
    num_processes: int = 1,
    reduce: Reduce = None,
    baseline: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Likelihood and collapse on the test data, as plain numbers that JSON can hold; None where there is none, or where
    it is infinite or NaN.

    Divergence and constants are computed in float64, for singular values close to a certified constant are at stake,
    everything else in the model's dtype. Of several processes each takes its part of the data.

    Args:
        num_importance_samples: for the likelihood of each datum.
        fisher_samples: for the divergence of each datum.
        limit: how many of the test data (from the first on) to measure on, a tenth of them for the divergence.
        seed: of all samples.
        process: which one this is of several processes.
        num_processes: how many there are.
        reduce: sums over all of them, as in :mod:`ilvae_fast.metrics`.
        baseline: negative log-likelihood of a model that ignores its latent, for the gain of an autoregressive decoder;
            others are compared with the training data's marginals (:func:`ilvae_fast.metrics.gain`).
        progress: called with the part that is done, 0 to 1.

    Returns:
        nll, perplexity (of sequences: exp of the nll of a token), elbo, gain (None for an autoregressive decoder
        without a baseline), elbo_kl, kl_per_dimension, active_units, latent_variances, active_directions,
        direction_variances, epsilon_collapse (by epsilon), mutual_information, mutual_information_limit (log N),
        kl_minus_mi (on the same N data), fisher, fisher_lower_bound, fisher_local_bound, fisher_cotangent_bound,
        fisher_projected_residual, fisher_effective_sample_size, certified, measured; for a mixture components_used,
        those to which at least a hundredth of the data is assigned, and if the data have labels clustering_accuracy and
        clustering_majority. If there are any: not_finite, sorted names of the measures with a number that is infinite
        or NaN; warnings, what :func:`ilvae_fast.metrics.diagnose` says.

    Raises:
        ValueError: fewer test data than processes.
    """
    check_test_data(dataset, limit, num_processes)
    device = next(model.parameters()).device
    model = copy.deepcopy(model).eval()
    generator = torch.Generator(device).manual_seed(seed + process)
    x = dataset.test[:limit].to(device)
    x = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
    labels = None if dataset.test_labels is None else dataset.test_labels[:limit]
    mine = slice(process, None, num_processes)
    own, few = x[mine], x[: max(num_processes, len(x) // 10)][mine]

    width = model.config.data_dim * model.likelihood.parameters_per_value
    at_once = max(1, 2**22 // (fisher_samples * width * model.config.latent_dim))
    batches, fewer = own.split(64), few.split(at_once)  # what takes long
    watch = _Watch(progress, len(batches) + len(fewer))
    nll = metrics.negative_log_likelihood(
        model, watch(batches), num_importance_samples, generator=generator, reduce=reduce
    )
    elbo = metrics.elbo(model, batches, _ELBO_SAMPLES, generator=generator, reduce=reduce)
    comparable = baseline is not None or model.config.autoregressive_hidden is None
    if baseline is None:
        baseline = metrics.nll_without_latent(model, own, dataset.train, reduce=reduce)
    kl = metrics.kl_divergence(model, own, reduce=reduce)
    active = metrics.active_units(model, own, reduce=reduce)
    directions = metrics.active_directions(model, own, reduce=reduce)
    collapse = metrics.epsilon_collapse(model, own, reduce=reduce)
    # what follows needs all data at once: every process computes the same
    common = torch.Generator(device).manual_seed(seed)
    informed = x[:_INFORMATION]
    information = metrics.mutual_information(model, informed, generator=common)
    rest = metrics.kl_divergence(model, informed).total - information
    clusters = _clusters(model, x) if model.config.prior == "gaussian_mixture" else None

    if not has_float64(device):
        model, x, fewer = model.cpu(), x.cpu(), [batch.cpu() for batch in fewer]
        generator, common = (torch.Generator().manual_seed(s) for s in (seed + process, seed))
    model = model.double()
    x, *fewer = (t.double() if t.is_floating_point() else t for t in (x, *fewer))
    fisher = metrics.relative_fisher(model, watch(fewer), fisher_samples, generator=generator, reduce=reduce)
    z = model.inference(x[:_JACOBIANS]).sample(generator=common)
    decoder = metrics.decoder_given(model.decoder, x[0])
    try:
        constant = metrics.inverse_lipschitz(decoder, z, batch_size=16)
    except torch.linalg.LinAlgError:  # of a Jacobian that is not finite
        constant = metrics.InverseLipschitz(metrics.certified_constant(decoder), math.nan)
    result: dict[str, Any] = {
        "nll": nll,
        "elbo": elbo,
        "gain": elbo + baseline,
        "elbo_kl": kl.total,
        "kl_per_dimension": kl.per_dimension.tolist(),
        "active_units": active.active,
        "latent_variances": active.variances.tolist(),
        "active_directions": directions.active,
        "direction_variances": directions.variances.tolist(),
        "epsilon_collapse": dict(zip(map(str, collapse.epsilons), collapse.collapsed.tolist(), strict=True)),
        "mutual_information": information,
        "mutual_information_limit": math.log(len(informed)),
        "kl_minus_mi": rest,
        "fisher": fisher.divergence,
        "fisher_lower_bound": fisher.lower_bound,
        "fisher_local_bound": fisher.local_bound,
        "fisher_cotangent_bound": fisher.cotangent_bound,
        "fisher_projected_residual": fisher.projected_residual,
        "fisher_effective_sample_size": fisher.effective_sample_size,
        "certified": constant.certified,
        "measured": constant.measured,
    }
    if dataset.num_categories is not None:
        result["perplexity"] = float(torch.tensor(nll * len(x) / int((x >= 0).sum())).exp())
    if clusters is not None:
        result["components_used"] = int((clusters.bincount() >= max(1, 0.01 * len(clusters))).sum())
        if labels is not None:
            result["clustering_accuracy"] = metrics.clustering_accuracy(clusters, labels)
            result["clustering_majority"] = metrics.clustering_majority(clusters, labels)
    absent = ["certified", "fisher_lower_bound"] if math.isnan(constant.certified) else []
    absent += [] if hasattr(decoder, "cotangent_bound") else ["fisher_cotangent_bound"]
    absent += [] if comparable else ["gain"]
    finite = {name: _finite(value) for name, value in result.items()}
    not_finite = sorted(name for name in result if finite[name] != result[name] and name not in absent)
    remarks = {"not_finite": not_finite, "warnings": metrics.diagnose(finite)}
    return {**finite, **{name: remark for name, remark in remarks.items() if remark}}


def check_test_data(dataset: Dataset, limit: int | None, num_processes: int) -> None:
    """Each process has something to measure on.

    Raises:
        ValueError: fewer test data than processes.
    """
    count = len(dataset.test[:limit])
    if count < num_processes:
        raise ValueError(
            f"eval_limit: got {count} test data to measure on ({len(dataset.test)} in all), wanted at least "
            f"{num_processes}, one for each process"
        )


def _finite(value: Any) -> Any:
    """``value``, lists and dicts of numbers too, with None for each that is infinite or NaN."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Watch:
    """Passes batches on, and says what part of ``count`` has been passed."""

    def __init__(self, progress: Callable[[float], None] | None, count: int) -> None:
        self.progress, self.count, self.done = progress, count, 0

    def __call__(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            yield batch
            self.done += 1
            if self.progress is not None:
                self.progress(self.done / self.count)


def _clusters(model: VAE, x: Tensor) -> Tensor:
    posterior = model.inference(x)
    assert isinstance(posterior, GaussianMixturePosterior)
    return posterior.logits.argmax(-1).cpu()
