"""Measures of fit and of posterior collapse, over data that streams by in batches; no measure keeps a graph.

Arguments common to all functions:

    model: a :class:`ilvae_fast.vae.VAE`, a model from elsewhere by :func:`adapt`, or any object with those of the
        parts that the function names
    data: (N, D), or an iterable of batches (n, D), where a tuple or list stands for its first entry; on the model's
        device and in its dtype. For an adapted model (N, ...), as its encoder takes them
    batch_size: how many data of a tensor go at once
    generator: of the samples; by default torch's own
    reduce: for data that are spread over processes: sums a float64 tensor over all of them (of each call's result
        every process has the same then), such as ``lambda t: accelerator.reduce(t, "sum")``

Units are nats. Errors name the argument: ValueError for data without a datum, TypeError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ._extras import require
from .layers import check_positive
from .vae.adapted import adapt as adapt

Data: TypeAlias = "Tensor | Iterable[Tensor | Sequence[Tensor]]"
Reduce: TypeAlias = "Callable[[Tensor], Tensor] | None"

_PAIRS = 2**22  # densities of a sample under a posterior that are held at a time
_SATURATED = 0.9  # of log N, from where on the mutual information of N data says little about that of more


class KLDivergence(NamedTuple):
    """total: a float. per_dimension (m,) float64, whose sum it is, but for a mixture, which adds assignment, the KL of
    q(y|x) from p(y)."""

    total: float
    per_dimension: Tensor
    assignment: float = 0.0


class ActiveUnits(NamedTuple):
    """active: how many of the m units are. variances (m,) float64: ``Var_x E_q(z|x)[z]``."""

    active: int
    variances: Tensor


class ActiveDirections(NamedTuple):
    """active: how many of the m directions are. variances (m,) float64: along them, the eigenvalues of
    ``Cov_x E_q(z|x)[z]``, the largest first."""

    active: int
    variances: Tensor


class EpsilonCollapse(NamedTuple):
    """epsilons. probability (E, m) float64: how many of the data have a KL under epsilon in a coordinate. collapsed
    (E,): the fraction of coordinates where all but delta of them have."""

    epsilons: tuple[float, ...]
    probability: Tensor
    collapsed: Tensor


class RelativeFisher(NamedTuple):
    """See :func:`relative_fisher`; all are means over the data.

    divergence; lower_bound, NaN where no constant is certified; projected_residual ``E |Pi s|^2``, the other factor
    of the bound; effective_sample_size of the importance weights, between 1 and the number of samples.
    """

    divergence: float
    lower_bound: float
    projected_residual: float
    effective_sample_size: float


class InverseLipschitz(NamedTuple):
    """certified: what the construction guarantees, NaN for none. measured: the smallest singular value seen."""

    certified: float
    measured: float


def _batches(data: Data, batch_size: int) -> Iterator[Tensor]:
    batch_size = check_positive("batch_size", batch_size)
    batches = data.split(batch_size) if isinstance(data, Tensor) else data
    empty = True
    for batch in batches:
        x = batch if isinstance(batch, Tensor) else batch[0]
        if len(x):
            empty = False
            yield x
    if empty:
        raise ValueError("data: got no datum, wanted at least one")


def _ratio(total: Tensor, count: int, reduce: Reduce) -> Tensor:
    """``total / count`` on the CPU, both summed over processes."""
    sums = torch.cat([total.double().cpu().reshape(-1), torch.tensor([count], dtype=torch.float64)])
    sums = sums if reduce is None else reduce(sums).cpu()
    return (sums[:-1] / sums[-1]).reshape(total.shape)


def _mean(values: Callable[[Tensor], Tensor], data: Data, batch_size: int, reduce: Reduce) -> Tensor:
    """Mean over the data of ``values(x)`` (n, ...), in float64 on the CPU."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for x in _batches(data, batch_size):
        total = total + values(x).double().sum(0).cpu()
        count += len(x)
    return _ratio(total, count, reduce)


