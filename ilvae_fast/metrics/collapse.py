"""How much of its latent a model uses: posterior collapse, and information about the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._support.checks import check_positive
from .._support.devices import with_float64
from .batches import Data, Reduce, batches, mean, ratio

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


def kl_terms(prior: Any, posterior: Any) -> Tensor:
    """The KL term of each datum: (n, m + 1) float64, of the coordinates and of the assignment."""
    parts = with_float64(prior.kl(posterior)).double()
    assignment = prior.assignment_kl(posterior) if hasattr(prior, "assignment_kl") else None
    rest = parts.new_zeros(len(parts)) if assignment is None else assignment.to(parts)
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
        return kl_terms(model.prior, posterior)

    means = mean(values, data, batch_size, reduce)
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
    for x in batches(data, batch_size):
        # batches are merged as by Chan, Golub & LeVeque (1983), without cancellation
        latent = model.inference(x).mean.cpu().double()
        n, here = len(latent), latent.mean(0)
        within, between = latent - here, here - mean
        square = square + within.T @ within + between.outer(between) * (count * n / (count + n))
        mean = mean + between * (n / (count + n))
        count += n
    between = mean - ratio(count * mean, count, reduce)
    return ratio(square + count * between.outer(between), count, reduce)


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
        return model.prior.kl(posterior).cpu().double().unsqueeze(1) < bounds

    probability = mean(values, data, batch_size, reduce)
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
    parts = [model.inference(x) for x in batches(data, batch_size)]
    posterior = type(parts[0])(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    count, total = len(posterior.mean), 0.0
    densities = max(tensor[0].numel() for tensor in posterior)  # numbers of one datum's q(z|x) at a z
    for _ in range(num_samples):
        z = posterior.sample(generator=generator)
        # at z as it was rounded, as the aggregate is, of which it then is a term: their ratio is at most N
        total += with_float64(posterior.log_prob(z)).double().sum().item()
        for part in z.split(max(1, _PAIRS // (count * densities))):
            aggregate = posterior.log_prob(part.unsqueeze(1)).logsumexp(1) - math.log(count)
            total -= with_float64(aggregate).double().sum().item()
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
