"""Drives CMake, which owns sources and flags (see CMakeLists.txt). Metadata is in pyproject.toml."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
GIB_PER_JOB = 2.5  # a file with torch headers


def parallel_jobs() -> int:
    """As many as cores and free memory allow; MAX_JOBS overrides."""
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, int(free / GIB_PER_JOB)))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        destination = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        in_place = getattr(self, "editable_mode", False) or self.inplace
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{Path(sys.prefix).name}"
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DILVAE_FAST_CUDA={os.environ.get('ILVAE_FAST_CUDA', 'auto')}",
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


setup(ext_modules=[Extension("ilvae_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
