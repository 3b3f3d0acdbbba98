"""The benchmark suite: what it times is right, and --check fails when it should."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import time

import pytest
import torch

import ilvae_fast as il
from benchmarks import defaults, fits, inverse, memory, peers, plots, record, second_order, suite, timing
from benchmarks.__main__ import again_when_calm, failures, milliseconds, timed
from benchmarks.peers import PEERS, Problem, check
from benchmarks.record import RESULTS


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("latent", [None, 3])
@pytest.mark.parametrize("name", ["ours", "eager double backward", "closed form", "expert", "JAX, jit"])
def test_every_step_is_right(name, latent, raw):
    if "JAX" in name and importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed (extra bench)")
    problem = Problem(7, (12, 9), 20, latent, raw=raw)
    make = {"ours": peers.ours, "expert": peers.expert}.get(name) or PEERS[name]
    exact = [t.detach() for t in peers.eager(problem.double())()]
    check(name, problem, make(problem), exact)


@pytest.mark.parametrize("kind", ["penalty", "logabsdet"])
def test_every_step_of_second_order_is_right(kind):
    makers = {"penalty": second_order.PENALTY_STEPS, "logabsdet": second_order.LOGABSDET_STEPS}[kind]
    truth = {"penalty": "plain torch", "logabsdet": "torch.func"}[kind]
    result = second_order.row((3, (6, 5), 7), makers, truth, seconds=0.0)
    assert list(result["milliseconds"]) == list(makers)
    problem = Problem(3, (6, 5), 7)
    exact = [t.detach() for t in makers[truth](problem.double())()]
    with pytest.raises(SystemExit, match="tampered is wrong"):
        check("tampered", problem, lambda: [1.01 * t for t in makers[truth](problem)()], exact, second_order.TOLERANCE)


@pytest.mark.parametrize("dtype", inverse.TOLERANCES, ids=str)
def test_both_find_the_inverse(dtype, monkeypatch):
    layer = inverse.fitted(3, (8, 8), steps=20)
    result = inverse.row(layer, "fitted", 20, dtype, seconds=0.0)
    assert list(result["milliseconds"]) == ["ours", "L-BFGS"]
    monkeypatch.setitem(inverse.STEPS, "tampered", lambda layer, y, tolerance: layer.inverse(y) + 1e-3)
    with pytest.raises(SystemExit, match=r"tampered: \|T\(x\) - y\| is"):
        inverse.row(layer, "fitted", 20, dtype, seconds=0.0)


def test_a_wrong_peer_is_not_timed():
    problem = Problem(3, (4,), 5)
    exact = [t.detach() for t in peers.eager(problem.double())()]
    with pytest.raises(SystemExit, match="tampered is wrong"):
        check("tampered", problem, lambda: [1.001 * t for t in peers.eager(problem)()], exact)


def test_medians_tell_a_slow_step_from_a_fast_one():
    steps = {"slow": lambda: time.sleep(4e-3), "fast": lambda: time.sleep(1e-3)}
    times = timing.interleaved(steps, 0.05)
    assert times["slow"].median > 2 * times["fast"].median
    assert times["slow"].over(times["fast"]) > 2


def test_a_ratio_compares_turns_of_the_same_round():
    slow_half = [1.0] * 6 + [2.0] * 5  # the machine slows down
    ours = timing.Times(slow_half)
    theirs = timing.Times([3 * t for t in slow_half[:5]] + [3 * 2.0] * 6)  # one turn earlier
    assert theirs.over(ours) == 3
    assert theirs.median / ours.median == 6
    assert timing.Times([1.0, 2.0, 3.0]).spread == 0.5


def test_noisy_measurements_are_repeated():
    calls = []

    def measurement(k, *times):
        remaining = iter(times)

        def measure():
            calls.append(k)
            return {"product_milliseconds": next(remaining), "row": k}

        return measure

    first = [{"product_milliseconds": t} for t in (1.0, 2.0, 1.05, 1.5)]
    # the slowest first: 2.5 is slower and not kept, 1.6 is kept but still the slowest
    measurements = [measurement(0), measurement(1, 2.5, 1.6, 1.04), measurement(2), measurement(3, 1.1)]
    results = list(first)
    again_when_calm(results, measurements, time.perf_counter() + 60.0)
    assert calls == [1, 1, 1, 3]
    assert [r["product_milliseconds"] for r in results] == [1.0, 1.04, 1.05, 1.1]
    impatient = list(first)
    again_when_calm(impatient, measurements, time.perf_counter())
    assert impatient == first
    assert len(calls) == 4


def _result() -> dict:
    row = {"ratio_module": 9.0, "ratio_expert": 9.0, "ratio_stateless": 9.0, "ratio": 9.0}
    rows = [{"row": str(r.problem()), **row} for r in suite.ROWS]
    return {"rows": rows, "lidvae": {"row": "LIDVAE", "ratio": 9.0, "wanted": 1.8}, "geometric_mean": 9.0}


def test_check_passes_only_where_every_ratio_does():
    assert failures(_result(), None) == []
    for key in ("ratio", "ratio_module"):
        for k in range(len(suite.ROWS)):
            result = _result()
            result["rows"][k][key] = 0.9
            assert len(failures(result, None)) == 1
    for change in ({"geometric_mean": 1.5}, {"lidvae": {"row": "LIDVAE", "ratio": 1.7, "wanted": 1.8}}):
        assert len(failures({**_result(), **change}, None)) == 1
    fallen = copy.deepcopy(_result())
    fallen["rows"][3]["ratio"] = 7.0  # of a committed 9
    assert "committed ratio" in failures(fallen, _result())[0]


def test_pictures_come_from_the_result(tmp_path):
    torch.manual_seed(0)
    problem = Problem(3, (4,), 5)
    times = timed(problem, ["closed form"], 0.01)
    row = {
        "row": str(problem),
        "milliseconds": milliseconds(times),
        "best_peer": "closed form",
        "flops": problem.flops(),
        "bytes": problem.bytes(),
    }
    result = {"rows": [row] * 2, "matmul_ceiling": 1e11, "copy_ceiling": 1e10, "dtype": "float32", "processor": "x"}
    for path in plots.draw(result, tmp_path / "picture"):
        assert path.stat().st_size > 5000


def test_ours_saves_at_most_half_of_what_eager_saves():
    problem = Problem(12, (40, 40), 64)
    eager = memory._kept(problem, peers.eager(problem))
    for options, most in (
        ({"route": "matmul"}, eager / 2),
        ({"recompute": True}, 0),
        ({"recompute": False}, eager / 2),
    ):
        assert memory._kept(problem, peers.ours(problem, **options)) <= most
    assert memory._peak(lambda: torch.ones(1 << 24)) >= (1 << 26)


@pytest.mark.parametrize("said", ["abc1234", None])
def test_a_result_names_its_commit_where_there_is_no_git(monkeypatch, said):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("ILVAE_FAST_COMMIT", raising=False)
    if said:
        monkeypatch.setenv("ILVAE_FAST_COMMIT", said)
    assert record.provenance()["commit"] == (said or "unknown")


# studies


def test_the_page_of_defaults_matches_its_results():
    result = json.loads((RESULTS / "defaults.json").read_text())
    assert (RESULTS / "defaults.md").read_text() == defaults.tables(result)


def test_recorded_commands_contain_no_local_path():
    for name in ("defaults", "advice"):
        command = json.loads((RESULTS / f"{name}.json").read_text())["command"]
        assert re.fullmatch(r"python -m benchmarks\.\w+ --data-root DATA( --\w.*)?", command), command


def test_every_run_of_the_study_builds_its_decoder():
    for name, task in defaults.TASKS.items():
        x = torch.zeros(2, 30, dtype=torch.long if task.likelihood == "categorical" else torch.float32)
        for variant, decoder in defaults.DECODERS.items():
            fields = {"decoder": "mlp"} if decoder is None else dict(decoder.fields)
            if decoder is not None and decoder.options:
                fields["decoder_options"] = decoder.options
            config = fits.configuration(task, fits.Parts(x, x, x), 0.5, **fields)
            assert config.decoder == ("mlp" if variant == "MLP" else "brenier"), name
    for options in defaults.MAPS.values():
        il.BrenierMap(2, (4,), **options)
