"""A bounded part of ``python -m tests.faults``: killed work, and writes that fail."""

from __future__ import annotations

import errno
import os
import signal
import time

import pytest

from faults import CLEAR, Server, assert_nothing_half_written, compiled_shim, results
from ilvae_fast.training import state, train
from training_cases import interrupted, small

pytestmark = pytest.mark.slow


def test_a_list_of_contents_torn_at_any_byte_is_not_believed(tmp_path):
    checkpoint = interrupted(small(tmp_path, checkpoint_every=4))
    listed = checkpoint / "contents.json"
    whole = listed.read_bytes()
    state.check(checkpoint)
    for length in range(len(whole) - 1):  # without the last line feed it is whole
        listed.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not as it was written; remove"):
            state.check(checkpoint)
    listed.write_bytes(whole)
    assert train(small(tmp_path, checkpoint_every=4))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with Server(folder, compiled_shim(folder)) as started:
        yield started


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> tuple[dict[str, bytes], int]:
    """What a sweep leaves, and how often training one run of it writes."""
    folder = tmp_path_factory.mktemp("whole")
    server.start("sweep", folder / "sweep", 0)
    assert server.wait()[0] == 0, server.log.read_text()
    server.start("train", folder / "train", 0, {"under": str(folder), "at": 0, "errno": 0, "stays": 0})
    status, calls = server.wait()
    assert (status, calls > 20) == (0, True), server.log.read_text()
    return {**results(folder / "sweep"), **{f"train/{k}": v for k, v in results(folder / "train").items()}}, calls


def test_a_sweep_that_is_killed_and_interrupted_ends_the_same(tmp_path, server, whole):
    expected = {name: content for name, content in whole[0].items() if not name.startswith("train/")}
    for kind, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        child = server.start("sweep", tmp_path / "sweep", 0)
        there = len(list(tmp_path.glob("sweep/*/checkpoints/step-*")))
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("sweep/*/checkpoints/step-*"))) == there:
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.01)
        os.kill(child, kind)
        assert server.wait()[0] == status, server.log.read_text()
        assert_nothing_half_written(tmp_path)
    server.start("sweep", tmp_path / "sweep", 0)
    assert server.wait()[0] == 0, server.log.read_text()
    assert results(tmp_path / "sweep") == expected


@pytest.mark.parametrize(
    ("part", "error", "stays"),
    [(0.1, errno.ENOSPC, 1), (0.35, errno.EIO, 0), (0.6, errno.ENOSPC, 0), (0.9, errno.EACCES, 1)],
)
def test_a_run_whose_write_fails_goes_on_to_the_same_end(tmp_path, server, whole, part, error, stays):
    everything, calls = whole
    expected = {name[6:]: content for name, content in everything.items() if name.startswith("train/")}
    fault = {"under": str(tmp_path), "at": 1 + int(part * calls), "errno": error, "stays": stays}
    server.start("train", tmp_path / "run", 0, fault)
    assert server.wait()[0] in (0, CLEAR), server.log.read_text()
    assert_nothing_half_written(tmp_path)
    server.start("train", tmp_path / "run", 0)
    assert server.wait()[0] == 0, server.log.read_text()
    assert results(tmp_path / "run") == expected


def test_the_shim_makes_writes_fail(tmp_path, server):
    """Otherwise the tests above would show nothing."""
    fault = {"under": str(tmp_path), "at": 3, "errno": errno.ENOSPC, "stays": 1}
    server.start("save", tmp_path / "saved", 0, fault)
    assert server.wait()[0] == CLEAR
    assert "No space left on device" in server.log.read_text()
