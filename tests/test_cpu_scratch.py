"""The scratch memory of a CPU tile (csrc/cpu/scratch.h): its layout suffices, and builds with checks see an overrun."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
LANES = 32  # of a full tile in float64

OVERRUNS = r"""
#define ILVAE_ISA baseline
#include "cpu/scratch.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace ilvae::cpu;
using namespace ilvae::cpu::baseline;

template <class Allocator>
double* layout(Allocator& scratch) {
  double* const panel = scratch.take(3);
  scratch.take(2);
  return panel;
}

// Arguments: the elements that are missing from the memory; an element of the first panel, of 3 units, to write to.
int main(int, char** arguments) {
  ScratchSize<double> size;
  layout(size);
  std::vector<double> memory(size.elements());
  Scratch<double> scratch({memory.data(), size.elements() - std::atoi(arguments[1])}, tile_lanes<double>);
  layout(scratch)[std::atoi(arguments[2])] = 0.0;
  std::puts("finished");
}
"""

TILES = r"""
#define ILVAE_ISA baseline
#include "cpu/fused_tile.h"

#include <cstdio>
#include <vector>

using namespace ilvae;
using namespace ilvae::cpu;
using namespace ilvae::cpu::baseline;

// A network with all parameters 1/64, and a tile of it.
struct Problem {
  std::vector<HiddenUnits> hidden;
  std::vector<float> ones = std::vector<float>(1 << 16, 1.0f / 64);
  std::vector<const float*> weights;
  Network<float> net;
  Tile tile;

  Problem(int64_t input, int64_t width, std::vector<int64_t> widths, bool dense, int64_t rows, int64_t lanes)
      : weights(widths.size(), ones.data()), tile{.rows = rows, .lanes = lanes} {
    net.input = input;
    net.width = width;
    net.layers = widths.size();
    for (const auto n : widths) {
      hidden.push_back({n, net.units, {ActivationKind::softplus, 1.0}});
      net.units += n;
      net.widest = n > net.widest ? n : net.widest;
    }
    net.hidden = hidden.data();
    net.output_activation = {ActivationKind::softplus, 1.0};
    net.skip_weight = net.embedded_weight = net.bias = ones.data();
    net.embedded_stride = dense ? input : width;
    net.embedding = dense ? ones.data() : nullptr;
    net.weights = weights.data();
    net.inverse_lipschitz = 0.5f;
  }

  // The tile functions, with no more memory than they ask for.
  void run() const {
    const int64_t map_elements = map_scratch(net), training_elements = training_scratch(net);
    std::vector<float> scratch(map_elements), more_scratch(training_elements);
    std::vector<float> potential(tile.rows), map(tile.rows * net.width), other(tile.rows * net.width);
    MapArguments<float> there;
    there.x = ones.data(), there.potential = potential.data(), there.map = map.data();
    map_tile(net, there, tile, {scratch.data(), map_elements});
    TrainingArguments<float> back;
    back.x = back.map_cotangent = back.potential_cotangent = ones.data(), back.grad_x = other.data();
    training_tile(net, back, {}, tile, {more_scratch.data(), training_elements});
    JvpArguments<float> jvp;
    jvp.x = jvp.tangent = ones.data(), jvp.map = map.data(), jvp.map_tangent = other.data();
    jvp_tile(net, jvp, tile, {more_scratch.data(), training_elements});
  }
};

int main() {
  for (const int64_t lanes : {16, 48, 64}) {
    for (const bool dense : {false, true}) {
      Problem(5, 5, {7}, dense, lanes - 3, lanes).run();
      Problem(3, 20, {9, 33, 4}, dense, lanes, lanes).run();
      Problem(1, 9, {70, 2}, dense, 1, lanes).run();
    }
  }
  std::puts("finished");
}
"""


def compiled(text: str, folder: Path) -> Path:
    (folder / "program.cpp").write_text(text)
    command = [os.environ.get("CXX", "g++"), "-std=c++20", "-fopenmp-simd", f"-I{CSRC}", "-UNDEBUG"]
    subprocess.run([*command, "program.cpp", "-o", "program"], cwd=folder, check=True)
    return folder / "program"


def run(program: Path, *arguments: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def overruns(tmp_path_factory) -> Path:
    return compiled(OVERRUNS, tmp_path_factory.mktemp("overruns"))


def test_a_layout_fits_into_what_it_counted(overruns):
    done = run(overruns, 0, 3 * LANES - 1)
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr


@pytest.mark.parametrize(
    ("missing", "element", "message"),
    [
        (1, 0, "scratch memory is smaller than its layout"),
        (0, 3 * LANES, "a tile wrote behind a scratch panel"),
        (0, 4 * LANES - 1, "a tile wrote behind a scratch panel"),
    ],
)
def test_builds_with_checks_see_an_overrun(overruns, missing, element, message):
    done = run(overruns, missing, element)
    assert done.returncode == -signal.SIGABRT
    assert message in done.stderr


@pytest.mark.slow
def test_tiles_run_in_exactly_the_memory_they_ask_for(tmp_path):
    done = run(compiled(TILES, tmp_path))
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
