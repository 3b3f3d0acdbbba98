"""The performance model: what it predicts, and that it stays where its derivation put it."""

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.model import GPUS, PRECISIONS, Network, Tile, gpu_of, seconds

ROOT = Path(__file__).parent.parent

# Microseconds on an H100, map and training terms, by (float32, tf32, bfloat16): worked out by hand for the layouts this
# project started from. The model is trusted to 40 % (fused) and 20 % (matmul); tiles of half the rows, which those
# layouts use for small batches and the kernels do not, may cost a little more.
FUSED = {
    Network(2, (32, 32), 128): [(4, 7), (4, 6), (3, 6)],
    Network(2, (64, 64), 512): [(7, 9), (5, 8), (5, 7)],
    Network(32, (128, 128), 4096): [(13, 33), (12, 24), (10, 21)],
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


def test_tiles_are_those_of_the_kernels(tmp_path):
    """Against the functions by which csrc/cuda/fused.h configures a launch."""
    (tmp_path / "p.cpp").write_text("""
#include <cstdio>
#include <initializer_list>
#include "cuda/fused.h"
using namespace ilvae::cuda;
int main() {
  for (const Operands kind : {Operands::tf32x3, Operands::tf32, Operands::bfloat16})
    for (const int n : {32, 64, 128})
      for (const int layers : {0, 1, 2, 3}) {
        const Layout l = layout(kind, n, 64, layers > 0 ? layers : 2, layers > 0);
        std::printf("%d %d %d %d\\n", row_groups(kind, n, layers), column_groups(kind, n, layers),
                    tile_rows(kind, n, layers), l.stash - l.weights);
      }
}
""")
    command = [os.environ.get("CXX", "g++"), "-std=c++20", f"-I{ROOT / 'csrc'}", "p.cpp", "-o", "p"]
    subprocess.run(command, cwd=tmp_path, check=True)
    lines = subprocess.run([tmp_path / "p"], capture_output=True, text=True, check=True).stdout.splitlines()
    shapes = [(p, n, layers) for p in PRECISIONS for n in (32, 64, 128) for layers in (0, 1, 2, 3)]
    for line, (precision, n, layers) in zip(lines, shapes, strict=True):
        tile = Tile.of(Network(64, (n,) * (layers or 2), 1), precision, layers > 0)
        ours = [tile.row_groups, tile.column_groups, tile.rows(layers > 0), tile.weight_bytes]
        assert ours == [int(number) for number in line.split()], (precision, n, layers)


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
    ],
)
def test_errors_say_what_was_wanted(network, precision, route, message):
    with pytest.raises(ValueError, match=message):
        seconds(network, precision, GPUS["H100"], route)
