"""Drives CMake, which owns sources and flags (see CMakeLists.txt). Metadata is in pyproject.toml, but for what depends
on the torch that the extension is compiled against.

    ILVAE_FAST_CUDA, ILVAE_FAST_CUDA_ARCHITECTURES   see CMakeLists.txt
    ILVAE_FAST_PIN_TORCH=1         name this torch in the wheel's version and require it, as `make wheel` does
    ILVAE_FAST_BACKEND=reference   no extension at all: everything runs by plain autograd
    MAX_JOBS                       parallel compilations
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
GIB_PER_JOB = 2.5  # a file with torch headers
OLDEST_TORCH = "2.11"
NUMPY = "numpy>=1.26"


def parallel_jobs() -> int:
    """As many as cores and free memory allow; MAX_JOBS overrides."""
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, ValueError, OSError):
        return cores
    return max(1, min(cores, int(free / GIB_PER_JOB)))


class Torch(NamedTuple):
    """The torch that the extension is compiled against."""

    folder: str
    version: str

    @classmethod
    def at_hand(cls) -> "Torch":
        found = importlib.util.find_spec("torch")
        if found is None or not found.origin:
            raise SystemExit(
                "ilvae_fast is compiled against the torch that it will run with, and this environment has none. "
                "Install torch first, then: pip install --no-build-isolation ."
            )
        return cls(str(Path(found.origin).parent), importlib.metadata.version("torch"))


def build_folder(root: Path, torch: Torch, prefix: str = sys.prefix) -> Path:
    """A folder of its own for every environment and torch, however they are called."""
    place = hashlib.sha256("\0".join((str(root), prefix, torch.folder)).encode()).hexdigest()[:8]
    return root / "build" / f"{sys.implementation.cache_tag}-torch{torch.version}-{place}"


def remove_orphans(builds: Path) -> None:
    """Remove the build folders of environments that are gone.

    CMake remembers where its tools were. An isolated build has them in a folder of its own that vanishes when it is
    done, and the next one, or another environment in its place, would look there for ninja.
    """
    for cache in builds.glob("*/CMakeCache.txt"):
        named = re.findall(r"^[^:#/]+:FILEPATH=(.*)$", cache.read_text(errors="replace"), re.MULTILINE)
        if any(Path(file).is_absolute() and not Path(file).exists() for file in named):
            shutil.rmtree(cache.parent)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        destination = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        in_place = getattr(self, "editable_mode", False) or self.inplace
        torch = Torch.at_hand()
        build = build_folder(ROOT, torch)
        remove_orphans(build.parent)
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DPython_EXECUTABLE:FILEPATH={sys.executable}",
            f"-DILVAE_FAST_TORCH:FILEPATH={torch.folder}",
            f"-DILVAE_FAST_CUDA={cuda_wanted()}",
        ]
        name = "ILVAE_FAST_CUDA_ARCHITECTURES"
        architectures = os.environ.get(name)  # unset: the default, not what an earlier build had
        configure.append(f"-D{name}={architectures}" if architectures else f"-U{name}")
        sources = runpy.run_path(str(ROOT / "ilvae_fast" / "operators" / "fingerprint.py"))["fingerprint"](ROOT)
        self.run_tool(configure)
        self.run_tool(["cmake", "--build", str(build), "--parallel", str(parallel_jobs())])
        self.install(build, destination, sources)
        if in_place:  # setuptools carries the extension to the sources, but not the record beside it
            self.install(build, ROOT / "ilvae_fast", sources)

    def install(self, build: Path, folder: Path, sources: str) -> None:
        """Put the extension and its record into ``folder``; the record says which ``sources`` it was built from."""
        self.run_tool(["cmake", "--install", str(build), "--prefix", str(folder)])
        record = folder / "_build.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "sources": sources}) + "\n")

    def run_tool(self, command: list[str]) -> None:
        """Run with the tool's own output in view; its messages are the error report."""
        # cmake and ninja from PyPI lie beside the interpreter, whether or not its environment is activated
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        try:
            subprocess.run(command, check=True, env={**os.environ, "PATH": path})
        except FileNotFoundError:
            raise SystemExit(f"{command[0]} not found: pip install cmake ninja") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"building ilvae_fast failed (see above): {' '.join(command)}") from error


def pins_torch() -> bool:
    return os.environ.get("ILVAE_FAST_PIN_TORCH", "0") not in ("", "0")


def cuda_wanted() -> str:
    """As ILVAE_FAST_CUDA says. A wheel whose name says what is in it has CUDA kernels wherever its torch has CUDA."""
    wanted = os.environ.get("ILVAE_FAST_CUDA", "auto")
    return "on" if wanted == "auto" and pins_torch() and torch_cuda() else wanted


def torch_cuda() -> str | None:
    """The CUDA release of torch, such as 13.0, or None."""
    import torch

    return torch.version.cuda


def metadata() -> dict[str, object]:
    """Version and dependencies; with ILVAE_FAST_PIN_TORCH those of one release of torch, whose binary interface it is.

    The label follows PEP 440: 0.1.0+torch2.13.cpu, or 0.1.0+torch2.14.cu130 with CUDA kernels.
    """
    version = runpy.run_path(str(ROOT / "ilvae_fast" / "_version.py"))["__version__"]
    if not pins_torch():
        return {"version": version, "install_requires": [f"torch>={OLDEST_TORCH}", NUMPY]}
    release = ".".join(Torch.at_hand().version.split("+")[0].split(".")[:2])
    kernels = f"cu{(torch_cuda() or '').replace('.', '')}" if cuda_wanted() == "on" else "cpu"
    return {"version": f"{version}+torch{release}.{kernels}", "install_requires": [f"torch=={release}.*", NUMPY]}


if __name__ == "__main__":  # as setuptools runs it; tests import the functions
    compiled = os.environ.get("ILVAE_FAST_BACKEND") != "reference"
    setup(
        ext_modules=[Extension("ilvae_fast._C", sources=[])] if compiled else [],
        cmdclass={"build_ext": CMakeBuild},
        **metadata(),
    )
