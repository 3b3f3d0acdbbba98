// Device code of core/pointwise.h, and of the quadratic term: the steps of the matmul route between its products.
//
// A block holds `threads` threads as a patch of rows by chunks of V consecutive columns; the patch walks over the
// matrix with the grid. V elements of the narrowest type fill 16 bytes where alignment and width allow, else V = 1. Row
// offsets are 64-bit.
#pragma once

#include "core/pointwise.h"
#include "cuda/activation.cuh"
#include "cuda/operand.cuh"
#include "cuda/pointwise.h"

namespace ilvae::cuda {

inline constexpr int pointwise_threads = 256;

// Calls body(row, column) for this thread's chunks; 2^across threads of a block stand beside each other in a row.
template <int V, class Body>
__device__ __forceinline__ void for_chunks(int64_t rows, int64_t width, int across, const Body& body) {
  const int64_t down = blockDim.x >> across;
  const int64_t first = threadIdx.x & ((1u << across) - 1), step = int64_t(1) << across;
  for (int64_t row = blockIdx.x * down + (threadIdx.x >> across); row < rows; row += gridDim.x * down) {
    for (int64_t chunk = first; chunk * V < width; chunk += step) body(row, chunk * V);
  }
}

// a_k = what the products left + b_k.
template <int V, class Real, class Operand, class Stored>
__device__ __forceinline__ void load_preactivation(const HiddenLayer<Real, Operand, Stored>& layer, int64_t row,
                                                   int64_t column, Real (&a)[V]) {
  Real bias[V];
  load<V>(a, layer.a.row(row) + column);
#pragma unroll
  for (int i = 0; i < V; ++i) bias[i] = layer.bias[column + i];
#pragma unroll
  for (int i = 0; i < V; ++i) a[i] += bias[i];
}

template <int V, class Real, class Operand, class Stored>
__global__ void __launch_bounds__(pointwise_threads)
    up_kernel(HiddenLayer<Real, Operand, Stored> layer, Parameter<Real> parameter, int across) {
  for_chunks<V>(layer.rows, layer.width, across, [&](int64_t row, int64_t column) {
    Real a[V], a_tangent[V] = {}, value[V];
    Derivatives<Real> s[V];
    load_preactivation<V>(layer, row, column, a);
    if (layer.a_tangent) load<V>(a_tangent, layer.a_tangent.row(row) + column);
    evaluate<V>(layer.activation.kind, parameter, a, s);
    if (layer.h) {
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = s[i].value;
      store<V>(layer.h.row(row) + column, value);
    }
    if (layer.a_tangent) {
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = s[i].first * a_tangent[i];
      store<V>(layer.h_tangent.row(row) + column, value);
    }
  });
}

template <int V, class Real, class Operand, class Stored>
__global__ void __launch_bounds__(pointwise_threads)
    down_kernel(HiddenLayer<Real, Operand, Stored> layer, Parameter<Real> parameter, int across) {
  for_chunks<V>(layer.rows, layer.width, across, [&](int64_t row, int64_t column) {
    Real a[V], g[V], a_tangent[V] = {}, g_tangent[V] = {}, value[V];
    Derivatives<Real> s[V];
    load_preactivation<V>(layer, row, column, a);
    load<V>(g, layer.g.row(row) + column);
    if (layer.a_tangent) {
      load<V>(a_tangent, layer.a_tangent.row(row) + column);
      load<V>(g_tangent, layer.g_tangent.row(row) + column);
    }
    evaluate<V>(layer.activation.kind, parameter, a, s);
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = g[i] * s[i].first;
    store<V>(layer.d.row(row) + column, value);
    if (layer.a_tangent) {
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = g_tangent[i] * s[i].first + g[i] * s[i].second * a_tangent[i];
      store<V>(layer.d_tangent.row(row) + column, value);
    }
  });
}

// One warp a row: the sums of o, then a second look at the row, by then in cache.
template <int V, class Real, class Operand, class Stored>
__global__ void __launch_bounds__(pointwise_threads)
    turn_kernel(HiddenLayer<Real, Operand, Stored> layer, Parameter<Real> parameter,
                OutputUnit<Real, Operand, Stored> out, Parameter<Real> out_parameter) {
  const int lane = threadIdx.x & 31;
  const int64_t warps = blockDim.x >> 5;
  const bool tangent = bool(layer.a_tangent);
  const auto read = [&](int64_t row, int64_t column, Derivatives<Real>(&s)[V], Real(&a_tangent)[V]) {
    Real a[V];
    load_preactivation<V>(layer, row, column, a);
#pragma unroll
    for (int i = 0; i < V; ++i) a_tangent[i] = 0;
    if (tangent) load<V>(a_tangent, layer.a_tangent.row(row) + column);
    evaluate<V>(layer.activation.kind, parameter, a, s);
  };
  for (int64_t row = blockIdx.x * warps + (threadIdx.x >> 5); row < layer.rows; row += gridDim.x * warps) {
    Real sum = 0, sum_tangent = 0;
    if (!out.complete || tangent || layer.h) {
      for (int64_t column = lane * V; column < layer.width; column += 32 * V) {
        Derivatives<Real> s[V];
        Real a_tangent[V], value[V], value_tangent[V];
        read(row, column, s, a_tangent);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          value[i] = s[i].value;
          value_tangent[i] = s[i].first * a_tangent[i];
          sum += value[i] * out.weight[column + i];
          sum_tangent += value_tangent[i] * out.weight[column + i];
        }
        if (layer.h) {
          store<V>(layer.h.row(row) + column, value);
          if (tangent) store<V>(layer.h_tangent.row(row) + column, value_tangent);
        }
      }
      sum = warp_sum(sum);
      sum_tangent = warp_sum(sum_tangent);
    }
    Real o[1] = {load<Real>(out.o.row(row))}, o_tangent = 0;
    if (!out.complete) o[0] += sum + *out.bias;
    if (tangent) o_tangent = load<Real>(out.o_tangent.row(row)) + sum_tangent;
    Derivatives<Real> s_out[1];
    evaluate<1>(out.activation.kind, out_parameter, o, s_out);
    const Real u = out.potential_cotangent ? *out.potential_cotangent.row(row) : Real(tangent ? 0 : 1);
    const Real d_out = tangent ? s_out[0].first : u * s_out[0].first;
    const Real d_out_tangent = s_out[0].second * o_tangent + u * s_out[0].first;
    __syncwarp();  // every lane has read o
    if (lane == 0) {
      if (!out.complete) store(out.o.row(row), o[0]);
      if (tangent) store(out.o_tangent.row(row), o_tangent);
      if (out.potential) *out.potential.row(row) = s_out[0].value;
      if (layer.d) store(out.d.row(row), d_out);
      if (layer.d && tangent) store(out.d_tangent.row(row), d_out_tangent);
    }
    if (!layer.d) continue;
    for (int64_t column = lane * V; column < layer.width; column += 32 * V) {
      Derivatives<Real> s[V];
      Real a_tangent[V], value[V], value_tangent[V];
      read(row, column, s, a_tangent);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const Real w = out.weight[column + i];
        value[i] = d_out * s[i].first * w;
        value_tangent[i] = d_out_tangent * s[i].first * w + d_out * s[i].second * a_tangent[i] * w;
      }
      store<V>(layer.d.row(row) + column, value);
      if (tangent) store<V>(layer.d_tangent.row(row) + column, value_tangent);
    }
  }
}

