// Which route a shape takes and what it costs: a pure function of sizes, host only.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace ilvae {

// As in ilvae_fast/_backend.py.
enum class Route : int { automatic = 0, matmul = 1, fused = 2 };

// How the fused kernels of a CUDA device meet a network.
struct Fit {
  std::string refusal;  // why they do not take it; empty: they do
  std::string slower;   // why the matmul route is predicted to be faster; empty: it is not
  std::string how;      // how they do it
};

// What the choice of a route depends on: not the batch, so that a compiled region can leave that open.
struct Layers {
  std::vector<int64_t> widths;  // n_1 .. n_K
  bool full_precision = true;   // operands of products in float32 or float64
  bool cuda = false;            // on a CUDA device, with
  Fit fit;
};

struct Choice {
  Route route;
  bool recompute;  // nothing is saved between forward and backward but inputs
  std::string reason;
};

// Above this many hidden weights recomputing the sweep costs more than saving it is worth (benchmarks/NOTES.md).
inline constexpr int64_t recompute_weights = 8192;

// On the CPU the map alone of so few rows of a network with so many parameters only streams the weights, which all
// threads do faster together, one product after the other: without autograd it takes the matmul route.
inline bool few_rows(int64_t rows, int64_t parameters) { return rows <= 8 && parameters >= (int64_t(1) << 17); }

inline Choice choose(const Layers& layers, Route wanted, std::optional<bool> recompute) {
  int64_t hidden = 0;
  for (size_t k = 1; k < layers.widths.size(); ++k) hidden += layers.widths[k] * layers.widths[k - 1];
  if (wanted == Route::matmul) return {wanted, recompute.value_or(false), "asked for"};
  if (layers.cuda) {
    const auto& fit = layers.fit;
    const auto& against = fit.refusal.empty() && wanted == Route::automatic ? fit.slower : fit.refusal;
    if (!against.empty()) return {Route::matmul, recompute.value_or(false), against};
    return {Route::fused, true, wanted == Route::fused ? "asked for; " + fit.how : fit.how};
  }
  if (!layers.full_precision)
    return {Route::matmul, recompute.value_or(false), "bfloat16 products have units of their own"};
  return {Route::fused, recompute.value_or(hidden <= recompute_weights),
          wanted == Route::fused ? "asked for" : "float32 and float64 on the CPU"};
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
  p.reason = choice.reason;
  p.recompute = choice.recompute;
  if (wanted == Route::automatic && choice.route == Route::fused && !s.cuda &&
      few_rows(s.rows, hidden + s.width * (units + 1))) {
    p.reason += "; the map alone, without autograd, of so few rows: matmul";
  }
  // up with P = x (A B)^T, down with T = D A
  p.map_flops = 2 * n * (skip_in + skip_out + 2 * hidden) + embedding;
  // tangents up with P' = v A^T, adjoints down with D' A B, then D'^T x (m wide) and D^T v (d wide) and the
  // two-term gradients of the hidden weights; B^T once more for a dense embedding
  p.training_flops = 2 * n * (2 * skip_in + 2 * skip_out + 4 * hidden) + 2 * embedding;
  if (p.recompute) {
    p.training_flops += p.map_flops;
  } else {
    const bool fused = choice.route == Route::fused;
    const int64_t rows = fused ? (s.rows + 15) / 16 * 16 : s.rows, columns = fused ? units + 1 : (units + 8) / 8 * 8;
    p.saved_bytes = (s.cuda ? s.operand_bytes : s.real_bytes) * rows * (columns + units - s.widths.back()) +
                    (s.dense ? s.operand_bytes * (units + 1) * s.input : 0);
  }
  return p;
}

}  // namespace ilvae
