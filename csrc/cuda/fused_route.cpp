#include "cuda/fused_route.h"

#include <ATen/Context.h>

#include <algorithm>

#include "cuda/fused_shapes.h"
#include "cuda/tensors.h"

namespace ilvae::cuda {

namespace {

using at::Tensor;

// What enters the tensor cores; float32 as torch's setting for its own products says.
Operands operands_of(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return Operands::bfloat16;
  if (dtype == at::kHalf) return Operands::float16;
  return at::globalContext().allowTF32CuBLAS() ? Operands::tf32 : Operands::tf32x3;
}

Limits limits(at::Device device) {
  Limits limits;
  check(limits_of_device(std::max<int>(device.index(), 0), limits), 0, 0);
  return limits;
}

// Rows as the kernels read them: contiguous columns, any distance between rows.
Tensor readable(const Tensor& t) { return !t.defined() || t.dim() == 1 || t.stride(1) == 1 ? t : t.contiguous(); }

Array array(const Tensor& t) {
  if (!t.defined()) return {};
  return {t.data_ptr(), t.stride(0), dtype_of(t)};
}

// The call for the kernels, and the tensors that it points to. Parameters are read in their own dtype: kernels convert.
class Prepared {
 public:
  explicit Prepared(const Arguments& c) : kind_(operands_of(c.output_dtype())), device_(limits(c.x.device())) {
    call.layers = int32_t(c.weights.size());
    call.width = int32_t(c.width());
    call.input = int32_t(c.x.size(-1));
    for (int k = 0; k < call.layers; ++k) {
      call.widths[k] = int32_t(c.weights[k].size(1));
      call.first[k] = call.units;
      call.units += call.widths[k];
      hidden_ = std::max(hidden_, call.widths[k]);
      call.weights[k] = array(keep(c.weights[k]));
    }
    for (int k = 0; k <= call.layers; ++k) {
      call.kind[k] = static_cast<ActivationKind>(c.activations[k]);
      call.parameter[k] = Parameter<float>(c.activation_parameters[k]);
    }
    call.rows = 1;
    for (const auto size : c.x.sizes().slice(0, c.x.dim() - 1)) call.rows *= size;
    call.x = array(keep(c.x.reshape({call.rows, call.input})));
    call.skip_weight = array(keep(c.skip_weight));
    call.bias = array(keep(c.bias.contiguous()));
    call.constant = array(keep(c.inverse_lipschitz));
  }

  FusedCall call;

  // Tensors stay alive as long as this.
  const Tensor& keep(const Tensor& t) { return kept_.emplace_back(readable(t)); }

  // Chooses the shape that is compiled for the call; the number of blocks that will share its tiles.
  int blocks(bool training) {
    shape_ = fused_shape(kind_, hidden_, call.width, call.layers, training, device_.shared_bytes);
    TORCH_INTERNAL_ASSERT(shape_ >= 0);
    const int rows = tile_rows(kind_, fused_shapes[shape_].n, fused_shapes[shape_].layers);
    call.tiles = (call.rows + rows - 1) / rows;
    check(fused_blocks(kind_, shape_, call.layers, call.tiles, device_, blocks_), call.rows, call.width);
    return blocks_;
  }
  void launch() { check(launch_fused(kind_, shape_, call, blocks_, device_, current_stream()), call.rows, call.width); }

 private:
  Operands kind_;
  Limits device_;
  int32_t hidden_ = 0;
  int shape_ = -1, blocks_ = 0;
  std::vector<Tensor> kept_;
};

}  // namespace

std::string refusal(at::Device device, const std::vector<int64_t>& widths, int64_t width, bool dense,
                    at::ScalarType operand) {
  const auto hidden = widths.empty() ? 0 : *std::max_element(widths.begin(), widths.end());
  return fused_refusal(operands_of(operand), operand == at::kDouble, dense, hidden, width, int64_t(widths.size()),
                       limits(device).shared_bytes);
}

matmul::Values fused_potential_and_map(const Arguments& c, bool want_potential, bool want_map) {
  matmul::Values values;
  Prepared fused(c);
  auto& call = fused.call;
  const auto make = [&](at::IntArrayRef sizes) { return at::empty(sizes, c.x.options().dtype(c.output_dtype())); };
  if (want_potential) values.potential = make({call.rows});
  if (want_map) values.map = make({call.rows, call.width});
  if (call.rows == 0 || (!want_potential && !want_map)) return values;
  call.potential = want_potential ? values.potential.data_ptr() : nullptr;
  call.map = want_map ? values.map.data_ptr() : nullptr;
  call.output = dtype_of(want_map ? values.map : values.potential);
  fused.blocks(/*training=*/false);
  fused.launch();
  return values;
}

std::vector<Tensor> fused_training_terms(const Arguments& c, const Tensor& v, const Tensor& u,
                                         const std::vector<bool>& wanted) {
  Prepared fused(c);
  auto& call = fused.call;
  std::vector<Tensor> result(wanted.size());
  const auto make = [&](size_t i, const Tensor& like) {
    if (!wanted[i]) return;
    result[i] = call.rows ? at::empty(like.sizes(), like.options()) : at::zeros(like.sizes(), like.options());
  };
  make(grad_x, c.x);
  make(grad_skip_weight, c.skip_weight);
  make(grad_bias, c.bias);
  make(grad_inverse_lipschitz, c.inverse_lipschitz);
  for (size_t k = 0; k < c.weights.size(); ++k) make(grad_weights + k, c.weights[k]);
  if (call.rows == 0) return result;

  // kernels read rows in float32 or 16 bits
  if (v.defined()) call.v = array(fused.keep(v.scalar_type() == at::kDouble ? v.to(at::kFloat) : v));
  if (u.defined()) call.u = array(fused.keep(u));
  if (wanted[grad_x]) {
    call.grad_x = result[grad_x].data_ptr();
    call.output = dtype_of(result[grad_x]);
  }
  const int blocks = fused.blocks(/*training=*/true);
  const auto partial = at::empty({blocks, partial_size(call)}, c.x.options().dtype(at::kFloat));
  call.partial = static_cast<float*>(partial.data_ptr());
  fused.launch();

  auto sums = reduction_of(call, blocks);
  const auto to = [&](size_t segment, const Tensor& t) {
    if (t.defined()) sums.segment[segment].data = t.data_ptr(), sums.segment[segment].type = dtype_of(t);
  };
  to(0, result[grad_skip_weight]);
  to(1, result[grad_bias]);
  for (size_t k = 0; k < c.weights.size(); ++k) to(2 + k, result[grad_weights + k]);
  to(2 + c.weights.size(), result[grad_inverse_lipschitz]);
  check(launch_reduction(sums, current_stream()), call.rows, call.width);
  return result;
}

}  // namespace ilvae::cuda
