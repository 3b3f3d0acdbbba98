// What the CPU offers to the routes.
#include "cpu/determinism.h"
#include "cpu/fused_route.h"
#include "cpu/instruction_set.h"
#include "cpu/pointwise.h"
#include "matmul/matmul_route.h"
#include "route.h"

namespace ilvae::cpu {

namespace {

// Between its products are sums over rows by ATen, too.
constexpr Implementation steady_matmul{
    [](const Operands& o, const MapWanted& wanted) {
      const OneThread one;
      return matmul::implementation.potential_and_map(o, wanted);
    },
    [](const Operands& o, const Cotangents& cotangents, const Gradients& wanted) {
      const OneThread one;
      return matmul::implementation.training_terms(o, cotangents, wanted);
    },
    [](const Operands& o, const at::Tensor& tangent) {
      const OneThread one;
      return matmul::implementation.map_jvp(o, tangent);
    },
};

const bool registered = [] {
  Device device{};
  device.fused = fused;
  device.matmul = steady_matmul;
  device.pointwise.float64 = &pointwise_kernels<double, double>();
  device.pointwise.float32 = &pointwise_kernels<float, float>();
  device.pointwise.bfloat16_stored_in_float32 = &pointwise_kernels<float, bfloat16>();
  device.weights_float64 = {softplus<double>, softplus_backward<double>};
  device.weights_float32 = {softplus<float>, softplus_backward<float>};
  device.fused_saves = true;
  device.stores_operands = false;
  device.build = [] { return std::vector<std::pair<std::string, std::string>>{{"cpu", instruction_set()}}; };
  register_device(c10::DeviceType::CPU, device);
  return true;
}();

}  // namespace

}  // namespace ilvae::cpu
