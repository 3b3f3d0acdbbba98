// The pointwise kernels for one pair of types (REAL, OPERAND as in pointwise_*.cu), VECTOR elements at a time.
#include "cuda/pointwise.cuh"

using namespace ilvae;
using namespace ilvae::cuda;

using Layer = HiddenLayer<REAL, OPERAND, OPERAND>;
using Output = OutputUnit<REAL, OPERAND, OPERAND>;

namespace {

template <class T>
Matrix<T> matrix(void* data, int64_t stride) {
  return {static_cast<std::remove_const_t<T>*>(data), stride};
}

// sizes: rows, width, stride of a and d, stride of h and g; activation codes and parameters: hidden, output
Layer layer_of(const int64_t* sizes, const int64_t* kinds, const double* parameters, const REAL* bias, void* a,
               void* a_tangent) {
  Layer l;
  l.rows = sizes[0], l.width = sizes[1];
  l.activation = {static_cast<ActivationKind>(kinds[0]), parameters[0]};
  l.bias = bias;
  l.a = matrix<const OPERAND>(a, sizes[2]);
  l.a_tangent = matrix<const OPERAND>(a_tangent, sizes[2]);
  return l;
}

}  // namespace

extern "C" {

void up(const int64_t* sizes, const int64_t* kinds, const double* parameters, const REAL* bias, void* a,
        void* a_tangent, void* h, void* h_tangent, int64_t across, int64_t blocks, int64_t seed) {
  auto l = layer_of(sizes, kinds, parameters, bias, a, a_tangent);
  l.h = matrix<OPERAND>(h, sizes[3]);
  l.h_tangent = matrix<OPERAND>(h_tangent, sizes[3]);
  executor::launch(dim3(blocks), dim3(pointwise_threads), 0, seed,
                   [&] { up_kernel<VECTOR>(l, Parameter<REAL>(parameters[0]), int(across)); });
}

void down(const int64_t* sizes, const int64_t* kinds, const double* parameters, const REAL* bias, void* a,
          void* a_tangent, void* g, void* g_tangent, void* d, void* d_tangent, int64_t across, int64_t blocks,
          int64_t seed) {
  auto l = layer_of(sizes, kinds, parameters, bias, a, a_tangent);
  l.g = matrix<const OPERAND>(g, sizes[3]);
  l.g_tangent = matrix<const OPERAND>(g_tangent, sizes[3]);
  l.d = matrix<OPERAND>(d, sizes[2]);
  l.d_tangent = matrix<OPERAND>(d_tangent, sizes[2]);
  executor::launch(dim3(blocks), dim3(pointwise_threads), 0, seed,
                   [&] { down_kernel<VECTOR>(l, Parameter<REAL>(parameters[0]), int(across)); });
}

// a and d have a column more, the output's
void turn(const int64_t* sizes, const int64_t* kinds, const double* parameters, const REAL* bias, void* a,
          void* a_tangent, const REAL* weight, const REAL* output_bias, void* u, void* potential, void* h,
          void* h_tangent, void* d, void* d_tangent, int64_t complete, int64_t blocks, int64_t seed) {
  auto l = layer_of(sizes, kinds, parameters, bias, a, a_tangent);
  const auto last = [&](void* data) { return data ? static_cast<OPERAND*>(data) + sizes[1] : nullptr; };
  l.h = matrix<OPERAND>(h, sizes[3]);
  l.h_tangent = matrix<OPERAND>(h_tangent, sizes[3]);
  l.d = matrix<OPERAND>(d, sizes[2]);
  l.d_tangent = matrix<OPERAND>(d_tangent, sizes[2]);
  Output o;
  o.activation = {static_cast<ActivationKind>(kinds[1]), parameters[1]};
  o.weight = weight, o.bias = output_bias, o.complete = complete;
  o.o = matrix<OPERAND>(last(a), sizes[2]);
  o.o_tangent = matrix<OPERAND>(last(a_tangent), sizes[2]);
  o.potential_cotangent = matrix<const REAL>(u, 1);
  o.potential = matrix<REAL>(potential, 1);
  o.d = matrix<OPERAND>(last(d), sizes[2]);
  o.d_tangent = matrix<OPERAND>(last(d_tangent), sizes[2]);
  executor::launch(dim3(blocks), dim3(pointwise_threads), 0, seed,
                   [&] { turn_kernel<VECTOR>(l, Parameter<REAL>(parameters[0]), o, Parameter<REAL>(parameters[1])); });
}

// sizes: rows, width, types of x, y, v, u, phi
void quadratic(const int64_t* sizes, const REAL* constant, void* x, void* y, void* v, void* u, double unit,
               const REAL* potential, void* phi, REAL* gradient, REAL* partial, int64_t blocks, int64_t seed) {
  const auto any = [&](void* data, int i, int64_t stride) { return Any{data, stride, static_cast<DType>(sizes[i])}; };
  QuadraticTerm<REAL> q;
  q.rows = sizes[0], q.width = sizes[1], q.constant = constant, q.unit = REAL(unit);
  q.x = any(x, 2, sizes[1]), q.y = any(y, 3, sizes[1]), q.v = any(v, 4, sizes[1]), q.u = any(u, 5, 1);
  q.potential = potential, q.phi = any(phi, 6, 1), q.gradient = gradient, q.partial = partial;
  executor::launch(dim3(blocks), dim3(pointwise_threads), pointwise_threads / 32 * sizeof(REAL), seed,
                   [&] { quadratic_kernel<REAL>(q); });
  if (gradient) {
    executor::launch(dim3(1), dim3(32), 0, seed, [&] { sum_kernel<REAL>(partial, int(blocks), gradient); });
  }
}
}
