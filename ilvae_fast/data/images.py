"""Images: the digits that scikit-learn carries, and data sets in files of the IDX form under a data root."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._support.extras import require
from .dataset import Dataset, on_cpu, split

# sha256 of the IDX files, unpacked, so that a file packed anew is still known
CHECKSUMS = {
    "mnist/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "mnist/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "mnist/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "fashion_mnist/train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion_mnist/train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "fashion_mnist/t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion_mnist/t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "omniglot/background-28x28-images-idx3-ubyte": "b7ed9b8925d33b6cc1802c9bcb4a318feb91499df1284244dd0f369df93bf1c5",
    "omniglot/evaluation-28x28-images-idx3-ubyte": "e456d06d356d3823d246b8b2b3f67eea42805fa9b440e47ccd437d4e92d290da",
}

_TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}


@on_cpu
def digits() -> Dataset:
    """The 1797 handwritten digits of 8 x 8 pixels that scikit-learn carries, scaled to [0, 1]; no network.

    A fifth (359) is the test part, drawn once and for all.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.

    Raises:
        ImportError: scikit-learn is not installed; says how to install it.
    """
    bunch = require("sklearn.datasets", "train").load_digits()
    images = torch.from_numpy(bunch.data).float() / 16  # grey values 0 .. 16
    return Dataset(*split(images, torch.from_numpy(bunch.target).long(), 0.2), (8, 8))


@on_cpu
def mnist(data_root: str | os.PathLike[str], *, download: bool = False, verify: bool = True) -> Dataset:
    """The 70000 handwritten digits of 28 x 28 pixels, scaled to [0, 1]; 10000 are the test part.

    Files: ``<data_root>/mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte``, with or without ``.gz``.

    Args:
        download: fetch what is missing, by torchvision.
        verify: compare checksums; False takes other data of the same form.

    Source: LeCun, Bottou, Bengio & Haffner, Gradient-based learning applied to document recognition, 1998.

    Raises:
        FileNotFoundError, ValueError: a missing or damaged file.
    """
    return _mnist_like("mnist", data_root, download, verify)


@on_cpu
def fashion_mnist(data_root: str | os.PathLike[str], *, download: bool = False, verify: bool = True) -> Dataset:
    """70000 articles of clothing of 28 x 28 pixels, in the form and with the options of :func:`mnist`.

    Files: ``<data_root>/fashion_mnist/...``. Source: Xiao, Rasul & Vollgraf, arXiv 1708.07747.
    """
    return _mnist_like("fashion_mnist", data_root, download, verify)


@on_cpu
def omniglot(data_root: str | os.PathLike[str], *, verify: bool = True) -> Dataset:
    """Omniglot's characters, drawn twenty times each, reduced to 28 x 28 grey pixels in [0, 1].

    The background set (964 characters, 19280 images) is the training part, the evaluation set (659, 13180) the test
    part; labels number the characters, those of the evaluation set from 964 on. The file has them one character after
    the other; the test part is shuffled, the same way every time, so that its first images are of many. These are not
    the reduction and split of Burda et al. (ICLR 2016): likelihoods are not comparable digit for digit.

    Files: ``<data_root>/omniglot/{background,evaluation}-28x28-images-idx3-ubyte``, with or without ``.gz``.

    Source: Lake, Salakhutdinov & Tenenbaum, Science 350, 2015.

    Raises:
        FileNotFoundError, ValueError: a missing or damaged file.
    """
    folder = Path(data_root) / "omniglot"
    names = [f"omniglot/{part}-28x28-images-idx3-ubyte" for part in ("background", "evaluation")]
    paths = [
        _find(name, [folder], "reduce the images of brendenlake/omniglot to 28 x 28 grey pixels") for name in names
    ]
    train, test = (_images(read_idx(path, _checksum(name, verify))) for path, name in zip(paths, names, strict=True))
    train_labels = torch.arange(len(train)) // 20
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    return Dataset(train, test[order], train_labels, int(train_labels[-1]) + 1 + order // 20, (28, 28))


def read_idx(path: str | os.PathLike[str], sha256: str | None = None) -> np.ndarray:
    """The array of uint8 in an IDX file: a big-endian header (00 00 08, the number of dimensions, then one uint32 per
    dimension) and the values in C order; unpacked first if the name ends in ``.gz``.

    Args:
        sha256: of the unpacked file, to be compared; None: anything goes.

    Raises:
        ValueError: the file is damaged, or of another form; says which file and in what.
    """
    path = Path(path)
    cure = "remove it and get it anew"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: is damaged, it cannot be unpacked ({error}); {cure}") from error
    if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(
            f"{path}: is not the known file: sha256 of its content {found}, wanted {sha256}; {cure}, or "
            "take it as it is by verify=False (--set data_options.verify=false)"
        )
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: starts with {content[:3].hex(' ')!r}, wanted an IDX file of bytes, '00 00 08'")
    offset = 4 + 4 * content[3]
    if len(content) < offset:
        raise ValueError(f"{path}: is damaged, its header is cut off; {cure}")
    shape = struct.unpack(f">{content[3]}I", content[4:offset])
    if len(content) - offset != math.prod(shape):
        raise ValueError(
            f"{path}: is damaged, it holds {len(content) - offset} values and its header says {shape}; {cure}"
        )
    return np.frombuffer(content, np.uint8, offset=offset).reshape(shape)


def _mnist_like(name: str, data_root: str | os.PathLike[str], download: bool, verify: bool) -> Dataset:
    kind = _TORCHVISION[name]
    folders = [Path(data_root) / name, Path(data_root) / kind / "raw"]  # the latter is torchvision's
    files = [f"{name}/{p}-{q}-ubyte" for p in ("train", "t10k") for q in ("images-idx3", "labels-idx1")]
    if download and any(_located(file, folders) is None for file in files):
        getattr(require("torchvision.datasets", "download"), kind)(os.fspath(data_root), download=True)
    cure = (
        f"copy {name}'s official files there, or let torchvision fetch them by download=True "
        "(--set data_options.download=true; it comes with the extra ilvae_fast[download])"
    )
    paths = [_find(file, folders, cure) for file in files]
    arrays = [read_idx(path, _checksum(file, verify)) for path, file in zip(paths, files, strict=True)]
    train, train_labels, test, test_labels = arrays
    for images, labels, path in ((train, train_labels, paths[1]), (test, test_labels, paths[3])):
        if len(images) != len(labels):
            raise ValueError(f"{path}: holds {len(labels)} labels for {len(images)} images")
    return Dataset(_images(train), _images(test), _labels(train_labels), _labels(test_labels), train.shape[1:])


def _images(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.reshape(len(array), -1).copy()).float().div_(255)


def _labels(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy()).long()


def _checksum(name: str, verify: bool) -> str | None:
    return CHECKSUMS[name] if verify else None


def _located(name: str, folders: list[Path]) -> Path | None:
    file = Path(name).name
    candidates = (folder / (file + suffix) for folder in folders for suffix in (".gz", ""))
    return next((path for path in candidates if path.is_file()), None)


def _find(name: str, folders: list[Path], cure: str) -> Path:
    path = _located(name, folders)
    if path is None:
        looked = " and ".join(os.fspath(folder) for folder in folders)
        raise FileNotFoundError(
            f"{Path(name).name}[.gz]: looked in {looked} and found nothing. Name the folder that holds {name} by "
            f"data_root (--data-root) or the environment variable ILVAE_FAST_DATA_ROOT; to get it: {cure}"
        )
    return path
