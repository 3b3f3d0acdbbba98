"""The metrics of a linear Gaussian VAE beside their closed forms, as a table.

    python examples/closed_forms.py [--output results/metrics]

Its prior, likelihood, posterior and evidence are Gaussian, so that likelihood, KL, mutual information and relative
Fisher divergence are known. Written to --output: closed_forms.json and closed_forms.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from ilvae_fast import metrics
from ilvae_fast._support.files import write_atomically
from ilvae_fast.vae import VAE, DiagonalGaussian, VAEConfig

DTYPE = torch.float64
SIGMA = 0.8


class LinearDecoder(nn.Module):
    """``f(z) = W z + b``, with what the metrics ask of a decoder."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.weight.T + self.bias

    def jacobian(self, z: Tensor) -> Tensor:
        return self.weight.expand(*z.shape[:-1], *self.weight.shape)

    def inverse_lipschitz_bound(self) -> Tensor:
        return torch.linalg.svdvals(self.weight.detach()).min()


class LinearEncoder(nn.Module):
    """``q(z|x) = N(A (x - b), diag exp(log_variance))``."""

    def __init__(self, weight: Tensor, shift: Tensor, log_variance: Tensor) -> None:
        super().__init__()
        self.weight, self.shift, self.log_variance = weight, shift, log_variance

    def forward(self, x: Tensor) -> DiagonalGaussian:
        mean = (x - self.shift) @ self.weight.T
        return DiagonalGaussian(mean, self.log_variance.expand_as(mean))


class Linear:
    """A linear Gaussian VAE and all that is known of it.

    Its posterior is N(mu, S) with S = (I + W^T W / sigma^2)^-1 and mu = S W^T (x - b) / sigma^2. With ``orthogonal``
    columns S is diagonal and q(z|x) is the posterior exactly; else q(z|x) has its mean and variances alone.
    """

    def __init__(self, latent_dim: int, data_dim: int, orthogonal: bool = False, num_data: int = 40) -> None:
        generator = torch.Generator().manual_seed(3)
        self.w = torch.randn(data_dim, latent_dim, dtype=DTYPE, generator=generator)
        if orthogonal:
            self.w = torch.linalg.qr(self.w).Q * torch.linspace(0.6, 1.5, latent_dim, dtype=DTYPE)
        self.b = torch.randn(data_dim, dtype=DTYPE, generator=generator)
        noise = torch.randn(num_data, data_dim, dtype=DTYPE, generator=generator)
        self.marginal = self.w @ self.w.T + SIGMA**2 * torch.eye(data_dim, dtype=DTYPE)
        self.x = noise @ torch.linalg.cholesky(self.marginal).T + self.b  # data of the model itself
        eye = torch.eye(latent_dim, dtype=DTYPE)
        self.covariance = torch.linalg.inv(eye + self.w.T @ self.w / SIGMA**2)
        gain = self.covariance @ self.w.T / SIGMA**2
        self.mean = (self.x - self.b) @ gain.T

        config = VAEConfig(data_dim, latent_dim, decoder="mlp", likelihood_options={"scale": SIGMA})
        self.model = VAE(config)
        self.model.decoder = LinearDecoder(self.w, self.b)
        self.model.encoder = LinearEncoder(gain, self.b, self.covariance.diagonal().log())

    def nll(self) -> float:
        """``-log p(x)``, p(x) = N(b, W W^T + sigma^2 I), averaged over the data."""
        return -MultivariateNormal(self.b, self.marginal).log_prob(self.x).mean().item()

    def kl(self) -> float:
        """``KL(q(z|x) || p(z))`` averaged over the data."""
        variance = self.covariance.diagonal()
        return 0.5 * (self.mean.square().mean(0) + variance - 1 - variance.log()).sum().item()

    def elbo(self) -> float:
        """``E_q(z|x) log p(x|z) - KL``, averaged over the data."""
        spread = (self.w.square().sum(0) * self.covariance.diagonal()).sum()
        square = (self.x - self.b - self.mean @ self.w.T).square().sum(-1).mean() + spread
        return -self._nll_of_error(square.item()) - self.kl()

    def gain(self) -> float:
        """The ELBO less ``log N(x; mean of the data, sigma^2 I)``, averaged over the data."""
        return self.elbo() + self._nll_of_error(self.x.var(0, correction=0).sum().item())

    def _nll_of_error(self, square: float) -> float:
        """Of a Gaussian with standard deviation sigma, where the squared error is ``square``."""
        return 0.5 * square / SIGMA**2 + self.x.shape[1] * math.log(SIGMA * math.sqrt(2 * math.pi))

    def direction_variances(self) -> Tensor:
        """Eigenvalues of the covariance of the posterior's mean over the data, the largest first."""
        return torch.linalg.svdvals(self.mean - self.mean.mean(0)).square() / len(self.mean)

    def mutual_information(self) -> float:
        """``I_q(x; z)`` for x ~ p(x): q(z) is N(0, C + diag S) then, with C the covariance of the posterior's mean."""
        eye = torch.eye(len(self.covariance), dtype=DTYPE)
        within = self.covariance.diagonal().diag()
        # S W^T / sigma^2 (W W^T + sigma^2 I) W S / sigma^2 = I - S
        return 0.5 * (torch.logdet(eye - self.covariance + within) - torch.logdet(within)).item()

    def residual(self, projection: Tensor) -> float:
        """``E |P (x - f(z))|^2 / sigma^4`` under the true posterior."""
        at_mean = (self.x - self.b - self.mean @ self.w.T) @ projection.T
        spread = projection @ self.w @ self.covariance @ self.w.T @ projection.T
        return (at_mean.square().sum(-1).mean() + spread.trace()).item() / SIGMA**4