// One warp a row; block b leaves its part of grad_L in partial[b].
template <class Real>
__global__ void __launch_bounds__(pointwise_threads, 4)
    quadratic_kernel(const __grid_constant__ QuadraticTerm<Real> q) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t warps = blockDim.x >> 5;
  const Real constant = *q.constant;
  const bool sums = q.phi || q.gradient;
  Real total = 0;
  for (int64_t row = blockIdx.x * warps + warp; row < q.rows; row += gridDim.x * warps) {
    const Real u = q.u ? load_any<Real>(q.u.data, q.u.type, row * q.u.stride) : q.unit;
    Real square = 0, product = 0;
    for (int column = lane; column < q.width; column += 32) {
      const Real x = load_any<Real>(q.x.data, q.x.type, row * q.x.stride + column);
      const Real v = q.v ? load_any<Real>(q.v.data, q.v.type, row * q.v.stride + column) : Real(0);
      square += x * x;
      product += v * x;
      if (q.y) {
        const int64_t at = row * q.y.stride + column;
        store_any(q.y.data, q.y.type, at, load_any<Real>(q.y.data, q.y.type, at) + constant * (v + u * x));
      }
    }
    if (!sums) continue;
    square = warp_sum(square);
    total += warp_sum(product) + u * square / 2;
    if (q.phi && lane == 0) {
      store_any(q.phi.data, q.phi.type, row * q.phi.stride, q.potential[row] + constant * square / 2);
    }
  }
  if (q.gradient) {
    Real* const shared = reinterpret_cast<Real*>(ptx::dynamic_shared());  // (warps)
    if (lane == 0) shared[warp] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
      Real sum = 0;
      for (int w = 0; w < warps; ++w) sum += shared[w];
      q.partial[blockIdx.x] = sum;
    }
  }
}

// sum = the sum of n numbers in a fixed order, by one warp.
template <class Real>
__global__ void sum_kernel(const Real* numbers, int n, Real* sum) {
  Real total = 0;
  for (int i = threadIdx.x; i < n; i += 32) total += numbers[i];
  total = warp_sum(total);
  if (threadIdx.x == 0) *sum = total;
}

}  // namespace ilvae::cuda
