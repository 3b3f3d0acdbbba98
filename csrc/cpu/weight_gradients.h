// Gradients of the weights: sums over the rows of the batch, as products of the operands that the sweeps left. The
// layouts of the operands are in fused.h. Part of fused_tile.h.
#pragma once

#include "cpu/fused.h"
#include "cpu/panels.h"

namespace ilvae::cpu::ILVAE_ISA {

// Columns of row panel `panel` of a matrix with `columns` columns, padded to whole vectors.
template <class T>
ILVAE_INLINE int64_t padded_columns(int64_t columns, int64_t panel) {
  const int64_t left = columns - panel * panel_columns<T>;
  return left >= panel_columns<T> ? panel_columns<T> : rounded_up(left, lanes_of<T>);
}

// Elements of the row panels of `lanes` rows.
template <class T>
ILVAE_INLINE int64_t row_panel_elements(int64_t columns, int64_t lanes) {
  return rounded_up(columns, lanes_of<T>) * lanes;
}

// Columns [first, first + valid) of a gradient, which are those of a row panel. The panel has `width` columns; where it
// has padding, the gradient has no room for it and is worked on aside.
template <class T>
struct ColumnPanel {
  int64_t first, width, valid;

  ILVAE_HD ColumnPanel(int64_t columns, int64_t panel)
      : first(panel * panel_columns<T>),
        width(padded_columns<T>(columns, panel)),
        valid(columns - first < width ? columns - first : width) {}
  ILVAE_HD bool padded() const { return valid < width; }
};

// Adds the pairs of tiles [begin, end) to `rows` rows, from row i on, of a column panel that lies at `target`.
template <class T>
ILVAE_INLINE void add_tiles(T* target, int64_t stride, bool add, const WeightGradient<T>& g, const Tile* tiles,
                            int64_t begin, int64_t end, const ColumnPanel<T>& panel, int64_t i, int64_t rows) {
  Term<T> terms[2 * tiles_at_once];
  int used = 0;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t lanes = tiles[t].lanes, offset = tiles[t].offset;
    for (int pair = 0; pair < 2; ++pair) {
      if (!g.left[pair] || panel.first >= g.right_columns[pair]) continue;
      terms[used++] = {g.left[pair] + offset * g.left_units + (g.first_unit + i) * lanes, lanes,
                       g.right[pair] + offset * row_panel_elements<T>(g.columns, 1) + panel.first * lanes, lanes};
    }
  }
  detail::all_rows<Order::rows, T>({target, stride, panel.width, nullptr, add, terms, used}, rows);
}

// Rows [begin, end) of a column panel of the gradient, `tiles_at_once` tiles in one pass.
template <class T>
static void weight_gradient_panel(const WeightGradient<T>& g, const Tile* tiles, int64_t count, int64_t index,
                                  int64_t begin, int64_t end) {
  const ColumnPanel<T> panel(g.columns, index);
  const auto all_tiles = [&](T* target, int64_t stride, int64_t i, int64_t rows) {
    bool add = g.add;
    for (int64_t t = 0; t < count; t += tiles_at_once) {
      const int64_t stop = t + tiles_at_once < count ? t + tiles_at_once : count;
      add_tiles(target, stride, add, g, tiles, t, stop, panel, i, rows);
      add = true;
    }
  };
  if (!panel.padded()) return all_tiles(g.gradient + begin * g.columns + panel.first, g.columns, begin, end - begin);
  T aside[aside_rows * panel_columns<T>];
  for (int64_t i = begin; i < end; i += aside_rows) {
    const int64_t rows = end - i < aside_rows ? end - i : aside_rows;
    T* const target = g.gradient + i * g.columns + panel.first;
    if (g.add) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < panel.width; ++j) {
          aside[r * panel.width + j] = j < panel.valid ? target[r * g.columns + j] : T(0);
        }
      }
    }
    all_tiles(aside, panel.width, i, rows);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < panel.valid; ++j) target[r * g.columns + j] = aside[r * panel.width + j];
    }
  }
}

// A block of dot products along the rows of the batch, for the elements (i.., j..) of the gradient.
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
        Vector<T> of_left[rows];
#pragma GCC unroll 8
        for (int row = 0; row < rows; ++row) of_left[row] = load(left + row * lanes + r);
#pragma GCC unroll 8
        for (int column = 0; column < columns; ++column) {
          if (column >= present) break;
          const auto of_right = load(right + column * lanes + r);
#pragma GCC unroll 8
          for (int row = 0; row < rows; ++row) sum[row][column] += of_left[row] * of_right;
        }
      }
    }
  }
  T sums[rows][columns];
  sum_lanes<T, rows * columns>(sums[0], sum[0]);
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      T& target = g.gradient[(i + row) * g.columns + j + column];
      target = (g.add ? target : T(0)) + sums[row][column];
    }
  }
}

// Rows [begin, end) of the gradient, of its columns in row panel `panel` or, with g.dot, of all columns.
template <class T>
static void weight_gradient(const WeightGradient<T>& g, const Tile* tiles, int64_t count, int64_t panel, int64_t begin,
                            int64_t end) {
  if (!g.dot) return weight_gradient_panel(g, tiles, count, panel, begin, end);
  // Blocks fill the registers: eight rows at a time, or, of the last rows, eight columns.
  int64_t i = begin;
  const auto eight_rows = [&]<int rows, int columns>(int64_t j) {
    for (int64_t row = i; row < i + 8; row += rows) dot_block<rows, columns>(g, tiles, count, row, j);
  };
  for (; i + 8 <= end; i += 8) {
    int64_t j = 0;
    for (; j + 4 <= g.columns; j += 4) eight_rows.template operator()<4, 4>(j);
    for (; j + 2 <= g.columns; j += 2) eight_rows.template operator()<8, 2>(j);
    for (; j < g.columns; ++j) eight_rows.template operator()<8, 1>(j);
  }
  for (; i < end; ++i) {
    int64_t j = 0;
    for (; j + 8 <= g.columns; j += 8) dot_block<1, 8>(g, tiles, count, i, j);
    for (; j < g.columns; ++j) dot_block<1, 1>(g, tiles, count, i, j);
  }
}

// gradient (units) = the sums over all rows of panels with `units` units, or, with `add`, these on top.
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
