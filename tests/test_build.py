"""The build: when CUDA is built, what is refused, and that a compiler's message reaches the user."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.slow


def _environment(with_nvcc: bool) -> dict[str, str]:
    """PATH with the tools of this environment, with or without nvcc."""
    path = [str(BIN), *os.environ["PATH"].split(os.pathsep)]
    if not with_nvcc:
        path = [folder for folder in path if not (Path(folder) / "nvcc").exists()]
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_PATH", "CUDA_HOME", "CUDAToolkit_ROOT")}
    return {**kept, "PATH": os.pathsep.join(path)}


def _configure(folder: Path, cuda: str, with_nvcc: bool) -> subprocess.CompletedProcess[str]:
    command = ["cmake", f"-S{ROOT}", f"-B{folder}", "-GNinja", f"-DPython_EXECUTABLE={sys.executable}"]
    return subprocess.run(
        [*command, f"-DILVAE_FAST_CUDA={cuda}"],
        env=_environment(with_nvcc),
        capture_output=True,
        text=True,
        check=False,
    )


def test_auto_without_nvcc_builds_for_the_cpu_alone(tmp_path):
    result = _configure(tmp_path, "auto", with_nvcc=False)
    assert result.returncode == 0, result.stderr
    assert "Building for the CPU alone" in result.stdout
    assert "CUDA OFF" in result.stdout


def test_on_without_cuda_is_an_error(tmp_path):
    result = _configure(tmp_path, "on", with_nvcc=False)
    assert result.returncode != 0
    reason = "no working nvcc was found" if torch.version.cuda else "is built without CUDA"
    assert f"ILVAE_FAST_CUDA=on, but {'' if torch.version.cuda else 'the installed torch'}" in result.stderr
    assert reason in " ".join(result.stderr.split())


def test_off_disables_cuda_and_other_values_are_refused(tmp_path):
    result = _configure(tmp_path / "off", "off", with_nvcc=True)
    assert "CUDA OFF" in result.stdout, result.stderr
    result = _configure(tmp_path / "perhaps", "perhaps", with_nvcc=True)
    assert result.returncode != 0
    assert "got 'perhaps', wanted auto, on or off" in " ".join(result.stderr.split())


@pytest.mark.skipif(
    not (torch.version.cuda and shutil.which("nvcc")), reason="needs a CUDA build of torch and nvcc to build with CUDA"
)
def test_auto_with_nvcc_builds_with_cuda(tmp_path):
    result = _configure(tmp_path, "auto", with_nvcc=True)
    assert "CUDA ON" in result.stdout, result.stderr


def test_a_compilers_message_reaches_the_user(tmp_path):
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "ilvae_fast", tmp_path / "ilvae_fast", ignore=ignored)
    mistaken, *others = sorted((tmp_path / "csrc").rglob("*.cpp"))
    mistaken.write_text('#error "a planted mistake"\n')
    for source in others:
        source.write_text("")  # to compile quickly
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    result = subprocess.run(
        [*pip, "--target", str(tmp_path / "to"), "."],
        cwd=tmp_path,
        env={**_environment(False), "ILVAE_FAST_CUDA": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "a planted mistake" in result.stdout + result.stderr
    assert f"{mistaken.name}:1" in result.stdout + result.stderr
