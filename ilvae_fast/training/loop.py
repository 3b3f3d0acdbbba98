"""The training loop."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .. import data, metrics
from .._support.extras import require
from .._support.files import check_writable, locked, read_json, write_atomically
from ..annealing import Annealer
from ..layers.constant import accept_constants
from ..vae import VAE, VAEConfig, VAEOutput
from . import state
from .config import TrainConfig, build_model, differences, load_dataset, resolved
from .distributed import check_fsdp_version, gathered, shard, shard_options, whole
from .evaluation import check_test_data, evaluate

Progress = Callable[[int, int, dict[str, float]], None]

# fields that change no result, and those that change none before it is measured
_NOT_OF_THE_RUN = ("output", "data_root", "cpu", "log_every", "checkpoint_every", "checkpoint_minutes")
_OF_MEASURING = ("num_importance_samples", "fisher_samples", "eval_limit")
# what a run leaves in its folder; config.yaml last, for as long as it is there the rest is known to be a run's
_FILES = (
    "checkpoints", "data.json", "history.json", "tensorboard", "model", "best", "metrics.json", "eval.json", "diverged",
    "samples.png", "samples.npz", "config.yaml",
)  # fmt: skip
_LAGGING_DATA = 1000  # whose mutual information says whether the encoder still lags behind
_LAGGING_STEPS = 10  # updates of the encoder whose mean loss is compared with that of those before
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


_ANEW = "remove it, and the same command measures the model anew"


class Diverged(RuntimeError):
    """The loss or a gradient is NaN or infinite, or the loss is above the limit. The message says where, and which file
    reproduces it."""


class Unsaved(OSError):
    """Measures that could not be written: ``measured``, by the name of the run."""

    def __init__(self, error: OSError, measured: Mapping[str, dict[str, Any]]) -> None:
        super().__init__(error.errno, error.strerror or str(error), error.filename)
        self.measured = dict(measured)


def train(config: TrainConfig, progress: Progress | None = None, restart: bool = False) -> dict[str, Any]:
    """Train the model of ``config`` and measure it; a run that was interrupted goes on where its last checkpoint is.

    So does one with more ``epochs`` than before, finished or not. Ctrl-C writes a checkpoint after the step and then
    raises; a second one raises at once.

    On the CPU a run that was killed ends with the same numbers, bit for bit, as one that was not. Under ``torchrun`` or
    ``accelerate launch`` all processes call this. With ``--use_fsdp --fsdp_version 2`` parameters, gradients and Adam's
    moments are sharded (:func:`~.distributed.shard`) while the model is trained. At its beginning and its end every
    process has the whole model: at first in host memory, and on its device, in float32 and float64, to be measured.

    Args:
        progress: called after each step with the number of steps done, that of all, and at times the latest values; and
            while the trained model is measured, with the part of that which is done as ``measured``.
        restart: forget the run that is in the folder; other files stay.

    Returns:
        The measures (:func:`~.evaluation.evaluate`), as in the run's ``metrics.json``.

    Files of the run, all written by the first process: config.yaml, checkpoints/, history.json (the means of each
    epoch), tensorboard/, at the end of training model/ (for ``VAE.from_pretrained``), and metrics.json. Until that is
    there the fields of measuring (num_importance_samples, fisher_samples, eval_limit) may change.

    Raises:
        Diverged: training went wrong.
        KeyboardInterrupt: says from which step the run will go on.
        OSError: naming a file that cannot be written, if possible before the model is measured; and :class:`Unsaved`,
            with the measures, if not.
        ValueError: naming the field; a folder with another run in it, or with this one, sharded otherwise, on other
            data, or damaged; with ``restart`` a folder that holds something, but no run; FSDP1.
        ImportError: accelerate or tensorboard is not installed; says how to install it.
    """
    accelerate = require("accelerate", "train")
    require("tensorboard", "train")
    check_fsdp_version()
    config = config.located()
    folder = config.folder
    if not restart and _is_finished(config, folder):
        return read_json(folder / "metrics.json", _ANEW)
    shared = require("accelerate.state", "train").AcceleratorState  # one of each process, with one precision
    if shared._shared_state and shared().mixed_precision != config.precision:
        shared._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(
        cpu=config.cpu,
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulation,
        step_scheduler_with_optimizer=False,
        log_with="tensorboard",
        project_dir=os.fspath(folder),
    )
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision: got 'fp16' on the CPU, which has no such products, wanted 'bf16' or 'no'")
    sharding = shard_options(accelerator)
    if sharding is not None and (config.lagging or config.data_options.get("validation")):
        name = "lagging" if config.lagging else "data_options.validation"
        raise ValueError(f"{name}: is for unsharded models, which every process has whole; wanted 0 under FSDP")
    try:
        if not accelerator.is_main_process:
            return _train(accelerator, config, folder, progress, sharding)
        with _alone(folder):
            if restart:
                _clear(folder)
            return _train(accelerator, config, folder, progress, sharding)
    except KeyboardInterrupt:
        newest = state.latest(folder / "checkpoints")
        start = (
            "has no checkpoint yet and starts anew" if newest is None else f"goes on from step {int(newest.name[5:])}"
        )
        raise KeyboardInterrupt(f"interrupted: the run in {folder} {start} the next time") from None
    finally:
        # not end_training, which would end the process group under the next run
        for tracker in (t for t in accelerator.trackers if hasattr(t, "writer")):  # else it could not be opened
            try:
                tracker.finish()
            except OSError as error:
                warnings.warn(f"{folder / 'tensorboard'}: its last lines are lost ({error})", stacklevel=2)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One run in a folder at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".lock"))
        except BlockingIOError:
            raise ValueError(f"output: another process is training in {folder}") from None
        yield


def _clear(folder: Path) -> None:
    """Remove a run from its folder, and nothing else."""
    found = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
    if found and "config.yaml" not in found:
        shown = ", ".join(found if len(found) < 10 else [*found[:9], ".."])
        raise ValueError(f"output: {folder} holds no run to restart: it has no config.yaml, but {shown}")
    for name in _FILES:
        for path in (*folder.glob(f".{name}.*"), folder / name):  # the former left by a kill, see write_atomically
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _train(
    accelerator: Any, config: TrainConfig, folder: Path, progress: Progress | None, sharding: dict[str, Any] | None
) -> dict[str, Any]:
    accelerator.wait_for_everyone()
    finished = folder / "metrics.json"
    if _is_finished(config, folder):
        return read_json(finished, _ANEW)
    checkpoints = folder / "checkpoints"
    newest = state.latest(checkpoints)
    if newest is not None and state.is_sharded(newest) != (sharding is not None):
        was, wanted = ("sharded", "unsharded") if sharding is None else ("unsharded", "sharded")
        raise ValueError(f"output: {newest} is of a run that was {was}, wanted {wanted}: go on as before, or --restart")
    if newest is not None:
        state.check(newest)
    workers = (accelerator.process_index, accelerator.num_processes)
    dataset, set_seed = load_dataset(config), require("accelerate.utils", "train").set_seed
    check_test_data(dataset, config.eval_limit, workers[1])
    if config.lagging and dataset.validation is None:
        raise ValueError(
            "lagging: wants validation data, whose mutual information says when to stop: data_options.validation=1000"
        )

    # the same weights in all processes, then noise of their own, from a seed whose stream was not the weights'
    set_seed(config.seed)
    settled = resolved(config, dataset)
    if settled is not config:
        accelerator.print(f"L = {settled.L:g} by the advice for these data; ilvae-fast advise explains it")
    plain = build_model(settled, dataset)
    if config.initialize and newest is None:
        plain.initialize(dataset.training_sample())
    set_seed(int(torch.randint(2**31, ())), device_specific=True)
    if sharding is not None:
        shard(plain, **sharding)
    # one kernel for all tensors; under FSDP some shards have no elements
    fused = sharding is None and accelerator.device.type in ("cpu", "cuda")
    optimizer = torch.optim.Adam(plain.parameters(), lr=config.learning_rate, fused=fused)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (config.warmup_steps + 1)))
    annealer, position = Annealer(plain, config.annealing), state.Position(dataset.train)
    batches = state.Batches(dataset.train, config.batch_size, config.seed, *workers, dynamic=dataset.dynamic)
    model, optimizer, warmup = accelerator.prepare(plain, optimizer, warmup)
    # under FSDP2 prepare looks parameters up by their addresses, and shards without elements have none
    optimizer.param_groups[0]["params"] = list(plain.parameters())
    accelerator.register_for_checkpointing(annealer, position)

    if newest is not None:
        accelerator.load_state(os.fspath(newest))  # refuses other data, so before anything is written
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if finished.is_file():  # with fewer epochs, or data that lay elsewhere
            (folder / "eval.json").unlink(missing_ok=True)
            finished.unlink()
        write_atomically(folder / "config.yaml", config.to_yaml())
        form = {**dataset.form(), "checksum": position.data}
        write_atomically(folder / "data.json", json.dumps(form, indent=2) + "\n")
    accelerator.wait_for_everyone()
    # steps that are done again are not to be shown twice
    with _tensorboard(folder):
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": position.step + 1}})

    steps = config.epochs * batches.steps
    clock = state.Clock(config.checkpoint_minutes)
    with state.Interrupts(patient=workers[1] > 1) as interrupts:
        while position.epoch < config.epochs:
            for x in batches.epoch(position.epoch, position.step_in_epoch):
                left: list[nn.Parameter] = []
                if config.lagging and position.lagging:
                    _catch_up(accelerator, plain, model, optimizer, batches, config, position)
                    left = list(plain.encoder.parameters())
                x = x.to(accelerator.device)
                values = _step(accelerator, plain, model, optimizer, x, config, position.step, left)
                warmup.step()
                annealer.step()
                position.add(values)
                latest: dict[str, float] = {}
                if position.step % config.log_every == 0:
                    latest = dict(zip(("loss", "reconstruction", "kl"), values.tolist(), strict=True))
                    logged = {f"train/{k}": v for k, v in latest.items()} | {
                        f"schedule/{k}": v for k, v in annealer.values().items()
                    }
                    with _tensorboard(folder):
                        accelerator.log(logged, step=position.step)
                due = clock.due(position.step_in_epoch == batches.steps)
                due, interrupted = state.agreed(accelerator, due, interrupts.asked)
                if due or interrupted or position.step % config.checkpoint_every == 0 or position.step == steps:
                    with clock:
                        state.save(accelerator, checkpoints, position.step)
                if progress is not None:
                    progress(position.step, steps, latest)
                if interrupted:
                    raise KeyboardInterrupt
            position.finish_epoch(_validated(accelerator, plain, dataset.validation, config, position))
            if accelerator.is_main_process:
                write_atomically(folder / "history.json", json.dumps(position.history, indent=2) + "\n")

    trained = whole(plain, accelerator.device)
    if accelerator.is_main_process:
        trained.save_pretrained(folder / "model")  # first, so that it is there if measuring fails
        check_writable(finished)
    measured_by = partial(
        evaluate, dataset=dataset, num_importance_samples=config.num_importance_samples,
        fisher_samples=config.fisher_samples, limit=config.eval_limit, seed=config.seed, process=workers[0],
        num_processes=workers[1], reduce=lambda t: accelerator.reduce(t.to(accelerator.device), "sum"),
        progress=None if progress is None else lambda part: progress(steps, steps, {"measured": part}),
    )  # fmt: skip
    measures = measured_by(trained)
    measures["train_loss"] = position.history[-1]["loss"]
    if position.best is not None:
        same = position.best["epoch"] == position.epoch
        measured = measures if same else measured_by(VAE.from_pretrained(folder / "best").to(accelerator.device))
        measures["best"] = {**position.best, **{name: v for name, v in measured.items() if name != "train_loss"}}
    try:
        shown = {f"test/{k}": v for k, v in measures.items() if isinstance(v, float)}
        with _tensorboard(folder):
            accelerator.log(shown, step=position.step)
        if accelerator.is_main_process:
            write_atomically(finished, json.dumps(measures, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise Unsaved(error, {folder.name: measures}) from error
    accelerator.wait_for_everyone()
    return measures


@contextmanager
def _tensorboard(folder: Path) -> Iterator[None]:
    """Its errors do not say of which file they are."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(folder / "tensorboard")) from error


