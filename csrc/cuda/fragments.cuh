// Products of the fused kernels, a warp's share of them, from tiles in shared memory; fragments are those of ptx.cuh,
// g = lane >> 2 and t = lane & 3.
//
// For 8-column steps in tf32 the reduction is renumbered, slots (t, t + 4) for columns (2t, 2t + 1), so that a pair is
// one 64-bit access. Rows of M in 32-bit operands lie at place(row), which keeps the accesses of the down sweep free of
// bank conflicts.
#pragma once

#include <type_traits>

#include "cuda/fused.h"
#include "cuda/operand.cuh"

namespace ilvae::cuda {

template <Operands kind>
using Element = std::conditional_t<wide(kind), float, uint16_t>;

__device__ __forceinline__ int place(int row) { return row ^ ((row >> 2) & 1); }

// Two neighbouring elements of a tile or a weight, rounded to operands.
template <Operands kind>
__device__ __forceinline__ void store_pair(Element<kind>* to, float low, float high) {
  if constexpr (kind == Operands::tf32x3) {
    *reinterpret_cast<float2*>(to) = make_float2(low, high);
  } else if constexpr (kind == Operands::tf32) {
    *reinterpret_cast<uint2*>(to) = make_uint2(ptx::round_tf32(low), ptx::round_tf32(high));
  } else if constexpr (kind == Operands::bfloat16) {
    *reinterpret_cast<uint32_t*>(to) = ptx::pack_bf16(low, high);
  } else {
    *reinterpret_cast<uint32_t*>(to) = ptx::pack_fp16(low, high);
  }
}

template <Operands kind>
__device__ __forceinline__ float2 load_pair(const Element<kind>* from) {
  if constexpr (wide(kind)) {
    return *reinterpret_cast<const float2*>(from);
  } else if constexpr (kind == Operands::bfloat16) {
    return ptx::unpack_bf16(*reinterpret_cast<const uint32_t*>(from));
  } else {
    return ptx::unpack_fp16(*reinterpret_cast<const uint32_t*>(from));
  }
}

template <Operands kind>
__device__ __forceinline__ float load_element(const Element<kind>* from) {
  if constexpr (wide(kind)) {
    return *from;
  } else if constexpr (kind == Operands::bfloat16) {
    return ptx::unpack_bf16(*from).x;
  } else {
    return ptx::unpack_fp16(*from).x;
  }
}

template <Operands kind>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (wide(kind)) {
    ptx::mma_tf32(c, a, b);
  } else if constexpr (kind == Operands::bfloat16) {
    ptx::mma_bf16(c, a, b);
  } else {
    ptx::mma_fp16(c, a, b);
  }
}

// z as a sum of two tf32 (tf32x3), or itself: rounded when it was stored, or, if it is raw, now.
template <Operands kind, bool raw = false>
__device__ __forceinline__ void split(float z, uint32_t& high, uint32_t& low) {
  if constexpr (kind == Operands::tf32x3) {
    high = ptx::round_tf32(z);
    low = ptx::round_tf32(z - __uint_as_float(high));
  } else {
    high = raw ? ptx::round_tf32(z) : __float_as_uint(z);
    low = 0;
  }
}

// Sixteen columns of the reduction of c += a b with 32-bit operands, in two steps of 8. For tf32x3 the sum of the two
// starts from zero and is added with rounding: tensor cores truncate, and their bias would build up.
template <Operands kind>
struct Wide {
  uint32_t high[2][4], low[2][4];  // of a, by step
};
template <Operands kind>
__device__ __forceinline__ void multiply16(float (&c)[4], const Wide<kind>& a, const uint32_t (&high)[2][2],
                                           const uint32_t (&low)[2][2]) {
  if constexpr (kind == Operands::tf32x3) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      mma<kind>(sum, a.low[step], high[step]);
      mma<kind>(sum, a.high[step], low[step]);
      mma<kind>(sum, a.high[step], high[step]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += sum[i];
  } else {
#pragma unroll
    for (int step = 0; step < 2; ++step) mma<kind>(c, a.high[step], high[step]);
  }
}

// The n-tiles of 8 columns that a warp owns come in groups: pairs for 16-bit operands, for the sake of ldmatrix.
template <Operands kind>
inline constexpr int group_tiles = wide(kind) ? 1 : 2;
template <Operands kind>
inline constexpr int group_columns = 8 * group_tiles<kind>;

// The first column of a warp's n-tile j, counted from that of its first, with `step` columns from group to group.
template <Operands kind, int step>
constexpr ILVAE_HD int column_of_tile(int j) {
  return j / group_tiles<kind> * step + 8 * (j % group_tiles<kind>);
}

