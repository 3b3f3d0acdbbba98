// Matrix products on panels. Part of fused_tile.h.
//
// A panel (k, lanes) has `lanes` contiguous elements for each k, a whole number of vectors. The left factor is read
// where it lies: element (i, p) at a[i * stride + p] (Order::rows) or at a[p * stride + i] (Order::columns, a
// transposed factor), so that neither direction of a sweep packs the weights. A block of its rows meets all lanes
// before the next, panel_vectors vectors of them at a time.
#pragma once

#include "cpu/vectors.h"

namespace ilvae::cpu::ILVAE_ISA {

enum class Order { rows, columns };

// One term of a sum of products: (rows, depth) times a panel (depth, lanes).
template <class T>
struct Term {
  const T* a;
  int64_t stride;
  const T* panel;
  int64_t depth;
};

inline constexpr int block_rows = 6;
// Depth of the pieces that are worked through for all rows before the next: their panel stays in the L1 cache, of 48 KB
// on most CPUs with AVX-512, of 32 KB on the others.
#if defined(__AVX512F__)
inline constexpr int64_t piece_bytes = 36 * 1024;
#else
inline constexpr int64_t piece_bytes = 24 * 1024;
#endif

namespace detail {

// ahead: the rows of the next block are fetched meanwhile, too short a run for the hardware to see in time.
template <Order order, int rows, int vectors, class T>
ILVAE_INLINE void accumulate(Vector<T> (&sum)[rows][vectors], const T* a, int64_t stride, const T* panel, int64_t lanes,
                             int64_t depth, bool ahead) {
  constexpr int n = lanes_of<T>;
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t begin = 0; begin < depth; begin += line) {
    const int64_t end = depth - begin < line ? depth : begin + line;
    if (ahead) {
      if constexpr (order == Order::rows) {
        for (int i = 0; i < rows; ++i) __builtin_prefetch(a + (i + block_rows) * stride + begin, 0, 2);
      } else {
        for (int64_t p = begin; p < end; ++p) __builtin_prefetch(a + p * stride + rows - 1 + line, 0, 2);
      }
    }
#pragma GCC unroll 2
    for (int64_t p = begin; p < end; ++p) {
      Vector<T> b[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) b[v] = load(panel + p * lanes + v * n);
#pragma GCC unroll 6
      for (int i = 0; i < rows; ++i) {
        const T scalar = order == Order::rows ? a[i * stride + p] : a[p * stride + i];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[i][v] += scalar * b[v];
      }
    }
  }
}

// What multiply() computes, as its blocks see it.
template <class T>
struct Product {
  T* c;
  int64_t c_stride, lanes;
  const T* bias;
  bool add;
  const Term<T>* terms;
  int count;
};

// Rows from i and vectors from lane j of c = bias + sum of terms (bias may be null), or c += with `add`.
template <Order order, int rows, int vectors, class T>
ILVAE_INLINE void block(const Product<T>& p, int64_t i, int64_t j) {
  constexpr int n = lanes_of<T>;
  Vector<T> sum[rows][vectors] = {};
  T* const corner = p.c + i * p.c_stride + j;
  for (int t = 0; t < p.count; ++t) {
    const auto& term = p.terms[t];
    accumulate<order>(sum, term.a + (order == Order::rows ? i * term.stride : i), term.stride, term.panel + j, p.lanes,
                      term.depth, j == 0);
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      T* const target = corner + r * p.c_stride + v * n;
      // bias and old sum are added last: every step of a long sum would be rounded at their size
      if (p.bias) sum[r][v] += p.bias[i + r];
      store(target, p.add ? load(target) + sum[r][v] : sum[r][v]);
    }
  }
}

template <Order order, int rows, class T>
ILVAE_INLINE void all_lanes(const Product<T>& p, int64_t i) {
  constexpr int64_t n = lanes_of<T>;
  int64_t j = 0;
  for (; j + panel_vectors * n <= p.lanes; j += panel_vectors * n) block<order, rows, panel_vectors>(p, i, j);
  switch ((p.lanes - j) / n) {
#if defined(__AVX512F__)
    case 3:
      return block<order, rows, 3>(p, i, j);
    case 2:
      return block<order, rows, 2>(p, i, j);
#endif
    case 1:
      return block<order, rows, 1>(p, i, j);
  }
}

template <Order order, class T>
static void all_rows(const Product<T>& p, int64_t rows) {
  int64_t i = 0;
  for (; i + block_rows <= rows; i += block_rows) all_lanes<order, block_rows>(p, i);
  switch (rows - i) {
    case 5:
      return all_lanes<order, 5>(p, i);
    case 4:
      return all_lanes<order, 4>(p, i);
    case 3:
      return all_lanes<order, 3>(p, i);
    case 2:
      return all_lanes<order, 2>(p, i);
    case 1:
      return all_lanes<order, 1>(p, i);
  }
}

}  // namespace detail

// c (rows, lanes) = bias + sum of terms, bias (rows) or null; with `add` the old c is added too. The terms are summed
// in their order, in pieces whose panels fit the L1 cache.
template <Order order, class T>
static void multiply(int64_t lanes, T* c, int64_t c_stride, int64_t rows, const T* bias, bool add, const Term<T>* terms,
                     int count) {
  const int64_t limit = piece_bytes / (lanes * int64_t(sizeof(T)));
  Term<T> group[2];
  int grouped = 0;
  int64_t depth = 0;
  const auto flush = [&] {
    detail::all_rows<order, T>({c, c_stride, lanes, bias, add, group, grouped}, rows);
    bias = nullptr;
    add = true;
    grouped = 0;
    depth = 0;
  };
  for (int t = 0; t < count; ++t) {
    const auto& term = terms[t];
    const int64_t pieces = (term.depth + limit - 1) / limit;
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t begin = term.depth * i / pieces, length = term.depth * (i + 1) / pieces - begin;
      if (grouped == 2 || (grouped == 1 && depth + length > limit)) flush();
      group[grouped++] = {term.a + (order == Order::rows ? begin : begin * term.stride), term.stride,
                          term.panel + begin * lanes, length};
      depth += length;
    }
  }
  if (grouped || !add) flush();
}

}  // namespace ilvae::cpu::ILVAE_ISA
