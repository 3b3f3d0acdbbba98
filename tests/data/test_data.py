"""Data sets by name."""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import re
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ilvae_fast import data

DATA_ROOT = os.environ.get("ILVAE_FAST_DATA_ROOT")
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path) -> dict[str, np.ndarray]:
    """Synthetic files in MNIST's format under tmp_path / "mnist", and their contents."""
    rng = np.random.default_rng(0)
    shapes = ((30, 4, 5), (30,), (10, 4, 5), (10,))
    arrays = {name: rng.integers(0, 256, shape, np.uint8) for name, shape in zip(FILES, shapes, strict=True)}
    (tmp_path / "mnist").mkdir()
    for k, (name, array) in enumerate(arrays.items()):
        content = idx(array)
        packed = (name + ".gz", gzip.compress(content)) if k % 2 else (name, content)
        (tmp_path / "mnist" / packed[0]).write_bytes(packed[1])
    return arrays


# digits


def test_digits_are_scaled_and_split():
    digits = data.load("digits")
    assert digits.train.shape == (1438, 64)
    assert digits.test.shape == (359, 64)
    assert digits.shape == (8, 8)
    assert digits.train.dtype == digits.test.dtype == torch.float32
    assert digits.train_labels.shape == (1438,)
    assert digits.test_labels.dtype == torch.int64
    pixels = torch.cat([digits.train, digits.test])
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_digits_are_all_of_scikit_learns_once_with_their_labels():
    from sklearn.datasets import load_digits

    bunch, digits = load_digits(), data.load("digits")
    ours = {
        (*image.tolist(), label)
        for images, labels in ((digits.train, digits.train_labels), (digits.test, digits.test_labels))
        for image, label in zip(images * 16, labels.tolist(), strict=True)
    }
    assert len(ours) == 1797
    assert ours == {(*image, label) for image, label in zip(bunch.data.tolist(), bunch.target.tolist(), strict=True)}


def test_the_split_is_always_the_same_and_mixes_the_classes():
    state = torch.get_rng_state()
    first, second = data.load("digits"), data.load("digits")
    assert torch.equal(first.test, second.test)
    assert torch.equal(torch.get_rng_state(), state)  # drawn from a generator of its own
    assert first.test_labels.bincount().min() >= 20


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"sklearn is needed.*pip install 'ilvae_fast\[train\]'"):
        data.load("digits")


# names and options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, r"name: got 'digit', wanted one of .*nearest: 'digits'"),
        ("fashion-mnist", {}, "nearest: 'fashion_mnist'"),
        ("npz:", {}, "nearest: 'npz:FILE'"),
        ("text:", {}, "nearest: 'text:FILE'"),
        ("toy", {"sigm": 1.0}, "option of toy: got 'sigm', wanted one of .*nearest: 'sigma'"),
        ("toy", {"sigma": 0.0}, r"sigma: got 0\.0"),
        ("toy", {"num_train": 0}, "num_train: got 0"),
        ("synthetic_text", {"length": 0}, "length: got 0"),
    ],
)
def test_unknown_names_and_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, **options)


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(TypeError, match="name: got 3, wanted the name of a data set"):
        data.load(3)


def test_options_of_a_data_set_that_has_none_are_refused():
    with pytest.raises(ValueError, match="option of digits: got 'sigma', wanted one of binarize, limit, valid"):
        data.load("digits", sigma=1.0)


# IDX files


def test_idx_files_packed_or_not_become_images_and_labels(tmp_path, small_mnist):
    loaded = data.load("mnist", tmp_path, verify=False)
    assert loaded.shape == (4, 5)
    for tensor, name in zip((loaded.train, loaded.train_labels, loaded.test, loaded.test_labels), FILES, strict=True):
        expected = small_mnist[name]
        if expected.ndim == 3:
            expected = (expected.reshape(len(expected), -1) / np.float32(255)).astype(np.float32)
        assert np.array_equal(tensor.numpy(), expected), name


def test_the_data_root_may_come_from_the_environment_and_follow_torchvision(tmp_path, small_mnist, monkeypatch):
    monkeypatch.setenv("ILVAE_FAST_DATA_ROOT", str(tmp_path / "moved"))
    (tmp_path / "moved" / "MNIST").mkdir(parents=True)
    (tmp_path / "mnist").rename(tmp_path / "moved" / "MNIST" / "raw")
    assert len(data.load("mnist", verify=False).train) == 30


