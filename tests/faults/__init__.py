"""Work that is killed, interrupted, or whose disk fails: nothing is lost, and nothing half-written is believed.

:class:`Server` imports once and forks for each piece of work (:data:`WORK`). ``python -m tests.faults`` is the long
run, ``tests/test_faults.py`` a bounded one.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import safetensors.torch

from ilvae_fast.training import TrainConfig, state
from ilvae_fast.vae import VAE

HERE = Path(__file__).parent
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
CLEAR = 3  # the status of work that ended with an error of a kind that callers know

# Reads lines of JSON; "start" forks and prints the number of the child, "wait" prints how it ended and how often it
# wrote.
SERVER = """
import ctypes, json, mmap, os, signal, struct, sys, traceback, warnings
sys.path[:0] = sys.argv[1:3]
import torch, torch.utils.tensorboard
from pathlib import Path
from faults import WORK, CLEAR
torch.set_num_threads(1)
counted = mmap.mmap(-1, 8)
for line in sys.stdin:
    asked = json.loads(line)
    if "wait" in asked:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, struct.unpack("q", counted)[0]]), flush=True)
        continue
    counted[:] = bytes(8)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = open(asked["log"], "a")
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        warnings.simplefilter("ignore")
        shim = ctypes.CDLL(None)
        armed = asked.get("fault")
        if armed:
            shim.fault_arm(os.fsencode(armed["under"]), ctypes.c_long(armed["at"]), armed["errno"], armed["stays"])
        status = 0
        try:
            WORK[asked["work"]](Path(asked["folder"]), asked["seed"])
        except (OSError, ValueError, RuntimeError):
            traceback.print_exc()
            status = CLEAR
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
            status = 1
        if armed:
            shim.fault_calls.restype = ctypes.c_long
            counted[:] = struct.pack("q", shim.fault_calls())
        os._exit(status)
    print(json.dumps(child), flush=True)
"""


def config(folder: Path, seed: int) -> TrainConfig:
    from training_cases import OPTIONS, small

    fields: dict[str, Any] = {"epochs": 3, "checkpoint_every": 2, "model": "il-lidmvae", "L": 0.5, "seed": seed}
    annealing = {"L1": {"kind": "cosine", "start": 3.0, "end": 0.7, "steps": 12}}
    return small(folder, **fields, annealing=annealing, model_options=OPTIONS)


def train(folder: Path, seed: int) -> None:
    from ilvae_fast.training import train

    train(config(folder, seed))


def sweep(folder: Path, seed: int) -> None:
    from ilvae_fast.training import sweep

    sweep(config(folder, seed), [0.5, 1.0], [seed], folder)


def save(folder: Path, seed: int) -> None:
    """A model, again and again to the same place."""
    import torch

    from vae_cases import small_model

    torch.manual_seed(seed)
    model = small_model()
    for _ in range(20):
        model.save_pretrained(folder / "model")


WORK = {"train": train, "sweep": sweep, "save": save}


class Server:
    """Starts work in processes of its own. With ``shim`` its writes can be made to fail."""

    def __init__(self, folder: Path, shim: Path | None = None) -> None:
        self.log = folder / "log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if shim is not None:
            environment["LD_PRELOAD"] = str(shim)
        command = [sys.executable, "-c", SERVER, str(HERE.parents[1]), str(HERE.parent)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def _ask(self, **asked: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, work: str, folder: Path, seed: int, fault: dict[str, Any] | None = None) -> int:
        return self._ask(work=work, folder=str(folder), seed=seed, fault=fault, log=str(self.log))

    def wait(self) -> tuple[int, int]:
        """Exit status, and how many calls wrote something, where a fault was armed."""
        status, calls = self._ask(wait=True)
        return status, calls

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def compiled_shim(folder: Path) -> Path:
    target = folder / "shim.so"
    command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-O1", str(HERE / "shim.c"), "-o", str(target), "-ldl"]
    subprocess.run(command, check=True)
    return target


def assert_nothing_half_written(folder: Path) -> None:
    """Whatever has its final name is whole."""
    for checkpoint in folder.glob("**/step-*"):
        assert (checkpoint / "contents.json").is_file(), checkpoint
        state.check(checkpoint)
    for name in ("metrics.json", "history.json", "sweep.json", "config.json"):
        for path in folder.glob(f"**/{name}"):
            json.loads(path.read_text())
    for path in folder.glob("**/config.yaml"):
        TrainConfig.from_yaml(path)
    for path in folder.glob("**/model.safetensors"):
        safetensors.torch.load(path.read_bytes())


def results(folder: Path) -> dict[str, bytes]:
    """All that is the same in an interrupted run and in one that was not."""
    names = ("metrics.json", "history.json", "sweep.json", "sweep.csv", "model/model.safetensors", "model/config.json")
    found = {str(path.relative_to(folder)): path.read_bytes() for name in names for path in folder.glob(f"**/{name}")}
    assert found
    for path in folder.glob("**/model/config.json"):
        VAE.from_pretrained(path.parent)
    return found
