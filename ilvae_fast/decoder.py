"""BrenierDecoder: two Brenier maps around an injective embedding, a drop-in inverse-Lipschitz decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._errors import unknown_name
from .layers import BrenierMap, check_positive, stacked_tangents

EMBEDDINGS = ("identity", "orthogonal", "full_rank")


def _pair(argument: str, value: Any) -> tuple[Any, Any]:
    """An option of both maps: a pair, or one value for both."""
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ValueError(f"{argument}: got {len(value)} values, wanted one or a pair")
        return value[0], value[1]
    return value, value


class BrenierDecoder(nn.Module):
    r"""``decoder(z) = T2(B T1(z))`` with Brenier maps T1 on the latent and T2 on the data space, B injective linear.

    ``|decoder(z) - decoder(z')| >= L1 sigma_min(B) L2 |z - z'|`` (Kinoshita et al., ICML 2023, section 4).

    Args:
        latent_dim: m.
        data_dim: D >= m.
        hidden_features: widths of the hidden layers of T1 and of T2.
        inverse_lipschitz: L1 and L2, a pair or one value for both; each as in :class:`BrenierMap`.
        embedding: B. ``"identity"``: the first m coordinates, never formed. ``"orthogonal"``: trained, with
            orthonormal columns by parametrisation. ``"full_rank"``: free and trained; sigma_min(B) is recomputed for
            the bound and may decay.
        device, dtype and further options: those of :class:`BrenierMap`, each single or a pair.

    Raises:
        ValueError, TypeError: naming the argument; latent_dim > data_dim is refused, no such map is injective.
    """

    raw_embedding: nn.Parameter | None

    def __init__(
        self,
        latent_dim: int,
        data_dim: int,
        hidden_features: Sequence[Sequence[int]] = ((128, 128), (512, 512)),
        *,
        inverse_lipschitz: Any = (1.0, 1.0),
        embedding: str = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive("latent_dim", latent_dim)
        self.data_dim = check_positive("data_dim", data_dim)
        if latent_dim > data_dim:
            raise ValueError(f"latent_dim: got {latent_dim}, wanted at most data_dim, {data_dim}: B must be injective")
        if embedding not in EMBEDDINGS:
            raise unknown_name("embedding", embedding, EMBEDDINGS)
        if (
            isinstance(hidden_features, int)
            or len(hidden_features) != 2
            or any(isinstance(h, int) for h in hidden_features)
        ):
            raise ValueError(f"hidden_features: got {hidden_features!r}, wanted the widths of both maps, a pair")
        self.embedding = embedding
        pairs = {name: _pair(name, value) for name, value in options.items()}
        pairs["inverse_lipschitz"] = _pair("inverse_lipschitz", inverse_lipschitz)
        maps = [
            BrenierMap(
                features, hidden_features[i], device=device, dtype=dtype, **{name: v[i] for name, v in pairs.items()}
            )
            for i, features in enumerate((latent_dim, data_dim))
        ]
        self.latent_map, self.data_map = maps
        if embedding == "identity":
            self.register_parameter("raw_embedding", None)
        else:
            factory = {"device": device, "dtype": dtype}
            self.raw_embedding = nn.Parameter(torch.empty(data_dim, latent_dim, **factory))  # type: ignore[arg-type]
            self._reset_embedding()

    @torch.no_grad()
    def _reset_embedding(self) -> None:
        if self.raw_embedding is not None:
            orthonormal = torch.empty_like(self.raw_embedding, dtype=torch.float32)
            if not orthonormal.is_meta:
                nn.init.orthogonal_(orthonormal)
            self.raw_embedding.copy_(orthonormal)

    def reset_parameters(self) -> None:
        """Draw all weights anew; the inverse-Lipschitz constants stay as they are."""
        self.latent_map.reset_parameters()
        self.data_map.reset_parameters()
        self._reset_embedding()

    def embedding_matrix(self) -> Tensor:
        """B (D, m) as it is applied, differentiable."""
        if self.raw_embedding is None:
            weight = self.data_map.skip_weight
            return torch.eye(self.data_dim, self.latent_dim, dtype=weight.dtype, device=weight.device)
        if self.embedding == "full_rank":
            return self.raw_embedding
        raw = self.raw_embedding
        wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
        q, r = torch.linalg.qr(wide)
        # the sign of diag(R) makes Q unique, hence smooth in raw
        return (q * r.diagonal().sign()).to(raw.dtype)

    def _operand(self) -> Tensor | int:
        return self.data_dim if self.raw_embedding is None else self.embedding_matrix()

    def forward(self, z: Tensor) -> Tensor:
        """``decoder(z)``: (..., m) -> (..., D)."""
        return self.data_map(self.latent_map(z), self._operand())

    def jvp(self, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder and its derivative along v (..., m): both (..., D)."""
        y, y_tangent = self.latent_map.jvp(z, v)
        return self.data_map.jvp(y, y_tangent, self._operand())

    def jacobian(self, z: Tensor) -> Tensor:
        """``d decoder / dz``: (..., m) -> (..., D, m); its singular values are at least the bound."""
        return stacked_tangents(self.jvp, z)

    @torch.no_grad()
    def inverse_lipschitz_bound(self) -> Tensor:
        """``L1 sigma_min(B) L2``, a 0-d float64 tensor, of the L and B actually applied."""
        bound = _whole(self.latent_map.inverse_lipschitz).double() * _whole(self.data_map.inverse_lipschitz).double()
        if self.raw_embedding is not None:
            bound = bound * torch.linalg.svdvals(_whole(self.embedding_matrix()).double()).min()
        return bound.squeeze(0)

    def extra_repr(self) -> str:
        return f"{self.latent_dim}, {self.data_dim}, embedding={self.embedding}"


def _whole(t: Tensor) -> Tensor:
    """``t``, gathered if it is spread over processes (a DTensor, as of FSDP2)."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t
