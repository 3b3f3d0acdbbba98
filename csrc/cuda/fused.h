// The fused route: what host, device and tests agree on. No torch headers.
//
// A network is padded to a common hidden width n and to d input columns. The weights of a layer are one matrix
//
//   M_k = [A_k | W_k]   n x (d + n), M_1 = A_1   so that   a_k = [x | h_{k-1}] M_k^T + b_k ,   [t_k | g_{k-1}] = D_k
//   M_k
//
// and T = sum_k t_k + D_out A_out + L x. Padding is zero and stays without effect: D and D' vanish on padded units, D',
// h' and a' on padded rows.
#pragma once

#include <cstdint>

#include "core/activations.h"
#include "cuda/dtype.h"
#include "cuda/status.h"

namespace ilvae::cuda {

// What enters the tensor cores. tf32x3: each float32 as the sum of two tf32, the full accuracy of float32.
enum class Operands : int { tf32x3, tf32, bfloat16, float16 };
inline constexpr int operand_kinds = 4;
constexpr ILVAE_HD bool wide(Operands kind) { return kind == Operands::tf32x3 || kind == Operands::tf32; }

inline constexpr int fused_layers = 4;  // at most

struct Array {
  const void* data = nullptr;
  int64_t stride = 0;  // of its rows, in elements; columns are contiguous
  DType type = DType::float32;
};

struct FusedCall {
  int32_t layers = 0, units = 0, width = 0, input = 0;          // K, S, d, m
  int32_t widths[fused_layers] = {}, first[fused_layers] = {};  // n_k, its first row in A
  ActivationKind kind[fused_layers + 1] = {};                   // the output's in place K
  Parameter<float> parameter[fused_layers + 1] = {};
  int64_t rows = 0, tiles = 0;
  Array x, skip_weight, bias, weights[fused_layers], constant;  // (N, m), (S+1, d), (S+1), W_2 .. W_K, w, L
  // map
  void *potential = nullptr, *map = nullptr;  // (N), (N, d) or null
  // training terms
  Array v, u;                     // (N, d), (N), or null
  void* grad_x = nullptr;         // (N, m) or null
  float* partial = nullptr;       // (grid, partial_size)
  DType output = DType::float32;  // of potential, map and grad_x
};

// Where a block's sums of the parameters' gradients lie: [dA | db | dW_2 .. dW_K, dw | dL], in floats.
ILVAE_HD int64_t bias_gradient(const FusedCall& c) { return int64_t(c.units + 1) * c.width; }
ILVAE_HD int64_t weight_gradient(const FusedCall& c, int k) {  // of W_{k+2}, or, for k = K - 1, of w
  int64_t at = bias_gradient(c) + c.units + 1;
  for (int i = 0; i < k; ++i) at += int64_t(c.widths[i]) * c.widths[i + 1];
  return at;
}
ILVAE_HD int64_t constant_gradient(const FusedCall& c) {
  return weight_gradient(c, c.layers - 1) + c.widths[c.layers - 1];
}
ILVAE_HD int64_t partial_size(const FusedCall& c) { return constant_gradient(c) + 1; }

// Rows of shared memory are 8 * odd elements apart: 16-byte aligned, and without bank conflicts in any access.
constexpr ILVAE_HD int leading(int columns) { return ((columns + 7) / 8 | 1) * 8; }

// The warps of a block: row groups of 16 rows by column groups. Each warp owns two tiles of 16 rows: of the map two
// groups of rows; of the training terms x and v of the same rows. One row group where two would not fit into shared
// memory. `layers` as in launch_tiles: 0 for the map.
constexpr ILVAE_HD int row_groups(Operands kind, int n, int layers) {
  return wide(kind) && (n == 128 || (n == 64 && layers >= 3)) ? 1 : 2;
}
constexpr ILVAE_HD int column_groups(Operands kind, int n, int layers) {
  return n == 32 ? 2 : row_groups(kind, n, layers) == 1 ? 8 : 4;
}
constexpr ILVAE_HD int block_threads(Operands kind, int n, int layers) {
  return 32 * row_groups(kind, n, layers) * column_groups(kind, n, layers);
}
// Rows of the batch in a tile.
constexpr ILVAE_HD int tile_rows(Operands kind, int n, int layers) {
  return 16 * row_groups(kind, n, layers) * (layers > 0 ? 1 : 2);
}

// Shared memory of a block, in bytes from its start.
struct Layout {
  int x;        // (2R, ld(d)) operands: rows [0, R) x, [R, 2R) v; all x for the map
  int tiles;    // (2R, ld(n)) each: training h_1 .. h_{K-1}, D; map h_k and D_k in tile k % 2
  int weights;  // M_1 (n, ld(d)), M_2 .. M_K (n, ld(d + n)) operands
  int stash;    // s'_k and p_k = s''_k a'_k (map: s'_k of both tiles), k < K, float4 (layer, slot, thread)
  int floats;   // b (K, n), w (n), A_out (d), then by row: products with A_out (2R), D'_out and D_out (2R),
                // u or |x|^2 (2R), partial sums of o (column groups, 2R), b_out, L
  int total;
};
constexpr ILVAE_HD Layout layout(Operands kind, int n, int d, int layers, bool training) {
  const int shape = training ? layers : 0;
  const int element = wide(kind) ? 4 : 2, rows = 32 * row_groups(kind, n, shape),
            groups = column_groups(kind, n, shape);
  Layout l{};
  l.x = 0;
  l.tiles = l.x + rows * leading(d) * element;
  l.weights = l.tiles + (training ? layers : 2) * rows * leading(n) * element;
  l.stash = l.weights + n * (leading(d) + (layers - 1) * leading(d + n)) * element;
  l.floats = l.stash + (layers - 1) * (n / (8 * groups)) * 2 * 16 * block_threads(kind, n, shape);
  l.total = l.floats + 4 * ((layers + 1) * n + d + (3 + groups) * rows + 4);
  return l;
}

// For each shape that is compiled (fused_shapes.h); layers: K of the training terms, 0 for the map.
template <Operands kind, int n, int d, int layers>
Status blocks_per_multiprocessor(int device, int network_layers, int& blocks);
template <Operands kind, int n, int d, int layers>
Status launch_tiles(const FusedCall&, int blocks, int device, void* stream);

// The sums of `parts` rows of `size` floats, cut into segments of consecutive elements: one for each gradient.
struct Reduction {
  const float* partial = nullptr;  // (parts, size)
  int64_t size = 0;
  int32_t parts = 0, segments = 0;
  struct Segment {
    int64_t end = 0;
    void* data = nullptr;  // null: not wanted
    DType type = DType::float32;
  } segment[fused_layers + 3];
};
inline constexpr int reduction_threads = 256;
inline constexpr int reduction_shared_bytes = 4 * reduction_threads;
ILVAE_HD int64_t reduction_blocks(const Reduction& r) { return (r.size + 31) / 32; }

Status launch_reduction(const Reduction&, void* stream);

// The segments in their order; `data` and `type` are left to the caller.
ILVAE_HD Reduction reduction_of(const FusedCall& c, int parts) {
  Reduction r;
  r.partial = c.partial;
  r.size = partial_size(c);
  r.parts = parts;
  r.segments = c.layers + 3;
  r.segment[0].end = bias_gradient(c);
  for (int k = 0; k < c.layers; ++k) r.segment[1 + k].end = weight_gradient(c, k);
  r.segment[1 + c.layers].end = constant_gradient(c);
  r.segment[2 + c.layers].end = r.size;
  return r;
}

}  // namespace ilvae::cuda
