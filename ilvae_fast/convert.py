"""Decoders from checkpoints of other implementations."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .layers import BrenierDecoder
from .operators.activations import Activation

_PREFIX = re.compile(r"(^|.*\.)decoder\.0\.A0\.weight$")


def _maps(state: Mapping[str, Tensor]) -> str:
    """What stands before ``0.A0.weight``."""
    for key in state:
        if _PREFIX.match(key):
            return key.removesuffix("0.A0.weight")
    raise ValueError(
        f"state_dict: got keys {sorted(state)[:4]} .., wanted the layout of LIDVAE, with decoder.0.A0.weight among them"
    )


def from_lidvae(state_dict: Mapping[str, Tensor], inverse_lipschitz: float) -> BrenierDecoder:
    """The :class:`BrenierDecoder` equal to the decoder of a PyTorch LIDVAE checkpoint.

    The layout: for each of the two maps i, ``decoder.{i}.A0.{weight,bias}`` the skip terms of the first layer,
    ``decoder.{i}.A.{k}.{weight,bias}`` those of the later ones and the output's, ``decoder.{i}.W.{k}.param`` the
    logarithms of the non-negative weights; squared leaky ReLU of slope 0.2 in the first layer, leaky ReLU 0.2 after it
    and on the scalar output; the first map's output padded with zeros. Other keys, an encoder's say, are ignored.

    Args:
        state_dict: of the whole model or of the part that holds ``decoder``.
        inverse_lipschitz: the one constant of both maps, as it was trained with. The checkpoint does not hold it, and
            another one is another decoder; that code's own default is 0.

    Returns:
        A decoder in the dtype of the checkpoint, on the CPU, with ``nonneg="exp"``: raw weights are the ``param``.

    Raises:
        ValueError: keys are missing or shapes do not fit; says which.
    """
    prefix = _maps(state_dict)

    def get(name: str) -> Tensor:
        key = prefix + name
        if key not in state_dict:
            raise ValueError(f"state_dict: no key {key!r}, wanted the layout of LIDVAE")
        return state_dict[key].detach().cpu()

    skips, biases, raw = [], [], []
    for i in range(2):
        depth = sum(1 for key in state_dict if re.fullmatch(re.escape(prefix) + rf"{i}\.W\.\d+\.param", key))
        names = [f"{i}.A0", *(f"{i}.A.{k}" for k in range(depth))]
        skips.append([get(f"{name}.weight") for name in names])
        biases.append([get(f"{name}.bias") for name in names])
        raw.append([get(f"{i}.W.{k}.param") for k in range(depth)])
    decoder = BrenierDecoder(
        skips[0][0].shape[1],
        skips[1][0].shape[1],
        [[len(bias) for bias in b[:-1]] for b in biases],
        activation=Activation("leaky_relu", 0.2),
        first_activation=Activation("squared_leaky_relu", 0.2),
        output_activation=Activation("leaky_relu", 0.2),
        nonneg="exp",
        embedding="identity",
        inverse_lipschitz=inverse_lipschitz,
        dtype=skips[0][0].dtype,
    )
    with torch.no_grad():
        for layer, a, b, w in zip((decoder.latent_map, decoder.data_map), skips, biases, raw, strict=True):
            for name, target, value in [
                ("A", layer.skip_weight, torch.cat(a)),
                ("bias", layer.bias, torch.cat(b)),
                *((f"W.{k}", p, v) for k, (p, v) in enumerate(zip(layer.raw_weights, w, strict=True))),
            ]:
                if target.shape != value.shape:
                    raise ValueError(
                        f"state_dict: {name} of a map has shape {tuple(value.shape)}, wanted {tuple(target.shape)}"
                    )
                target.copy_(value)
    return decoder
