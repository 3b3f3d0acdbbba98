// The sweeps of docs/mathematics.md on one tile of rows, written once and compiled for each instruction set:
// fused_*.cpp define ILVAE_ISA and set the flags. Array layouts are described in fused.h.
//
// Like pointwise_rows.h this file must not leave an inline function with external linkage in the object file.
#include "cpu/fused.h"
#include "cpu/panels.h"
#include "cpu/scratch.h"
#include "cpu/weight_gradients.h"

namespace ilvae::cpu::ILVAE_ISA {

// --- Between rows of the batch and panels
// -----------------------------------------------------------------------------

// panel (columns, lanes) = the tile's rows of `rows` (N, columns), transposed. Lanes beyond the batch get zero, or, for
// x, its last row again: there the network is as finite as on the batch, so that zero adjoints do not meet an infinity.
template <class T>
static void load_rows(T* panel, const T* rows, int64_t columns, const Tile& tile, bool repeat_last = false) {
  transpose(panel, tile.lanes, rows + tile.first_row * columns, columns, tile.rows, columns);
  if (tile.rows == tile.lanes) return;
  for (int64_t j = 0; j < columns; ++j) {
    T* const lanes = panel + j * tile.lanes;
    const T filling = repeat_last ? lanes[tile.rows - 1] : T(0);
    for (int64_t r = tile.rows; r < tile.lanes; ++r) lanes[r] = filling;
  }
}

template <class T>
static void store_rows(T* rows, const T* panel, int64_t columns, const Tile& tile) {
  transpose(rows + tile.first_row * columns, columns, panel, tile.lanes, columns, tile.rows);
}

// Row panels (fused.h) of a panel (units, lanes).
template <class T>
static void repack_as_row_panels(T* row_panels, const T* panel, int64_t units, int64_t lanes) {
  for (int64_t i = 0; i * panel_columns<T> < units; ++i) {
    const int64_t first = i * panel_columns<T>, width = padded_columns<T>(units, i);
    const int64_t valid = units - first < width ? units - first : width;
    T* const target = row_panels + first * lanes;
    if (valid < width) {
      for (int64_t r = 0; r < lanes; ++r) {
        for (int64_t j = valid; j < width; ++j) target[r * width + j] = T(0);
      }
    }
    transpose(target, width, panel + first * lanes, lanes, valid, lanes);
  }
}

// Row panels, laid out for `columns` columns, of the tile's rows of `rows` (N, valid_columns).
template <class T>
static void load_as_row_panels(T* row_panels, int64_t columns, const T* rows, int64_t valid_columns, const Tile& tile) {
  for (int64_t i = 0; i * panel_columns<T> < valid_columns; ++i) {
    const int64_t first = i * panel_columns<T>, width = padded_columns<T>(columns, i);
    const int64_t valid = valid_columns - first < width ? valid_columns - first : width;
    T* const target = row_panels + first * tile.lanes;
    for (int64_t r = 0; r < tile.lanes; ++r) {
      const T* const row = rows + (tile.first_row + r) * valid_columns + first;
      const int64_t copied = r < tile.rows ? valid : 0;
      for (int64_t j = 0; j < copied; ++j) target[r * width + j] = row[j];
      for (int64_t j = copied; j < width; ++j) target[r * width + j] = T(0);
    }
  }
}

// --- Products with the parameters
// -------------------------------------------------------------------------------------

// P = x (A B)^T as a term: its left factor has a row for every hidden unit and for the output unit.
template <class T>
ILVAE_INLINE Term<T> skip_term(const Network<T>& net, const T* x) {
  return {net.embedded_weight, net.embedded_stride, x, net.input};
}

// The rows of a skip term from unit `first` on.
template <class T>
ILVAE_INLINE Term<T> from_unit(const Term<T>& skip, int64_t first) {
  return {skip.left + first * skip.stride, skip.stride, skip.panel, skip.depth};
}

// B x in y (d, lanes). Where B is the padded identity, the answer is x itself, the first m units of B x.
template <class T>
static const T* embedded(const Network<T>& net, const T* x, int64_t lanes, T* y) {
  if (!net.embedding) return x;
  multiply<Order::rows>(y, net.width, lanes, Term<T>{net.embedding, net.input, x, net.input});
  return y;
}
template <class T>
ILVAE_INLINE int64_t embedded_units(const Network<T>& net) {
  return net.embedding ? net.width : net.input;
}

// a_k = P_k + h_{k-1} W_k^T + b_k of hidden layer l; with P' and h', and without a bias, a'_k. `bias` is b or null.
template <class T>
static void preactivation(const Network<T>& net, int64_t l, T* a, const Term<T>& skip, const T* h_below, const T* bias,
                          int64_t lanes) {
  const auto& layer = net.hidden[l];
  Term<T> terms[2] = {from_unit(skip, layer.first), {}};
  if (l > 0) {
    const int64_t below = net.hidden[l - 1].width;
    terms[1] = {net.weights[l - 1], below, h_below, below};
  }
  multiply<Order::rows>(a, layer.width, lanes, bias ? bias + layer.first : nullptr, terms, l > 0 ? 2 : 1);
}

// o = P_out + h_K w^T + b_out, or o'.
template <class T>
static void output_preactivation(const Network<T>& net, T* o, const Term<T>& skip, const T* h_last, const T* bias,
                                 int64_t lanes) {
  const int64_t last = net.hidden[net.layers - 1].width;
  const Term<T> terms[2] = {from_unit(skip, net.units), {net.weights[net.layers - 1], last, h_last, last}};
  multiply<Order::rows>(o, 1, lanes, bias ? bias + net.units : nullptr, terms, 2);
}

// g_{k-1} = D_k W_k, from hidden layer l to the one below; d starts at unit 0.
template <class T>
static void adjoint_below(const Network<T>& net, int64_t l, T* g, const T* d, int64_t lanes) {
  const auto& layer = net.hidden[l];
  const int64_t below = net.hidden[l - 1].width;
  multiply<Order::columns>(g, below, lanes, Term<T>{net.weights[l - 1], below, d + layer.first * lanes, layer.width});
}

// Rows of T = D A + L y, or of its derivative; `panel` (d, lanes) is overwritten. The product comes first, because a
// sum that starts from L y would be rounded at its size: "The quadratic term after the product" in benchmarks/NOTES.md.
template <class T>
static void store_map(const Network<T>& net, T* rows, const T* d, const T* y, T* panel, const Tile& tile) {
  multiply<Order::columns>(panel, net.width, tile.lanes, Term<T>{net.skip_weight, net.width, d, net.units + 1});
  const T constant = net.inverse_lipschitz;
  const int64_t n = embedded_units(net) * tile.lanes;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) panel[i] += constant * y[i];
  store_rows(rows, panel, net.width, tile);
}

