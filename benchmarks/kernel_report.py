"""What the compiler made of every CUDA kernel: python -m benchmarks.kernel_report [LIBRARY] [--full]

Read from the machine code of the built extension (or of LIBRARY, any file with device code): registers, stack, local
memory, shared memory, tensor-core instructions, and the theoretical occupancy on an A100 and an H100. Ends with an
error where a kernel uses local memory (spills, arrays the compiler could not keep in registers) or where one that is
meant for tensor cores has no tensor-core instruction. Written to benchmarks/results/kernels.json. Needs cuobjdump and
nvdisasm: from a CUDA toolkit, from triton (which every CUDA build of torch brings along), or from PyPI
(nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"

# Kernels by template: those that have to use tensor cores.
TENSOR_CORE_KERNELS = ("tile_kernel", "streamed_kernel")
RESERVED_SHARED = 1024  # of each block, by the system


@dataclass(frozen=True)
class Multiprocessor:
    """What one SM has to share out (CUDA programming guide, table of compute capabilities)."""

    name: str
    shared_bytes: int
    threads: int = 2048
    blocks: int = 32
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor("A100", 164 << 10),
    86: Multiprocessor("A40", 100 << 10, threads=1536, blocks=16),
    89: Multiprocessor("L40", 100 << 10, threads=1536, blocks=24),
    90: Multiprocessor("H100", 228 << 10),
    100: Multiprocessor("B200", 228 << 10),
    120: Multiprocessor("RTX 5090", 100 << 10, threads=1536, blocks=24),
}


@dataclass
class Kernel:
    symbol: str
    name: str  # without return type, namespaces and arguments
    architecture: int
    registers: int
    stack: int
    local: int
    static_shared: int
    threads: int = 0  # of a block, from __launch_bounds__; 0: unknown
    dynamic_shared: int = 0
    local_accesses: int = 0  # instructions: spills and register arrays that landed in memory
    tensor_core: dict[str, int] = field(default_factory=dict)  # instructions by kind

    @property
    def blocks_per_multiprocessor(self) -> int:
        """Theoretical occupancy; 0 where a block does not fit."""
        sm = MULTIPROCESSORS[self.architecture]
        warps = max(1, -(-self.threads // 32))
        registers_per_warp = -(-self.registers * 32 // 256) * 256
        shared = -(-(self.static_shared + self.dynamic_shared + RESERVED_SHARED) // 128) * 128
        return min(
            sm.blocks,
            sm.threads // (32 * warps),
            sm.registers // registers_per_warp // warps,
            sm.shared_bytes // shared,
        )

    @property
    def occupancy(self) -> float:
        sm = MULTIPROCESSORS[self.architecture]
        return self.blocks_per_multiprocessor * -(-self.threads // 32) * 32 / sm.threads

    @property
    def wants_tensor_cores(self) -> bool:
        return self.name.split("<")[0] in TENSOR_CORE_KERNELS


def tool(name: str) -> str | None:
    """The path of a CUDA binary tool, or None."""
    site = Path(sysconfig.get_paths()["purelib"])
    folders = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    folders += [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    folders += [Path("/usr/local/cuda/bin"), *site.glob("nvidia/cu*/bin"), *site.glob("nvidia/cuda_*/bin")]
    folders += [site / "triton" / "backends" / "nvidia" / "bin"]
    for folder in folders:
        if os.access(folder / name, os.X_OK):
            return str(folder / name)
    return None


def missing_tools() -> list[str]:
    return [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]


def _cuobjdump(*arguments: str) -> Iterator[str]:
    if missing := missing_tools():
        raise FileNotFoundError(
            f"{' and '.join(missing)} not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    cuobjdump, nvdisasm = str(tool("cuobjdump")), str(tool("nvdisasm"))
    path = os.pathsep.join([str(Path(nvdisasm).parent), os.environ.get("PATH", "")])
    with (
        tempfile.TemporaryFile("w+") as trouble,
        subprocess.Popen(
            [cuobjdump, *arguments],
            stdout=subprocess.PIPE,
            stderr=trouble,
            text=True,
            errors="replace",
            env={**os.environ, "PATH": path},
        ) as process,
    ):
        assert process.stdout is not None
        yield from process.stdout
        if process.wait():
            trouble.seek(0)
            message = trouble.read().strip()
            if "does not contain device code" not in message:
                raise RuntimeError(f"cuobjdump {' '.join(arguments)} ended with {process.returncode}: {message}")


def _demangled(symbols: Iterable[str]) -> list[str]:
    symbols = list(symbols)
    if shutil.which("c++filt") is None or not symbols:
        return symbols
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return text.splitlines()


def short_name(demangled: str) -> str:
    """``void ilvae::cuda::f<(ilvae::cuda::Operands)2, 32>(int)`` -> ``f<Operands 2, 32>``."""
    name = re.sub(r"\(([\w:]+::)?(\w+)\)(\d+)", r"\2 \3", demangled.removeprefix("void "))
    name = re.sub(r"(\w+::)+", "", name)
    depth = 0
    for i, c in enumerate(name):  # up to the parenthesis of the arguments
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def _read_instructions(library: Path, found: dict[tuple[int, str], Kernel], architecture: int) -> None:
    """Counts what the report wants to know of each kernel's instructions."""
    kernel: Kernel | None = None
    for line in _cuobjdump("-sass", "-arch", f"sm_{architecture}", str(library)):
        if "MMA" in line:
            if kernel is not None and (m := re.search(r"\b(HMMA|IMMA|DMMA|HGMMA)\.[\w.]+", line)):
                kernel.tensor_core[m[0]] = kernel.tensor_core.get(m[0], 0) + 1
        elif " LDL" in line or " STL" in line:
            if kernel is not None:
                kernel.local_accesses += 1
        elif "Function : " in line:
            kernel = found.get((architecture, line.split()[-1]))


