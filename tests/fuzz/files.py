"""Files of every kind that the package reads: arbitrary bytes, and good files of which bytes were changed."""

from __future__ import annotations

import functools
import gzip
import io
import json
import random
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ilvae_fast import data, vae
from ilvae_fast._support.files import read_json
from ilvae_fast.data.images import read_idx
from ilvae_fast.training import TrainConfig, reproduce, state

from . import Finding, Refused, call

# of files the user cannot be told more than which one is bad, and why
CLEAR = (ValueError, TypeError, OSError)
TOKENS = (
    b"", b"\0", b"\xff" * 8, b"\x7f\xff\xff\xff", b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"', b"\n", b"\r\n",
    b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"!!python/object/apply:os.system ['true']", b"&a [*a]", b"PK\x03\x04", b"|O",
    b"<f8", b"(1000000000,)", b"9" * 30, b"'x'", b"true",
)  # fmt: skip


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzzed-files-"))


def _mutated(source: random.Random, content: bytes) -> bytes:
    if source.random() < 0.05:
        return source.randbytes(source.choice((0, 1, 8, 100)))
    changed = bytearray(content)
    for _ in range(source.choice((0, 1, 1, 1, 2, 4, 16))):
        where = source.randrange(len(changed) + 1)
        # headers, which lie at the front, decide more than what follows
        where = min(where, source.choice((16, 64, 256, len(changed))))
        how = source.randrange(6)
        if how == 0 and changed:
            changed[where % len(changed)] = source.randrange(256)
        elif how == 1 and changed:
            changed[where % len(changed)] ^= 1 << source.randrange(8)
        elif how == 2:
            changed[where:where] = source.choice(TOKENS)
        elif how == 3:
            del changed[where : where + source.choice((1, 1, 4, 100))]
        elif how == 4:
            del changed[where:]
        else:
            start = source.randrange(len(changed) + 1)
            changed[where:where] = changed[start : start + source.randrange(40)]
    return bytes(changed)


# Good files, and what reads them


def _arrays(compressed: bool, **arrays: np.ndarray) -> bytes:
    content = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(content, **arrays)
    return content.getvalue()


def _npz(source: random.Random) -> tuple[bytes, str, Callable[[Path], Any]]:
    dtype = source.choice(("float32", "uint8", "int64", "bool", "float64"))
    x = np.arange(24).reshape(6, 4).astype(dtype)
    arrays = {"x_train": x, "y_train": np.arange(6)}
    if source.random() < 0.5:
        arrays |= {"x_test": x[:2], "y_test": np.arange(2)}
    options: dict[str, Any] = {"test_fraction": 0.4} if source.random() < 0.5 else {"range": (0, 255)}

    def read(path: Path) -> None:
        loaded = data.npz(path, **options)
        if loaded.train.dtype != torch.float32 or not loaded.train.isfinite().all() or loaded.train.dim() != 2:
            raise Finding(f"data.npz: {loaded.train.dtype} {tuple(loaded.train.shape)}, or values that are not finite")

    return _arrays(source.random() < 0.3, **arrays), "x.npz", read


def _npy(source: random.Random) -> tuple[bytes, str, Callable[[Path], Any]]:
    content = io.BytesIO()
    np.save(content, np.arange(6.0))
    return content.getvalue(), "x.npy", data.npz


def _text(source: random.Random) -> tuple[bytes, str, Callable[[Path], Any]]:
    content = "the first line\nund die zweite, größere\r\n\nthe third\n<eos> a <unk>\nx\n".encode() * 2
    level = source.choice(("character", "word"))

    def read(path: Path) -> None:
        loaded = data.text(path, level=level, length=7, vocabulary_size=9)
        if int(loaded.train.max()) >= (loaded.num_categories or 0) or int(loaded.train.min()) < -1:
            raise Finding("data.text: tokens beyond the vocabulary")

    return content, "lines.txt", read


def _idx(source: random.Random) -> tuple[bytes, str, Callable[[Path], Any]]:
    content = b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 4) + bytes(range(24))
    return (gzip.compress(content, mtime=0), "x.gz", read_idx) if source.random() < 0.5 else (content, "x", read_idx)


