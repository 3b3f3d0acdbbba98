// How saved matrices are padded, in one place for the routes, the checks and the plan. Integers may be symbolic.
#pragma once

#include <cstdint>

namespace ilvae {

// The fused route on the CPU saves panels of whole vectors, for the longest vectors of any instruction set.
inline constexpr int64_t row_padding = 16;
template <class Int>
Int padded_rows(const Int& rows) {
  return (rows + (row_padding - 1)) / row_padding * row_padding;
}

// The matmul route's matrices have a column for each of S hidden units and the output's; their rows start at 16-byte
// boundaries.
template <class Int>
Int padded_units(const Int& units) {
  return (units + 8) / 8 * 8;
}

}  // namespace ilvae