// acc += tile * M^T (up) or tile * M (down), for this warp's 16-row tiles and C n-tiles, the first at column n0.
//   tile: first row of this warp's first tile, `next` elements before that of the second
//   m: M at the first column of the reduction (up), or at the first column of the result (down)
//   step: see column_of_tile; where n-tiles are not neighbours, those from column `end` on are left out
//   raw: M was not rounded to operands when it was stored
template <Operands kind, bool down, bool raw = false, int step = group_columns<kind>, int tiles, int C>
__device__ __forceinline__ void multiply(float (&acc)[tiles][C][4], const Element<kind>* tile, int ld, int next,
                                         const Element<kind>* m, int ldm, int n0, int reduction, int end = 0) {
  static_assert(C % group_tiles<kind> == 0);
  constexpr bool all = step == group_columns<kind>;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll 1
  for (int k0 = 0; k0 < reduction; k0 += 16) {
    __syncwarp();  // keeps the compiler from loading far ahead, for want of registers
    if constexpr (wide(kind)) {
      Wide<kind> a[tiles];
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto* const from = tile + i * next + g * ld + k0 + 8 * half + 2 * t;
          const float2 upper = *reinterpret_cast<const float2*>(from);
          const float2 lower = *reinterpret_cast<const float2*>(from + 8 * ld);
          split<kind>(upper.x, a[i].high[half][0], a[i].low[half][0]);
          split<kind>(lower.x, a[i].high[half][1], a[i].low[half][1]);
          split<kind>(upper.y, a[i].high[half][2], a[i].low[half][2]);
          split<kind>(lower.y, a[i].high[half][3], a[i].low[half][3]);
        }
      }
#pragma unroll
      for (int j = 0; j < C; ++j) {
        const int column = n0 + column_of_tile<kind, step>(j);
        if (!all && column >= end) continue;
        uint32_t high[2][2], low[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int k = k0 + 8 * half;
          float2 pair;
          if constexpr (down) {
            pair.x = m[(k + ((2 * t) ^ (t >> 1))) * ldm + column + g];
            pair.y = m[(k + ((2 * t + 1) ^ (t >> 1))) * ldm + column + g];
          } else {
            pair = *reinterpret_cast<const float2*>(m + (column + place(g)) * ldm + k + 2 * t);
          }
          split<kind, raw>(pair.x, high[half][0], low[half][0]);
          split<kind, raw>(pair.y, high[half][1], low[half][1]);
        }
#pragma unroll
        for (int i = 0; i < tiles; ++i) multiply16<kind>(acc[i][j], a[i], high, low);
      }
    } else {
      uint32_t a[tiles][4];
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
        ptx::ldmatrix_x4(a[i], tile + i * next + (lane & 15) * ld + k0 + 8 * (lane >> 4));
      }
#pragma unroll
      for (int j = 0; j < C; j += 2) {
        const int column = n0 + column_of_tile<kind, step>(j);
        if (!all && column >= end) continue;
        uint32_t b[4];
        if constexpr (down) {
          ptx::ldmatrix_x4_trans(b, m + (k0 + (lane & 15)) * ldm + column + 8 * (lane >> 4));
        } else {
          ptx::ldmatrix_x4(b, m + (column + (lane & 7) + 8 * (lane >> 4)) * ldm + k0 + 8 * ((lane >> 3) & 1));
        }
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
          mma<kind>(acc[i][j], a[i], {b[0], b[1]});
          mma<kind>(acc[i][j + 1], a[i], {b[2], b[3]});
        }
      }
    }
  }
}

// Sixteen rows of dM += D^T z: `mt` m-tiles of units from u0, two n-tiles of columns from c0 of z.
//   d, z: the first of the sixteen rows
template <Operands kind, int mt>
struct Units {  // the left operand, D^T
  std::conditional_t<wide(kind), Wide<kind>, uint32_t[4]> a[mt];

  __device__ __forceinline__ void load(const Element<kind>* d, int ld, int u0) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < mt; ++i) {
      if constexpr (wide(kind)) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const auto* const from = d + (8 * step + t) * ld + u0 + 16 * i + g;
          split<kind>(from[0], a[i].high[step][0], a[i].low[step][0]);
          split<kind>(from[8], a[i].high[step][1], a[i].low[step][1]);
          split<kind>(from[4 * ld], a[i].high[step][2], a[i].low[step][2]);
          split<kind>(from[4 * ld + 8], a[i].high[step][3], a[i].low[step][3]);
        }
      } else {
        ptx::ldmatrix_x4_trans(a[i], d + ((lane & 7) + 8 * (lane >> 4)) * ld + u0 + 16 * i + 8 * ((lane >> 3) & 1));
      }
    }
  }
  __device__ __forceinline__ void multiply(float (*dm)[4], const Element<kind>* z, int ld, int c0) const {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    if constexpr (wide(kind)) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t high[2][2], low[2][2];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const auto* const from = z + (8 * step + t) * ld + c0 + 8 * j + g;
          split<kind>(from[0], high[step][0], low[step][0]);
          split<kind>(from[4 * ld], high[step][1], low[step][1]);
        }
#pragma unroll
        for (int i = 0; i < mt; ++i) multiply16<kind>(dm[2 * i + j], a[i], high, low);
      }
    } else {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, z + (lane & 15) * ld + c0 + 8 * (lane >> 4));
#pragma unroll
      for (int i = 0; i < mt; ++i) {
        mma<kind>(dm[2 * i], a[i], {b[0], b[1]});
        mma<kind>(dm[2 * i + 1], a[i], {b[2], b[3]});
      }
    }
  }
};

// Sums of V = 2, 4 or 8 values over the lanes with the same t, dealt out: lane group g returns value g V / 8.
template <int V>
__device__ __forceinline__ float fold(float (&value)[V]) {
  const int lane = threadIdx.x & 31;
  int mask = 16;
#pragma unroll
  for (int half = V / 2; half > 0; half /= 2, mask /= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = upper ? value[i + half] : value[i], give = upper ? value[i] : value[i + half];
      value[i] = keep + __shfl_xor_sync(0xffffffffu, give, mask);
    }
  }
  for (; mask >= 4; mask /= 2) value[0] += __shfl_xor_sync(0xffffffffu, value[0], mask);
  return value[0];
}

}  // namespace ilvae::cuda
