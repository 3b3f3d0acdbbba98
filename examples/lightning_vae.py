"""A VAE as a LightningModule, with an inverse-Lipschitz decoder in the place of its MLP.

    python examples/lightning_vae.py [--decoder mlp] [--compile] [--epochs 40] [--output runs/lightning_vae]

The pixels of the digits, 8x8, are taken as probabilities of black, so the decoder returns logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ilvae_fast as il

LATENT_DIM = 10


def mlp_decoder() -> nn.Module:
    """What was there before."""
    return nn.Sequential(nn.Linear(LATENT_DIM, 256), nn.ReLU(), nn.Linear(256, 64))


def brenier_decoder() -> nn.Module:
    """What takes its place: ``|decoder(z) - decoder(z')| >= 0.5 * 0.5 |z - z'|``, in logits."""
    return il.BrenierDecoder(LATENT_DIM, 64, inverse_lipschitz=0.5)


DECODERS = {"mlp": mlp_decoder, "brenier": brenier_decoder}


class VAE(lightning.LightningModule):
    """x (N, 64) of probabilities; the decoder returns their logits."""

    def __init__(self, decoder: str = "brenier") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2 * LATENT_DIM))
        self.decoder = DECODERS[decoder]()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=-1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(z), mean, log_variance

    def training_step(self, x: Tensor) -> Tensor:
        logits, mean, log_variance = self(x)
        cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        loss = (cross_entropy + kl).mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class History(lightning.Callback):
    """The mean loss of each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.losses.append(float(trainer.callback_metrics["loss"]))


def main(arguments: list[str] | None = None) -> list[float]:
    """The mean loss of each epoch."""
    parser = argparse.ArgumentParser(description="A VAE on digits with Lightning.")
    parser.add_argument("--decoder", choices=DECODERS, default="brenier")
    parser.add_argument("--compile", action="store_true", help="train with torch.compile")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/lightning_vae"))
    args = parser.parse_args(arguments)

    lightning.seed_everything(0, verbose=False)
    digits = il.data.load("digits")
    model = VAE(args.decoder)
    if args.compile:
        model.compile()
    history = History()
    trainer = lightning.Trainer(
        max_epochs=args.epochs, accelerator="cpu", callbacks=[history], gradient_clip_val=1000.0,
        default_root_dir=args.output, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(digits.train, batch_size=64, shuffle=True))  # type: ignore[arg-type]
    print(f"loss {history.losses[0]:.2f} -> {history.losses[-1]:.2f} nats")

    trainer.save_checkpoint(args.output / "model.ckpt")
    loaded = VAE.load_from_checkpoint(args.output / "model.ckpt", weights_only=True).eval()
    with torch.no_grad():
        samples = loaded.decoder(torch.randn(16, LATENT_DIM)).sigmoid()
    torch.save(samples, args.output / "samples.pt")

    measured = il.metrics.adapt(encoder=loaded.encoder, decoder=loaded.decoder, likelihood="bernoulli")
    print(f"KL {il.metrics.kl_divergence(measured, digits.test).total:.2f} nats")
    print(f"active directions {il.metrics.active_directions(measured, digits.test).active} of {LATENT_DIM}")
    print(f"mutual information {il.metrics.mutual_information(measured, digits.test):.2f} nats")
    print(f"gain over ignoring z {il.metrics.gain(measured, digits.test, digits.train):.2f} nats")
    return history.losses


if __name__ == "__main__":
    main()
