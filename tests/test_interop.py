"""The decoder in other frameworks: pythae, Lightning and a plain PyTorch loop train, save, load and sample.

Needs the extra ``interop``; without it these tests fail.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import pythae  # noqa: F401  to fail, not skip, where a client is missing
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
CLIENTS = ["plain_vae", "lightning_vae", "pythae_vae"]
# how a user gets the trained decoder back: `folder` -> `decoder`, a map z -> f(z)
LOADING = {
    "plain_vae": """
from plain_vae import VAE, brenier_decoder
model = VAE(brenier_decoder())
model.load_state_dict(torch.load(folder / "model.pt"))
decoder = model.decoder
""",
    "lightning_vae": """
from lightning_vae import VAE
decoder = VAE.load_from_checkpoint(folder / "model.ckpt", weights_only=True).decoder
""",
    # by pythae alone, from the pickled decoder, without the user's own module
    "pythae_vae": """
from pythae.models import AutoModel
(model,) = folder.glob("VAE_training_*/final_model")
decoder = AutoModel.load_from_folder(str(model)).decoder.map
""",
}
CHECK = """
z, other = torch.randn(2, 500, 10, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    values = decoder(z)
    moved = (values - decoder(other)).flatten(1).norm(dim=-1)
bound = float(decoder.inverse_lipschitz_bound())
assert (moved >= bound * (z - other).norm(dim=-1) * (1 - 1e-5)).all()
"""


def _loaded(client: str, folder: Path) -> dict:
    names = {"torch": torch, "folder": folder}
    exec(LOADING[client] + CHECK, names)
    return names


def _loaded_elsewhere(client: str, folder: Path) -> dict:
    source = "import sys, torch; from pathlib import Path; folder = Path(sys.argv[1])" + LOADING[client] + CHECK
    source += "torch.save({'values': values, 'bound': bound}, folder / 'elsewhere.pt')"
    path = [str(ROOT)] if client == "pythae_vae" else [str(ROOT), str(EXAMPLES)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    subprocess.run([sys.executable, "-c", source, str(folder)], check=True, env=environment, cwd=folder)
    return torch.load(folder / "elsewhere.pt")


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_trains_saves_loads_and_samples(client, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    losses = importlib.import_module(client).main(["--epochs", "3", "--output", str(tmp_path)])
    assert losses[-1] < losses[0]
    printed = capsys.readouterr().out
    for measure in ("KL", "active directions", "mutual information", "gain over ignoring z"):
        assert re.search(rf"^{measure} -?\d", printed, re.MULTILINE), measure
    samples = torch.load(tmp_path / "samples.pt")
    assert samples.isfinite().all()
    assert samples.shape == ((16, 64) if client == "lightning_vae" else (16, 1, 8, 8))
    here, elsewhere = _loaded(client, tmp_path), _loaded_elsewhere(client, tmp_path)
    torch.testing.assert_close(here["values"], elsewhere["values"])
    assert here["bound"] == elsewhere["bound"] > 0


def test_lightning_trains_a_compiled_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("lightning_vae")
    model = module.VAE()
    model.compile(backend="aot_eager", fullgraph=True)
    history = module.History()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[history], default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.rand(256, 64), batch_size=64))
    assert history.losses[1] < history.losses[0]


@pytest.mark.parametrize("client", CLIENTS)
def test_the_page_shows_what_the_examples_do_in_ten_lines(client):
    page = "".join((ROOT / "docs" / name).read_text() for name in ("drop-in.md", "cure.md"))
    (diff,) = (d for d in re.findall(r"```diff\n(.*?)```", page, re.DOTALL) if f"examples/{client}.py" in d)
    added = [line[1:].strip() for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    source = {line.strip() for line in (EXAMPLES / f"{client}.py").read_text().splitlines()}
    assert 0 < len(added) <= 10
    assert set(added) <= source