@torch.no_grad()
def negative_log_likelihood(
    model: Any,
    data: Data,
    num_importance_samples: int = 1000,
    *,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    reduce: Reduce = None,
) -> float:
    """``-1/N sum_x log 1/S sum_s p(x, z_s) / q(z_s|x)``, z_s ~ q(z|x): an upper bound of ``-log p(x)`` in expectation.

    The logarithm of the mean weight is taken for each datum, then the mean over the data (Burda et al., ICLR 2016,
    equation 8); the other order would not be a bound.

    Needs of the model: ``log_likelihood(x, num_importance_samples, generator)``.
    """
    return -float(_mean(lambda x: model.log_likelihood(x, num_importance_samples, generator), data, batch_size, reduce))


@torch.no_grad()
def elbo(
    model: Any,
    data: Data,
    num_samples: int = 1,
    *,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    reduce: Reduce = None,
) -> float:
    """``E_x [E_q(z|x) log p(x|z) - KL(q(z|x) || p(z))]``, a lower bound of ``E_x log p(x)``.

    ``num_samples`` z for each datum, the KL term in closed form as in :func:`kl_divergence`. The weight of the KL term
    and free bits, which training may have used, are left out.

    Needs of the model: those of :func:`kl_divergence`, ``generative(z, x)`` and ``likelihood.log_prob(x, f)``.
    """
    check_positive("num_samples", num_samples)
    return float(_mean(lambda x: _elbo(model, x, num_samples, generator), data, batch_size, reduce))


@torch.no_grad()
def gain(
    model: Any,
    data: Data,
    train: Tensor | None = None,
    num_samples: int = 1,
    *,
    baseline: float | None = None,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    reduce: Reduce = None,
) -> float:
    """Nats per datum by which the ELBO (:func:`elbo`) beats the best model that ignores its latent
    (:func:`nll_without_latent`).

    Where the gain is not positive the latent costs at least
    what it is worth. KL, mutual information and active units do not show that: a decoder too steep for the data raises
    all three, because the encoder then has to pay for telling latents apart.

    Args:
        train: as of :func:`nll_without_latent`.
        baseline: instead of it the negative log-likelihood on the data of a model that ignores its latent, in nats per
            datum; an autoregressive decoder has a gain of NaN without one.

    Needs of the model: those of :func:`elbo` and of :func:`nll_without_latent`.

    Raises:
        ValueError: neither ``train`` nor ``baseline``.
    """
    if baseline is not None:
        return baseline + elbo(model, data, num_samples, batch_size=batch_size, generator=generator, reduce=reduce)
    if train is None:
        raise ValueError("train: got None, wanted the training data, or a baseline")
    check_positive("num_samples", num_samples)
    without_latent = _without_latent(model, train)

    def values(x: Tensor) -> Tensor:
        return _elbo(model, x, num_samples, generator) - without_latent(x)

    return float(_mean(values, data, batch_size, reduce))


@torch.no_grad()
def nll_without_latent(
    model: Any, data: Data, train: Tensor, *, batch_size: int = 1024, reduce: Reduce = None
) -> float:
    """Negative log-likelihood, in nats per datum, of the best model that ignores its latent.

    It gives every datum the same f, the likeliest one for the training data, and fits the scale where the likelihood
    has one to fit (``likelihood.ignoring(train)``).

    NaN for an autoregressive decoder: it predicts a token from those before, and beats frequencies by far without any
    latent. What to compare it with has to be trained: the plain model (``svae``) of the same sizes with a ``kl_weight``
    so large (100) that its KL is 0 is an autoregressive model without a latent, and :func:`negative_log_likelihood`
    measures it.

    Args:
        train: (N, D), or (N, ...) for an adapted model; all of it in every process.

    Needs of the model: ``likelihood.ignoring(x)``.
    """
    without_latent = _without_latent(model, train)
    return -float(_mean(without_latent, data, batch_size, reduce))


def _without_latent(model: Any, train: Tensor) -> Callable[[Tensor], Tensor]:
    """``log p(x)`` (n,) of the best model that ignores its latent."""
    if hasattr(getattr(model, "decoder", None), "given"):
        return lambda x: torch.full((len(x),), math.nan, device=x.device)
    likelihood, f = model.likelihood.ignoring(train.flatten(1))
    return lambda x: likelihood.log_prob(x.flatten(1), f.to(x.device))


