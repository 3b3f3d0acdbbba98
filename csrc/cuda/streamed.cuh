// The fused route with streamed weights, for networks whose weights do not fit into shared memory: slabs of them pass
// through it, double buffered, while the tile stays. The sweeps need every weight twice, once on the way up and once on
// the way down, so that the slabs of all tiles of a block form one endless sequence.
//
//   up      layer k, 16 or 32 columns of the reduction:   (n, leading(slab_depth)) of A_k, then of W_k
//   down    layer k, as many units of the reduction:      (slab_depth, leading(d)) of A_k, then (.., leading(n)) of W_k
//
// One tile of h and D serves all layers. Weight gradients are left to products of what is written on the way:
// FusedCall.
#pragma once

#include "cuda/tile.cuh"

namespace ilvae::cuda {

// The slabs as they pass by. Parameters are read as they are, in the type of operands, rows at 4-byte boundaries.
template <Operands kind, int n, int d>
class Stream {
 public:
  using E = Element<kind>;
  static constexpr int depth = slab_depth(kind), threads = streamed_threads(kind, n);

  // `down`: both sweeps, not only that upwards; `out`: on the way down A_k too.
  __device__ __forceinline__ Stream(const FusedCall& call, E* slabs, bool down, bool out)
      : call_(call), slabs_(slabs), both_(down), out_(out) {
    issue();
  }

  // The next slab, once it is there; the one before is overwritten from now on. Also a barrier of the block.
  __device__ __forceinline__ const E* next() {
    ptx::cp_async_wait<0>();
    __syncthreads();
    const E* const slab = slabs_ + (issued_ ^ 1) * slab_elements(kind, n, d);
    issue();
    return slab;
  }
  // For the end: one slab more was asked for than is used.
  __device__ __forceinline__ void finish() const { ptx::cp_async_wait<0>(); }

 private:
  // Starts copying the slab at the cursor, and moves that on.
  __device__ __forceinline__ void issue() {
    const bool skip = !hidden_;
    const int units = call_.widths[k_], below = skip ? call_.width : call_.widths[k_ - 1];
    const Array& m = call_.streamed[skip ? 0 : k_];
    const E* const from = static_cast<const E*>(m.data) + (skip ? call_.first[k_] * m.stride : 0);
    E* const to = slabs_ + issued_ * slab_elements(kind, n, d);
    if (!down_) {
      copy<n, depth>(to, leading(depth), from + at_, m.stride, units, below - at_);
    } else if (skip) {
      copy<depth, d>(to, leading(d), from + at_ * m.stride, m.stride, units - at_, below);
    } else {
      copy<depth, n>(to, leading(n), from + at_ * m.stride, m.stride, units - at_, below);
    }
    ptx::cp_async_commit();
    issued_ ^= 1;

    at_ += depth;
    if (at_ < (down_ ? units : below)) return;
    at_ = 0;
    if (skip && k_ > 0) {
      hidden_ = true;
      return;
    }
    k_ += down_ ? -1 : 1;
    if (!down_ && k_ == call_.layers) {
      down_ = both_;
      k_ = both_ ? k_ - 1 : 0;
    }
    if (down_ && k_ < (out_ ? 0 : 1)) {
      down_ = false;
      k_ = 0;
    }
    hidden_ = down_ && !out_;
  }

  // A part of a matrix, `rows` by `columns` of which so many exist, zeros else, in pieces of 16 bytes.
  template <int rows, int columns>
  __device__ __forceinline__ void copy(E* to, int ld, const E* from, int64_t stride, int rows_there,
                                       int columns_there) const {
    constexpr int piece = 16 / sizeof(E), pieces = columns / piece;
    static_assert(rows * pieces % threads == 0);
    const bool aligned = (reinterpret_cast<uintptr_t>(from) | uintptr_t(stride * sizeof(E))) % 16 == 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * pieces; i += threads) {
      const int row = i / pieces, column = i % pieces * piece;
      const int there = row < rows_there ? min(max(columns_there - column, 0), piece) : 0;
      E* const target = to + (wide(kind) ? place(row) : row) * ld + column;
      const E* const source = there > 0 ? from + row * stride + column : from;
      if (aligned) {
        ptx::cp_async_16(target, source, there * int(sizeof(E)));
      } else {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int bytes = min(max(there * int(sizeof(E)) - 4 * q, 0), 4);
          ptx::cp_async_4(target + q * piece / 4, bytes > 0 ? source + q * piece / 4 : from, bytes);
        }
      }
    }
  }

  const FusedCall& call_;
  E* const slabs_;  // (2, slab_elements)
  const bool both_, out_;
  // The cursor: the slab that is copied next.
  bool down_ = false, hidden_ = false;  // hidden: of W_k, not of A_k
  int k_ = 0, at_ = 0, issued_ = 0;
};