def test_missing_files_are_downloaded_once(tmp_path, small_mnist, monkeypatch):
    fetched = []

    def fetch(root, download):
        (Path(root) / "MNIST").mkdir(parents=True)
        (tmp_path / "mnist").rename(Path(root) / "MNIST" / "raw")  # where torchvision puts it
        fetched.append(download)

    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(MNIST=fetch))
    for _ in range(2):
        assert len(data.load("mnist", tmp_path / "new", download=True, verify=False).train) == 30
    assert fetched == [True]
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"torchvision is needed.*pip install 'ilvae_fast\[download\]'"):
        data.load("fashion_mnist", tmp_path / "new", download=True)


def test_a_missing_file_is_named_with_where_and_how(tmp_path, small_mnist):
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        data.load("mnist", tmp_path, verify=False)
    for part in ("t10k-labels-idx1-ubyte[.gz]", str(tmp_path / "mnist"), "--data-root", "download=True"):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"background-28x28.*brendenlake/omniglot"):
        data.load("omniglot", tmp_path)


def test_a_wrong_checksum_is_refused(tmp_path, small_mnist):
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: is not the known file: sha256.*verify=False"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-labels-idx1-ubyte.gz", lambda c: c[:-12], "cannot be unpacked"),
        ("train-labels-idx1-ubyte.gz", lambda c: b"<html>", "cannot be unpacked"),
        ("train-images-idx3-ubyte", lambda c: c[:-1], r"holds 599 values and its header says \(30, 4, 5\)"),
        ("train-images-idx3-ubyte", lambda c: c[:9], "header is cut off"),
        ("train-images-idx3-ubyte", lambda c: b"<html>", "wanted an IDX file"),
        ("train-images-idx3-ubyte", lambda c: c[:2] + b"\x0d" + c[3:], "wanted an IDX file of bytes"),
        ("t10k-labels-idx1-ubyte.gz", lambda c: gzip.compress(idx(np.zeros(3, np.uint8))), "3 labels for 10 images"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, small_mnist, name, damage, message):
    path = tmp_path / "mnist" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        data.load("mnist", tmp_path, verify=False)
    assert str(path) in str(caught.value)


def test_omniglot_labels_number_the_characters(tmp_path):
    (tmp_path / "omniglot").mkdir()
    for part, count in (("background", 60), ("evaluation", 100)):
        numbered = np.arange(count, dtype=np.uint8).reshape(count, 1, 1).repeat(28, 1).repeat(28, 2)
        (tmp_path / "omniglot" / f"{part}-28x28-images-idx3-ubyte").write_bytes(idx(numbered))
    state = torch.get_rng_state()
    loaded, again = (data.load("omniglot", tmp_path, verify=False) for _ in range(2))
    assert loaded.train_labels.tolist() == sorted([0, 1, 2] * 20)
    numbers = (loaded.test[:, 0] * 255).round().long()
    assert numbers.sort().values.tolist() == list(range(100))
    assert torch.equal(loaded.test_labels, 3 + numbers // 20)
    assert set(loaded.test_labels[:20].tolist()) == {3, 4, 5, 6, 7}  # shuffled: the first ones cover all characters
    assert torch.equal(loaded.test, again.test)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.skipif(DATA_ROOT is None, reason="ILVAE_FAST_DATA_ROOT names no folder with the real files")
@pytest.mark.parametrize(
    ("name", "train", "test", "mean"),
    [
        ("mnist", 60000, 10000, 33.318421),
        ("fashion_mnist", 60000, 10000, 72.940352),
        ("omniglot", 19280, 13180, 19.874234),
    ],
)
def test_the_real_files(name, train, test, mean):
    loaded = data.load(name)
    assert loaded.train.shape == (train, 784)
    assert loaded.test.shape == (test, 784)
    assert loaded.train.double().mean().item() * 255 == pytest.approx(mean, abs=1e-4)
    if name == "mnist":
        assert loaded.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


# drawn data


@pytest.mark.parametrize("name", ["toy", "pinwheel", "synthetic_text"])
def test_synthetic_data_are_reproducible_and_leave_torchs_generator_alone(name):
    options = {"num_sentences": 50} if name == "synthetic_text" else {}
    state = torch.get_rng_state()
    first, second = data.load(name, **options), data.load(name, **options)
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.test_labels, second.test_labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.train, data.load(name, **options, seed=1).train)


