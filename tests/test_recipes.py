"""The recipes of docs/internals, followed edit by edit: what a stranger copies from them works."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, distributions

import ilvae_fast as il
from executor import BUILD, COMPILER, Program
from ilvae_fast.vae import LIKELIHOODS, VAE, VAEConfig

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "internals"
CSRC = ROOT / "csrc"


def _blocks(page: str, info: str) -> list[str]:
    """The fenced blocks of a page with this info string."""
    return re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", (PAGES / page).read_text(), re.DOTALL | re.MULTILINE)


def _edited(text: str, diffs: list[str]) -> str:
    """``text`` after edits in the form of unified diffs without line numbers: each context occurs exactly once."""
    for diff in diffs:
        lines = diff.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] != mark) for mark in "+-")
        assert text.count(before) == 1, f"{text.count(before)} places for\n{before}"
        text = text.replace(before, after)
    return text


# An activation

ACTIVATION = "add-an-activation.md"
NAME, WIDTH = "huber_relu", 1.5
CODE = 7
# both kinks of the slope, where derivatives are a matter of convention, and enough for whole vectors of every size
GRID = torch.cat([torch.linspace(-5, 5, 254, dtype=torch.float64), torch.tensor([0.0, WIDTH], dtype=torch.float64)])

# s, s' and s'' by the vectors of the fused kernels, and by the pointwise kernels: h = s(a), h' = s'(a) a' from up(),
# D' = g' s'(a) + g s''(a) a' from down() with a' = g = 1 and g' = 0.
DRIVER = """
#define ILVAE_ISA baseline
#include "cpu/pointwise.h"
#include "cpu/vectors.h"

using namespace ilvae;

extern "C" void by_vectors(int64_t kind, double parameter, int64_t n, const double* a, double* value, double* first,
                           double* second) {
  for_activation<double>(Activation{ActivationKind(kind), parameter}, [&](const auto& s) {
    cpu::baseline::activate(s, a, n, [&](int64_t i, const auto& at) {
      at.value.store(value + i);
      at.first.store(first + i);
      at.second.store(second + i);
    });
  });
}

extern "C" void by_pointwise_kernels(int64_t kind, double parameter, int64_t n, const double* a, double* value,
                                     double* first, double* second, const double* ones, const double* zeros,
                                     double* unused) {
  HiddenLayer<double, double> layer;
  layer.rows = 1, layer.width = n, layer.activation = {ActivationKind(kind), parameter}, layer.bias = zeros;
  layer.a = {a, n}, layer.a_tangent = {ones, n}, layer.g = {ones, n}, layer.g_tangent = {zeros, n};
  layer.h = {value, n}, layer.h_tangent = {first, n}, layer.d = {unused, n}, layer.d_tangent = {second, n};
  cpu::baseline::kernels.float64.up(layer, 0, 1);
  cpu::baseline::kernels.float64.down(layer, 0, 1);
}
"""


@pytest.fixture
def row(monkeypatch):
    """The activation's row of the edited activations.py, in the table of the installed one."""
    installed = sys.modules[il.Activation.__module__]
    source = _edited(Path(str(installed.__file__)).read_text(), _blocks(ACTIVATION, "diff activations.py"))
    edited = ModuleType("edited")
    edited.__package__ = installed.__package__
    monkeypatch.setitem(sys.modules, "edited", edited)  # dataclasses look their module up
    exec(compile(source, "activations.py", "exec"), edited.__dict__)
    monkeypatch.setitem(installed._TABLE, NAME, edited._TABLE[NAME])


def _header(folder: Path) -> Path:
    """The headers of core in a folder, the activation added."""
    shutil.copytree(CSRC / "core", folder / "core", dirs_exist_ok=True)
    file = folder / "core" / "activations.h"
    file.write_text(_edited((CSRC / "core" / "activations.h").read_text(), _blocks(ACTIVATION, "diff activations.h")))
    return folder


def _by_autograd() -> list[Tensor]:
    a = GRID.clone().requires_grad_()
    value = il.Activation(NAME, WIDTH)(a)
    (first,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    return [value.detach(), first.detach(), second]


@pytest.mark.slow
def test_an_activation_of_the_recipe_is_in_the_kernels_of_the_cpu(row, tmp_path):
    driver, library = tmp_path / "driver.cpp", tmp_path / "driver.so"
    driver.write_text(DRIVER)
    sources = [str(driver), str(CSRC / "cpu" / "pointwise_baseline.cpp")]
    command = [COMPILER, "-std=c++20", "-O0", "-fPIC", "-shared", "-Wno-psabi", f"-I{_header(tmp_path)}", f"-I{CSRC}"]
    subprocess.run([*command, "-o", str(library), *sources], check=True)
    entries = ctypes.CDLL(str(library))
    extra = [np.ones(len(GRID)), np.zeros(len(GRID)), np.empty(len(GRID))]
    for entry, others in ((entries.by_vectors, []), (entries.by_pointwise_kernels, extra)):
        results = [torch.full_like(GRID, float("nan")) for _ in range(3)]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (GRID, *results)]
        more = [ctypes.c_void_p(array.ctypes.data) for array in others]
        entry(ctypes.c_int64(CODE), ctypes.c_double(WIDTH), ctypes.c_int64(len(GRID)), *pointers, *more)
        for ours, exact in zip(results, _by_autograd(), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-15, atol=1e-15)


