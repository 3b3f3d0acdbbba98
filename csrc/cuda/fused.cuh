// Device code of the fused route: a tile of rows goes up and down through the whole network on chip.
//
// Fragments are those of ptx.cuh, g = lane >> 2 and t = lane & 3. For 8-column steps in tf32 the reduction is
// renumbered, slots (t, t + 4) for columns (2t, 2t + 1), so that a pair is one 64-bit access. Rows of M in 32-bit
// operands lie at place(row), which keeps the accesses of the down sweep free of bank conflicts.
#pragma once

#include <type_traits>

#include "cuda/activation.cuh"
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

// z as a sum of two tf32 (tf32x3), or itself, rounded when it was stored.
template <Operands kind>
__device__ __forceinline__ void split(float z, uint32_t& high, uint32_t& low) {
  if constexpr (kind == Operands::tf32x3) {
    high = ptx::round_tf32(z);
    low = ptx::round_tf32(z - __uint_as_float(high));
  } else {
    high = __float_as_uint(z);
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

// acc += tile * M^T (up) or tile * M (down), for this warp's 16-row tiles and C n-tiles of 8 columns from n0.
//   tile: first row of this warp's first tile, `next` elements before that of the second
//   m: M at the first column of the reduction (up), or at the first column of the result (down)
template <Operands kind, bool down, int tiles, int C>
__device__ __forceinline__ void multiply(float (&acc)[tiles][C][4], const Element<kind>* tile, int ld, int next,
                                         const Element<kind>* m, int ldm, int n0, int reduction) {
  static_assert(wide(kind) || C % 2 == 0);
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll 1
  for (int k0 = 0; k0 < reduction; k0 += 16) {
    __syncwarp();  // keeps the compiler from loading far ahead, for want of registers
    if constexpr (wide(kind)) {
      Wide<kind> a[tiles];
#pragma unroll
      for (int i = 0; i < tiles; ++i) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const auto* const from = tile + i * next + g * ld + k0 + 8 * step + 2 * t;
          const float2 upper = *reinterpret_cast<const float2*>(from);
          const float2 lower = *reinterpret_cast<const float2*>(from + 8 * ld);
          split<kind>(upper.x, a[i].high[step][0], a[i].low[step][0]);
          split<kind>(lower.x, a[i].high[step][1], a[i].low[step][1]);
          split<kind>(upper.y, a[i].high[step][2], a[i].low[step][2]);
          split<kind>(lower.y, a[i].high[step][3], a[i].low[step][3]);
        }
      }
#pragma unroll
      for (int j = 0; j < C; ++j) {
        uint32_t high[2][2], low[2][2];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const int k = k0 + 8 * step;
          float2 pair;
          if constexpr (down) {
            const int column = n0 + 8 * j + g;
            pair.x = m[(k + ((2 * t) ^ (t >> 1))) * ldm + column];
            pair.y = m[(k + ((2 * t + 1) ^ (t >> 1))) * ldm + column];
          } else {
            pair = *reinterpret_cast<const float2*>(m + (n0 + 8 * j + place(g)) * ldm + k + 2 * t);
          }
          split<kind>(pair.x, high[step][0], low[step][0]);
          split<kind>(pair.y, high[step][1], low[step][1]);
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
        uint32_t b[4];
        if constexpr (down) {
          ptx::ldmatrix_x4_trans(b, m + (k0 + (lane & 15)) * ldm + n0 + 8 * j + 8 * (lane >> 4));
        } else {
          ptx::ldmatrix_x4(b, m + (n0 + 8 * j + (lane & 7) + 8 * (lane >> 4)) * ldm + k0 + 8 * ((lane >> 3) & 1));
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

// Four elements of a row from `column`, zeros from column `width` on.
__device__ __forceinline__ float4 load_four(const Array& m, int64_t row, int column, int width) {
  float four[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const int64_t at = row * m.stride + column;
  const auto* const bytes = static_cast<const unsigned char*>(m.data);
  if (m.type == DType::float32) {
    const auto* const from = reinterpret_cast<const float*>(bytes) + at;
    if (column + 4 <= width && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      load<4>(four, from);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i < width) four[i] = from[i];
      }
    }
  } else {
    const bool brain = m.type == DType::bfloat16;
    const auto* const from = reinterpret_cast<const uint16_t*>(bytes) + at;
    uint32_t bits[2] = {0, 0};
    if (column + 4 <= width && reinterpret_cast<uintptr_t>(from) % 8 == 0) {
      const uint2 both = *reinterpret_cast<const uint2*>(from);
      bits[0] = both.x, bits[1] = both.y;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i < width) bits[i / 2] |= uint32_t(from[i]) << (16 * (i % 2));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 pair = brain ? ptx::unpack_bf16(bits[i]) : ptx::unpack_fp16(bits[i]);
      four[2 * i] = pair.x, four[2 * i + 1] = pair.y;
    }
  }
  return make_float4(four[0], four[1], four[2], four[3]);
}

// The first elements of `four` to elements column .. width - 1 of a contiguous row.
__device__ __forceinline__ void store_four(void* data, DType type, int64_t row, int column, int width, float4 value) {
  const float four[4] = {value.x, value.y, value.z, value.w};
  const int64_t at = row * width + column;
  if (type == DType::float32 && width % 4 == 0) {  // torch aligns what it allocates
    store<4>(static_cast<float*>(data) + at, four);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i < width) store_any(data, type, at + i, four[i]);
    }
  }
}

__device__ __forceinline__ float load_one(const Array& m, int64_t row, int column = 0) {
  return load_any<float>(m.data, m.type, row * m.stride + column);
}

// layers: K of the training terms, known at compile time because the sums dM_k live in registers; 0: the map.
template <Operands kind, int n, int d, int layers>
__global__ void __launch_bounds__(block_threads(kind, n, layers), 1)
    tile_kernel(const __grid_constant__ FusedCall call) {
  using E = Element<kind>;
  constexpr bool training = layers > 0;
  constexpr int CG = column_groups(kind, n, layers), RG = row_groups(kind, n, layers),
                threads = block_threads(kind, n, layers);
  constexpr int C = n / (8 * CG), R = 16 * RG;  // n-tiles of a warp; half of the stacked rows
  constexpr int rows_per_tile = training ? R : 2 * R;
  constexpr int out_pairs = (d / 16 + CG - 1) / CG;  // of n-tiles of T or grad_x, for a warp
  constexpr int out_tiles = training ? 1 : 2;
  constexpr int ldx = leading(d), ldh = leading(n), ldm = leading(d + n);
  // dM_k, n x (d + n), is dealt over WM x WN warps: MT m-tiles of units, every WN-th pair of n-tiles of columns
  constexpr int WM = n / 16 < 4 ? n / 16 : 4, WN = RG * CG / WM, MT = n / (16 * WM);
  constexpr int first_pairs = (d / 16 + WN - 1) / WN, pairs = ((d + n) / 16 + WN - 1) / WN;
  constexpr int dm_count = training ? 2 * MT * (first_pairs + (layers - 1) * pairs) : 1;

  const int K = training ? layers : call.layers;
  const Layout at = layout(kind, n, d, K, training);
  unsigned char* const shared = ptx::dynamic_shared();
  E* const X = reinterpret_cast<E*>(shared + at.x);
  E* const tiles = reinterpret_cast<E*>(shared + at.tiles);
  E* const M = reinterpret_cast<E*>(shared + at.weights);
  float4* const stash = reinterpret_cast<float4*>(shared + at.stash);
  float* const bias = reinterpret_cast<float*>(shared + at.floats);
  float* const w = bias + K * n;
  float* const a_out = w + n;
  float* const p_out = a_out + d;             // (2R) products with A_out; b_out added to those of x
  float* const d_out = p_out + 2 * R;         // (2R) D'_out, D_out; map: D_out
  float* const row_u = d_out + 2 * R;         // (2R) u; map: |x|^2
  float* const red = row_u + 2 * R;           // (CG, 2R)
  float* const constants = red + CG * 2 * R;  // b_out, L: registers are scarcer

  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int rg = warp / CG, cg = warp % CG;
  const int n0 = cg * (n / CG);  // this warp's first column

  const auto weights_of = [&](int k) { return M + (k == 0 ? 0 : n * (ldx + (k - 1) * ldm)); };  // layer k from 0
  // h_k, and D_k: in the map they share two tiles
  const auto h_tile = [&](int k) { return tiles + (training ? k : (k & 1)) * 2 * R * ldh; };
  const auto d_tile = [&](int k) { return tiles + (training ? layers - 1 : (k & 1)) * 2 * R * ldh; };

  // The weights, once; eight lanes a row.
  for (int k = 0; k < K; ++k) {
    const int units = call.widths[k], below = k == 0 ? 0 : call.widths[k - 1];
    const int columns = k == 0 ? d : d + n, ld = k == 0 ? ldx : ldm;
    E* const m = weights_of(k);
#pragma unroll 1
    for (int unit = tid / 8; unit < n; unit += threads / 8) {
      E* const to = m + (wide(kind) ? place(unit) : unit) * ld;
#pragma unroll 1
      for (int c = 4 * (tid % 8); c < columns; c += 32) {
        float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (unit < units && c < d) four = load_four(call.skip_weight, call.first[k] + unit, c, call.width);
        if (unit < units && c >= d) four = load_four(call.weights[k - 1], unit, c - d, below);
        store_pair<kind>(to + c, four.x, four.y);
        store_pair<kind>(to + c + 2, four.z, four.w);
      }
    }
    for (int i = tid; i < n; i += threads) {
      bias[k * n + i] = i < units ? load_any<float>(call.bias.data, call.bias.type, call.first[k] + i) : 0.0f;
    }
  }
  for (int i = tid; i < n; i += threads) {
    w[i] = i < call.widths[K - 1] ? load_one(call.weights[K - 1], 0, i) : 0.0f;
  }
  for (int i = tid; i < d; i += threads) a_out[i] = i < call.width ? load_one(call.skip_weight, call.units, i) : 0.0f;
  if (tid == 0) {
    constants[0] = load_any<float>(call.bias.data, call.bias.type, call.units);
    constants[1] = load_one(call.constant, 0);
  }

  // Sums over all tiles of this block.
  float dm[dm_count][4];
  float db[training ? layers : 1], dw = 0.0f, da_out = 0.0f, db_out = 0.0f, dl = 0.0f;
  if constexpr (training) {
#pragma unroll
    for (int i = 0; i < dm_count; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dm[i][e] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < layers; ++k) db[k] = 0.0f;
  }
  __syncthreads();

#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < call.tiles; tile += gridDim.x) {
    const int64_t first_row = tile * rows_per_tile;

    // Load x, v, u: eight lanes a row.
#pragma unroll 1
    for (int r = tid / 8; r < rows_per_tile; r += threads / 8) {
      const int64_t row = first_row + r;
      const bool inside = row < call.rows;
      const float u = inside && call.u.data ? load_one(call.u, row) : 0.0f;
      float x_out = 0.0f, v_out = 0.0f, square = 0.0f, inner = 0.0f;
#pragma unroll 1
      for (int c = 4 * (tid % 8); c < d; c += 32) {
        const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float4 x = inside ? load_four(call.x, row, c, call.input) : zero;
        const float4 a = *reinterpret_cast<const float4*>(a_out + c);
        store_pair<kind>(X + r * ldx + c, x.x, x.y);
        store_pair<kind>(X + r * ldx + c + 2, x.z, x.w);
        x_out += x.x * a.x + x.y * a.y + x.z * a.z + x.w * a.w;
        square += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
        if constexpr (training) {
          const float4 v = inside && call.v.data ? load_four(call.v, row, c, call.width) : zero;
          store_pair<kind>(X + (R + r) * ldx + c, v.x, v.y);
          store_pair<kind>(X + (R + r) * ldx + c + 2, v.z, v.w);
          v_out += v.x * a.x + v.y * a.y + v.z * a.z + v.w * a.w;
          inner += v.x * x.x + v.y * x.y + v.z * x.z + v.w * x.w;
        }
      }
      x_out = warp_sum<7>(x_out);
      square = warp_sum<7>(square);
      if constexpr (training) {
        v_out = warp_sum<7>(v_out);
        inner = warp_sum<7>(inner);
      }
      if (tid % 8 == 0) {
        p_out[r] = x_out + constants[0];
        row_u[r] = training ? u : square;
        if constexpr (training) {
          p_out[R + r] = v_out;
          dl += inner + 0.5f * u * square;
        }
      }
    }
    __syncthreads();

    // Up. acc: a_k and a'_k (map: a_k of two groups of rows); after layer K s'_K and p_K (map: s'_K).
    float acc[2][C][4];
    float o[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};  // by tile, rows g and g + 8
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < C; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
        }
      }
      const E* const m = weights_of(k);
      multiply<kind, false>(acc, X + 16 * rg * ldx, ldx, R * ldx, m, k == 0 ? ldx : ldm, n0, d);
      if (k > 0) multiply<kind, false>(acc, h_tile(k - 1) + 16 * rg * ldh, ldh, R * ldh, m + d, ldm, n0, n);
      const bool last = k + 1 == K;
      // h_K waits in the tile of D, where the same lane picks it up for grad_w
      E* const h_to = (last ? d_tile(k) : h_tile(k)) + (16 * rg + g) * ldh + n0 + 2 * t;
