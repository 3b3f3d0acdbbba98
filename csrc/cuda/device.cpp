// What CUDA devices offer to the routes.
#include "cuda/fused_route.h"
#include "cuda/fused_shapes.h"
#include "cuda/pointwise_tensors.h"
#include "cuda/toolkit.h"
#include "matmul/matmul_route.h"
#include "route.h"

namespace ilvae::cuda {

namespace {

Fit fit_within(int64_t shared_bytes, const std::vector<int64_t>& widths, int64_t width, bool dense,
               int64_t operand_bytes, bool tf32) {
  const auto kind = operand_bytes == 2 ? Operands::bfloat16 : tf32 ? Operands::tf32 : Operands::tf32x3;
  return fused_fit(kind, operand_bytes == 8, dense, widths, width, shared_bytes);
}

const bool registered = [] {
  Device device{};
  device.fused = fused;
  device.matmul = matmul::implementation;
  device.pointwise.float64 = &pointwise_kernels<double, double>();
  device.pointwise.float32 = &pointwise_kernels<float, float>();
  device.pointwise.bfloat16_stored = &pointwise_kernels<float, bfloat16>();
  device.pointwise.float16_stored = &pointwise_kernels<float, float16>();
  device.pointwise.add_quadratic = add_quadratic;
  device.fit = fit;
  device.fit_within = fit_within;
  device.fused_saves = false;
  device.stores_operands = true;
  device.build = [] {
    return std::vector<std::pair<std::string, std::string>>{{"cuda", toolkit_version()},
                                                            {"cuda_architectures", architectures()}};
  };
  register_device(c10::DeviceType::CUDA, device);
  return true;
}();

}  // namespace

}  // namespace ilvae::cuda