def kernels_of(library: Path) -> list[Kernel]:
    """Every kernel in the machine code of a library, for each architecture; PTX is not looked at."""
    found: dict[tuple[int, str], Kernel] = {}
    architecture, symbol = 0, ""
    for line in _cuobjdump("-res-usage", str(library)):
        if m := re.match(r"arch = sm_(\d+)", line):
            architecture = int(m[1])
        elif m := re.match(r"\s*Function (\S+):", line):
            symbol = m[1]
        elif "REG:" in line and symbol:
            usage = {k: int(v) for k, v in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}
            static = usage["SHARED"] - (RESERVED_SHARED if architecture >= 90 else 0)
            found[architecture, symbol] = Kernel(
                symbol, "", architecture, usage["REG"], usage["STACK"], usage["LOCAL"], max(0, static)
            )
            symbol = ""
    keys = list(found)
    for key, name in zip(keys, _demangled(k[1] for k in keys), strict=True):
        found[key].name = short_name(name)

    architectures = sorted({k[0] for k in keys})
    with ThreadPoolExecutor() as pool:  # nearly all of the time
        list(pool.map(functools.partial(_read_instructions, library, found), architectures))

    kernel: Kernel | None = None
    waiting = False
    for line in _cuobjdump("-elf", str(library)):
        if m := re.match(r"\s*(?:code for|arch =) sm_(\d+)", line):
            architecture = int(m[1])
        elif m := re.match(r"\.nv\.info\.(\S+)", line):
            kernel = found.get((architecture, m[1]))
        elif "EIATTR_MAX_THREADS" in line:
            waiting = True
        elif waiting and (m := re.match(r"\s*Value:\s*0x([0-9a-f]+)", line)):
            if kernel is not None:
                kernel.threads = int(m[1], 16)
            waiting = False
    result = [found[k] for k in sorted(keys)]
    _add_dynamic_shared(result)
    return result


LAYOUT_PROGRAM = """
#include <cstdio>
#include "cuda/fused.h"
using namespace ilvae::cuda;
int main() {
  int streamed, kind, n, d, layers, training;
  while (std::scanf("%d %d %d %d %d %d", &streamed, &kind, &n, &d, &layers, &training) == 6)
    std::printf("%d\\n", streamed ? streamed_layout(Operands(kind), n, d, layers).total
                                  : layout(Operands(kind), n, d, layers, training).total);
}
"""