template <class T>
ILVAE_INLINE bool linear_output(const Network<T>& net) {
  return net.output_activation.kind == ActivationKind::identity;
}

// --- First order: potential and map
// -----------------------------------------------------------------------------------

// Panels of map_tile, with their units.
template <class T>
struct FirstOrder {
  T* x;                // (m)
  T *below, *current;  // (max n_k): h of the layer below; a, h or g of the layer at hand
  T* d;                // (S+1): s' on the way up, D from the turn on
  T* o;                // (1): o, then G
  T* y;                // (d): B x, with a dense embedding
  T* map;              // (d)
  T *saved_a,
      *saved_g;  // what this tile leaves to the backward pass: panels of [a_1 .. a_K o], [g_1 .. g_{K-1}], or null
};

template <class T, class Allocator>
ILVAE_INLINE FirstOrder<T> first_order_layout(const Network<T>& net, Allocator& scratch) {
  FirstOrder<T> panels{};
  panels.x = scratch.take(net.input);
  panels.below = scratch.take(net.widest);
  panels.current = scratch.take(net.widest);
  panels.d = scratch.take(net.units + 1);
  panels.o = scratch.take(1);
  panels.y = scratch.take(net.embedding ? net.width : 0);
  panels.map = scratch.take(net.width);
  return panels;
}

