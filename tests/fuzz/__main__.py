"""The long run: ``python -m tests.fuzz --inputs 100000 [--kind files] [--first 0] [--output FILE]``.

Another process tries the inputs, a batch at a time, and writes down which one it is at: one that ends it, or that does
not end, is known by its number, and ``--kind KIND --first NUMBER --inputs 1`` tries it again.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS)]
SHARES = {"operators": 0.35, "functions": 0.25, "files": 0.4}
SECONDS = 120  # for one input
GIB = 10  # of address space beyond what is taken at the start


def tried(kind: str, numbers: range, progress: Path) -> None:
    """Try inputs in this process, and write what becomes of them."""
    import resource

    import torch

    import fuzz

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    one = importlib.import_module(f"fuzz.{kind}").one
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + GIB * 2**30,) * 2)
    with open(progress, "a") as file:
        for number in numbers:
            file.write(f"{number} ")
            file.flush()
            torch.manual_seed(number)
            try:
                became = one(fuzz.numbered(kind, number))
            except fuzz.Finding as finding:
                became = f"FINDING {' '.join(str(finding).split())}"
            file.write(f"{became}\n")


def outcomes(kind: str, numbers: range) -> dict[int, str]:
    """What becomes of the inputs; those that end a process, or take too long, are found and left out."""
    found: dict[int, str] = {}
    first = numbers.start
    while first < numbers.stop:
        with tempfile.TemporaryDirectory() as folder:
            progress = Path(folder) / "progress"
            command = [sys.executable, "-m", "tests.fuzz", "--child", str(progress), "--kind", kind]
            command += ["--first", str(first), "--inputs", str(numbers.stop - first)]
            with open(Path(folder) / "errors", "w+") as errors:
                child = subprocess.Popen(command, cwd=TESTS.parent, stdout=errors, stderr=errors)
                size, since = -1, time.monotonic()
                while (status := child.poll()) is None:
                    time.sleep(0.2)
                    now = progress.stat().st_size if progress.exists() else 0
                    if now != size:
                        size, since = now, time.monotonic()
                    elif time.monotonic() - since > SECONDS:
                        child.kill()
                errors.seek(0)
                said = errors.read()[-2000:]
            lines = progress.read_text().splitlines() if progress.exists() else []
        if not lines:
            raise RuntimeError(f"the inputs of {kind} from {first} on were not tried: {said}")
        for line in lines:
            number, _, became = line.partition(" ")
            found[int(number)] = became or f"FINDING the process ended with status {status}: {' '.join(said.split())}"
        first = int(lines[-1].split()[0]) + 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--kind", choices=sorted(SHARES))
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--output", type=Path, help="a file for the summary")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        tried(given.kind, range(given.first, given.first + given.inputs), given.child)
        return 0
    start = time.monotonic()
    shares = {given.kind: 1.0} if given.kind else SHARES
    counts: dict[str, dict[str, int]] = {}
    findings: dict[str, str] = {}
    for kind, share in shares.items():
        last = given.first + round(given.inputs * share)
        became: collections.Counter[str] = collections.Counter()
        for first in range(given.first, last, 2000):
            for number, outcome in outcomes(kind, range(first, min(last, first + 2000))).items():
                became[outcome.split()[0]] += 1
                if outcome.startswith("FINDING"):
                    findings[f"{kind} {number}"] = outcome
                    print(f"{kind} {number}: {outcome}", flush=True)
            print(f"{kind}: {dict(became)} after {time.monotonic() - start:.0f} s", flush=True)
        counts[kind] = dict(sorted(became.items()))
    if given.output is not None:
        import torch

        summary = {
            "command": f"python -m tests.fuzz {' '.join(sys.argv[1:])}",
            "inputs": sum(sum(became.values()) for became in counts.values()),
            "outcomes": counts,
            "findings": findings,
            "seconds": round(time.monotonic() - start),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": subprocess.run(
                ["git", "describe", "--always", "--dirty"],
                cwd=TESTS.parent,
                capture_output=True,
                text=True,
                check=False,
            ).stdout.strip(),
        }
        given.output.write_text(json.dumps(summary, indent=2) + "\n")
    return 1 if findings else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
