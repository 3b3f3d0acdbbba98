#include "cuda/pointwise.h"

#include "cuda/pointwise_tensors.h"
#include "cuda/tensors.h"

namespace ilvae::cuda {

template <class Real, class Operand>
const PointwiseKernels<Real, Operand, Operand>& pointwise_kernels() {
  using Launchers = PointwiseLaunchers<Real, Operand>;
  using Layer = typename Launchers::Layer;
  using Output = typename Launchers::Output;
  static constexpr PointwiseKernels<Real, Operand, Operand> kernels{
      [](const Layer& l) { check(Launchers::up(l, current_stream()), l.rows, l.width); },
      [](const Layer& l, const Output& o) { check(Launchers::turn(l, o, current_stream()), l.rows, l.width); },
      [](const Layer& l) { check(Launchers::down(l, current_stream()), l.rows, l.width); }};
  return kernels;
}

template const PointwiseKernels<double, double, double>& pointwise_kernels();
template const PointwiseKernels<float, float, float>& pointwise_kernels();
template const PointwiseKernels<float, bfloat16, bfloat16>& pointwise_kernels();
template const PointwiseKernels<float, float16, float16>& pointwise_kernels();

namespace {

Any matrix(const at::Tensor& t) {
  if (!t.defined()) return {};
  return {t.data_ptr(), t.stride(0), dtype_of(t)};
}

template <class Real>
void add_quadratic_of(const ilvae::QuadraticTerm& t) {
  QuadraticTerm<Real> q;
  q.rows = t.x.size(0);
  q.width = t.x.size(1);
  q.constant = static_cast<const Real*>(t.constant.data_ptr());
  const auto inner = [](const at::Tensor& m) { return !m.defined() || m.stride(1) == 1 ? m : m.contiguous(); };
  const auto x = inner(t.x), v = inner(t.v);
  q.x = matrix(x), q.y = matrix(t.y), q.v = matrix(v), q.u = matrix(t.u);
  q.unit = t.map ? 1 : 0;
  if (t.phi.defined()) q.potential = static_cast<const Real*>(t.potential.data_ptr());
  q.phi = matrix(t.phi);
  at::Tensor partial;
  if (t.gradient.defined()) {
    partial = at::empty({quadratic_blocks}, t.constant.options());
    q.partial = static_cast<Real*>(partial.data_ptr());
    q.gradient = static_cast<Real*>(t.gradient.data_ptr());
  }
  check(launch_quadratic(q, current_stream()), q.rows, q.width);
}

}  // namespace

void add_quadratic(const ilvae::QuadraticTerm& t) {
  t.constant.scalar_type() == at::kDouble ? add_quadratic_of<double>(t) : add_quadratic_of<float>(t);
}

}  // namespace ilvae::cuda
