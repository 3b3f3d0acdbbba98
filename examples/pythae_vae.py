"""A VAE of pythae, with an inverse-Lipschitz decoder in the place of its MLP.

    python examples/pythae_vae.py [--decoder mlp] [--epochs 40] [--output runs/pythae_vae]

pythae's squared error is the likelihood of a Gaussian with standard deviation 1: what you scale the data by says how
finely it looks. Here a grey value of the digits is 1/16 of their range and sigma is 4 of them.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from pythae.models import VAE, AutoModel, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder
from pythae.models.nn.default_architectures import Decoder_AE_MLP
from pythae.pipelines import TrainingPipeline
from pythae.samplers import NormalSampler
from pythae.trainers import BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from torch import Tensor

import ilvae_fast as il

SHAPE = (1, 8, 8)
LATENT_DIM = 10


class BrenierDecoder(BaseDecoder):
    """What takes the place of pythae's MLP: ``|map(z) - map(z')| >= 0.4 * 0.4 |z - z'|``, in sigmas."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.map = il.BrenierDecoder(config.latent_dim, data_shape=config.input_dim, inverse_lipschitz=0.4)

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.map(z))


class MLPDecoder(Decoder_AE_MLP):
    """pythae's own, without the sigmoid, which is for grey values from 0 to 1."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        self.layers[-1] = self.layers[-1][0]


DECODERS = {"mlp": MLPDecoder, "brenier": BrenierDecoder}


class History(TrainingCallback):
    """The mean loss of each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, training_config: BaseTrainerConfig, logs: dict[str, float], **rest: object) -> None:
        self.losses.append(float(logs["train_epoch_loss"]))


def main(arguments: list[str] | None = None) -> list[float]:
    """The mean loss of each epoch."""
    parser = argparse.ArgumentParser(description="A VAE on digits with pythae.")
    parser.add_argument("--decoder", choices=DECODERS, default="brenier")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/pythae_vae"))
    args = parser.parse_args(arguments)

    digits = il.data.load("digits")
    images, test = 4 * digits.train.unflatten(-1, SHAPE), 4 * digits.test.unflatten(-1, SHAPE)
    config = VAEConfig(input_dim=SHAPE, latent_dim=LATENT_DIM, reconstruction_loss="mse")
    model = VAE(config, decoder=DECODERS[args.decoder](config))
    training = BaseTrainerConfig(
        output_dir=str(args.output), num_epochs=args.epochs, learning_rate=1e-3, keep_best_on_train=True, no_cuda=True
    )
    history = History()
    pipeline = TrainingPipeline(model=model, training_config=training)
    pipeline(images, callbacks=[history])
    print(f"loss {history.losses[0]:.2f} -> {history.losses[-1]:.2f} nats")

    loaded = AutoModel.load_from_folder(str(Path(pipeline.trainer.training_dir) / "final_model")).eval()
    samples = NormalSampler(loaded).sample(num_samples=16, output_dir=None, return_gen=True)
    torch.save(samples, args.output / "samples.pt")

    measured = il.metrics.adapt(encoder=loaded.encoder, decoder=loaded.decoder, likelihood=il.vae.Gaussian(1.0))
    print(f"KL {il.metrics.kl_divergence(measured, test).total:.2f} nats")
    print(f"active directions {il.metrics.active_directions(measured, test).active} of {LATENT_DIM}")
    print(f"mutual information {il.metrics.mutual_information(measured, test):.2f} nats")
    print(f"gain over ignoring z {il.metrics.gain(measured, test, images):.2f} nats")
    return history.losses


if __name__ == "__main__":
    logging.getLogger("pythae").setLevel(logging.WARNING)
    main()