def _elbo(model: Any, x: Tensor, num_samples: int, generator: torch.Generator | None) -> Tensor:
    """The ELBO of each x (n, ...): (n,) float64."""
    posterior = model.inference(x)
    total = -_kl_terms(model.prior, posterior).sum(-1)
    for _ in range(num_samples):
        z, weights = posterior.sample_components(generator)
        log_prob = model.likelihood.log_prob(x.flatten(1), model.generative(z, x)).double()
        total = total + (log_prob if weights is None else (weights * log_prob).sum(0)) / num_samples
    return total


def _kl_terms(prior: Any, posterior: Any) -> Tensor:
    """The KL term of each datum: (n, m + 1) float64, of the coordinates and of the assignment."""
    parts = prior.kl(posterior).double()
    assignment = prior.assignment_kl(posterior) if hasattr(prior, "assignment_kl") else None
    rest = parts.new_zeros(len(parts)) if assignment is None else assignment.double()
    return torch.cat([parts, rest.unsqueeze(-1)], -1)


@torch.no_grad()
def kl_divergence(model: Any, data: Data, *, batch_size: int = 1024, reduce: Reduce = None) -> KLDivergence:
    """``E_x KL(q(z|x) || p(z))``, and what each latent coordinate contributes to it, in closed form.

    For a mixture prior it is the KL term of the ELBO, ``E_x [KL(q(y|x) || p(y)) + E_q(y|x) KL(q(z|x, y) || p(z|y))]``,
    an upper bound of the divergence of the marginals.

    Needs of the model: ``inference(x)`` and ``prior.kl(posterior)`` (n, m); ``prior.assignment_kl`` (n), if it has one.
    """

    def values(x: Tensor) -> Tensor:
        posterior = model.inference(x)  # before the prior, of which an adapted model learns the width by it
        return _kl_terms(model.prior, posterior)

    means = _mean(values, data, batch_size, reduce)
    return KLDivergence(float(means.sum()), means[:-1], float(means[-1]))


@torch.no_grad()
def active_units(
    model: Any, data: Data, threshold: float = 0.01, *, batch_size: int = 1024, reduce: Reduce = None
) -> ActiveUnits:
    """Latent coordinates with ``Var_x E_q(z|x)[z] >= threshold``, the (biased) variance over the data.

    Source: Burda et al., ICLR 2016, section 5.2. A rotation of the latent space, which changes nothing about the model
    but the names of its coordinates, changes their number; not that of :func:`active_directions`.

    Needs of the model: ``inference(x)`` with a ``mean`` (n, m).
    """
    variances = _covariance_of_means(model, data, batch_size, reduce).diagonal()
    return ActiveUnits(int((variances >= threshold).sum()), variances)


@torch.no_grad()
def active_directions(
    model: Any, data: Data, threshold: float = 0.01, *, batch_size: int = 1024, reduce: Reduce = None
) -> ActiveDirections:
    """Directions of the latent space along which the posterior's mean moves with x: the eigenvalues of the (biased)
    covariance over the data ``Cov_x E_q(z|x)[z]`` that are at least ``threshold``.

    The same for a rotated latent space, unlike :func:`active_units`, of which it is the invariant form: by the
    inequality of Schur and Horn the k largest eigenvalues have at least the sum of the k largest variances.

    Needs of the model: ``inference(x)`` with a ``mean`` (n, m).
    """
    covariance = _covariance_of_means(model, data, batch_size, reduce)
    if not bool(covariance.isfinite().all()):  # which the eigenvalues would refuse
        return ActiveDirections(0, torch.full_like(covariance[0], math.nan))
    variances = torch.linalg.eigvalsh(covariance).flip(0)
    return ActiveDirections(int((variances >= threshold).sum()), variances)


def _covariance_of_means(model: Any, data: Data, batch_size: int, reduce: Reduce) -> Tensor:
    """``Cov_x E_q(z|x)[z]`` (m, m), biased, in float64."""
    count, mean, square = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x in _batches(data, batch_size):
        # batches are merged as by Chan, Golub & LeVeque (1983), without cancellation
        latent = model.inference(x).mean.double().cpu()
        n, here = len(latent), latent.mean(0)
        within, between = latent - here, here - mean
        square = square + within.T @ within + between.outer(between) * (count * n / (count + n))
        mean = mean + between * (n / (count + n))
        count += n
    between = mean - _ratio(count * mean, count, reduce)
    return _ratio(square + count * between.outer(between), count, reduce)


