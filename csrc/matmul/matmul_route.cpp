#include "matmul/matmul_route.h"

#include <algorithm>

#include "matmul/products.h"

namespace ilvae::matmul {

namespace {

using at::Tensor;

// The type in which products leave pre-activations and adjoints. That of the operands halves what the pointwise kernels
// move.
at::ScalarType stored(const Problem& p) { return registered_device(p.x).stores_operands ? p.operand : p.real; }

// The type of the results: that of the arguments at once where products can leave it.
at::ScalarType result_type(const Problem& p) {
  return registered_device(p.x).stores_operands ? p.x.scalar_type() : p.real;
}

template <class T>
Matrix<T> view(const Tensor& t) {
  using Stored = std::remove_const_t<T>;
  if (!t.defined()) return {};
  return {static_cast<Stored*>(t.data_ptr()), t.stride(0)};
}

// Calls body(kernels) with the pointwise kernels for the types of the problem.
template <class Body>
void with_kernels(const Problem& p, const Body& body) {
  const auto& table = registered_device(p.x).pointwise;
  const auto run = [&](const auto* kernels) {
    TORCH_INTERNAL_ASSERT(kernels, "no pointwise kernels for ", p.operand, " on ", p.x.device());
    body(*kernels);
  };
  if (p.operand == at::kDouble) return run(table.float64);
  if (p.operand == at::kFloat) return run(table.float32);
  if (p.operand == at::kHalf) return run(table.float16_stored);
  return table.bfloat16_stored ? run(table.bfloat16_stored) : run(table.bfloat16_stored_in_float32);
}

// The sweeps through the hidden layers (docs/mathematics.md). With a tangent, stacks have 2N rows:
//   a = [a; a'] , h = [h; h'] , d = [D'; D] , g = [g'; g],
// the order in which one product with stacked operands is a two-term weight gradient. Without, they have N rows: D, or,
// with a potential cotangent, D'. Matrices `a` and `d` have a column per unit, the output's last; `a` leaves out the
// biases, which the kernels add, but for the output unit, whose column holds o after turn().
class Sweep {
 public:
  Sweep(const Problem& p, bool tangent, at::TensorList saved)
      : p_(p), tangent_(tangent), stacks_(tangent ? 2 : 1), hidden_(p.layers()) {
    if (!saved.empty()) {
      a_ = unit_columns(saved[0]);
      saved_adjoints_ = saved[1].dim() == 2 ? saved[1] : Tensor();
      complete_ = true;
      if (tangent) a_tangent_ = unit_columns(at::empty({p.rows, padded_units(p.units)}, p.options(stored(p))));
    } else {
      whole_ = at::empty({stacks_ * p.rows, padded_units(p.units)}, p.options(stored(p)));
      stack_ = unit_columns(whole_);
      a_ = tangent ? stack_.narrow(0, 0, p.rows) : stack_;
      if (tangent) a_tangent_ = stack_.narrow(0, p.rows, p.rows);
    }
    embedded_weight_ = !p.embedding.defined() ? (p.padded() ? p.skip_weight.narrow(1, 0, p.input) : p.skip_weight)
                       : saved.empty()        ? thin_product(p.skip_weight, p.embedding.to(p.operand), p.operand)
                                              : saved[2];
  }

  // A B: (S+1, m), in operand type.
  const Tensor& embedded_weight() const { return embedded_weight_; }
  // (N, padded_units(S)), to be saved.
  const Tensor& preactivations() const { return whole_; }
  const Tensor& adjoints() const { return adjoints_; }

  // P = x (A B)^T, unless pre-activations were saved.
  void enter(const Tensor& x) {
    if (!complete_) multiply(a_, x, embedded_weight_.t());
  }
  // P' = v A^T, or x' (A B)^T: pass the fitting weight.
  void enter_tangent(const Tensor& v, const Tensor& weight) { multiply(a_tangent_, v, weight.t()); }

