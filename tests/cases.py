"""Random problems for the property tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from ilvae_fast import Activation, BrenierMap, functional, reference

FIRST = ("softplus", "leaky_relu", "celu", "smooth_leaky_relu", "squared_leaky_relu", "identity", "relu")
LATER = tuple(name for name in FIRST if name != "squared_leaky_relu")
SMOOTH = ("softplus", "smooth_leaky_relu")
EMBEDDINGS = ("none", "identity", "dense")
WAYS = (("auto", None), ("matmul", False), ("matmul", True), ("fused", False), ("fused", True))  # route, recompute
NONNEG = ("softplus", "exp", "clamp", "abs", "square", "none")


@dataclass(frozen=True)
class Case:
    """The shape of a problem; tensors follow from the seed."""

    width: int
    hidden: tuple[int, ...]
    activations: tuple[Activation, ...]
    embedding: str
    leading: tuple[int, ...]
    constant: float
    seed: int
    route: str = "auto"
    recompute: bool | None = None

    @property
    def input(self) -> int:
        return self.width if self.embedding == "none" else max(1, self.width // 2)

    def tensors(self, dtype: torch.dtype) -> Tensors:
        """Tensors rounded to ``dtype``, with initial weights scaled up a little so that curvature matters."""
        torch.manual_seed(self.seed)
        layer = BrenierMap(self.width, self.hidden, dtype=torch.float64)
        weights = [w.detach() * 1.5 for w in layer.nonneg_weights()]
        bias = layer.bias.detach() + 0.3 * torch.randn_like(layer.bias)
        skip = layer.skip_weight.detach() + 0.1 * torch.randn_like(layer.skip_weight)
        x = torch.randn((*self.leading, self.input), dtype=torch.float64)
        embedding = torch.randn(self.width, self.input, dtype=torch.float64) if self.embedding == "dense" else None
        u = torch.randn(self.leading, dtype=torch.float64)
        v = torch.randn((*self.leading, self.width), dtype=torch.float64)
        constant = torch.tensor([self.constant], dtype=torch.promote_types(dtype, torch.float32))
        named = {"x": x, "skip_weight": skip, "bias": bias, "inverse_lipschitz": constant}
        if embedding is not None:
            named["embedding"] = embedding
        named |= {f"weights[{k}]": w for k, w in enumerate(weights)}
        return Tensors(
            self,
            {n: t if n == "inverse_lipschitz" else t.to(dtype) for n, t in named.items()},
            u.to(dtype),
            v.to(dtype),
        )


@dataclass
class Tensors:
    case: Case
    named: dict[str, Tensor]  # in the order of gradients
    u: Tensor
    v: Tensor

    def double(self) -> Tensors:
        return Tensors(
            self.case,
            {n: t.detach().double() for n, t in self.named.items()},
            self.u.double(),
            self.v.double(),
        )

    def to(self, device: str | torch.device) -> Tensors:
        """Detached copies on a device."""
        named = {n: t.detach().to(device) for n, t in self.named.items()}
        return Tensors(self.case, named, self.u.to(device), self.v.to(device))

    def requires_grad(self) -> Tensors:
        for t in self.named.values():
            t.requires_grad_()
        return self

    def positional(self) -> tuple:
        weights = [t for n, t in self.named.items() if n.startswith("weights")]
        return self.named["x"], self.named["skip_weight"], self.named["bias"], weights

    def options(self, module=functional) -> dict:
        """The keyword arguments that all functions of ``module`` share."""
        embedding = {"none": None, "identity": self.case.width}.get(self.case.embedding, self.named.get("embedding"))
        return {
            "activations": self.case.activations,
            "inverse_lipschitz": self.named["inverse_lipschitz"],
            "embedding": embedding,
            **({"route": self.route()} if module is functional else {}),
        }

    def differentiable_options(self, module) -> dict:
        return {**self.options(module), **({"recompute": self.case.recompute} if module is functional else {})}

    def route(self) -> str:
        """The route of the case; bfloat16 has only one on the CPU."""
        return "auto" if self.u.dtype == torch.bfloat16 and self.u.is_cpu else self.case.route

    def outputs(self, module=functional) -> tuple[Tensor, Tensor]:
        return module.potential_and_map(*self.positional(), **self.differentiable_options(module))

    def gradients(self, module, with_map: bool, with_potential: bool) -> dict[str, Tensor]:
        """All gradients by autograd through ``module``."""
        self.requires_grad()
        if with_map and with_potential:
            phi, t = self.outputs(module)
            loss = (self.v * t).sum() + (self.u * phi).sum()
        elif with_map:
            loss = (self.v * module.brenier_map(*self.positional(), **self.differentiable_options(module))).sum()
        else:
            loss = (self.u * module.potential(*self.positional(), **self.differentiable_options(module))).sum()
        gradients = torch.autograd.grad(loss, list(self.named.values()), allow_unused=True)
        return {
            n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(self.named.items(), gradients, strict=True)
        }

    def rearranged(self, seed: int) -> tuple[Tensors, Callable[[dict[str, Tensor]], dict[str, Tensor]]]:
        """The same network with its hidden units and the coordinates of x and of the map permuted, and a function that
        restores the order of gradients and of a "map".

        Mathematically nothing changes; in floating point this is another draw of the rounding errors.
        """
        generator = torch.Generator().manual_seed(seed)

        def order(n: int) -> Tensor:
            return torch.randperm(n, generator=generator)

        orders = [order(n) for n in self.case.hidden]
        starts = [sum(self.case.hidden[:k]) for k in range(len(orders))]
        units = torch.cat(
            [o + s for o, s in zip(orders, starts, strict=True)] + [torch.tensor([sum(self.case.hidden)])]
        )
        rows = [*orders[1:], torch.tensor([0])]
        width, inputs = self.case.width, self.named["x"].shape[-1]
        x_order = order(inputs)
        map_order = order(width)
        if self.case.embedding != "dense":  # the first coordinates of the map are those of x
            map_order = torch.cat([x_order, inputs + order(width - inputs)])

        def reorder(named: dict[str, Tensor], invert: bool) -> dict[str, Tensor]:
            def index(order: Tensor) -> Tensor:
                return order.argsort() if invert else order

            result = {name: tensor.detach() for name, tensor in named.items()}
            for name in ("skip_weight", "bias"):
                if name in named:
                    result[name] = result[name][index(units)]
            for name, coordinates in (
                ("x", x_order),
                ("skip_weight", map_order),
                ("embedding", x_order),
                ("map", map_order),
            ):
                if name in named:
                    result[name] = result[name][..., index(coordinates)]
            if "embedding" in named:
                result["embedding"] = result["embedding"][index(map_order)]
            for k, (row, column) in enumerate(zip(rows, orders, strict=True)):
                if f"weights[{k}]" in named:
                    result[f"weights[{k}]"] = result[f"weights[{k}]"][index(row)][:, index(column)]
            return result

        other = Tensors(self.case, reorder(self.named, False), self.u, self.v[..., map_order])
        return other, lambda g: reorder(g, True)

    def absolute_terms(self, with_map: bool, with_potential: bool) -> dict[str, Tensor]:
        """For each gradient, the absolute contributions of the rows, summed in float64."""
        double = self.double()
        u = double.u.flatten()
        x, v = double.named["x"].reshape(u.numel(), self.case.input), double.v.reshape(u.numel(), self.case.width)
        parameters = {n: t for n, t in double.named.items() if n != "x"}

        def loss(parameters: dict[str, Tensor], x: Tensor, u: Tensor, v: Tensor) -> Tensor:
            phi, t = Tensors(self.case, {"x": x, **parameters}, u, v).outputs(reference)
            return with_map * (v * t).sum() + with_potential * (u * phi)

        if u.numel() == 0:
            return {n: torch.zeros_like(t) for n, t in parameters.items()}
        per_row = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, x, u, v)
        return {n: t.abs().sum(0) for n, t in per_row.items()}


SMALL = Case(3, (4, 5), tuple(map(Activation, ("softplus", "celu", "softplus"))), "none", (6,), 0.5, 11)


def activations(draw, depth: int, names_first, names_later) -> tuple[Activation, ...]:
    def one(names) -> Activation:
        name = draw(st.sampled_from(names))
        parameter = {
            "softplus": st.sampled_from([0.5, 1.0, 5.0]),
            "celu": st.sampled_from([0.5, 1.0, 2.0]),
        }.get(name, st.sampled_from([0.0, 0.2, 1.0]) if "leaky" in name else st.none())
        return Activation(name, draw(parameter))

    return (one(names_first), *(one(names_later) for _ in range(depth)))


@st.composite
def cases(
    draw,
    max_depth: int = 8,
    max_width: int = 12,
    first=FIRST,
    later=LATER,
    embeddings=EMBEDDINGS,
    empty: bool = True,
    constants=(0.0, 0.3, 1.0, 5.0),
    leading=None,
) -> Case:
    depth = draw(st.integers(1, max_depth))
    route, recompute = draw(st.sampled_from(WAYS))
    sizes = st.integers(0 if empty else 1, 5)
    return Case(
        width=draw(st.integers(1, max_width)),
        hidden=tuple(draw(st.lists(st.integers(1, max_width), min_size=depth, max_size=depth))),
        activations=activations(draw, depth, first, later),
        embedding=draw(st.sampled_from(embeddings)),
        leading=tuple(draw(st.lists(sizes, max_size=3))) if leading is None else leading,
        constant=draw(st.sampled_from(constants)),
        seed=draw(st.integers(0, 2**16)),
        route=route,
        recompute=recompute,
    )
