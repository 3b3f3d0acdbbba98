"""The life of the inverse-Lipschitz constant L of a map: where it is kept, how it is assigned, moved and loaded.

L is what the map guarantees. Hence it is kept at least in float32 whatever the dtype of the layer, survives a detour
over the meta device, and does not change without a warning when a state is loaded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..operators.operands import as_constant, assert_constant, check_inverse_lipschitz
from .nonneg import NonNegative, as_nonnegative

Self = TypeVar("Self", bound="WithConstant")


@dataclass(frozen=True)
class Trained:
    """A trained inverse-Lipschitz constant: ``nonneg`` of a raw parameter.

    Args:
        initial: its first value, > 0.
        nonneg: the parametrisation, a name or :class:`ilvae_fast.NonNegative`.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    initial: float = 1.0
    nonneg: str | NonNegative = "softplus"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.initial) and self.initial > 0):
            raise ValueError(f"il.Trained: got initial {self.initial!r}, wanted a finite number > 0")
        object.__setattr__(self, "nonneg", as_nonnegative(self.nonneg))


class WithConstant(nn.Module):
    """A module with a constant L (1,): a buffer ``inverse_lipschitz``, or a parameter ``raw_inverse_lipschitz``."""

    trained: NonNegative | None
    _configured: float | None = None  # L as it was constructed, until another one is assigned or loaded
    _constant_to_come: Tensor  # L while its place is on the meta device

    def _construct_constant(self, value: float | Tensor | Trained, device: Any, dtype: torch.dtype) -> None:
        constant = torch.empty(1, device=device, dtype=torch.promote_types(dtype, torch.float32))
        if isinstance(value, Trained):
            self.trained = as_nonnegative(value.nonneg)
            self.raw_inverse_lipschitz = nn.Parameter(constant)
            self.inverse_lipschitz = value.initial
        else:
            self.trained = None
            # register_buffer refuses a name that is a property
            self._buffers["inverse_lipschitz"] = constant
            if isinstance(value, Tensor) and value.numel() == 1:
                value = float(value)
            self.inverse_lipschitz = value
            self._configured = float(value)

    @property
    def inverse_lipschitz(self) -> Tensor:
        """L (1,), non-negative. Assigning a number or a tensor with one element fills it in place."""
        if self.trained is not None:
            return self.trained(self.raw_inverse_lipschitz)
        constant = self._buffers["inverse_lipschitz"]
        assert constant is not None
        return constant

    @inverse_lipschitz.setter
    def inverse_lipschitz(self, value: float | Tensor) -> None:
        raise AssertionError("unreachable: __setattr__ takes it")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "inverse_lipschitz":  # nn.Module would refuse a number for a buffer
            self._configured = None
            if torch.compiler.is_compiling():
                # not below: an error in a compiled region's no_grad would leave gradients off
                value = value if isinstance(value, Tensor) else as_constant(check_inverse_lipschitz(value))
                assert_constant(value, positive=self.trained is not None)
            self._fill_inverse_lipschitz(value)
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def _fill_inverse_lipschitz(self, value: float | Tensor) -> None:
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"inverse_lipschitz: got shape {tuple(value.shape)}, wanted one element")
            value = value.detach().reshape(1)
            if (
                type(value) is Tensor and value.is_cpu and not torch.compiler.is_compiling()
            ):  # reading it elsewhere would wait for the device
                check_inverse_lipschitz(value.item())
        else:
            value = check_inverse_lipschitz(value.item() if isinstance(value, np.generic) else value)
            value = as_constant(value)
        name, store = self._constant_slot()
        if getattr(self, "_is_replica", False):  # of DataParallel: its tensors may be those of the original
            self._replace_in_replica(name, value)
            return
        if name not in store:
            raise ValueError(f"inverse_lipschitz: {name} is parametrised; assign to the parameters it is made from")
        if store[name].is_meta and not value.is_meta:
            self._constant_to_come = value
        filling = value if self.trained is None else self.trained.raw(value)
        eager = type(filling) is Tensor and filling.is_cpu and not torch.compiler.is_compiling()
        if self.trained is not None and eager and not filling.isfinite():
            raise ValueError(f"inverse_lipschitz: got {value.item()}, wanted a number > 0 for a trained constant")
        store[name].copy_(filling)

    def _replace_in_replica(self, name: str, value: Tensor) -> None:
        """Give a replica an L of its own. Its parameters are attributes; torch keeps them in no dictionary."""
        place: dict[str, Any] = self._buffers if self.trained is None else self.__dict__
        before = place[name]
        place[name] = (value if self.trained is None else self.trained.raw(value)).to(before.device, before.dtype)

    def _constant_slot(self) -> tuple[str, dict[str, Any]]:
        """Return where L or its raw parameter is kept: its name, and the parameters or buffers."""
        if self.trained is None:
            return "inverse_lipschitz", self._buffers
        return "raw_inverse_lipschitz", self._parameters

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        name, store = self._constant_slot()
        if name not in store:  # parametrised: made from other parameters, which move by themselves
            super()._apply(fn, recurse)
            return self
        # detached: what moves replaces the data of the tensors themselves
        before, gradient = store[name].detach(), store[name].grad
        gradient = None if gradient is None else gradient.detach()
        super()._apply(fn, recurse)
        after = store[name]
        # a constant of the guarantee is not rounded to the dtype of the layer
        if torch.promote_types(after.dtype, torch.float32) != after.dtype:
            kept = before.to(after.device)
            if self.trained is None:
                store[name] = kept
            else:
                after.grad = None
                after.data = kept
                after.grad = None if gradient is None else gradient.to(after.device)
        if store[name].is_meta and not before.is_meta:
            self._constant_to_come = before if self.trained is None else self.trained(before)
        elif before.is_meta and not store[name].is_meta:  # to_empty: L is no weight that reset_parameters draws
            self._fill_inverse_lipschitz(self._constant_to_come)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *rest: Any) -> None:
        name, store = self._constant_slot()
        given = state_dict.get(prefix + name)
        if (refusal := _refusal(prefix + name, given, self.trained)) is not None:
            errors = rest[-1]
            errors.append(refusal)
            # what is there already stays: torch copies a whole state before it raises the errors
            state_dict = {key: value for key, value in state_dict.items() if key != prefix + name}
            missing: list[str] = []
            super()._load_from_state_dict(state_dict, prefix, metadata, rest[0], missing, *rest[2:])
            return
        warn_of_other_constants({f"{prefix}inverse_lipschitz": self}, state_dict)
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)
        if not metadata.get("assign_to_params_buffers") or given is None or name not in store:
            return
        dtype = torch.promote_types(given.dtype, torch.float32)
        if self.trained is None:  # what torch assigned, __setattr__ has filled in
            self._buffers[name] = given.to(dtype)
        else:
            store[name].data = store[name].data.to(dtype)

    def _constant_repr(self) -> str:
        if self.trained is not None:
            return "trained"
        constant = self.inverse_lipschitz
        return "meta" if constant.is_meta else f"{constant.item():g}"