@pytest.mark.slow
def test_an_activation_of_the_recipe_is_in_the_kernels_of_cuda(row):
    header = _header(BUILD / "recipe")  # always the same, so that what is compiled is kept
    program = Program("pointwise", defines={"REAL": "double", "OPERAND": "double", "VECTOR": 1}, include=header)
    n = len(GRID)
    kinds, parameters = np.array([CODE, CODE]), np.array([WIDTH, WIDTH])
    sizes = np.array([1, n, n, n])
    zeros, ones = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    value, first, unused, second = (torch.full_like(GRID, float("nan")) for _ in range(4))
    call = (sizes, kinds, parameters, zeros, GRID, ones)
    program.up(*call, value, first, 5, 1, 0)
    program.down(*call, ones, zeros, unused, second, 5, 1, 0)
    for ours, exact in zip((value, first, second), _by_autograd(), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-15, atol=1e-15)


def test_an_activation_of_the_recipe_trains_a_map_and_keeps_its_guarantee(row):
    options = {"activation": il.Activation(NAME, 0.5), "inverse_lipschitz": 0.3, "dtype": torch.float64}
    with il.use_backend("reference"):
        layer = il.BrenierMap(3, (8, 8), **options)
        x, y = torch.randn(64, 3, dtype=torch.float64), torch.randn(64, 3, dtype=torch.float64)
        optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
        losses = []
        for _ in range(40):
            loss = (layer(x) - (2 * x + x.tanh())).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2
        difference = ((layer(x) - layer(y)) * (x - y)).sum(-1)
        assert (difference >= 0.3 * (x - y).square().sum(-1) * (1 - 1e-12)).all()


def test_an_extension_without_the_activation_refuses_it(row):
    layer = il.BrenierMap(3, (8,), activation=NAME)
    with pytest.raises(ValueError, match=rf"activations\[0\]: got code {CODE}, wanted 0 to {CODE - 1}"):
        layer(torch.randn(4, 3))


def test_a_wrong_parameter_of_the_activation_is_named(row):
    with pytest.raises(ValueError, match="got parameter 0, wanted width > 0"):
        il.Activation(NAME, 0)


# A likelihood


@pytest.fixture
def laplace(monkeypatch):
    """The class of the recipe, known by its name as long as a test runs."""
    (source,) = _blocks("add-a-likelihood.md", "python")
    monkeypatch.setitem(LIKELIHOODS, "laplace", None)  # what the block sets is taken back
    names: dict = {}
    exec(source, names)
    assert LIKELIHOODS["laplace"] is names["Laplace"]
    return names["Laplace"]


def test_a_likelihood_of_the_recipe_is_one(laplace):
    likelihood = laplace(0.7)
    x, f = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64).requires_grad_()
    log_prob = likelihood.log_prob(x, f)
    torch.testing.assert_close(log_prob, distributions.Laplace(f, 0.7).log_prob(x).sum(-1))
    (gradient,) = torch.autograd.grad(log_prob.sum(), f)
    torch.testing.assert_close(likelihood.score(x, f), gradient)

    at = torch.tensor([-1.0, 3.0], dtype=torch.float64)
    samples = likelihood.sample(at.expand(40000, 2), torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples.mean(0), likelihood.mean(at), rtol=0, atol=0.03)
    torch.testing.assert_close(samples.var(0), torch.full_like(at, 2 * 0.7**2), rtol=0.05, atol=0)
    torch.testing.assert_close(likelihood.score(samples, at).square().mean(0), likelihood.fisher(at))

    data = torch.randn(101, 4, dtype=torch.float64)
    best = likelihood.marginal(data)
    for step in 0.1 * torch.randn(20, 4, dtype=torch.float64):
        assert likelihood.log_prob(data, best + step).mean() < likelihood.log_prob(data, best).mean()
    with pytest.raises(ValueError, match="scale: got -1"):
        laplace(-1)


def test_a_likelihood_of_the_recipe_trains_a_model_by_its_name(laplace, tmp_path):
    latent = torch.randn(256, 2)
    x = latent @ torch.randn(2, 6) + 0.1 * torch.randn(256, 6)
    options = {"likelihood": "laplace", "likelihood_options": {"scale": 0.3}, "encoder_hidden": (16,)}
    config = VAEConfig.named("il-lidvae", data_dim=6, latent_dim=2, inverse_lipschitz=0.5, **options)
    model = VAE(config)
    model.initialize(x)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(x).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert float(model.decoder.inverse_lipschitz_bound()) == pytest.approx(0.25, rel=1e-5)
    model.save_pretrained(tmp_path)
    assert isinstance(VAE.from_pretrained(tmp_path).likelihood, laplace)
    with pytest.raises(ValueError, match=r"'laplase'.*'laplace'"):
        VAEConfig(data_dim=6, latent_dim=2, likelihood="laplase")


# An operator


def test_the_table_of_operators_is_that_of_the_dispatcher():
    lines = re.findall(r"^\|(.*)\|$", (PAGES / "add-an-operator.md").read_text(), re.MULTILINE)
    (_, *keys), _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    table = {f"ilvae_fast::{name.strip('`')}": [cell == "yes" for cell in cells] for name, *cells in rows}
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ilvae_fast::")]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert table == {name: [has(name, key) for key in keys] for name in names}