// Hidden layer l on the way up: a_k, then h_k and s'_k as far as they are needed.
template <class T>
static void up(const Network<T>& net, FirstOrder<T>& panels, int64_t l, bool need_h, bool need_slope, int64_t lanes) {
  const auto& layer = net.hidden[l];
  T* const h = panels.current;
  T* const a = panels.saved_a ? panels.saved_a + layer.first * lanes : h;
  preactivation(net, l, a, skip_term(net, panels.x), panels.below, net.bias, lanes);
  T* const slope = panels.d + layer.first * lanes;
  const int64_t n = layer.width * lanes;
  for_activation<T>(layer.activation, [&](const auto& s) {
    if (!need_slope) {
      activate(s, a, n, [&](int64_t i, const auto& at) { at.value.store(h + i); });
    } else if (!need_h) {
      activate(s, a, n, [&](int64_t i, const auto& at) { at.first.store(slope + i); });
    } else {
      activate(s, a, n, [&](int64_t i, const auto& at) {
        at.value.store(h + i);
        at.first.store(slope + i);
      });
    }
  });
  panels.current = panels.below;
  panels.below = h;
}

// The output unit: o, G = s_out(o) and D_out = s_out'(o). Where nobody needs o, s_out is linear and D_out is 1.
template <class T>
static void turn(const Network<T>& net, FirstOrder<T>& panels, bool need_o, int64_t lanes) {
  T *const o = panels.o, *const d_out = panels.d + net.units * lanes;
  if (!need_o) {
    for (int64_t r = 0; r < lanes; ++r) d_out[r] = T(1);
    return;
  }
  output_preactivation(net, o, skip_term(net, panels.x), panels.below, net.bias, lanes);
  if (panels.saved_a) {
    for (int64_t r = 0; r < lanes; ++r) panels.saved_a[net.units * lanes + r] = o[r];
  }
  for_activation<T>(net.output_activation, [&](const auto& s) {
    activate(s, o, lanes, [&](int64_t r, const auto& at) {
      at.value.store(o + r);
      at.first.store(d_out + r);
    });
  });
}

// Hidden layer l on the way down: D_k = g_k s'_k.
template <class T>
static void down(const Network<T>& net, FirstOrder<T>& panels, int64_t l, int64_t lanes) {
  const auto& layer = net.hidden[l];
  T* const d = panels.d + layer.first * lanes;
  if (l == net.layers - 1) {  // g_K = D_out w
    const T *const w = net.weights[l], *const d_out = panels.d + net.units * lanes;
    for (int64_t j = 0; j < layer.width; ++j) {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) d[j * lanes + r] *= d_out[r] * w[j];
    }
    return;
  }
  T* const g = panels.saved_g ? panels.saved_g + layer.first * lanes : panels.current;
  adjoint_below(net, l + 1, g, panels.d, lanes);
  const int64_t n = layer.width * lanes;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) d[i] *= g[i];
}

// phi = G + L/2 |y|^2 of the tile's rows; `sum` (1, lanes) is overwritten.
template <class T>
static void store_potential(const Network<T>& net, T* potential, const T* value, const T* y, T* sum, const Tile& tile) {
  const int64_t lanes = tile.lanes;
  for (int64_t r = 0; r < lanes; ++r) sum[r] = T(0);
  for (int64_t j = 0; j < embedded_units(net); ++j) {
#pragma omp simd
    for (int64_t r = 0; r < lanes; ++r) sum[r] += y[j * lanes + r] * y[j * lanes + r];
  }
  const T half = net.inverse_lipschitz / 2;
  for (int64_t r = 0; r < tile.rows; ++r) potential[tile.first_row + r] = value[r] + half * sum[r];
}

template <class T>
static void map_tile(const Network<T>& net, const MapArguments<T>& call, const Tile& tile,
                     const ScratchMemory<T>& memory) {
  const int64_t lanes = tile.lanes, last = net.layers - 1;
  Scratch<T> scratch(memory, lanes);
  auto panels = first_order_layout(net, scratch);
  if (call.preactivations) panels.saved_a = call.preactivations + tile.first_row * (net.units + 1);
  if (call.adjoints) panels.saved_g = call.adjoints + tile.first_row * (net.units - net.hidden[last].width);
  const bool need_o = call.potential || call.preactivations || !linear_output(net);

  load_rows(panels.x, call.x, net.input, tile, true);
  for (int64_t l = 0; l <= last; ++l) up(net, panels, l, l < last || need_o, call.map != nullptr, lanes);
  turn(net, panels, need_o, lanes);
  const T* const y = embedded(net, panels.x, lanes, panels.y);
  if (call.potential) store_potential(net, call.potential, panels.o, y, panels.current, tile);
  if (!call.map) return;
  for (int64_t l = last; l >= 0; --l) down(net, panels, l, lanes);
  store_map(net, call.map, panels.d, y, panels.map, tile);
}

