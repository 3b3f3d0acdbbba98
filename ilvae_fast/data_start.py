"""The start of a decoder from data (:meth:`ilvae_fast.BrenierDecoder.initialize`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .initialization import fixed_normal
from .vae.likelihoods import Categorical, Likelihood, as_likelihood

if TYPE_CHECKING:
    from .decoder import BrenierDecoder

_ROWS = 10000  # data looked at
_LATENTS = 1024  # samples of the prior for the mean of the decoder
_ITERATIONS = 12  # of the subspace, and of the shift, which for the identity as output activation takes one
_SPARE = 8  # directions that are followed besides those wanted


@torch.no_grad()
def start_from_data_(decoder: BrenierDecoder, x: Tensor, likelihood: str | Likelihood) -> None:
    """Set B and the output's skip row of T2 in place."""
    likelihood = as_likelihood(likelihood)
    weight = decoder.data_map.skip_weight
    if weight.is_meta:
        raise ValueError("decoder: its parameters are on the meta device, wanted them where they have values: to_empty")
    x = _rows(decoder, x, likelihood).to(weight.device)
    wanted = likelihood.marginal(x)
    if decoder.raw_embedding is not None:
        scores = likelihood.score(x, wanted.to(x.dtype if x.is_floating_point() else torch.float32)).float()
        decoder.raw_embedding.copy_(_principal_directions(scores, decoder.latent_dim))
    z = fixed_normal(_LATENTS, decoder.latent_dim).to(weight)

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


def _rows(decoder: BrenierDecoder, x: Tensor, likelihood: Likelihood) -> Tensor:
    """The data to look at, (n, values)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, wanted a tensor (N, ...); torch.as_tensor makes one")
    if x.dim() < 2 or len(x) == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted at least one datum, (N, ...)")
    if isinstance(likelihood, Categorical) and decoder.data_dim == likelihood.parameters_per_value:
        x = x[x >= 0].unsqueeze(-1)  # the head of an autoregressive decoder is that of one token
    x = x.flatten(1)
    outputs = x.shape[1] * likelihood.parameters_per_value
    if outputs != decoder.data_dim:
        raise ValueError(
            f"x: got {x.shape[1]} values in a datum, which take {outputs} outputs, wanted data for the decoder's "
            f"data_dim, {decoder.data_dim}"
        )
    x = x[:: -(-len(x) // _ROWS)]
    likelihood.check(x)
    return x


def _principal_directions(y: Tensor, count: int) -> Tensor:
    """Orthonormal columns (P, count) along which the rows of y (n, P) vary most, by subspace iteration; what exceeds
    the rank of y is arbitrary."""
    y = y - y.mean(0)
    width = y.shape[1]
    guess = fixed_normal(2 * width, min(width, count + _SPARE))[:width].to(y)
    basis = torch.linalg.qr(guess).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(y.T @ (y @ basis) + 1e-6 * basis).Q
    left = torch.linalg.svd((y @ basis).T @ (y @ basis)).U
    return (basis @ left)[:, :count]