def _validated(
    accelerator: Any, plain: VAE, validation: Tensor | None, config: TrainConfig, position: state.Position
) -> dict[str, float]:
    """The negative ELBO of the validation data after an epoch, if there are any; keeps the best model so far."""
    if validation is None:
        return {}
    process, count, epoch = accelerator.process_index, accelerator.num_processes, position.epoch + 1
    x = validation.to(accelerator.device)
    generator = torch.Generator(accelerator.device).manual_seed(config.seed + process)  # training's noise is its own
    plain.eval()
    loss = -metrics.elbo(
        plain, x[process::count], generator=generator,
        reduce=lambda t: accelerator.reduce(t.to(accelerator.device), "sum"),
    )  # fmt: skip
    if config.lagging and position.lagging:
        common = torch.Generator(accelerator.device).manual_seed(config.seed)
        information = metrics.mutual_information(plain, x[:_LAGGING_DATA], generator=common)
        position.lagging = information > position.information
        position.information = max(information, position.information)
    plain.train()
    if position.best is None or loss < position.best["validation_loss"]:
        position.best = {"epoch": epoch, "validation_loss": loss}
        if accelerator.is_main_process:
            plain.save_pretrained(config.folder / "best")
    return {"validation_loss": loss}


def _catch_up(
    accelerator: Any, plain: VAE, model: Any, optimizer: Any, batches: state.Batches, config: TrainConfig,
    position: state.Position,
) -> None:  # fmt: skip
    """Updates of the encoder alone, until the mean loss of ten of them grows (He et al., ICLR 2019, algorithm 1)."""
    before, total = math.inf, 0.0
    updated = set(plain.encoder.parameters())
    left = [parameter for parameter in plain.parameters() if parameter not in updated]
    for k, x in enumerate(batches.more(position.epoch, position.step_in_epoch, config.lagging), 1):
        values = _step(accelerator, plain, model, optimizer, x.to(accelerator.device), config, position.step, left)
        total += float(values[0])
        if k % _LAGGING_STEPS == 0:
            if total > before:
                break
            before, total = total, 0.0


