// A tile of rows on its way up and down through the network: what the kernels of the fused route have in common, which
// is everything but the products. fused.cuh and streamed.cuh put the two together.
//
// In accumulators C n-tiles of 8 columns of two 16-row tiles belong to a warp, tile 0 for a, s', D' and tile 1 for a',
// p, D; in the map both are primal, of two groups of rows.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/fragments.cuh"
#include "cuda/fused.h"
#include "cuda/rows.cuh"

namespace ilvae::cuda {

template <int tiles, int C>
__device__ __forceinline__ void clear(float (&acc)[tiles][C][4]) {
#pragma unroll
  for (int i = 0; i < tiles; ++i) {
#pragma unroll
    for (int j = 0; j < C; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
    }
  }
}

// What a lane keeps of four pre-activations until the sweep comes down again: float4, or, packed, four 16-bit operands.
template <Operands kind, bool packed>
using Stashed = std::conditional_t<packed, uint2, float4>;
template <Operands kind, bool packed>
__device__ __forceinline__ Stashed<kind, packed> stashed(const float (&value)[4]) {
  if constexpr (!packed) {
    return make_float4(value[0], value[1], value[2], value[3]);
  } else if constexpr (kind == Operands::bfloat16) {
    return make_uint2(ptx::pack_bf16(value[0], value[1]), ptx::pack_bf16(value[2], value[3]));
  } else {
    return make_uint2(ptx::pack_fp16(value[0], value[1]), ptx::pack_fp16(value[2], value[3]));
  }
}
template <Operands kind, bool packed>
__device__ __forceinline__ float4 unstashed(const Stashed<kind, packed>& value) {
  if constexpr (!packed) {
    return value;
  } else {
    constexpr bool brain = kind == Operands::bfloat16;
    const float2 low = brain ? ptx::unpack_bf16(value.x) : ptx::unpack_fp16(value.x);
    const float2 high = brain ? ptx::unpack_bf16(value.y) : ptx::unpack_fp16(value.y);
    return make_float4(low.x, low.y, high.x, high.y);
  }
}

// most_layers: of the training terms at most, 0 for the map. packed: how s' and p are stashed.
template <Operands kind, int n, int d, int RG, int CG, int most_layers, bool packed>
struct Tile {
  using E = Element<kind>;
  static constexpr bool training = most_layers > 0;
  static constexpr int threads = 32 * RG * CG;
  static constexpr int C = n / (8 * CG), R = 16 * RG;  // n-tiles of a warp; half of the stacked rows
  static constexpr int rows_per_tile = training ? R : 2 * R;
  static constexpr int ldx = leading(d), ldh = leading(n);
  // T or grad_x: n-tiles in groups, every CG-th of them a warp's
  static constexpr int group = group_tiles<kind>, out_step = group_columns<kind> * CG;
  static constexpr int out_groups = (d / group_columns<kind> + CG - 1) / CG, OC = group * out_groups;
  static constexpr int out_tiles = training ? 1 : 2;
  static constexpr int folds = C > 4 ? C / 4 : 1, folded = 2 * C / folds;  // sums by column: so many at a time
  static constexpr int parts = threads < d ? 1 : threads / d, a_out_columns = threads < d ? d / threads : 1;

  // Sums over all tiles of a block, a share of them in each thread.
  struct Sums {
    float db[training ? most_layers : 1][folds] = {}, dw[folds] = {};  // see column_of_sum
    float da_out[a_out_columns] = {};                                  // columns tid % d and every threads-th
    float db_out = 0.0f, dl = 0.0f;
  };

  const FusedCall& call;
  const int K;
  E* const X;                          // (2R, ldx)
  Stashed<kind, packed>* const stash;  // (K-1, C, 2, threads)
  float* const bias;                   // and what follows: see Layout::floats
  float *const w, *const a_out, *const p_out, *const d_out, *const row_u, *const red, *const constants;
  const int tid, warp, lane, g, t, rg, cg;
  const int n0;  // this warp's first column

  __device__ __forceinline__ Tile(const FusedCall& call, int K, const Layout& at)
      : call(call),
        K(K),
        X(reinterpret_cast<E*>(ptx::dynamic_shared() + at.x)),
        stash(reinterpret_cast<Stashed<kind, packed>*>(ptx::dynamic_shared() + at.stash)),
        bias(reinterpret_cast<float*>(ptx::dynamic_shared() + at.floats)),
        w(bias + K * n),
        a_out(w + n),
        p_out(a_out + d),
        d_out(p_out + 2 * R),
        row_u(d_out + 2 * R),
        red(row_u + 2 * R),
        constants(red + CG * 2 * R),
        tid(threadIdx.x),
        warp(tid >> 5),
        lane(tid & 31),
        g(lane >> 2),
        t(lane & 3),
        rg(warp / CG),
        cg(warp % CG),
        n0(cg * (n / CG)) {}

