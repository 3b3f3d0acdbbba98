"""The long run: ``python -m tests.faults [--moments 200] [--output FILE]``."""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.faults import CLEAR, ERRORS, Server, assert_nothing_half_written, compiled_shim, results


def killed(folder: Path, moments: int, server: Server) -> dict[str, int]:
    """SIGKILL or SIGINT at random moments of each kind of work, which is then given again until it is done."""
    counts: collections.Counter[str] = collections.Counter()
    chance = random.Random(0)
    expected: dict[str, dict[str, bytes]] = {}
    lasts: dict[str, float] = {}
    for work in ("train", "sweep", "save"):
        start = time.monotonic()
        server.start(work, folder / f"whole-{work}", 0)
        assert server.wait()[0] == 0, f"{work} fails without a fault; see {server.log}"
        lasts[work] = time.monotonic() - start
        expected[work] = results(folder / f"whole-{work}")
    trial = 0
    while counts["SIGKILL"] + counts["SIGINT"] < moments:
        work = ("train", "sweep", "train", "save")[trial % 4]
        here = folder / f"killed-{trial}"
        trial += 1
        while True:
            child = server.start(work, here, 0)
            time.sleep(chance.uniform(0, 0.8 * lasts[work]))
            kind = chance.choice((signal.SIGKILL, signal.SIGINT))
            os.kill(child, kind)  # it is there until it is waited for
            status, _ = server.wait()
            if status not in (0, -signal.SIGKILL, 130):
                raise SystemExit(f"{work} ended with status {status} after {kind.name}; see {server.log}")
            if status:
                counts[kind.name] += 1
                counts[work] += 1
            if here.exists():
                assert_nothing_half_written(here)
            if status == 0:
                break
            if counts["SIGKILL"] + counts["SIGINT"] >= moments or chance.random() < 0.15:
                server.start(work, here, 0)
                assert server.wait()[0] == 0, f"{work} does not go on; see {server.log}"
                break
        if results(here) != expected[work]:
            raise SystemExit(f"{work} ended with other results after it was killed; see {here}")
        counts["work that ended with the results of the uninterrupted one"] += 1
        shutil.rmtree(here)
        print(dict(counts), flush=True)
    return dict(counts)


def failing(folder: Path, server: Server, work: str, every: int) -> dict[str, int]:
    """Every ``every``-th write of a piece of work fails, with the errors in turn, by turns alone and with all later
    ones; then the work is given again."""
    counts: collections.Counter[str] = collections.Counter()
    whole = folder / f"writes-{work}"
    fault = {"under": str(whole), "at": 0, "errno": 0, "stays": 0}
    server.start(work, whole, 0, fault)
    status, calls = server.wait()
    assert (status, calls > 0) == (0, True), f"{work} fails without a fault; see {server.log}"
    expected = results(whole)
    for k, at in enumerate(range(1, calls + 1, every)):
        error, stays = ERRORS[k % 3], k % 2
        here = folder / f"failed-{work}-{at}"
        server.start(work, here, 0, {"under": str(here), "at": at, "errno": error, "stays": stays})
        status, _ = server.wait()
        which = f"{work}: write {at} of {calls} fails{' and all later ones' if stays else ''}: {os.strerror(error)}"
        if status not in (0, CLEAR):
            raise SystemExit(f"{which}; status {status}; see {server.log}")
        counts[os.strerror(error)] += 1
        counts["work that ended all the same" if status == 0 else "work that ended with an error"] += 1
        assert_nothing_half_written(here)
        server.start(work, here, 0)
        if server.wait()[0] != 0:
            raise SystemExit(f"{which}; then nothing works; see {server.log}")
        if results(here) != expected:
            raise SystemExit(f"{which}; then other results; see {here}")
        shutil.rmtree(here)
        print(which, dict(counts), flush=True)
    return {"writes": calls, **counts}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--moments", type=int, default=200, help="of SIGKILL and SIGINT; 0: none")
    parser.add_argument("--every", type=int, default=1, help="every so-many-th write fails; 0: none")
    parser.add_argument("--output", type=Path, help="a file for the summary")
    given = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        with Server(folder, compiled_shim(folder)) as server:
            summary: dict[str, object] = {"command": f"python -m tests.faults {' '.join(sys.argv[1:])}".strip()}
            if given.moments:
                summary["killed"] = killed(folder, given.moments, server)
            if given.every:
                writes = {work: failing(folder, server, work, given.every) for work in ("train", "save")}
                summary["failing writes"] = writes
    described = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(described, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    summary |= {"seconds": round(time.monotonic() - start), "torch": torch.__version__, "commit": commit.strip()}
    print(json.dumps(summary, indent=2))
    if given.output is not None:
        given.output.write_text(json.dumps(summary, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
