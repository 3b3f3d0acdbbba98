// Padding of the matrices that pass from forward to backward. Counts may be symbolic (c10::SymInt), so that a shape
// function and the allocation that it describes use the same code.
#pragma once

#include <cstdint>

#include "core/scalar_math.h"

namespace ilvae {

// The smallest multiple of `multiple` that is not below `count`.
template <class Int>
constexpr ILVAE_HD Int rounded_up(const Int& count, int64_t multiple) {
  return (count + (multiple - 1)) / multiple * multiple;
}

// The fused CPU route saves panels of this many rows, whatever the instruction set: a whole number of vectors for every
// element type. What was saved can therefore be read after a change of the instruction set or of the number of threads.
inline constexpr int64_t row_padding = 16;

// Rows of the panels that hold N rows of the batch.
template <class Int>
constexpr ILVAE_HD Int padded_rows(const Int& rows) {
  return rounded_up(rows, row_padding);
}

// The matmul route starts its rows at multiples of this many elements: at 16-byte boundaries in every element type.
inline constexpr int64_t column_padding = 8;

// Columns of a matrix that has one for each of S hidden units and one for the output unit.
template <class Int>
constexpr ILVAE_HD Int padded_units(const Int& units) {
  return rounded_up(units + 1, column_padding);
}

static_assert(padded_rows<int64_t>(0) == 0 && padded_rows<int64_t>(16) == 16 && padded_rows<int64_t>(17) == 32);
static_assert(padded_units<int64_t>(7) == 8 && padded_units<int64_t>(8) == 16);

}  // namespace ilvae
