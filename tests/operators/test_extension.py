"""Finding the compiled extension: beside the sources, or in an installed copy that was built from the same sources."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import ilvae_fast._C as extension
from ilvae_fast.operators.extension import check_torch, cure, locate, warn_of_cpu_only
from ilvae_fast.operators.fingerprint import fingerprint

ROOT = Path(__file__).parents[2]
FILE = f"_C{EXTENSION_SUFFIXES[0]}"


def _clone(root: Path, code: str = "int a;") -> Path:
    """A clone without an extension; its package."""
    (root / "csrc" / "cpu").mkdir(parents=True)
    (root / "csrc" / "cpu" / "a.cpp").write_text(code)
    (root / "ilvae_fast").mkdir()
    (root / "ilvae_fast" / "_version.py").write_text('__version__ = "1.0"\n')
    return root / "ilvae_fast"


def _installed(site: Path, **record: str) -> Path:
    """An installed copy with an extension that nothing loads; the extension."""
    (site / "ilvae_fast").mkdir(parents=True)
    (site / "ilvae_fast" / "_build.json").write_text(json.dumps(record))
    (site / "ilvae_fast" / FILE).write_bytes(b"")
    return site / "ilvae_fast" / FILE


def test_the_extension_beside_the_sources_comes_first(tmp_path):
    package = _clone(tmp_path / "clone")
    (package / FILE).write_bytes(b"")
    _installed(tmp_path / "site", sources=fingerprint(package.parent))
    assert locate(package, [str(tmp_path / "site")]) == package / FILE


def test_that_of_an_installed_copy_of_the_same_sources_is_found(tmp_path):
    package = _clone(tmp_path / "clone")
    other = _installed(tmp_path / "other", sources="0" * 64)
    found = _installed(tmp_path / "site", sources=fingerprint(package.parent))
    search = [str(tmp_path / "clone"), str(tmp_path / "nothing"), str(other.parents[1]), str(found.parents[1])]
    assert locate(package, search) == found


@pytest.mark.parametrize("change", ["code", "name", "version", "no record"])
def test_that_of_other_sources_is_refused(tmp_path, change):
    package = _clone(tmp_path / "clone")
    record = {} if change == "no record" else {"sources": fingerprint(package.parent)}
    installed = _installed(tmp_path / "site", **record)
    if change == "code":
        (package.parent / "csrc" / "cpu" / "a.cpp").write_text("int b;")
    elif change == "name":
        (package.parent / "csrc" / "cpu" / "a.cpp").rename(package.parent / "csrc" / "a.cpp")
    elif change == "version":
        (package / "_version.py").write_text('__version__ = "1.1"\n')
    with pytest.raises(ImportError) as caught:
        locate(package, [str(tmp_path / "site")])
    message = str(caught.value)
    assert f"no compiled extension in {package}" in message
    assert f"the one in {installed.parent} was built from other C++ sources or another version" in message
    assert f"pip install --no-build-isolation --no-deps --force-reinstall {package.parent}" in message


def test_where_there_is_none_the_error_says_what_to_do(tmp_path):
    package = _clone(tmp_path / "a clone")
    with pytest.raises(ImportError, match="no installed copy of the package was found") as caught:
        locate(package, [str(tmp_path)])
    assert f"--force-reinstall '{package.parent}'" in str(caught.value)
    assert "in a clone of the repository" in cure(tmp_path / "site" / "ilvae_fast")  # which has no sources to build


def test_another_torch_is_refused(tmp_path):
    check_torch(_installed(tmp_path / "same", torch=str(torch.__version__)))
    with pytest.raises(ImportError, match=r"built for torch 1\.9\.0, and torch .* is running"):
        check_torch(_installed(tmp_path / "older", torch="1.9.0"))
    with pytest.raises(ImportError, match="built for torch an unknown version"):
        check_torch(_installed(tmp_path / "unknown"))


@pytest.mark.parametrize("running", ["12.8", None])
def test_kernels_of_another_cuda_are_refused(tmp_path, monkeypatch, running):
    built = _installed(tmp_path, torch=str(torch.__version__), cuda="13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    check_torch(built)
    monkeypatch.setattr(torch.version, "cuda", running)
    with pytest.raises(
        ImportError, match=rf"with CUDA 13\.0, and torch .* with CUDA {running or 'missing'} is running"
    ):
        check_torch(built)


def test_the_record_does_not_depend_on_the_order_of_files(tmp_path):
    """The order in which a file system lists them is not part of the sources."""
    made = []
    for name, order in (("one", ("a", "b", "sub/c")), ("two", ("sub/c", "b", "a"))):
        package = _clone(tmp_path / name)
        for file in order:
            path = package.parent / "csrc" / f"{file}.h"
            path.parent.mkdir(exist_ok=True)
            path.write_text(file)
        made.append(fingerprint(package.parent))
    assert made[0] == made[1]


@pytest.fixture
def clone(tmp_path):
    """The real sources as a clone without an extension, and an installed copy with the real extension."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "_build.json", "__pycache__")
    for folder in ("ilvae_fast", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / "clone" / folder, ignore=ignored)
    shutil.copytree(ROOT / "ilvae_fast", tmp_path / "site" / "ilvae_fast", ignore=ignored)
    built = Path(extension.__file__ or "")
    (tmp_path / "site" / "ilvae_fast" / built.name).symlink_to(built)
    record = {"torch": str(torch.__version__), "sources": fingerprint(tmp_path / "clone")}
    (tmp_path / "site" / "ilvae_fast" / "_build.json").write_text(json.dumps(record))
    return tmp_path / "clone"


