// The sweeps of the design on one tile of rows, written once and compiled for each instruction set (fused_*.cpp define
// ILVAE_ISA and set the flags). Array layouts are in fused.h.
//
// As in pointwise_rows.h nothing here may leave an inline function with external linkage in the object file.
#include "cpu/fused.h"
#include "cpu/panels.h"
#include "cpu/weight_gradients.h"

namespace ilvae::cpu::ILVAE_ISA {

// Scratch memory of a tile, handed out front to back.
template <class T>
struct Scratch {
  T* next;
  ILVAE_INLINE T* take(Scratch& s, int64_t elements) {
    T* const p = s.next;
    s.next += elements;
    return p;
  }
};

// target (columns, lanes) = transposed rows of the batch; beyond them zero, or, for x, its last row again: a network is
// as finite there as it is on the batch, so that its zero adjoints do not meet an infinity.
template <class T>
static void load_rows(T* target, const T* rows, int64_t columns, const Tile& tile, bool repeat_last = false) {
  transpose(target, tile.lanes, rows + tile.first_row * columns, columns, tile.rows, columns);
  if (tile.rows == tile.lanes) return;
  for (int64_t j = 0; j < columns; ++j) {
    T* const row = target + j * tile.lanes;
    const T filling = repeat_last ? row[tile.rows - 1] : T(0);
    for (int64_t r = tile.rows; r < tile.lanes; ++r) row[r] = filling;
  }
}

template <class T>
static void store_rows(T* rows, const T* source, int64_t columns, const Tile& tile) {
  transpose(rows + tile.first_row * columns, columns, source, tile.lanes, columns, tile.rows);
}

// Row panels from a panel (units, lanes).
template <class T>
static void turn_panel(T* target, const T* source, int64_t units, int64_t lanes) {
  for (int64_t p = 0; p * panel_columns<T> < units; ++p) {
    const int64_t first = p * panel_columns<T>, width = padded_columns<T>(units, p);
    const int64_t valid = units - first < width ? units - first : width;
    T* const panel = target + first * lanes;
    if (valid < width) {
      for (int64_t r = 0; r < lanes; ++r) {
        for (int64_t j = valid; j < width; ++j) panel[r * width + j] = T(0);
      }
    }
    transpose(panel, width, source + first * lanes, lanes, valid, lanes);
  }
}

// Row panels, laid out for `columns` columns, from rows (N, valid_columns) of the batch.
template <class T>
static void pack_rows(T* target, int64_t columns, const T* rows, int64_t valid_columns, const Tile& tile) {
  for (int64_t p = 0; p * panel_columns<T> < valid_columns; ++p) {
    const int64_t first = p * panel_columns<T>, width = padded_columns<T>(columns, p);
    const int64_t valid = valid_columns - first < width ? valid_columns - first : width;
    T* const panel = target + first * tile.lanes;
    for (int64_t r = 0; r < tile.lanes; ++r) {
      const T* const row = rows + (tile.first_row + r) * valid_columns + first;
      const int64_t copied = r < tile.rows ? valid : 0;
      for (int64_t j = 0; j < copied; ++j) panel[r * width + j] = row[j];
      for (int64_t j = copied; j < width; ++j) panel[r * width + j] = T(0);
    }
  }
}

// y (d, lanes) = B x: x itself in the first m units of y where B is the padded identity.
template <class T>
static const T* embedded(const Network<T>& net, const T* x, int64_t lanes, T* y) {
  if (!net.embedding) return x;
  const Term<T> term{net.embedding, net.input, x, net.input};
  multiply<Order::rows>(lanes, y, lanes, net.width, static_cast<const T*>(nullptr), false, &term, 1);
  return y;
}
template <class T>
ILVAE_INLINE int64_t embedded_units(const Network<T>& net) {
  return net.embedding ? net.width : net.input;
}

// a_k = P_k + h_{k-1} W_k^T for layer l, or with `tangent` (no bias) a'_k; `skip`, the left factor of P, is A or A B.
template <class T>
static void preactivation(const Network<T>& net, int64_t l, T* a, const T* skip, int64_t skip_stride, const T* x,
                          int64_t depth, const T* h, bool tangent, int64_t lanes) {
  const auto& layer = net.hidden[l];
  Term<T> terms[2] = {{skip + layer.first * skip_stride, skip_stride, x, depth}, {}};
  if (l > 0) {
    const int64_t below = net.hidden[l - 1].width;
    terms[1] = {net.weights[l - 1], below, h, below};
  }
  multiply<Order::rows>(lanes, a, lanes, layer.width, tangent ? nullptr : net.bias + layer.first, false, terms,
                        l > 0 ? 2 : 1);
}

// o = A_out x + h_K w^T + b_out
template <class T>
static void output_preactivation(const Network<T>& net, T* o, const T* skip, int64_t skip_stride, const T* x,
                                 int64_t depth, const T* h, bool tangent, int64_t lanes) {
  const int64_t last = net.hidden[net.layers - 1].width;
  const Term<T> terms[2] = {{skip + net.units * skip_stride, skip_stride, x, depth},
                            {net.weights[net.layers - 1], last, h, last}};
  multiply<Order::rows>(lanes, o, lanes, 1, tangent ? nullptr : net.bias + net.units, false, terms, 2);
}

// g_{k-1} = D_k W_k, from layer l to the one below.
template <class T>
static void adjoint_below(const Network<T>& net, int64_t l, T* g, const T* d, int64_t lanes) {
  const int64_t below = net.hidden[l - 1].width;
  const Term<T> term{net.weights[l - 1], below, d, net.hidden[l].width};
  multiply<Order::columns>(lanes, g, lanes, below, static_cast<const T*>(nullptr), false, &term, 1);
}

// Rows of T = D A + L y, or of its derivative. The product comes first: see benchmarks/NOTES.md.
template <class T>
static void store_map(const Network<T>& net, T* rows, const T* d, const T* y, T* t, const Tile& tile) {
  const Term<T> term{net.skip_weight, net.width, d, net.units + 1};
  multiply<Order::columns>(tile.lanes, t, tile.lanes, net.width, static_cast<const T*>(nullptr), false, &term, 1);
  const T constant = net.inverse_lipschitz;
  const int64_t n = embedded_units(net) * tile.lanes;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) t[i] += constant * y[i];
  store_rows(rows, t, net.width, tile);
}