def _step(
    accelerator: Any, plain: VAE, model: Any, optimizer: Any, x: Tensor, config: TrainConfig, step: int,
    left: Sequence[nn.Parameter] = (),
) -> Tensor:  # fmt: skip
    """One step of Adam; (loss, reconstruction, KL) of all processes' batches. ``model`` is ``plain`` as accelerate
    wraps it; ``left``: parameters to leave as they are."""
    before = _before_step(plain, accelerator.device)
    # whose gradients are reduced with the last micro-batch only: a sharded model's would stay whole until then
    waiting = [] if isinstance(plain, FSDPModule) else [model]
    parts = []
    for part in x.chunk(config.accumulation):
        with accelerator.accumulate(*waiting):
            with accelerator.autocast():  # prepare puts it around every model but a sharded one
                output: VAEOutput = model(part)
            accelerator.backward(output.loss)
            parts.append(torch.stack([output.loss, output.reconstruction.mean(), output.kl.mean()]).detach())
            if accelerator.sync_gradients:
                _check(accelerator, plain, optimizer, x, torch.stack(parts)[:, 0], before, config, step)
                for parameter in left:
                    parameter.grad = None  # Adam passes over it
                if config.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.reduce(torch.stack(parts).mean(0), "mean")


def _before_step(plain: VAE, device: torch.device) -> dict[str, Any]:
    """What a step changes before its optimiser does: random generators, and buffers such as a moving variance."""
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return {"rng": rng, "buffers": {name: buffer.clone() for name, buffer in plain.named_buffers()}}