def test_toy_data_have_the_means_and_the_bayes_accuracy_they_should():
    toy = data.load("toy", sigma=7.5, num_train=40000)
    for label in (0, 1):
        part = toy.train[toy.train_labels == label]
        torch.testing.assert_close(part.mean(0), torch.full((2,), 10.0 * label), atol=0.2, rtol=0)
        torch.testing.assert_close(part.std(0), torch.full((2,), 7.5), atol=0.2, rtol=0)
    best = (toy.train.sum(-1) > 10).long()  # the nearer mean
    limit = 0.5 * (1 + math.erf(math.sqrt(2) * 10 / (2 * 7.5) / math.sqrt(2)))
    assert (best == toy.train_labels).float().mean().item() == pytest.approx(limit, abs=0.01)


def test_pinwheel_arms_are_equal_up_to_rotation():
    wheel = data.load("pinwheel", num_per_class=2000)
    x, labels = torch.cat([wheel.train, wheel.test]), torch.cat([wheel.train_labels, wheel.test_labels])
    assert labels.bincount().tolist() == [2000] * 5
    means = torch.stack([x[labels == k].mean(0) for k in range(5)])
    angles = torch.atan2(means[:, 1], means[:, 0])
    turns = (angles[:-1] - angles[1:]) % (2 * math.pi)
    torch.testing.assert_close(turns, torch.full((4,), 2 * math.pi / 5), atol=0.02, rtol=0)


def test_synthetic_sentences_depend_on_their_latent():
    text = data.load("synthetic_text", num_sentences=4000, vocabulary_size=50)
    assert text.train.shape == (3600, 10)
    assert text.train.dtype == torch.int64
    assert (text.num_categories, text.shape) == (50, (10,))
    assert 0 <= text.train.min() < text.train.max() < 50
    # the first token is independent of the Gaussian, the others are not: their frequencies differ between Gaussians
    counts = torch.zeros(2, 4, 50)
    for row, column in ((0, text.train[:, 0]), (1, text.train[:, -1])):
        counts[row].index_put_((text.train_labels, column), torch.tensor(1.0), accumulate=True)
    frequencies = counts / counts.sum(-1, keepdim=True)
    apart = (frequencies[:, 0] - frequencies[:, 3]).abs().sum(-1)
    assert apart[0] < 0.5
    assert apart[1] > 1.0


# the user's files


def test_lines_of_text_become_tokens_and_come_back(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text("abba\n\n  \nab é\ncab\n" * 4, encoding="utf-8")
    loaded = data.load(f"text:{path}", length=4)
    assert loaded.train.shape == (11, 4)
    assert loaded.test.shape == (1, 4)
    assert loaded.num_categories == len(loaded.vocabulary) == 7
    lines = loaded.to_text(torch.cat([loaded.train, loaded.test]))
    assert sorted(set(lines)) == ["ab é", "abba", "cab<eos>"]
    letter = loaded.vocabulary.index("a")
    assert loaded.to_text(torch.tensor([[letter, 0, letter, 0]])) == ["a<eos>"]
    short = data.load(f"text:{path}", length=9)
    assert (short.train == -1).any()
    assert "abba<eos>" in short.to_text(short.train)
    words = data.load(f"text:{path}", level="word", vocabulary_size=3)
    assert set(words.to_text(words.train)) == {"<unk><eos>".replace("><", "> <"), "abba <eos>", "<unk> <unk> <eos>"}


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path):
    path = tmp_path / "lines"
    separators = "\u2028\u2029\x85\x0c\x0b\x1c\x1d\x1e\r"
    path.write_bytes(("\ufeff" + "".join(f"a{c}b\r\n" for c in separators) * 10).encode())
    letters = data.text(path, length=4)
    assert len(letters.train) + len(letters.test) == 10 * len(separators)
    assert set(letters.vocabulary) == {"<eos>", "<unk>", "a", "b", *separators}
    words = data.text(path, level="word", length=3)
    assert set(words.vocabulary) == {"<eos>", "<unk>", "a", "b"}  # white space separates words, as before
    path.write_bytes(b"\xef\xbb\xbf" + b"word\n" * 10)
    assert data.text(path, level="word", length=2).vocabulary == ("<eos>", "<unk>", "word")