template <class T>
static void map_tile(const Network<T>& net, const MapArguments<T>& c, const Tile& tile, T* memory) {
  const int64_t lanes = tile.lanes, last = net.layers - 1;
  Scratch<T> scratch{memory};
  const auto take = [&](int64_t units) { return Scratch<T>::take(scratch, units * lanes); };
  T* const x = take(net.input);
  T *below = take(net.widest), *current = take(net.widest);
  T* const d = take(net.units + 1);  // s'_k on the way up, D_k on the way down
  T *const o = take(1), *const out = take(net.width);
  const bool saves = c.preactivations != nullptr;
  T* const saved = saves ? c.preactivations + tile.first_row * (net.units + 1) : nullptr;
  T* const saved_g = c.adjoints ? c.adjoints + tile.first_row * (net.units - net.hidden[last].width) : nullptr;
  const bool linear_output = net.output_activation.kind == ActivationKind::identity;
  const bool need_o = c.potential || saves || !linear_output;

  load_rows(x, c.x, net.input, tile, true);
  for (int64_t l = 0; l <= last; ++l) {
    const auto& layer = net.hidden[l];
    T* const a = saves ? saved + layer.first * lanes : current;
    preactivation(net, l, a, net.embedded_weight, net.embedded_stride, x, net.input, below, false, lanes);
    T* const h = current;
    T* const slope = d + layer.first * lanes;
    const int64_t n = layer.width * lanes;
    const bool need_h = l < last || need_o;
    for_activation<T>(layer.activation, [&](const auto& s) {
      if (!c.map) {
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
    T* const swap = below;
    below = current;
    current = swap;
  }

  T* const d_out = d + net.units * lanes;
  if (need_o) {
    output_preactivation(net, o, net.embedded_weight, net.embedded_stride, x, net.input, below, false, lanes);
    if (saves) {
      for (int64_t r = 0; r < lanes; ++r) saved[net.units * lanes + r] = o[r];
    }
    for_activation<T>(net.output_activation, [&](const auto& s) {
      activate(s, o, lanes, [&](int64_t r, const auto& at) {
        at.value.store(o + r);
        at.first.store(d_out + r);
      });
    });
  } else {
    for (int64_t r = 0; r < lanes; ++r) d_out[r] = T(1);
  }
  const T* const y = embedded(net, x, lanes, out);
  const int64_t y_units = embedded_units(net);
  if (c.potential) {  // G + L/2 |B x|^2
    T* const sum = current;
    for (int64_t r = 0; r < lanes; ++r) sum[r] = T(0);
    for (int64_t j = 0; j < y_units; ++j) {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) sum[r] += y[j * lanes + r] * y[j * lanes + r];
    }
    const T half = net.inverse_lipschitz / 2;
    for (int64_t r = 0; r < tile.rows; ++r) c.potential[tile.first_row + r] = o[r] + half * sum[r];
  }
  if (!c.map) return;

  for (int64_t l = last; l >= 0; --l) {
    const auto& layer = net.hidden[l];
    T* const d_l = d + layer.first * lanes;
    if (l == last) {
      const T* const w = net.weights[last];
      for (int64_t j = 0; j < layer.width; ++j) {
#pragma omp simd
        for (int64_t r = 0; r < lanes; ++r) d_l[j * lanes + r] *= d_out[r] * w[j];
      }
    } else {
      T* const g = saved_g ? saved_g + layer.first * lanes : current;
      adjoint_below(net, l + 1, g, d + net.hidden[l + 1].first * lanes, lanes);
      const int64_t n = layer.width * lanes;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) d_l[i] *= g[i];
    }
  }

  store_map(net, c.map, d, y, net.embedding ? take(net.width) : out, tile);
}

template <class T>
static int64_t map_scratch(const Network<T>& net) {
  const int64_t units = net.input + 2 * net.widest + net.units + 1 + 1 + net.width * (net.embedding ? 2 : 1);
  return units * tile_lanes<T>;
}

// The panels of a tile between the sweeps and what follows them.
template <class T>
struct SecondOrder {
  const T *x, *v, *u;  // (m), (d) or, for a tangent of x, (m), (1)
  // Before the way down D holds s' and D' holds s'' a'. Without a tangent there is D' = u D alone, in both.
  T *d, *d_tangent;                                      // (S+1)
  T *below, *current, *below_tangent, *current_tangent;  // (max n_k), for what passes from layer to layer
  T *o, *o_tangent;                                      // (1)
};

// The sweeps of the design with tangent v, whose pre-activations are P' = v skip^T; v may be null.
template <class T>
static void sweep(const Network<T>& net, SecondOrder<T> p, const T* skip, int64_t skip_stride, int64_t depth,
                  const T* saved, const T* saved_g, const Operands<T>& kept, int64_t lowest, const Tile& tile) {
  const int64_t lanes = tile.lanes, last = net.layers - 1;
  const bool tangent = p.v != nullptr;
  const bool linear_output = net.output_activation.kind == ActivationKind::identity;

  // Up
  for (int64_t l = 0; l <= last; ++l) {
    const auto& layer = net.hidden[l];
    const int64_t n = layer.width * lanes;
    T* const kept_h = kept.h ? kept.h[l] : nullptr;
    T* const kept_h_tangent = kept.h_tangent ? kept.h_tangent[l] : nullptr;
    T *h = p.current, *h_tangent = p.current_tangent;
    if (l == last && kept_h) h = kept_h + tile.offset * layer.width;
    if (l == last && kept_h_tangent) h_tangent = kept_h_tangent + tile.offset * layer.width;
    const T* a = saved ? saved + layer.first * lanes : h;
    if (!saved)
      preactivation(net, l, h, net.embedded_weight, net.embedded_stride, p.x, net.input, p.below, false, lanes);
    if (tangent) preactivation(net, l, h_tangent, skip, skip_stride, p.v, depth, p.below_tangent, true, lanes);
    T* const slope = p.d + layer.first * lanes;
    T* const bend = p.d_tangent + layer.first * lanes;
    const bool need_h = kept_h || (!saved && (l < last || !linear_output));
    const bool need_h_tangent = kept_h_tangent || l < last || !linear_output;
    for_activation<T>(layer.activation, [&](const auto& s) {
      const auto plain = [&](auto with_h) {
        activate(s, a, n, [&](int64_t i, const auto& at) {
          if constexpr (with_h) at.value.store(h + i);
          at.first.store(slope + i);
        });
      };
      const auto tangents = [&](auto with_h, auto with_h_tangent) {
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
      if (!tangent) {
        need_h ? plain(yes) : plain(no);
      } else if (need_h) {
        tangents(yes, yes);
      } else {
        need_h_tangent ? tangents(no, yes) : tangents(no, no);
      }
    });
    if (kept_h && l < last) {
      const int64_t at = tile.offset * row_panel_elements<T>(layer.width, 1);
      turn_panel(kept_h + at, h, layer.width, lanes);
      if (tangent) turn_panel(kept.h_tangent[l] + at, h_tangent, layer.width, lanes);
    }
    p.current = p.below;
    p.below = h;
    p.current_tangent = p.below_tangent;
    p.below_tangent = h_tangent;
  }

  // The output unit
  T *const d_out = p.d + net.units * lanes, *const d_out_tangent = p.d_tangent + net.units * lanes;
  const T* const u = p.u;
  if (linear_output) {
    for (int64_t r = 0; r < lanes; ++r) {
      d_out[r] = T(1);
      d_out_tangent[r] = u[r];
    }
  } else {
    T *const o = p.o, *const o_tangent = p.o_tangent;
    if (saved) {
      for (int64_t r = 0; r < lanes; ++r) o[r] = saved[net.units * lanes + r];
    } else {
      output_preactivation(net, o, net.embedded_weight, net.embedded_stride, p.x, net.input, p.below, false, lanes);
    }
    if (tangent) {
      output_preactivation(net, o_tangent, skip, skip_stride, p.v, depth, p.below_tangent, true, lanes);
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

  // Down
  for (int64_t l = last; l >= lowest; --l) {
    const auto& layer = net.hidden[l];
    T *const d = p.d + layer.first * lanes, *const d_tangent = p.d_tangent + layer.first * lanes;
    if (l == last) {
      const T* const w = net.weights[last];
      for (int64_t j = 0; j < layer.width; ++j) {
        T *const row = d + j * lanes, *const row_tangent = d_tangent + j * lanes;
        if (tangent) {
#pragma omp simd
          for (int64_t r = 0; r < lanes; ++r) {
            row_tangent[r] = (d_out_tangent[r] * row[r] + d_out[r] * row_tangent[r]) * w[j];
            row[r] *= d_out[r] * w[j];
          }
        } else {
#pragma omp simd
          for (int64_t r = 0; r < lanes; ++r) row[r] *= d_out_tangent[r] * w[j];
        }
      }
      continue;
    }
    const int64_t n = layer.width * lanes;
    const int64_t above = net.hidden[l + 1].first * lanes;
    T *const g_own = p.current, *const g_tangent = p.current_tangent;
    if (tangent) {
      const T* g = saved_g ? saved_g + layer.first * lanes : g_own;
      if (!saved_g) adjoint_below(net, l + 1, g_own, p.d + above, lanes);
      adjoint_below(net, l + 1, g_tangent, p.d_tangent + above, lanes);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        d_tangent[i] = g_tangent[i] * d[i] + g[i] * d_tangent[i];
        d[i] *= g[i];
      }
    } else {
      adjoint_below(net, l + 1, g_own, p.d + above, lanes);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) d[i] *= g_own[i];
    }
  }
}

template <class T, class Take>
ILVAE_INLINE SecondOrder<T> take_panels(const Network<T>& net, const Take& take) {
  SecondOrder<T> p{};
  p.below = take(net.widest);
  p.current = take(net.widest);
  p.below_tangent = take(net.widest);
  p.current_tangent = take(net.widest);
  p.o = take(1);
  p.o_tangent = take(1);
  return p;
}

template <class T>
static void training_tile(const Network<T>& net, const TrainingArguments<T>& c, const Operands<T>& kept,
                          const Tile& tile, T* memory) {
  const int64_t lanes = tile.lanes;
  Scratch<T> scratch{memory};
  const auto take = [&](int64_t units) { return Scratch<T>::take(scratch, units * lanes); };
  const bool tangent = c.map_cotangent != nullptr, narrow = net.width <= narrow_width;
  auto p = take_panels<T>(net, take);
  // x and v are themselves the operands of a narrow gradient
  T* const x = kept.x && narrow ? kept.x + tile.offset * net.input : take(net.input);
  T* const v = !tangent ? nullptr : kept.v && narrow ? kept.v + tile.offset * net.width : take(net.width);
  T* const u = take(1);
  load_rows(x, c.x, net.input, tile, true);
  if (tangent) load_rows(v, c.map_cotangent, net.width, tile);
  for (int64_t r = 0; r < lanes; ++r) {
    u[r] = c.potential_cotangent && r < tile.rows ? c.potential_cotangent[tile.first_row + r] : T(0);
  }
  if (kept.x && !narrow) {
    const int64_t columns = net.embedding ? net.input : net.width;
    pack_rows(kept.x + tile.offset * row_panel_elements<T>(columns, 1), columns, c.x, net.input, tile);
  }
  if (kept.v && !narrow) {
    pack_rows(kept.v + tile.offset * row_panel_elements<T>(net.width, 1), net.width, c.map_cotangent, net.width, tile);
  }
  p.x = x;
  p.v = v;
  p.u = u;
  p.d_tangent = kept.d_tangent ? kept.d_tangent + tile.offset * (net.units + 1) : take(net.units + 1);
  p.d = !tangent ? p.d_tangent : kept.d ? kept.d + tile.offset * (net.units + 1) : take(net.units + 1);
  if (c.grad_x || kept.d_tangent) {
    const T* const saved = c.preactivations ? c.preactivations + tile.first_row * (net.units + 1) : nullptr;
    const int64_t adjoints = net.units - net.hidden[net.layers - 1].width;
    const T* const saved_g = c.adjoints ? c.adjoints + tile.first_row * adjoints : nullptr;
    sweep(net, p, net.skip_weight, net.width, net.width, saved, saved_g, kept, c.lowest, tile);
  }

  // grad_x = D' A B + L B^T (v + u B x), and the tile's part of grad_L = sum <v, B x> + u/2 |B x|^2
  if (!c.grad_x && !kept.constant_terms) return;
  const T* const y = embedded(net, x, lanes, take(net.embedding ? net.width : 0));
  const int64_t y_units = embedded_units(net);
  if (kept.constant_terms) {
    T* const sum = p.o;
    for (int64_t r = 0; r < lanes; ++r) sum[r] = T(0);
    for (int64_t j = 0; j < y_units; ++j) {
      const T *const row = y + j * lanes, *const v_row = v + j * lanes;
      if (tangent) {
#pragma omp simd
        for (int64_t r = 0; r < lanes; ++r) sum[r] += row[r] * (v_row[r] + u[r] / 2 * row[r]);
      } else {
#pragma omp simd
        for (int64_t r = 0; r < lanes; ++r) sum[r] += row[r] * (u[r] / 2 * row[r]);
      }
    }
    T total = 0;
    for (int64_t r = 0; r < lanes; ++r) total += sum[r];
    kept.constant_terms[tile.index] = total;
  }
  if (!c.grad_x) return;
  T *const gradient = take(net.input), *const q = take(y_units);  // q = v + u B x
  const Term<T> term{net.embedded_weight, net.embedded_stride, p.d_tangent, net.units + 1};
  multiply<Order::columns>(lanes, gradient, lanes, net.input, static_cast<const T*>(nullptr), false, &term, 1);
  for (int64_t j = 0; j < y_units; ++j) {
    if (tangent) {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) q[j * lanes + r] = v[j * lanes + r] + u[r] * y[j * lanes + r];
    } else {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) q[j * lanes + r] = u[r] * y[j * lanes + r];
    }
  }
  const T* pulled = q;
  if (net.embedding) {
    T* const back = take(net.input);
    const Term<T> transposed{net.embedding, net.input, q, net.width};
    multiply<Order::columns>(lanes, back, lanes, net.input, static_cast<const T*>(nullptr), false, &transposed, 1);
    pulled = back;
  }
  const T constant = net.inverse_lipschitz;
  const int64_t n = net.input * lanes;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) gradient[i] += constant * pulled[i];
  store_rows(c.grad_x, gradient, net.input, tile);
}

