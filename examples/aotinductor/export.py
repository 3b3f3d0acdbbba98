"""Compile a decoder ahead of time, for a program without Python.

    python examples/aotinductor/export.py decoder.pt2       # the package
    python examples/aotinductor/export.py --build decode    # main.cpp, the program that reads it
    ./decode decoder.pt2 3 10

The package holds the decoder in plain torch operations (``il.export.plain``), which Inductor fuses: it needs torch's
libraries where it runs, and not this one. It takes any number of rows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

import ilvae_fast as il


def package(decoder: torch.nn.Module, latent_dim: int, path: str) -> None:
    """Write the package of a decoder (N, latent_dim) -> (N, ...)."""
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(
        il.export.plain(decoder), (torch.zeros(2, latent_dim),), dynamic_shapes=({0: rows},), strict=False
    )
    torch._inductor.aoti_compile_and_package(program, package_path=path)


def build(path: str) -> None:
    """Compile main.cpp against the torch that is installed. A project of its own takes find_package(Torch) in CMake."""
    libraries = cpp_extension.library_paths()
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", str(Path(__file__).with_name("main.cpp")), "-o", path]
    command += [f"-I{include}" for include in cpp_extension.include_paths()]
    command += [flag for library in libraries for flag in (f"-L{library}", f"-Wl,-rpath,{library}")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    subprocess.run([*command, abi, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="of the package, or with --build of the program")
    parser.add_argument("--build", action="store_true", help="build the program instead")
    arguments = parser.parse_args()
    if arguments.build:
        build(arguments.path)
        return
    torch.manual_seed(0)
    decoder = il.BrenierDecoder(10, data_shape=(1, 28, 28))  # yours, trained
    package(decoder, 10, arguments.path)


if __name__ == "__main__":
    main()
