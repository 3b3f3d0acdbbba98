"""Compiles device code with g++ and runs it on the host; see README.md in this folder."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "executor"
COMPILER = os.environ.get("CXX", "g++")

# Device code reinterprets memory freely, as nvcc lets it. longjmp between stacks is what _FORTIFY_SOURCE forbids.
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-parentheses", "-Wno-unused-function", "-Wno-psabi"]
FLAGS += [f"-I{HERE}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
KERNEL_FLAGS = ["-O1", "-include", "executor.h"]  # kernels take longer to compile than to run
RUNTIME = ("executor", "instructions", "races")
SANITIZE = ["-fsanitize=address,alignment", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
# mode: flags for kernels, flags for the runtime, flags for linking
MODES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "plain": ([], [], []),
    "races": (["-fsanitize=thread", "-Wno-tsan"], ["-DEXECUTOR_RACES"], []),
    "memory": (SANITIZE, SANITIZE, SANITIZE),
}


class ExecutorError(AssertionError):
    """What the executor found wrong with a kernel, one finding a line."""


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@functools.cache
def _compiler_version() -> str:
    if shutil.which(COMPILER) is None:
        raise RuntimeError(f"the host executor needs {COMPILER}; set CXX to another GCC")
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def _up_to_date(target: Path, manifest: Path) -> bool:
    try:
        return target.exists() and all(_digest(f) == d for f, d in json.loads(manifest.read_text()).items())
    except (OSError, ValueError):
        return False


def _built(source: Path, suffix: str, command: list[str], inputs: Iterable[Path] = ()) -> Path:
    """The result of compiling ``source``, made anew where a file that went into it has changed."""
    key = hashlib.sha256(" ".join([_compiler_version(), *command, *map(str, inputs)]).encode()).hexdigest()[:16]
    target = BUILD / f"{source.stem}-{key}{suffix}"
    manifest = target.with_suffix(".json")
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one compiles
        if _up_to_date(target, manifest):
            return target
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            result, dependencies = Path(folder) / target.name, Path(folder) / "dependencies"
            full = [*command, "-MMD", "-MF", str(dependencies), "-o", str(result), str(source), *map(str, inputs)]
            done = subprocess.run(full, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(full)}\n{done.stderr}")
            files = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
            content = json.dumps({f: _digest(f) for f in [*files, *map(str, inputs)]})
            os.replace(result, target)
            manifest.write_text(content)
    return target


@functools.cache
def _without_address_randomisation() -> list[str]:
    """AddressSanitizer's shadow collides with some layouts of kernels that randomise addresses by more than 28 bits."""
    setarch = ["setarch", "--addr-no-randomize"]
    if shutil.which("setarch") is None:
        return []
    works = subprocess.run([*setarch, "true"], capture_output=True, check=False).returncode == 0
    return setarch if works else []


