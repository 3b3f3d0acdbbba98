// The fused route with resident weights: they stay in shared memory while a block works through its tiles, and so do
// the sums dM_k of the training terms, in registers.
#pragma once

#include "cuda/tile.cuh"

namespace ilvae::cuda {

// layers: K of the training terms, known at compile time because the sums dM_k live in registers; 0: the map.
template <Operands kind, int n, int d, int layers>
__global__ void __launch_bounds__(block_threads(kind, n, layers), 1)
    tile_kernel(const __grid_constant__ FusedCall call) {
  constexpr int CG = column_groups(kind, n, layers), RG = row_groups(kind, n, layers);
  using T = Tile<kind, n, d, RG, CG, layers, /*packed=*/false>;
  using E = T::E;
  constexpr bool training = T::training;
  constexpr int threads = T::threads, C = T::C, R = T::R, ldx = T::ldx, ldh = T::ldh, ldm = leading(d + n);
  // dM_k, n x (d + n), is dealt over WM x WN warps: MT m-tiles of units, every WN-th pair of n-tiles of columns
  constexpr int WM = n / 16 < 4 ? n / 16 : 4, WN = RG * CG / WM, MT = n / (16 * WM);
  constexpr int first_pairs = (d / 16 + WN - 1) / WN, pairs = ((d + n) / 16 + WN - 1) / WN;
  constexpr int dm_count = training ? 2 * MT * (first_pairs + (layers - 1) * pairs) : 1;

  const int K = training ? layers : call.layers;
  const Layout at = layout(kind, n, d, K, training);
  E* const tiles = reinterpret_cast<E*>(ptx::dynamic_shared() + at.tiles);
  E* const M = reinterpret_cast<E*>(ptx::dynamic_shared() + at.weights);
  const T tile(call, K, at);
  const int tid = tile.tid, warp = tile.warp, rg = tile.rg, g = tile.g, t = tile.t, n0 = tile.n0;

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
  }
  tile.load_constants();

  typename T::Sums sums;
  float dm[dm_count][4];
  if constexpr (training) {
#pragma unroll
    for (int i = 0; i < dm_count; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dm[i][e] = 0.0f;
    }
  }
  __syncthreads();

#pragma unroll 1
  for (int64_t index = blockIdx.x; index < call.tiles; index += gridDim.x) {
    const int64_t first_row = index * T::rows_per_tile;
    tile.load_rows(first_row, sums);
    __syncthreads();

    // Up.
    float acc[2][C][4];
    float o[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};  // by tile, rows g and g + 8
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
      clear(acc);
      const E* const m = weights_of(k);
      multiply<kind, false>(acc, tile.X + 16 * rg * ldx, ldx, R * ldx, m, k == 0 ? ldx : ldm, n0, d);
      if (k > 0) multiply<kind, false>(acc, h_tile(k - 1) + 16 * rg * ldh, ldh, R * ldh, m + d, ldm, n0, n);
      const bool last = k + 1 == K;
      tile.activate(k, acc, last ? d_tile(k) : h_tile(k), o);
      if (!last) __syncthreads();
    }
    float scale[2][2];
    tile.turn(first_row, o, scale, sums);
    if (!training && !call.map) {  // the potential alone
      __syncthreads();
      continue;
    }

    // Down. D_k goes to its tile, D' above D.
    float out[T::out_tiles][T::OC][4];
    clear(out);
    tile.top(acc, scale, d_tile(K - 1), sums);
    __syncthreads();
    if constexpr (training) tile.sum_output_row(sums);
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
                units.multiply(to, tile.X + r * ldx, ldx, column);
              } else if (kk > 0 && column < d + n) {
                units.multiply(to, h_tile(kk - 1) + r * ldh, ldh, column - d);
              }
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < T::out_groups; ++i) {  // out += D_k A_k
        const int column = tile.first_out() + i * T::out_step;
        if (column >= d) continue;
        float part[T::out_tiles][T::group][4];
#pragma unroll
        for (int q = 0; q < T::out_tiles; ++q) {
#pragma unroll
          for (int j = 0; j < T::group; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) part[q][j][e] = out[q][T::group * i + j][e];
          }
        }
        multiply<kind, true>(part, d_k, ldh, R * ldh, m, ld, column, n);
#pragma unroll
        for (int q = 0; q < T::out_tiles; ++q) {
#pragma unroll
          for (int j = 0; j < T::group; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) out[q][T::group * i + j][e] = part[q][j][e];
          }
        }
      }
      if (k == 0) break;
      clear(acc);
      multiply<kind, true>(acc, d_k, ldh, R * ldh, m + d, ld, n0, n);  // (g', g) = (D', D) W_k
      if constexpr (training) __syncthreads();                         // all have read the tile of D
      tile.descend(k - 1, acc, d_tile(k - 1), sums);
      __syncthreads();
    }
    static_assert(training || 4 * 2 * R * ldx <= int(sizeof(E)) * 2 * R * (ldx + 2 * ldh));
    tile.store_result(first_row, out);
    __syncthreads();  // all are done with the tile
  }

  if constexpr (training) {
    // This block's sums, [dA | db | dW .. | dL].
    float* const partial = call.partial + blockIdx.x * partial_size(call);
    static_assert(4 * T::partial_floats <= 2 * R * ldh * int(sizeof(E)) * layers);
    tile.store_sums(sums, partial, reinterpret_cast<float*>(tiles));
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
