#include "cpu/fused_route.h"

#include <algorithm>

#include "cpu/determinism.h"
#include "cpu/fused.h"
#include "matmul/products.h"

namespace ilvae::cpu {

namespace {

using at::Tensor;

template <class T>
T* pointer(const Tensor& t) {
  return t.defined() ? static_cast<T*>(t.data_ptr()) : nullptr;
}

// The network of a problem for the kernels, and the contiguous tensors that it points to.
template <class T>
class Held {
 public:
  // `embedded_weight`: A B as saved, or undefined
  Held(const Problem& p, Tensor embedded_weight)
      : x_(in_dtype(p.x, p.real).contiguous()), skip_weight_(p.skip_weight.contiguous()), hidden_(p.layers()) {
    if (p.embedding.defined()) {
      embedding_ = in_dtype(p.embedding, p.real).contiguous();
      const OneThread one;
      embedded_weight_ = embedded_weight.defined() ? embedded_weight : thin_product(skip_weight_, embedding_, p.real);
    }
    for (const auto& w : p.weights) {
      held_.push_back(w.contiguous());
      weights_.push_back(pointer<T>(held_.back()));
    }
    for (size_t l = 0; l < p.layers(); ++l) hidden_[l] = {p.widths[l], p.offsets[l], p.activations[l]};
    network_.input = p.input;
    network_.width = p.width;
    network_.units = p.units;
    network_.layers = p.layers();
    network_.widest = *std::max_element(p.widths.begin(), p.widths.end());
    network_.hidden = hidden_.data();
    network_.output_activation = p.activations.back();
    network_.skip_weight = pointer<T>(skip_weight_);
    network_.embedded_weight = embedding_.defined() ? pointer<T>(embedded_weight_) : pointer<T>(skip_weight_);
    network_.embedded_stride = embedding_.defined() ? p.input : p.width;
    network_.embedding = pointer<T>(embedding_);
    network_.bias = pointer<T>(p.bias);
    network_.weights = weights_.data();
    network_.inverse_lipschitz = *pointer<T>(p.inverse_lipschitz);
  }
  Held(const Held&) = delete;

  const Network<T>& network() const { return network_; }
  const Tensor& x() const { return x_; }
  const Tensor& skip_weight() const { return skip_weight_; }
  const Tensor& embedding() const { return embedding_; }
  const Tensor& embedded_weight() const { return embedded_weight_; }

