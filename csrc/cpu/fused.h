// The fused route on the CPU: a tile of rows goes through the whole network in the caches of one core. This header is
// the contract between the tensors (fused_route.cpp), the schedule (fused.cpp) and the tiles of an instruction set
// (fused_tile.h). Symbols are those of docs/mathematics.md.
//
// Inside a tile every matrix is a *panel*. It has one row per unit and one column, a *lane*, per row of the batch:
// element (unit j, row r) lies at j * lanes + r. A full tile has tile_lanes lanes, a tile of a small batch has fewer,
// and all have whole vectors. Lanes beyond the batch hold v = 0, u = 0 and some row of x, so that D', h' and a' are
// zero there and gradients need no masks. Where the panels of all tiles lie in one array, those of a tile start at
// (lanes of the tiles before) * units.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/activations.h"
#include "core/layout.h"

namespace ilvae::cpu {

struct HiddenUnits {
  int64_t width = 0, first = 0;  // n_k and the first packed row
  Activation activation;
};

template <class T>
struct Network {
  int64_t input = 0, width = 0, units = 0, layers = 0, widest = 0;  // m, d, S, K, max n_k
  const HiddenUnits* hidden = nullptr;                              // (K)
  Activation output_activation;
  const T* skip_weight = nullptr;      // A (S+1, d)
  const T* embedded_weight = nullptr;  // A B (S+1, m), rows embedded_stride apart
  int64_t embedded_stride = 0;
  const T* embedding = nullptr;       // B (d, m), or null: the padded identity
  const T* bias = nullptr;            // b (S+1)
  const T* const* weights = nullptr;  // W_2 .. W_K, w
  T inverse_lipschitz = 0;
};

// Rows are contiguous: x is (N, m), map and map_cotangent are (N, d), potential and its cotangent are (N).
template <class T>
struct MapArguments {
  int64_t rows = 0;
  const T* x = nullptr;
  T *potential = nullptr, *map = nullptr;            // null where not wanted
  T *preactivations = nullptr, *adjoints = nullptr;  // panels of [a_1 .. a_K o] and [g_1 .. g_{K-1}], or null
};

template <class T>
struct TrainingArguments {
  int64_t rows = 0;
  const T *x = nullptr, *map_cotangent = nullptr, *potential_cotangent = nullptr;  // x, v, u; one of v, u may be null
  const T *preactivations = nullptr, *adjoints = nullptr;                          // as the map saved them, or null
  int64_t lowest = 0;   // the hidden layer where the sweep ends; K: it ends at the output unit
  T* grad_x = nullptr;  // (N, m)
};

template <class T>
struct JvpArguments {
  int64_t rows = 0;
  const T *x = nullptr, *tangent = nullptr;  // (N, m)
  T *map = nullptr, *map_tangent = nullptr;  // (N, d)
};

// Operands of the weight gradients of a chunk of tiles. A pointer is null where the operand is not wanted.
template <class T>
struct Operands {
  T *d_tangent = nullptr, *d = nullptr;    // panels of D' and D, S+1 units
  T **h = nullptr, **h_tangent = nullptr;  // (K) each: h_k and h'_k, in row panels for k < K and in panels for k = K
  T *x = nullptr, *v = nullptr;            // in row panels, or in panels where width <= narrow_width (tuning.h)
  T* constant_terms = nullptr;             // (tiles)
};

// A gradient (rows, columns) = the sum over the rows of the batch of left_0 right_0 + left_1 right_1, where the second
// pair may be absent. Left operands are panels. Right operands are panels with `dot`, and else *row panels*: element
// (row r, column j) of a tile lies at p * panel_columns * lanes + r * w + j - p * panel_columns, where
// p = j / panel_columns is the row panel of the column and w its number of columns, padded to whole vectors.
template <class T>
struct WeightGradient {
  T* gradient = nullptr;
  int64_t rows = 0, columns = 0;
  bool dot = false;
  const T *left[2] = {}, *right[2] = {};
  int64_t left_units = 0, first_unit = 0;  // units of a left panel; the first of them that is used
  int64_t right_columns[2] = {};           // the columns beyond these get nothing from this pair
  bool add = false;                        // to what earlier chunks left
};

struct Tile {
  int64_t index = 0, offset = 0;               // how many tiles and lanes of its chunk come before it
  int64_t first_row = 0, rows = 0, lanes = 0;  // all tiles but the last have as many rows as lanes
};

// Scratch memory of a tile; it may be longer than the tile needs.
template <class T>
struct ScratchMemory {
  T* data = nullptr;
  int64_t elements = 0;
};

// What an instruction set provides.
template <class T>
struct FusedKernels {
  int64_t tile_lanes, panel_columns, vector_lanes;  // of a full tile, of a full row panel, of a vector
  int64_t (*map_scratch)(const Network<T>&);        // elements that map needs
  int64_t (*training_scratch)(const Network<T>&);   // elements that training and jvp need
  void (*map)(const Network<T>&, const MapArguments<T>&, const Tile&, const ScratchMemory<T>&);
  void (*training)(const Network<T>&, const TrainingArguments<T>&, const Operands<T>&, const Tile&,
                   const ScratchMemory<T>&);
  void (*jvp)(const Network<T>&, const JvpArguments<T>&, const Tile&, const ScratchMemory<T>&);
  // Rows [begin, end) of the gradient over the tiles of the chunk: its columns in row panel `panel`, or with `dot` all.
  void (*weight_gradient)(const WeightGradient<T>&, const Tile* tiles, int64_t count, int64_t panel, int64_t begin,
                          int64_t end);
  // gradient (units) = the sums over all rows of panels with `units` units; with `add` they are added to it.
  void (*sum_rows)(T* gradient, const T* panels, int64_t units, const Tile* tiles, int64_t count, bool add);
};

struct AllFusedKernels {
  FusedKernels<double> float64;
  FusedKernels<float> float32;
};

namespace baseline {
extern const AllFusedKernels fused_kernels;
}
#if defined(ILVAE_X86)
namespace avx2 {
extern const AllFusedKernels fused_kernels;
}
namespace avx512 {
extern const AllFusedKernels fused_kernels;
}
#endif

// Gradients besides those in TrainingArguments. A pointer is null where the gradient is not wanted.
template <class T>
struct ParameterGradients {
  T* skip_weight = nullptr;        // (S+1, d): D'^T x B^T + D^T v; with a dense embedding D^T v alone
  T* narrow = nullptr;             // (S+1, m): D'^T x, with a dense embedding
  T* bias = nullptr;               // (S+1)
  T* inverse_lipschitz = nullptr;  // (1)
  T* const* weights = nullptr;     // (K)
};

template <class T>
void fused_map(const Network<T>&, const MapArguments<T>&);
template <class T>
void fused_jvp(const Network<T>&, const JvpArguments<T>&);
template <class T>
void fused_training_terms(const Network<T>&, const TrainingArguments<T>&, const ParameterGradients<T>&);

}  // namespace ilvae::cpu