def _tile_shared(shapes: Iterable[tuple[int, ...]]) -> list[int]:
    """Bytes of shared memory of fused kernels (streamed, kind, n, d, layers, training), by the launcher's function."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "layout.cpp", Path(folder) / "layout"
        source.write_text(LAYOUT_PROGRAM)
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, "-std=c++20", f"-I{CSRC}", "-o", str(program), str(source)], check=True)
        text = "\n".join(" ".join(map(str, shape)) for shape in shapes)
        result = subprocess.run([str(program)], input=text, capture_output=True, text=True, check=True)
    return [int(line) for line in result.stdout.split()]


def _add_dynamic_shared(kernels: list[Kernel]) -> None:
    """A map kernel serves every depth, and so does a streamed one: counted at two hidden layers, and at three."""
    pattern = re.compile(r"(tile|streamed)_kernel<Operands (\d+), (\d+), (\d+), (\w+)>")
    tiles, shapes = [], []
    for k in kernels:
        if m := pattern.fullmatch(k.name):
            streamed = m[1] == "streamed"
            training = m[5] not in ("0", "false")
            layers = 3 if streamed else int(m[5]) or 2
            tiles.append(k)
            shapes.append((int(streamed), int(m[2]), int(m[3]), int(m[4]), layers, int(training)))
    if tiles:
        for kernel, total in zip(tiles, _tile_shared(shapes), strict=True):
            kernel.dynamic_shared = total


def violations(kernels: Iterable[Kernel]) -> list[str]:
    """What the gate refuses, one line each."""
    found = []
    for k in kernels:
        where = f"{k.name} on sm_{k.architecture}"
        if k.stack or k.local or k.local_accesses:
            found.append(f"{where}: local memory ({k.stack + k.local} bytes a thread, {k.local_accesses} instructions)")
        if k.wants_tensor_cores and not k.tensor_core:
            found.append(f"{where}: no tensor-core instruction")
    return found


def built_library() -> Path:
    """The extension that ``import ilvae_fast`` loads."""
    import ilvae_fast._C as extension

    assert extension.__file__ is not None
    return Path(extension.__file__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", nargs="?", type=Path, help="default: the built extension")
    parser.add_argument("--full", action="store_true", help="print every kernel, not only one line for each template")
    arguments = parser.parse_args()
    library = arguments.library or built_library()
    kernels = kernels_of(library)
    if not kernels:
        sys.exit(f"{library} holds no machine code for a GPU: it was built for the CPU alone")

    from rich.console import Console
    from rich.table import Table

    from benchmarks.record import provenance, write

    table = Table(title=f"{len(kernels)} kernels in {library.name}")
    for heading in ("kernel", "GPU", "registers", "local", "shared", "threads", "blocks", "occupancy", "tensor core"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    shown = kernels
    if not arguments.full:  # of each template the one with the most registers
        heaviest: dict[tuple[str, int], Kernel] = {}
        for k in kernels:
            key = (k.name.split("<")[0], k.architecture)
            if key not in heaviest or k.registers > heaviest[key].registers:
                heaviest[key] = k
        shown = list(heaviest.values())
    for k in shown:
        table.add_row(
            k.name,
            MULTIPROCESSORS[k.architecture].name,
            str(k.registers),
            str(k.stack + k.local),
            str(k.static_shared + k.dynamic_shared),
            str(k.threads),
            str(k.blocks_per_multiprocessor),
            f"{k.occupancy:.0%}",
            ", ".join(f"{n} {name}" for name, n in k.tensor_core.items()),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    console.print(table)
    if arguments.library is None:
        rows = [
            {**asdict(k), "blocks_per_multiprocessor": k.blocks_per_multiprocessor, "occupancy": k.occupancy}
            for k in kernels
        ]
        console.print("written:", str(write("kernels", {**provenance(), "kernels": rows})))
    if refused := violations(kernels):
        sys.exit("\n".join(["refused:", *refused]))


if __name__ == "__main__":
    main()