#pragma unroll
      for (int j = 0; j < C; ++j) {
        const float2 b = *reinterpret_cast<const float2*>(bias + k * n + n0 + 8 * j + 2 * t);
        const float2 w_j = *reinterpret_cast<const float2*>(w + n0 + 8 * j + 2 * t);
        float h[2][4];
#pragma unroll
        for (int i = 0; i < (training ? 1 : 2); ++i) {
          const float a[4] = {acc[i][j][0] + b.x, acc[i][j][1] + b.y, acc[i][j][2] + b.x, acc[i][j][3] + b.y};
          Derivatives<float> s[4];
          evaluate<4>(call.kind[k], call.parameter[k], a, s);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            h[i][e] = s[e].value;
            acc[i][j][e] = s[e].first;
            if constexpr (training) {
              const float a_tangent = acc[1][j][e];
              h[1][e] = s[e].first * a_tangent;
              acc[1][j][e] = s[e].second * a_tangent;
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (training || !last) {
            E* const to = h_to + i * R * ldh + 8 * j;
            store_pair<kind>(to, h[i][0], h[i][1]);
            store_pair<kind>(to + 8 * ldh, h[i][2], h[i][3]);
          }
          if (last) {
            o[i][0] += h[i][0] * w_j.x + h[i][1] * w_j.y;
            o[i][1] += h[i][2] * w_j.x + h[i][3] * w_j.y;
          } else {
            stash[((k * C + j) * 2 + i) * threads + tid] =
                make_float4(acc[i][j][0], acc[i][j][1], acc[i][j][2], acc[i][j][3]);
          }
        }
      }
      if (!last) __syncthreads();
    }

    // Turn around: o, D_out.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = warp_sum<3>(o[i][half]);
        if (t == 0) red[cg * 2 * R + i * R + 16 * rg + 8 * half + g] = sum;
      }
    }
    __syncthreads();
    float scale[2][2];  // D'_out and D_out of rows g and g + 8 (map: D_out of both groups)
    const auto total = [&](int row) {
      float sum = p_out[row];
#pragma unroll
      for (int c = 0; c < CG; ++c) sum += red[c * 2 * R + row];
      return sum;
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * rg + 8 * half + g;
      if constexpr (training) {
        const float value[1] = {total(row)}, tangent = total(R + row), u = row_u[row];
        Derivatives<float> s[1];
        evaluate<1>(call.kind[K], call.parameter[K], value, s);
        scale[0][half] = s[0].second * tangent + u * s[0].first;
        scale[1][half] = s[0].first;
        if (cg == 0 && t == 0) {
          d_out[row] = scale[0][half];
          d_out[R + row] = scale[1][half];
          db_out += scale[0][half];
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float value[1] = {total(i * R + row)};
          Derivatives<float> s[1];
          evaluate<1>(call.kind[K], call.parameter[K], value, s);
          scale[i][half] = s[0].first;
          if (cg == 0 && t == 0) d_out[i * R + row] = s[0].first;
          const int64_t to = first_row + i * R + row;
          if (call.potential && cg == 0 && t == 0 && to < call.rows) {
            store_any(call.potential, call.output, to, s[0].value + 0.5f * constants[1] * row_u[i * R + row]);
          }
        }
      }
    }
    if (!training && !call.map) {  // the potential alone
      __syncthreads();
      continue;
    }

    // Down. D_k goes to its tile, D' above D.
    float out[out_tiles][2 * out_pairs][4];