template <class T>
static int64_t map_scratch(const Network<T>& net) {
  ScratchSize<T> size;
  first_order_layout(net, size);
  return size.elements();
}

// --- Second order: training terms and JVP
// -----------------------------------------------------------------------------

// Panels of training_tile and jvp_tile, with their units; what they point to may be scratch, saved or kept.
template <class T>
struct SecondOrder {
  T* x;                                                  // (m)
  T* v;                                                  // (d), or (m) as a tangent of x; null: no tangent
  T* u;                                                  // (1)
  Term<T> skip_tangent;                                  // P', from v
  T *below, *current, *below_tangent, *current_tangent;  // (max n_k): as in FirstOrder, and the same of a', h' and g'
  T *o, *o_tangent;                                      // (1)
  // (S+1): s' and s'' a' on the way up, D and D' from the turn on. Without a tangent there is D' = u D alone, and both
  // are the same panel.
  T *d, *d_tangent;
  const T *saved_a, *saved_g;  // as the map of this tile saved them, or null: they are recomputed
  T *y, *result;               // (d): B x, with a dense embedding; T, T' or grad_x
  T *pulled, *pulled_back;     // (d), (m): v + u B x, and, with a dense embedding, its product with B^T
};

template <class T, class Allocator>
ILVAE_INLINE SecondOrder<T> second_order_layout(const Network<T>& net, Allocator& scratch) {
  SecondOrder<T> panels{};
  panels.below = scratch.take(net.widest);
  panels.current = scratch.take(net.widest);
  panels.below_tangent = scratch.take(net.widest);
  panels.current_tangent = scratch.take(net.widest);
  panels.o = scratch.take(1);
  panels.o_tangent = scratch.take(1);
  panels.x = scratch.take(net.input);
  panels.v = scratch.take(net.width);
  panels.u = scratch.take(1);
  panels.d_tangent = scratch.take(net.units + 1);
  panels.d = scratch.take(net.units + 1);
  panels.y = scratch.take(net.embedding ? net.width : 0);
  panels.result = scratch.take(net.width);
  panels.pulled = scratch.take(embedded_units(net));
  panels.pulled_back = scratch.take(net.embedding ? net.input : 0);
  return panels;
}

// s' in `slope`, and h where it is not null; h may be a.
template <class T>
static void activate_values(Activation activation, const T* a, int64_t n, T* h, T* slope) {
  for_activation<T>(activation, [&](const auto& s) {
    const auto with = [&](auto with_h) {
      activate(s, a, n, [&](int64_t i, const auto& at) {
        if constexpr (with_h) at.value.store(h + i);
        at.first.store(slope + i);
      });
    };
    h ? with(std::true_type()) : with(std::false_type());
  });
}