  // Hidden layers 0 .. K-2 upwards; h of layer l is kept where keep_hidden[l].
  void up(const std::vector<bool>& keep_hidden) {
    for (size_t l = 0; l + 1 < p_.layers(); ++l) {
      const bool need_h = !complete_ || keep_hidden[l];
      if (!need_h && !tangent_) continue;
      auto h = at::empty({stacks_ * p_.rows, p_.widths[l]}, p_.options(p_.operand));
      with_kernels(
          p_, [&]<class Real, class Operand, class Stored>(const PointwiseKernels<Real, Operand, Stored>& kernels) {
            auto layer = hidden_layer<Real, Operand, Stored>(l);
            if (need_h) layer.h = view<Operand>(h);
            if (tangent_) layer.h_tangent = view<Operand>(h.narrow(0, p_.rows, p_.rows));
            kernels.up(layer);
          });
      const auto weight = p_.weights[l].t();
      if (!complete_) {
        multiply(p_.columns(stack_, l + 1), h, weight, true);
      } else if (tangent_) {
        multiply(p_.columns(a_tangent_, l + 1), h.narrow(0, p_.rows, p_.rows), weight, true);
      }
      if (keep_hidden[l]) hidden_[l] = h;
    }
  }

  // The last hidden layer and the output unit: o and, if wanted, G (N), the last h and the top of `d`.
  void turn(const Tensor& potential_cotangent, const Tensor& potential, bool keep_hidden, bool want_d) {
    const auto last = p_.layers() - 1;
    if (want_d) {
      d_ = at::empty({stacks_ * p_.rows, padded_units(p_.units)}, p_.options(p_.operand));
      // Where a CPU has AMX oneDNN multiplies by zero what lies beside the columns of an operand, also what down() has
      // not written yet, and NaN times zero is NaN (its issue 5717).
      if (p_.operand == at::kBFloat16 && d_.is_cpu()) d_.zero_();
      d_ = unit_columns(d_);
    }
    if (keep_hidden) hidden_[last] = at::empty({stacks_ * p_.rows, p_.widths[last]}, p_.options(p_.operand));
    with_kernels(p_,
                 [&]<class Real, class Operand, class Stored>(const PointwiseKernels<Real, Operand, Stored>& kernels) {
                   auto layer = hidden_layer<Real, Operand, Stored>(last);
                   OutputUnit<Real, Operand, Stored> out;
                   out.activation = p_.activations.back();
                   out.weight = static_cast<const Real*>(p_.output_weight.data_ptr());
                   out.bias = static_cast<const Real*>(p_.bias.data_ptr()) + p_.units;
                   out.complete = complete_;
                   out.o = view<Stored>(p_.columns(a_, p_.layers()));
                   out.potential_cotangent = view<const Real>(potential_cotangent);
                   out.potential = view<Real>(potential);
                   if (keep_hidden) layer.h = view<Operand>(hidden_[last]);
                   if (want_d) {
                     layer.d = view<Operand>(d_primal(last));
                     out.d = view<Operand>(d_primal(last + 1));
                   }
                   if (tangent_) {
                     out.o_tangent = view<Stored>(p_.columns(a_tangent_, p_.layers()));
                     if (keep_hidden) layer.h_tangent = view<Operand>(hidden_[last].narrow(0, p_.rows, p_.rows));
                     layer.d_tangent = view<Operand>(d_tangent(last));
                     out.d_tangent = view<Operand>(d_tangent(last + 1));
                   }
                   kernels.turn(layer, out);
                 });
  }

  // From layer K-1 down to `lowest`; `keep` keeps the adjoints g of a sweep without tangent.
  void down(size_t lowest, bool keep) {
    if (keep) adjoints_ = at::empty({p_.rows, p_.units - p_.widths.back()}, p_.options(stored(p_)));
    const bool have_g = saved_adjoints_.defined();
    for (size_t l = p_.layers() - 1; l > lowest; --l) {
      const auto below = l - 1;
      const auto d = p_.columns(d_, l);
      Tensor g, g_tangent;
      if (tangent_ && have_g) {
        g_tangent = at::empty({p_.rows, p_.widths[below]}, p_.options(stored(p_)));
        multiply(g_tangent, d.narrow(0, 0, p_.rows), p_.weights[below]);
        g = p_.columns(saved_adjoints_, below);
      } else {
        g = keep ? p_.columns(adjoints_, below)
                 : at::empty({stacks_ * p_.rows, p_.widths[below]}, p_.options(stored(p_)));
        multiply(g, d, p_.weights[below]);
        if (tangent_) {
          g_tangent = g.narrow(0, 0, p_.rows);
          g = g.narrow(0, p_.rows, p_.rows);
        }
      }
      with_kernels(
          p_, [&]<class Real, class Operand, class Stored>(const PointwiseKernels<Real, Operand, Stored>& kernels) {
            auto layer = hidden_layer<Real, Operand, Stored>(below);
            layer.g = view<const Stored>(g);
            layer.d = view<Operand>(d_primal(below));
            if (tangent_) {
              layer.g_tangent = view<const Stored>(g_tangent);
              layer.d_tangent = view<Operand>(d_tangent(below));
            }
            kernels.down(layer);
          });
    }
  }