#pragma unroll
    for (int i = 0; i < out_tiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * out_pairs; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[i][j][e] = 0.0f;
      }
    }
    float sums[2 * C];                 // over this warp's rows, by column
    const auto store_d = [&](int k) {  // from acc
      E* const to = d_tile(k) + (16 * rg + g) * ldh + n0 + 2 * t;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < C; ++j) {
          store_pair<kind>(to + i * R * ldh + 8 * j, acc[i][j][0], acc[i][j][1]);
          store_pair<kind>(to + i * R * ldh + 8 * ldh + 8 * j, acc[i][j][2], acc[i][j][3]);
        }
      }
    };
    const auto sum_bias = [&](int k) {  // grad_b += sum of D'
      if constexpr (training) {
#pragma unroll
        for (int j = 0; j < C; ++j) {
          sums[2 * j] = acc[0][j][0] + acc[0][j][2];
          sums[2 * j + 1] = acc[0][j][1] + acc[0][j][3];
        }
        const float sum = fold(sums);
#pragma unroll
        for (int i = 0; i < layers; ++i) {
          if (i == k) db[i] += sum;
        }
      }
    };
    if constexpr (training) {  // grad_w = D'_out^T h_K + D_out^T h'_K
      const E* const from = d_tile(K - 1) + (16 * rg + g) * ldh + n0 + 2 * t;
#pragma unroll
      for (int j = 0; j < C; ++j) {
        const float2 upper = load_pair<kind>(from + 8 * j), lower = load_pair<kind>(from + 8 * ldh + 8 * j);
        const float2 upper_tangent = load_pair<kind>(from + R * ldh + 8 * j);
        const float2 lower_tangent = load_pair<kind>(from + (R + 8) * ldh + 8 * j);
        sums[2 * j] = scale[0][0] * upper.x + scale[1][0] * upper_tangent.x +
                      (scale[0][1] * lower.x + scale[1][1] * lower_tangent.x);
        sums[2 * j + 1] = scale[0][0] * upper.y + scale[1][0] * upper_tangent.y +
                          (scale[0][1] * lower.y + scale[1][1] * lower_tangent.y);
      }
      dw += fold(sums);
    }
