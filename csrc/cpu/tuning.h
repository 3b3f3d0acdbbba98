// Tuning constants of the CPU kernels: sizes that decide about speed and memory, and not about results beyond the order
// of sums. A name in quotes is a section of benchmarks/NOTES.md, which says what was measured. The constants that say
// "not measured alone" have been as they are since the first version of their kernels.
#pragma once

#include <cstdint>

#include "core/layout.h"

namespace ilvae::cpu {

// --- Products: registers and the L1 cache
// -----------------------------------------------------------------------------

// What depends on the instruction set. A block of a product holds block_rows x panel_vectors vectors of sums in
// registers, beside one vector for each of panel_vectors and one element of the left factor.
struct Registers {
  int vector_bytes, count;
  int panel_vectors;
  // The reduction is cut into pieces whose panel takes at most this many bytes, so that the panel stays in the L1 cache
  // while all rows of the left factor pass. L1 caches hold 48 KB on most CPUs with AVX-512 and 32 KB on the others:
  // "Depth of a piece".
  int64_t piece_bytes;
};

// "Fused CPU route" has the speed of products in these blocks.
inline constexpr int block_rows = 6;
namespace baseline {
inline constexpr Registers registers{.vector_bytes = 16, .count = 16, .panel_vectors = 2, .piece_bytes = 24 * 1024};
}
namespace avx2 {
inline constexpr Registers registers{.vector_bytes = 32, .count = 16, .panel_vectors = 2, .piece_bytes = 24 * 1024};
}
namespace avx512 {
inline constexpr Registers registers{.vector_bytes = 64, .count = 32, .panel_vectors = 4, .piece_bytes = 36 * 1024};
}

// An activation is evaluated for this many vectors at once: "Chains side by side".
inline constexpr int activation_vectors = 4;

// --- Tiles
// ------------------------------------------------------------------------------------------------------------

// Bytes of one unit in a full tile: 64 rows of the batch in float32, 32 in float64. More rows read the weights less
// often, fewer keep the panels of a layer closer: "Tiles of 64 rows with AVX2 too".
inline constexpr int tile_bytes_per_unit = 256;

constexpr bool fits(Registers r) {
  return (block_rows + 1) * r.panel_vectors + 1 <= r.count     // a block needs no spills
         && row_padding * sizeof(float) % r.vector_bytes == 0  // the smallest tile holds whole vectors
         && tile_bytes_per_unit % r.vector_bytes == 0          // and so does a full one
         && r.piece_bytes >= r.panel_vectors * r.vector_bytes  // one step of the reduction fits into a piece
         && r.piece_bytes >= tile_bytes_per_unit;
}
static_assert(fits(baseline::registers) && fits(avx2::registers) && fits(avx512::registers));
static_assert(tile_bytes_per_unit % (row_padding * sizeof(double)) == 0, "full tiles are padded as saved panels are");

// --- Weight gradients
// -------------------------------------------------------------------------------------------------

// So many tiles are added up in one pass over a gradient. More read the operands again from the L2 cache, fewer read
// and write the gradient more often: "Fewer tiles at once for the weight gradients".
inline constexpr int64_t tiles_at_once = 4;

// Rows of a gradient in one piece of work. A column panel of at most this many rows stays in the L2 cache. Pieces are
// dealt to threads in whole steps. Not measured alone.
inline constexpr int64_t gradient_rows = 252, gradient_rows_step = 12;
static_assert(gradient_rows % gradient_rows_step == 0 && gradient_rows_step % block_rows == 0);

// Rows of a column panel that has padding, which is worked on aside. Not measured alone.
inline constexpr int64_t aside_rows = 8 * block_rows;

// grad_A of at most this width is a dot product along the rows of the batch: there a row panel would be mostly padding.
// Not measured alone; "Sums of lanes, all at once" has the speed of the dot products.
inline constexpr int64_t narrow_width = 8;

// The operands of the weight gradients are worked through in chunks of the batch. A thread that sweeps a chunk and sums
// its gradients by itself holds at most this much: more would push what the rest of a training step needs out of the L2
// cache. "Smaller chunks of rows".
inline constexpr int64_t thread_chunk_bytes = int64_t(1) << 18;
// Threads that share a chunk hold at most this much together. Not measured alone.
inline constexpr int64_t shared_chunk_bytes = int64_t(64) << 20;

// --- Threads
// ----------------------------------------------------------------------------------------------------------

// Below this many flops a second thread costs more than it brings: "Small calls".
inline constexpr double serial_flops = 7e5;
// Where results must not depend on the number of threads, rows are divided as for so many: "What determinism costs".
inline constexpr int deterministic_parts = 8;
// Flops of the activations of one unit and row, roughly.
inline constexpr double activation_flops = 40;

// A thread of the pointwise kernels takes at least this many elements. Not measured alone.
inline constexpr int64_t row_grain_elements = 8192;
inline constexpr int64_t weight_grain_elements = 16384;
// Threads split weights at multiples of this many elements, whole vectors, so that the split does not decide how an
// element is computed.
inline constexpr int64_t weight_block_elements = 64;
static_assert(weight_block_elements * sizeof(float) % avx512::registers.vector_bytes == 0);
static_assert(weight_grain_elements % weight_block_elements == 0);

}  // namespace ilvae::cpu
