"""The build: when CUDA is built, what is refused, that messages reach the user, and what is in a distribution."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

import pytest
import torch

from lowest import EXTRAS, lowest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")

slow = pytest.mark.slow


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


def _words(text: str) -> str:
    """Without the line breaks of CMake's messages."""
    return " ".join(text.split())


@slow
def test_auto_without_nvcc_builds_for_the_cpu_alone(tmp_path):
    result = _configure(tmp_path, "auto", with_nvcc=False)
    assert result.returncode == 0, result.stderr
    assert "Building for the CPU alone" in result.stdout
    assert "CUDA OFF" in result.stdout
    record = json.loads((tmp_path / "_build.json").read_text())
    # of a torch without CUDA there is nothing to say
    assert record["without_cuda"] == (
        "no nvcc was found (put it on PATH, or set CUDACXX)" if torch.version.cuda else ""
    )


@slow
def test_on_without_cuda_is_an_error(tmp_path):
    result = _configure(tmp_path, "on", with_nvcc=False)
    assert result.returncode != 0
    reason = "no nvcc was found" if torch.version.cuda else "is built without CUDA"
    assert f"ILVAE_FAST_CUDA=on, but {'' if torch.version.cuda else 'the installed torch'}" in result.stderr
    assert reason in _words(result.stderr)


@slow
def test_off_disables_cuda_and_other_values_are_refused(tmp_path):
    result = _configure(tmp_path / "off", "off", with_nvcc=True)
    assert "CUDA OFF" in result.stdout, result.stderr
    assert json.loads((tmp_path / "off" / "_build.json").read_text())["without_cuda"] == ""  # as asked for
    result = _configure(tmp_path / "perhaps", "perhaps", with_nvcc=True)
    assert result.returncode != 0
    assert "got 'perhaps', wanted auto, on or off" in _words(result.stderr)


@slow
@pytest.mark.skipif(
    not (torch.version.cuda and shutil.which("nvcc")), reason="needs a CUDA build of torch and nvcc to build with CUDA"
)
def test_auto_with_nvcc_builds_with_cuda(tmp_path):
    result = _configure(tmp_path, "auto", with_nvcc=True)
    assert "CUDA ON" in result.stdout, result.stderr
    assert json.loads((tmp_path / "_build.json").read_text())["without_cuda"] == ""


