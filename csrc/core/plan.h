// Which route a shape takes and what it costs: a pure function of sizes, host only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ilvae {

struct Shape {
  int64_t rows = 0, input = 0, width = 0;  // N, m, d
  std::vector<int64_t> widths;             // n_1 .. n_K
  bool dense = false;                      // a dense embedding: A B is formed once per call
  int64_t real_bytes = 4;                  // of what is saved: 8 for float64, else 4
  int64_t operand_bytes = 4;               // of a dense embedding's A B
};

struct Plan {
  std::string route, reason;
  double map_flops = 0, training_flops = 0;  // multiply-adds counted as two; the pointwise steps are not counted
  int64_t saved_bytes = 0;                   // from forward to backward, besides inputs and weights
};

inline Plan plan(const Shape& s) {
  int64_t units = 0, hidden = 0;  // S, sum n_k n_{k-1} + n_K
  for (size_t k = 0; k < s.widths.size(); ++k) {
    units += s.widths[k];
    hidden += s.widths[k] * (k + 1 < s.widths.size() ? s.widths[k + 1] : 1);
  }
  const double n = double(s.rows), skip_in = double(s.input) * (units + 1), skip_out = double(s.width) * (units + 1);
  const double embedding = s.dense ? 2.0 * s.width * skip_in : 0;  // A B
  Plan p;
  p.route = "matmul";
  p.reason = "the only route so far: any size, any dtype";
  // up with P = x (A B)^T, down with T = D A
  p.map_flops = 2 * n * (skip_in + skip_out + 2 * hidden) + embedding;
  // tangents up with P' = v A^T, adjoints down with D' A B, then D'^T x (m wide) and D^T v (d wide) and the
  // two-term gradients of the hidden weights; B^T once more for a dense embedding
  p.training_flops = 2 * n * (2 * skip_in + 2 * skip_out + 4 * hidden) + 2 * embedding;
  p.saved_bytes = s.real_bytes * s.rows * (units + 1 + units - s.widths.back()) +
                  (s.dense ? s.operand_bytes * (units + 1) * s.input : 0);
  return p;
}

}  // namespace ilvae