// Rows of a tile, two stacks of R, to the columns of a layer in a matrix of two stacks of N rows.
template <Operands kind, int R, int threads>
__device__ __forceinline__ void store_stacks(const FusedCall& call, int64_t first_row, const Element<kind>* tile,
                                             int ld, void* to, int64_t stride, int first_column, int columns) {
  using E = Element<kind>;
  constexpr int piece = 16 / sizeof(E);
  if (!to) return;
#pragma unroll 1
  for (int r = threadIdx.x / 8; r < 2 * R; r += threads / 8) {
    const int64_t row = first_row + r % R;
    if (row >= call.rows) continue;
    E* const target = static_cast<E*>(to) + (r / R * call.rows + row) * stride + first_column;
    const bool aligned = reinterpret_cast<uintptr_t>(target) % 16 == 0;
#pragma unroll 1
    for (int c = piece * (threadIdx.x % 8); c < columns; c += 8 * piece) {
      if (aligned && c + piece <= columns) {
        *reinterpret_cast<uint4*>(target + c) = *reinterpret_cast<const uint4*>(tile + r * ld + c);
      } else {
#pragma unroll 1
        for (int i = c; i < c + piece && i < columns; ++i) target[i] = tile[r * ld + i];
      }
    }
  }
}

template <Operands kind, int n, int d, bool training>
__global__ void __launch_bounds__(streamed_threads(kind, n), 1)
    streamed_kernel(const __grid_constant__ FusedCall call) {
  constexpr int RG = streamed_row_groups(kind), CG = streamed_column_groups(kind, n);
  using T = Tile<kind, n, d, RG, CG, training ? fused_layers : 0, streamed_packed(kind)>;
  using E = typename T::E;
  constexpr int C = T::C, R = T::R, ldx = T::ldx, ldh = T::ldh, depth = slab_depth(kind);
  constexpr bool raw = true;

  const int K = call.layers;
  const Layout at = streamed_layout(kind, n, d, K);
  const T tile(call, K, at);
  E* const H = reinterpret_cast<E*>(ptx::dynamic_shared() + at.tiles);  // h_k on the way up, D_k on the way down
  const E* const my_rows = H + 16 * tile.rg * ldh;
  const bool down = training || call.map, want_out = training ? call.grad_x != nullptr : call.map != nullptr;
  const auto store = [&](int64_t first_row, const E* from, int ld, void* to, int64_t stride, int column, int columns) {
    if constexpr (training) {
      store_stacks<kind, R, T::threads>(call, first_row, from, ld, to, stride, column, columns);
    }
  };

  tile.load_constants();
  typename T::Sums sums;
  Stream<kind, n, d> stream(call, reinterpret_cast<E*>(ptx::dynamic_shared() + at.weights), down, want_out);
  __syncthreads();

#pragma unroll 1
  for (int64_t index = blockIdx.x; index < call.tiles; index += gridDim.x) {
    const int64_t first_row = index * T::rows_per_tile;
    tile.load_rows(first_row, sums);

    // Up. The first slab's barrier lets all see x; every layer's lets them see h.
    float acc[2][C][4];
    float o[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};  // by tile, rows g and g + 8
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
      clear(acc);
#pragma unroll 1
      for (int c = 0; c < call.width; c += depth) {
        const E* const m = stream.next();
        multiply<kind, false, raw>(acc, tile.X + 16 * tile.rg * ldx + c, ldx, R * ldx, m, leading(depth), tile.n0,
                                   depth);
      }
      if (k == 0) {
        store(first_row, tile.X, ldx, call.stacked_x, call.stride_x, 0, call.width);
      } else {
        const int below = call.widths[k - 1];
#pragma unroll 1
        for (int c = 0; c < below; c += depth) {
          const E* const m = stream.next();
          multiply<kind, false, raw>(acc, my_rows + c, ldh, R * ldh, m, leading(depth), tile.n0, depth);
        }
        store(first_row, H, ldh, call.stacked_h, call.stride_h, call.first[k - 1], below);
        __syncthreads();  // all have read h
      }
      tile.activate(k, acc, H, o);
    }
    float scale[2][2];
    tile.turn(first_row, o, scale, sums);
    if (!down) {  // the potential alone
      __syncthreads();
      continue;
    }

    // Down.
    float out[T::out_tiles][T::OC][4];
    clear(out);
    tile.top(acc, scale, H, sums);
#pragma unroll 1
    for (int k = K - 1; k >= 0; --k) {
      const int units = call.widths[k];
      if (want_out) {
#pragma unroll 1
        for (int r = 0; r < units; r += depth) {  // out += D_k A_k
          const E* const m = stream.next();
          multiply<kind, true, raw, T::out_step>(out, my_rows + r, ldh, R * ldh, m, leading(d), tile.first_out(), depth,
                                                 call.width);
        }
      }
      if (k > 0) {
        clear(acc);
#pragma unroll 1
        for (int r = 0; r < units; r += depth) {  // (g', g) = (D', D) W_k
          const E* const m = stream.next();
          multiply<kind, true, raw>(acc, my_rows + r, ldh, R * ldh, m, leading(n), tile.n0, depth);
        }
      } else if (!want_out) {
        __syncthreads();
      }
      store(first_row, H, ldh, call.stacked_d, call.stride_d, call.first[k], units);
      if (k == 0) break;
      __syncthreads();  // all have read D
      tile.descend(k - 1, acc, H, sums);
    }
    if constexpr (training) tile.sum_output_row(sums);
    static_assert(4 * T::rows_per_tile * ldx <= 2 * R * (ldx * int(sizeof(E))) + streamed_tile_bytes(kind, n, d));
    tile.store_result(first_row, out);
    __syncthreads();  // all are done with the tile
  }
  stream.finish();

  if constexpr (training) {
    static_assert(4 * T::partial_floats <= streamed_tile_bytes(kind, n, d));
    tile.store_sums(sums, call.partial + blockIdx.x * partial_size(call), reinterpret_cast<float*>(H));
  }
}

}  // namespace ilvae::cuda