@torch.no_grad()
def epsilon_collapse(
    model: Any,
    data: Data,
    epsilons: Sequence[float] = (0.001, 0.01, 0.1, 1.0),
    delta: float = 0.01,
    *,
    batch_size: int = 1024,
    reduce: Reduce = None,
) -> EpsilonCollapse:
    """Coordinates that are (epsilon, delta)-collapsed: ``P_x[KL(q(z_i|x) || p(z_i)) < epsilon] >= 1 - delta``.

    Source: Lucas, Tucker, Grosse & Norouzi, NeurIPS 2019.

    Needs of the model: ``inference(x)`` and ``prior.kl(posterior)`` (n, m).
    """
    if not epsilons:
        raise ValueError("epsilons: got none, wanted at least one")
    if not 0 <= delta < 1:
        raise ValueError(f"delta: got {delta!r}, wanted 0 <= delta < 1")
    bounds = torch.tensor(list(epsilons), dtype=torch.float64).unsqueeze(-1)

    def values(x: Tensor) -> Tensor:
        posterior = model.inference(x)
        return model.prior.kl(posterior).double().cpu().unsqueeze(1) < bounds

    probability = _mean(values, data, batch_size, reduce)
    collapsed = (probability >= 1 - delta).double().mean(-1)
    return EpsilonCollapse(tuple(float(e) for e in epsilons), probability, collapsed)


