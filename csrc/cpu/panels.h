// Matrix products on panels. Part of fused_tile.h.
//
// A panel (k, lanes) has `lanes` contiguous elements for each k, a whole number of vectors. The left factor is read
// where it lies: element (i, k) at left[i * stride + k] (Order::rows) or at left[k * stride + i] (Order::columns, a
// transposed factor), so that neither direction of a sweep packs the weights. A block of its rows meets all lanes
// before the next block, panel_vectors vectors of lanes at a time.
#pragma once

#include "cpu/vectors.h"

namespace ilvae::cpu::ILVAE_ISA {

enum class Order { rows, columns };

// One term of a sum of products: (rows, depth) times a panel (depth, lanes).
template <class T>
struct Term {
  const T* left;
  int64_t stride;
  const T* panel;
  int64_t depth;
};

namespace detail {

// With `ahead` the rows of the next block are fetched meanwhile: their runs are too short for the hardware to see in
// time ("Prefetching the left factor" in benchmarks/NOTES.md).
template <Order order, int rows, int vectors, class T>
ILVAE_INLINE void accumulate(Vector<T> (&sum)[rows][vectors], const T* left, int64_t stride, const T* panel,
                             int64_t lanes, int64_t depth, bool ahead) {
  constexpr int n = lanes_of<T>;
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t begin = 0; begin < depth; begin += line) {
    const int64_t end = depth - begin < line ? depth : begin + line;
    if (ahead) {
      if constexpr (order == Order::rows) {
        for (int i = 0; i < rows; ++i) __builtin_prefetch(left + (i + block_rows) * stride + begin, 0, 2);
      } else {
        for (int64_t k = begin; k < end; ++k) __builtin_prefetch(left + k * stride + rows - 1 + line, 0, 2);
      }
    }
#pragma GCC unroll 2
    for (int64_t k = begin; k < end; ++k) {
      Vector<T> right[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) right[v] = load(panel + k * lanes + v * n);
#pragma GCC unroll 6
      for (int i = 0; i < rows; ++i) {
        const T scalar = order == Order::rows ? left[i * stride + k] : left[k * stride + i];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[i][v] += scalar * right[v];
      }
    }
  }
}

// result (rows, lanes) = bias + sum of terms, or, with `add`, result += sum of terms; bias (rows) may be null.
template <class T>
struct Product {
  T* result;
  int64_t stride, lanes;
  const T* bias;
  bool add;
  const Term<T>* terms;
  int count;
};

// The block of `product` with rows from i and vectors from lane j.
template <Order order, int rows, int vectors, class T>
ILVAE_INLINE void block(const Product<T>& product, int64_t i, int64_t j) {
  constexpr int n = lanes_of<T>;
  Vector<T> sum[rows][vectors] = {};
  T* const corner = product.result + i * product.stride + j;
  for (int t = 0; t < product.count; ++t) {
    const auto& term = product.terms[t];
    const T* const left = term.left + (order == Order::rows ? i * term.stride : i);
    accumulate<order>(sum, left, term.stride, term.panel + j, product.lanes, term.depth, j == 0);
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      T* const target = corner + r * product.stride + v * n;
      // bias and old sum are added last: every step of a long sum would be rounded at their size
      if (product.bias) sum[r][v] += product.bias[i + r];
      store(target, product.add ? load(target) + sum[r][v] : sum[r][v]);
    }
  }
}

// All lanes of the rows from i.
template <Order order, int rows, class T>
ILVAE_INLINE void all_lanes(const Product<T>& product, int64_t i) {
  constexpr int64_t n = lanes_of<T>;
  int64_t j = 0;
  for (; j + panel_vectors * n <= product.lanes; j += panel_vectors * n)
    block<order, rows, panel_vectors>(product, i, j);
  const auto rest = (product.lanes - j) / n;
  static_assert(panel_vectors == 2 || panel_vectors == 4);
  if constexpr (panel_vectors == 4) {
    if (rest == 3) return block<order, rows, 3>(product, i, j);
    if (rest == 2) return block<order, rows, 2>(product, i, j);
  }
  if (rest == 1) return block<order, rows, 1>(product, i, j);
}

template <Order order, class T>
static void all_rows(const Product<T>& product, int64_t rows) {
  static_assert(block_rows == 6);
  int64_t i = 0;
  for (; i + block_rows <= rows; i += block_rows) all_lanes<order, block_rows>(product, i);
  switch (rows - i) {
    case 5:
      return all_lanes<order, 5>(product, i);
    case 4:
      return all_lanes<order, 4>(product, i);
    case 3:
      return all_lanes<order, 3>(product, i);
    case 2:
      return all_lanes<order, 2>(product, i);
    case 1:
      return all_lanes<order, 1>(product, i);
  }
}

}  // namespace detail

// result (rows, lanes) = bias + sum of terms, bias (rows) or null. The terms are summed in their order, in pieces of
// the reduction whose panels fit the L1 cache.
template <Order order, class T>
static void multiply(T* result, int64_t rows, int64_t lanes, const T* bias, const Term<T>* terms, int count) {
  const int64_t limit = registers.piece_bytes / (lanes * int64_t(sizeof(T)));
  bool add = false;
  Term<T> group[2];
  int grouped = 0;
  int64_t depth = 0;
  const auto flush = [&] {
    detail::all_rows<order, T>({result, lanes, lanes, bias, add, group, grouped}, rows);
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
      group[grouped++] = {term.left + (order == Order::rows ? begin : begin * term.stride), term.stride,
                          term.panel + begin * lanes, length};
      depth += length;
    }
  }
  if (grouped || !add) flush();
}

// result (rows, lanes) = a single term.
template <Order order, class T>
ILVAE_INLINE void multiply(T* result, int64_t rows, int64_t lanes, const Term<T>& term) {
  multiply<order>(result, rows, lanes, static_cast<const T*>(nullptr), &term, 1);
}

}  // namespace ilvae::cpu::ILVAE_ISA
