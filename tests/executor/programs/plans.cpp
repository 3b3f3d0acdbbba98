// How a launch of the fused kernels is configured, and which route a network takes: host functions of csrc/cuda, for
// tests/test_model.py.
#include <algorithm>
#include <string>
#include <vector>

#include "cuda/fused_shapes.h"

using namespace ilvae;
using namespace ilvae::cuda;

extern "C" {

// tile: row groups, column groups, rows, bytes of weights, bytes of shared memory. layers 0: the map.
void resident_tile(int64_t kind, int64_t n, int64_t d, int64_t layers, int64_t* tile) {
  const auto operands = Operands(kind);
  const auto l = layout(operands, int(n), int(d), layers > 0 ? int(layers) : 2, layers > 0);
  const int64_t numbers[] = {row_groups(operands, int(n), int(layers)), column_groups(operands, int(n), int(layers)),
                             tile_rows(operands, int(n), int(layers)), l.stash - l.weights, l.total};
  std::copy(std::begin(numbers), std::end(numbers), tile);
}

void streamed_tile(int64_t kind, int64_t n, int64_t d, int64_t layers, int64_t training, int64_t* tile) {
  const auto operands = Operands(kind);
  const auto l = streamed_layout(operands, int(n), int(d), int(layers));
  const int64_t numbers[] = {streamed_row_groups(operands), streamed_column_groups(operands, int(n)),
                             streamed_tile_rows(operands, training != 0), l.stash - l.weights, l.total};
  std::copy(std::begin(numbers), std::end(numbers), tile);
}

// Whether a network takes the fused route on a device with the shared memory of an H100 (1), and whether the reason is
// a prediction of the model (2).
int64_t choice(int64_t kind, int64_t n, int64_t d, int64_t layers) {
  const std::vector<int64_t> widths(layers, n);
  Layers network;
  network.widths = widths;
  network.cuda = true;
  network.fit = fused_fit(Operands(kind), /*float64=*/false, /*dense=*/false, widths, d, hopper_shared_bytes);
  const auto choice = choose(network, Route::automatic, {});
  return (choice.route == Route::fused) + 2 * (choice.reason.find("predicted") != std::string::npos);
}
}
