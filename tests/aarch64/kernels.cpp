// The kernels of csrc/cpu in a program of their own, without torch, for processors that tests can only emulate.
//
// Standard input has problems, one after another: integers (int64), then numbers (float64) that the program rounds to
// the type it computes in. Standard output has the results (float64). Their order is that of run() and of
// tests/test_aarch64.py.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "ATen/Context.h"
#include "ATen/Parallel.h"
#include "cpu/fused.h"
#include "cpu/pointwise.h"

namespace {

using namespace ilvae;
using namespace ilvae::cpu;

bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

int64_t integer() {
  int64_t value = 0;
  if (!read(&value, sizeof value)) std::exit(2);
  return value;
}

template <class T>
std::vector<T> numbers(int64_t count) {
  std::vector<double> wide(count);
  if (!read(wide.data(), count * sizeof(double))) std::exit(2);
  return {wide.begin(), wide.end()};
}

double wide(double value) { return value; }
double wide(bfloat16 value) { return __builtin_bit_cast(float, uint32_t(value.bits) << 16); }

template <class T>
void write(const std::vector<T>& values) {
  std::vector<double> result;
  for (const auto& value : values) result.push_back(wide(value));
  std::fwrite(result.data(), sizeof(double), result.size(), stdout);
}

Activation activation() {
  const auto described = numbers<double>(2);
  return {static_cast<ActivationKind>(described[0]), described[1]};
}

// Values, training terms and Jacobian-vector products of the fused route.
template <class T>
struct Fused {
  const int64_t rows = integer(), input = integer(), width = integer(), dense = integer(), layers = integer();
  std::vector<HiddenUnits> hidden;
  std::vector<std::vector<T>> weights;
  Network<T> net;

  std::vector<T> x, v, u, tangent, skip_weight, embedding, embedded_weight, bias;

  Fused() {
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t n = integer();
      hidden.push_back({n, net.units, {}});
      net.units += n;
      net.widest = std::max(net.widest, n);
    }
    for (auto& layer : hidden) layer.activation = activation();
    net.output_activation = activation();
    net.inverse_lipschitz = numbers<T>(1)[0];
    x = numbers<T>(rows * input);
    v = numbers<T>(rows * width);
    u = numbers<T>(rows);
    tangent = numbers<T>(rows * input);
    skip_weight = numbers<T>((net.units + 1) * width);
    bias = numbers<T>(net.units + 1);
    for (int64_t l = 0; l < layers; ++l) weights.push_back(numbers<T>(elements(l)));
    if (dense) {
      embedding = numbers<T>(width * input);
      for (int64_t i = 0; i <= net.units; ++i) {
        for (int64_t j = 0; j < input; ++j) {
          double sum = 0;
          for (int64_t k = 0; k < width; ++k) sum += double(skip_weight[i * width + k]) * embedding[k * input + j];
          embedded_weight.push_back(T(sum));
        }
      }
    }
  }

  int64_t elements(int64_t l) const { return hidden[l].width * (l + 1 < layers ? hidden[l + 1].width : 1); }

