#include "cuda/fused_route.h"

#include <ATen/Context.h>

#include <algorithm>

#include "cuda/fused_shapes.h"
#include "cuda/tensors.h"
#include "matmul/products.h"

namespace ilvae::cuda {

int64_t most_stacked_bytes = int64_t(256) << 20;

namespace {

using at::Tensor;

// What enters the tensor cores; float32 as torch's setting for its own products says.
Operands operands_of(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return Operands::bfloat16;
  if (dtype == at::kHalf) return Operands::float16;
  // not allowTF32CuBLAS(): it raises where the setting was made by its newer name, fp32_precision
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32 ? Operands::tf32 : Operands::tf32x3;
}

Limits limits(at::Device device) {
  Limits limits;
  check(limits_of_device(std::max<int>(device.index(), 0), limits), 0, 0);
  return limits;
}

Array array(const Tensor& t) {
  if (!t.defined()) return {};
  return {t.data_ptr(), t.stride(0), dtype_of(t)};
}

// The same from row `start` on.
Array from_row(Array a, int64_t start) {
  const int64_t bytes = a.type == DType::float64 ? 8 : a.type == DType::float32 ? 4 : 2;
  if (a.data) a.data = static_cast<const char*>(a.data) + start * a.stride * bytes;
  return a;
}

// The call for the kernels, and the tensors that it points to. Kernels convert what they read, but see keep().
class Prepared {
 public:
  explicit Prepared(const ilvae::Operands& c)
      : kind_(operands_of(c.output_dtype())), device_(limits(c.x.device())), options_(c.x.options()) {
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

  // A tensor as the kernels read it, alive as long as this. Vectors: as they are. Matrices: contiguous columns, any
  // distance between rows, in float32 or 16 bits; with 32-bit operands in float32 alone, for want of packing.
  const Tensor& keep(const Tensor& t) {
    if (t.dim() == 1) return kept_.emplace_back(t);
    const auto rows = wide(kind_) || t.scalar_type() == at::kDouble ? t.to(at::kFloat) : t;
    return kept_.emplace_back(rows.stride(1) == 1 ? rows : rows.contiguous());
  }

  // Chooses the shape that is compiled for the call.
  void choose(bool training) {
    shape_ = fused_shape(kind_, hidden_, call.width, call.layers, training, device_.shared_bytes);
    TORCH_INTERNAL_ASSERT(shape_ >= 0);
    call.stacked = training && streamed();
    if (streamed()) pack();
  }
  // Whether that streams its weights; the rows of its tiles.
  bool streamed() const { return fused_shapes[shape_].streamed; }
  int tile_rows() const { return fused_shapes[shape_].tile_rows(kind_); }
  // The number of blocks that share the tiles of call.rows.
  int blocks() {
    call.tiles = (call.rows + tile_rows() - 1) / tile_rows();
    check(fused_blocks(kind_, shape_, call.layers, call.tiles, device_, blocks_), call.rows, call.width);
    return blocks_;
  }
  void launch() { check(launch_fused(kind_, shape_, call, blocks_, device_, current_stream()), call.rows, call.width); }

 private:
  // Copies of those weights that cannot be streamed as they are: a launch more.
  void pack() {
    int64_t bytes = 0;
    if (pack_streamed(kind_, call, nullptr, bytes).matrices == 0) return;
    const auto& workspace = kept_.emplace_back(at::empty({bytes}, options_.dtype(at::kByte)));
    bytes = 0;
    const auto packing = pack_streamed(kind_, call, static_cast<unsigned char*>(workspace.data_ptr()), bytes);
    check(launch_pack(kind_, packing, current_stream()), call.rows, call.width);
  }

  Operands kind_;
  Limits device_;
  at::TensorOptions options_;
  int32_t hidden_ = 0;
  int shape_ = -1, blocks_ = 0;
  std::vector<Tensor> kept_;
};

// A sum of products over chunks of rows: in the type of the gradient where there is one chunk, else in float32.
Tensor sum_of_products(const Tensor& gradient, bool one) {
  return one || gradient.scalar_type() == at::kFloat
             ? gradient
             : at::empty(gradient.sizes(), gradient.options().dtype(at::kFloat));
}

// The sweep with streamed weights and the products that follow it; returns the blocks' sums of all other gradients.
Tensor streamed_training_terms(Prepared& fused, const ilvae::Operands& c, const std::vector<Tensor>& result,
                               int& parts) {
  auto& call = fused.call;
  const int layers = call.layers;
  const int64_t below = call.units - call.widths[layers - 1];  // columns of h
  const auto wanted = [&](size_t i) { return result[i].defined(); };
  const bool want_skip = wanted(grad_skip_weight);
  bool want_hidden = false;
  for (int k = 0; k + 1 < layers; ++k) want_hidden = want_hidden || wanted(grad_weights + k);

  // [x; v], [h; h'] and [D'; D] of a chunk
  const auto rows = call.rows;
  const auto operand = c.output_dtype();
  const int64_t columns[] = {want_skip ? call.width : 0, want_hidden ? below : 0,
                             want_skip || want_hidden ? call.units : 0};
  int64_t row_bytes = 0;
  for (const auto count : columns) row_bytes += 2 * aligned_columns(count) * int64_t(c10::elementSize(operand));
  int64_t chunks = std::max<int64_t>(1, (rows * row_bytes + most_stacked_bytes - 1) / most_stacked_bytes);
  const int64_t tile = fused.tile_rows(), chunk = ((rows + chunks - 1) / chunks + tile - 1) / tile * tile;
  chunks = (rows + chunk - 1) / chunk;
  Tensor stacks[3];
  for (int i = 0; i < 3; ++i) {
    if (columns[i] == 0) continue;
    stacks[i] = at::empty({2 * std::min(rows, chunk), aligned_columns(columns[i])}, c.x.options().dtype(operand));
  }
  const auto data = [](const Tensor& t) { return t.defined() ? t.data_ptr() : nullptr; };
  call.stacked_x = data(stacks[0]), call.stride_x = aligned_columns(columns[0]);
  call.stacked_h = data(stacks[1]), call.stride_h = aligned_columns(columns[1]);
  call.stacked_d = data(stacks[2]), call.stride_d = aligned_columns(columns[2]);

  Tensor skip, hidden[fused_layers];
  if (want_skip) skip = sum_of_products(result[grad_skip_weight].narrow(0, 0, call.units), chunks == 1);
  for (int k = 0; k + 1 < layers; ++k) {
    if (wanted(grad_weights + k)) hidden[k] = sum_of_products(result[grad_weights + k], chunks == 1);
  }

  call.rows = std::min(rows, chunk);  // no chunk has more blocks than the first
  const auto partial = at::empty({chunks * fused.blocks(), partial_size(call)}, c.x.options().dtype(at::kFloat));
  parts = 0;
  const auto x = call.x, v = call.v, u = call.u;
  auto* const grad_of_x = static_cast<char*>(call.grad_x);
  const int64_t grad_row = call.input * (call.grad_x ? int64_t(result[grad_x].element_size()) : 0);
  for (int64_t start = 0; start < rows; start += chunk) {
    call.rows = std::min(chunk, rows - start);
    call.x = from_row(x, start), call.v = from_row(v, start), call.u = from_row(u, start);
    call.grad_x = grad_of_x ? grad_of_x + start * grad_row : nullptr;
    call.partial = static_cast<float*>(partial.data_ptr()) + parts * partial_size(call);
    parts += fused.blocks();
    fused.launch();

    const auto of_layer = [&](int i, int64_t first, int64_t count) {
      return stacks[i].narrow(0, 0, 2 * call.rows).narrow(1, first, count);
    };
    // dA = D'^T x + D^T v ; dW_k = D'_k^T h_{k-1} + D_k^T h'_{k-1}
    const bool add = start > 0;
    if (want_skip) multiply(skip, of_layer(2, 0, call.units).t(), of_layer(0, 0, call.width), add);
    for (int k = 0; k + 1 < layers; ++k) {
      if (!hidden[k].defined()) continue;
      multiply(hidden[k], of_layer(2, call.first[k + 1], call.widths[k + 1]).t(),
               of_layer(1, call.first[k], call.widths[k]), add);
    }
  }
  if (want_skip && skip.scalar_type() != result[grad_skip_weight].scalar_type()) {
    result[grad_skip_weight].narrow(0, 0, call.units).copy_(skip);
  }
  for (int k = 0; k + 1 < layers; ++k) {
    if (hidden[k].defined() && !hidden[k].is_same(result[grad_weights + k])) result[grad_weights + k].copy_(hidden[k]);
  }
  call.rows = rows;
  return partial;
}

Values potential_and_map(const ilvae::Operands& c, const MapWanted& wanted) {
  Values values;
  Prepared fused(c);
  auto& call = fused.call;
  const auto make = [&](at::IntArrayRef sizes) { return at::empty(sizes, c.x.options().dtype(c.output_dtype())); };
  if (wanted.potential) values.potential = make({call.rows});
  if (wanted.map) values.map = make({call.rows, call.width});
  if (call.rows == 0 || (!wanted.potential && !wanted.map)) return values;
  call.potential = wanted.potential ? values.potential.data_ptr() : nullptr;
  call.map = wanted.map ? values.map.data_ptr() : nullptr;
  call.output = dtype_of(wanted.map ? values.map : values.potential);
  fused.choose(/*training=*/false);
  fused.blocks();
  fused.launch();
  return values;
}

std::vector<Tensor> training_terms(const ilvae::Operands& c, const Cotangents& cotangents, const Gradients& wanted) {
  const auto& [v, u, saved] = cotangents;
  Prepared fused(c);
  auto& call = fused.call;
  std::vector<Tensor> result(wanted.count);
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

  if (v.defined()) call.v = array(fused.keep(v));
  if (u.defined()) call.u = array(fused.keep(u));
  if (wanted[grad_x]) {
    call.grad_x = result[grad_x].data_ptr();
    call.output = dtype_of(result[grad_x]);
  }
  fused.choose(/*training=*/true);
  int parts = 0;
  Tensor partial;
  if (fused.streamed()) {
    partial = streamed_training_terms(fused, c, result, parts);
  } else {
    parts = fused.blocks();
    partial = at::empty({parts, partial_size(call)}, c.x.options().dtype(at::kFloat));
    call.partial = static_cast<float*>(partial.data_ptr());
    fused.launch();
  }

  call.partial = static_cast<float*>(partial.data_ptr());
  auto sums = reduction_of(call, parts);
  const auto to = [&](size_t segment, const Tensor& t) {
    if (t.defined()) sums.segment[segment].data = t.data_ptr(), sums.segment[segment].type = dtype_of(t);
  };
  if (result[grad_skip_weight].defined()) {
    to(0, call.stacked ? result[grad_skip_weight].narrow(0, call.units, 1) : result[grad_skip_weight]);
  }
  to(1, result[grad_bias]);
  for (size_t k = 0; k < c.weights.size(); ++k) to(2 + k, result[grad_weights + k]);
  to(2 + c.weights.size(), result[grad_inverse_lipschitz]);
  check(launch_reduction(sums, current_stream()), call.rows, call.width);
  return result;
}

}  // namespace

Fit fit(at::Device device, const std::vector<int64_t>& widths, int64_t width, bool dense, at::ScalarType operand) {
  return fused_fit(operands_of(operand), operand == at::kDouble, dense, widths, width, limits(device).shared_bytes);
}

constinit const Implementation fused{potential_and_map, training_terms, nullptr};

}  // namespace ilvae::cuda
