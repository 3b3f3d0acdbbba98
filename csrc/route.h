// The only place that chooses a route, once for each call, and runs it on the device of x. Devices register here, so
// that no shared file knows them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/bfloat16.h"
#include "core/float16.h"
#include "core/plan.h"
#include "core/pointwise.h"
#include "problem.h"

namespace ilvae {

struct Values {
  at::Tensor potential, map;      // (N), (N, d), undefined where not wanted
  std::vector<at::Tensor> saved;  // what training_terms can start from
};

struct MapWanted {
  bool potential, map, save;
};

// v (N, d) and u (N), either undefined; `saved` empty: everything is recomputed.
struct Cotangents {
  at::Tensor map, potential;
  at::TensorList saved;
};

// One route on one device. Gradients come in the order of `Gradient`, undefined where not wanted, in any floating
// dtype.
struct Implementation {
  Values (*potential_and_map)(const Operands&, const MapWanted&);
  std::vector<at::Tensor> (*training_terms)(const Operands&, const Cotangents&, const Gradients& wanted);
  // T and its derivative along the tangent (N, m) of x; null: the matmul route does it.
  std::pair<at::Tensor, at::Tensor> (*map_jvp)(const Operands&, const at::Tensor& tangent);
};

// The quadratic term where B is the padded identity; any tensor but x and constant may be undefined.
struct QuadraticTerm {
  at::Tensor x, y, v;         // (N, m): in any floating dtype; y in place
  at::Tensor u;               // (N)
  bool map = false;           // y += L x; else y += L (v + u x)
  at::Tensor potential, phi;  // (N): G in the type of `constant`, G + L/2 |x|^2 in any
  at::Tensor constant;        // L (1), float32 or float64, the type of the arithmetic
  at::Tensor gradient;        // grad_L (1), the same type
};

// The pointwise kernels of a device for each type of operands; those it has not are null.
struct PointwiseTable {
  const PointwiseKernels<double, double>* float64;
  const PointwiseKernels<float, float>* float32;
  const PointwiseKernels<float, bfloat16, float>* bfloat16_stored_in_float32;
  const PointwiseKernels<float, bfloat16, bfloat16>* bfloat16_stored;
  const PointwiseKernels<float, float16, float16>* float16_stored;
  // One kernel for the whole quadratic term, or null: ATen's operations do.
  void (*add_quadratic)(const QuadraticTerm&);
};

struct Device {
  Implementation fused, matmul;
  PointwiseTable pointwise;
  WeightKernels<double> weights_float64;
  WeightKernels<float> weights_float32;
  // How its fused kernels meet a network; null: as choose() says for the CPU.
  Fit (*fit)(at::Device, const std::vector<int64_t>& widths, int64_t width, bool dense, at::ScalarType operand);
  // The same for a device with so much shared memory a block, which need not be here.
  Fit (*fit_within)(int64_t shared_bytes, const std::vector<int64_t>& widths, int64_t width, bool dense,
                    int64_t operand_bytes, bool tf32);
  bool fused_saves;      // whether the fused route saves anything for its training terms
  bool stores_operands;  // products leave pre-activations and adjoints in the type of operands, not in the real type
  // What it was built with, for build_info(): names and values.
  std::vector<std::pair<std::string, std::string>> (*build)();
};
void register_device(c10::DeviceType type, const Device& device);
// Null where this build has no kernels for it.
const Device* find_device(c10::DeviceType type);
const Device& registered_device(const at::Tensor& x);

// Raises ValueError for a route that there is not. On fake tensors, which do not know their device, a named route is
// believed.
Choice choose(const Operands& operands, std::optional<bool> recompute);
// The choice for the map alone without autograd, which may look at the batch.
Choice choose_for_map(const Operands& operands);

// The type in which a route saves pre-activations and adjoints.
at::ScalarType saved_dtype(const Operands& operands);

const Implementation& implementation(Route route, const at::Tensor& x);

}  // namespace ilvae