def _mnist(source: random.Random) -> tuple[bytes, str, Callable[[Path], Any]]:
    images = b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 4) + bytes(range(24))
    labels = b"\0\0\x08\x01" + struct.pack(">I", 2) + bytes(2)
    folder = _folder() / "mnist"
    folder.mkdir(exist_ok=True)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    name, content = source.choice((("train-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", labels)))
    return content, f"mnist/{name}", lambda path: data.mnist(path.parent.parent, verify=False)


@functools.cache
def _saved() -> dict[str, bytes]:
    torch.manual_seed(0)
    config = vae.VAEConfig.named(
        "il-lidvae", data_dim=6, latent_dim=2, encoder_hidden=(5,), decoder_hidden=((4,), (4,))
    )
    folder = _folder() / "model"
    vae.VAE(config).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _model(source: random.Random) -> tuple[bytes, str, Callable[[Path], Any]]:
    for name, content in _saved().items():
        (_folder() / "model" / name).write_bytes(content)
    name = source.choice(("config.json", "model.safetensors"))

    def read(path: Path) -> None:
        try:
            vae.VAE.from_pretrained(path.parent)
        except (
            RuntimeError
        ) as error:  # of tensors that do not fit, or of memory for a model as large as the numbers say
            if "does not fit config.json" not in str(error) and "memory" not in str(error):
                raise
            raise ValueError(str(error)) from error

    return _saved()[name], f"model/{name}", read


def _yaml(source: random.Random) -> tuple[bytes, str, Callable[[Path], Any]]:
    fields = TrainConfig(data="toy", L=0.5, annealing={"L1": {"kind": "linear", "start": 1.0, "end": 0.5, "steps": 3}})
    return fields.to_yaml().encode(), "config.yaml", TrainConfig.from_yaml


def _measures(source: random.Random) -> tuple[bytes, str, Callable[[Path], Any]]:
    content = json.dumps({"nll": 1.25, "active_units": 3, "warnings": ["x"], "note": None}).encode()
    return content, "metrics.json", lambda path: read_json(path, "remove it")


def _manifest(source: random.Random) -> tuple[bytes, str, Callable[[Path], Any]]:
    checkpoint = _folder() / "step-1"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "a.bin").write_bytes(b"abc")
    content = json.dumps({"a.bin": state._summary(checkpoint / "a.bin")}, indent=2).encode()
    return content, "step-1/contents.json", lambda path: state.check(path.parent)


@functools.cache
def _diverged() -> bytes:
    content = io.BytesIO()
    torch.manual_seed(0)
    config = vae.VAEConfig.named("vae", data_dim=3, latent_dim=1, encoder_hidden=(2,), decoder_hidden=(2,))
    saved = {"model": vae.VAE(config).state_dict(), "optimizer": {}, "x": torch.randn(2, 3), "step": 1}
    rng = {"rng": {"cpu": torch.get_rng_state()}}
    torch.save({**saved, **rng, "config": config.to_dict(), "accumulation": 1, "precision": "no"}, content)
    return content.getvalue()


def _reproduced(source: random.Random) -> tuple[bytes, str, Callable[[Path], Any]]:
    return _diverged(), "process0.pt", reproduce


KINDS = {
    "npz": _npz, "npy": _npy, "text": _text, "idx": _idx, "mnist": _mnist, "model": _model, "yaml": _yaml,
    "metrics": _measures, "manifest": _manifest, "diverged": _reproduced,
}  # fmt: skip


def one(source: random.Random, kind: str | None = None) -> str:
    """Write one file and read it. Returns what became of it."""
    kind = kind or source.choice(sorted(KINDS))
    good, name, read = KINDS[kind](source)
    content = _mutated(source, good)
    path = _folder() / name
    path.write_bytes(content)
    with torch.random.fork_rng(devices=()):
        try:
            call(read, path, clear=CLEAR)
        except Refused as refused:
            if (
                content == good
                and kind != "npy"
                and "range" not in str(refused)
                and "test_fraction" not in str(refused)
            ):
                raise Finding(f"{kind}: refused a good file: {refused}") from refused
            return "refused"
        except Finding as error:
            raise Finding(f"{kind}: {error}") from error
    return "read"