def _pointer(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise ValueError("arrays for the executor are contiguous")
        return ctypes.c_void_p(value.ctypes.data)
    if not value.is_contiguous() or value.device.type != "cpu":
        raise ValueError("tensors for the executor are contiguous and on the CPU")
    return ctypes.c_void_p(value.data_ptr())


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return _pointer(value)


def _as_numpy(value: Any) -> Any:
    """Tensors as arrays of bytes that share their memory; the rest as it is."""
    if value is None or isinstance(value, (int, float, np.ndarray)):
        return value
    import torch

    return value.view(torch.uint8).numpy() if value.dim() else value.view(1).view(torch.uint8).numpy()


class Program:
    """The entries of ``programs/NAME.cpp`` as methods, compiled for one mode; ``defines`` become ``-DNAME=value``.

    Two ways to plant a fault: headers in ``include`` come before those of ``csrc``, and kernels pass by the block
    barrier at ``without_barrier``, the name of a file and a line (not in the mode "memory").

    A method takes ints (int64_t), floats (double), None (a null pointer) and contiguous arrays or tensors (pointers),
    and returns what the entry returns as an int64_t. It raises :class:`ExecutorError` with all findings.
    """

    def __init__(
        self,
        name: str,
        mode: str = "plain",
        defines: Mapping[str, object] | None = None,
        include: str | Path | None = None,
        without_barrier: tuple[str, int] | None = None,
    ):
        self.source = Path(name) if os.path.isabs(name) else HERE / "programs" / f"{name}.cpp"
        self.mode = mode
        self.defines = [f"-D{key}={value}" for key, value in sorted((defines or {}).items())]
        self.include = [f"-I{include}"] if include else []
        self.without_barrier = without_barrier
        self._library: ctypes.CDLL | None = None

    def build(self) -> Path:
        kernel, runtime, link = MODES[self.mode]
        objects = [
            _built(HERE / f"{part}.cpp", ".o", [COMPILER, *FLAGS, *runtime, "-c"]) for part in (RUNTIME)
        ]  # cached, shared by all programs of a mode
        command = [COMPILER, *self.include, *FLAGS, *KERNEL_FLAGS, *kernel, *self.defines]
        compiled = _built(self.source, ".o", [*command, "-c"])
        return self._link(compiled, objects, link)

    def _link(self, compiled: Path, objects: list[Path], flags: list[str]) -> Path:
        command = [COMPILER, "-shared", "-Wl,-Bsymbolic", *flags]
        key = hashlib.sha256(" ".join([*command, *map(_digest, [compiled, *objects])]).encode()).hexdigest()[:16]
        target = BUILD / f"{compiled.stem}-{key}.so"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=BUILD) as folder:
                result = Path(folder) / target.name
                subprocess.run(
                    [*command, "-o", str(result), str(compiled), *map(str, objects), "-ldl"],
                    check=True,
                )
                os.replace(result, target)
        return target

    def __getattr__(self, entry: str) -> Callable[..., int]:
        if entry.startswith("_"):
            raise AttributeError(entry)
        return functools.partial(self._call, entry)

    def _call(self, entry: str, *arguments: Any) -> int:
        if self.mode == "memory":
            return self._call_in_process_of_its_own(entry, arguments)
        if self._library is None:
            self._library = ctypes.CDLL(str(self.build()))
        file, line = self.without_barrier or ("", 0)
        self._library.executor_remove_barrier(file.encode(), ctypes.c_int64(line))  # programs share their libraries
        result, findings = call(self._library, entry, arguments)
        if findings:
            raise ExecutorError(symbolised(findings, Path(self._library._name)))
        return result

    def _call_in_process_of_its_own(self, entry: str, arguments: tuple[Any, ...]) -> int:
        library = self.build()
        arrays = [_as_numpy(a) for a in arguments]
        asan = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            call_file, result_file = Path(folder) / "call", Path(folder) / "result"
            call_file.write_bytes(pickle.dumps((str(library), entry, arrays)))
            done = subprocess.run(
                [
                    *_without_address_randomisation(),
                    sys.executable,
                    str(HERE / "process.py"),
                    str(call_file),
                    str(result_file),
                ],
                env={
                    **os.environ,
                    "LD_PRELOAD": asan.stdout.strip(),
                    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
                    "UBSAN_OPTIONS": "print_stacktrace=1",
                    "OPENBLAS_NUM_THREADS": "1",
                },
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
            if not result_file.exists():
                raise ExecutorError(done.stderr.strip() or f"the process ended with {done.returncode}")
            result, findings, outputs = pickle.loads(result_file.read_bytes())
        for array, output in zip(arrays, outputs, strict=True):
            if isinstance(array, np.ndarray) and array.flags.writeable:
                array[...] = output
        if findings:
            raise ExecutorError(symbolised(findings, library))
        return int(result)


def call(library: ctypes.CDLL, entry: str, arguments: Iterable[Any]) -> tuple[int, str]:
    """Calls an entry and returns its result and the findings."""
    function = getattr(library, entry)
    function.restype = ctypes.c_int64
    result = function(*map(_argument, arguments))
    library.executor_findings.restype = ctypes.c_char_p
    return result, library.executor_findings().decode()


def symbolised(findings: str, library: Path) -> str:
    """Findings with ``{code 0x12}`` replaced by file and line, where binutils are installed (they come with g++)."""
    codes = sorted(set(re.findall(r"\{code (0x[0-9a-f]+)\}", findings)))
    if not codes or shutil.which("addr2line") is None:
        return findings
    for code in codes:
        address = hex(int(code, 16) - 1)  # of the call, not of what follows it
        lines = subprocess.run(
            ["addr2line", "-i", "-e", str(library), address], capture_output=True, text=True, check=False
        ).stdout.splitlines()
        named = [line.split(" (")[0] for line in lines if not line.startswith("??")]
        of_kernels = [line for line in named if "/executor.h:" not in line and "ptx.cuh:" not in line] or named
        if of_kernels:
            findings = findings.replace(f"{{code {code}}}", os.path.relpath(of_kernels[0], ROOT))
    return findings


def build_all(programs: Iterable[Program], workers: int | None = None) -> None:
    """Compiles several programs at once."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        list(pool.map(Program.build, programs))


def same_for_all_orders(call: Callable[[int], Iterable[Any]], seeds: Iterable[int] = range(8)) -> None:
    """``call(seed)`` returns arrays or tensors: asserts that every seed gives the same bits."""
    first: list[bytes] | None = None
    for seed in seeds:
        results = [np.ascontiguousarray(_as_numpy(a)).tobytes() for a in call(seed)]
        if first is None:
            first = results
        for i, (a, b) in enumerate(zip(first, results, strict=True)):
            if a != b:
                raise ExecutorError(f"order dependence: result {i} differs for seed {seed}")
