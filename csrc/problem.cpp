#include "problem.h"

#include <cmath>

namespace ilvae {

namespace {

std::string shape(const at::Tensor& t) {
  std::ostringstream out;
  out << "(";
  const auto sizes = t.sym_sizes();
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

void check_like_x(const char* name, const at::Tensor& t, const at::Tensor& x) {
  TORCH_CHECK_VALUE(t.device() == x.device(), name, ": got device ", t.device(), ", wanted ", x.device(),
                    ", the device of x");
  TORCH_CHECK_VALUE(t.scalar_type() == x.scalar_type(), name, ": got dtype ", t.scalar_type(), ", wanted ",
                    x.scalar_type(), ", the dtype of x");
}

}  // namespace

void Operands::check() const {
  const auto dtype = x.scalar_type();
  const bool half = !x.is_cpu();  // float16 too (fake tensors are on no device at all)
  TORCH_CHECK_VALUE(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || (half && dtype == at::kHalf),
      "x: got dtype ", dtype,
      half ? ", wanted float64, float32, bfloat16 or float16" : ", wanted float64, float32 or bfloat16");
  TORCH_CHECK_VALUE(!product_dtype || *product_dtype == at::kBFloat16 || *product_dtype == at::kFloat ||
                        *product_dtype == dtype || (half && *product_dtype == at::kHalf),
                    "autocast: got dtype ", *product_dtype,
                    half ? ", wanted bfloat16, float16 or float32" : ", wanted bfloat16 or float32");
  TORCH_CHECK_VALUE(x.dim() >= 1, "x: got a tensor without dimensions, wanted (..., d)");
  check_like_x("skip_weight", skip_weight, x);
  check_like_x("bias", bias, x);
  TORCH_CHECK_VALUE(skip_weight.dim() == 2, "skip_weight: got shape ", shape(skip_weight), ", wanted (S+1, d)");
  TORCH_CHECK_VALUE(!weights.empty(), "weights: got none, wanted one for each hidden layer: [W_2, .., W_K, w]");
  TORCH_CHECK_VALUE(int64_t(weights.size()) <= max_layers, "weights: got ", weights.size(), ", wanted at most ",
                    max_layers, " hidden layers");

  c10::SymInt units = 0;
  for (size_t k = 0; k < weights.size(); ++k) {
    const auto& w = weights[k];
    const auto name = "weights[" + std::to_string(k) + "]";
    check_like_x(name.c_str(), w, x);
    TORCH_CHECK_VALUE(w.dim() == 2 && w.sym_size(0) > 0 && w.sym_size(1) > 0, name, ": got shape ", shape(w),
                      ", wanted a matrix without empty dimensions");
    if (k + 1 == weights.size()) {
      TORCH_CHECK_VALUE(w.sym_size(0) == 1, name, ": got shape ", shape(w), ", wanted (1, n_K), the output weight");
    } else {
      TORCH_CHECK_VALUE(weights[k + 1].dim() == 2 && w.sym_size(0) == weights[k + 1].sym_size(1), name, ": got shape ",
                        shape(w), ", wanted as many rows as weights[", k + 1, "] ", shape(weights[k + 1]),
                        " has columns");
    }
    units = units + w.sym_size(1);
  }
  TORCH_CHECK_VALUE(skip_weight.sym_size(0) == units + 1, "skip_weight: got shape ", shape(skip_weight), ", wanted ",
                    units + 1, " rows, one for each of the ", units, " hidden units of weights and one for the output");
  TORCH_CHECK_VALUE(bias.dim() == 1 && bias.sym_size(0) == units + 1, "bias: got shape ", shape(bias), ", wanted (",
                    units + 1, ",)");
  const auto width = skip_weight.sym_size(1);
  TORCH_CHECK_VALUE(width > 0, "skip_weight: got shape ", shape(skip_weight), ", wanted at least one column");
  const auto input = x.sym_size(-1);
  if (embedding) {
    const auto& b = *embedding;
    check_like_x("embedding", b, x);
    TORCH_CHECK_VALUE(b.dim() == 2 && b.sym_size(0) == width && b.sym_size(1) == input, "embedding: got shape ",
                      shape(b), ", wanted (", width, ", ", input, "), the widths of skip_weight and x");
  } else {
    TORCH_CHECK_VALUE(input <= width, "x: got shape ", shape(x), ", wanted at most ", width,
                      " columns, the width of skip_weight");
  }
  TORCH_CHECK_VALUE(input > 0, "x: got shape ", shape(x), ", wanted at least one column");
  TORCH_CHECK_VALUE(inverse_lipschitz.dim() == 1 && inverse_lipschitz.sym_size(0) == 1, "inverse_lipschitz: got shape ",
                    shape(inverse_lipschitz), ", wanted (1,)");
  TORCH_CHECK_VALUE(inverse_lipschitz.scalar_type() == at::kFloat || inverse_lipschitz.scalar_type() == at::kDouble,
                    "inverse_lipschitz: got dtype ", inverse_lipschitz.scalar_type(), ", wanted float32 or float64");
  TORCH_CHECK_VALUE(inverse_lipschitz.device() == x.device(), "inverse_lipschitz: got device ",
                    inverse_lipschitz.device(), ", wanted ", x.device(), ", the device of x");

  TORCH_CHECK_VALUE(activations.size() == weights.size() + 1 && activation_parameters.size() == activations.size(),
                    "activations: got ", activations.size(), ", wanted ", weights.size() + 1,
                    ", one for each hidden layer and one for the output");
  for (size_t k = 0; k < activations.size(); ++k) {
    TORCH_CHECK_VALUE(activations[k] >= 0 && activations[k] < activation_kinds, "activations[", k, "]: got code ",
                      activations[k], ", wanted 0 to ", activation_kinds - 1);
    TORCH_CHECK_VALUE(k == 0 || activations[k] != int64_t(ActivationKind::squared_leaky_relu), "activations[", k,
                      "]: got squared_leaky_relu, wanted a non-decreasing one");
    TORCH_CHECK_VALUE(std::isfinite(activation_parameters[k]) && activation_parameters[k] >= 0,
                      "activation_parameters[", k, "]: got ", activation_parameters[k], ", wanted a finite one >= 0");
  }
}

void Operands::check_wanted(int64_t wanted) const {
  const auto count = gradients();
  TORCH_CHECK_VALUE(count < 63 && wanted >= 0 && wanted < (int64_t(1) << count), "wanted: got ", wanted,
                    ", wanted a bit for each of ", count, " gradients");
  TORCH_CHECK_VALUE(dense() || !((wanted >> grad_embedding) & 1),
                    "wanted: got the gradient of an embedding, wanted none: there is no embedding");
}

const at::Tensor& Operands::operator[](size_t i) const {
  static const at::Tensor none;
  switch (i) {
    case grad_x:
      return x;
    case grad_skip_weight:
      return skip_weight;
    case grad_bias:
      return bias;
    case grad_inverse_lipschitz:
      return inverse_lipschitz;
    case grad_embedding:
      return embedding ? *embedding : none;
    default:
      return weights[i - grad_weights];
  }
}

void Operands::check_rows(const char* name, const at::Tensor& t, std::optional<c10::SymInt> last) const {
  auto wanted = x.sym_sizes().slice(0, x.dim() - 1).vec();
  if (last) wanted.push_back(*last);
  const auto print = [&] {
    std::ostringstream out;
    out << "(";
    for (size_t i = 0; i < wanted.size(); ++i) out << (i ? ", " : "") << wanted[i];
    out << ")";
    return out.str();
  };
  TORCH_CHECK_VALUE(t.device() == x.device(), name, ": got device ", t.device(), ", wanted ", x.device());
  TORCH_CHECK_VALUE(at::isFloatingType(t.scalar_type()), name, ": got dtype ", t.scalar_type(),
                    ", wanted a floating-point one");
  TORCH_CHECK_VALUE(t.sym_sizes() == c10::SymIntArrayRef(wanted), name, ": got shape ", shape(t), ", wanted ", print());
}

Problem::Problem(const Operands& c)
    : operand(c.output_dtype()),
      real(operand == at::kBFloat16 || operand == at::kHalf ? at::kFloat : operand),
      output(operand),
      input(c.x.size(-1)),
      width(c.width()),
      units(0),
      bias(in_dtype(c.bias, real).contiguous()),
      output_weight(in_dtype(c.weights.back(), real).contiguous()),
      inverse_lipschitz(in_dtype(c.inverse_lipschitz, real)),
      embedding(c.embedding.value_or(at::Tensor())) {
  rows = 1;
  for (int64_t i = 0; i + 1 < c.x.dim(); ++i) rows *= c.x.size(i);
  x = c.x.dim() == 2 ? c.x : c.x.reshape({rows, input});
  skip_weight = in_dtype(c.skip_weight, operand);
  for (const auto& w : c.weights) {
    weights.push_back(in_dtype(w, operand));
    widths.push_back(w.size(1));
    offsets.push_back(units);
    units += w.size(1);
  }
  for (size_t k = 0; k < c.activations.size(); ++k) {
    activations.push_back({static_cast<ActivationKind>(c.activations[k]), c.activation_parameters[k]});
  }
}

}  // namespace ilvae
