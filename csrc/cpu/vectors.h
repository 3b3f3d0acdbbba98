// Vectors of the instruction set being compiled for, and transposition with them. Part of fused_tile.h.
#pragma once

#include <cstdint>
#include <utility>

namespace ilvae::cpu::ILVAE_ISA {

#define ILVAE_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64, panel_vectors = 4;  // 6 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
inline constexpr int vector_bytes = 32, panel_vectors = 2;  // 6 x 2 of 16
#else
inline constexpr int vector_bytes = 16, panel_vectors = 2;
#endif
// More lanes read the weights less often; the panels of a layer still stay close.
inline constexpr int tile_bytes = 256;

template <class T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float vector __attribute__((vector_size(vector_bytes)));
  typedef int32_t index __attribute__((vector_size(vector_bytes)));
};
template <>
struct VectorTypes<double> {
  typedef double vector __attribute__((vector_size(vector_bytes)));
  typedef int64_t index __attribute__((vector_size(vector_bytes)));
};
template <class T>
using Vector = typename VectorTypes<T>::vector;

template <class T>
inline constexpr int lanes_of = vector_bytes / sizeof(T);
// Columns of a full row panel, as many as the accumulators hold; rows of a full tile.
template <class T>
inline constexpr int64_t panel_columns = panel_vectors * lanes_of<T>;
template <class T>
inline constexpr int64_t tile_lanes = tile_bytes / sizeof(T);

template <class T>
ILVAE_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
ILVAE_INLINE void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The sum of the lanes, in one fixed order.
template <class T>
ILVAE_INLINE T sum_lanes(Vector<T> v) {
  T part[lanes_of<T>];
  store(part, v);
  for (int width = lanes_of<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

namespace detail {

// Exchanges the off-diagonal step x step blocks of rows i and i + step.
template <class T, int step, int... lane>
ILVAE_INLINE void exchange(Vector<T>& upper, Vector<T>& lower, std::integer_sequence<int, lane...>) {
  constexpr int n = lanes_of<T>;
  const auto u = upper, l = lower;
#if defined(__clang__)
  upper = __builtin_shufflevector(u, l, ((lane & step) ? n + lane - step : lane)...);
  lower = __builtin_shufflevector(u, l, ((lane & step) ? n + lane : lane + step)...);
#else
  using Index = typename VectorTypes<T>::index;
  upper = __builtin_shuffle(u, l, Index{((lane & step) ? n + lane - step : lane)...});
  lower = __builtin_shuffle(u, l, Index{((lane & step) ? n + lane : lane + step)...});
#endif
}

template <class T, int step>
ILVAE_INLINE void transpose_square(Vector<T> (&rows)[lanes_of<T>]) {
  if constexpr (step < lanes_of<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes_of<T>; ++i) {
      if (!(i & step)) exchange<T, step>(rows[i], rows[i + step], std::make_integer_sequence<int, lanes_of<T>>());
    }
    transpose_square<T, 2 * step>(rows);
  }
}

}  // namespace detail

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns.
template <class T>
static void transpose(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t rows, int64_t columns) {
  constexpr int n = lanes_of<T>;
  for (int64_t j = 0; j < columns; j += n) {
    for (int64_t i = 0; i < rows; i += n) {
      const T* const source = from + i * from_stride + j;
      T* const target = to + j * to_stride + i;
      if (i + n <= rows && j + n <= columns) {
        Vector<T> square[n];
#pragma GCC unroll 16
        for (int r = 0; r < n; ++r) square[r] = load(source + r * from_stride);
        detail::transpose_square<T, 1>(square);
#pragma GCC unroll 16
        for (int r = 0; r < n; ++r) store(target + r * to_stride, square[r]);
      } else {
        for (int64_t c = 0; c < n && j + c < columns; ++c) {
          for (int64_t r = 0; r < n && i + r < rows; ++r) target[c * to_stride + r] = source[r * from_stride + c];
        }
      }
    }
  }
}

}  // namespace ilvae::cpu::ILVAE_ISA
