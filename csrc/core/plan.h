// Which route a shape takes and what it costs: a pure function of sizes, host only.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/layout.h"

namespace ilvae {

// As in ilvae_fast/_backend.py.
enum class Route : int { automatic = 0, matmul = 1, fused = 2 };

// How the fused kernels of a CUDA device meet a network.
struct Fit {
  std::string refusal;  // why they do not take it; empty: they do
  std::string slower;   // why the matmul route is predicted to be faster; empty: it is not
  std::string how;      // how they do it
};

// What the choice of a route depends on. With autograd that is not the batch, so that a compiled region can leave it
// open.
struct Layers {
  std::span<const int64_t> widths;  // n_1 .. n_K
  bool full_precision = true;       // operands of products in float32 or float64
  bool cuda = false;                // on a CUDA device, with
  Fit fit = {};
};

struct Choice {
  Route route;
  bool recompute;      // nothing is saved between forward and backward but inputs
  bool asked = false;  // the caller named the route
  std::string reason;  // on CUDA devices; words() has the others, which a call does not build
};

// Above this many hidden weights recomputing the sweep costs more than saving it is worth
// (docs/internals/cpu.md#recompute-or-save).
inline constexpr int64_t recompute_weights = 8192;

// The map alone, without autograd, of so few rows of a network with so many parameters only streams the weights. On the
// CPU all threads do that faster together, one product after the other: it takes the matmul route.
inline bool few_rows(int64_t rows, int64_t parameters) { return rows <= 8 && parameters >= (int64_t(1) << 17); }

// The elements of W_2 .. W_K.
inline int64_t hidden_weights(std::span<const int64_t> widths) {
  int64_t count = 0;
  for (size_t k = 1; k < widths.size(); ++k) count += widths[k] * widths[k - 1];
  return count;
}

inline Choice choose(const Layers& layers, Route wanted, std::optional<bool> recompute) {
  const bool asked = wanted != Route::automatic;
  if (wanted == Route::matmul) return {wanted, recompute.value_or(false), asked, {}};
  if (layers.cuda) {
    const auto& fit = layers.fit;
    const auto& against = fit.refusal.empty() && !asked ? fit.slower : fit.refusal;
    if (!against.empty()) return {Route::matmul, recompute.value_or(false), false, against};
    return {Route::fused, true, asked, fit.how};
  }
  if (!layers.full_precision) return {Route::matmul, recompute.value_or(false), false, {}};
  return {Route::fused, recompute.value_or(hidden_weights(layers.widths) <= recompute_weights), asked, {}};
}

// Why a choice is as it is.
inline std::string words(const Choice& choice) {
  std::string reason = choice.reason;
  if (reason.empty() && !choice.asked) {
    reason =
        choice.route == Route::fused ? "float32 and float64 on the CPU" : "bfloat16 products have units of their own";
  }
  if (!choice.asked) return reason;
  return reason.empty() ? "asked for" : "asked for; " + reason;
}

struct Shape {
  int64_t rows = 0, input = 0, width = 0;  // N, m, d
  std::vector<int64_t> widths;             // n_1 .. n_K
  bool dense = false;                      // a dense embedding: A B is formed once per call
  int64_t real_bytes = 4;                  // of what is saved: 8 for float64, else 4
  int64_t operand_bytes = 4;               // of the operands of products
  bool cuda = false;                       // as in Layers
  Fit fit = {};
};

struct Plan {
  std::string route, reason;
  bool recompute = false;
  double map_flops = 0, training_flops = 0;  // multiply-adds counted as two; the pointwise steps are not counted
  int64_t saved_bytes = 0;                   // from forward to backward, besides inputs and weights
  bool few_rows = false;                     // the map alone, without autograd, takes the matmul route: few_rows()
};

inline Plan plan(const Shape& s, Route wanted, std::optional<bool> recompute) {
  int64_t units = 0, hidden = 0;  // S, sum n_k n_{k-1} + n_K
  for (size_t k = 0; k < s.widths.size(); ++k) {
    units += s.widths[k];
    hidden += s.widths[k] * (k + 1 < s.widths.size() ? s.widths[k + 1] : 1);
  }
  const double n = double(s.rows), skip_in = double(s.input) * (units + 1), skip_out = double(s.width) * (units + 1);
  const double embedding = s.dense ? 2.0 * s.width * skip_in : 0;  // A B
  const auto choice = choose({s.widths, s.operand_bytes >= 4, s.cuda, s.fit}, wanted, recompute);
  Plan p;
  p.route = choice.route == Route::fused ? "fused" : "matmul";
  p.reason = words(choice);
  p.recompute = choice.recompute;
  p.few_rows = wanted == Route::automatic && choice.route == Route::fused && !s.cuda &&
               few_rows(s.rows, hidden + s.width * (units + 1));
  // up with P = x (A B)^T, down with T = D A
  p.map_flops = 2 * n * (skip_in + skip_out + 2 * hidden) + embedding;
  // tangents up with P' = v A^T, adjoints down with D' A B, then D'^T x (m wide) and D^T v (d wide) and the
  // two-term gradients of the hidden weights; B^T once more for a dense embedding
  p.training_flops = 2 * n * (2 * skip_in + 2 * skip_out + 4 * hidden) + 2 * embedding;
  if (p.recompute) {
    p.training_flops += p.map_flops;
  } else {
    const bool fused = choice.route == Route::fused;
    const int64_t rows = fused ? padded_rows(s.rows) : s.rows;
    const int64_t columns = fused ? units + 1 : padded_units(units);
    p.saved_bytes = (s.cuda ? s.operand_bytes : s.real_bytes) * rows * (columns + units - s.widths.back()) +
                    (s.dense ? s.operand_bytes * (units + 1) * s.input : 0);
  }
  return p;
}

}  // namespace ilvae
