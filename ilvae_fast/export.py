"""Maps and decoders in plain torch operations, for runtimes that do not know our operators, and in ONNX.

``torch.export`` and AOTInductor need none of this where the extension is installed: they keep our operators.
``torch.onnx.export`` itself writes maps, and decoders but those with orthonormal embeddings, which ONNX cannot compute.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._support.extras import require
from ._support.files import write_atomically
from .layers import BrenierDecoder, BrenierMap
from .operators import closed_form
from .reference import embed


class PlainMap(nn.Module):
    """A Brenier map by the formula of its gradient, with the weights and the constant that a layer has now."""

    def __init__(self, layer: BrenierMap) -> None:
        super().__init__()
        operands = layer.operands(layer.skip_weight.detach().new_zeros(1, layer.in_features))
        self.activations = operands.activations.layers
        constant = operands.inverse_lipschitz.to(operands.skip_weight.dtype)
        named = {"skip_weight": operands.skip_weight, "bias": operands.bias, "constant": constant}
        named |= {f"weight_{k}": weight for k, weight in enumerate(operands.weights)}
        for name, tensor in named.items():
            self.register_buffer(name, tensor.detach().clone())

    def potential_and_map(self, x: Tensor, embedding: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """Return ``(phi(B x), T(B x))``: (..., d) -> (...), (..., d)."""
        tensors = self.get_buffer("skip_weight"), self.get_buffer("bias"), self._weights(), self.get_buffer("constant")
        return closed_form.potential_and_map(self.activations, embed(x, embedding), *tensors)

    def _weights(self) -> list[Tensor]:
        return [self.get_buffer(f"weight_{k}") for k in range(len(self.activations) - 1)]

    def potential(self, x: Tensor) -> Tensor:
        """Return ``phi(x)``: (..., d) -> (...)."""
        return self.potential_and_map(x)[0]

    def forward(self, x: Tensor, embedding: Tensor | int | None = None) -> Tensor:
        """Return ``T(B x)``: (..., d) -> (..., d)."""
        return self.potential_and_map(x, embedding)[1]


class PlainDecoder(nn.Module):
    """A decoder ``T2(B T1(z))`` by two such maps, with the embedding that it has now."""

    embedding: Tensor | None

    def __init__(self, decoder: BrenierDecoder) -> None:
        super().__init__()
        self.latent_map, self.data_map = PlainMap(decoder.latent_map), PlainMap(decoder.data_map)
        self.data_dim, self.data_shape = decoder.data_dim, decoder.data_shape
        identity = decoder.raw_embedding is None
        self.register_buffer("embedding", None if identity else decoder.embedding_matrix().detach().clone())

    def forward(self, z: Tensor) -> Tensor:
        """Return ``decoder(z)``: (..., m) -> (..., D), or (..., *data_shape)."""
        x = self.data_map(self.latent_map(z), self.data_dim if self.embedding is None else self.embedding)
        return x if self.data_shape is None else x.unflatten(-1, self.data_shape)


def plain(module: nn.Module) -> nn.Module:
    """Return a copy of a module in which all Brenier maps and decoders are plain torch operations.

    The copy is for inference: what our layers trained are buffers of it. They offer ``forward``, and maps ``potential``
    and ``potential_and_map``. Results equal those of the module to rounding.

    Args:
        module: a map, a decoder, or any module that holds some.
    """
    if isinstance(module, BrenierDecoder):
        return PlainDecoder(module).eval()
    if isinstance(module, BrenierMap):
        return PlainMap(module).eval()
    replaced: dict[int, nn.Module] = {}

    def prepare(parent: nn.Module) -> None:
        for child in parent.children():
            if isinstance(child, BrenierMap | BrenierDecoder):
                replaced[id(child)] = plain(child)
            else:
                prepare(child)

    prepare(module)
    # what is in the dictionary a copy takes for copied
    return copy.deepcopy(module, dict(replaced)).eval()


def onnx(
    module: nn.Module,
    path: str | Path,
    arguments: tuple[Tensor, ...] | None = None,
    *,
    dynamic_shapes: dict[str, Any] | tuple[Any, ...] | None = None,
    **options: Any,
) -> None:
    """Write a module to an ONNX file, which any runtime reads; it needs neither this library nor torch.

    Needs the extra ``onnx``. The file is written at once or not at all.

    Args:
        module: a map, a decoder, or a module that holds some; :func:`plain` is applied to it.
        path: of the file.
        arguments: an example of what ``module`` is called with. None, for a map or decoder: two rows of zeros.
        dynamic_shapes: as :func:`torch.export.export` takes them. None: the first dimension of each argument is free.
        **options: further ones of :func:`torch.onnx.export`, such as ``opset_version``.

    Raises:
        ValueError: ``arguments`` are missing for a module of another kind.
        ImportError: the extra is not installed.
    """
    require("onnxscript", "onnx")
    if arguments is None:
        if isinstance(module, BrenierDecoder):
            first = module.latent_map
        elif isinstance(module, BrenierMap):
            first = module
        else:
            raise ValueError(f"arguments: got None, wanted an example of what {type(module).__name__} is called with")
        arguments = (first.skip_weight.detach().new_zeros(2, first.in_features),)
    if dynamic_shapes is None:
        dynamic_shapes = tuple({0: "rows"} if a.dim() else None for a in arguments)
    with torch.no_grad():
        program = torch.onnx.export(
            plain(module), arguments, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False, **options
        )
    assert program is not None
    write_atomically(Path(path), program.model_proto.SerializeToString())
