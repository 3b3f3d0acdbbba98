// What the CPU offers to the routes.
#include "cpu/fused_route.h"
#include "cpu/instruction_set.h"
#include "cpu/pointwise.h"
#include "route.h"

namespace ilvae::cpu {

namespace {

const bool registered = [] {
  Device device{};
  device.fused = fused;
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
