"""The performance model: its predictions, and that plans and kernels agree with it."""

import itertools

import numpy as np
import pytest

from benchmarks.model import GPUS, PRECISIONS, Network, Tile, gpu_of, seconds
from executor import Program

# Microseconds on an H100, map and training terms, by (float32, tf32, bfloat16): worked out by hand for the layouts this
# project started from. The model is trusted to 40 % (fused) and 20 % (matmul); tiles of half the rows, which those
# layouts use for small batches and the kernels do not, may cost a little more.
FUSED = {
    Network(2, (32, 32), 128): [(4, 7), (4, 6), (3, 6)],
    Network(2, (64, 64), 512): [(7, 9), (5, 8), (5, 7)],
    Network(32, (128, 128), 4096): [(13, 33), (12, 24), (10, 21)],
    # streamed weights; with single tf32 products the cache is the limit, not the products as first derived
    Network(64, (256, 256, 256), 65536): [(690, 1700), None, (190, 470)],
}
MATMUL = {
    (Network(64, (256, 256, 256), 65536),): [(1140, 2250), (680, 1290), (350, 660)],
    # decoders: two maps, the second with an injected input
    (Network(64, (512, 512), 4096), Network(784, (1024, 1024), 4096, 64)): [(740, 1460), (220, 420), (120, 230)],
    (Network(64, (512, 512), 65536), Network(784, (1024, 1024), 65536, 64)): [
        (11300, 22600),
        (3050, 6010),
        (1540, 3030),
    ],
}


@pytest.mark.parametrize("network", FUSED, ids=str)
def test_fused_route(network):
    for precision, expected in zip(PRECISIONS, FUSED[network], strict=True):
        if expected is None:
            continue
        for ours, microseconds in zip(seconds(network, precision, GPUS["H100"], "fused"), expected, strict=True):
            assert 1 / 1.5 < ours * 1e6 / microseconds < 1.5, (precision, ours, microseconds)


@pytest.mark.parametrize("networks", MATMUL, ids=lambda n: " and ".join(map(str, n)))
def test_matmul_route(networks):
    for precision, expected in zip(PRECISIONS, MATMUL[networks], strict=True):
        each = [seconds(n, precision, GPUS["H100"], "matmul") for n in networks]
        for ours, microseconds in zip(map(sum, zip(*each, strict=True)), expected, strict=True):
            assert 1 / 1.25 < ours * 1e6 / microseconds < 1.25, (precision, ours, microseconds)


def test_faster_machines_are_faster_and_more_work_takes_longer():
    small, large = Network(32, (128, 128), 4096), Network(32, (128, 128), 40960)
    for route in ("fused", "matmul"):
        for precision in PRECISIONS:
            a100, h100, h200 = (sum(seconds(large, precision, GPUS[g], route)) for g in ("A100", "H100", "H200"))
            assert a100 > h100 >= h200
            assert sum(seconds(large, precision, GPUS["H100"], route)) > sum(
                seconds(small, precision, GPUS["H100"], route)
            )


STREAMED = [(128, 64, 3), (128, 256, 2), (256, 64, 3), (256, 256, 4)]  # n, d, K


@pytest.fixture(scope="module")
def plans() -> Program:
    return Program("plans")


def test_tiles_are_those_of_the_kernels(plans):
    """Against the functions by which csrc/cuda/fused.h configures a launch."""

    def check(ours: Tile, entry: str, *arguments: int) -> None:
        theirs = np.zeros(5, np.int64)
        getattr(plans, entry)(*arguments, theirs)
        numbers = [ours.row_groups, ours.column_groups, ours.rows, ours.weight_bytes, ours.shared_bytes]
        assert numbers == theirs.tolist(), ours

    for kind, precision in enumerate(PRECISIONS):
        for n, layers in itertools.product((32, 64, 128), (0, 1, 2, 3)):
            network = Network(64, (n,) * (layers or 2), 1)
            ours = Tile.resident(network, precision, layers > 0, compiled=False)
            check(ours, "resident_tile", kind, n, 64, layers)
        for (n, d, layers), training in itertools.product(STREAMED, (False, True)):
            ours = Tile.streaming(Network(d, (n,) * layers, 1), precision, training)
            check(ours, "streamed_tile", kind, n, d, layers, training)


def test_plans_follow_the_model(plans):
    """Where one route is predicted to be a quarter faster or more at a large batch, the plan takes it."""
    sizes = itertools.product((32, 64, 128, 192, 256), (2, 16, 64, 128, 256), (1, 2, 3, 4))
    for (n, d, layers), (kind, precision) in itertools.product(sizes, enumerate(PRECISIONS)):
        network = Network(d, (n,) * layers, 65536)
        choice = plans.choice(kind, n, d, layers)
        takes_fused, predicted = bool(choice & 1), bool(choice & 2)
        fused, matmul = (sum(seconds(network, precision, GPUS["H100"], route)) for route in ("fused", "matmul"))
        assert 0.8 < matmul / fused < 1.25 or takes_fused == (fused < matmul), (precision, network)
        assert predicted != takes_fused, (precision, network)


def test_devices_are_recognised_by_name():
    assert gpu_of("NVIDIA H100 80GB HBM3") is GPUS["H100"]
    assert gpu_of("NVIDIA A100-SXM4-40GB") is GPUS["A100"]
    assert gpu_of("Tesla T4") is None


@pytest.mark.parametrize(
    ("network", "precision", "route", "message"),
    [
        (Network(2, (32,), 1), "float64", "fused", "precision: got 'float64'"),
        (Network(2, (32,), 1), "tf32", "magic", "route: got 'magic'"),
        (Network(2, (512,), 1), "tf32", "fused", "a width of 512 is beyond the fused route"),
        (Network(2, (32,) * 5, 1), "tf32", "fused", "2, 32x5, N 1 is beyond the fused route on an H100"),
    ],
)
def test_errors_say_what_was_wanted(network, precision, route, message):
    with pytest.raises(ValueError, match=message):
        seconds(network, precision, GPUS["H100"], route)