def _check(
    accelerator: Any, plain: VAE, optimizer: Any, x: Tensor, losses: Tensor, before: dict[str, Any],
    config: TrainConfig, step: int,
) -> None:  # fmt: skip
    """Stop before a step that would spoil the weights; all processes agree on it, and gather what is sharded."""
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    bad_loss = ~(losses.abs() <= config.loss_limit).all()
    bad_gradient = ~gathered(torch.nn.utils.get_total_norm(gradients.values())).isfinite().to(losses.device)
    if config.precision == "fp16":  # its scaler leaves such a step out, and lowers the scale
        bad_gradient = torch.zeros_like(bad_gradient)
    here = torch.stack([bad_loss, bad_gradient]).float()
    somewhere = accelerator.reduce(here, "sum").tolist()
    if not any(somewhere):
        return
    cause = 0 if somewhere[0] else 1  # a loss that is NaN spoils the gradients of all processes
    accelerator.unscale_gradients(optimizer)
    norms = {name: gathered(gradient.norm()).item() for name, gradient in gradients.items()}
    largest = max(norms, key=lambda n: math.inf if math.isnan(norms[n]) else norms[n])
    target = config.folder / "diverged" / f"process{accelerator.process_index}.pt"
    state_dict, optimizer_state = gathered(plain.state_dict()), gathered(optimizer.state_dict())
    if here[cause]:
        state_dict.update({n: buffer for n, buffer in before["buffers"].items() if n in state_dict})
        content = io.BytesIO()
        saved = {"model": state_dict, "optimizer": optimizer_state, "x": x, "rng": before["rng"], "step": step}
        of_run = {"config": plain.config.to_dict(), "accumulation": config.accumulation, "precision": config.precision}
        torch.save({**saved, **of_run}, content)
        write_atomically(target, content.getvalue())
        where = f"the state before it is in {target} (ilvae_fast.training.reproduce)"
    else:
        where = "another process saved the state before it"
    bad = ("", "a gradient is NaN or infinite, ")[cause]
    raise Diverged(
        f"step {step}: {bad}the loss is {losses.max().item():g} nats per datum "
        f"(limit {config.loss_limit:g}); the largest gradient is that of {largest}, of norm {norms[largest]:g}; {where}"
    )