#pragma unroll
    for (int j = 0; j < C; ++j) {
      const float2 w_j = *reinterpret_cast<const float2*>(w + n0 + 8 * j + 2 * t);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float weight = e % 2 ? w_j.y : w_j.x;
        if constexpr (training) {
          const float first = acc[0][j][e], p = acc[1][j][e];
          acc[0][j][e] = weight * (scale[0][e / 2] * first + scale[1][e / 2] * p);
          acc[1][j][e] = weight * (scale[1][e / 2] * first);
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) acc[i][j][e] *= weight * scale[i][e / 2];
        }
      }
    }
    store_d(K - 1);
    sum_bias(K - 1);
    __syncthreads();
    if constexpr (training) {  // grad_A_out = D'_out^T x + D_out^T v
      constexpr int parts = threads / d;
      if (tid < parts * d) {
        for (int r = tid / d; r < 2 * R; r += parts) {
          da_out += d_out[r] * load_element<kind>(X + r * ldx + tid % d);
        }
      }
    }
#pragma unroll 1
    for (int k = K - 1; k >= 0; --k) {
      const E* const m = weights_of(k);
      const int ld = k == 0 ? ldx : ldm;
      const E* const d_k = d_tile(k) + 16 * rg * ldh;
      if constexpr (training) {  // dM_k += D'^T [x | h] + D^T [v | h']
        const int u0 = 16 * MT * (warp % WM), wn = warp / WM;
#pragma unroll 1
        for (int r = 0; r < 2 * R; r += 16) {
          __syncwarp();
          Units<kind, MT> units;
          units.load(d_tile(k) + r * ldh, ldh, u0);
#pragma unroll
          for (int kk = 0; kk < layers; ++kk) {
            if (kk != k) continue;
            constexpr int nothing = 0;
            const int base = kk == 0 ? nothing : 2 * MT * (first_pairs + (kk - 1) * pairs);
#pragma unroll
            for (int i = 0; i < (kk == 0 ? first_pairs : pairs); ++i) {
              const int column = 16 * (wn + i * WN);
              float (*const to)[4] = dm + base + 2 * MT * i;
              if (column < d) {
                units.multiply(to, X + r * ldx, ldx, column);
              } else if (kk > 0 && column < d + n) {
                units.multiply(to, h_tile(kk - 1) + r * ldh, ldh, column - d);
              }
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < out_pairs; ++i) {  // out += D_k A_k
        const int pair = cg + i * CG;
        if (pair * 16 >= d) continue;
        float part[out_tiles][2][4];
#pragma unroll
        for (int q = 0; q < out_tiles; ++q) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) part[q][j][e] = out[q][2 * i + j][e];
          }
        }
        multiply<kind, true>(part, d_k, ldh, R * ldh, m, ld, 16 * pair, n);
#pragma unroll
        for (int q = 0; q < out_tiles; ++q) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) out[q][2 * i + j][e] = part[q][j][e];
          }
        }
      }
      if (k == 0) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < C; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
        }
      }
      multiply<kind, true>(acc, d_k, ldh, R * ldh, m + d, ld, n0, n);  // (g', g) = (D', D) W_k
