"""The command line ``ilvae-fast``: train, measure and show models without writing code."""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .._support.extras import require
from .._support.files import read_json
from ..data import DATASETS, Dataset, is_file
from ..training import TrainConfig
from ..vae import CONFIGURATIONS
from .display import COLUMNS, console, is_main, progress_bar, show
from .errors import Group

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "train")

app = typer.Typer(
    cls=Group,
    help="""Train and measure variational autoencoders whose decoder cannot ignore its latent.

    `ilvae-fast train --data digits --model il-lidvae --L 0.5`, then `ilvae-fast sample` and `eval` with the folder that
    it names, and `ilvae-fast report runs`. Each command explains itself: `ilvae-fast train --help`.
    """,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

_DEFAULTS = TrainConfig().to_dict()
_FIELDS = "Fields for --set and --config, and their defaults: " + ", ".join(
    f"{name}={'' if value is None else value}" for name, value in _DEFAULTS.items()
)
_MEASURES = """Measures, in nats, on test data: NLL, from importance samples; gain, by how much the ELBO beats the best
model that ignores its latent; KL, of the ELBO; MI, the information of z about x, at most log N of N data; KL-MI, what
is paid without it; active, units whose posterior mean moves with x, and directions, the same however the latent space
is rotated; Fisher, the divergence of true posterior and prior, its lower bound by L, and the effective number ESS of
samples behind both (near 1: do not trust them); L as certified and as measured; clusters, accuracy of a mixture's
components as classes. Large KL, MI and active units mean little where the gain is small."""


def _field(name: str, help: str, *flags: str) -> Any:
    """An option for a field of the configuration; its default holds where neither it nor --config names the field."""
    default = _DEFAULTS[name]
    return typer.Option(*flags, help=help if default is None else f"{help} Default: {default}.", show_default=False)


def _path(text: str) -> Path:
    if not text:
        raise typer.BadParameter("got '', wanted a path")
    return Path(os.path.expanduser(text))


def _path_option(*flags: str, **settings: Any) -> Any:
    return typer.Option(*flags, parser=_path, metavar="PATH", **settings)


Data = Annotated[str | None, _field("data", f"{', '.join(DATASETS)}.", "--data")]
DataRoot = Annotated[
    str | None, _field("data_root", "Folder of the data sets that are files; else ILVAE_FAST_DATA_ROOT, or data/.")
]
Model = Annotated[str | None, _field("model", f"{', '.join(CONFIGURATIONS)}.", "--model")]
_L = """Certified inverse-Lipschitz constant of the decoder, the product L1 L2 sigma_min(B) of its maps and embedding;
auto: what `ilvae-fast advise` recommends"""
Constant = Annotated[str | None, _field("L", f"{_L}. Else the model's: 1 or 0.", "--L")]
LatentDim = Annotated[int | None, _field("latent_dim", "Width of the latent space.")]
Epochs = Annotated[int | None, _field("epochs", "Passes over the training data.")]
BatchSize = Annotated[int | None, _field("batch_size", "Data per step and process.")]
Rate = Annotated[float | None, _field("learning_rate", "Learning rate of Adam.", "--learning-rate", "--lr")]
Seed = Annotated[int | None, _field("seed", "Seed of weights, batches and noise.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Stay on the CPU.")]
File = Annotated[Path | None, _path_option("--config", help="YAML file of fields, such as another run's config.yaml.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set any field (see below); a dot "
    "reaches those inside: --set model_options.likelihood=gaussian, --set 'annealing.kl_weight={kind: linear, "
    "start: 0, end: 1, steps: 500}'.")]  # fmt: skip
Restart = Annotated[bool, typer.Option("--restart", help="Forget the run in the folder; else it goes on.")]
Run = Annotated[Path, typer.Argument(help="Folder of a finished run.", parser=_path, metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _config(file: Path | None, assignments: Sequence[str] | None, cpu: bool = False, **fields: Any) -> TrainConfig:
    config = TrainConfig() if file is None else TrainConfig.from_yaml(file)
    given = {name: value for name, value in fields.items() if value is not None}
    return replace(config, **given, cpu=cpu or config.cpu).updated(assignments or ())


def _constant(value: Any) -> Any:
    """``--L``: a number, or a text, which the configuration knows or refuses."""
    try:
        return value if value is None else float(value)
    except ValueError:
        return value


@app.command(epilog=_FIELDS)
def train(
    data: Data = None,
    data_root: DataRoot = None,
    model: Model = None,
    constant: Constant = None,
    latent_dim: LatentDim = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: Rate = None,
    seed: Seed = None,
    cpu: Cpu = False,
    output: Annotated[str | None, typer.Option(help="Folder of the run; else runs/DATA-MODEL-..")] = None,
    config: File = None,
    assignments: Set = None,
    restart: Restart = False,
) -> None:
    """Train a model and measure it; an interrupted run goes on where it was.

    `ilvae-fast train --data mnist --data-root DATA --model il-lidvae --L 1.0 --epochs 2`

    Models: vae, gmvae and svae have a plain decoder; lidvae, lidmvae and lidsvae an injective one; il-.. are L-inverse
    Lipschitz: |f(z) - f(z')| >= L |z - z'|. Their m is a Gaussian mixture as prior, their s sequences of tokens.

    Start with a high L, so that the latent is used, and relax it to the target:
    `--L 1 --set 'annealing={L1: {kind: cosine, start: 3, end: 1, steps: 1000}}'`

    Two processes: `torchrun --nproc-per-node 2 -m ilvae_fast train ..`; several machines: the same with torchrun's
    `--nnodes` and `--rdzv-endpoint`. To shard what is too wide for one device:
    `accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 -m ilvae_fast train ..`

    `ilvae-fast eval --help` explains what is printed at the end.
    """
    from ..training import train as run

    settings = _config(
        config, assignments, cpu, data=data, data_root=data_root, model=model, L=_constant(constant),
        latent_dim=latent_dim, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed,
        output=output,
    )  # fmt: skip
    with progress_bar(str(settings.folder)) as progress:
        measures = run(settings, progress, restart)
    if is_main():
        show([(settings.folder.name, measures)])
        print(f"in {settings.folder}")


@app.command(epilog=_FIELDS)
def advise(
    data: Data = None,
    data_root: DataRoot = None,
    model: Model = None,
    latent_dim: LatentDim = None,
    picture: Annotated[Path | None, _path_option(help="Image file to draw it in.")] = None,
    config: File = None,
    assignments: Set = None,
) -> None:
    """Say which L suits the data: how many latents they pay for, and what L forces and costs.

    `ilvae-fast advise --data digits --latent-dim 5 --set model_options.likelihood=gaussian
    --set model_options.likelihood_options.scale=0.2 --picture advice.png`

    Data, likelihood and latents are those of `train` with the same options; `train --L auto` follows the advice.
    """
    from ..training import advice_for, load_dataset

    settings = _config(config, assignments, data=data, data_root=data_root, model=model, latent_dim=latent_dim)
    advice = advice_for(settings, load_dataset(settings))
    print(advice)
    if picture is not None:
        advice.plot(picture)
        print(picture)


@app.command(name="eval", epilog=_MEASURES)
def evaluate(
    run: Run,
    data: Annotated[str | None, typer.Option(help="Where the run's npz:FILE or text:FILE is now.")] = None,
    data_root: DataRoot = None,
    importance_samples: Annotated[int, typer.Option(help="Samples for the likelihood of each datum.", min=1)] = 500,
    fisher_samples: Annotated[int, typer.Option(help="Samples for the divergence of each datum.", min=1)] = 32,
    limit: Annotated[int, typer.Option(help="How many test data to measure on; 0: all of them.", min=0)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    output: Annotated[Path | None, _path_option(help="File to write; else RUN/eval.json.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a trained model again, with more samples; writes RUN/eval.json."""
    from .._support.files import check_writable, write_atomically
    from ..training import evaluate as measure
    from ..training.loop import Unsaved

    config, model = _finished(run)
    target = output or run / "eval.json"
    check_writable(target)
    dataset = _data_of(run, config, data, data_root)
    with progress_bar(str(run)) as progress:
        measures = measure(
            model, dataset, num_importance_samples=importance_samples, fisher_samples=fisher_samples,
            limit=limit or None, seed=seed, progress=lambda part: progress(round(100 * part), 100, {}),
        )  # fmt: skip
    try:
        write_atomically(target, json.dumps(measures, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise Unsaved(error, {run.name: measures}) from error
    if as_json:
        print(json.dumps(measures, indent=2, allow_nan=False))
    else:
        show([(run.name, measures)])


@app.command()
def sample(
    run: Run,
    count: Annotated[int, typer.Option(help="How many to draw.", min=1)] = 16,
    noise: Annotated[bool, typer.Option("--noise", help="Samples of p(x|z) instead of its mean.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    output: Annotated[Path | None, _path_option(help="File to write: .png, .npz or .txt.")] = None,
    data_root: DataRoot = None,
) -> None:
    """Draw data from a trained model: text is printed, images and numbers go to RUN/samples.png or .npz.

    `ilvae-fast sample RUN --output samples.npz` writes images as an array, `samples`, in the shape of the data.
    """
    import numpy as np
    import torch

    from .._support.files import write_atomically

    config, model = _finished(run)
    dataset = _form_of(run, config, data_root)
    tokens, image = dataset.num_categories is not None, _is_image(dataset.shape)
    default = None if tokens else run / ("samples.png" if image else "samples.npz")
    path = output or default
    kinds = [".npz", *([".txt"] if tokens else []), *([".png"] if image else [])]
    if path is not None and path.suffix.lower() not in kinds:
        raise ValueError(
            f"output: got {os.fspath(path)!r} for data of shape {dataset.shape}, wanted {' or '.join(kinds)}"
        )
    x = model.eval().sample(count, torch.Generator().manual_seed(seed), noise)
    content = io.BytesIO()
    if path is None or path.suffix.lower() == ".txt":
        lines = "".join(f"{line}\n" for line in dataset.to_text(x))
        if path is None:
            print(lines, end="")
            return
        content.write(lines.encode())
    elif path.suffix.lower() == ".npz":
        np.savez(content, samples=x.numpy().reshape(count, *dataset.shape))
    else:
        require("matplotlib", "train").use("Agg")
        sheet = _sheet(x.numpy().reshape(count, *dataset.shape))
        require("matplotlib.pyplot", "train").imsave(content, sheet, cmap="gray", vmin=0, vmax=1, format="png")
    write_atomically(path, content.getvalue())
    print(path)


def _is_image(shape: tuple[int, ...]) -> bool:
    """Height and width, perhaps after the channels: one, or red, green and blue."""
    return len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))


def _sheet(images: Any) -> Any:
    """Images (n, [channels,] height, width) beside and below each other, small ones magnified."""
    import numpy as np

    colours = images.shape[1] if images.ndim == 4 else 1
    height, width = images.shape[-2:]
    columns = min(len(images), 8)
    rows = -(-len(images) // columns)
    sheet = np.ones((rows * height, columns * width, colours))
    for k, image in enumerate(images.reshape(-1, colours, height, width)):
        i, j = divmod(k, columns)
        sheet[i * height : (i + 1) * height, j * width : (j + 1) * width] = image.transpose(1, 2, 0)
    zoom = max(1, 96 // height)
    sheet = sheet.clip(0, 1).repeat(zoom, 0).repeat(zoom, 1)
    return sheet[..., 0] if colours == 1 else sheet


@app.command(epilog=_FIELDS)
def sweep(
    output: Annotated[Path, _path_option(help="Folder of the sweep.")],
    constants: Annotated[
        list[str] | None,
        typer.Option("--L", help="Constants of the grid, or auto; once for each. Else the field L, or the model's."),
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", help="Seeds of the grid; once for each. Else the field seed.")
    ] = None,
    data: Data = None,
    data_root: DataRoot = None,
    model: Model = None,
    latent_dim: LatentDim = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: Rate = None,
    cpu: Cpu = False,
    config: File = None,
    assignments: Set = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the runs of the grid; else they go on.")] = False,
) -> None:
    """Train a grid of constants and seeds; what is finished is skipped.

    Writes sweep.csv and sweep.json, in which the rows of earlier sweeps into the same folder stay. If a run diverges,
    it is listed, the others are trained, and the exit status is 1.

    `ilvae-fast sweep --data digits --model il-lidvae --L 0.5 --L 1 --seed 0 --seed 1 --output runs/sweep`
    """
    from ..training import sweep as run
    from ..training.sweep import named

    for assignment in assignments or ():
        if assignment.partition("=")[0] == "output":
            raise ValueError(f"set: got {assignment!r}, but each run has a folder of its own in --output, {output}")
    settings = _config(
        config, assignments, cpu, data=data, data_root=data_root, model=model, latent_dim=latent_dim, epochs=epochs,
        batch_size=batch_size, learning_rate=learning_rate,
    )  # fmt: skip
    grid = [_constant(c) for c in constants] if constants else [] if settings.L is None else [settings.L]
    with progress_bar("") as progress:
        rows = run(settings, grid, seeds or [settings.seed], output, lambda c: progress.named(c.folder.name), restart)
    if is_main():
        show([(named(row), row) for row in rows])
    if any("diverged" in row for row in rows):
        sys.exit(1)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="The study, such as studies/images.yaml.", parser=_path, metavar="FILE")],
    quick: Annotated[bool, typer.Option("--quick", help="Its trial: a few small runs, to see it work.")] = False,
    output: Annotated[Path | None, _path_option(help="Folder of its results; else results/NAME.")] = None,
    data_root: DataRoot = None,
    jobs: Annotated[int | None, typer.Option(help="Runs beside each other; else one for each core.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="Begin no run after so long; the same command goes on.")] = None,
) -> None:
    """Do the runs of a study that are not done yet, each a file, then draw its figures and tables.

    `ilvae-fast study studies/images.yaml --data-root DATA`

    A study that was killed goes on when the command is given again, its unfinished runs from their checkpoints.
    """
    from ..training.study import Study, run_study
    from ..training.study_report import draw

    described = Study.from_yaml(file, quick)
    folder = output if output is not None else Path("results") / (described.name + ("-quick" if quick else ""))
    command = ["ilvae-fast", "study", file.as_posix(), *(["--quick"] if quick else [])]
    jobs = jobs or max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    start = time.monotonic()

    def said(name: str, done: int, count: int, error: str | None) -> None:
        took = f"{(time.monotonic() - start) / 60:.1f} min"
        console().print(f"{done} of {count}, {took}: {name}{f': {error}' if error else ''}", markup=False)

    complete = run_study(
        described, folder, data_root=data_root, jobs=jobs, seconds=seconds, command=" ".join(command), on_run=said
    )
    for path in draw(folder, json.loads((folder / "study.json").read_text())):
        print(path)
    if not complete:
        print("not done yet: the same command goes on")


@app.command()
def report(
    what: Annotated[str, typer.Argument(help="Name or folder of a study, or a folder with runs in it.")],
    results: Annotated[Path | None, _path_option(help="Folder of the study's results; else results/NAME.")] = None,
    as_json: Json = False,
) -> None:
    """Show finished runs in one table; of a study, draw figures and tables from its results.

    `ilvae-fast report runs`, `ilvae-fast report images`

    A run whose files are damaged is named, the others are shown, and the exit status is 1.
    """
    folder = results if results is not None else Path("results") / what
    if what == "toy":
        from ..training.toy_report import draw as draw_toy

        for path in draw_toy(folder):
            print(path)
        return
    if (folder / "study.json").is_file():
        from ..training.study_report import draw

        for path in draw(folder, read_json(folder / "study.json", "the same study writes it anew")):
            print(path)
        return
    place = _path(what)
    found = sorted(place.glob("**/metrics.json"))
    if not found:
        raise FileNotFoundError(
            f"what: no metrics.json under {what!r}, wanted a folder with finished runs, or the name of a study"
        )
    shown, damaged = {}, []
    for path in found:
        try:
            name = path.parent.relative_to(place).as_posix()
            shown[place.resolve().name if name == "." else name] = _measures(path)
        except (ValueError, OSError) as error:
            damaged.append(error)
    if as_json:
        print(json.dumps([{"run": name, **measures} for name, measures in shown.items()], indent=2))
    elif shown:
        show(list(shown.items()))
    for problem in damaged:
        print(f"error: {problem}", file=sys.stderr)
    if damaged:
        sys.exit(1)


def _measures(path: Path) -> dict[str, Any]:
    """What a metrics.json holds."""
    cure = "remove it, and `ilvae-fast train --config` with the config.yaml beside it measures the model anew"
    measures = read_json(path, cure)
    wrong = [key for _, key in COLUMNS if not isinstance(measures.get(key), int | float | None)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is {measures[wrong[0]]!r}, wanted a number; {cure}")
    return measures


@app.command()
def bench(
    data: Data = None,
    data_root: DataRoot = None,
    model: Model = None,
    latent_dim: LatentDim = None,
    batch_size: BatchSize = None,
    steps: Annotated[int, typer.Option(help="Timed steps of each backend.", min=1)] = 20,
    config: File = None,
    assignments: Set = None,
) -> None:
    """Time a training step by the fused operators and by plain autograd, in turns."""
    import torch

    from ..operators.backend import use_backend
    from ..training import build_model, load_dataset

    settings = _config(
        config, assignments, data=data, data_root=data_root, model=model, latent_dim=latent_dim, batch_size=batch_size
    )
    dataset = load_dataset(settings)
    torch.manual_seed(settings.seed)
    trained = build_model(settings, dataset)
    optimizer = torch.optim.Adam(trained.parameters(), lr=settings.learning_rate)
    x = dataset.train[: settings.batch_size]
    seconds: dict[str, list[float]] = {"native": [], "reference": []}
    for step in range(steps + 3):
        for backend, measured in seconds.items():
            with use_backend(backend):
                start = time.perf_counter()
                trained(x).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if step >= 3:
                    measured.append(1e3 * (time.perf_counter() - start))
    medians = {backend: statistics.median(measured) for backend, measured in seconds.items()}
    for backend, median in medians.items():
        print(f"{backend:<10} {median:8.2f} ms for a step of {len(x)} data, the median of {steps}")
    print(f"{'ratio':<10} {medians['reference'] / medians['native']:8.2f}")


@app.command()
def info() -> None:
    """What was built and what there is: versions, devices, models, data sets."""
    import torch

    from ..operators.extension import build_info

    devices = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    for name, value in {
        **build_info(),
        "running torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "GPUs": ", ".join(devices) or "none",
        "models": ", ".join(CONFIGURATIONS),
        "data": ", ".join(DATASETS),
    }.items():
        print(f"{name:<20} {value}")


def _finished(run: Path) -> tuple[TrainConfig, Any]:
    """Configuration and model of a run."""
    from ..vae import VAE

    if not (run / "model").is_dir() or not (run / "config.yaml").is_file():
        raise FileNotFoundError(
            f"run: no finished run in {os.fspath(run)!r}, wanted a folder with config.yaml and model/"
        )
    return TrainConfig.from_yaml(run / "config.yaml"), VAE.from_pretrained(run / "model")


def _form(run: Path) -> dict[str, Any]:
    """What a run knows of its data."""
    path, cure = run / "data.json", "remove it, and the data themselves are read"
    form = read_json(path, cure)
    if missing := sorted({"shape", "num_categories", "vocabulary", "separator", "checksum"} - form.keys()):
        raise ValueError(f"{path}: is damaged, {missing[0]} is missing; {cure}")
    return form


def _form_of(run: Path, config: TrainConfig, data_root: str | None) -> Dataset:
    """The form of the data of a run; the data themselves only if it was trained by an earlier version."""
    return Dataset.of_form(_form(run)) if (run / "data.json").is_file() else _data_of(run, config, None, data_root)


def _data_of(run: Path, config: TrainConfig, name: str | None, data_root: str | None) -> Any:
    """The data of a run, which may have been moved: named anew, or by their name in another folder."""
    from ..training import load_dataset
    from ..training.state import checksum

    if name is None and data_root is not None and is_file(config.data):
        kind, _, path = config.data.partition(":")
        name = f"{kind}:{os.path.basename(path)}"
    kind = config.data.partition(":")[0]
    if name is not None and (not is_file(config.data) or not name.startswith(f"{kind}:")):
        wanted = f"{kind}:FILE, where the data of the run are now" if is_file(config.data) else "none: it has no file"
        raise ValueError(f"data: got {name!r} for a run on {config.data}, wanted {wanted}")
    config = replace(config, data=name or config.data, data_root=data_root or config.data_root)
    dataset = load_dataset(config)
    if is_file(config.data) and (run / "data.json").is_file():
        wanted, found = _form(run)["checksum"], checksum(dataset.train)
        if found != wanted:
            raise ValueError(
                f"data: the training data in {config.located().data} have the checksum {found:08x}, and those of the "
                f"run {wanted:08x}; bring these back, or name where they are by --data"
            )
    return dataset


def _in_a_thread(failure: Any) -> None:
    """What tensorboard's thread cannot write it raises again where it is told to write."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point."""
    # torch's own forward mode says it once
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # which nothing writes to
    import torch

    threading.excepthook = _in_a_thread
    try:
        app(args=arguments)
    except SystemExit as ended:
        if torch.distributed.is_initialized() and isinstance(ended.code, int | None):
            torch.distributed.destroy_process_group()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            # Gloo's threads let go of tensors after their work is done. While the interpreter ends, that aborts the
            # process (torch 2.14), and the launcher takes a run that has succeeded for a failure.
            os._exit(ended.code or 0)
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
