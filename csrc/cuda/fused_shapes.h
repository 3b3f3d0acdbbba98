// The shapes of the fused kernels that are compiled, for each kind of operands; CMake reads them too. A network takes
// the first shape that holds it and fits into shared memory, one with resident weights if there is any.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/plan.h"
#include "cuda/fused.h"

// (hidden width n, input width d, K), narrow ones first; K = 0: the map, of up to fused_layers layers
#define ILVAE_FUSED_SHAPES(S) \
  S(32, 16, 0)                \
  S(32, 64, 0)                \
  S(64, 16, 0)                \
  S(64, 64, 0)                \
  S(128, 32, 0)               \
  S(128, 64, 0)               \
  S(128, 128, 0)              \
  S(32, 16, 1)                \
  S(32, 64, 1)                \
  S(64, 16, 1)                \
  S(64, 64, 1)                \
  S(128, 32, 1)               \
  S(128, 64, 1)               \
  S(128, 128, 1)              \
  S(32, 16, 2)                \
  S(32, 64, 2)                \
  S(64, 16, 2)                \
  S(64, 64, 2)                \
  S(128, 32, 2)               \
  S(128, 64, 2)               \
  S(32, 16, 3)                \
  S(32, 64, 3)                \
  S(64, 16, 3)                \
  S(64, 64, 3)                \
  S(32, 16, 4)                \
  S(32, 64, 4)                \
  S(64, 16, 4)                \
  S(64, 64, 4)

// With streamed weights: (n, d, training terms), of up to fused_layers layers, narrow ones first
#define ILVAE_STREAMED_SHAPES(S) \
  S(128, 64, false)              \
  S(128, 256, false)             \
  S(256, 64, false)              \
  S(256, 256, false)             \
  S(128, 64, true)               \
  S(128, 256, true)              \
  S(256, 64, true)               \
  S(256, 256, true)

namespace ilvae::cuda {

struct FusedShape {
  int n, d, layers;  // layers: at most (streamed), or exactly, of the training terms; 0: the map
  bool streamed;

  constexpr bool training() const { return layers > 0; }
  constexpr bool holds(int64_t hidden, int64_t width, int64_t depth, bool terms) const {
    return hidden <= n && width <= d && terms == training() && (streamed || !terms || depth == layers);
  }
  constexpr int tile_rows(Operands kind) const {
    return streamed ? streamed_tile_rows(kind, training()) : cuda::tile_rows(kind, n, layers);
  }
  constexpr int shared_bytes(Operands kind, int depth) const {
    return streamed ? streamed_layout(kind, n, d, depth).total : layout(kind, n, d, depth, training()).total;
  }
};
inline constexpr FusedShape fused_shapes[] = {
#define ILVAE_SHAPE(n, d, layers) {n, d, layers, false},
    ILVAE_FUSED_SHAPES(ILVAE_SHAPE)
#undef ILVAE_SHAPE
#define ILVAE_SHAPE(n, d, training) {n, d, training ? fused_layers : 0, true},
        ILVAE_STREAMED_SHAPES(ILVAE_SHAPE)
#undef ILVAE_SHAPE
};
inline constexpr int fused_shape_count = sizeof(fused_shapes) / sizeof(FusedShape);

// The place of the shape for a network of `layers` layers, at most `hidden` wide, with `width` inputs, in
// `shared_bytes` of shared memory a block; -1: there is none.
constexpr int fused_shape(Operands kind, int64_t hidden, int64_t width, int64_t layers, bool training,
                          int64_t shared_bytes) {
  if (layers > fused_layers) return -1;
  for (int i = 0; i < fused_shape_count; ++i) {
    const auto& s = fused_shapes[i];
    if (s.holds(hidden, width, layers, training) && s.shared_bytes(kind, int(layers)) <= shared_bytes) return i;
  }
  return -1;
}

// How the fused kernels meet a network in the map and the training terms.
inline Fit fused_fit(Operands kind, bool float64, bool dense, const std::vector<int64_t>& widths, int64_t width,
                     int64_t shared_bytes) {
  const auto refuse = [](const char* why) { return Fit{why, {}, {}}; };
  if (float64) return refuse("the tensor cores of the fused kernels have no float64");
  if (dense) return refuse("the fused kernels have no dense embedding");
  const auto layers = int64_t(widths.size());
  if (layers > fused_layers) return refuse("more than 4 hidden layers for the fused kernels");
  int64_t hidden = 0, units = 0;
  for (const auto n : widths) hidden = std::max(hidden, n), units += n;
  const int map = fused_shape(kind, hidden, width, layers, false, shared_bytes);
  const int terms = fused_shape(kind, hidden, width, layers, true, shared_bytes);
  if (map < 0 || terms < 0) return refuse("too wide for the fused kernels on this device");
  const auto& shape = fused_shapes[terms];
  if (!shape.streamed) return {{}, {}, "weights stay in shared memory"};
  Fit fit;
  fit.how = fused_shapes[map].streamed
                ? "weights are streamed through shared memory"
                : "weights stay in shared memory in the map, are streamed through it in the training terms";
  // From benchmarks/model.py at large batches: what padding may cost, and that 32 rows a block are too few for what the
  // L2 cache has to deliver to single tf32 products.
  const double filled = double(units) / double(shape.n * layers);
  if (layers > 1 && filled < (kind == Operands::tf32x3 ? 0.9 : 0.6)) {
    fit.slower = "predicted to be faster: the fused kernels would pad much";
  } else if (layers > 1 && kind == Operands::tf32 && hidden > 128 && width > 64) {
    fit.slower = "predicted to be faster in single tf32 products";
  }
  return fit;
}

// What a device offers.
inline constexpr int hopper_shared_bytes = 232448;
struct Limits {
  int device = 0, multiprocessors = 0, shared_bytes = 0;  // shared_bytes: at most, of a block
};
Status limits_of_device(int device, Limits&);

// How many blocks of a shape (a place in fused_shapes) a device runs at a time, at most one for each of `tiles`.
Status fused_blocks(Operands kind, int shape, int layers, int64_t tiles, const Limits&, int& blocks);
Status launch_fused(Operands kind, int shape, const FusedCall&, int blocks, const Limits&, void* stream);
Status launch_pack(Operands kind, const Packing&, void* stream);

}  // namespace ilvae::cuda
