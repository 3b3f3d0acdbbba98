"""What two processes do, run by test_distributed.py under torchrun: python two_processes.py TASK FOLDER."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ilvae_fast import BrenierDecoder, BrenierMap, Trained, data, metrics
from ilvae_fast._support import files as _files
from ilvae_fast.operators import dispatch
from ilvae_fast.training import (
    Diverged,
    TrainConfig,
    build_model,
    evaluate,
    gather_in_methods,
    loop,
    shard,
    sweep,
    train,
)
from ilvae_fast.vae import VAE, DiagonalGaussian, VAEConfig

CONFIG = VAEConfig(64, 3, encoder_hidden=(16,), decoder_hidden=((8,), (24, 16)), embedding="orthogonal")
RANK = int(os.environ.get("RANK", "0"))


def same_noise() -> None:
    """Noise as a function of the datum, the same in whichever process it is drawn."""

    def draw(self, num_samples, generator):
        count = 1 if num_samples is None else num_samples
        shift = torch.arange(count, dtype=self.mean.dtype).view(-1, *[1] * self.mean.dim())
        noise = (30 * self.mean.detach() + shift).sin()
        noise = noise.squeeze(0) if num_samples is None else noise
        return self.mean + (0.5 * self.log_variance).exp() * noise, noise

    DiagonalGaussian._draw = draw


def model(variance: str = "fixed") -> VAE:
    torch.manual_seed(0)
    return VAE(replace(CONFIG, likelihood_options={"variance": variance})).double()


def batch() -> torch.Tensor:
    return torch.rand(32, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def assert_equal(ours, whole) -> None:
    """Up to the order of sums, in float64: `same_noise` multiplies what float32 would round by 30."""
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(whole), rtol=1e-9, atol=1e-11)


def gradients(folder: Path) -> None:
    """DDP: the gradients of two halves are those of the whole; FSDP2: the same, and the entry points work."""
    same_noise()
    x = batch()
    for variance in ("optimal", "fixed"):
        whole, plain = model(variance), model(variance)
        whole(x).loss.backward()
        expected = {name: p.grad for name, p in whole.named_parameters()}
        wrapped = DistributedDataParallel(plain)
        wrapped(x.chunk(2)[RANK]).loss.backward()
        for name, p in plain.named_parameters():
            assert_equal(p.grad, expected[name])
        assert_equal(plain.likelihood.scale, whole.likelihood.scale)

    sharded = shard(model())
    for name, p in sharded.named_parameters():
        assert p.dim() > 0, name
        assert p.to_local().numel() < p.numel() or p.shape[0] == 1, name
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    output = sharded(x.chunk(2)[RANK])
    output.loss.backward()
    for name, p in sharded.named_parameters():
        assert_equal(p.grad.full_tensor(), expected[name])
    optimizer.step()
    with torch.no_grad():
        for p in whole.parameters():
            p -= 0.1 * p.grad
    assert_equal(sharded.reconstruct(x), whole.reconstruct(x))
    assert_equal(sharded.log_likelihood(x, 2), whole.log_likelihood(x, 2))
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_equal(sharded.decode(z), whole.decode(z))
    assert_equal(sharded.decoder.inverse_lipschitz_bound(), whole.decoder.inverse_lipschitz_bound())
    alone, spread = (
        BrenierDecoder(3, 64, ((8,), (24,)), embedding="orthogonal", inverse_lipschitz=Trained(0.3)).double()
        for _ in range(2)
    )
    spread.load_state_dict(alone.state_dict())
    for part in (spread.latent_map, spread.data_map, spread):
        fully_shard(part)
    assert_equal(spread.inverse_lipschitz_bound(), alone.inverse_lipschitz_bound())
    methods_of_hand_sharded_parts(alone, spread)
    assert_equal(metrics.decoder_jacobian(sharded.decoder, z), whole.decoder.jacobian(z))
    assert_equal(sharded.decoder.inverse_lipschitz_bound(), whole.decoder.inverse_lipschitz_bound())
    assert_equal(metrics.relative_fisher(sharded, x, 4).divergence, metrics.relative_fisher(whole, x, 4).divergence)

    options = {"encoder_hidden": (6,), "autoregressive_hidden": 5, "token_embedding": 4, "decoder_hidden": ((6,), (8,))}
    config = VAEConfig.named(
        "il-lidsvae", data_dim=5, latent_dim=2, **options, likelihood_options={"num_categories": 9}
    )
    torch.manual_seed(0)
    whole = VAE(config)
    torch.manual_seed(0)
    sharded = shard(VAE(config))
    tokens = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(1))
    sharded(tokens).loss.backward()
    assert torch.equal(sharded.reconstruct(tokens), whole.reconstruct(tokens))
    torch.testing.assert_close(
        metrics.relative_fisher(sharded, tokens, 2).divergence, metrics.relative_fisher(whole, tokens, 2).divergence
    )
    (folder / f"gradients{RANK}").write_text("equal")


def methods_of_hand_sharded_parts(alone: BrenierDecoder, spread: BrenierDecoder) -> None:
    """What ``fully_shard`` does not look after, gathered by one line."""
    z, v = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="DTensor"):
        spread.jvp(z, v)
    gather_in_methods(spread)
    for _ in range(2):
        for a, b in zip(spread.jvp(z, v), alone.jvp(z, v), strict=True):
            assert_equal(a, b)
        assert_equal(spread.jacobian(z), alone.jacobian(z))
        assert_equal(spread(z), alone(z))
        ours, theirs = spread.latent_map, alone.latent_map
        assert_equal(ours.potential(z), theirs.potential(z))
        assert_equal(ours.logabsdet(z), theirs.logabsdet(z))
        torch.testing.assert_close(ours.inverse(ours(z)), z, rtol=0, atol=1e-8)
        ours.potential(z).square().sum().backward()
        theirs.potential(z).square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_equal(p.grad.full_tensor(), q.grad)  # the mean over processes, which have the same z


def dtensors(folder: Path) -> None:
    """Layers whose batch is spread over the processes: values, derivatives and gradients of the whole batch."""
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # 5 rows and 4
    layers = (
        lambda: BrenierMap(3, (6, 5), nonneg="softplus"),
        lambda: BrenierMap(3, (6,), inverse_lipschitz=Trained(1.0)),
        lambda: BrenierDecoder(3, 7, ((6,), (8,))),
    )
    for make in layers:
        torch.manual_seed(0)
        layer = make().double()
        y = layer(x)
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        _, along = layer.jvp(x, x)
        layer.zero_grad(set_to_none=True)
        distribute_module(layer, mesh)
        for placement in (Shard(0), Replicate(), Shard(1)):
            rows = distribute_tensor(x, mesh, [placement]).requires_grad_()
            spread = layer(rows)
            assert spread.placements == ((Shard(0),) if placement == Shard(0) else (Replicate(),))
            assert_equal(spread.full_tensor().detach(), y.detach())
            spread.square().sum().backward()
            for name, parameter in layer.named_parameters():
                assert_equal(parameter.grad.full_tensor(), gradients[name])
            layer.zero_grad(set_to_none=True)
            assert_equal(layer.jvp(rows, rows)[1].full_tensor().detach(), along.detach())
            if isinstance(layer, BrenierMap):
                operands = layer.operands(rows.detach())
                of_x, of_skip_weight, *_ = dispatch.training_terms(operands, rows.detach(), None, 0b11)
                value = (layer(rows) * rows.detach()).sum()
                expected = torch.autograd.grad(value, (rows, layer.skip_weight))
                for ours, theirs in zip((of_x, of_skip_weight), expected, strict=True):
                    assert_equal(ours.full_tensor().detach(), theirs.full_tensor())
    plain = BrenierMap(3, (6,)).double()
    with pytest.raises(TypeError, match=r"skip_weight: got a plain tensor that requires a gradient.*distribute_module"):
        plain(distribute_tensor(x, mesh, [Shard(0)]))
    with pytest.raises(TypeError, match="tangent: got a plain tensor, wanted a DTensor"):
        distribute_module(plain, mesh).jvp(distribute_tensor(x, mesh, [Shard(0)]), x)
    (folder / f"dtensors{RANK}").write_text("equal")


def measures(folder: Path) -> None:
    """Measures reduced over processes are those of all data."""
    same_noise()
    digits, vae = data.load("digits"), model()

    def total(tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    options = {"num_importance_samples": 3, "fisher_samples": 3, "limit": 101}
    spread = evaluate(vae, digits, **options, process=RANK, num_processes=2, reduce=total)
    alone = evaluate(vae, digits, **options)
    for name in (
        "nll",
        "elbo_kl",
        "fisher",
        "fisher_lower_bound",
        "fisher_effective_sample_size",
        "mutual_information",
    ):
        torch.testing.assert_close(spread[name], alone[name], rtol=1e-6, atol=0)
    torch.testing.assert_close(spread["kl_per_dimension"], alone["kl_per_dimension"], rtol=1e-9, atol=0)
    torch.testing.assert_close(spread["latent_variances"], alone["latent_variances"], rtol=1e-9, atol=0)
    assert spread["epsilon_collapse"] == alone["epsilon_collapse"]
    (folder / f"measures{RANK}").write_text("equal")


def run(folder: Path) -> None:
    """A whole run, in which the second process must not write."""
    if RANK == 1:

        def refuse(path, content):
            raise AssertionError(f"the second process writes {path}")

        _files.write_atomically = refuse
        for name, module in list(sys.modules.items()):
            if name.startswith("ilvae_fast") and hasattr(module, "write_atomically"):
                module.write_atomically = refuse
    result = train(config(folder))
    quick = replace(config(folder), epochs=1, batch_size=500)
    sweep(quick, [1.0], [0], folder / "sweep")
    (folder / f"run{RANK}.json").write_text(json.dumps(result))


def killed(folder: Path) -> None:
    """The second process dies in the middle of training, between two checkpoints."""

    def progress(step: int, steps: int, values: dict[str, float]) -> None:
        if RANK == 1 and step == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    train(config(folder), progress)
    (folder / f"finished{RANK}").write_text("")


def sharded(folder: Path) -> None:
    """With FSDP2: a killed run resumes, another one is not interrupted, one diverges, one has the noise of a single
    process."""
    models: list[VAE] = []

    def kept(*arguments) -> VAE:
        models.append(build_model(*arguments))
        return models[-1]

    def progress(step: int, steps: int, values: dict[str, float]) -> None:
        if step == 3:
            units = [name for name, module in models[-1].named_modules() if isinstance(module, FSDPModule)]
            sizes = [(p.to_local().numel(), p.numel()) for p in models[-1].parameters()]
            (folder / f"held{RANK}.json").write_text(json.dumps([units, sizes]))

    loop.build_model = kept
    train(config(folder / "killed"))
    train(config(folder), progress)
    try:
        train(diverging(folder))
    except Diverged as error:
        (folder / f"diverged{RANK}").write_text(str(error))
    same_noise()
    train(config(folder / "alike"))


def diverging(folder: Path) -> TrainConfig:
    """With an outlier among the data: one process has a loss above the limit, both have its gradients."""
    return replace(config(folder), data=f"npz:{folder / 'outlier.npz'}", loss_limit=300.0, output=str(folder / "out"))


def config(folder: Path) -> TrainConfig:
    return TrainConfig(
        data="digits", model="il-lidvae", latent_dim=3, epochs=2, batch_size=64, checkpoint_every=7, cpu=True,
        accumulation=2, max_grad_norm=3.0,
        model_options={"decoder_hidden": [[8], [16]], "encoder_hidden": [16]}, output=str(folder / "run"),
        num_importance_samples=2, fisher_samples=2, eval_limit=50,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    if sys.argv[1] == "together":
        run(folder)  # accelerate starts the process group
        gradients(folder)
        measures(folder)
        dtensors(folder)
        dist.destroy_process_group()
    elif sys.argv[1] == "sharded":
        sharded(folder)
        dist.destroy_process_group()
    else:
        killed(folder)
    # Gloo's threads let go of tensors after their work is done. While the interpreter ends, that aborts the process
    # (torch 2.14).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
