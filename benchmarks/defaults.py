"""Which defaults fit best? One factor at a time around the chosen set, and that set against an MLP of its size.

    python -m benchmarks.defaults --data-root DATA            # hours on two cores; goes on where it was
    python -m benchmarks.defaults --data-root DATA --only "MNIST 3000" --seed 0
    python -m benchmarks.defaults --table                     # the tables from the recorded runs alone

Defaults are chosen on validation data, by the worst regret over tasks: what the loss exceeds the best set's by, as a
part of the MLP's gain over a model that ignores the latent (of maps: the ratio of errors). Test data are for the
report.
Writes ``results/defaults.json`` after each run and ``results/defaults.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ilvae_fast as il
from benchmarks import fits
from benchmarks.fits import Task
from benchmarks.record import RESULTS, provenance, write
from ilvae_fast._support.files import write_atomically
from ilvae_fast.vae import VAE

NAME = "defaults"
SEEDS = (0, 1, 2)
TASKS: dict[str, Task] = {
    "MNIST 3000, Gaussian": Task(
        "mnist", 3000, 1000, "gaussian", 10, 30, (256, 256), (704, 704), {"scale": 0.3}, constant=0.25,
    ),
    "Fashion-MNIST 3000, Gaussian": Task(
        "fashion_mnist", 3000, 1000, "gaussian", 10, 30, (256, 256), (704, 704), {"scale": 0.3},
    ),
    "digits, Gaussian": Task("digits", 1200, 238, "gaussian", 20, 250, (128, 128), (512, 512), {"scale": 0.5}),
    "words, Poisson": Task("words", 2200, 531, "poisson", 10, 40, (128, 128), (512, 512)),
    "MNIST 3000, Bernoulli": Task("mnist", 3000, 1000, "bernoulli", 20, 30, (256, 256), (704, 704)),
    "synthetic text": Task(
        "synthetic_text", 6000, 1000, "categorical", 10, 6, (50,), (1024,), {"num_categories": 1000},
        model="il-lidsvae", importance_samples=20,
    ),
    "MNIST 20 000, Bernoulli": Task(
        "mnist", 20000, 1000, "bernoulli", 20, 15, (512, 256), (704, 704), constant=1.0, cosine=True,
    ),
    "MNIST 20 000, Bernoulli, rate 3e-3": Task(
        "mnist", 20000, 1000, "bernoulli", 20, 15, (512, 256), (704, 704), constant=1.0, cosine=True, rate=3e-3,
    ),
}  # fmt: skip
PAIRS = {"transport, d = 2": 2, "transport, d = 16": 16}  # of the Wasserstein-2 benchmark of Korotin et al. (2021)


@dataclass(frozen=True)
class Decoder:
    """Options of :class:`ilvae_fast.vae.VAEConfig`, and of its decoder, besides or instead of the defaults.

    by_variance: coordinates of the data in the order of their variance, the largest first, which no likelihood minds.
    """

    fields: Mapping[str, Any]
    options: Mapping[str, Any]
    initialize: bool = True
    by_variance: bool = False

    @classmethod
    def of(
        cls,
        initialize: bool = True,
        embedding: str | None = None,
        widths: Any = None,
        by_variance: bool = False,
        **options: Any,
    ) -> Decoder:
        fields = {"embedding": embedding, "decoder_hidden": widths}
        given = {name: value for name, value in fields.items() if value is not None}
        return cls(given, options, initialize, by_variance)


def _softplus(beta: float) -> il.Activation:
    return il.Activation("softplus", beta)


# what is set otherwise than by default; the earlier defaults as they were, but for the initial weights
DECODERS: dict[str, Decoder | None] = {
    "MLP": None,
    "default": Decoder.of(),
    "earlier defaults": Decoder.of(
        embedding="identity", activation="softplus", nonneg="softplus", initialization="random", initialize=False
    ),
    "not started from data": Decoder.of(initialize=False),
    "identity embedding": Decoder.of(embedding="identity"),
    "identity embedding, coordinates by variance": Decoder.of(embedding="identity", by_variance=True),
    "full_rank embedding": Decoder.of(embedding="full_rank"),
    "softplus(1)": Decoder.of(activation=_softplus(1)),
    "softplus(5)": Decoder.of(activation=_softplus(5)),
    "softplus(20)": Decoder.of(activation=_softplus(20)),
    "celu": Decoder.of(activation="celu"),
    "squared, then leaky_relu": Decoder.of(activation="leaky_relu", first_activation="squared_leaky_relu"),
    "softplus weights": Decoder.of(nonneg="softplus"),
    "exp weights": Decoder.of(nonneg="exp"),
    "square weights": Decoder.of(nonneg="square"),
    "random start": Decoder.of(initialization="random"),
    "widths 64x2, 256x2": Decoder.of(widths=((64, 64), (256, 256))),
    "widths 128x2, 512": Decoder.of(widths=((128, 128), (512,))),
}
FINALISTS = ("MLP", "default")  # with all seeds, on all tasks
FACTORS = ("MNIST 3000, Gaussian", "digits, Gaussian", "words, Poisson")
RIVALS = ("full_rank embedding", "softplus(5)", "square weights")  # within a few percent at seed 0: with all seeds, too
MAPS: dict[str, dict[str, Any]] = {
    "default": {},
    "earlier defaults": {"activation": "softplus", "nonneg": "softplus"},
    "softplus(1)": {"activation": _softplus(1)},
    "softplus(5)": {"activation": _softplus(5)},
    "softplus(20)": {"activation": _softplus(20)},
    "celu": {"activation": "celu"},
    "squared, then leaky_relu": {"activation": "leaky_relu", "first_activation": "squared_leaky_relu"},
    "softplus weights": {"nonneg": "softplus"},
    "exp weights": {"nonneg": "exp"},
    "square weights": {"nonneg": "square"},
    "identity start": {"initialization": "identity"},
}


def fit_decoder(name: str, variant: str, seed: int, data_root: str | None) -> dict[str, Any]:
    """Train one decoder on one task, and measure it."""
    torch.set_num_threads(1)
    task, chosen = TASKS[name], DECODERS[variant]
    parts = fits.load(task, data_root)
    if chosen is not None and chosen.by_variance:
        order = parts.fit.var(0).argsort(descending=True)
        parts = fits.Parts(*(part[:, order] for part in vars(parts).values()))
    constant = fits.advised(task, parts)
    fields: dict[str, Any] = {"decoder": "mlp"} if chosen is None else dict(chosen.fields)
    if chosen is not None and chosen.options:
        fields["decoder_options"] = chosen.options
    torch.manual_seed(seed)
    model = VAE(fits.configuration(task, parts, constant, **fields))
    if chosen is not None and chosen.initialize:
        model.initialize(parts.fit)
    milliseconds = fits.fit(model, parts.fit, task)
    measured = {
        part: fits.measure(model, x, parts.fit, task.importance_samples)
        for part, x in (("validation", parts.validation), ("test", parts.test))
    }
    return {
        "L": None if chosen is None else constant, "parameters_of_decoder": fits.parameters([model.decoder]),
        "step_ms": round(milliseconds, 2), **measured,
    }  # fmt: skip


class Pair:
    """A source, and the map that transports it, of the Wasserstein-2 benchmark (Korotin et al., NeurIPS 2021)."""

    def __init__(self, width: int, data_root: str | None) -> None:
        with np.load(Path(data_root or "data") / "w2_benchmark" / f"pair_{width}.npz", allow_pickle=False) as archive:
            self.arrays = {name: torch.from_numpy(archive[name]) for name in archive.files}

    def sample(self, count: int) -> Tensor:
        centres, factors, scale = (self.arrays[name].float() for name in ("centers", "factors", "std"))
        component = torch.randint(len(centres), (count,))
        noise = torch.randn(count, centres.shape[1])
        return centres[component] + scale * torch.einsum("nij,nj->ni", factors[component], noise)

    def true_map(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.double().requires_grad_()
            potentials = [self._potential(f"potential{k}", x) for k in (1, 2)]
            psi = self.arrays["scale"] * (sum(potentials) + x @ self.arrays["shift"].double())
            return torch.autograd.grad(psi.sum(), x)[0].float()

    def _potential(self, prefix: str, x: Tensor) -> Tensor:
        def get(name: str) -> Tensor:
            return self.arrays[f"{prefix}.{name}"].double()

        inputs = []
        for k in range(3):
            layer = f"quadratic_layers.{k}"
            square = (x @ get(f"{layer}.quadratic_decomposed")[:, 0, :]).square()
            inputs.append(square + x @ get(f"{layer}.weight").T + get(f"{layer}.bias"))
        h = inputs[0]
        for k in (1, 2):
            h = F.celu(h @ get(f"convex_layers.{k - 1}.weight").T + inputs[k])
        return (h @ get("final_layer.weight").T).squeeze(-1) + 0.005 * x.square().sum(-1)


def fit_map(name: str, variant: str, seed: int, data_root: str | None) -> dict[str, Any]:
    """Fit the true map by least squares, which leaves representation and training of one map alone."""
    torch.set_num_threads(1)
    width = PAIRS[name]
    pair = Pair(width, data_root)
    hidden = (64, 64) if width == 2 else (128, 128)
    result: dict[str, dict[str, float]] = {}
    for rate in (1e-3, 1e-2):
        torch.manual_seed(seed)
        x, held = pair.sample(20000), pair.sample(4096)
        y, held_y = pair.true_map(x), pair.true_map(held)
        layer: nn.Module = il.BrenierMap(width, hidden, inverse_lipschitz=0.1, **MAPS[variant])
        optimizer = torch.optim.Adam(layer.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps := 1500)
        for _ in range(steps):
            rows = torch.randint(len(x), (256,))
            optimizer.zero_grad()
            (layer(x[rows]) - y[rows]).square().sum(-1).mean().backward()
            optimizer.step()
            schedule.step()
        scale = 100 / float(pair.arrays["output_variance"])
        with torch.no_grad():
            for part, a, b in (
                ("validation", held, held_y), ("test", pair.arrays["x"].float(), pair.arrays["y"].float())
            ):  # fmt: skip
                result.setdefault(part, {})[f"error_percent_at_rate_{rate:g}"] = scale * float(
                    (layer(a) - b).square().sum(-1).mean()
                )
    return result


Job: TypeAlias = "tuple[Callable[..., dict[str, Any]], str, str, int]"  # and task, variant, seed


def jobs(seeds: Sequence[int], only: Sequence[str]) -> list[Job]:
    """All runs, in the order of what one wants to know first."""
    rest = [variant for variant in DECODERS if variant not in FINALISTS]
    found: list[Job] = [(fit_decoder, name, variant, seeds[0]) for name in TASKS for variant in FINALISTS]
    found += [(fit_map, name, variant, seed) for seed in seeds for name in PAIRS for variant in MAPS]
    found += [(fit_decoder, name, variant, seeds[0]) for name in FACTORS for variant in rest]
    found += [(fit_decoder, name, variant, seed) for seed in seeds[1:] for name in TASKS for variant in FINALISTS]
    found += [(fit_decoder, name, variant, seed) for seed in seeds[1:] for name in FACTORS for variant in RIVALS]
    return [job for job in found if not only or any(part in job[1] for part in only)]


def _key(name: str, variant: str, seed: int) -> str:
    return f"{name} / {variant} / seed {seed}"


def study(data_root: str | None, seeds: Sequence[int], only: Sequence[str], workers: int) -> dict[str, Any]:
    """All runs that are not recorded yet, ``workers`` at a time; the record is written after each."""
    path = RESULTS / f"{NAME}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"runs": {}}
    waiting = [job for job in jobs(seeds, only) if _key(*job[1:]) not in result["runs"]]
    result["tasks"] = {name: json.loads(json.dumps(vars(task), default=dict)) for name, task in TASKS.items()}
    origin, start = provenance(), time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(job[0], *job[1:], data_root): job[1:] for job in waiting}
        for done, future in enumerate(as_completed(running), 1):
            name, variant, seed = running[future]
            result["runs"][_key(name, variant, seed)] = {**future.result(), "commit": origin["commit"]}
            write(NAME, {**result, **origin})
            minutes = (time.perf_counter() - start) / 60
            print(f"{done}/{len(running)}, {minutes:.0f} min: {_key(name, variant, seed)}", flush=True)
    return result


def _collect(result: Mapping[str, Any], name: str, variant: str, part: str, measure: str) -> list[float]:
    found = [run for key, run in result["runs"].items() if key.startswith(f"{name} / {variant} / seed ")]
    return [run[part][measure] for run in found if measure in run[part]]


def _mean(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def tables(result: Mapping[str, Any]) -> str:
    """The study as a page."""
    lines = [
        "# Defaults by measurement",
        "",
        f"From `results/{NAME}.json`, by `python -m benchmarks.defaults`, of whose {len(jobs(SEEDS, ()))} runs "
        f"{sum(_key(*job[1:]) in result['runs'] for job in jobs(SEEDS, ()))} are recorded. Losses in nats for a datum, "
        "lower is better; means, and standard errors where there are several seeds.",
        "",
        "## The default decoder and an MLP of its size, on test data",
        "",
        _row(["task", "L", "MLP: -ELBO", "default: -ELBO", "MLP: NLL", "default: NLL", "without latent", "gain lost",
              "directions (MLP)"]),
        _row(["---"] * 9),
    ]  # fmt: skip
    for name in TASKS:
        mlp, ours = (partial(_collect, result, name, variant, "test") for variant in FINALISTS)
        if not ours("nll"):
            continue
        constants = [r["L"] for k, r in result["runs"].items() if k.startswith(f"{name} / default")]
        ignoring = mlp("ignoring")
        lost = ""
        if ignoring and mlp("nll"):
            gain = statistics.mean(ignoring) - statistics.mean(mlp("nll"))
            lost = f"{100 * (statistics.mean(ours('nll')) - statistics.mean(mlp('nll'))) / gain:+.1f} %"
        directions = f"{_mean(ours('active_directions'), 1)} ({_mean(mlp('active_directions'), 1)})"
        lines.append(_row([
            name, f"{constants[0]:g}", _mean(mlp("negative_elbo")), _mean(ours("negative_elbo")), _mean(mlp("nll")),
            _mean(ours("nll")), f"{ignoring[0]:.2f}" if ignoring else "", lost, directions,
        ]))  # fmt: skip
    lines += [
        "", "## One factor at a time, on validation data", "",
        "NLL: the mean of three seeds where a standard error stands beside it, else of seed 0. The regret is the worst "
        "over the tasks, as a part of the MLP's gain.", "",
        _row(["decoder", *FACTORS, "worst regret"]), _row(["---"] * (len(FACTORS) + 2)),
    ]  # fmt: skip
    losses = {v: {t: _collect(result, t, v, "validation", "nll") for t in FACTORS} for v in DECODERS}
    best = {
        t: min((statistics.mean(losses[v][t]) for v in DECODERS if v != "MLP" and losses[v][t]), default=0.0)
        for t in FACTORS
    }
    for variant, of_task in losses.items():
        if not any(of_task.values()):
            continue
        regrets = []
        for t, values in of_task.items():
            ignoring = _collect(result, t, "MLP", "validation", "ignoring")
            if values and ignoring and losses["MLP"][t]:
                gain = statistics.mean(ignoring) - statistics.mean(losses["MLP"][t])
                regrets.append((statistics.mean(values) - best[t]) / gain)
        cells = [_mean(values) for values in of_task.values()]
        lines.append(_row([variant, *cells, f"{100 * max(regrets):.1f} %" if len(regrets) == len(FACTORS) else ""]))
    rates = ("0.001", "0.01")
    heads = [f"{name}, rate {rate}" for name in PAIRS for rate in rates]
    lines += [
        "", "## One map, fitted to the true transport map by least squares, on validation data", "",
        "Error in percent of the target's variance; the regret is the worst ratio to the best.", "",
        _row(["map", *heads, "worst regret"]), _row(["---"] * (len(heads) + 2)),
    ]  # fmt: skip
    errors = {
        v: [
            _collect(result, name, v, "validation", f"error_percent_at_rate_{rate}") for name in PAIRS for rate in rates
        ]
        for v in MAPS
    }
    lowest = [min((statistics.mean(e[i]) for e in errors.values() if e[i]), default=0.0) for i in range(len(heads))]
    for variant, columns in errors.items():
        if all(columns):
            ratios = [statistics.mean(c) / low for c, low in zip(columns, lowest, strict=True)]
            lines.append(_row([variant, *map(_mean, columns), f"{max(ratios):.1f}"]))
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-root", help="folder of the data sets in files")
    parser.add_argument("--seed", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TASK", help="tasks whose names have one of these in them"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--table", action="store_true", help="the tables from the recorded runs alone")
    options = parser.parse_args(arguments)
    if options.table:
        result = json.loads((RESULTS / f"{NAME}.json").read_text())
    else:
        result = study(options.data_root, options.seed, options.only, options.workers)
    page = tables(result)
    write_atomically(RESULTS / f"{NAME}.md", page)
    print(page)


if __name__ == "__main__":
    main()
