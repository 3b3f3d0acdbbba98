"""Schedules for the inverse-Lipschitz constants and the KL weight of a model, written into its tensors in place.

    schedules = {"L1": Linear(start=2.0, end=1.0, steps=1000), "kl_weight": Cyclical(0.0, 1.0, period=500)}
    annealer = Annealer(model, schedules)
    for x in batches:
        ...
        optimizer.step()
        annealer.step()

The idea of annealing L: start high, so that the latent is used, and relax to the target. A value is a function of the
number of steps alone and fills a tensor that is there already: nothing is compiled anew, all processes of a distributed
run agree, and a checkpoint needs no more than the number (:meth:`Annealer.state_dict`).
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ._support.checks import check_number, check_positive
from ._support.errors import unknown_name
from ._support.options import build
from .layers import BrenierDecoder, BrenierMap


class Schedule(ABC):
    """A value that depends on the step, counted from 0. To add one, put it into ``SCHEDULES``."""

    @abstractmethod
    def value(self, step: int) -> float:
        """The value in force at ``step``."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.type == "int":
                object.__setattr__(self, field.name, check_positive(field.name, value))
            elif field.type == "float":
                check_number(field.name, value)


@dataclass(frozen=True)
class Constant(Schedule):
    """Always ``start``."""

    start: float

    def value(self, step: int) -> float:
        return self.start


@dataclass(frozen=True)
class Linear(Schedule):
    """From ``start`` to ``end`` on a line over ``steps``, then ``end``."""

    start: float
    end: float
    steps: int

    def value(self, step: int) -> float:
        return _mix(self.start, self.end, step / self.steps)


@dataclass(frozen=True)
class Cosine(Schedule):
    """From ``start`` to ``end`` along half a period of a cosine over ``steps``, then ``end``."""

    start: float
    end: float
    steps: int

    def value(self, step: int) -> float:
        return _mix(self.start, self.end, 0.5 * (1 - math.cos(math.pi * min(1.0, step / self.steps))))


@dataclass(frozen=True)
class Cyclical(Schedule):
    """Again and again from ``start`` to ``end``: a line over the first half of each ``period``, then ``end``.

    Source: Fu et al., NAACL 2019, with their proportion of one half.
    """

    start: float
    end: float
    period: int

    def value(self, step: int) -> float:
        return _mix(self.start, self.end, 2 * (step % self.period) / self.period)


@dataclass(frozen=True)
class Piecewise(Schedule):
    """On lines between ``points``, pairs (step, value) in the order of steps; constant before and after them."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        try:
            points = tuple((step, value) for step, value in self.points)
        except (TypeError, ValueError):
            points = ()
        for pair in points:
            for number in pair:
                check_number("points", number)
        if not points or any(a >= b for (a, _), (b, _) in pairwise(points)):
            raise ValueError(f"points: got {self.points!r}, wanted pairs (step, value) with growing steps")
        object.__setattr__(self, "points", points)

    def value(self, step: int) -> float:
        if step <= self.points[0][0]:
            return self.points[0][1]
        for (a, at_a), (b, at_b) in pairwise(self.points):
            if step <= b:
                return _mix(at_a, at_b, (step - a) / (b - a))
        return self.points[-1][1]


def _mix(start: float, end: float, part: float) -> float:
    return end if part >= 1 else start + (end - start) * part


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "cyclical": Cyclical,
    "piecewise": Piecewise,
}


def as_schedule(value: Schedule | float | Mapping[str, Any]) -> Schedule:
    """A schedule from itself, from a number, or from what YAML holds: ``{"kind": "linear", "start": 2, ..}``.

    Raises:
        ValueError, TypeError: unknown kind or option, with the nearest one; a bad value.
    """
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, Mapping):
        return Constant(value)
    options = dict(value)
    kind = options.pop("kind", None)
    if kind not in SCHEDULES:
        raise unknown_name("kind", kind, SCHEDULES)
    return build(f"option of {kind}", SCHEDULES[kind], options)


class Annealer:
    """Writes the values of schedules into a model, at once and at each :meth:`step`.

    Args:
        model: a :class:`ilvae_fast.vae.VAE`, or any module with a :class:`ilvae_fast.BrenierDecoder` inside (for L1
            and L2) or a buffer ``kl_weight``.
        schedules: by the name of what they drive: ``"L1"``, ``"L2"`` (the constants of the decoder's two maps) and
            ``"kl_weight"``; each as :func:`as_schedule` takes it.

    Raises:
        ValueError, TypeError: no mapping; an unknown name; a model without the tensor in question, or with a trained
            constant.
    """

    def __init__(self, model: nn.Module, schedules: Mapping[str, Schedule | float | Mapping[str, Any]]) -> None:
        self.steps = torch.zeros((), dtype=torch.long)
        fillers = _fillers(model)
        if not isinstance(schedules, Mapping):
            raise TypeError(f"schedules: got {type(schedules).__name__}, wanted schedules by name")
        for name in schedules:
            if name not in ("L1", "L2", "kl_weight"):
                raise unknown_name("schedules", name, ("L1", "L2", "kl_weight"))
            if name not in fillers:
                wanted = (
                    "a buffer kl_weight" if name == "kl_weight" else "a BrenierDecoder whose constants are no Trained"
                )
                raise ValueError(f"schedules: got {name!r} for a model without {wanted}")
        self._driven = [(name, as_schedule(schedule), fillers[name]) for name, schedule in schedules.items()]
        self._fill()

    def step(self) -> None:
        """Count a step and write the values that hold from now on."""
        self.steps += 1
        self._fill()

    def values(self) -> dict[str, float]:
        """What is in force now, by name."""
        return {name: schedule.value(int(self.steps)) for name, schedule, _ in self._driven}

    def state_dict(self) -> dict[str, Tensor]:
        """The number of steps."""
        return {"steps": self.steps.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a :meth:`state_dict`: the values of its step are written at once."""
        self.steps.copy_(state["steps"])
        self._fill()

    def _fill(self) -> None:
        for _, schedule, fill in self._driven:
            fill(schedule.value(int(self.steps)))


def _fillers(model: nn.Module) -> dict[str, Callable[[float], Any]]:
    """How to write each tensor that the model has and a schedule may drive."""
    fillers: dict[str, Callable[[float], Any]] = {}
    if isinstance(getattr(model, "kl_weight", None), Tensor):
        fillers["kl_weight"] = partial(_fill_kl_weight, model)
    decoder = next((module for module in model.modules() if isinstance(module, BrenierDecoder)), None)
    if decoder is not None:
        for name, brenier_map in (("L1", decoder.latent_map), ("L2", decoder.data_map)):
            if brenier_map.trained is None:
                fillers[name] = partial(_fill_constant, brenier_map)
    return fillers


def _fill_kl_weight(model: nn.Module, value: float) -> None:
    weight = model.kl_weight  # looked up anew: .to() replaces the tensor
    assert isinstance(weight, Tensor)
    weight.fill_(value)


def _fill_constant(brenier_map: BrenierMap, value: float) -> None:
    brenier_map.inverse_lipschitz = value
