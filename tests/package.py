"""Builds what strangers install, a source distribution or a wheel, and tries each in a clean environment.

    python tests/package.py sdist wheel

Both land in dist/. An environment is made for each, with the torch and the other packages of this one, but nothing of
the clone, and the trial runs in another folder. The sdist is compiled anew, which takes minutes; the wheel takes the
objects of this clone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet"]

TRIAL = """
import sys, torch, ilvae_fast as il

print(il.build_info())
assert il.__file__.startswith(sys.prefix), f"the clone's sources, not the installed ones: {il.__file__}"
layer = il.BrenierMap(3, (8, 8), inverse_lipschitz=0.5)
x = torch.randn(40, 3, requires_grad=True)
there = layer(x)
there.square().sum().backward()
with il.use_backend("reference"):
    torch.testing.assert_close(there, layer(x))
assert x.grad.isfinite().all()
"""
COMMANDS = (
    ["info"],
    ["advise", "--data", "digits", "--latent-dim", "4"],
    ["train", "--data", "digits", "--model", "il-lidvae", "--L", "0.5", "--epochs", "1", "--output", "run"],
    ["report", "run"],
)


def build(kind: str, folder: Path) -> Path:
    """The file of the distribution."""
    with tempfile.TemporaryDirectory() as made:
        if kind == "sdist":
            code = f"import setuptools.build_meta as backend; backend.build_sdist({made!r})"
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        else:
            subprocess.run(
                [*PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", made, str(ROOT)],
                env={**os.environ, "ILVAE_FAST_PIN_TORCH": "1"},
                check=True,
            )
        (file,) = Path(made).iterdir()
        folder.mkdir(exist_ok=True)
        return Path(shutil.copy(file, folder))


def environment(folder: Path) -> Path:
    """The Python of a new environment that sees the packages of this one, but for those that are installed in place."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def try_out(file: Path) -> None:
    """Install the distribution in a clean environment, and run it from another folder."""
    with tempfile.TemporaryDirectory() as temporary:
        elsewhere = Path(temporary).resolve()
        python = environment(elsewhere / "environment")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # cmake and ninja
        pip = [*PIP, "--python", str(python)]
        install = ["install", "--no-build-isolation", "--no-index", "--no-deps", "--ignore-installed", str(file)]
        subprocess.run([*pip, *install], cwd=elsewhere, env={**os.environ, "PATH": path}, check=True)
        check = subprocess.run([*pip, "check"], cwd=elsewhere, capture_output=True, text=True, check=False)
        broken = [line for line in check.stdout.splitlines() if line.startswith("ilvae_fast ")]
        assert not broken, broken
        subprocess.run([python, "-I", "-c", TRIAL], cwd=elsewhere, check=True)
        for command in COMMANDS:
            subprocess.run([python.parent / "ilvae-fast", *command], cwd=elsewhere, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=("sdist", "wheel"))
    for kind in parser.parse_args().kinds:
        file = build(kind, ROOT / "dist")
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 2**20:.1f} MiB", flush=True)
        try_out(file)
        print(f"{file.name}: installed in a clean environment and tried in another folder", flush=True)


if __name__ == "__main__":
    main()