  // [D'; D], or D (D' with a potential cotangent) without tangent: one column per unit.
  const Tensor& d() const { return d_; }
  // [h; h'] of layer l.
  const Tensor& hidden(size_t l) const { return hidden_[l]; }

 private:
  template <class Real, class Operand, class Stored>
  HiddenLayer<Real, Operand, Stored> hidden_layer(size_t l) const {
    HiddenLayer<Real, Operand, Stored> layer;
    layer.rows = p_.rows;
    layer.width = p_.widths[l];
    layer.activation = p_.activations[l];
    layer.bias = static_cast<const Real*>(p_.bias.data_ptr()) + p_.offsets[l];
    layer.a = view<const Stored>(p_.columns(a_, l));
    if (tangent_) layer.a_tangent = view<const Stored>(p_.columns(a_tangent_, l));
    return layer;
  }
  Tensor unit_columns(const Tensor& t) const { return t.narrow(1, 0, p_.units + 1); }
  // Columns of layer l (K: the output) of D and of D' in `d`.
  Tensor d_primal(size_t l) const { return p_.columns(tangent_ ? d_.narrow(0, p_.rows, p_.rows) : d_, l); }
  Tensor d_tangent(size_t l) const { return p_.columns(d_.narrow(0, 0, p_.rows), l); }

  const Problem& p_;
  const bool tangent_;
  const int64_t stacks_;
  bool complete_ = false;  // a_ was saved: nothing to recompute
  Tensor whole_, stack_, a_, a_tangent_, d_, saved_adjoints_, adjoints_, embedded_weight_;
  std::vector<Tensor> hidden_;
};

// Whether one kernel adds the whole quadratic term: where the device has it and B is the padded identity.
bool one_pass(const Problem& p) { return registered_device(p.x).pointwise.add_quadratic && !p.embedding.defined(); }

// In one pass: T += L B x for the rows x (N, m); phi = G + L/2 |B x|^2 in the type of the output where G is defined.
void add_to_map(const Problem& p, const Tensor& x, const Tensor& map, Tensor& potential) {
  QuadraticTerm term;
  term.x = x;
  term.constant = p.inverse_lipschitz;
  term.map = true;
  if (map.defined()) term.y = map.narrow(1, 0, p.input);
  if (potential.defined()) {
    term.potential = potential;
    term.phi = at::empty({p.rows}, p.options(p.output));
  }
  registered_device(p.x).pointwise.add_quadratic(term);
  if (potential.defined()) potential = term.phi;
}

// In one pass: grad_x += L B^T (v + u B x) ; grad_L = sum <v, B x> + u/2 |B x|^2, where they are wanted.
void add_to_gradients(const Problem& p, const Tensor& v, const Tensor& u, std::vector<Tensor>& result,
                      const Gradients& wanted) {
  if (!wanted[grad_x] && !wanted[grad_inverse_lipschitz]) return;
  QuadraticTerm term;
  term.x = p.x;
  term.constant = p.inverse_lipschitz;
  if (v.defined()) term.v = v.narrow(1, 0, p.input);
  term.u = u;
  if (wanted[grad_x]) term.y = result[grad_x];
  if (wanted[grad_inverse_lipschitz]) {
    term.gradient = result[grad_inverse_lipschitz] = at::empty({1}, p.options(p.real));
  }
  registered_device(p.x).pointwise.add_quadratic(term);
}

// The quadratic term L/2 |B x|^2 and its derivatives, in the real type throughout.
class Quadratic {
 public:
  explicit Quadratic(const Problem& p)
      : p_(p), x_(one_pass(p) ? p.x : p.x.to(p.real)), b_(p.embedding.defined() ? p.embedding.to(p.real) : Tensor()) {}

  const Tensor& x() const { return x_; }