DEFAULTS = {
    "digits": {},
    "toy": {"num_train": 20, "num_test": 10},
    "pinwheel": {"num_per_class": 10},
    "synthetic_text": {"num_sentences": 20, "hidden": 5},
}


@pytest.mark.parametrize("name", [*DEFAULTS, "text", "npz"])
def test_data_do_not_depend_on_the_defaults_of_torch(name, tmp_path):
    if name == "text":
        (tmp_path / "text").write_text("ab\nba\n" * 10)
        name, options = f"text:{tmp_path / 'text'}", {"length": 3}
    elif name == "npz":
        np.savez(tmp_path / "x.npz", x_train=np.arange(40.0).reshape(20, 2), y_train=np.arange(20))
        name, options = f"npz:{tmp_path / 'x.npz'}", {}
    else:
        options = DEFAULTS[name]
    wanted = data.load(name, **options)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        loaded = data.load(name, **options)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    for ours, theirs in zip(loaded, wanted, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs
    assert wanted.train.dtype in (torch.float32, torch.int64)


def test_reserved_words_in_a_text_are_the_reserved_tokens(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("a <unk> b <eos>\n" * 10)
    words = data.load(f"text:{path}", level="word", length=6)
    assert sorted(words.vocabulary) == ["<eos>", "<unk>", "a", "b"]
    assert words.vocabulary[:2] == ("<eos>", "<unk>")
    a, b = words.vocabulary.index("a"), words.vocabulary.index("b")
    assert words.train.unique(dim=0).tolist() == [[a, 1, b, 0, -1, -1]]
    assert set(words.to_text(words.test)) == {"a <unk> b <eos>"}
    letters = data.load(f"text:{path}", length=20)  # as characters, these are ordinary text
    assert set("<eos>unkab ") == set(letters.vocabulary[2:])
    assert set(letters.to_text(letters.train)) == {"a <unk> b <eos><eos>"}


def test_tokens_of_the_test_set_alone_are_unknown(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("".join(f"word{k} the\n" for k in range(20)))
    words = data.load(f"text:{path}", level="word", test_fraction=0.25)
    assert len(words.vocabulary) == 2 + 15 + 1
    assert set(words.to_text(words.test)) == {"<unk> the <eos>"}
    assert (words.train != 1).all()


def test_bad_text_is_refused(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        data.load(f"text:{path}")
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="no line"):
        data.load(f"text:{path}")
    with pytest.raises(ValueError, match=r"level: got 'words'.*nearest: 'word'"):
        data.load(f"text:{path}", level="words")
    with pytest.raises(FileNotFoundError):
        data.load(f"text:{tmp_path / 'none'}")


def test_arrays_are_scaled_flattened_and_split(tmp_path):
    path = tmp_path / "arrays.npz"
    x = np.arange(20 * 6, dtype=np.uint8).reshape(20, 2, 3)
    np.savez(path, x_train=x, y_train=np.arange(20))
    loaded = data.load(f"npz:{path}", test_fraction=0.25)
    assert (len(loaded.train), len(loaded.test), loaded.shape) == (15, 5, (2, 3))
    torch.testing.assert_close(loaded.test, torch.from_numpy(x[loaded.test_labels].reshape(5, 6) / np.float32(255)))
    assert loaded.unit_range
    np.savez(path, x_train=x.astype(np.float64), x_test=x[:3] + 1.5)
    loaded = data.load(f"npz:{path}")
    assert loaded.test_labels is None
    assert not loaded.unit_range
    torch.testing.assert_close(loaded.test, torch.from_numpy(x[:3].reshape(3, 6) + 1.5).float())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int64, np.float32, np.float64])
def test_a_range_becomes_the_unit_interval(tmp_path, dtype):
    path = tmp_path / "arrays.npz"
    x = np.linspace(0, 255, 12).round().astype(dtype).reshape(3, 2, 2)
    np.savez(path, x_train=x, x_test=x)
    for bounds in ([0, 255], (0.0, 255.0)):
        loaded = data.load(f"npz:{path}", range=bounds)
        torch.testing.assert_close(loaded.train, torch.from_numpy(x.reshape(3, 4).astype(np.float32) / 255))
    signed = (x.astype(np.float64) / 127.5 - 1).astype(np.float32)
    np.savez(path, x_train=signed, x_test=signed)
    torch.testing.assert_close(data.load(f"npz:{path}", range=[-1, 1]).test, loaded.test, rtol=0, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"^range: got \[0.0, 1.0\], but x_train has [567] values outside, from -1 to 1"
    ):
        data.load(f"npz:{path}", range=[0, 1])


def test_truth_values_are_zero_and_one(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=np.eye(4, dtype=bool).reshape(4, 2, 2))
    loaded = data.load(f"npz:{tmp_path / 'x.npz'}", test_fraction=0.25)
    assert sorted(loaded.train.unique().tolist()) == [0, 1]
    assert loaded.unit_range


@pytest.mark.parametrize("bounds", ["0, 255", 255, [0], [255, 0], [0, 0], [0, float("nan")], [0, "1"], [True, 2]])
def test_bad_ranges_are_refused(tmp_path, bounds):
    np.savez(tmp_path / "x.npz", x_train=np.zeros((4, 2)))
    with pytest.raises((TypeError, ValueError), match=r"^range: got "):
        data.load(f"npz:{tmp_path / 'x.npz'}", range=bounds)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 2))}, "holds x, wanted x_train"),
        ({"x_train": np.zeros((3, 2)), "x_test": np.zeros((0, 2))}, "x_test has no rows, wanted at least one"),
        ({"x_train": np.zeros(3)}, r"x_train is float64 of shape \(3,\), wanted numbers \(N, \.\.\.\)$"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.zeros(2)}, r"y_train has shape \(2,\)"),
        ({"x_train": np.zeros((3, 2)), "x_test": np.zeros((3, 4))}, "x_test"),
        ({"x_train": np.array([["a", "b"]])}, "x_train is <U1"),
        (
            {"x_train": np.zeros((3, 2), np.uint8), "x_test": np.zeros((3, 2), np.int64)},
            "x_test is int64, wanted the type of x_train, uint8",
        ),
        ({"x_train": np.array([[0.0, np.nan], [np.inf, 1.0], [1.0, 1.0]])}, "x_train has 2 values that are NaN or inf"),
        ({"x_train": np.zeros((3, 2)), "x_test": np.full((1, 2), 1e300)}, "x_test has 2 values that are NaN or inf"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.array([0.0, 0.25, 0.75])}, r"y_train has 2 labels like 0\.25"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.array([0, -1, 2])}, "y_train has 1 labels like -1, wanted whole"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.array([0, np.nan, np.inf])}, "y_train has 2 labels like nan"),
        ({"x_train": np.zeros((3, 2)), "y_train": np.array(["0", "1", "2"])}, "y_train is <U1, wanted whole"),
    ],
)
def test_inconsistent_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "arrays.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load(f"npz:{tmp_path / 'arrays.npz'}")


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.uint8, np.int32])
def test_labels_may_be_of_any_type_that_holds_whole_numbers(tmp_path, dtype):
    path = tmp_path / "arrays.npz"
    np.savez(path, x_train=np.zeros((3, 2)), x_test=np.zeros((1, 2)), y_train=np.array([0, 7, 2], dtype))
    labels = data.load(f"npz:{path}").train_labels
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 7, 2]