// The same, and with the tangent a' in h_tangent: s'' a' in `bend`, and, with need_h_tangent, h' = s' a' in place of
// a'.
template <class T>
static void activate_tangents(Activation activation, const T* a, int64_t n, T* h, T* slope, T* h_tangent, T* bend,
                              bool need_h_tangent) {
  for_activation<T>(activation, [&](const auto& s) {
    const auto with = [&](auto with_h, auto with_h_tangent) {
      activate(s, a, n, [&]<class V>(int64_t i, const Derivatives<V>& at) {
        const V a_tangent = V::load(h_tangent + i);
        (at.second * a_tangent).store(bend + i);
        at.first.store(slope + i);
        if constexpr (with_h_tangent) (at.first * a_tangent).store(h_tangent + i);
        if constexpr (with_h) at.value.store(h + i);
      });
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (h) {
      with(yes, yes);
    } else {
      need_h_tangent ? with(no, yes) : with(no, no);
    }
  });
}

// Hidden layer l on the way up: a_k and a'_k, then s', s'' a', and h and h' as far as they are needed or kept.
template <class T>
static void up(const Network<T>& net, SecondOrder<T>& panels, int64_t l, const Operands<T>& kept, const Tile& tile) {
  const int64_t lanes = tile.lanes;
  const auto& layer = net.hidden[l];
  const bool last = l == net.layers - 1, tangent = panels.v != nullptr, saved = panels.saved_a != nullptr;
  T* const kept_h = kept.h ? kept.h[l] : nullptr;
  T* const kept_h_tangent = kept.h_tangent ? kept.h_tangent[l] : nullptr;
  // h_K and h'_K are kept in panels, so that they are written where they are kept
  T* const h = last && kept_h ? kept_h + tile.offset * layer.width : panels.current;
  T* const h_tangent = last && kept_h_tangent ? kept_h_tangent + tile.offset * layer.width : panels.current_tangent;

  if (!saved) preactivation(net, l, h, skip_term<T>(net, panels.x), panels.below, net.bias, lanes);
  if (tangent) {
    const T* const no_bias = nullptr;
    preactivation(net, l, h_tangent, panels.skip_tangent, panels.below_tangent, no_bias, lanes);
  }
  const T* const a = saved ? panels.saved_a + layer.first * lanes : h;
  T *const slope = panels.d + layer.first * lanes, *const bend = panels.d_tangent + layer.first * lanes;
  const bool passed_on = !last || !linear_output(net);
  const bool need_h = kept_h || (!saved && passed_on), need_h_tangent = kept_h_tangent || passed_on;
  const int64_t n = layer.width * lanes;
  if (tangent) {
    activate_tangents(layer.activation, a, n, need_h ? h : nullptr, slope, h_tangent, bend, need_h_tangent);
  } else {
    activate_values(layer.activation, a, n, need_h ? h : nullptr, slope);
  }

  if (kept_h && !last) {
    const int64_t at = tile.offset * row_panel_elements<T>(layer.width, 1);
    repack_as_row_panels(kept_h + at, h, layer.width, lanes);
    if (tangent) repack_as_row_panels(kept_h_tangent + at, h_tangent, layer.width, lanes);
  }
  panels.current = panels.below;
  panels.below = h;
  panels.current_tangent = panels.below_tangent;
  panels.below_tangent = h_tangent;
}

// The output unit: D_out = s_out'(o) and D'_out = s_out''(o) o' + u s_out'(o).
template <class T>
static void turn(const Network<T>& net, SecondOrder<T>& panels, int64_t lanes) {
  T *const d_out = panels.d + net.units * lanes, *const d_out_tangent = panels.d_tangent + net.units * lanes;
  const T* const u = panels.u;
  if (linear_output(net)) {
    for (int64_t r = 0; r < lanes; ++r) {
      d_out[r] = T(1);
      d_out_tangent[r] = u[r];
    }
    return;
  }
  T *const o = panels.o, *const o_tangent = panels.o_tangent;
  if (panels.saved_a) {
    for (int64_t r = 0; r < lanes; ++r) o[r] = panels.saved_a[net.units * lanes + r];
  } else {
    output_preactivation(net, o, skip_term<T>(net, panels.x), panels.below, net.bias, lanes);
  }
  if (panels.v) {
    const T* const no_bias = nullptr;
    output_preactivation(net, o_tangent, panels.skip_tangent, panels.below_tangent, no_bias, lanes);
  } else {
    for (int64_t r = 0; r < lanes; ++r) o_tangent[r] = T(0);
  }
  for_activation<T>(net.output_activation, [&](const auto& s) {
    activate(s, o, lanes, [&]<class V>(int64_t r, const Derivatives<V>& at) {
      at.first.store(d_out + r);
      (at.second * V::load(o_tangent + r) + V::load(u + r) * at.first).store(d_out_tangent + r);
    });
  });
}

// The last hidden layer on the way down, where g_K = D_out w and g'_K = D'_out w.
template <class T>
static void down_from_output(const Network<T>& net, SecondOrder<T>& panels, int64_t lanes) {
  const auto& layer = net.hidden[net.layers - 1];
  const T* const w = net.weights[net.layers - 1];
  const T *const d_out = panels.d + net.units * lanes, *const d_out_tangent = panels.d_tangent + net.units * lanes;
  for (int64_t j = 0; j < layer.width; ++j) {
    T *const d = panels.d + (layer.first + j) * lanes, *const d_tangent = panels.d_tangent + (layer.first + j) * lanes;
    if (panels.v) {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) {
        d_tangent[r] = (d_out_tangent[r] * d[r] + d_out[r] * d_tangent[r]) * w[j];
        d[r] *= d_out[r] * w[j];
      }
    } else {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) d[r] *= d_out_tangent[r] * w[j];
    }
  }
}

