"""Data drawn from known distributions, always the same for the same options."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._support.checks import check_number, check_positive
from .dataset import Dataset, on_cpu, split


@on_cpu
def toy(*, sigma: float = 1.0, num_train: int = 2000, num_test: int = 2000, seed: int = 0) -> Dataset:
    """Two Gaussians in the plane, at (0, 0) and (10, 10), with standard deviation ``sigma``, equally likely.

    The best classifier has the accuracy ``Phi(|mu1 - mu2| / (2 sigma))``, ``|mu1 - mu2| = 10 sqrt(2)``. Source:
    Kinoshita et al., ICML 2023.

    Raises:
        ValueError, TypeError: naming the option.
    """
    check_number("sigma", sigma, above=True)
    check_number("seed", seed, whole=True)
    count = check_positive("num_train", num_train) + check_positive("num_test", num_test)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    x = 10.0 * labels.unsqueeze(-1) + sigma * torch.randn(count, 2, generator=generator)
    return Dataset(x[:num_train], x[num_train:], labels[:num_train], labels[num_train:], (2,))


@on_cpu
def pinwheel(*, num_classes: int = 5, num_per_class: int = 1000, seed: int = 0) -> Dataset:
    """Arms of a pinwheel in the plane: Gaussians, stretched outwards and then sheared into spirals.

    A fifth is the test part. Source: Johnson, Duvenaud, Wiltschko, Datta & Adams, NeurIPS 2016, with their numbers:
    radial and tangential standard deviation 0.3 and 0.05, rate 0.25.

    Raises:
        ValueError, TypeError: naming the option.
    """
    check_positive("num_classes", num_classes)
    check_positive("num_per_class", num_per_class)
    check_number("seed", seed, whole=True)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat_interleave(num_per_class)
    features = torch.randn(len(labels), 2, generator=generator) * torch.tensor([0.3, 0.05]) + torch.tensor([1.0, 0.0])
    angle = 2 * math.pi / num_classes * labels + 0.25 * features[:, 0].exp()
    cos, sin = angle.cos(), angle.sin()
    rotated = [features[:, 0] * cos + features[:, 1] * sin, features[:, 1] * cos - features[:, 0] * sin]
    return Dataset(*split(10 * torch.stack(rotated, -1), labels, 0.2), (2,))


@on_cpu
def synthetic_text(
    *, num_sentences: int = 20000, length: int = 10, vocabulary_size: int = 1000, hidden: int = 100, seed: int = 0
) -> Dataset:
    """Sentences of a one-layer LSTM that reads a latent of two dimensions; a tenth is the test part.

    z is drawn from four unit Gaussians at (+-2, +-2), whose numbers are the labels; c_0 = W z, h_0 = tanh(c_0); the
    first token is uniform, each further one is drawn from softmax(W_1 h + W_2 z) with the input [embedding; z]. All
    parameters are U(-1, 1), those of W_2 U(-5, 5).

    Source: He, Spokoyny, Neubig & Berg-Kirkpatrick, ICLR 2019 (vae-lagging-encoder); their numbers are the defaults.

    Raises:
        ValueError, TypeError: naming the option.
    """
    sizes = {"num_sentences": num_sentences, "length": length, "vocabulary_size": vocabulary_size, "hidden": hidden}
    for name, size in sizes.items():
        check_positive(name, size)
    check_number("seed", seed, whole=True)
    generator = torch.Generator().manual_seed(seed)

    def uniform(bound: float, *shape: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator) - 1) * bound

    embedding = uniform(1, vocabulary_size, hidden)
    cell = [uniform(1, 4 * hidden, width) for width in (hidden + 2, hidden)]
    biases = [uniform(1, 4 * hidden) for _ in range(2)]
    to_cell, from_hidden = uniform(1, 2, hidden), uniform(1, hidden, vocabulary_size)
    from_latent = uniform(5, 2, vocabulary_size)

    labels = torch.randint(4, (num_sentences,), generator=generator)
    centres = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
    z = centres[labels] + torch.randn(num_sentences, 2, generator=generator)
    c = z @ to_cell
    h = c.tanh()
    tokens = [torch.randint(vocabulary_size, (num_sentences,), generator=generator)]
    while len(tokens) < length:
        h, c = torch.lstm_cell(torch.cat([embedding[tokens[-1]], z], -1), (h, c), *cell, *biases)
        cumulated = (h @ from_hidden + z @ from_latent).softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(cumulated, torch.rand(num_sentences, 1, generator=generator))
        tokens.append(drawn.squeeze(-1).clamp(max=vocabulary_size - 1))
    return Dataset(*split(torch.stack(tokens, -1), labels, 0.1), (length,), vocabulary_size)
