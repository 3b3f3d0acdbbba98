"""Schedules, and the annealer that writes them into a model."""

from __future__ import annotations

import math

import pytest
import torch

import ilvae_fast as il
from ilvae_fast.annealing import Annealer, Constant, Cosine, Cyclical, Linear, Piecewise, as_schedule
from ilvae_fast.vae import VAE, VAEConfig


def model(**fields) -> VAE:
    config = {"decoder_hidden": ((4,), (5,)), "encoder_hidden": (3,), **fields}
    return VAE(VAEConfig(4, 2, **config))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(0.3), {0: 0.3, 7: 0.3}),
        (Linear(2.0, 1.0, 10), {0: 2.0, 5: 1.5, 10: 1.0, 99: 1.0}),
        (Cosine(0.0, 1.0, 10), {0: 0.0, 5: 0.5, 2: 0.5 * (1 - math.cos(0.2 * math.pi)), 10: 1.0, 11: 1.0}),
        (Cyclical(0.0, 1.0, 8), {0: 0.0, 2: 0.5, 4: 1.0, 7: 1.0, 8: 0.0, 10: 0.5}),
        (Piecewise(((2, 1.0), (4, 3.0), (8, 0.0))), {0: 1.0, 2: 1.0, 3: 2.0, 4: 3.0, 6: 1.5, 8: 0.0, 9: 0.0}),
    ],
)
def test_values_of_a_schedule(schedule, expected):
    assert {step: schedule.value(step) for step in expected} == pytest.approx(expected)


def test_schedules_from_numbers_and_mappings():
    assert as_schedule(0.5) == Constant(0.5)
    assert as_schedule({"kind": "linear", "start": 2, "end": 1.0, "steps": 5}) == Linear(2, 1.0, 5)
    assert as_schedule({"kind": "piecewise", "points": [[0, 1.0], [5, 0.5]]}) == Piecewise(((0, 1.0), (5, 0.5)))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ({"kind": "liner", "start": 0, "end": 1, "steps": 5}, ValueError, r"kind: got 'liner'.*nearest: 'linear'"),
        ({"kind": "linear", "begin": 0}, ValueError, "option of linear: got 'begin'"),
        ({"kind": "linear", "start": 0.0, "end": 1.0}, ValueError, "option of linear: 'steps' is missing"),
        ({"kind": "linear", "start": 0.0, "end": 1.0, "steps": 0}, ValueError, "steps: got 0"),
        ({"kind": "linear", "start": -1.0, "end": 1.0, "steps": 5}, ValueError, r"start: got -1\.0"),
        ({"kind": "cyclical", "start": 0.0, "end": math.inf, "period": 5}, ValueError, "end: got inf"),
        ({"kind": "piecewise", "points": [[5, 1.0], [5, 2.0]]}, ValueError, "points: got .*growing steps"),
        ("0.5", TypeError, "start: got str"),
    ],
)
def test_bad_schedules_are_refused(value, error, message):
    with pytest.raises(error, match=message):
        as_schedule(value)


def test_an_annealer_fills_existing_tensors_in_place():
    vae = model()
    maps = (vae.decoder.latent_map, vae.decoder.data_map)
    before = [m.inverse_lipschitz.data_ptr() for m in maps] + [vae.kl_weight.data_ptr()]
    annealer = Annealer(vae, {"L1": Linear(2.0, 1.0, 4), "L2": 0.5, "kl_weight": Linear(0.0, 1.0, 2)})
    seen = []
    for _ in range(5):
        seen.append([m.inverse_lipschitz.item() for m in maps] + [vae.kl_weight.item()])
        assert annealer.values() == pytest.approx(dict(zip(("L1", "L2", "kl_weight"), seen[-1], strict=True)))
        annealer.step()
    assert seen == [[2.0, 0.5, 0.0], [1.75, 0.5, 0.5], [1.5, 0.5, 1.0], [1.25, 0.5, 1.0], [1.0, 0.5, 1.0]]
    assert [m.inverse_lipschitz.data_ptr() for m in maps] + [vae.kl_weight.data_ptr()] == before
    assert float(vae.decoder.inverse_lipschitz_bound()) == pytest.approx(0.5)


def test_a_checkpoint_continues_the_schedule():
    schedules = {"L1": Cosine(3.0, 1.0, 10), "kl_weight": Cyclical(0.0, 1.0, 6)}
    first, second = model(), model()
    annealer = Annealer(first, schedules)
    for _ in range(4):
        annealer.step()
    other = Annealer(second, schedules)
    other.load_state_dict(annealer.state_dict())
    assert torch.equal(first.kl_weight, second.kl_weight)
    assert torch.equal(first.decoder.latent_map.inverse_lipschitz, second.decoder.latent_map.inverse_lipschitz)
    annealer.step()
    assert int(other.steps) == 4  # the state is a copy
    other.step()
    assert other.values() == annealer.values()


def test_the_head_of_a_sequence_model_is_annealed():
    options = {"encoder_hidden": (3,), "autoregressive_hidden": 3, "likelihood_options": {"num_categories": 9}}
    vae = VAE(VAEConfig.named("il-lidsvae", data_dim=4, latent_dim=2, decoder_hidden=((4,), (5,)), **options))
    Annealer(vae, {"L1": 3.0, "L2": 0.5})
    assert float(vae.decoder.head.inverse_lipschitz_bound()) == pytest.approx(1.5)


def test_an_annealing_step_does_not_recompile():
    vae, x = model(), torch.rand(3, 4)
    annealer = Annealer(vae, {"L1": Linear(2.0, 1.0, 4)})
    frames = []

    def count(graph, _):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(vae.decoder, backend=count)
    outputs = []
    for _ in range(3):
        outputs.append(compiled(x[:, :2]))
        torch.testing.assert_close(outputs[-1], vae.decoder(x[:, :2]))
        annealer.step()
    assert len(frames) == 1
    assert not torch.allclose(outputs[0], outputs[1])


def test_schedules_without_a_target_are_refused():
    with pytest.raises(ValueError, match=r"schedules: got 'L', wanted one of L1, L2, kl_weight"):
        Annealer(model(), {"L": 1.0})
    with pytest.raises(TypeError, match="schedules: got tuple, wanted schedules by name"):
        Annealer(model(), ())
    with pytest.raises(ValueError, match="got 'L1' for a model without a BrenierDecoder"):
        Annealer(model(decoder="mlp", decoder_hidden=(3,)), {"L1": 1.0})
    with pytest.raises(ValueError, match="got 'kl_weight' for a model without a buffer"):
        Annealer(il.BrenierDecoder(2, 3, ((4,), (5,))), {"kl_weight": 1.0})
    trained = il.BrenierDecoder(2, 3, ((4,), (5,)), inverse_lipschitz=(il.Trained(), 1.0))
    with pytest.raises(ValueError, match=r"got 'L1'.*no Trained"):
        Annealer(trained, {"L2": 1.0, "L1": 1.0})


def test_a_model_may_change_dtype_under_its_annealer():
    vae = model()
    annealer = Annealer(vae, {"kl_weight": Linear(0.0, 1.0, 4), "L1": Linear(3.0, 1.0, 4)})
    vae.double()
    for _ in range(2):
        annealer.step()
    assert vae.kl_weight.dtype == torch.float64
    assert vae.kl_weight.item() == 0.5
    assert vae.decoder.latent_map.inverse_lipschitz.item() == 2.0
