// Gradients of the weights as sums over the rows of the batch: products of the operands that the sweeps left (layouts
// in fused.h). Part of fused_tile.h.
#pragma once

#include "cpu/fused.h"
#include "cpu/panels.h"

namespace ilvae::cpu::ILVAE_ISA {

// Columns of panel p of a matrix with `columns` columns, padded to whole vectors.
template <class T>
ILVAE_INLINE int64_t padded_columns(int64_t columns, int64_t p) {
  const int64_t left = columns - p * panel_columns<T>, n = lanes_of<T>;
  return left >= panel_columns<T> ? panel_columns<T> : (left + n - 1) / n * n;
}

template <class T>
ILVAE_INLINE int64_t row_panel_elements(int64_t columns, int64_t lanes) {
  return (columns + lanes_of<T> - 1) / lanes_of<T> * lanes_of<T> * lanes;
}

// More re-read the operands from the L2 cache, fewer the gradient.
inline constexpr int64_t tiles_at_once = 4;

// Rows [begin, end) of a panel of the gradient, `tiles_at_once` tiles in one pass.
template <class T>
static void weight_gradient_panel(const WeightGradient<T>& g, const Tile* tiles, int64_t count, int64_t panel,
                                  int64_t begin, int64_t end) {
  const int64_t first = panel * panel_columns<T>, width = padded_columns<T>(g.columns, panel);
  const int64_t valid = g.columns - first < width ? g.columns - first : width;
  // A panel with padding is worked on aside, a few rows at a time: the gradient has no room for it.
  constexpr int64_t strip = 8 * block_rows;
  T aside[strip * panel_columns<T>];
  const bool whole = valid == width;
  for (int64_t i = begin; i < end; i += whole ? end - begin : strip) {
    const int64_t rows = whole ? end - begin : (end - i < strip ? end - i : strip);
    T* const target = g.gradient + i * g.columns + first;
    T* const c = whole ? target : aside;
    const int64_t stride = whole ? g.columns : width;
    bool add = g.add;
    if (add && !whole) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < width; ++j) aside[r * width + j] = j < valid ? target[r * g.columns + j] : T(0);
      }
    }
    for (int64_t t = 0; t < count;) {
      Term<T> terms[2 * tiles_at_once];
      int used = 0;
      for (const int64_t stop = t + tiles_at_once < count ? t + tiles_at_once : count; t < stop; ++t) {
        const int64_t lanes = tiles[t].lanes, offset = tiles[t].offset;
        for (int pair = 0; pair < 2; ++pair) {
          if (!g.left[pair] || first >= g.right_columns[pair]) continue;
          terms[used++] = {g.left[pair] + offset * g.left_units + (g.first_unit + i) * lanes, lanes,
                           g.right[pair] + offset * row_panel_elements<T>(g.columns, 1) + first * lanes, lanes};
        }
      }
      detail::all_rows<Order::rows, T>({c, stride, width, nullptr, add, terms, used}, rows);
      add = true;
    }
    if (!whole) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < valid; ++j) target[r * g.columns + j] = aside[r * width + j];
      }
    }
  }
}

// A block of dot products along the rows of the batch.
template <int rows, int columns, class T>
static void dot_block(const WeightGradient<T>& g, const Tile* tiles, int64_t count, int64_t i, int64_t j) {
  Vector<T> sum[rows][columns] = {};
  for (int64_t t = 0; t < count; ++t) {
    const int64_t lanes = tiles[t].lanes, offset = tiles[t].offset;
    for (int pair = 0; pair < 2; ++pair) {
      if (!g.left[pair] || j >= g.right_columns[pair]) continue;
      const T* const left = g.left[pair] + offset * g.left_units + (g.first_unit + i) * lanes;
      const T* const right = g.right[pair] + offset * g.right_columns[pair] + j * lanes;
      const int64_t present = g.right_columns[pair] - j;
      for (int64_t r = 0; r < lanes; r += lanes_of<T>) {
        Vector<T> a[rows];
#pragma GCC unroll 8
        for (int p = 0; p < rows; ++p) a[p] = load(left + p * lanes + r);
#pragma GCC unroll 8
        for (int q = 0; q < columns; ++q) {
          if (q >= present) break;
          const auto b = load(right + q * lanes + r);
#pragma GCC unroll 8
          for (int p = 0; p < rows; ++p) sum[p][q] += a[p] * b;
        }
      }
    }
  }
  T sums[rows][columns];
  sum_lanes<T, rows * columns>(sums[0], sum[0]);
  for (int p = 0; p < rows; ++p) {
    for (int q = 0; q < columns; ++q) {
      T& target = g.gradient[(i + p) * g.columns + j + q];
      target = (g.add ? target : T(0)) + sums[p][q];
    }
  }
}

template <class T>
static void weight_gradient(const WeightGradient<T>& g, const Tile* tiles, int64_t count, int64_t panel, int64_t begin,
                            int64_t end) {
  if (!g.dot) return weight_gradient_panel(g, tiles, count, panel, begin, end);
  int64_t i = begin;
  const auto rows_with = [&]<int rows, int columns>(int64_t j) {
    for (int64_t p = i; p < i + 8; p += rows) dot_block<rows, columns>(g, tiles, count, p, j);
  };
  for (; i + 8 <= end; i += 8) {
    int64_t j = 0;
    for (; j + 4 <= g.columns; j += 4) rows_with.template operator()<4, 4>(j);
    for (; j + 2 <= g.columns; j += 2) rows_with.template operator()<8, 2>(j);
    for (; j < g.columns; ++j) rows_with.template operator()<8, 1>(j);
  }
  for (; i < end; ++i) {
    int64_t j = 0;
    for (; j + 8 <= g.columns; j += 8) dot_block<1, 8>(g, tiles, count, i, j);
    for (; j < g.columns; ++j) dot_block<1, 1>(g, tiles, count, i, j);
  }
}

template <class T>
static void sum_rows(T* gradient, const T* panels, int64_t units, const Tile* tiles, int64_t count, bool add) {
  const auto sum_units = [&]<int n>(int64_t i) {
    Vector<T> sum[n] = {};
    for (int64_t t = 0; t < count; ++t) {
      const T* const rows = panels + tiles[t].offset * units + i * tiles[t].lanes;
      for (int64_t r = 0; r < tiles[t].lanes; r += lanes_of<T>) {
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) sum[j] += load(rows + j * tiles[t].lanes + r);
      }
    }
    T sums[n];
    sum_lanes<T, n>(sums, sum);
    for (int j = 0; j < n; ++j) gradient[i + j] = (add ? gradient[i + j] : T(0)) + sums[j];
  };
  int64_t i = 0;
  for (; i + 8 <= units; i += 8) sum_units.template operator()<8>(i);
  for (; i < units; ++i) sum_units.template operator()<1>(i);
}

}  // namespace ilvae::cpu::ILVAE_ISA