@slow
@pytest.mark.parametrize("taken", [["-Xclang", "-fopenmp"], []], ids=["Apple's", "none"])
def test_a_compiler_without_the_flag_of_openmp_builds(tmp_path, taken):
    """g++ plays Apple's compiler, which takes -fopenmp behind -Xclang alone, or one that does not know it."""
    compiler = tmp_path / "compiler"
    refuse = 'echo "error: unsupported option $argument" >&2; exit 1'
    hidden = '"$last" = -Xclang' if taken else "1 = 0"
    compiler.write_text(
        "#!/bin/sh\nlast=\nfor argument do\n  shift\n"
        f'  if [ "$argument" = -fopenmp ]; then [ {hidden} ] || {{ {refuse}; }}; fi\n'
        f'  if [ "$argument" = -Xclang ] && ! {str(bool(taken)).lower()}; then {refuse}; fi\n'
        '  [ "$argument" = -Xclang ] || set -- "$@" "$argument"\n  last="$argument"\ndone\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(compiler))
        result = _configure(tmp_path / "build", "off", with_nvcc=False)
    assert result.returncode == 0, result.stderr
    assert ("calls will have one thread each" in result.stdout) == (not taken)
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    for command in commands:
        words = command["command"].split()
        threaded = Path(command["file"]).name in ("fused.cpp", "pointwise.cpp")
        assert [w for w in words if w in ("-Xclang", "-fopenmp")] == (taken if threaded else [])


# nvcc, played by a shell script


def _nvcc(folder: Path, release: str, compiles: str) -> subprocess.CompletedProcess[str]:
    """What cmake/nvcc.cmake finds for torch 2.14.1+cu130 with an nvcc of this release."""
    nvcc = folder / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then {release}; else {compiles}; fi\n')
    nvcc.chmod(0o755)
    (folder / "script.cmake").write_text(
        f'include("{ROOT}/cmake/nvcc.cmake")\n'
        'find_nvcc("2.14.1+cu130" "13.0" compiler trouble)\n'
        'message("<${compiler}> <${trouble}>")\n'
    )
    return subprocess.run(
        ["cmake", "-P", "script.cmake"],
        cwd=folder,
        env={**_environment(False), "CUDACXX": str(nvcc)},
        capture_output=True,
        text=True,
        check=True,
    )


def test_an_nvcc_that_compiles_and_fits_torch_is_taken(tmp_path):
    result = _nvcc(tmp_path, "echo Cuda compilation tools, release 13.2, V13.2.1", "true")
    assert result.stderr == f"<{tmp_path / 'nvcc'}> <>\n"


def test_an_nvcc_of_another_cuda_than_torchs_is_named_with_both_versions(tmp_path):
    result = _nvcc(tmp_path, "echo Cuda compilation tools, release 12.9, V12.9.1", "true")
    assert result.stderr.startswith(f"<> <{tmp_path / 'nvcc'} is of CUDA 12.9")
    assert "torch 2.14.1+cu130 is built for CUDA 13.0" in result.stderr
    assert "set CUDACXX to the nvcc of such a toolkit, or install a torch for CUDA 12" in result.stderr


def test_the_error_of_a_failing_nvcc_is_shown(tmp_path):
    compiler = 'echo "error: unsupported GNU version! \\"gcc\\" later than 15" >&2; exit 1'
    result = _nvcc(tmp_path, "echo release 13.0", compiler)
    assert result.stderr.startswith(f"<> <{tmp_path / 'nvcc'} cannot compile a kernel that does nothing:")
    assert 'unsupported GNU version! "gcc" later than 15' in result.stderr
    result = _nvcc(tmp_path, "echo nvcc: no licence today >&2; exit 3", "true")
    assert "--version fails (3):" in result.stderr
    assert "no licence today" in result.stderr


# build folders


def test_environments_of_one_name_have_build_folders_of_their_own(tmp_path):
    folder, Torch = SETUP["build_folder"], SETUP["Torch"]
    here = Torch("/a/.venv/lib/torch", "2.13.0+cpu")
    ways = [
        folder(tmp_path, here, "/a/.venv"),
        folder(tmp_path, here, "/b/.venv"),
        folder(tmp_path, here._replace(folder="/b/.venv/lib/torch"), "/a/.venv"),
        folder(tmp_path, here._replace(version="2.14.1"), "/a/.venv"),
        folder(tmp_path / "copy", here, "/a/.venv"),
    ]
    assert len({way.name for way in ways}) == len(ways)
    assert folder(tmp_path, here, "/a/.venv") == ways[0]
    assert {way.parent for way in ways} == {tmp_path / "build", tmp_path / "copy" / "build"}


def _tree(folder: Path, mistake: str = "") -> Path:
    """The sources in a new folder, all files of C++ empty, to compile quickly, but one with a mistake where wanted."""
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    folder.mkdir()
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("cmake", "csrc", "ilvae_fast"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for source in (folder / "csrc").rglob("*.cpp"):
        source.write_text("")
    (folder / "csrc" / "route.cpp").write_text(mistake)
    return folder


def _install(
    tree: Path, to: Path, python: Path = Path(sys.executable), path: str = ""
) -> subprocess.CompletedProcess[str]:
    pip = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    environment = {**_environment(False), "ILVAE_FAST_CUDA": "off"}
    return subprocess.run(
        [*pip, "--target", str(to), "."],
        cwd=tree,
        env={**environment, "PATH": path or environment["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )


@slow
def test_a_second_environment_of_the_same_name_builds_when_the_first_is_gone(tmp_path):
    """So does a repeated isolated build, whose ninja lies in a folder that pip makes and removes."""
    tree = _tree(tmp_path / "tree")
    (packages,) = {Path(torch.__file__).parents[1]}
    for name in ("a", "b"):
        place = tmp_path / name / ".venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
        (site,) = place.glob("lib/python*/site-packages")
        (site / "others.pth").write_text(f"{packages}\n")
        for tool in ("cmake", "ninja"):
            found = shutil.which(tool, path=_environment(False)["PATH"])
            assert found
            (place / "bin" / tool).symlink_to(found)
        result = _install(tree, tmp_path / name / "to", place / "bin" / "python", "/usr/bin:/bin")
        assert result.returncode == 0, result.stdout + result.stderr
        assert list((tmp_path / name / "to" / "ilvae_fast").glob("_C*.so"))
        shutil.move(place.parent, tmp_path / f"{name}-moved")
    (kept,) = (tree / "build").glob("*/CMakeCache.txt")  # of the second; the folder of the first is removed
    assert str(tmp_path / "b") in kept.read_text()


@slow
def test_a_compilers_message_reaches_the_user(tmp_path):
    result = _install(_tree(tmp_path / "tree", '#error "a planted mistake"\n'), tmp_path / "to")
    assert result.returncode != 0
    assert "a planted mistake" in result.stdout + result.stderr
    assert "route.cpp:1" in result.stdout + result.stderr


# distributions


def _backend(call: str, tree: Path, **environment: str) -> str:
    """Run a hook of the build backend in the tree; what it returned."""
    code = f"import setuptools.build_meta as backend; print(backend.{call})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**_environment(False), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()[-1]


def _tracked() -> set[str]:
    """The files of the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git repository, to know which files belong to it")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def _copy(names: Iterable[str], folder: Path) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_a_source_distribution_is_the_whole_repository(tmp_path):
    tracked = _tracked()
    tree = _copy(tracked, tmp_path / "tree")
    beside = ["ilvae_fast/_build.json", "ilvae_fast/_C.cpython-311-x86_64-linux-gnu.so", "tests/__pycache__/cases.pyc"]
    for name in beside:  # of a clone that was built and tested
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("{}")
    with tarfile.open(tmp_path / _backend(f"build_sdist({str(tmp_path)!r})", tree)) as file:
        names = {name.partition("/")[2] for name in file.getnames() if file.getmember(name).isfile()}
    made = {name for name in names if name.startswith("ilvae_fast.egg-info/") or name in ("PKG-INFO", "setup.cfg")}
    assert names - made == tracked


def test_a_wheel_without_an_extension_has_all_of_the_package(tmp_path):
    """That is how the library is installed where no compiler is: ILVAE_FAST_BACKEND=reference."""
    tracked = _tracked()
    tree = _copy(tracked, tmp_path / "tree")
    name = _backend(f"build_wheel({str(tmp_path)!r})", tree, ILVAE_FAST_BACKEND="reference")
    assert name.endswith("-py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(tmp_path / name).namelist() if ".dist-info/" not in name}
    assert names == {name for name in tracked if name.startswith("ilvae_fast/")}


def _metadata(folder: Path, **environment: str) -> tuple[str, list[str]]:
    """Version, and what is required without extras."""
    tree = _tree(folder / "tree")
    name = _backend(f"prepare_metadata_for_build_wheel({str(folder)!r})", tree, **environment)
    found = Parser().parsestr((folder / name / "METADATA").read_text())
    return found["Version"], [r for r in found.get_all("Requires-Dist", []) if "extra ==" not in r]


def test_a_wheel_names_and_requires_its_torch(tmp_path):
    release = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    version, required = _metadata(tmp_path, ILVAE_FAST_PIN_TORCH="1", ILVAE_FAST_CUDA="off")
    assert version.endswith(f"+torch{release}.cpu")
    assert f"torch=={release}.*" in required
    assert any(r.startswith("numpy") for r in required)


@slow
@pytest.mark.skipif(not torch.version.cuda, reason="needs a CUDA build of torch")
def test_a_wheel_for_a_torch_with_cuda_has_cuda_kernels_or_fails(tmp_path):
    version, _ = _metadata(tmp_path, ILVAE_FAST_PIN_TORCH="1")
    assert version.endswith(f".cu{torch.version.cuda.replace('.', '')}")
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=tmp_path / "tree",
        env={**_environment(False), "ILVAE_FAST_PIN_TORCH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "ILVAE_FAST_CUDA=on, but no nvcc was found" in _words(result.stderr)


def test_other_builds_take_any_torch_that_is_supported(tmp_path):
    version, required = _metadata(tmp_path)
    assert "+" not in version
    assert f"torch>={SETUP['OLDEST_TORCH']}" in required


def test_without_torch_the_build_says_what_to_install_first(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"this environment has none. Install torch first.*--no-build-isolation"):
        SETUP["Torch"].at_hand()


def test_extras_name_the_lowest_versions_that_ci_tries():
    found = SETUP["metadata"]()["install_requires"]
    assert list(lowest(found, ())) == [SETUP["NUMPY"].replace(">=", "==")]
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("[project.optional-dependencies]") : text.index("[project.scripts]")]
    for extra in EXTRAS:
        block = re.search(rf"^{extra} = \[(.*?)^\]", section, re.MULTILINE | re.DOTALL)
        assert block
        requirements = re.findall(r'"(.*?)"', block[1])
        assert [r for r in requirements if not re.search(r"[>=]=\d", r)] == []
