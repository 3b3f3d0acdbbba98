// Vectors of the instruction set being compiled for, and transposition with them. Part of fused_tile.h.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/activations.h"
#include "cpu/tuning.h"

namespace ilvae::cpu::ILVAE_ISA {

#define ILVAE_INLINE static inline __attribute__((always_inline))

inline constexpr int vector_bytes = registers.vector_bytes, panel_vectors = registers.panel_vectors;

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
// Columns of a full row panel, as many as the accumulators hold.
template <class T>
inline constexpr int64_t panel_columns = panel_vectors * lanes_of<T>;
// Rows of a full tile.
template <class T>
inline constexpr int64_t tile_lanes = tile_bytes_per_unit / sizeof(T);

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

// Several vectors as one number to compute with. An activation is a chain of some thirty dependent instructions, most
// of whose time is spent waiting for itself. The compiler interleaves the chains of different vectors, and they fill
// each other's time.
template <class T, int vectors>
struct Wide {
  using Index = typename VectorTypes<T>::index;
  struct Mask {
    Index part[vectors];
  };
  Vector<T> part[vectors];

  Wide() = default;
  ILVAE_HD Wide(T value) : Wide([&](int) { return value - Vector<T>{}; }) {}
  ILVAE_HD static Wide load(const T* p) {
    return Wide([&](int i) { return ILVAE_ISA::load(p + i * lanes_of<T>); });
  }
  ILVAE_HD void store(T* p) const {
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) ILVAE_ISA::store(p + i * lanes_of<T>, part[i]);
  }

  ILVAE_HD friend Wide operator+(Wide a, Wide b) {
    return Wide([&](int i) { return a.part[i] + b.part[i]; });
  }
  ILVAE_HD friend Wide operator-(Wide a, Wide b) {
    return Wide([&](int i) { return a.part[i] - b.part[i]; });
  }
  ILVAE_HD friend Wide operator*(Wide a, Wide b) {
    return Wide([&](int i) { return a.part[i] * b.part[i]; });
  }
  ILVAE_HD friend Wide operator/(Wide a, Wide b) {
    return Wide([&](int i) { return a.part[i] / b.part[i]; });
  }
  ILVAE_HD friend Wide operator-(Wide a) {
    return Wide([&](int i) { return -a.part[i]; });
  }
  ILVAE_HD friend Mask operator<(Wide a, Wide b) {
    return mask([&](int i) { return a.part[i] < b.part[i]; });
  }
  ILVAE_HD friend Mask operator>(Wide a, Wide b) {
    return mask([&](int i) { return a.part[i] > b.part[i]; });
  }
  ILVAE_HD friend Mask operator<=(Wide a, Wide b) {
    return mask([&](int i) { return a.part[i] <= b.part[i]; });
  }
  ILVAE_HD friend Wide select(Mask condition, Wide yes, Wide no) {
    return Wide([&](int i) { return condition.part[i] ? yes.part[i] : no.part[i]; });
  }
  ILVAE_HD friend Wide magnitude(Wide a) {
    constexpr auto without_sign = std::numeric_limits<std::remove_reference_t<decltype(Index{}[0])>>::max();
    return Wide(
        [&](int i) { return __builtin_bit_cast(Vector<T>, __builtin_bit_cast(Index, a.part[i]) & without_sign); });
  }
  ILVAE_HD friend Wide power_of_two(Wide shifted) {
    constexpr int mantissa = std::numeric_limits<T>::digits - 1;
    const auto one = __builtin_bit_cast(Index, T(1) - Vector<T>{});
    return Wide([&](int i) {
      return __builtin_bit_cast(Vector<T>, (__builtin_bit_cast(Index, shifted.part[i]) << mantissa) + one);
    });
  }

 private:
  template <class Part>
    requires std::is_invocable_v<Part, int>
  ILVAE_HD explicit Wide(const Part& of) {
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) part[i] = of(i);
  }
  template <class Part>
  ILVAE_HD static Mask mask(const Part& of) {
    Mask result;
#pragma GCC unroll 4
    for (int i = 0; i < vectors; ++i) result.part[i] = of(i);
    return result;
  }
};

// Calls body(i, derivatives of s at a[i] and the elements after it) for n elements, a whole number of vectors. It takes
// activation_vectors vectors at a time while there are as many.
template <class T, class Function, class Body>
ILVAE_INLINE void activate(const Function& s, const T* a, int64_t n, const Body& body) {
  constexpr int64_t several = activation_vectors * lanes_of<T>;
  int64_t i = 0;
  for (; i + several <= n; i += several) body(i, s(Wide<T, activation_vectors>::load(a + i)));
  for (; i < n; i += lanes_of<T>) body(i, s(Wide<T, 1>::load(a + i)));
}

namespace detail {

// Exchanges the off-diagonal step x step blocks of a pair of rows that are `step` apart.
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

// The same steps, each of which adds what it has brought together. Afterwards lane j of v[0] is a sum over some lanes
// of v[j % count]; the lanes j, j + count, j + 2 count and so on together have all of them.
template <class T, int count, int step = 1>
ILVAE_INLINE void add_crosswise(Vector<T>* v) {
  if constexpr (step < count) {
#pragma GCC unroll 16
    for (int i = 0; i < count; i += 2 * step) {
      exchange<T, step>(v[i], v[i + step], std::make_integer_sequence<int, lanes_of<T>>());
      v[i] += v[i + step];
    }
    add_crosswise<T, count, 2 * step>(v);
  }
}

}  // namespace detail

// sums[i] = the sum of the lanes of v[i], in one fixed order; count is a power of two. Overwrites v.
template <class T, int count>
ILVAE_INLINE void sum_lanes(T* sums, Vector<T>* v) {
  constexpr int n = lanes_of<T>, at_once = count < n ? count : n;
#pragma GCC unroll 8
  for (int i = 0; i < count; i += at_once) {
    detail::add_crosswise<T, at_once>(v + i);
    T part[n];
    store(part, v[i]);
    for (int j = 0; j < at_once; ++j) {
      sums[i + j] = part[j];
      for (int k = j + at_once; k < n; k += at_once) sums[i + j] += part[k];
    }
  }
}

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
        for (int64_t column = 0; column < n && j + column < columns; ++column) {
          for (int64_t r = 0; r < n && i + r < rows; ++r) {
            target[column * to_stride + r] = source[r * from_stride + column];
          }
        }
      }
    }
  }
}

}  // namespace ilvae::cpu::ILVAE_ISA

template <class T, int vectors>
struct ilvae::ElementOf<ilvae::cpu::ILVAE_ISA::Wide<T, vectors>> {
  using type = T;
};
