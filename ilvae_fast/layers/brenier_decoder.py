"""BrenierDecoder: two Brenier maps around an injective embedding, a drop-in inverse-Lipschitz decoder."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._support.checks import check_positive, check_sizes
from .._support.devices import with_float64
from .._support.errors import unknown_name
from ..distributions import Likelihood
from ..operators.plan import Plan
from .brenier_map import VERSION, BrenierMap, check_widths, stacked_tangents
from .constant import warn_of_other_constants
from .data_start import start_from_data_

EMBEDDINGS = ("identity", "orthogonal", "full_rank")
# the options of both maps are those of BrenierMap, but for the decoder's own
MAP_OPTIONS = [
    name
    for name, parameter in inspect.signature(BrenierMap).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in ("inverse_lipschitz", "device", "dtype")
]


def _pair(argument: str, value: Any) -> tuple[Any, Any]:
    """Return an option of both maps as a pair; one value is for both."""
    if isinstance(value, tuple | list):
        if len(value) != 2:
            raise ValueError(f"{argument}: got {len(value)} values, wanted one or a pair")
        return value[0], value[1]
    return value, value


class DecoderPlan(NamedTuple):
    """What a call of a decoder costs: the plans of its two maps, and the sums of their costs."""

    latent_map: Plan
    data_map: Plan

    @property
    def map_flops(self) -> float:
        """Of the matrix products of the forward pass."""
        return self.latent_map.map_flops + self.data_map.map_flops

    @property
    def training_flops(self) -> float:
        """Of the matrix products of the training terms."""
        return self.latent_map.training_flops + self.data_map.training_flops

    @property
    def map_bytes(self) -> int:
        """Read and written by the forward pass."""
        return self.latent_map.map_bytes + self.data_map.map_bytes

    @property
    def training_bytes(self) -> int:
        """Read and written by the training terms."""
        return self.latent_map.training_bytes + self.data_map.training_bytes

    @property
    def saved_bytes(self) -> int:
        """Kept from forward to backward besides inputs and parameters."""
        return self.latent_map.saved_bytes + self.data_map.saved_bytes

    def __str__(self) -> str:
        return (
            f"latent map\n{self.latent_map}\n\ndata map\n{self.data_map}\n\nboth\n"
            f"map              {self.map_flops / 1e6:,.3g} Mflop, {self.map_bytes / 2**10:,.4g} KiB\n"
            f"training terms   {self.training_flops / 1e6:,.3g} Mflop, {self.training_bytes / 2**10:,.4g} KiB\n"
            f"saved            {self.saved_bytes / 2**10:,.4g} KiB from forward to backward"
        )


class BrenierDecoder(nn.Module):
    r"""``decoder(z) = T2(B T1(z))`` with Brenier maps T1 on the latent and T2 on the data space, B injective linear.

    ``|decoder(z) - decoder(z')| >= L1 sigma_min(B) L2 |z - z'|`` (Kinoshita et al., ICML 2023, section 4).

    Args:
        latent_dim: m.
        data_dim: D >= m; may be left out where ``data_shape`` is given.
        hidden_features: widths of the hidden layers of T1 and of T2.
        inverse_lipschitz: L1 and L2, a pair or one value for both; each as in :class:`BrenierMap`.
        embedding: B. ``"orthogonal"``: trained, with orthonormal columns by parametrisation. ``"full_rank"``: free and
            trained; sigma_min(B) is recomputed for the bound and may decay. ``"identity"``: the first m coordinates,
            never formed. These m outputs must then move as far as the guarantee asks, even where they are blank pixels.
            Others move further only where the map bends: dT2/dx is positive semi-definite, so that
            ``|h_ij| <= sqrt(h_ii h_jj)``.
        data_shape: of one datum that the decoder returns, such as (1, 28, 28); by default (D,).
        device: of the parameters.
        dtype: of the parameters, as in :class:`BrenierMap`.
        **options: those of :class:`BrenierMap`, each single or a pair. ``initialization`` is ``("random", "sparse")``
            by default; where there are data, :meth:`initialize` makes a better start.

    Raises:
        ValueError, TypeError: naming the argument; latent_dim > data_dim is refused, no such map is injective.
    """

    raw_embedding: nn.Parameter | None
    data_shape: tuple[int, ...] | None = None

    def __init__(
        self,
        latent_dim: int,
        data_dim: int | None = None,
        hidden_features: Sequence[Sequence[int]] = ((128, 128), (512, 512)),
        *,
        inverse_lipschitz: Any = (1.0, 1.0),
        embedding: str = "orthogonal",
        data_shape: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.latent_dim = check_positive("latent_dim", latent_dim)
        if data_shape is not None:
            self.data_shape = check_sizes("data_shape", data_shape)
            values = math.prod(self.data_shape)
            if data_dim is not None and check_positive("data_dim", data_dim) != values:
                raise ValueError(
                    f"data_dim: got {data_dim}, wanted {values}, the values of data_shape {self.data_shape}, or none"
                )
            data_dim = values
        elif data_dim is None:
            raise TypeError("data_dim: got None, wanted a positive int, or data_shape=(1, 28, 28), say")
        self.data_dim = check_positive("data_dim", data_dim)
        if self.latent_dim > self.data_dim:
            raise ValueError(
                f"latent_dim: got {self.latent_dim}, wanted at most data_dim, {self.data_dim}: B must be injective"
            )
        if embedding not in EMBEDDINGS:
            raise unknown_name("embedding", embedding, EMBEDDINGS)
        try:
            hidden = [tuple(widths) for widths in hidden_features]
        except TypeError:  # a number instead of a sequence
            hidden = []
        if len(hidden) != 2:
            raise ValueError(
                f"hidden_features: got {hidden_features!r}, wanted the widths of both maps, a pair: "
                "((128, 128), (512, 512)), say"
            )
        hidden = [check_widths(f"hidden_features[{i}]", widths) for i, widths in enumerate(hidden)]
        for name in options:
            if name not in MAP_OPTIONS:
                raise TypeError(f"option of {unknown_name('BrenierDecoder', name, MAP_OPTIONS)}")
        self.embedding = embedding
        options = {"initialization": ("random", "sparse"), **options}
        pairs = {name: _pair(name, value) for name, value in options.items()}
        pairs["inverse_lipschitz"] = _pair("inverse_lipschitz", inverse_lipschitz)
        maps = [
            BrenierMap(features, hidden[i], device=device, dtype=dtype, **{name: v[i] for name, v in pairs.items()})
            for i, features in enumerate((self.latent_dim, self.data_dim))
        ]
        self.latent_map, self.data_map = maps
        self.latent_map._input = ("z", "latent_dim")
        if embedding == "identity":
            self.register_parameter("raw_embedding", None)
        else:
            factory = {"device": device, "dtype": dtype}
            self.raw_embedding = nn.Parameter(torch.empty(self.data_dim, self.latent_dim, **factory))  # type: ignore[arg-type]
            self._reset_embedding()

    @torch.no_grad()
    def _reset_embedding(self) -> None:
        if self.raw_embedding is not None:
            orthonormal = torch.empty_like(self.raw_embedding, dtype=torch.float32)
            if not orthonormal.is_meta:
                nn.init.orthogonal_(orthonormal)
            self.raw_embedding.copy_(orthonormal)

    def reset_parameters(self) -> None:
        """Draw all weights anew. The inverse-Lipschitz constants stay as they are.

        Call this after ``model.apply(init)``, which overwrites weights that were drawn for this architecture.
        :class:`ilvae_fast.NonNegative` says what happens without.
        """
        self.latent_map.reset_parameters()
        self.data_map.reset_parameters()
        self._reset_embedding()

    def project_(self) -> None:
        """Raise negative weights to 0 in place: after an optimiser step, with ``nonneg="none"``."""
        self.latent_map.project_()
        self.data_map.project_()

    @torch.no_grad()
    def initialize(self, x: Tensor, likelihood: str | Likelihood) -> None:
        """Start from the data, as the best model that ignores z, with B along the principal directions of the data.

        The mean of ``decoder(z)`` over the prior becomes ``likelihood.marginal(x)``, carried by the output's skip row
        of T2; B (unless it is ``"identity"``) takes the principal directions of the scores ``d log p(x|z) / d f``
        there. For a Gaussian these are the data's mean and principal directions. The deviations along them are not
        matched: orthonormal columns carry none, and scaling T1's rows did not pay
        (``benchmarks/NOTES.md#why-the-decoder-fitted-worse-than-an-mlp``). Other
        weights stay as they are. No random numbers are drawn, so that all processes of a run start alike.

        Args:
            x: training data (N, ...), flattened to the decoder's outputs as the likelihood takes them, or tokens where
                the decoder's outputs are the logits of one. At most 10000 of them, evenly spread, are looked at.
            likelihood: a name in ``ilvae_fast.vae.LIKELIHOODS``, with its default options, or an object with its own.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        start_from_data_(self, self.raw_embedding, self.data_map.skip_weight, self.latent_dim, x, likelihood)

    @property
    def inverse_lipschitz(self) -> tuple[Tensor, Tensor]:
        """L1 and L2, each (1,). Assigning a pair, or one value for both, fills them in place."""
        return self.latent_map.inverse_lipschitz, self.data_map.inverse_lipschitz

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: Any) -> None:
        self.latent_map.inverse_lipschitz, self.data_map.inverse_lipschitz = _pair("inverse_lipschitz", value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        maps = {"latent_map": self.latent_map, "data_map": self.data_map}
        warn_of_other_constants({f"{prefix}{name}.inverse_lipschitz": m for name, m in maps.items()}, state_dict)
        metadata, strict, missing, unexpected, errors = rest
        theirs = state_dict.get(prefix + "_extra_state")
        theirs = None if theirs is None else _embedding_of(theirs)
        if theirs is None and prefix + "latent_map.skip_weight" in state_dict:
            # a state of an earlier version, whose default was the identity; of the others it does not say which
            theirs = self.embedding if prefix + "raw_embedding" in state_dict else "identity"
        if theirs is not None and theirs != self.embedding:
            errors.append(
                f"{prefix.rstrip('.') or 'BrenierDecoder'}: the state has embedding={theirs!r}, this decoder "
                f"{self.embedding!r}: construct it with embedding={theirs!r}"
            )
        absent: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, absent, unexpected, errors)
        missing.extend(key for key in absent if key != prefix + "_extra_state")

    def get_extra_state(self) -> Tensor:
        """Return the embedding as a tensor, for files that hold nothing else: [version, place in EMBEDDINGS]."""
        return torch.tensor([VERSION, EMBEDDINGS.index(self.embedding)], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: loading compares the embeddings."""

    def embedding_matrix(self) -> Tensor:
        """Return B (D, m) as it is applied, differentiable."""
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
        """Return ``decoder(z)``: (..., m) -> (..., D), or (..., *data_shape)."""
        x = self.data_map(self.latent_map(z), self._operand())
        return x if self.data_shape is None else x.unflatten(-1, self.data_shape)

    def plan(self, z: Tensor) -> DecoderPlan:
        """Say what ``self(z)`` would do here and now, map by map (:meth:`BrenierMap.plan`).

        B itself is not counted; making orthonormal columns takes O(D m^2) in each call. The decoder is not computed.

        Raises:
            ValueError, TypeError: naming the argument, as the call itself.
        """
        operands = self.latent_map.operands(z)
        # stands for T1(z), in which only shape, dtype and autograd count
        y = z.detach().new_zeros(()).expand(z.shape).requires_grad_(operands.recorded())
        return DecoderPlan(operands.plan(), self.data_map.plan(y, self._operand()))

    def jvp(self, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoder and its derivative along v (..., m): both (..., D), flat whatever ``data_shape`` is."""
        y, y_tangent = self.latent_map.jvp(z, v)
        return self.data_map.jvp(y, y_tangent, self._operand())

    def jacobian(self, z: Tensor) -> Tensor:
        """Return ``d decoder / dz``: (..., m) -> (..., D, m). Its singular values are at least the bound.

        Rows are in the order of ``decoder(z)`` flattened.
        """
        self.latent_map._check(z)
        return stacked_tangents(self.jvp, z)

    @torch.no_grad()
    def cotangent_bound(self, z: Tensor, v: Tensor) -> Tensor:
        """Return a certified lower bound of ``|J(z)^T v|``, J the Jacobian at z: ``L1 |B^T J2 v|``.

        ``J = J2 B J1`` with symmetric J1 and J2, the Jacobians of the two maps, and no singular value of J1 is below
        L1. J2 is taken as it is, so that this is at least ``L1 L2 sigma_min(B)`` times the length of v's projection on
        the range of J.

        Args:
            z: (..., m).
            v: cotangent (..., D), flat whatever ``data_shape`` is.
        """
        embedding = self.embedding_matrix()
        _, pulled = self.data_map.jvp(self.latent_map(z) @ embedding.mT, v)
        constant = self.latent_map.inverse_lipschitz.to(torch.promote_types(pulled.dtype, torch.float32))
        return constant.squeeze(0) * torch.linalg.vector_norm(pulled @ embedding, dim=-1)

    @torch.no_grad()
    def inverse_lipschitz_bound(self) -> Tensor:
        """Return ``L1 sigma_min(B) L2``, a 0-d float64 tensor, of the L and B that are applied."""
        maps = self.latent_map, self.data_map
        first, last = (with_float64(_whole(m.inverse_lipschitz)).double() for m in maps)
        bound = first * last
        if self.raw_embedding is not None:
            bound = bound * torch.linalg.svdvals(with_float64(_whole(self.embedding_matrix())).double()).min()
        return bound.squeeze(0)

    def extra_repr(self) -> str:
        shape = "" if self.data_shape is None else f", data_shape={self.data_shape}"
        return f"{self.latent_dim}, {self.data_dim}, embedding={self.embedding}{shape}"


def _embedding_of(state: Any) -> str:
    """Return what :meth:`BrenierDecoder.get_extra_state` describes."""
    numbers = torch.as_tensor(state).flatten().tolist()
    known = dict(enumerate(EMBEDDINGS))
    return known.get(numbers[1], "unknown") if len(numbers) == 2 else "unknown"


def _whole(t: Tensor) -> Tensor:
    """Return ``t``, gathered if it is spread over processes: a DTensor, as of FSDP2."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t