// Any other hidden layer l on the way down: D'_k = g'_k s' + g_k s'' a' and D_k = g_k s'.
template <class T>
static void down(const Network<T>& net, SecondOrder<T>& panels, int64_t l, int64_t lanes) {
  const auto& layer = net.hidden[l];
  const int64_t n = layer.width * lanes;
  T *const d = panels.d + layer.first * lanes, *const d_tangent = panels.d_tangent + layer.first * lanes;
  T *const own_g = panels.current, *const g_tangent = panels.current_tangent;
  if (!panels.v) {
    adjoint_below(net, l + 1, own_g, panels.d, lanes);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) d[i] *= own_g[i];
    return;
  }
  const T* const g = panels.saved_g ? panels.saved_g + layer.first * lanes : own_g;
  if (!panels.saved_g) adjoint_below(net, l + 1, own_g, panels.d, lanes);
  adjoint_below(net, l + 1, g_tangent, panels.d_tangent, lanes);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    d_tangent[i] = g_tangent[i] * d[i] + g[i] * d_tangent[i];
    d[i] *= g[i];
  }
}

// All steps, down to hidden layer `lowest`.
template <class T>
static void sweep(const Network<T>& net, SecondOrder<T> panels, const Operands<T>& kept, int64_t lowest,
                  const Tile& tile) {
  const int64_t last = net.layers - 1;
  for (int64_t l = 0; l <= last; ++l) up(net, panels, l, kept, tile);
  turn(net, panels, tile.lanes);
  if (last >= lowest) down_from_output(net, panels, tile.lanes);
  for (int64_t l = last - 1; l >= lowest; --l) down(net, panels, l, tile.lanes);
}

// The tile's part of grad_L = sum <v, y> + u/2 |y|^2; `sum` (1, lanes) is overwritten.
template <class T>
static T constant_term(const Network<T>& net, const SecondOrder<T>& panels, const T* y, T* sum, int64_t lanes) {
  const T* const u = panels.u;
  for (int64_t r = 0; r < lanes; ++r) sum[r] = T(0);
  for (int64_t j = 0; j < embedded_units(net); ++j) {
    const T* const y_row = y + j * lanes;
    if (panels.v) {
      const T* const v_row = panels.v + j * lanes;
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) sum[r] += y_row[r] * (v_row[r] + u[r] / 2 * y_row[r]);
    } else {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) sum[r] += y_row[r] * (u[r] / 2 * y_row[r]);
    }
  }
  T total = 0;
  for (int64_t r = 0; r < lanes; ++r) total += sum[r];
  return total;
}

// Rows of grad_x = D' A B + L B^T (v + u y).
template <class T>
static void store_input_gradient(const Network<T>& net, T* grad_x, const SecondOrder<T>& panels, const T* y,
                                 const Tile& tile) {
  const int64_t lanes = tile.lanes;
  T* const gradient = panels.result;
  multiply<Order::columns>(gradient, net.input, lanes,
                           Term<T>{net.embedded_weight, net.embedded_stride, panels.d_tangent, net.units + 1});
  T* const pulled = panels.pulled;
  const T *const u = panels.u, *const v = panels.v;
  for (int64_t j = 0; j < embedded_units(net); ++j) {
    if (v) {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) pulled[j * lanes + r] = v[j * lanes + r] + u[r] * y[j * lanes + r];
    } else {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) pulled[j * lanes + r] = u[r] * y[j * lanes + r];
    }
  }
  if (net.embedding) {
    multiply<Order::columns>(panels.pulled_back, net.input, lanes,
                             Term<T>{net.embedding, net.input, pulled, net.width});
  }
  const T* const back = net.embedding ? panels.pulled_back : pulled;
  const T constant = net.inverse_lipschitz;
  const int64_t n = net.input * lanes;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) gradient[i] += constant * back[i];
  store_rows(grad_x, gradient, net.input, tile);
}

// Puts those panels that are operands of the weight gradients where they are kept.
template <class T>
static void keep(const Network<T>& net, SecondOrder<T>& panels, const Operands<T>& kept, const Tile& tile) {
  const bool narrow = net.width <= narrow_width;
  if (kept.x && narrow) panels.x = kept.x + tile.offset * net.input;
  if (kept.v && narrow) panels.v = kept.v + tile.offset * net.width;
  if (kept.d_tangent) panels.d_tangent = kept.d_tangent + tile.offset * (net.units + 1);
  if (kept.d) panels.d = kept.d + tile.offset * (net.units + 1);
}

