"""Plain copies of models, and ONNX files read by onnxruntime."""

import runpy
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort  # of the extra interop: to fail, not skip, where it is missing
import pytest
import torch
from torch import nn

import ilvae_fast as il
from ilvae_fast.operators.activations import _TABLE


class Model(nn.Module):
    """One of ours in it twice, and others around."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 3)
        self.decoder = il.BrenierDecoder(3, 6)
        self.again = self.decoder
        self.maps = nn.ModuleList([il.BrenierMap(6, (8,)), nn.Softplus()])

    def forward(self, x):
        return self.maps[1](self.maps[0](self.decoder(self.embed(x)))) + self.again(self.embed(x))


FIRST = [name for name in _TABLE if name != "identity"]
LATER = [name for name in FIRST if _TABLE[name].monotone]
MODULES = {
    **{f"first {name}": lambda name=name: il.BrenierMap(5, (9, 8), first_activation=name) for name in FIRST},
    **{name: lambda name=name: il.BrenierMap(5, (9, 8), activation=name) for name in LATER},
    "one layer": lambda: il.BrenierMap(5, (9,), output_activation="softplus", inverse_lipschitz=il.Trained(0.5)),
    **{
        embedding: lambda embedding=embedding: il.BrenierDecoder(3, data_shape=(2, 4), embedding=embedding)
        for embedding in ("identity", "orthogonal", "full_rank")
    },
    "decoder of images": lambda: il.BrenierDecoder(10, 784, nonneg="softplus"),
    "model": Model,
}


def _width(module):
    return 4 if isinstance(module, Model) else module.latent_dim if hasattr(module, "latent_dim") else 5


def _run(path, x):
    session = ort.InferenceSession(str(path))
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.mark.parametrize("name", MODULES)
def test_a_file_computes_what_the_module_does(name, tmp_path: Path):
    torch.manual_seed(0)
    module = MODULES[name]()
    arguments = (torch.zeros(2, 4),) if isinstance(module, Model) else None
    il.export.onnx(module, tmp_path / "model.onnx", arguments)
    for rows in (1, 2, 37):  # the batch is free
        x = torch.randn(rows, _width(module))
        with torch.no_grad():
            wanted = module(x).numpy()
        found = _run(tmp_path / "model.onnx", x)
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", ["one layer", "identity", "full_rank"])
def test_torch_exports_models_that_hold_ours(name, tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(MODULES[name](), nn.Tanh())
    x = torch.randn(3, _width(model[0]))
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    with torch.no_grad():
        wanted = model(x).numpy()
    assert np.abs(_run(tmp_path / "model.onnx", x) - wanted).max() <= 1e-6


@pytest.mark.parametrize("name", MODULES)
def test_plain_copies_equal_the_module(name):
    module = MODULES[name]().double()
    plain = il.export.plain(module)
    assert not any(isinstance(m, il.BrenierMap | il.BrenierDecoder) for m in plain.modules())
    x = torch.randn(2, 6, _width(module), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), module(x), rtol=1e-12, atol=1e-12)
        if isinstance(module, il.BrenierMap):
            torch.testing.assert_close(plain.potential(x), module.potential(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # a copy: what is trained later leaves it as it is
        before = plain(x)
        for parameter in module.parameters():
            parameter.add_(0.1)
        assert torch.equal(plain(x), before)
        assert not torch.allclose(module(x), before)


def test_shared_modules_stay_shared():
    plain = il.export.plain(Model())
    assert plain.again is plain.decoder


@pytest.mark.slow
def test_the_example_of_a_program_without_python(tmp_path: Path):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "aotinductor" / "export.py"))
    torch.manual_seed(0)
    decoder = il.BrenierDecoder(3, data_shape=(2, 4))
    example["package"](decoder, 3, str(tmp_path / "decoder.pt2"))
    example["build"](str(tmp_path / "decode"))
    for rows in (1, 5):
        command = [str(tmp_path / "decode"), str(tmp_path / "decoder.pt2"), str(rows), "3"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = torch.tensor([[float(word) for word in line.split()] for line in printed.splitlines()])
        with torch.no_grad():
            wanted = decoder(torch.full((rows, 3), 0.5)).flatten(1)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_bad_arguments(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^arguments: got None, wanted an example of what Model is called with"):
        il.export.onnx(Model(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
