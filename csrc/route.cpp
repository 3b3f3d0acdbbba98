#include "route.h"

#include <array>

namespace ilvae {

namespace {

constexpr auto device_types = static_cast<size_t>(c10::DeviceType::COMPILE_TIME_MAX_DEVICE_TYPES);

// Inside a function, because devices register before main().
std::array<std::optional<Device>, device_types>& devices() {
  static std::array<std::optional<Device>, device_types> all;
  return all;
}

}  // namespace

void register_device(c10::DeviceType type, const Device& device) { devices()[static_cast<size_t>(type)] = device; }

const Device* find_device(c10::DeviceType type) {
  const auto& device = devices()[static_cast<size_t>(type)];
  return device ? &*device : nullptr;
}

const Device& registered_device(const at::Tensor& x) {
  const auto* const device = find_device(x.device().type());
  TORCH_INTERNAL_ASSERT(device, "no kernels for ", x.device());
  return *device;
}

Choice choose(const Operands& o, std::optional<bool> recompute) {
  TORCH_CHECK_VALUE(o.route >= 0 && o.route <= int64_t(Route::fused), "route: got code ", o.route, ", wanted 0 to ",
                    int64_t(Route::fused));
  const auto wanted = static_cast<Route>(o.route);
  if (o.x.is_meta() && wanted != Route::automatic) return {wanted, recompute.value_or(false), true, {}};
  const auto operand = o.output_dtype();
  PerLayer<int64_t> widths;
  for (const auto& w : o.weights) widths.push_back(w.sym_size(1).guard_int(__FILE__, __LINE__));
  Layers layers{{widths.data(), widths.size()}, operand == at::kFloat || operand == at::kDouble};
  const auto* const device = find_device(o.x.device().type());
  layers.cuda = device && device->fit;
  if (layers.cuda) {
    const auto width = o.skip_weight.sym_size(1).guard_int(__FILE__, __LINE__);
    layers.fit = device->fit(o.x.device(), {widths.begin(), widths.end()}, width, o.dense(), operand);
  }
  auto choice = choose(layers, wanted, recompute);
  TORCH_CHECK_VALUE(wanted == Route::automatic || choice.route == wanted,
                    "route: got fused, wanted matmul for products in ", operand,
                    layers.cuda ? " on this device: " + choice.reason : "");
  return choice;
}

Choice choose_for_map(const Operands& o) {
  auto choice = choose(o, std::nullopt);
  if (o.route == int64_t(Route::automatic) && o.x.is_cpu()) {
    int64_t parameters = o.skip_weight.numel();
    for (const auto& w : o.weights) parameters += w.numel();
    if (few_rows(o.x.numel() / o.x.size(-1), parameters)) choice.route = Route::matmul;
  }
  return choice;
}

at::ScalarType saved_dtype(const Operands& o) {
  const auto operand = o.output_dtype();
  const auto* const device = find_device(o.x.device().type());
  return operand == at::kBFloat16 && !(device && device->stores_operands) ? at::kFloat : operand;
}

const Implementation& implementation(Route route, const at::Tensor& x) {
  const auto& device = registered_device(x);
  return route == Route::fused ? device.fused : device.matmul;
}

}  // namespace ilvae