template <class T>
static void load_training_rows(const Network<T>& net, const TrainingArguments<T>& call, SecondOrder<T>& panels,
                               const Operands<T>& kept, const Tile& tile) {
  load_rows(panels.x, call.x, net.input, tile, true);
  if (panels.v) load_rows(panels.v, call.map_cotangent, net.width, tile);
  for (int64_t r = 0; r < tile.lanes; ++r) {
    panels.u[r] = call.potential_cotangent && r < tile.rows ? call.potential_cotangent[tile.first_row + r] : T(0);
  }
  if (net.width <= narrow_width) return;  // x and v are kept as they are
  if (kept.x) {
    const int64_t columns = net.embedding ? net.input : net.width;
    T* const row_panels = kept.x + tile.offset * row_panel_elements<T>(columns, 1);
    load_as_row_panels(row_panels, columns, call.x, net.input, tile);
  }
  if (kept.v) {
    T* const row_panels = kept.v + tile.offset * row_panel_elements<T>(net.width, 1);
    load_as_row_panels(row_panels, net.width, call.map_cotangent, net.width, tile);
  }
}

template <class T>
static void training_tile(const Network<T>& net, const TrainingArguments<T>& call, const Operands<T>& kept,
                          const Tile& tile, const ScratchMemory<T>& memory) {
  Scratch<T> scratch(memory, tile.lanes);
  auto panels = second_order_layout(net, scratch);
  keep(net, panels, kept, tile);
  if (!call.map_cotangent) {
    panels.v = nullptr;
    panels.d = panels.d_tangent;
  }
  panels.skip_tangent = {net.skip_weight, net.width, panels.v, net.width};
  if (call.preactivations) panels.saved_a = call.preactivations + tile.first_row * (net.units + 1);
  if (call.adjoints) {
    panels.saved_g = call.adjoints + tile.first_row * (net.units - net.hidden[net.layers - 1].width);
  }
  load_training_rows(net, call, panels, kept, tile);
  if (call.grad_x || kept.d_tangent) sweep(net, panels, kept, call.lowest, tile);

  if (!call.grad_x && !kept.constant_terms) return;
  const T* const y = embedded(net, panels.x, tile.lanes, panels.y);
  if (kept.constant_terms) kept.constant_terms[tile.index] = constant_term(net, panels, y, panels.o, tile.lanes);
  if (call.grad_x) store_input_gradient(net, call.grad_x, panels, y, tile);
}

template <class T>
static void jvp_tile(const Network<T>& net, const JvpArguments<T>& call, const Tile& tile,
                     const ScratchMemory<T>& memory) {
  const int64_t lanes = tile.lanes;
  Scratch<T> scratch(memory, lanes);
  auto panels = second_order_layout(net, scratch);
  load_rows(panels.x, call.x, net.input, tile, true);
  load_rows(panels.v, call.tangent, net.input, tile);
  for (int64_t r = 0; r < lanes; ++r) panels.u[r] = T(0);
  panels.skip_tangent = skip_term<T>(net, panels.v);
  sweep(net, panels, Operands<T>{}, 0, tile);
  store_map(net, call.map, panels.d, embedded<T>(net, panels.x, lanes, panels.y), panels.result, tile);
  store_map(net, call.map_tangent, panels.d_tangent, embedded<T>(net, panels.v, lanes, panels.y), panels.result, tile);
}

// Enough for training_tile and jvp_tile.
template <class T>
static int64_t training_scratch(const Network<T>& net) {
  ScratchSize<T> size;
  second_order_layout(net, size);
  return size.elements();
}

template <class T>
static constexpr FusedKernels<T> kernels_of() {
  return {.tile_lanes = tile_lanes<T>,
          .panel_columns = panel_columns<T>,
          .vector_lanes = lanes_of<T>,
          .map_scratch = map_scratch<T>,
          .training_scratch = training_scratch<T>,
          .map = map_tile<T>,
          .training = training_tile<T>,
          .jvp = jvp_tile<T>,
          .weight_gradient = weight_gradient<T>,
          .sum_rows = sum_rows<T>};
}

extern const AllFusedKernels fused_kernels{kernels_of<double>(), kernels_of<float>()};

}  // namespace ilvae::cpu::ILVAE_ISA
