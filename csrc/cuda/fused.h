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
  // Where weights are streamed: A, W_2 .. W_K, as they are or packed. grad_A (but its last row) and grad_W are left to
  // products of what the sweep writes, in operands: [x; v] (2N, d), [h_1 .. h_{K-1}; h'_1 ..] (2N, S - n_K), [D'; D]
  // (2N, S). Null: not wanted.
  bool stacked = false;
  Array streamed[fused_layers];
  void *stacked_x = nullptr, *stacked_h = nullptr, *stacked_d = nullptr;
  int64_t stride_x = 0, stride_h = 0, stride_d = 0;
};

// Where a block's sums of the parameters' gradients lie, in floats: [dA | db | dW_2 .. dW_K, dw | dL], or, stacked, of
// dA the last row alone, of the weights dw alone.
ILVAE_HD int64_t output_gradient(const FusedCall& c) { return c.stacked ? 0 : int64_t(c.units) * c.width; }
ILVAE_HD int64_t bias_gradient(const FusedCall& c) { return output_gradient(c) + c.width; }
ILVAE_HD int64_t weight_gradient(const FusedCall& c, int k) {  // of W_{k+2}, or, for k = K - 1, of w
  int64_t at = bias_gradient(c) + c.units + 1;
  for (int i = 0; i < k && !c.stacked; ++i) at += int64_t(c.widths[i]) * c.widths[i + 1];
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

// The same for streamed weights. 32 rows of 32-bit operands, 64 of 16 bits, by groups of 32 columns, or 32 and 64.
constexpr ILVAE_HD int streamed_row_groups(Operands kind) { return wide(kind) ? 1 : 2; }
constexpr ILVAE_HD int streamed_column_groups(Operands kind, int n) { return wide(kind) ? n / 32 : 4; }
constexpr ILVAE_HD int streamed_threads(Operands kind, int n) {
  return 32 * streamed_row_groups(kind) * streamed_column_groups(kind, n);
}
constexpr ILVAE_HD int streamed_tile_rows(Operands kind, bool training) {
  return 16 * streamed_row_groups(kind) * (training ? 1 : 2);
}
// 16-bit operands are stashed as such: in float32 they would not fit.
constexpr ILVAE_HD bool streamed_packed(Operands kind) { return !wide(kind); }
// Columns (up) or units (down) of the reduction in a slab of weights.
constexpr ILVAE_HD int slab_depth(Operands kind) { return wide(kind) ? 16 : 32; }
constexpr ILVAE_HD int slab_elements(Operands kind, int n, int d) {
  const int up = n * leading(slab_depth(kind)), down = slab_depth(kind) * leading(n > d ? n : d);
  return up > down ? up : down;
}
// The tile of h and D, with room for T or grad_x on the way out.
constexpr ILVAE_HD int streamed_tile_bytes(Operands kind, int n, int d) {
  const int element = wide(kind) ? 4 : 2, columns = wide(kind) || n > d ? n : d;
  return 32 * streamed_row_groups(kind) * leading(columns) * element;
}
// As layout(), but `tiles` is one of (2R, ld(n)), `weights` are two slabs, and the stash of 16-bit operands is packed.
constexpr ILVAE_HD Layout streamed_layout(Operands kind, int n, int d, int layers) {
  const int element = wide(kind) ? 4 : 2, rows = 32 * streamed_row_groups(kind),
            groups = streamed_column_groups(kind, n);
  Layout l{};
  l.x = 0;
  l.tiles = l.x + rows * leading(d) * element;
  l.weights = l.tiles + streamed_tile_bytes(kind, n, d);
  l.stash = l.weights + 2 * slab_elements(kind, n, d) * element;
  l.floats =
      l.stash + (layers - 1) * (n / (8 * groups)) * 2 * (streamed_packed(kind) ? 8 : 16) * streamed_threads(kind, n);
  l.total = l.floats + 4 * ((layers + 1) * n + d + (3 + groups) * rows + 4);
  return l;
}

// Whether a matrix of parameters can be streamed as it is: copies know no types, and move 4 bytes at least.
inline bool streamable(Operands kind, const Array& m) {
  const DType wanted = wide(kind) ? DType::float32 : kind == Operands::bfloat16 ? DType::bfloat16 : DType::float16;
  const auto bytes = wide(kind) ? 4 : 2;
  return m.type == wanted && (reinterpret_cast<uintptr_t>(m.data) | uintptr_t(m.stride * bytes)) % 4 == 0;
}

// Matrices that are not, and their copies: in operands, rows at 16-byte boundaries.
struct Packing {
  int32_t matrices = 0;
  int64_t rows = 0;  // of all
  struct {
    Array from;
    void* to = nullptr;
    int64_t stride = 0;
    int32_t rows = 0, columns = 0;
  } matrix[fused_layers];
};
inline constexpr int pack_threads = 256;
constexpr ILVAE_HD int64_t aligned_columns(int64_t columns) { return (columns + 7) / 8 * 8; }

// Points call.streamed to the parameters, or to copies in the workspace that start at `bytes`, which grows by them;
// with a null workspace this only counts.
inline Packing pack_streamed(Operands kind, FusedCall& c, unsigned char* workspace, int64_t& bytes) {
  Packing p;
  for (int k = 0; k < c.layers; ++k) {
    const Array& from = k == 0 ? c.skip_weight : c.weights[k - 1];
    c.streamed[k] = from;
    if (streamable(kind, from)) continue;
    auto& m = p.matrix[p.matrices++];
    m.from = from;
    m.rows = k == 0 ? c.units : c.widths[k], m.columns = k == 0 ? c.width : c.widths[k - 1];
    m.stride = aligned_columns(m.columns);
    m.to = workspace ? workspace + bytes : nullptr;
    c.streamed[k] = {m.to, m.stride, kind == Operands::bfloat16 ? DType::bfloat16 : DType::float16};
    p.rows += m.rows;
    bytes += 2 * m.rows * m.stride;
  }
  return p;
}

// For each shape that is compiled (fused_shapes.h); layers: K of the training terms, 0 for the map.
template <Operands kind, int n, int d, int layers>
Status blocks_per_multiprocessor(int device, int network_layers, int& blocks);
template <Operands kind, int n, int d, int layers>
Status launch_tiles(const FusedCall&, int blocks, int device, void* stream);
template <Operands kind, int n, int d, bool training>
Status streamed_blocks_per_multiprocessor(int device, int network_layers, int& blocks);
template <Operands kind, int n, int d, bool training>
Status launch_streamed(const FusedCall&, int blocks, int device, void* stream);

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
