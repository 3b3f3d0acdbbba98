"""What a checkpoint holds, and how it is written: a folder that is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import threading
import time
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._support.devices import has_float64
from .._support.files import read_json, sync
from ..data.dataset import drawn

KEPT = 2  # checkpoints that stay
_CONTENTS = "contents.json"  # of a checkpoint: size and checksum of each of its other files


def checksum(x: Tensor) -> int:
    """Of data, by which they are known again."""
    return zlib.crc32(x.contiguous().numpy().data)


class Position:
    """Where training stands: finished epochs, steps done in the current one and in all, and what the epochs lost.

    Sums of the current epoch are tensors, so that nothing waits for a device.

    Args:
        x: the training data, of which a checksum is kept: to go on with others is refused.
    """

    def __init__(self, x: Tensor) -> None:
        self.data = checksum(x)
        self.epoch = self.step_in_epoch = self.step = 0
        self.history: list[dict[str, float]] = []
        self.sums: Tensor | None = None  # of loss, reconstruction and KL over the current epoch, float64
        self.best: dict[str, float] | None = None  # epoch and negative ELBO on the validation data
        self.lagging = True  # the encoder is still given more updates, where the run asks for that
        self.information = -math.inf  # nats of the validation data, the most so far

    def add(self, values: Tensor) -> None:
        """Count a step with these means over its batch."""
        values = values.detach().to(torch.float64 if has_float64(values.device) else torch.float32)
        self.sums = values if self.sums is None else self.sums.to(values.device) + values
        self.step_in_epoch += 1
        self.step += 1

    def finish_epoch(self, more: dict[str, float]) -> None:
        """Note the means of the epoch's steps and what ``more`` there is, and start the next one."""
        assert self.sums is not None
        means = self.sums / self.step_in_epoch
        self.history.append({**dict(zip(("loss", "reconstruction", "kl"), means.tolist(), strict=True)), **more})
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, None

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "sums": None if self.sums is None else self.sums.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("data", self.data) != self.data:  # earlier versions kept none
            raise ValueError(
                f"data: got training data with the checksum {self.data:08x}, wanted those of the checkpoint, with "
                f"{state['data']:08x}; bring them back, or choose another output or --restart"
            )
        vars(self).update(state)


class Batches:
    """Batches of an epoch for one of several processes, drawn from a seed and the epoch alone.

    The data are permuted anew in each epoch; batch i of all processes together is the i-th run of
    ``batch_size * num_processes`` of them, of which each process takes its part. What does not fill it is left out.

    Args:
        dynamic: the data are probabilities, of which each batch draws zeros and ones.
    """

    def __init__(
        self, x: Tensor, batch_size: int, seed: int, process: int = 0, num_processes: int = 1, dynamic: bool = False
    ) -> None:
        self.x, self.batch_size, self.seed, self.dynamic = x, batch_size, seed, dynamic
        self.process, self.num_processes = process, num_processes
        self.steps = len(x) // (batch_size * num_processes)
        if self.steps == 0:
            most, each = f"{len(x)}, the number of training data", ""
            if num_processes > 1:
                each = f" for each of {num_processes} processes"
                most = f"{len(x) // num_processes}: there are {len(x)} training data"
            raise ValueError(f"batch_size: got {batch_size}{each}, wanted at most {most}")

    def epoch(self, number: int, start: int = 0) -> Iterator[Tensor]:
        """The batches of epoch ``number`` from step ``start`` on."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(len(self.x), generator=generator)
        for step in range(start, self.steps):
            batch = step * self.num_processes + self.process
            x = self.x[order[batch * self.batch_size : (batch + 1) * self.batch_size]]
            yield drawn(x, self._seed_of(number, batch)) if self.dynamic else x

    def more(self, number: int, step: int, count: int) -> Iterator[Tensor]:
        """``count`` further random batches at a step of epoch ``number``, for updates of the encoder alone."""
        for k in range(count):
            batch = ((k + 1) * self.steps + step) * self.num_processes + self.process
            seed = self._seed_of(number, batch)
            rows = torch.randint(len(self.x), (self.batch_size,), generator=torch.Generator().manual_seed(seed))
            yield drawn(self.x[rows], seed + 1) if self.dynamic else self.x[rows]

    def _seed_of(self, number: int, batch: int) -> int:
        """Of the noise of one batch: a resumed run draws what the interrupted one would have drawn."""
        mixed = f"{self.seed} {number} {batch}".encode()
        return int.from_bytes(hashlib.sha256(mixed).digest()[:7], "big")


class Clock:
    """Says when a checkpoint is due by the time that has passed since the last one.

    After ``minutes``, and at the end of an epoch, unless epochs are so short that writing would take more than a
    twentieth of the time. ``with clock:`` goes around the writing of one.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self.since, self.cost = time.monotonic(), 0.0

    def due(self, end_of_epoch: bool) -> bool:
        waited = time.monotonic() - self.since
        return waited >= self.seconds or (end_of_epoch and waited >= 20 * self.cost)

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        start, self.since = self.since, time.monotonic()
        self.cost = self.since - start