template <class T>
static void jvp_tile(const Network<T>& net, const JvpArguments<T>& c, const Tile& tile, T* memory) {
  const int64_t lanes = tile.lanes;
  Scratch<T> scratch{memory};
  const auto take = [&](int64_t units) { return Scratch<T>::take(scratch, units * lanes); };
  auto p = take_panels<T>(net, take);
  T *const x = take(net.input), *const tangent = take(net.input), *const u = take(1);
  load_rows(x, c.x, net.input, tile, true);
  load_rows(tangent, c.tangent, net.input, tile);
  for (int64_t r = 0; r < lanes; ++r) u[r] = T(0);
  p.x = x;
  p.v = tangent;
  p.u = u;
  p.d = take(net.units + 1);
  p.d_tangent = take(net.units + 1);
  sweep(net, p, net.embedded_weight, net.embedded_stride, net.input, static_cast<const T*>(nullptr),
        static_cast<const T*>(nullptr), Operands<T>{}, 0, tile);
  T *const y = take(net.embedding ? net.width : 0), *const t = take(net.width);
  store_map(net, c.map, p.d, embedded(net, x, lanes, y), t, tile);
  store_map(net, c.map_tangent, p.d_tangent, embedded(net, tangent, lanes, y), t, tile);
}

// Enough for training_tile and jvp_tile.
template <class T>
static int64_t training_scratch(const Network<T>& net) {
  const int64_t units = 4 * net.widest + 2 * (net.units + 1) + 4 * net.input + 3 * net.width + 3;
  return units * tile_lanes<T>;
}

template <class T>
static constexpr FusedKernels<T> kernels_of() {
  return {tile_lanes<T>, panel_columns<T>, lanes_of<T>, map_scratch<T>,     training_scratch<T>,
          map_tile<T>,   training_tile<T>, jvp_tile<T>, weight_gradient<T>, sum_rows<T>};
}

extern const AllFusedKernels fused_kernels{kernels_of<double>(), kernels_of<float>()};

}  // namespace ilvae::cpu::ILVAE_ISA