@torch.no_grad()
def mutual_information(
    model: Any,
    data: Data,
    num_samples: int = 1,
    *,
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
) -> float:
    """``I_q(x; z) = E_x KL(q(z|x) || q(z))``, x uniform on the data and ``q(z) = 1/N sum_x q(z|x)`` their aggregate.

    q(z) is summed over all data exactly; what is sampled is z alone, ``num_samples`` for each datum. At most log N.

    The rest of the KL term, ``E_x KL(q(z|x) || p(z)) - I_q = KL(q(z) || p(z))`` (Hoffman & Johnson, 2016), is the
    divergence of aggregate and prior: it does not depend on x, so that nothing is learnt from it. It comes out right
    only where I_q is well below log N: from about nine tenths of that on more data would have more information, and
    the difference is an upper bound of the divergence. So it is for a mixture, whose KL term is that of z and y.

    The posteriors of all data are held, and N^2 ``num_samples`` densities computed: give a part of
    large data.

    Needs of the model: ``inference(x)``, a tuple of tensors (n, ...) with ``sample`` and ``log_prob``.
    """
    num_samples = check_positive("num_samples", num_samples)
    parts = [model.inference(x) for x in _batches(data, batch_size)]
    posterior = type(parts[0])(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    count, total = len(posterior.mean), 0.0
    densities = max(tensor[0].numel() for tensor in posterior)  # numbers of one datum's q(z|x) at a z
    for _ in range(num_samples):
        z = posterior.sample(generator=generator)
        # at z as it was rounded, as the aggregate is, of which it then is a term: their ratio is at most N
        total += posterior.log_prob(z).double().sum().item()
        for part in z.split(max(1, _PAIRS // (count * densities))):
            aggregate = posterior.log_prob(part.unsqueeze(1)).logsumexp(1) - math.log(count)
            total -= aggregate.double().sum().item()
    return total / (count * num_samples)


def diagnose(measures: Mapping[str, Any]) -> list[str]:
    """What the measures of a model say is wrong with it, each in a sentence or two with the cure; empty if nothing is.

    Two things: the KL term exceeds 0.5 nats and less than a tenth of it is mutual information, which is not near the
    most that so many data can have; or the gain is not positive. KL and active units alone look best in both cases.

    Args:
        measures: as :func:`ilvae_fast.training.evaluate` returns them: elbo_kl, mutual_information,
            mutual_information_limit (log N), gain, certified. What is missing, None or NaN is not judged.
    """

    def number(name: str) -> float:
        value = measures.get(name)
        return math.nan if value is None else float(value)

    kl, information, gained, constant = map(number, ("elbo_kl", "mutual_information", "gain", "certified"))
    advice = "`ilvae-fast advise` says which L suits the data"
    smaller = f"a smaller L than {constant:.3g} ({advice}), " if constant > 0 else ""
    larger = f"a larger L than {constant:.3g}" if constant > 0 else "a decoder with L > 0, such as il-lidvae"
    found = []
    saturated = information >= _SATURATED * number("mutual_information_limit")
    if kl > 0.5 and information < kl / 10 and not saturated:
        found.append(
            f"The latent costs {kl:.3g} nats (KL), but only {max(information, 0.0):.2g} of them are information about "
            f"the data (MI): the encoder pays for a posterior that hardly moves with x. Try {smaller}fewer latents, "
            "another sigma of a Gaussian likelihood, or longer training."
        )
    if gained <= 0:
        # a latent that is not used costs nothing, unless the decoder moves the data with it all the same
        costly = kl > 0.5 or gained < -0.5
        cure = (
            f"and its latent costs more than it explains. Try {smaller}fewer latents, a larger"
            if costly
            else f"and hardly uses it (posterior collapse). Try {larger} ({advice}), a smaller"
        )
        found.append(
            f"The model explains the data no better than one that ignores its latent (gain {gained:.3g}, KL {kl:.2g} "
            f"nats), {cure} sigma of a Gaussian likelihood, or longer training."
        )
    return found


def clustering_accuracy(clusters: Tensor, labels: Tensor) -> float:
    """The largest fraction of data whose cluster stands for their label, over all one-to-one assignments of the two.

    Args:
        clusters, labels: (N,) integers from 0, of any number of clusters and classes. Of a mixture, the cluster of x is
            ``model.inference(x).logits.argmax(-1)``.

    The assignment is found by the Hungarian method (Kuhn, 1955), as is usual since Yang et al. (2010).

    Raises:
        ValueError: shapes that differ, no datum, or negative numbers.
        ImportError: SciPy is not installed; says how to install it.
    """
    if clusters.shape != labels.shape or clusters.dim() != 1:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, wanted that of clusters, {tuple(clusters.shape)}")
    if len(labels) == 0:
        raise ValueError("labels: got no datum, wanted at least one")
    for name, values in (("clusters", clusters), ("labels", labels)):
        if int(values.min()) < 0:
            raise ValueError(f"{name}: got {int(values.min())}, wanted numbers >= 0")
    classes = int(labels.max()) + 1
    shape = (int(clusters.max()) + 1, classes)
    table = torch.bincount(clusters.cpu() * classes + labels.cpu(), minlength=shape[0] * classes).reshape(shape)
    optimize = require("scipy.optimize", "train")
    rows, columns = optimize.linear_sum_assignment(table.numpy(), maximize=True)
    return int(table[rows, columns].sum()) / len(labels)


@torch.no_grad()
def relative_fisher(
    model: Any,
    data: Data,
    num_samples: int = 128,
    *,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
    reduce: Reduce = None,
) -> RelativeFisher:
    r"""Relative Fisher information divergence of the true posterior from the prior, and its lower bound.

    ``E_x E_{p(z|x)} | grad_z log p(z|x) - grad_z log p(z) |^2`` (Kinoshita et al., ICML 2023, section 3). The
    difference is ``grad_z log p(x|z) = J_f(z)^T s`` with the likelihood's score ``s = d log p(x|z) / d f``. For a
    decoder that is L-inverse Lipschitz no singular value of J_f is below L, so the divergence is at least

        ``L^2 E |Pi s|^2``,   Pi(z): the projection on the range of J_f(z)

    where s is ``t(x) - grad Lambda(f)`` for an exponential family with natural parameter f, and ``(x - f) / sigma^2``,
    hence the bound ``L^2 / sigma^4 E |Pi (x - f)|^2``, for a Gaussian of fixed variance with mean f.  Without Pi it
    holds only where D = m. The factor ``E |Pi s|^2`` is reported too: it varies with L, so that the bound need not
    grow with L^2. L is the certified constant.

    The true posterior is sampled by self-normalised importance weights from q(z|x), the same for divergence and bound,
    which therefore are ordered sample by sample, not in expectation alone. A mean effective sample size ``1 / sum w^2``
    (Kong, 1992) near 1 says that the estimates are not to be trusted.

    For an autoregressive decoder f(z) are the logits of all tokens of x, stacked: bounds of single tokens do not add.

    Needs of the model: ``importance_sample(x, num_samples, generator)``, ``likelihood.score(x, f)`` and ``decoder``
    as in :func:`decoder_jacobian`. ``batch_size * num_samples`` Jacobians (D, m) are held at a time.
    """
    num_samples = check_positive("num_samples", num_samples)
    total, count, constant = torch.zeros(3, dtype=torch.float64), 0, math.nan
    for x in _batches(data, batch_size):
        samples = model.importance_sample(x, num_samples, generator)
        weights = samples.log_weights.softmax(0)
        decoder = decoder_given(model.decoder, x)
        jacobian = _at_least_float32(decoder_jacobian(decoder, samples.z))
        score = model.likelihood.score(x.flatten(1), samples.f).unsqueeze(-1).to(jacobian.dtype)
        gradient = (jacobian.mT @ score).square().sum((-2, -1))
        residual = (torch.linalg.qr(jacobian).Q.mT @ score).square().sum((-2, -1))
        sums = [(weights * gradient).sum(0), (weights * residual).sum(0), 1 / weights.square().sum(0)]
        total = total + torch.stack(sums).double().sum(-1).cpu()
        constant = certified_constant(decoder)
        count += len(x)
    divergence, projected, effective = _ratio(total, count, reduce).tolist()
    return RelativeFisher(divergence, constant**2 * projected, projected, effective)


@torch.no_grad()
def inverse_lipschitz(decoder: Any, z: Tensor, *, batch_size: int = 1024) -> InverseLipschitz:
    """The smallest singular value of the decoder's Jacobian over latents z (N, m), beside the certified constant.

    For a differentiable decoder the best inverse-Lipschitz constant is at most the infimum of that
    singular value, so what is measured on samples lies above the true constant, and above any certified one.

    Args:
        decoder: as in :func:`decoder_jacobian`; of an autoregressive one, ``decoder.given(x)`` for one sequence x (T,).
        z: latents where to look, such as samples of the prior or of posteriors.
    """
    measured = math.inf
    for part in _batches(z, batch_size):
        jacobian = _at_least_float32(decoder_jacobian(decoder, part))
        if jacobian.shape[-2] < jacobian.shape[-1]:
            measured = 0.0  # m > D: some direction is lost
            break
        measured = min(measured, torch.linalg.svdvals(jacobian).min().item())
    return InverseLipschitz(certified_constant(decoder), measured)


def certified_constant(decoder: Any) -> float:
    """The inverse-Lipschitz constant that ``decoder.inverse_lipschitz_bound()`` guarantees; NaN without that method."""
    bound = getattr(decoder, "inverse_lipschitz_bound", None)
    return math.nan if bound is None else float(bound())


def decoder_given(decoder: Any, x: Tensor) -> Any:
    """The decoder as a function of z alone: ``decoder.given(x)`` if it reads x (..., T) too, else itself."""
    return decoder.given(x) if hasattr(decoder, "given") else decoder


def decoder_jacobian(decoder: Any, z: Tensor) -> Tensor:
    """``d decoder / dz`` at z (..., m): (..., D, m), by the decoder's own ``jacobian(z)`` if it has one.

    Any other decoder is differentiated in forward mode, each latent by itself (:func:`torch.func.jacfwd`).
    """
    if hasattr(decoder, "jacobian"):
        return decoder.jacobian(z)
    flat = torch.func.vmap(torch.func.jacfwd(lambda one: decoder(one).flatten()))(z.reshape(-1, z.shape[-1]))
    return flat.reshape(*z.shape[:-1], *flat.shape[-2:])


def _at_least_float32(t: Tensor) -> Tensor:
    """For the factorisations, which LAPACK has in no fewer bits."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