class Row(NamedTuple):
    """One line of the table; error: ``estimate / exact - 1``."""

    metric: str
    latent_dim: int
    data_dim: int
    settings: str
    estimate: float
    exact: float
    error: float


def table() -> Iterator[Row]:
    """All metrics that have a closed form, for three shapes of model."""
    for latent_dim, data_dim in ((1, 1), (2, 5), (5, 20)):
        linear = Linear(latent_dim, data_dim, num_data=2000)
        model, x = linear.model, linear.x

        def row(
            metric: str, settings: str, estimate: float, exact: float, m: int = latent_dim, d: int = data_dim
        ) -> Row:
            return Row(metric, m, d, settings, estimate, exact, estimate / exact - 1)

        def generator() -> torch.Generator:
            return torch.Generator().manual_seed(0)

        for samples in (10, 1000):
            nll = metrics.negative_log_likelihood(model, x, samples, generator=generator())
            yield row("negative log-likelihood", f"{samples} importance samples", nll, linear.nll())
        yield row("ELBO", "100 samples", metrics.elbo(model, x, 100, generator=generator()), linear.elbo())
        gain = metrics.gain(model, x, x, 100, generator=generator())
        yield row("gain over ignoring z", "100 samples", gain, linear.gain())
        yield row("KL divergence", "", metrics.kl_divergence(model, x).total, linear.kl())
        information = metrics.mutual_information(model, x, 4, generator=generator())
        yield row(
            "mutual information",
            f"4 samples, at most log N = {math.log(len(x)):.2f}",
            information,
            linear.mutual_information(),
        )
        variances = metrics.active_units(model, x).variances
        yield row(
            "variance of the posterior's mean",
            "",
            float(variances.sum()),
            float(linear.mean.var(0, correction=0).sum()),
        )
        largest = metrics.active_directions(model, x).variances[0].item()
        yield row("variance along the first direction", "", largest, linear.direction_variances()[0].item())
        fisher = metrics.relative_fisher(model, x, 200, generator=generator())
        effective = f"200 samples, {fisher.effective_sample_size:.0f} effective"
        yield row("relative Fisher divergence", effective, fisher.divergence, linear.residual(linear.w.T))
        smallest = float(torch.linalg.svdvals(linear.w).min())
        bound = smallest**2 * linear.residual(linear.w @ torch.linalg.pinv(linear.w))
        yield row("its lower bound", effective, fisher.lower_bound, bound)
        constant = metrics.inverse_lipschitz(model.decoder, linear.mean)
        yield row("inverse-Lipschitz constant", "", constant.measured, smallest)


def _cells(row: Row) -> list[str]:
    numbers = [f"{row.estimate:.5f}", f"{row.exact:.5f}", f"{row.error:+.0e}"]
    return [row.metric, str(row.latent_dim), str(row.data_dim), row.settings, *numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("results/metrics"), help="folder to write to")
    output = parser.parse_args().output
    rows = list(table())
    lines = [
        "| metric | m | D | settings | estimate | closed form | relative error |",
        "|---|---|---|---|---|---|---|",
        *("| " + " | ".join(_cells(r)) + " |" for r in rows),
    ]
    write_atomically(output / "closed_forms.md", "\n".join(lines) + "\n")
    record = {"command": "python examples/closed_forms.py", "sigma": SIGMA, "rows": [r._asdict() for r in rows]}
    write_atomically(output / "closed_forms.json", json.dumps(record, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