def archive(**arrays) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def single_array() -> bytes:
    content = io.BytesIO()
    np.save(content, np.zeros((3, 2)))
    return content.getvalue()


NO_ARCHIVES = {
    "nonsense": (b"PK\x03\x04 nonsense", "is damaged, or holds other things than arrays"),
    "empty": (b"", "is empty"),
    "a table": (b"1.0,2.0\n3.0,4.0\n", "is not an archive of arrays"),
    "a single array": (single_array(), "is a single array, as numpy.save writes it"),
    "objects": (archive(x_train=np.array([{}, []], object)), "is damaged, or holds other things than arrays"),
}


@pytest.mark.parametrize("name", NO_ARCHIVES)
def test_a_file_that_is_not_an_archive_of_arrays_is_refused(tmp_path, name):
    path, (content, found) = tmp_path / "arrays.npz", NO_ARCHIVES[name]
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^{path}: {re.escape(found)}.*; wanted an archive: numpy\.savez\(path, x_train"
    ):
        data.load(f"npz:{path}")


def test_an_archive_that_was_cut_off_or_changed_is_refused_or_whole(tmp_path):
    path, whole = tmp_path / "arrays.npz", archive(x_train=np.arange(40.0).reshape(20, 2))
    for cut in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"^{path}: "):
            data.load(f"npz:{path}")
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with contextlib.suppress(ValueError):
            data.load(f"npz:{path}")