  void run() {
    std::vector<const T*> pointers;
    for (const auto& w : weights) pointers.push_back(w.data());
    net.input = input, net.width = width, net.layers = layers;
    net.hidden = hidden.data();
    net.skip_weight = skip_weight.data();
    net.embedded_weight = dense ? embedded_weight.data() : skip_weight.data();
    net.embedded_stride = dense ? input : width;
    net.embedding = dense ? embedding.data() : nullptr;
    net.bias = bias.data();
    net.weights = pointers.data();

    std::vector<T> potential(rows), map(rows * width), map_tangent(rows * width);
    std::vector<T> preactivations(padded_rows(rows) * (net.units + 1));
    std::vector<T> adjoints(padded_rows(rows) * (net.units - hidden.back().width));
    MapArguments<T> there;
    there.rows = rows, there.x = x.data(), there.potential = potential.data(), there.map = map.data();
    there.preactivations = preactivations.data(), there.adjoints = adjoints.data();
    fused_map(net, there);
    write(potential), write(map);

    JvpArguments<T> jvp;
    jvp.rows = rows, jvp.x = x.data(), jvp.tangent = tangent.data();
    jvp.map = map.data(), jvp.map_tangent = map_tangent.data();
    fused_jvp(net, jvp);
    write(map), write(map_tangent);

    for (const bool saved : {false, true}) {
      std::vector<T> grad_x(rows * input), skip((net.units + 1) * width), narrow((net.units + 1) * input);
      std::vector<T> grad_bias(net.units + 1), constant(1);
      std::vector<std::vector<T>> grads;
      for (int64_t l = 0; l < layers; ++l) grads.emplace_back(elements(l));
      std::vector<T*> targets;
      for (auto& g : grads) targets.push_back(g.data());
      TrainingArguments<T> back;
      back.rows = rows, back.x = x.data(), back.map_cotangent = v.data(), back.potential_cotangent = u.data();
      back.grad_x = grad_x.data();
      if (saved) back.preactivations = preactivations.data(), back.adjoints = adjoints.data();
      ParameterGradients<T> wanted;
      wanted.skip_weight = skip.data(), wanted.bias = grad_bias.data(), wanted.inverse_lipschitz = constant.data();
      wanted.narrow = dense ? narrow.data() : nullptr;
      wanted.weights = targets.data();
      fused_training_terms(net, back, wanted);
      write(grad_x), write(skip), write(grad_bias), write(constant);
      for (const auto& g : grads) write(g);
      if (dense) write(narrow);
    }
  }
};

// The pointwise steps of the matmul route, with a layer's matrices as they come.
template <class T, class Operand>
void pointwise() {
  const int64_t rows = integer(), width = integer(), size = rows * width;
  const auto inner = activation(), outer = activation();
  const auto bias = numbers<T>(width), weight = numbers<T>(width), output_bias = numbers<T>(1);
  const auto a = numbers<T>(size), a_tangent = numbers<T>(size), g = numbers<T>(size), g_tangent = numbers<T>(size);
  auto o = numbers<T>(rows), o_tangent = numbers<T>(rows);
  const auto u = numbers<T>(rows);
  std::vector<Operand> h(size), h_tangent(size), d(size), d_tangent(size), d_out(rows), d_out_tangent(rows);
  std::vector<T> potential(rows);
  const auto& kernels = pointwise_kernels<T, Operand>();
  HiddenLayer<T, Operand> layer;
  layer.rows = rows, layer.width = width, layer.activation = inner, layer.bias = bias.data();
  layer.a = {a.data(), width}, layer.a_tangent = {a_tangent.data(), width};
  layer.h = {h.data(), width}, layer.h_tangent = {h_tangent.data(), width};
  layer.g = {g.data(), width}, layer.g_tangent = {g_tangent.data(), width};
  layer.d = {d.data(), width}, layer.d_tangent = {d_tangent.data(), width};
  kernels.up(layer);
  write(h), write(h_tangent);
  kernels.down(layer);
  write(d), write(d_tangent);
  OutputUnit<T, Operand> out;
  out.activation = outer, out.weight = weight.data(), out.bias = output_bias.data();
  out.o = {o.data(), 1}, out.o_tangent = {o_tangent.data(), 1}, out.potential_cotangent = {u.data(), 1};
  out.potential = {potential.data(), 1}, out.d = {d_out.data(), 1}, out.d_tangent = {d_out_tangent.data(), 1};
  kernels.turn(layer, out);
  write(o), write(o_tangent), write(potential), write(d_out), write(d_out_tangent), write(d), write(d_tangent);
}

template <class T>
void weights() {
  const int64_t count = integer();
  const auto raw = numbers<T>(count), cotangent = numbers<T>(count);
  std::vector<T> weight(count), gradient(count);
  softplus(weight.data(), raw.data(), count);
  softplus_backward(gradient.data(), raw.data(), cotangent.data(), count);
  write(weight), write(gradient);
}

}  // namespace

int main() {
  for (int64_t kind; read(&kind, sizeof kind);) {
    const bool wide = integer() == 8;
    at::threads = integer();
    at::globalContext().deterministic = integer();
    if (kind == 0) wide ? Fused<double>().run() : Fused<float>().run();
    if (kind == 1) wide ? pointwise<double, double>() : pointwise<float, float>();
    if (kind == 2) pointwise<float, bfloat16>();
    if (kind == 3) wide ? weights<double>() : weights<float>();
  }
}
