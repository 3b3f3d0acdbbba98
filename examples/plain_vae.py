"""A VAE on images in plain PyTorch, with an inverse-Lipschitz decoder in the place of its MLP.

    python examples/plain_vae.py [--decoder mlp] [--epochs 40] [--output runs/plain_vae]

The decoder is the one thing that changes. The images are handwritten digits, 8x8; a grey value from 0 to 1 is taken as
the probability of ink, of which the decoder returns the logit. With the MLP most latents collapse: see docs/cure.md.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import ilvae_fast as il

SHAPE = (1, 8, 8)
LATENT_DIM = 10


def mlp_decoder() -> nn.Module:
    """What was there before."""
    widths = (LATENT_DIM, 64, 64, 256, 256)
    hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(256, 64), nn.Unflatten(-1, SHAPE))


def brenier_decoder() -> nn.Module:
    """What takes its place: ``|decoder(z) - decoder(z')| >= 0.57 * 0.57 |z - z'|``, in logits."""
    return il.BrenierDecoder(LATENT_DIM, data_shape=SHAPE, inverse_lipschitz=0.57)


DECODERS = {"mlp": mlp_decoder, "brenier": brenier_decoder}


class VAE(nn.Module):
    """x (N, *SHAPE) -> logits of its reconstruction; mean and logarithm of the variance (N, LATENT_DIM) of q(z|x)."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2 * LATENT_DIM))
        self.decoder = decoder

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=-1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(z), mean, log_variance


def negative_elbo(x: Tensor, logits: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """In nats per image."""
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(-1)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
    return (cross_entropy + kl).mean()


def train(model: nn.Module, images: Tensor, epochs: int) -> list[float]:
    """The mean loss of each epoch."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(epochs):
        losses = []
        for x in images[torch.randperm(len(images))].split(64):
            optimiser.zero_grad()
            loss = negative_elbo(x, *model(x))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1000.0)
            optimiser.step()
            losses.append(loss.detach())
        history.append(torch.stack(losses).mean().item())
    return history


def main(arguments: list[str] | None = None) -> list[float]:
    """The mean loss of each epoch."""
    parser = argparse.ArgumentParser(description="A VAE on digits in plain PyTorch.")
    parser.add_argument("--decoder", choices=DECODERS, default="brenier")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/plain_vae"))
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    digits = il.data.load("digits")
    images, test = digits.train.unflatten(-1, SHAPE), digits.test.unflatten(-1, SHAPE)
    decoder = DECODERS[args.decoder]()
    if isinstance(decoder, il.BrenierDecoder):
        decoder.initialize(images, "bernoulli")
    model = VAE(decoder)
    history = train(model, images, args.epochs)
    print(f"loss {history[0]:.2f} -> {history[-1]:.2f} nats")

    args.output.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.output / "model.pt")
    loaded = VAE(DECODERS[args.decoder]()).eval()
    loaded.load_state_dict(torch.load(args.output / "model.pt"))
    with torch.no_grad():
        samples = loaded.decoder(torch.randn(16, LATENT_DIM)).sigmoid()
    torch.save(samples, args.output / "samples.pt")

    measured = il.metrics.adapt(encoder=loaded.encoder, decoder=loaded.decoder, likelihood="bernoulli")
    print(f"KL {il.metrics.kl_divergence(measured, test).total:.2f} nats")
    print(f"active directions {il.metrics.active_directions(measured, test).active} of {LATENT_DIM}")
    print(f"mutual information {il.metrics.mutual_information(measured, test):.2f} nats")
    print(f"gain over ignoring z {il.metrics.gain(measured, test, images):.2f} nats")
    return history


if __name__ == "__main__":
    main()
