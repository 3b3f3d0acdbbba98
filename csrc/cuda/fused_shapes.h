// The shapes of the fused kernels that are compiled, for each kind of operands; CMake reads them too. A network takes
// the first shape of its number of layers that holds it.
#pragma once

#include <cstdint>
#include <string>

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

namespace ilvae::cuda {

struct FusedShape {
  int n, d, layers;
};
inline constexpr FusedShape fused_shapes[] = {
#define ILVAE_SHAPE(n, d, layers) {n, d, layers},
    ILVAE_FUSED_SHAPES(ILVAE_SHAPE)
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
    if (s.layers == (training ? layers : 0) && hidden <= s.n && width <= s.d) {
      return layout(kind, s.n, s.d, int(layers), training).total <= shared_bytes ? i : -1;
    }
  }
  return -1;
}

// Why there is no shape for the map and the training terms of a network; empty: there is.
inline std::string fused_refusal(Operands kind, bool float64, bool dense, int64_t hidden, int64_t width, int64_t layers,
                                 int64_t shared_bytes) {
  if (float64) return "the tensor cores of the fused kernels have no float64";
  if (dense) return "the fused kernels have no dense embedding";
  if (layers > fused_layers) return "more than 4 hidden layers for the fused kernels";
  for (const bool training : {false, true}) {
    if (fused_shape(kind, hidden, width, layers, training, shared_bytes) < 0) {
      return "too wide for the fused kernels on this device";
    }
  }
  return {};
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

}  // namespace ilvae::cuda