def _python(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the clone, where the current folder comes first, then the installed copy."""
    environment = {**os.environ, "PYTHONPATH": str(clone.parent / "site")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=clone, env=environment, capture_output=True, text=True, check=False
    )


def test_python_in_a_clone_borrows_the_installed_extension(clone):
    code = "import ilvae_fast as il, torch; print(il.__file__); print(il._C.__file__); print(il.BrenierMap(2, (3,)))"
    result = _python(clone, "-c", code)
    assert result.returncode == 0, result.stderr
    package, borrowed, *_ = result.stdout.splitlines()
    assert Path(package).parents[1] == clone
    assert Path(borrowed).parents[1] == clone.parent / "site"
    result = _python(clone, "-m", "ilvae_fast", "--help")
    assert result.returncode == 0, result.stderr


def test_python_in_a_clone_with_other_sources_says_so(clone):
    source = clone / "csrc" / "torch" / "bindings.cpp"
    source.write_text(source.read_text() + "\n")
    for arguments in (["-c", "import ilvae_fast"], ["-m", "ilvae_fast", "info"]):
        result = _python(clone, *arguments)
        assert result.returncode != 0
        assert "was built from other C++ sources or another version" in result.stderr
        assert f"pip install --no-build-isolation --no-deps --force-reinstall {clone}" in result.stderr
        assert "circular import" not in result.stderr
        assert "During handling" not in result.stderr


# without an extension


TRIAL = """
import torch, ilvae_fast as il

print(il.build_info()["extension"])
layer = il.BrenierMap(3, (8, 8), inverse_lipschitz=0.5)
x = torch.randn(5, 3, requires_grad=True)
phi, t = layer.potential_and_map(x)
t.square().sum().backward()
torch.func.vmap(torch.func.jacrev(layer))(x)
torch.testing.assert_close(layer.inverse(t.detach()), x, rtol=1e-3, atol=1e-3)
decoder = il.BrenierDecoder(latent_dim=2, data_dim=5, inverse_lipschitz=0.7)
decoder.initialize(torch.rand(20, 5), likelihood="gaussian")
print(decoder(torch.randn(4, 2)).shape, il.advise(torch.randn(50, 5), latent_dim=2, likelihood="gaussian").L)
for native in (lambda: il.use_backend("native").__enter__(), lambda: layer.plan(x)):
    try:
        native()
    except ImportError as error:
        print("ImportError", error)
"""


@pytest.fixture
def bare(clone):
    """The clone, with no installed copy to borrow an extension from."""
    shutil.rmtree(clone.parent / "site" / "ilvae_fast")
    return clone


def test_the_reference_backend_needs_no_extension(bare, monkeypatch):
    """That is what is left where nothing can be compiled, as on Windows."""
    monkeypatch.setenv("ILVAE_FAST_BACKEND", "reference")
    result = _python(bare, "-c", TRIAL)
    assert result.returncode == 0, result.stderr
    state, shape, *errors = result.stdout.splitlines()
    assert state.startswith("none: ilvae_fast has no compiled extension in ")
    assert shape.startswith("torch.Size([4, 5])")
    assert len(errors) == 2
    for error in errors:
        assert error.startswith("ImportError ilvae_fast has no compiled extension in ")
        assert "pip install --no-build-isolation" in error
    result = _python(bare, "-m", "ilvae_fast", "info")
    assert result.returncode == 0, result.stderr
    assert "none: ilvae_fast has no compiled extension" in result.stdout


def test_the_reference_backend_runs_beside_an_extension_of_another_torch(clone, monkeypatch):
    monkeypatch.setenv("ILVAE_FAST_BACKEND", "reference")
    (clone.parent / "site" / "ilvae_fast" / "_build.json").write_text(
        json.dumps({"torch": "1.9.0", "sources": fingerprint(clone)})
    )
    result = _python(clone, "-c", TRIAL)
    assert result.returncode == 0, result.stderr
    assert "was built for torch 1.9.0" in result.stdout


def test_without_an_extension_the_import_names_both_ways_out(bare):
    result = _python(bare, "-c", "import ilvae_fast")
    assert result.returncode != 0
    assert "ilvae_fast has no compiled extension in " in result.stderr
    assert "pip install --no-build-isolation" in result.stderr
    assert "ILVAE_FAST_BACKEND=reference" in result.stderr


# a build without CUDA kernels for a torch with CUDA


@pytest.mark.parametrize("gpus", [0, 1])
def test_where_a_gpu_is_the_import_says_why_its_kernels_were_not_built(tmp_path, monkeypatch, recwarn, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    warn_of_cpu_only(_installed(tmp_path / "asked", torch="2.13.0", without_cuda=""))
    assert not recwarn
    warn_of_cpu_only(_installed(tmp_path / "unasked", torch="2.13.0", without_cuda="no nvcc was found"))
    assert len(recwarn) == gpus
    if gpus:
        message = str(recwarn[0].message)
        assert "was built for the CPU alone" in message
        assert "no nvcc was found" in message
        assert "pip install --no-build-isolation" in message
        assert "ILVAE_FAST_CUDA=off" in message
