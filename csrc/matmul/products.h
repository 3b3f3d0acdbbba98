// Matrix products by ATen as both routes use them.
#pragma once

#include <ATen/ATen.h>

namespace ilvae {

// out = a b, or out += a b. Products of 16-bit operands accumulate in float32 and round their result once, as
// torch.nn.Linear; CUDA devices can leave it in float32.
inline void multiply(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add = false) {
  const auto type = out.scalar_type();
  if (a.scalar_type() == type) {
    add ? out.addmm_(a, b) : at::mm_out(out, a, b);
  } else if (a.is_cuda() && type == at::kFloat) {
    add ? out.add_(at::mm(a, b, type)) : at::mm_out(out, a, b, type);
  } else {
    const auto product = at::mm(a, b);
    add ? out.add_(product) : out.copy_(product);
  }
}

inline at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
  if (a.scalar_type() == type) return at::mm(a, b);
  return a.is_cuda() && type == at::kFloat ? at::mm(a, b, type) : at::mm(a, b).to(type);
}

// a b for a wide a and a b of few columns, contiguous. On the CPU as the transpose of b^T a^T: BLAS streams the wide
// operand by rows then, in a third to a half of the time.
inline at::Tensor thin_product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) {
  return a.is_cuda() ? product(a, b, type) : product(b.t(), a.t(), type).t().contiguous();
}

}  // namespace ilvae