  // out += L B y for rows y (N, m). Added to the finished product D A: starting the product from it (beta = 1) costs
  // three times the rounding error where d is small.
  void add_map(Tensor out, const Tensor& y) const {
    if (b_.defined()) {
      out.addmm_(y.to(p_.real) * p_.inverse_lipschitz, b_.t());
    } else {
      out.narrow(1, 0, p_.input).addcmul_(y.to(p_.real), p_.inverse_lipschitz);
    }
  }
  // |B x|^2, (N).
  Tensor squared_norm() const { return (b_.defined() ? at::mm(x_, b_.t()) : x_).square().sum(1); }
  // B^T v, (N, m).
  Tensor pull(const Tensor& v) const {
    return b_.defined() ? at::mm(v, b_) : p_.padded() ? v.narrow(1, 0, p_.input) : v;
  }
  // B^T B x, (N, m).
  Tensor gram_x() const { return b_.defined() ? at::mm(x_, at::mm(b_.t(), b_)) : x_; }
  const Tensor& embedding() const { return b_; }

 private:
  const Problem& p_;
  Tensor x_, b_;
};

Values potential_and_map(const Operands& o, const MapWanted& wanted) {
  const Problem p(o);
  Values values;
  Sweep sweep(p, /*tangent=*/false, {});
  const Quadratic quadratic(p);
  sweep.enter(p.x.to(p.operand));
  sweep.up(std::vector<bool>(p.layers(), false));
  if (wanted.potential) values.potential = at::empty({p.rows}, p.options(p.real));
  sweep.turn({}, values.potential, /*keep_hidden=*/false, wanted.map);
  if (wanted.map) {
    sweep.down(0, wanted.save);
    values.map = product(sweep.d(), p.skip_weight, one_pass(p) ? p.output : p.real);
  }
  if (one_pass(p)) {
    add_to_map(p, p.x, values.map, values.potential);
  } else {
    if (wanted.potential) values.potential.add_(quadratic.squared_norm() * (p.inverse_lipschitz * 0.5));
    if (wanted.map) quadratic.add_map(values.map, p.x);
  }
  if (wanted.potential) values.potential = values.potential.to(p.output);
  if (wanted.map) values.map = values.map.to(p.output);
  if (wanted.save) {
    const auto none = [&] { return at::empty({0}, p.options(stored(p))); };
    values.saved = {sweep.preactivations(), wanted.map ? sweep.adjoints() : none(),
                    p.embedding.defined() ? sweep.embedded_weight() : none()};
  }
  return values;
}

std::vector<Tensor> training_terms(const Operands& o, const Cotangents& cotangents, const Gradients& wanted) {
  const Problem p(o);
  const auto& [v_any, u_any, saved] = cotangents;
  const auto layers = p.layers();
  const bool tangent = v_any.defined();
  const Quadratic quadratic(p);
  const auto v = tangent ? (one_pass(p) ? v_any : v_any.to(p.real)) : Tensor();
  const auto u = u_any.defined() ? u_any.to(p.real).contiguous() : Tensor();
  std::vector<Tensor> result(wanted.count);

  // grad_L = sum <v, B x> + u/2 |B x|^2
  if (wanted[grad_inverse_lipschitz] && !one_pass(p)) {
    auto sum = at::zeros({1}, p.options(p.real));
    if (tangent) sum.add_((quadratic.pull(v) * quadratic.x()).sum());
    if (u.defined()) sum.add_((u * quadratic.squared_norm()).sum() * 0.5);
    result[grad_inverse_lipschitz] = sum;
  }

  // How far down: to layer 0, or to the layer above the lowest weight (K: the output unit alone), or nowhere.
  const bool bottom = wanted[grad_x] || wanted[grad_skip_weight] || wanted[grad_bias] || wanted[grad_embedding];
  size_t lowest = bottom ? 0 : layers + 1;
  std::vector<bool> keep_hidden(layers);
  for (size_t k = 0; k < layers; ++k) {
    keep_hidden[k] = wanted[grad_weights + k];
    if (keep_hidden[k]) lowest = std::min(lowest, k + 1);
  }
  if (lowest > layers) {
    if (one_pass(p)) add_to_gradients(p, v, u, result, wanted);
    return result;
  }

  Sweep sweep(p, tangent, saved);
  const auto x = p.x.to(p.operand);
  const auto v_operand = tangent ? v_any.to(p.operand) : Tensor();
  sweep.enter(x);
  if (tangent) sweep.enter_tangent(v_operand, p.skip_weight);
  sweep.up(keep_hidden);
  sweep.turn(u, {}, keep_hidden.back(), /*want_d=*/true);
  sweep.down(std::min(lowest, layers - 1), /*keep=*/false);

  const auto& stacked_d = sweep.d();                                        // [D'; D]
  const auto d_tangent = stacked_d.narrow(0, 0, p.rows);                    // D'
  const auto d = tangent ? stacked_d.narrow(0, p.rows, p.rows) : Tensor();  // D

  // grad_W_k = D'_k^T h_{k-1} + D_k^T h'_{k-1}, the output weight's likewise
  for (size_t k = 0; k < layers; ++k) {
    if (keep_hidden[k]) {
      result[grad_weights + k] = product(p.columns(stacked_d, k + 1).t(), sweep.hidden(k), result_type(p));
    }
  }
  // grad_b = sum_n D'
  if (wanted[grad_bias]) result[grad_bias] = at::sum(d_tangent, {0}, /*keepdim=*/false, result_type(p));
  // grad_x = D' A B + L B^T (v + u B x)
  if (wanted[grad_x]) {
    auto gradient = product(d_tangent, sweep.embedded_weight(), one_pass(p) ? result_type(p) : p.real);
    if (tangent && !one_pass(p)) gradient.addcmul_(quadratic.pull(v), p.inverse_lipschitz);
    if (u.defined() && !one_pass(p)) gradient.addcmul_(quadratic.gram_x(), (u * p.inverse_lipschitz).unsqueeze(1));
    result[grad_x] = gradient;
  }
  if (one_pass(p)) add_to_gradients(p, v, u, result, wanted);
  // D'^T x, the half of grad_A that has the width of x
  Tensor narrow_half;
  const bool dense = p.embedding.defined();
  if (dense && (wanted[grad_skip_weight] || wanted[grad_embedding])) {
    narrow_half = thin_product(d_tangent.t(), x, d_tangent.scalar_type());
  }
  // grad_A = D'^T x B^T + D^T v
  if (wanted[grad_skip_weight]) {
    auto gradient = tangent      ? product(d.t(), v_operand, result_type(p))
                    : p.padded() ? at::zeros({p.units + 1, p.width}, p.options(result_type(p)))
                                 : at::empty({p.units + 1, p.width}, p.options(result_type(p)));
    if (dense) {
      multiply(gradient, narrow_half, p.embedding.to(p.operand).t(), tangent);
    } else {
      multiply(gradient.narrow(1, 0, p.input), d_tangent.t(), x, tangent);
    }
    result[grad_skip_weight] = gradient;
  }
  // grad_B = A^T D'^T x + L (v^T x + B x^T (u * x))
  if (wanted[grad_embedding]) {
    auto gradient = thin_product(p.skip_weight.t(), narrow_half, p.real);
    const auto& real_x = quadratic.x();
    if (tangent) gradient.add_(at::mm(v.t(), real_x) * p.inverse_lipschitz);
    if (u.defined()) {
      const auto weighted = at::mm(real_x.t(), real_x * u.unsqueeze(1));
      gradient.add_(at::mm(quadratic.embedding(), weighted) * p.inverse_lipschitz);
    }
    result[grad_embedding] = gradient;
  }
  return result;
}

std::pair<Tensor, Tensor> map_jvp(const Operands& o, const Tensor& tangent) {
  const Problem p(o);
  Sweep sweep(p, /*tangent=*/true, {});
  const Quadratic quadratic(p);
  sweep.enter(p.x.to(p.operand));
  sweep.enter_tangent(tangent.to(p.operand), sweep.embedded_weight());
  sweep.up(std::vector<bool>(p.layers(), false));
  sweep.turn({}, {}, /*keep_hidden=*/false, /*want_d=*/true);
  sweep.down(0, /*keep=*/false);
  // T = D A + L B x ; T' = D' A + L B x'
  const auto& d = sweep.d();
  const auto type = one_pass(p) ? p.output : p.real;
  auto map = product(d.narrow(0, p.rows, p.rows), p.skip_weight, type);
  auto map_tangent = product(d.narrow(0, 0, p.rows), p.skip_weight, type);
  if (one_pass(p)) {
    Tensor none;
    add_to_map(p, p.x, map, none);
    add_to_map(p, tangent, map_tangent, none);
  } else {
    quadratic.add_map(map, p.x);
    quadratic.add_map(map_tangent, tangent);
  }
  return {map.to(p.output), map_tangent.to(p.output)};
}

}  // namespace

constinit const Implementation implementation{potential_and_map, training_terms, map_jvp};

}  // namespace ilvae::matmul