def reproduce(path: str | os.PathLike[str]) -> tuple[VAE, list[VAEOutput]]:
    """The model before the step that went wrong, and what that step gave, from the file that :class:`Diverged` names.

    One output for each micro-batch, on the kind of device where it happened, if there is one;
    ``output.loss.backward()`` shows the gradients.

    Raises:
        ValueError: a damaged or another file.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = VAE(VAEConfig.from_dict(saved["config"]))
        accept_constants(model)
        model.load_state_dict(saved["model"])
        torch.set_rng_state(saved["rng"]["cpu"])
    except OSError:
        raise
    except Exception as error:  # of damaged bytes torch raises errors of a dozen kinds
        raise ValueError(f"{os.fspath(path)}: is not a state that a diverged run left ({error})") from error
    device = torch.device("cuda" if "cuda" in saved["rng"] and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_rng_state(saved["rng"]["cuda"])
    model = model.to(device)
    low = _AUTOCAST.get(saved.get("precision", "no"))  # earlier versions did not save it
    with torch.autocast(device.type, low, enabled=low is not None):
        return model, [model(part) for part in saved["x"].to(device).chunk(saved["accumulation"])]


def _is_finished(config: TrainConfig, folder: Path) -> bool:
    """Whether the folder holds this run, with nothing left to do.

    Raises:
        ValueError: it holds another one.
    """
    path, measured = folder / "config.yaml", (folder / "metrics.json").is_file()
    if not path.is_file():
        return measured
    old = TrainConfig.from_yaml(path).located()
    more = config.epochs > old.epochs
    # the checkpoint knows the data again, wherever they are
    kinds = [c.data.partition(":")[0] for c in (old, config) if data.is_file(c.data)]
    moved = old.data != config.data and len(kinds) == 2 and kinds[0] == kinds[1]
    done = measured and not more and not moved
    ignored = [*_NOT_OF_THE_RUN, *(() if done else _OF_MEASURING), *(("epochs",) if more else ())]
    if changed := differences(old.to_dict(), config.to_dict(), [*ignored, *(("data",) if moved else ())]):
        raise ValueError(
            f"output: {folder} holds another run: {'; '.join(changed)}. Choose another folder, or --restart this one: "
            "a run goes on with more epochs, and with no other change"
        )
    return done