class Interrupts:
    """Within it Ctrl-C is ``asked`` for rather than raised, so that a step can end and be saved; a second one raises.

    Where the program has a handler of its own, or this is no main thread, everything stays as it is.

    Args:
        patient: no second one raises: launchers of several processes pass Ctrl-C on to those that have had it.
    """

    def __init__(self, patient: bool = False) -> None:
        self.asked, self.patient = False, patient

    def _note(self, *_: object) -> None:
        if self.asked and not self.patient:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interrupts:
        here = threading.current_thread() is threading.main_thread()
        self.taken = here and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.taken:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.taken:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.asked and kind is None:
            raise KeyboardInterrupt


def agreed(accelerator: Any, *here: bool) -> list[bool]:
    """What is true in any process, so that all do the same."""
    if accelerator.num_processes == 1:
        return list(here)
    return (accelerator.reduce(torch.tensor(here, device=accelerator.device).float(), "sum") > 0).tolist()


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``."""
    found = sorted(folder.glob("step-*"))
    return found[-1] if found else None


def is_sharded(checkpoint: Path) -> bool:
    """Whether accelerate wrote it under FSDP."""
    return any(checkpoint.glob("pytorch_model_fsdp*"))


def save(accelerator: Any, folder: Path, step: int) -> None:
    """Write all that ``accelerator`` knows to ``folder/step-..``; called by all processes, which wait for each other.

    The files are complete, and on the disk, before the folder has its name; older checkpoints go when it has.

    Raises:
        OSError: naming the folder; what was written of it is gone, and older checkpoints are as they were.
    """
    target, partial = folder / f"step-{step:09d}", folder / f".partial-{step:09d}"
    if accelerator.is_main_process:
        for leftover in (*folder.glob(".partial-*"), *folder.glob(".old-*")):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(os.fspath(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = [path for path in partial.rglob("*") if path.is_file()]
            contents = {os.fspath(path.relative_to(partial)): _summary(path) for path in files}
            (partial / _CONTENTS).write_text(json.dumps(contents, indent=2) + "\n")
            for path in [*partial.rglob("*"), partial]:
                sync(path)
    except Exception as error:
        if not _is_of_writing(error):
            raise
        free = shutil.disk_usage(folder).free / 2**20
        shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        reason = error.strerror if isinstance(error, OSError) else str(error)
        number = error.errno if isinstance(error, OSError) else None
        raise OSError(number, f"the checkpoint was not written, {free:.3g} MiB are free ({reason})", target) from error
    if accelerator.is_main_process:
        os.replace(partial, target)
        sync(folder)
        for old in sorted(folder.glob("step-*"))[:-KEPT]:
            hidden = folder / f".old-{old.name}"  # never half of one under its own name
            os.replace(old, hidden)
            shutil.rmtree(hidden)
    accelerator.wait_for_everyone()


def _is_of_writing(error: Exception) -> bool:
    """Whether a file could not be written, for which torch and safetensors have errors of their own."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    by = (type(error).__module__.partition(".")[0], frame.f_globals.get("__name__"))
    return isinstance(error, OSError) or "safetensors" in by or "torch.serialization" in by


def check(checkpoint: Path) -> None:
    """All files are as :func:`save` wrote them, and those of our own objects hold data alone.

    accelerate would skip random states that it cannot read, and run what is in a pickle of our objects.

    Raises:
        ValueError: naming a file that is not.
    """
    listed = checkpoint / _CONTENTS
    try:
        contents = read_json(listed, "") if listed.is_file() else {}  # earlier versions wrote none
        damaged = next((name for name, summary in contents.items() if _summary(checkpoint / name) != summary), None)
    except ValueError:
        damaged = _CONTENTS
    if listed.is_file() and damaged is None and not contents:
        damaged = _CONTENTS
    for path in () if damaged else sorted(checkpoint.glob("custom_checkpoint_*.pkl")):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # of damaged bytes torch raises errors of a dozen kinds
            damaged = path.name
    if damaged is not None:
        raise ValueError(
            f"output: {checkpoint / damaged} is not as it was written; remove {checkpoint} to go on from the one "
            "before it, or --restart"
        )


def _summary(path: Path) -> list[int] | None:
    """[size, checksum] of a file; None: there is none."""
    if not path.is_file():
        return None
    checksum = 0
    with open(path, "rb") as file:
        while part := file.read(2**20):
            checksum = zlib.crc32(part, checksum)
    return [path.stat().st_size, checksum]
