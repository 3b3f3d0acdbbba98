"""Runs: the loop, what it measures and writes, sweeps, and what happens when training diverges."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import sys
from dataclasses import replace

import pytest
import torch

from ilvae_fast import metrics
from ilvae_fast._support.files import write_atomically
from ilvae_fast.data import load
from ilvae_fast.training import Diverged, TrainConfig, build_model, evaluate, reproduce, sweep, train
from ilvae_fast.training.loop import Unsaved, _step
from ilvae_fast.training.state import Batches, latest
from ilvae_fast.vae import VAE, DiagonalGaussian, VAEConfig
from training_cases import OPTIONS, SMALL, interrupted, small, state_of

# batches


def test_batches_of_all_processes_partition_a_permutation():
    x = torch.arange(23).unsqueeze(-1)
    parts = [list(Batches(x, 3, seed=1, process=p, num_processes=2).epoch(4)) for p in (0, 1)]
    together = torch.cat([torch.cat(pair) for pair in zip(*parts, strict=True)]).flatten()
    assert len(together) == len(set(together.tolist())) == 18
    alone = torch.cat(list(Batches(x, 6, seed=1).epoch(4))).flatten()
    assert torch.equal(alone, together)
    assert not torch.equal(alone, torch.cat(list(Batches(x, 6, seed=1).epoch(5))).flatten())
    assert not torch.equal(alone, torch.cat(list(Batches(x, 6, seed=2).epoch(4))).flatten())
    assert torch.equal(torch.cat(list(Batches(x, 6, seed=1).epoch(4, start=2))).flatten(), alone[12:])


def test_data_that_fill_no_batch_are_refused():
    with pytest.raises(
        ValueError, match=r"^batch_size: got 12 for each of 2 processes, wanted at most 11: there are 23 "
    ):
        Batches(torch.zeros(23, 1), 12, 0, 0, 2)
    with pytest.raises(ValueError, match=r"^batch_size: got 24, wanted at most 23, the number of training data$"):
        Batches(torch.zeros(23, 1), 24, 0)


# the loop


def test_a_run_writes_its_files_and_is_not_repeated(tmp_path, monkeypatch):
    config = small(
        tmp_path / "run", L=0.5, annealing={"kl_weight": {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 8}}
    )
    seen, measured = [], []

    def progress(step, steps, values):
        (measured if "measured" in values else seen).append(values.get("measured", (step, steps)))

    measures = train(config, progress)
    assert seen == [(k, 12) for k in range(1, 13)]
    assert measured == sorted(measured)
    assert measured[-1] == 1
    folder = tmp_path / "run"
    assert json.loads((folder / "metrics.json").read_text()) == measures
    history = json.loads((folder / "history.json").read_text())
    assert len(history) == 2
    assert measures["train_loss"] == history[-1]["loss"]
    assert TrainConfig.from_yaml(folder / "config.yaml") == config
    assert latest(folder / "checkpoints").name == "step-000000012"
    assert list((folder / "tensorboard").glob("events*"))
    model = VAE.from_pretrained(folder / "model")
    assert model.kl_weight.item() == 1
    assert model.decoder.inverse_lipschitz_bound().item() == pytest.approx(0.5)
    again = evaluate(model, load("toy", **SMALL["data_options"]), num_importance_samples=3, fisher_samples=3)
    assert again == {k: v for k, v in measures.items() if k != "train_loss"}

    monkeypatch.setattr("ilvae_fast.training.loop.load_dataset", lambda config: pytest.fail("done already"))
    assert train(config) == measures
    other = replace(config, L=0.75, epochs=3)
    with pytest.raises(ValueError, match=r"holds another run: L was 0\.5, is 0\.75\. Choose"):
        train(other)
    monkeypatch.undo()
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (folder / "diverged").symlink_to(tmp_path / "elsewhere")
    (folder / ".metrics.json.abc").write_text("half")
    assert train(other, restart=True)["certified"] == pytest.approx(0.75)
    assert len(list((folder / "tensorboard").glob("events*"))) == 1  # the files of the other run are gone
    assert not (folder / "diverged").is_symlink()
    assert not (folder / ".metrics.json.abc").exists()
    assert (folder / "notes.txt").read_text() == (tmp_path / "elsewhere" / "mine").read_text() == "mine"


def test_restart_refuses_a_folder_that_holds_no_run(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"output: .* holds no run to restart.*but model, thesis\.tex"):
        train(small(tmp_path), restart=True)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "model", "thesis.tex"}


def test_a_restart_deletes_config_yaml_last(tmp_path, monkeypatch):
    config = small(tmp_path)
    interrupted(config)
    monkeypatch.setattr("shutil.rmtree", lambda path: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        train(config, restart=True)
    assert (tmp_path / "config.yaml").is_file()
    monkeypatch.undo()
    assert train(config, restart=True)


def test_a_failure_while_measuring_keeps_the_model_and_may_be_repaired(tmp_path, monkeypatch):
    config = small(tmp_path)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("ilvae_fast.training.loop.evaluate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(config)
    monkeypatch.undo()
    assert VAE.from_pretrained(tmp_path / "model").sample(2).isfinite().all()
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        train(replace(config, seed=1))
    less = replace(config, num_importance_samples=2, fisher_samples=2, eval_limit=30)
    measures = train(less)
    assert len(list((tmp_path / "checkpoints").glob("step-000000012"))) == 1
    assert train(less) == measures
    with pytest.raises(ValueError, match="eval_limit was 30, is 1000"):
        train(config)


def test_fewer_test_data_than_processes_are_refused(tmp_path, monkeypatch):
    config, dataset = small(tmp_path), load("toy", **SMALL["data_options"])
    empty = dataset._replace(test=dataset.test[:0])
    monkeypatch.setattr("ilvae_fast.training.loop.load_dataset", lambda config: empty)
    with pytest.raises(ValueError, match=r"eval_limit: got 0 test data to measure on \(0 in all\), wanted at least 1"):
        train(config, lambda *_: pytest.fail("trained"))
    model = build_model(config, dataset)
    with pytest.raises(ValueError, match=r"eval_limit: got 2 test data to measure on \(60 in all\), wanted at least 3"):
        evaluate(model, dataset, limit=2, num_processes=3)


def test_measures_that_are_not_finite_are_named(tmp_path, monkeypatch):
    dataset, options = load("toy", **SMALL["data_options"]), {"num_importance_samples": 3, "fisher_samples": 3}
    fields = {"data_dim": 2, "latent_dim": 2, "encoder_hidden": (6,)}
    tiny = VAE(VAEConfig.named("il-lidvae", **fields, likelihood_options={"scale": 1e-25}))
    measures = evaluate(tiny, dataset, **options)
    assert measures["nll"] is measures["gain"] is None
    assert measures["not_finite"] == ["elbo", "gain", "nll"]
    json.dumps(measures, allow_nan=False)
    plain = evaluate(VAE(VAEConfig.named("vae", **fields)), dataset, **options)
    assert plain["certified"] is plain["fisher_lower_bound"] is None  # it has none
    assert "not_finite" not in plain
    # latents that overflow
    with torch.no_grad():
        tiny.encoder[-1].weight.fill_(3e38)
    measures = evaluate(tiny, dataset, **options)
    assert {"measured", "kl_per_dimension", "nll", "fisher"} < set(measures["not_finite"])
    assert measures["certified"] == pytest.approx(1)
    assert measures["kl_per_dimension"] == [None, None]
    json.dumps(measures, allow_nan=False)

    monkeypatch.setattr("ilvae_fast.metrics.negative_log_likelihood", lambda *args, **kwargs: math.inf)
    assert train(small(tmp_path))["not_finite"] == ["nll"]
    assert json.loads((tmp_path / "metrics.json").read_text())["nll"] is None
    (row,) = sweep(small(tmp_path, epochs=1), [1.0], [0], tmp_path / "sweep")
    assert row["not_finite"] == ["nll"]
    assert ",nll," in (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()[1]


def test_the_measures_say_what_the_latent_is_worth(tmp_path, monkeypatch):
    """Each is computed by its own function, which is tested against closed forms."""
    dataset, options = load("toy", **SMALL["data_options"]), {"num_importance_samples": 3, "fisher_samples": 3}
    fields = {"data_dim": 2, "latent_dim": 2, "encoder_hidden": (6,)}
    torch.manual_seed(0)
    model = VAE(VAEConfig.named("il-lidvae", **fields)).eval()
    measures = evaluate(model, dataset, **options)
    without = metrics.nll_without_latent(model, dataset.test, dataset.train)
    assert measures["gain"] == pytest.approx(measures["elbo"] + without)
    assert measures["elbo"] == pytest.approx(metrics.elbo(model, dataset.test, 200), abs=0.05 * abs(measures["elbo"]))
    assert measures["kl_minus_mi"] == pytest.approx(measures["elbo_kl"] - measures["mutual_information"])
    assert measures["mutual_information_limit"] == pytest.approx(math.log(len(dataset.test)))
    directions = metrics.active_directions(model, dataset.test)
    assert measures["active_directions"] == directions.active
    assert measures["direction_variances"] == pytest.approx(directions.variances.tolist(), rel=1e-4)
    assert measures["warnings"] == metrics.diagnose(measures)
    given = evaluate(model, dataset, baseline=without + 7, **options)
    assert given["gain"] == pytest.approx(measures["gain"] + 7)

    monkeypatch.setattr("ilvae_fast.metrics.diagnose", lambda measures: [])
    assert "warnings" not in evaluate(model, dataset, **options)
    text = load("synthetic_text", num_sentences=60, vocabulary_size=20)
    model = build_model(small(tmp_path, data="synthetic_text", data_options={}, model="svae", model_options={}), text)
    measures = evaluate(model, text, limit=6, **options)
    assert measures["gain"] is None
    assert "not_finite" not in measures
    given = evaluate(model, text, limit=6, baseline=100.0, **options)
    assert given["gain"] == pytest.approx(100 + given["elbo"])


def test_training_noise_is_not_the_random_stream_of_the_weights(tmp_path, monkeypatch):
    streams = []

    def seen(config, dataset):
        model = build_model(config, dataset)
        model.register_forward_pre_hook(lambda *_: streams.append(torch.get_rng_state()))
        return model

    monkeypatch.setattr("ilvae_fast.training.loop.build_model", seen)
    interrupted(small(tmp_path))
    assert not torch.equal(streams[0], torch.Generator().manual_seed(0).get_state())


def test_a_folder_holds_one_run_at_a_time(tmp_path):
    config = small(tmp_path)

    def intrude(step, steps, values):
        with pytest.raises(ValueError, match=r"output: another process is training in"):
            train(config)

    train(config, intrude)


@pytest.mark.parametrize("model", ["gmvae", "il-lidmvae"])
def test_mixtures_are_trained_and_clustered(tmp_path, model):
    options = {**OPTIONS, "decoder_hidden": [5]} if model == "gmvae" else OPTIONS
    options = {**options, "prior_options": {"num_components": 2}}
    measures = train(small(tmp_path, model=model, model_options=options))
    assert 0.5 <= measures["clustering_accuracy"] <= 1
    assert (measures["certified"] is None) == (model == "gmvae")


@pytest.mark.parametrize("fields", [{"precision": "bf16"}, {"max_grad_norm": 0.5, "warmup_steps": 3}])
def test_options_of_the_loop_have_an_effect(tmp_path, fields):
    plain, changed = train(small(tmp_path / "plain")), train(small(tmp_path / "changed", **fields))
    assert math.isfinite(changed["nll"])
    assert changed["train_loss"] != plain["train_loss"]


def test_fp16_on_the_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^precision: got 'fp16' on the CPU, .*, wanted 'bf16' or 'no'"):
        train(small(tmp_path / "run", precision="fp16"))
    assert not (tmp_path / "run").exists()


def test_runs_of_several_precisions_share_a_process(tmp_path):
    losses = {train(small(tmp_path / str(k), precision=p))["train_loss"] for k, p in enumerate(("no", "bf16", "no"))}
    assert len(losses) == 2


def test_micro_batches_add_up_to_the_batch(tmp_path, monkeypatch):
    # noise as a function of the datum, so that splitting a batch does not change it
    monkeypatch.setattr(
        DiagonalGaussian,
        "sample",
        lambda self, num_samples=None, generator=None: (
            self.mean + (0.5 * self.log_variance).exp() * self.mean.detach().sin()
        ),
    )
    states = []
    for parts in (1, 5):
        monkeypatch.setattr("ilvae_fast.training.loop.evaluate", lambda *a, **k: {})
        train(small(tmp_path / str(parts), accumulation=parts))
        states.append(state_of(VAE.from_pretrained(tmp_path / str(parts) / "model")))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-4)


# sweeps


def test_a_sweep_skips_what_is_done(tmp_path, monkeypatch):
    config = small(tmp_path, epochs=1)
    names = []
    rows = sweep(config, [0.5, 2.0], [0, 1], tmp_path / "sweep", lambda c: names.append(c.folder.name))
    assert names == [f"il-lidvae-{name}" for name in ("L0.5-seed0", "L0.5-seed1", "L2-seed0", "L2-seed1")]
    assert [row["certified"] for row in rows] == pytest.approx([0.5, 0.5, 2.0, 2.0])
    assert len({row["nll"] for row in rows}) == 4
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == rows
    assert len((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()) == 5
    monkeypatch.setattr("ilvae_fast.training.loop.load_dataset", lambda config: pytest.fail("done already"))
    assert sweep(config, [0.5, 2.0], [0, 1], tmp_path / "sweep") == rows


def test_a_sweep_without_constants_takes_that_of_the_run_or_of_the_model(tmp_path):
    for fields, L, certified in (({}, None, 1.0), ({"model": "lidvae"}, None, 0.0), ({"L": 0.5}, 0.5, 0.5)):
        (row,) = sweep(small(tmp_path, epochs=1, **fields), [], [0], tmp_path)
        assert (row["L"], row["certified"]) == (L, pytest.approx(certified))
    assert {path.name for path in tmp_path.glob("*-seed0")} == {
        "il-lidvae-seed0", "lidvae-seed0", "il-lidvae-L0.5-seed0",
    }  # fmt: skip
    assert len(json.loads((tmp_path / "sweep.json").read_text())) == 3


def diverge_with(seed: int, monkeypatch) -> None:
    """Let runs with this seed diverge in their second step."""

    def step(accelerator, plain, model, optimizer, x, config, number, *rest):
        if config.seed == seed and number == 1:
            raise Diverged("step 1: the loss is nan nats for a datum")
        return _step(accelerator, plain, model, optimizer, x, config, number, *rest)

    monkeypatch.setattr("ilvae_fast.training.loop._step", step)


def test_a_sweep_goes_on_after_a_run_that_diverges(tmp_path, monkeypatch):
    diverge_with(1, monkeypatch)
    rows = sweep(small(tmp_path, epochs=1), [0.5], [0, 1, 2], tmp_path)
    assert ["diverged" in row for row in rows] == [False, True, False]
    assert rows[1] == {
        "model": "il-lidvae", "L": 0.5, "seed": 1, "diverged": "step 1: the loss is nan nats for a datum",
    }  # fmt: skip
    with open(tmp_path / "sweep.csv", newline="") as file:
        assert [row["diverged"][:6] for row in csv.DictReader(file)] == ["", "step 1", ""]
    monkeypatch.undo()
    again = sweep(small(tmp_path, epochs=1), [0.5], [0, 1, 2], tmp_path)
    assert (again[0], again[2]) == (rows[0], rows[2])
    assert json.loads((tmp_path / "sweep.json").read_text()) == again
    assert again[1]["nll"]


def test_a_sweep_can_be_restarted(tmp_path):
    sweep(small(tmp_path, epochs=1), [0.5], [0], tmp_path)
    other = small(tmp_path, epochs=1, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"holds another run: learning_rate was 0\.001, is 0\.5.*--restart"):
        sweep(other, [0.5], [0], tmp_path)
    (row,) = sweep(other, [0.5], [0], tmp_path, restart=True)
    assert json.loads((tmp_path / "sweep.json").read_text()) == [row]


@pytest.mark.parametrize("content", ["", '[{"model": "va', "{}3", "[3]", '{"a": 1}'])
def test_a_damaged_table_of_a_sweep_is_named(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'sweep.json'}: is not the table of a sweep; remove it"):
        sweep(small(tmp_path, epochs=1), [0.5], [0], tmp_path)


# what cannot be written


def full(path: object, *rest: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))


def test_a_full_disk_is_found_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr("ilvae_fast.training.loop.check_writable", full)
    monkeypatch.setattr("ilvae_fast.training.loop.evaluate", lambda *args, **options: pytest.fail("measured"))
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'metrics.json'}'"):
        train(small(tmp_path))
    monkeypatch.undo()
    assert train(small(tmp_path))


def test_measures_that_cannot_be_written_come_with_the_error(tmp_path, monkeypatch):
    def write(path, content):
        return full(path) if path.name == "metrics.json" else write_atomically(path, content)

    monkeypatch.setattr("ilvae_fast.training.loop.write_atomically", write)
    with pytest.raises(Unsaved, match=rf"No space left on device: '{tmp_path / 'run' / 'metrics.json'}'") as caught:
        train(small(tmp_path / "run", epochs=1))
    monkeypatch.undo()
    assert {"run": train(small(tmp_path / "run", epochs=1))} == caught.value.measured

    monkeypatch.setattr(sys.modules["ilvae_fast.training.sweep"], "write_atomically", full)
    with pytest.raises(Unsaved) as caught:
        sweep(small(tmp_path, epochs=1), [0.5], [0, 1], tmp_path / "sweep")
    assert list(caught.value.measured) == ["L=0.5 seed=0"]


def test_a_finished_run_needs_no_lock(tmp_path, monkeypatch):
    config = small(tmp_path, epochs=1)
    measures = train(config)
    monkeypatch.setattr("ilvae_fast.training.loop._alone", lambda folder: pytest.fail("writes"))
    assert train(config) == measures


def test_tensorboard_on_a_full_disk_is_named(tmp_path, monkeypatch):
    def log(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("accelerate.Accelerator.log", log)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'tensorboard'}'"):
        train(small(tmp_path, log_every=1))


def test_a_sweep_keeps_the_rows_of_earlier_ones(tmp_path):
    config = small(tmp_path, epochs=1)
    first = sweep(config, [0.5, 2.0], [0], tmp_path)
    fixed = {**OPTIONS, "inverse_lipschitz": 0.7}
    second = sweep(replace(config, model="il-lidmvae", model_options=fixed), [], [1], tmp_path)
    assert sweep(config, [2.0], [0], tmp_path) == first[1:]
    assert json.loads((tmp_path / "sweep.json").read_text()) == [*first, *second]
    with open(tmp_path / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["L"], row["seed"]) for row in rows] == [
        ("il-lidvae", "0.5", "0"), ("il-lidvae", "2.0", "0"), ("il-lidmvae", "", "1"),
    ]  # fmt: skip
    assert [row["clustering_accuracy"] for row in rows[:2]] == ["", ""]
    assert float(rows[2]["clustering_accuracy"]) == second[0]["clustering_accuracy"]


# divergence


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_explodes_stops_with_a_state_to_reproduce_it(tmp_path, accumulation):
    options = {**OPTIONS, "likelihood_options": {"variance": "optimal", "scale": 1e-3}}  # it changes in each step
    config = small(
        tmp_path / "run", learning_rate=1.0, loss_limit=30.0, max_grad_norm=0.5, accumulation=accumulation,
        model_options=options,
    )  # fmt: skip
    with pytest.raises(Diverged, match=r"step \d+: the loss is .* nats.*\.pt") as caught:
        train(config)
    model, outputs = reproduce(tmp_path / "run" / "diverged" / "process0.pt")
    assert len(outputs) == accumulation
    loss = torch.stack([output.loss for output in outputs]).max()
    assert not loss.abs() <= 30
    assert f"the loss is {loss.item():g} nats" in str(caught.value)
    assert all(p.isfinite().all() for p in model.parameters())  # the weights were not spoiled yet
    (sum(output.loss for output in outputs) / accumulation).backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    largest = max(norms, key=norms.get)
    stated = re.search(r"the largest gradient is that of (\S+), of norm (\S+);", str(caught.value))
    assert stated[1] == largest
    assert float(stated[2]) == pytest.approx(norms[largest], rel=1e-4)  # as it was before it was clipped
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_nan_gradient_stops_training_before_it_spoils_the_weights(tmp_path, monkeypatch):
    calls = []

    def spoiled(config, dataset):
        model = build_model(config, dataset)

        def spoil(gradient):
            calls.append(gradient)
            return gradient * math.nan if len(calls) == 3 else gradient

        model.encoder[0].weight.register_hook(spoil)
        return model

    monkeypatch.setattr("ilvae_fast.training.loop.build_model", spoiled)
    with pytest.raises(
        Diverged, match=r"step 2: a gradient is NaN or infinite, the loss is \d.*encoder\.0\.weight, of norm nan"
    ):
        train(small(tmp_path))
    model, (output,) = reproduce(tmp_path / "diverged" / "process0.pt")
    assert output.loss.isfinite()
    assert all(p.isfinite().all() for p in model.parameters())


def test_data_with_nan_are_refused(tmp_path, monkeypatch):
    dataset = load("toy", **SMALL["data_options"])
    dataset.train[7, 0] = math.nan
    monkeypatch.setattr("ilvae_fast.training.loop.load_dataset", lambda config: dataset)
    with pytest.raises(ValueError, match=r"data: toy: x: got values from nan to nan, wanted real values"):
        train(small(tmp_path / "run"))


def test_a_step_is_reproduced_in_its_precision(tmp_path):
    with pytest.raises(Diverged) as caught:
        train(small(tmp_path, precision="bf16", loss_limit=1.0))
    _, (output,) = reproduce(tmp_path / "diverged" / "process0.pt")
    assert f"the loss is {output.loss.item():g} nats" in str(caught.value)