#pragma unroll
      for (int j = 0; j < C; ++j) {
        const float4 s0 = stash[(((k - 1) * C + j) * 2) * threads + tid];
        const float4 s1 = stash[(((k - 1) * C + j) * 2 + 1) * threads + tid];
        const float first[4] = {s0.x, s0.y, s0.z, s0.w}, p[4] = {s1.x, s1.y, s1.z, s1.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (training) {
            acc[0][j][e] = acc[0][j][e] * first[e] + acc[1][j][e] * p[e];
            acc[1][j][e] *= first[e];
          } else {
            acc[0][j][e] *= first[e];
            acc[1][j][e] *= p[e];
          }
        }
      }
      if constexpr (training) __syncthreads();  // all have read the tile of D
      store_d(k - 1);
      sum_bias(k - 1);
      __syncthreads();
    }

    // map: T = out + D_out A_out + L x. training: grad_x = out + D'_out A_out + L (v + u x)
    // By way of shared memory, so that rows are written in one piece.
    static_assert(training || 4 * 2 * R * ldx <= int(sizeof(E)) * 2 * R * (ldx + 2 * ldh));
    void* const result = training ? call.grad_x : call.map;
    if (result) {
      float* const staged = reinterpret_cast<float*>(shared + at.x);  // (rows_per_tile, ldx)
      __syncthreads();                                                // all are done with x and D
#pragma unroll
      for (int q = 0; q < out_tiles; ++q) {
#pragma unroll
        for (int j = 0; j < 2 * out_pairs; ++j) {
          if ((cg + j / 2 * CG) * 16 >= d) continue;
          float* const to = staged + (q * R + 16 * rg + g) * ldx + 16 * (cg + j / 2 * CG) + 8 * (j % 2) + 2 * t;
          *reinterpret_cast<float2*>(to) = make_float2(out[q][j][0], out[q][j][1]);
          *reinterpret_cast<float2*>(to + 8 * ldx) = make_float2(out[q][j][2], out[q][j][3]);
        }
      }
      __syncthreads();
      const int columns = training ? call.input : call.width;
#pragma unroll 1
      for (int r = tid / 8; r < rows_per_tile; r += threads / 8) {
        const int64_t row = first_row + r;
        if (row >= call.rows) break;
        const float factor = training ? row_u[r] : 1.0f, slope = d_out[r], L = constants[1];
#pragma unroll 1
        for (int c = 4 * (tid % 8); c < columns; c += 32) {
          const float4 a = *reinterpret_cast<const float4*>(a_out + c);
          float4 value = *reinterpret_cast<const float4*>(staged + r * ldx + c);
          const float4 x = load_four(call.x, row, c, call.input);
          float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          if (training && call.v.data) v = load_four(call.v, row, c, columns);
          value.x += slope * a.x + L * (v.x + factor * x.x);
          value.y += slope * a.y + L * (v.y + factor * x.y);
          value.z += slope * a.z + L * (v.z + factor * x.z);
          value.w += slope * a.w + L * (v.w + factor * x.w);
          store_four(result, call.output, row, c, columns, value);
        }
      }
    }
    __syncthreads();  // all are done with the tile
  }

  if constexpr (training) {
    // This block's sums, [dA | db | dW .. | dL]. Sums of several warps or lanes meet in shared memory.
    float* const partial = call.partial + blockIdx.x * partial_size(call);
    float* const columns = reinterpret_cast<float*>(tiles);  // (RG, K + 1, n): db_k, dw
    float* const outs = columns + RG * (layers + 1) * n;     // (parts, d): da_out
    float* const scalars = outs + threads;                   // (threads / 32, 2): db_out, dl
    constexpr int parts = threads / d;
    static_assert(4 * (RG * (layers + 1) * n + threads + threads / 16) <= 2 * R * ldh * int(sizeof(E)) * layers);
    const int index = g * C / 4, column = n0 + 8 * (index / 2) + 2 * t + index % 2;  // see fold()
    if (g % (4 / C) == 0) {
#pragma unroll
      for (int k = 0; k < layers; ++k) columns[(rg * (layers + 1) + k) * n + column] = db[k];
      columns[(rg * (layers + 1) + layers) * n + column] = dw;
    }
    if (tid < parts * d) outs[tid] = da_out;
    db_out = warp_sum(db_out);
    dl = warp_sum(dl);
    if (lane == 0) scalars[2 * warp] = db_out, scalars[2 * warp + 1] = dl;
    __syncthreads();
    for (int i = tid; i < (layers + 1) * n; i += threads) {
      const int k = i / n, unit = i % n;
      float sum = columns[i];
      for (int other = 1; other < RG; ++other) sum += columns[other * (layers + 1) * n + i];
      if (k < layers) {
        if (unit < call.widths[k]) partial[bias_gradient(call) + call.first[k] + unit] = sum;
      } else if (unit < call.widths[layers - 1]) {
        partial[weight_gradient(call, layers - 1) + unit] = sum;
      }
    }
    for (int i = tid; i < call.width; i += threads) {
      float sum = outs[i];
      for (int part = 1; part < parts; ++part) sum += outs[part * d + i];
      partial[int64_t(call.units) * call.width + i] = sum;
    }
    if (tid < 2) {
      float sum = scalars[tid];
      for (int other = 1; other < threads / 32; ++other) sum += scalars[2 * other + tid];
      partial[tid == 0 ? bias_gradient(call) + call.units : constant_gradient(call)] = sum;
    }
#pragma unroll
    for (int k = 0; k < layers; ++k) {
      const int units = call.widths[k], below = k == 0 ? 0 : call.widths[k > 0 ? k - 1 : 0];
      float* const skip = partial + int64_t(call.first[k]) * call.width;
      float* const hidden = partial + (k == 0 ? 0 : weight_gradient(call, k - 1));
#pragma unroll
      for (int i = 0; i < (k == 0 ? first_pairs : pairs); ++i) {
#pragma unroll
        for (int q = 0; q < 2 * MT; ++q) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int unit = 16 * (MT * (warp % WM) + q / 2) + 8 * (e / 2) + g;
            const int c = 16 * (warp / WM + i * WN) + 8 * (q % 2) + 2 * t + e % 2;
            const float value = dm[(k == 0 ? 0 : 2 * MT * (first_pairs + (k - 1) * pairs)) + 2 * MT * i + q][e];
            if (unit >= units) continue;
            if (c < call.width) skip[int64_t(unit) * call.width + c] = value;
            if (c >= d && c - d < below) hidden[int64_t(unit) * below + c - d] = value;
          }
        }
      }
    }
  }
}

}  // namespace ilvae::cuda