 private:
  Tensor x_, skip_weight_, embedding_, embedded_weight_;
  PerLayer<Tensor> held_;
  PerLayer<const T*> weights_;
  PerLayer<HiddenUnits> hidden_;
  Network<T> network_;
};

template <class T>
Values potential_and_map_of(const Problem& p, const MapWanted& wanted) {
  const Held<T> held(p, {});
  Values values;
  MapArguments<T> c;
  c.rows = p.rows;
  c.x = pointer<T>(held.x());
  if (wanted.potential) values.potential = allocate(p.x, {p.rows}, p.real);
  if (wanted.map) values.map = allocate(p.x, {p.rows, p.width}, p.real);
  if (wanted.save) {
    const auto panels = [&](int64_t units) { return allocate(p.x, {padded_rows(p.rows), units}, p.real); };
    const auto none = [&] { return allocate(p.x, {0}, p.real); };
    values.saved = {panels(p.units + 1), wanted.map ? panels(p.units - p.widths.back()) : none(),
                    p.embedding.defined() ? held.embedded_weight() : none()};
    c.preactivations = pointer<T>(values.saved[0]);
    if (wanted.map) c.adjoints = pointer<T>(values.saved[1]);
  }
  c.potential = pointer<T>(values.potential);
  c.map = pointer<T>(values.map);
  fused_map(held.network(), c);
  return values;
}

template <class T>
std::vector<Tensor> training_terms_of(const Problem& p, const Cotangents& cotangents, const Gradients& wanted) {
  const auto& [v_any, u_any, saved] = cotangents;
  const bool tangent = v_any.defined(), dense = p.embedding.defined();
  const auto v = tangent ? in_dtype(v_any, p.real).contiguous() : Tensor();
  const auto u = u_any.defined() ? in_dtype(u_any, p.real).contiguous() : Tensor();
  const Held<T> held(p, saved.empty() || !dense ? Tensor() : saved[2]);
  std::vector<Tensor> result(wanted.count);
  const auto make = [&](size_t i, at::IntArrayRef sizes) {
    // kernels write every element, unless there is no row to sum over
    result[i] = p.rows ? allocate(p.x, sizes, p.real) : at::zeros(sizes, p.options(p.real));
    return pointer<T>(result[i]);
  };

  TrainingArguments<T> c;
  ParameterGradients<T> gradients;
  PerLayer<T*> weight_gradients(p.layers());
  gradients.weights = weight_gradients.data();
  c.rows = p.rows;
  c.x = pointer<T>(held.x());
  c.map_cotangent = pointer<T>(v);
  c.potential_cotangent = pointer<T>(u);
  if (!saved.empty()) {
    c.preactivations = pointer<T>(saved[0]);
    c.adjoints = tangent && saved[1].dim() == 2 ? pointer<T>(saved[1]) : nullptr;
  }

  // How far down: to layer 0, or to the layer above the lowest weight (K: the output unit alone).
  const bool bottom = wanted[grad_x] || wanted[grad_skip_weight] || wanted[grad_bias] || wanted[grad_embedding];
  c.lowest = bottom ? 0 : p.layers();
  for (size_t k = 0; k < p.layers(); ++k) {
    if (!wanted[grad_weights + k]) continue;
    weight_gradients[k] = make(grad_weights + k, p.weights[k].sizes());
    c.lowest = std::min<int64_t>(c.lowest, k + 1);
  }
  if (wanted[grad_x]) c.grad_x = make(grad_x, {p.rows, p.input});
  if (wanted[grad_bias]) gradients.bias = make(grad_bias, {p.units + 1});
  if (wanted[grad_inverse_lipschitz]) gradients.inverse_lipschitz = make(grad_inverse_lipschitz, {1});
  Tensor narrow;  // D'^T x, the half of grad_A that has the width of x
  if (dense && (wanted[grad_skip_weight] || wanted[grad_embedding])) {
    narrow = at::zeros({p.units + 1, p.input}, p.options(p.real));
    gradients.narrow = pointer<T>(narrow);
  }
  if (wanted[grad_skip_weight]) {
    if (dense && !tangent) {
      result[grad_skip_weight] = at::zeros({p.units + 1, p.width}, p.options(p.real));
    } else {
      gradients.skip_weight = make(grad_skip_weight, {p.units + 1, p.width});
    }
  }
  fused_training_terms(held.network(), c, gradients);

  // With a dense embedding: grad_A += D'^T x B^T ; grad_B = A^T D'^T x + L (v^T x + B x^T (u * x))
  if (!dense) return result;
  const OneThread one;
  if (wanted[grad_skip_weight]) result[grad_skip_weight].addmm_(narrow, held.embedding().t().contiguous());
  if (wanted[grad_embedding]) {
    auto gradient = thin_product(held.skip_weight().t(), narrow, p.real);
    const auto& x = held.x();
    if (tangent) gradient.add_(thin_product(v.t(), x, p.real) * p.inverse_lipschitz);
    if (u.defined()) {
      gradient.add_(at::mm(held.embedding(), at::mm(x.t(), x * u.unsqueeze(1))) * p.inverse_lipschitz);
    }
    result[grad_embedding] = gradient;
  }
  return result;
}

template <class T>
std::pair<Tensor, Tensor> map_jvp_of(const Problem& p, const Tensor& tangent_any) {
  const Held<T> held(p, {});
  const auto tangent = in_dtype(tangent_any, p.real).contiguous();
  const auto map = allocate(p.x, {p.rows, p.width}, p.real), map_tangent = at::empty_like(map);
  JvpArguments<T> c;
  c.rows = p.rows;
  c.x = pointer<T>(held.x());
  c.tangent = pointer<T>(tangent);
  c.map = pointer<T>(map);
  c.map_tangent = pointer<T>(map_tangent);
  fused_jvp(held.network(), c);
  return {map, map_tangent};
}

// Calls body(problem, T()) with T the real type.
template <class Body>
auto in_real(const ilvae::Operands& o, const Body& body) {
  const Problem p(o);
  return p.real == at::kDouble ? body(p, double()) : body(p, float());
}

}  // namespace

constinit const Implementation fused{
    [](const ilvae::Operands& o, const MapWanted& wanted) {
      return in_real(o, [&]<class T>(const Problem& p, T) { return potential_and_map_of<T>(p, wanted); });
    },
    [](const ilvae::Operands& o, const Cotangents& cotangents, const Gradients& wanted) {
      return in_real(o, [&]<class T>(const Problem& p, T) { return training_terms_of<T>(p, cotangents, wanted); });
    },
    [](const ilvae::Operands& o, const Tensor& tangent) {
      return in_real(o, [&]<class T>(const Problem& p, T) { return map_jvp_of<T>(p, tangent); });
    },
};

}  // namespace ilvae::cpu
