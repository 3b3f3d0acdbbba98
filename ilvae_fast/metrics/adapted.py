"""Models from elsewhere, as the metrics want them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..distributions import DiagonalGaussian, Likelihood, Posterior, Prior, StandardNormal, as_likelihood
from ..vae.model import ImportanceWeighted


def adapt(
    *,
    encoder: Callable[[Tensor], Any],
    decoder: Callable[[Tensor], Any],
    likelihood: str | Likelihood,
    prior: str | Prior | None = None,
) -> AdaptedModel:
    """A model of your own, by its parts, on which all of :mod:`ilvae_fast.metrics` works.

        model = il.metrics.adapt(encoder=mine.encode, decoder=mine.decode, likelihood=il.vae.Gaussian(0.5))
        print(il.metrics.gain(model, images, train_images))

    Put your modules into evaluation mode first: dropout and batch statistics would be measured too.

    Args:
        encoder: x (n, ...) -> q(z|x), x as you give it to the metrics, images (n, C, H, W) for example. Returns mean
            and logarithm of the variance, each (n, m), as the first two of a tuple, as one tensor (n, 2 m), or by the
            names ``embedding`` and ``log_covariance`` (pythae); a posterior of :mod:`ilvae_fast.vae`; with a ``prior``
            that has another posterior a tensor of its parameters.
        decoder: z (N, m) -> (N, ...), flattened to f(z) (N, P), or an object with that as ``reconstruction`` (pythae).
            It is what the likelihood takes: for Bernoulli logits (of probabilities ``p.logit()``), for counts the
            logarithm of the mean. Its ``jacobian(z)`` and ``inverse_lipschitz_bound()`` are used if it has them. One
            that reads x too, such as of sequences, has ``given(x)``, a function of z (*S, n, m) -> (*S, n, P).
        likelihood: a key of ``LIKELIHOODS``, or the object, where it has options.
        prior: None or ``"standard_normal"``; or the object.

    Raises:
        ValueError, TypeError: naming the argument, also later for what encoder and decoder return.
    """
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        if not callable(part):
            raise TypeError(f"{name}: got {type(part).__name__}, wanted something to call")
    likelihood = as_likelihood(likelihood)
    if isinstance(prior, str) and prior != "standard_normal":
        raise ValueError(f"prior: got {prior!r}, wanted 'standard_normal', or the object, which holds what it learnt")
    if not isinstance(prior, str | Prior | None):
        raise TypeError(f"prior: got {type(prior).__name__}, wanted None, a name or a Prior")
    return AdaptedModel(encoder, decoder, likelihood, prior if isinstance(prior, Prior) else None)


class AdaptedModel(ImportanceWeighted):
    """What :func:`adapt` returns: x (n, ...), z (*S, n, m), f (*S, n, P)."""

    def __init__(
        self,
        encoder: Callable[[Tensor], Any],
        decoder: Callable[[Tensor], Any],
        likelihood: Likelihood,
        prior: Prior | None,
    ) -> None:
        super().__init__()
        self.encoder, self.likelihood = encoder, likelihood
        self.decoder: Any = decoder if hasattr(decoder, "given") else _FlatDecoder(decoder)
        self._prior = prior

    @property
    def prior(self) -> Prior:  # type: ignore[override]
        """Of p(z). Without one given it is standard normal, as wide as the latent that the encoder returned first."""
        if self._prior is None:
            raise ValueError("prior: got none before the encoder told the width of the latent, wanted it after")
        return self._prior

    def inference(self, x: Tensor) -> Posterior:
        posterior = self._posterior(self.encoder(x))
        if self._prior is None:
            self._prior = StandardNormal(posterior.mean.shape[-1])
        if posterior.mean.dim() != 2 or len(posterior.mean) != len(x):
            raise ValueError(
                f"encoder: got a mean of shape {tuple(posterior.mean.shape)}, wanted (n, m) for {len(x)} data"
            )
        return posterior

    def _posterior(self, encoded: Any) -> Posterior:
        if isinstance(encoded, Posterior):
            return encoded
        if isinstance(encoded, Tensor) and self._prior is not None:
            return self._prior.posterior(encoded)
        if isinstance(encoded, Tensor):
            mean, log_variance = encoded.tensor_split(2, -1)
        elif isinstance(encoded, tuple | list) and len(encoded) >= 2:
            mean, log_variance = encoded[:2]
        elif hasattr(encoded, "embedding") and hasattr(encoded, "log_covariance"):
            mean, log_variance = encoded.embedding, encoded.log_covariance
        else:
            raise TypeError(
                f"encoder: got {type(encoded).__name__}, wanted (mean, log_variance), one tensor of both, or an object "
                "with embedding and log_covariance"
            )
        if not isinstance(mean, Tensor) or not isinstance(log_variance, Tensor) or mean.shape != log_variance.shape:
            shapes = " and ".join(str(tuple(getattr(part, "shape", ()))) for part in (mean, log_variance))
            raise ValueError(f"encoder: got mean and log_variance of shapes {shapes}, wanted (n, m) twice")
        return DiagonalGaussian(mean, log_variance)

    def generative(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        if not hasattr(self.decoder, "given"):
            return self.decoder(z)
        if x is None:
            raise ValueError("x: got None, wanted the data that this decoder reads")
        return self.decoder.given(x)(z)

    def _flat(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class _FlatDecoder:
    """A decoder z (N, m) -> (N, ...) as a function (..., m) -> (..., P), with what else it has for the metrics."""

    def __init__(self, decoder: Callable[[Tensor], Any]) -> None:
        self.decoder = decoder
        if hasattr(decoder, "inverse_lipschitz_bound"):
            self.inverse_lipschitz_bound = decoder.inverse_lipschitz_bound
        if hasattr(decoder, "cotangent_bound"):
            self.cotangent_bound = decoder.cotangent_bound
        if hasattr(decoder, "jacobian"):
            self.jacobian = self._jacobian

    def __call__(self, z: Tensor) -> Tensor:
        rows = z.reshape(-1, z.shape[-1])
        decoded = self.decoder(rows)
        f = getattr(decoded, "reconstruction", decoded)
        if not isinstance(f, Tensor) or f.dim() < 2 or len(f) != len(rows):
            got = f"shape {tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
            raise ValueError(f"decoder: got {got}, wanted a tensor (N, ...) for {len(rows)} latents")
        return f.reshape(*z.shape[:-1], -1)

    def _jacobian(self, z: Tensor) -> Tensor:
        decoder: Any = self.decoder
        return decoder.jacobian(z).reshape(*z.shape[:-1], -1, z.shape[-1])