  // Where this lane's accumulators belong in a tile of h or D.
  __device__ __forceinline__ E* mine(E* tile) const { return tile + (16 * rg + g) * ldh + n0 + 2 * t; }
  // The first column of T or grad_x that is this warp's.
  __device__ __forceinline__ int first_out() const { return group_columns<kind> * cg; }

  // Biases, w, A_out, b_out and L, in float32 for the life of the block.
  __device__ __forceinline__ void load_constants() const {
    for (int k = 0; k < K; ++k) {
      for (int i = tid; i < n; i += threads) {
        bias[k * n + i] =
            i < call.widths[k] ? load_any<float>(call.bias.data, call.bias.type, call.first[k] + i) : 0.0f;
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
  }

  // x, v, u from `first_row` on, zeros beyond the batch: eight lanes a row. And what of them meets no tensor core.
  __device__ __forceinline__ void load_rows(int64_t first_row, Sums& sums) const {
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
          sums.dl += inner + 0.5f * u * square;
        }
      }
    }
  }

  // From products to activations: a_k and a'_k (map: a_k twice) in `acc` become s'_k and p_k (map: s'_k), stashed but
  // for the last layer. h_k and h'_k go to the tile `h_to`, or, the last layer's in the map, nowhere; `o` collects h_K
  // w.
  __device__ __forceinline__ void activate(int k, float (&acc)[2][C][4], E* h_to, float (&o)[2][2]) const {
    const bool last = k + 1 == K;
    E* const h_mine = mine(h_to);
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
          E* const to = h_mine + i * R * ldh + 8 * j;
          store_pair<kind>(to, h[i][0], h[i][1]);
          store_pair<kind>(to + 8 * ldh, h[i][2], h[i][3]);
        }
        if (last) {
          o[i][0] += h[i][0] * w_j.x + h[i][1] * w_j.y;
          o[i][1] += h[i][2] * w_j.x + h[i][3] * w_j.y;
        } else {
          stash[((k * C + j) * 2 + i) * threads + tid] = stashed<kind, packed>(acc[i][j]);
        }
      }
    }
  }

  // The output unit: D'_out and D_out of rows g and g + 8 (map: D_out of both groups), to `scale` and d_out; G.
  __device__ __forceinline__ void turn(int64_t first_row, const float (&o)[2][2], float (&scale)[2][2],
                                       Sums& sums) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = warp_sum<3>(o[i][half]);
        if (t == 0) red[cg * 2 * R + i * R + 16 * rg + 8 * half + g] = sum;
      }
    }
    __syncthreads();
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
          sums.db_out += scale[0][half];
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
  }

  // acc from s'_K and p_K to D'_K and D_K (map: D_K), which go to the tile `d_to`, where this lane left h_K and h'_K:
  // grad_w = D'_out^T h_K + D_out^T h'_K.
  __device__ __forceinline__ void top(float (&acc)[2][C][4], const float (&scale)[2][2], E* d_to, Sums& sums) const {
    if constexpr (training) {
      const E* const from = mine(d_to);
#pragma unroll
      for (int f = 0; f < folds; ++f) {
        float by_column[folded];
#pragma unroll
        for (int i = 0; i < folded / 2; ++i) {
          const int j = f * folded / 2 + i;
          const float2 upper = load_pair<kind>(from + 8 * j), lower = load_pair<kind>(from + 8 * ldh + 8 * j);
          const float2 upper_tangent = load_pair<kind>(from + R * ldh + 8 * j);
          const float2 lower_tangent = load_pair<kind>(from + (R + 8) * ldh + 8 * j);
          by_column[2 * i] = scale[0][0] * upper.x + scale[1][0] * upper_tangent.x +
                             (scale[0][1] * lower.x + scale[1][1] * lower_tangent.x);
          by_column[2 * i + 1] = scale[0][0] * upper.y + scale[1][0] * upper_tangent.y +
                                 (scale[0][1] * lower.y + scale[1][1] * lower_tangent.y);
        }
        sums.dw[f] += fold(by_column);
      }
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
    leave(K - 1, acc, d_to, sums);
  }

  // acc from g'_k and g_k (map: g_k) to D'_k and D_k, which go to the tile `d_to`.
  __device__ __forceinline__ void descend(int k, float (&acc)[2][C][4], E* d_to, Sums& sums) const {
#pragma unroll
    for (int j = 0; j < C; ++j) {
      const float4 s0 = unstashed<kind, packed>(stash[((k * C + j) * 2) * threads + tid]);
      const float4 s1 = unstashed<kind, packed>(stash[((k * C + j) * 2 + 1) * threads + tid]);
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
    leave(k, acc, d_to, sums);
  }

  // D'_k above D_k to the tile `d_to`; grad_b = sum of D'.
  __device__ __forceinline__ void leave(int k, const float (&acc)[2][C][4], E* d_to, Sums& sums) const {
    E* const to = mine(d_to);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < C; ++j) {
        store_pair<kind>(to + i * R * ldh + 8 * j, acc[i][j][0], acc[i][j][1]);
        store_pair<kind>(to + i * R * ldh + 8 * ldh + 8 * j, acc[i][j][2], acc[i][j][3]);
      }
    }
    if constexpr (training) {
#pragma unroll
      for (int f = 0; f < folds; ++f) {
        float by_column[folded];
#pragma unroll
        for (int i = 0; i < folded / 2; ++i) {
          const int j = f * folded / 2 + i;
          by_column[2 * i] = acc[0][j][0] + acc[0][j][2];
          by_column[2 * i + 1] = acc[0][j][1] + acc[0][j][3];
        }
        const float sum = fold(by_column);
#pragma unroll
        for (int i = 0; i < most_layers; ++i) {
          if (i == k) sums.db[i][f] += sum;
        }
      }
    }
  }

  // grad_A_out = D'_out^T x + D_out^T v
  __device__ __forceinline__ void sum_output_row(Sums& sums) const {
    if (tid >= parts * d) return;
#pragma unroll
    for (int i = 0; i < a_out_columns; ++i) {
      for (int r = tid / d; r < 2 * R; r += parts) {
        sums.da_out[i] += d_out[r] * load_element<kind>(X + r * ldx + tid % d + i * threads);
      }
    }
  }

  // map: T = out + D_out A_out + L x. training: grad_x = out + D'_out A_out + L (v + u x)
  // By way of shared memory from X on, so that rows are written in one piece: all are done with x and D.
  __device__ __forceinline__ void store_result(int64_t first_row, const float (&out)[out_tiles][OC][4]) const {
    void* const result = training ? call.grad_x : call.map;
    if (!result) return;
    float* const staged = reinterpret_cast<float*>(X);  // (rows_per_tile, ldx)
    __syncthreads();
#pragma unroll
    for (int q = 0; q < out_tiles; ++q) {
#pragma unroll
      for (int j = 0; j < OC; ++j) {
        const int column = first_out() + column_of_tile<kind, out_step>(j);
        if (column >= d) continue;
        float* const to = staged + (q * R + 16 * rg + g) * ldx + column + 2 * t;
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

  // The column of a layer of which `db` and `dw` hold the sum in place f: see fold(). Some lanes hold the same.
  __device__ __forceinline__ int column_of_sum(int f) const {
    const int index = f * folded + g * folded / 8;
    return n0 + 8 * (index / 2) + 2 * t + index % 2;
  }

  static constexpr int partial_floats = RG * (most_layers + 1) * n + threads * a_out_columns + threads / 16;

  // All but the sums dM_k to this block's row of partial sums; they meet in shared memory, `scratch`, partial_floats.
  __device__ __forceinline__ void store_sums(const Sums& sums_of_lane, float* partial, float* scratch) const {
    Sums sums = sums_of_lane;
    float* const columns = scratch;                            // (RG, most_layers + 1, n): db_k, dw
    float* const outs = columns + RG * (most_layers + 1) * n;  // (parts, d): da_out
    float* const scalars = outs + threads * a_out_columns;     // (threads / 32, 2): db_out, dl
    if (folded == 8 || g % (8 / folded) == 0) {
#pragma unroll
      for (int f = 0; f < folds; ++f) {
#pragma unroll
        for (int k = 0; k < most_layers; ++k)
          columns[(rg * (most_layers + 1) + k) * n + column_of_sum(f)] = sums.db[k][f];
        columns[(rg * (most_layers + 1) + most_layers) * n + column_of_sum(f)] = sums.dw[f];
      }
    }
    if (tid < parts * d) {
#pragma unroll
      for (int i = 0; i < a_out_columns; ++i) outs[tid + i * threads] = sums.da_out[i];
    }
    sums.db_out = warp_sum(sums.db_out);
    sums.dl = warp_sum(sums.dl);
    if (lane == 0) scalars[2 * warp] = sums.db_out, scalars[2 * warp + 1] = sums.dl;
    __syncthreads();
    for (int i = tid; i < (most_layers + 1) * n; i += threads) {
      const int k = i / n, unit = i % n;
      float sum = columns[i];
      for (int other = 1; other < RG; ++other) sum += columns[other * (most_layers + 1) * n + i];
      if (k < K) {
        if (unit < call.widths[k]) partial[bias_gradient(call) + call.first[k] + unit] = sum;
      } else if (k == most_layers && unit < call.widths[K - 1]) {
        partial[weight_gradient(call, K - 1) + unit] = sum;
      }
    }
    for (int i = tid; i < call.width; i += threads) {
      float sum = outs[i];
      for (int part = 1; part < parts; ++part) sum += outs[part * d + i];
      partial[output_gradient(call) + i] = sum;
    }
    if (tid < 2) {
      float sum = scalars[tid];
      for (int other = 1; other < threads / 32; ++other) sum += scalars[2 * other + tid];
      partial[tid == 0 ? bias_gradient(call) + call.units : constant_gradient(call)] = sum;
    }
  }
};

}  // namespace ilvae::cuda
