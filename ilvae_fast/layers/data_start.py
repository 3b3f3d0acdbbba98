"""The start of a decoder from data (:meth:`ilvae_fast.BrenierDecoder.initialize`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..distributions import Categorical, Likelihood, as_likelihood
from .initialization import fixed_normal

_ROWS = 10000  # of the data to look at
_LATENTS = 1024  # samples of the prior for the mean of the decoder
_ITERATIONS = 12  # of the subspace, and of the shift, which for the identity as output activation takes one
_SPARE = 8  # directions to follow besides those wanted


@torch.no_grad()
def start_from_data_(
    decoder: Callable[[Tensor], Tensor],
    embedding: Tensor | None,
    skip_weight: Tensor,
    latent_dim: int,
    x: Tensor,
    likelihood: str | Likelihood,
) -> None:
    """Set B and the output's skip row of T2 in place.

    Args:
        decoder: z (N, m) -> (N, ...), D values in all.
        embedding: B (D, m), of which it is made, or None.
        skip_weight: (S+1, D) of T2. The last row is the output's.
        latent_dim: m.
        x, likelihood: as in :meth:`ilvae_fast.BrenierDecoder.initialize`.
    """
    likelihood, weight = as_likelihood(likelihood), skip_weight
    if weight.is_meta:
        raise ValueError(
            "decoder: got parameters on the meta device, wanted them where they have values; to_empty moves them"
        )
    x = _rows(x, likelihood, weight.shape[1]).to(weight.device)
    wanted = likelihood.marginal(x)
    if embedding is not None:
        scores = likelihood.score(x, wanted.to(x.dtype if x.is_floating_point() else torch.float32)).float()
        embedding.copy_(_principal_directions(scores, latent_dim))
    z = fixed_normal(_LATENTS, latent_dim).to(weight)

    def gap() -> Tensor:
        return wanted.to(weight.dtype) - decoder(z).flatten(1).mean(0)

    response, missing = torch.ones_like(weight[-1]), gap()
    for _ in range(_ITERATIONS):
        if float(missing.abs().max()) <= 1e-3 * (1 + float(wanted.abs().max())):
            break
        weight[-1] += missing / response
        left = gap()
        response = (response * (1 - left / missing.where(missing != 0, 1.0))).clamp(min=0.1)
        missing = left


def _rows(x: Tensor, likelihood: Likelihood, data_dim: int) -> Tensor:
    """Return the data to look at, (n, values)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, wanted a tensor (N, ...); torch.as_tensor makes one")
    if x.dim() < 2 or len(x) == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted at least one datum, (N, ...)")
    if isinstance(likelihood, Categorical) and data_dim == likelihood.parameters_per_value:
        x = x[x >= 0].unsqueeze(-1)  # the head of an autoregressive decoder is that of one token
    x = x.flatten(1)
    outputs = x.shape[1] * likelihood.parameters_per_value
    if outputs != data_dim:
        raise ValueError(
            f"x: got {x.shape[1]} values in a datum, which take {outputs} outputs, wanted data for the decoder's "
            f"data_dim, {data_dim}"
        )
    x = x[:: -(-len(x) // _ROWS)]
    likelihood.check(x)
    return x


def _principal_directions(y: Tensor, count: int) -> Tensor:
    """Return orthonormal columns (P, count) along which the rows of y (n, P) vary most, by subspace iteration.

    Columns beyond the rank of y are arbitrary.
    """
    y = y - y.mean(0)
    width = y.shape[1]
    guess = fixed_normal(2 * width, min(width, count + _SPARE))[:width].to(y)
    basis = torch.linalg.qr(guess).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(y.T @ (y @ basis) + 1e-6 * basis).Q
    left = torch.linalg.svd((y @ basis).T @ (y @ basis)).U
    return (basis @ left)[:, :count]
