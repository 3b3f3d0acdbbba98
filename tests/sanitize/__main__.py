"""``make sanitize``: the CPU kernels and operators under sanitizers, in builds of their own.

Under AddressSanitizer and UndefinedBehaviorSanitizer a part of the tests runs with an extension in build/sanitize/,
arbitrary inputs for the operators once for each instruction set. What PyTorch allocates has guarded edges then, too.
Under ThreadSanitizer runs ``races.cpp``, without PyTorch. Needs g++ and its sanitizers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "sanitize"
COMPILER = os.environ.get("CXX", "g++")
SANITIZERS = "address,undefined"
RACES = [
    "csrc/cpu/fused.cpp",
    "csrc/cpu/fused_baseline.cpp",
    "csrc/cpu/pointwise.cpp",
    "csrc/cpu/pointwise_baseline.cpp",
]
# Tests in this process alone: one that they start would have the ordinary extension. Large shapes would take minutes.
TESTS = ["test_fuzz.py", "operators/test_functional.py", "operators/test_softplus.py", "operators/test_fused.py"]
CHOSEN = "not (low_precision or functions or readers or gradcheck or opcheck) and (not test_fused or saved_panels)"
EXAMPLES = "5"  # of hypothesis, for each test


def main() -> int:
    start = time.monotonic()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for step in (races, extension, memory):
        print(f"== {step.__doc__} ({time.monotonic() - start:.0f} s)", flush=True)
        step()
    print(f"no findings ({time.monotonic() - start:.0f} s)")
    return 0


def run(*command: str | Path, **options: Any) -> None:
    done = subprocess.run(list(map(str, command)), check=False, **options)
    if done.returncode:
        raise SystemExit(f"make sanitize: failed (see above): {' '.join(map(str, command))}")


def races() -> None:
    """kernels and their schedule under ThreadSanitizer"""
    folder = BUILD / "races"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++20", "-O1", "-g1", "-fsanitize=thread", "-fopenmp-simd"]
    flags += [f"-I{HERE / 'without_torch'}", f"-I{ROOT / 'csrc'}"]
    sources = [*RACES, "tests/sanitize/races.cpp"]
    objects = [folder / (Path(source).name + ".o") for source in sources]

    def compiled(source: str, target: Path) -> None:
        unoptimised = ["-O0"] if "baseline" in source else []  # which takes minutes with checks
        run(COMPILER, *flags, *unoptimised, "-c", ROOT / source, "-o", target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, sources, objects))
    run(COMPILER, "-fsanitize=thread", *objects, "-o", folder / "races")
    run(folder / "races", env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"})


def extension() -> None:
    """an extension with checks of memory and of undefined behaviour"""
    package = BUILD / "site" / "ilvae_fast"
    configure = ["-GNinja", f"-DPython_EXECUTABLE={sys.executable}", "-DILVAE_FAST_CUDA=off"]
    run("cmake", f"-S{ROOT}", f"-B{BUILD / 'extension'}", *configure, f"-DILVAE_FAST_SANITIZE={SANITIZERS}",
        stdout=subprocess.DEVNULL)  # fmt: skip
    run("cmake", "--build", BUILD / "extension")
    shutil.rmtree(package, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "ilvae_fast", package, ignore=ignored)
    run("cmake", "--install", BUILD / "extension", "--prefix", package, stdout=subprocess.DEVNULL)


def memory() -> None:
    """operators under AddressSanitizer and UndefinedBehaviorSanitizer"""
    libraries = [
        subprocess.run([COMPILER, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout
        for name in ("asan", "ubsan")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(path.strip() for path in libraries),
        # Python and torch keep what they have until the process ends; CUDA wants the gap between shadows
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:protect_shadow_gap=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "ILVAE_FAST_EXAMPLES": EXAMPLES,
    }
    site = BUILD / "site"
    check = "import ilvae_fast, sys; sys.exit(not ilvae_fast.__file__.startswith(sys.argv[1]))"
    run(sys.executable, "-c", check, site, cwd=site, env=environment)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    pytest += ["-c", ROOT / "pyproject.toml", "-o", f"pythonpath={ROOT / 'tests'}", "-k", CHOSEN]
    # what the machine lacks torch replaces by the next best
    for instructions, tests in (("avx512", TESTS), ("avx2", TESTS[:1]), ("default", TESTS[:1])):
        print(f"instruction set {instructions}", flush=True)
        paths = [ROOT / "tests" / test for test in tests]
        run(*pytest, *paths, cwd=site, env={**environment, "ATEN_CPU_CAPABILITY": instructions})


if __name__ == "__main__":
    sys.exit(main())