def _refusal(name: str, given: Any, trained: NonNegative | None) -> str | None:
    """Say why a loaded L, or its raw parameter, cannot be one; None if it can, or cannot be read here."""
    if not isinstance(given, Tensor) or given.numel() != 1 or not given.is_cpu or not given.is_floating_point():
        return None
    value = given.item()
    if trained is not None:
        return None if math.isfinite(value) else f"{name}: got {value}, wanted a finite number"
    return None if 0 <= value < math.inf else f"{name}: got {value}, wanted a finite number >= 0"


def accept_constants(model: nn.Module) -> None:
    """Let the next state that ``model`` loads bring other constants than those of its construction, without a warning.

    This is for a state of the same configuration, whose constants a schedule may have moved.
    """
    for module in model.modules():
        if isinstance(module, WithConstant):
            module._configured = None


def warn_of_other_constants(maps: Mapping[str, WithConstant], state: Mapping[str, Any]) -> None:
    """Warn, once for all ``maps``, of constants in ``state`` that differ from those of their construction.

    Args:
        maps: by the names of their constants in ``state``. A map that was assigned a constant since its construction,
            as schedules do, differs for a reason.
        state: about to be loaded.
    """
    others = []
    for name, brenier_map in maps.items():
        configured, loaded = brenier_map._configured, state.get(name)
        if configured is None or not isinstance(loaded, Tensor) or loaded.is_meta or loaded.numel() != 1:
            continue
        value = float(loaded)
        rounding = torch.finfo(loaded.dtype).eps if loaded.is_floating_point() else 0.0
        if not math.isclose(value, configured, rel_tol=max(rounding, 1e-6)):  # L itself may be kept in float32
            brenier_map._configured = None
            others.append(f"{name} = {value:g}, constructed as {configured:g}")
    if others:
        warnings.warn(
            f"the loaded state has {'; '.join(others)}. What was loaded is in force: assign inverse_lipschitz after "
            "loading for another",
            UserWarning,
            stacklevel=2,
        )
