// The CPU kernels and their schedule under ThreadSanitizer, without torch, whose own threads a race detector cannot
// follow. Maps, tangents and training terms of small and large networks on 1 to 8 threads, and for 16 callers at once:
// no race, and the same bits.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "ATen/Context.h"
#include "ATen/Parallel.h"
#include "cpu/fused.h"
#include "cpu/instruction_set.h"
#include "cpu/pointwise.h"

namespace ilvae::cpu {
Isa isa() { return Isa::baseline; }  // the schedule is the same for all
}  // namespace ilvae::cpu

namespace {

using namespace ilvae;
using namespace ilvae::cpu;

template <class T>
struct Example {
  std::vector<HiddenUnits> hidden;
  std::vector<T> numbers;  // parameters and batches are taken from here
  std::vector<const T*> weights;
  Network<T> net;
  int64_t rows;

  Example(int64_t input, int64_t width, std::vector<int64_t> widths, bool dense, int64_t rows) : rows(rows) {
    for (int64_t i = 0; i < 1 << 17; ++i) numbers.push_back(T(std::sin(0.37 * i) / 8));
    net.input = input, net.width = width, net.layers = widths.size();
    for (const auto n : widths) {
      hidden.push_back({n, net.units, {ActivationKind::softplus, 2.0}});
      net.units += n;
      net.widest = std::max(net.widest, n);
    }
    weights.assign(widths.size(), numbers.data());
    net.hidden = hidden.data();
    net.output_activation = {ActivationKind::softplus, 1.0};
    net.skip_weight = net.bias = numbers.data() + 5;
    net.embedding = dense ? numbers.data() + 9 : nullptr;
    net.embedded_weight = net.skip_weight;  // no A B, but any numbers will do
    net.embedded_stride = dense ? input : width;
    net.weights = weights.data();
    net.inverse_lipschitz = T(0.5);
  }
  Example(const Example&) = delete;

  // All results, one after another; `deterministic`: of the training terms, too, whatever the threads.
  std::vector<T> results(int threads, bool deterministic) const {
    at::set_num_threads(threads);
    at::globalContext().deterministic = deterministic;
    std::vector<std::vector<T>> made;
    const auto make = [&](int64_t count) { return made.emplace_back(count, T(0)).data(); };
    made.reserve(64);

    const int64_t padded = padded_rows(rows);
    MapArguments<T> there;
    there.rows = rows, there.x = numbers.data() + 3;
    there.potential = make(rows), there.map = make(rows * net.width);
    T* const a = make(padded * (net.units + 1));
    T* const g = make(padded * (net.units - hidden.back().width));
    there.preactivations = a, there.adjoints = g;
    fused_map(net, there);

    JvpArguments<T> jvp;
    jvp.rows = rows, jvp.x = there.x, jvp.tangent = numbers.data() + 11;
    jvp.map = make(rows * net.width), jvp.map_tangent = make(rows * net.width);
    fused_jvp(net, jvp);

    TrainingArguments<T> back;
    back.rows = rows, back.x = there.x;
    back.map_cotangent = numbers.data() + 7, back.potential_cotangent = numbers.data() + 13;
    back.preactivations = a, back.adjoints = g;
    back.grad_x = make(rows * net.input);
    if (threads == 1 || deterministic) {  // otherwise the order of sums is that of the threads
      training(back, make);
    } else {
      std::vector<std::vector<T>> ignored;
      ignored.reserve(64);
      training(back, [&](int64_t count) { return ignored.emplace_back(count, T(0)).data(); });
    }

    T* const weight = make(numbers.size());
    T* const gradient = make(numbers.size());
    softplus(weight, numbers.data(), numbers.size());
    softplus_backward(gradient, numbers.data(), weight, numbers.size());
    std::vector<T> all;
    for (const auto& part : made) all.insert(all.end(), part.begin(), part.end());
    return all;
  }

 private:
  template <class Make>
  void training(const TrainingArguments<T>& back, const Make& make) const {
    ParameterGradients<T> gradients;
    gradients.skip_weight = make((net.units + 1) * net.width);
    gradients.narrow = net.embedding ? make((net.units + 1) * net.input) : nullptr;
    gradients.bias = make(net.units + 1);
    gradients.inverse_lipschitz = make(1);
    std::vector<T*> of_weights;
    for (int64_t l = 0; l < net.layers; ++l) {
      of_weights.push_back(make(hidden[l].width * (l + 1 < net.layers ? hidden[l + 1].width : 1)));
    }
    gradients.weights = of_weights.data();
    fused_training_terms(net, back, gradients);
  }
};

std::atomic<int> calls{0}, different{0};

template <class T>
void compare(const std::vector<T>& one, const std::vector<T>& other) {
  ++calls;
  if (one.size() != other.size() || std::memcmp(one.data(), other.data(), one.size() * sizeof(T)) != 0) ++different;
}

template <class T>
void check(const Example<T>& example) {
  const auto expected = example.results(1, true);
  for (const int threads : {2, 3, 8}) compare(expected, example.results(threads, true));
  example.results(4, false);  // the other order of the sums: for the race detector alone
  std::vector<std::thread> callers;
  for (int k = 0; k < 16; ++k) {
    callers.emplace_back([&, k] { compare(expected, example.results(1 + k % 3, true)); });
  }
  for (auto& caller : callers) caller.join();
}

}  // namespace

int main() {
  check(Example<float>(5, 5, {40, 24}, false, 200));    // parts of the rows, whose gradients are added
  check(Example<double>(3, 20, {130, 120}, true, 70));  // shared gradients
  std::printf("%d calls, %d with other bits\n", calls.load(), different.load());
  return different ? 1 : 0;
}
