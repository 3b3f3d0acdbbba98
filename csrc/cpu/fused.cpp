#include "cpu/fused.h"

#include <ATen/Parallel.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/determinism.h"
#include "cpu/instruction_set.h"
#include "cpu/tuning.h"

namespace ilvae::cpu {

namespace {

// A list without an allocation as long as it is short: a small call could make dozens of them.
template <class T>
using Few = c10::SmallVector<T, 8>;

template <class T>
const FusedKernels<T>& kernels() {
  const auto& all = [&]() -> const AllFusedKernels& {
#if defined(ILVAE_X86)
    if (isa() == Isa::avx512) return avx512::fused_kernels;
    if (isa() == Isa::avx2) return avx2::fused_kernels;
#endif
    return baseline::fused_kernels;
  }();
  if constexpr (std::is_same_v<T, double>) {
    return all.float64;
  } else {
    return all.float32;
  }
}

// Memory aligned to cache lines. It is never initialised.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t elements) { grow(elements); }
  T* grow(int64_t elements) {
    if (elements > size_) {
      data_.reset();
      size_ = 0;  // the next line may throw
      data_.reset(static_cast<T*>(::operator new(elements * sizeof(T), alignment)));
      size_ = elements;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, alignment); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// Memory is kept from call to call: this for the tiles of one thread.
template <class T>
T* thread_memory(int64_t elements) {
  thread_local Buffer<T> buffer;
  return buffer.grow(elements);
}
// And this, which belongs to the thread that calls, for what all threads of a call share.
template <class T>
T* shared_memory(int64_t elements) {
  thread_local Buffer<T> buffer;
  return buffer.grow(elements);
}

int threads_for(int64_t tasks, double flops) {
  return flops < serial_flops || at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), tasks);
}

// Into how many parts sums over the rows are divided.
int parts_for(int64_t tiles, double flops, int threads) {
  if (!deterministic()) return threads;
  return flops < serial_flops ? 1 : std::min<int64_t>(deterministic_parts, tiles);
}

// Runs task(i) for i < count on `threads` of torch's threads. Whoever is free takes the next. Every task writes to
// places of its own, so that results do not depend on who takes what.
template <class Task>
void run(int64_t count, int threads, const Task& task) {
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
  });
}

// The lanes of all tiles but the last. They depend on the batch alone, because saved panels outlive a change of the
// number of threads.
int64_t tile_lanes(int64_t rows, int64_t most) { return std::min(most, padded_rows((rows + 1) / 2)); }

Few<Tile> tiles_of(int64_t begin, int64_t end, int64_t lanes) {
  Few<Tile> tiles;
  for (int64_t row = begin; row < end; row += lanes) {
    const int64_t rows = std::min(lanes, end - row);
    tiles.push_back({int64_t(tiles.size()), row - begin, row, rows, std::min(lanes, padded_rows(rows))});
  }
  return tiles;
}

template <class T>
double sweep_flops(const Network<T>& net) {  // of one row of the batch
  double flops = double(net.width + net.input) * (net.units + 1);
  for (int64_t l = 1; l < net.layers; ++l) flops += 2.0 * net.hidden[l].width * net.hidden[l - 1].width;
  return 2 * flops + activation_flops * net.units;
}

}  // namespace

template <class T>
void fused_map(const Network<T>& net, const MapArguments<T>& call) {
  const auto& kernel = kernels<T>();
  const auto tiles = tiles_of(0, call.rows, tile_lanes(call.rows, kernel.tile_lanes));
  const int64_t elements = kernel.map_scratch(net);
  const int threads = threads_for(tiles.size(), sweep_flops(net) * call.rows);
  run(tiles.size(), threads,
      [&](int64_t i) { kernel.map(net, call, tiles[i], {thread_memory<T>(elements), elements}); });
}

template <class T>
void fused_jvp(const Network<T>& net, const JvpArguments<T>& call) {
  const auto& kernel = kernels<T>();
  const auto tiles = tiles_of(0, call.rows, tile_lanes(call.rows, kernel.tile_lanes));
  const int64_t elements = kernel.training_scratch(net);
  const int threads = threads_for(tiles.size(), 2 * sweep_flops(net) * call.rows);
  run(tiles.size(), threads,
      [&](int64_t i) { kernel.jvp(net, call, tiles[i], {thread_memory<T>(elements), elements}); });
}

namespace {

// Where the parameter gradients of a call go, and what they need of a chunk of tiles.
template <class T>
class Gradients {
 public:
  Gradients(const Network<T>& net, const TrainingArguments<T>& call, const ParameterGradients<T>& wanted)
      : net_(net), wanted_(wanted), kernels_(kernels<T>()), h_(net.layers), h_tangent_(net.layers) {
    const bool tangent = call.map_cotangent != nullptr;
    // h_K meets D'_out = u s_out' + s_out'' o', which is zero without u where s_out is linear
    const bool output_adjoint = call.potential_cotangent || net.output_activation.kind != ActivationKind::identity;
    const bool dense = net.embedding != nullptr;
    narrow_ = net.width <= narrow_width;
    bool d = wanted.skip_weight || wanted.narrow || wanted.bias;
    for (int64_t l = 0; l < net.layers; ++l) d = d || wanted.weights[l];
    if (d) want(&kept_.d_tangent, net.units + 1);
    if (d && tangent) want(&kept_.d, net.units + 1);
    for (int64_t l = 0; l < net.layers; ++l) {
      if (!wanted.weights[l]) continue;
      const int64_t width = net.hidden[l].width, elements = l + 1 < net.layers ? whole_vectors(width) : width;
      if (l + 1 < net.layers || output_adjoint) want(&h_[l], elements);
      if (tangent) want(&h_tangent_[l], elements);
    }
    if (dense ? wanted.narrow : wanted.skip_weight) {
      want(&kept_.x, narrow_ ? net.input : whole_vectors(dense ? net.input : net.width));
    }
    if (tangent && wanted.skip_weight) want(&kept_.v, narrow_ ? net.width : whole_vectors(net.width));
    if (wanted.inverse_lipschitz) want(&kept_.constant_terms, 1);
    for_each(wanted, [&](T*, int64_t count) { parameters_ += count; });
  }
  Gradients(const Gradients&) = delete;

  int64_t elements_per_lane() const { return per_lane_; }
  int64_t parameters() const { return parameters_; }

  // Places the operands of `lanes` lanes in memory, one after another.
  const Operands<T>& place(T* memory, int64_t lanes) {
    for (const auto& [pointer, elements] : wishes_) {
      *pointer = memory;
      memory += elements * lanes;
    }
    kept_.h = h_.data();
    kept_.h_tangent = h_tangent_.data();
    return kept_;
  }

  // A piece of work: rows [begin, end) of a column panel of a gradient.
  struct Piece {
    WeightGradient<T> gradient;
    int64_t panel, begin, end;
  };
  // The weight gradients of a chunk whose operands have been placed and swept, in pieces for `parts` threads.
  Few<Piece> pieces(const ParameterGradients<T>& target, bool add, int64_t parts) const {
    Few<Piece> result;
    const auto split = [&](T* gradient, int64_t rows, int64_t columns, int64_t first_unit, bool dot, const T* right,
                           int64_t right_columns, const T* right_tangent) {
      if (!gradient) return;
      const WeightGradient<T> g{.gradient = gradient,
                                .rows = rows,
                                .columns = columns,
                                .dot = dot,
                                .left = {right ? kept_.d_tangent : nullptr, right_tangent ? kept_.d : nullptr},
                                .right = {right, right_tangent},
                                .left_units = net_.units + 1,
                                .first_unit = first_unit,
                                .right_columns = {right_columns, columns},
                                .add = add};
      const int64_t panels = dot ? 1 : (columns + kernels_.panel_columns - 1) / kernels_.panel_columns;
      // every thread gets about two pieces of a column panel
      const int64_t share = rounded_up(rows / (2 * parts), gradient_rows_step) + gradient_rows_step;
      const int64_t height = std::min(gradient_rows, parts == 1 ? rows : share);
      for (int64_t panel = 0; panel < panels; ++panel) {
        for (int64_t row = 0; row < rows; row += height) {
          result.push_back({g, panel, row, std::min(rows, row + height)});
        }
      }
    };
    const int64_t units = net_.units + 1, last = net_.layers - 1;
    split(target.skip_weight, units, net_.width, 0, narrow_, net_.embedding ? nullptr : kept_.x, net_.input, kept_.v);
    split(target.narrow, units, net_.input, 0, narrow_, kept_.x, net_.input, nullptr);
    for (int64_t l = 0; l < last; ++l) {
      const int64_t width = net_.hidden[l].width;
      split(target.weights[l], net_.hidden[l + 1].width, width, net_.hidden[l + 1].first, false, h_[l], width,
            h_tangent_[l]);
    }
    const int64_t width = net_.hidden[last].width;
    split(target.weights[last], 1, width, net_.units, true, h_[last], width, h_tangent_[last]);
    return result;
  }

  // The sums over rows: grad_b and grad_L.
  void sums(const ParameterGradients<T>& target, const Few<Tile>& tiles, bool add) const {
    if (target.bias) kernels_.sum_rows(target.bias, kept_.d_tangent, net_.units + 1, tiles.data(), tiles.size(), add);
    if (target.inverse_lipschitz) {
      T sum = add ? *target.inverse_lipschitz : T(0);
      for (const auto& tile : tiles) sum += kept_.constant_terms[tile.index];
      *target.inverse_lipschitz = sum;
    }
  }

  // The same gradients in other memory, one after another.
  ParameterGradients<T> elsewhere(T* memory, Few<T*>& weights) const {
    ParameterGradients<T> other = wanted_;
    weights.assign(wanted_.weights, wanted_.weights + net_.layers);
    const auto move = [&](T*& pointer, int64_t count) {
      if (!pointer) return;
      pointer = memory;
      memory += count;
    };
    move(other.skip_weight, (net_.units + 1) * net_.width);
    move(other.narrow, (net_.units + 1) * net_.input);
    move(other.bias, net_.units + 1);
    move(other.inverse_lipschitz, 1);
    for (int64_t l = 0; l < net_.layers; ++l) move(weights[l], weight_elements(l));
    other.weights = weights.data();
    return other;
  }

  // body(pointer, elements) for every gradient, in the order of elsewhere().
  template <class Body>
  void for_each(const ParameterGradients<T>& g, const Body& body) const {
    if (g.skip_weight) body(g.skip_weight, (net_.units + 1) * net_.width);
    if (g.narrow) body(g.narrow, (net_.units + 1) * net_.input);
    if (g.bias) body(g.bias, net_.units + 1);
    if (g.inverse_lipschitz) body(g.inverse_lipschitz, int64_t(1));
    for (int64_t l = 0; l < net_.layers; ++l) {
      if (g.weights[l]) body(g.weights[l], weight_elements(l));
    }
  }

 private:
  int64_t whole_vectors(int64_t columns) const { return rounded_up(columns, kernels_.vector_lanes); }
  int64_t weight_elements(int64_t l) const {
    return net_.hidden[l].width * (l + 1 < net_.layers ? net_.hidden[l + 1].width : 1);
  }
  void want(T** pointer, int64_t elements) {
    wishes_.push_back({pointer, elements});
    per_lane_ += elements;
  }

  const Network<T>& net_;
  const ParameterGradients<T> wanted_;
  const FusedKernels<T>& kernels_;
  bool narrow_ = false;
  Few<T*> h_, h_tangent_;
  Operands<T> kept_;
  Few<std::pair<T**, int64_t>> wishes_;
  int64_t per_lane_ = 0, parameters_ = 0;
};

// A thread takes a part of the rows through sweeps and weight gradients, a chunk that fits its L2 cache at a time. The
// parts of the gradients are added in order. This is for small networks: operands never leave their core.
template <class T>
void training_by_rows(const Network<T>& net, const TrainingArguments<T>& call, const ParameterGradients<T>& wanted,
                      int64_t lanes, int threads, int parts) {
  const auto& kernel = kernels<T>();
  const int64_t elements = kernel.training_scratch(net);
  const int64_t tiles_in_all = (call.rows + lanes - 1) / lanes;
  const int64_t parameters = parts > 1 ? Gradients<T>(net, call, wanted).parameters() : 0;
  T* const partial = parts > 1 ? shared_memory<T>(parameters * (parts - 1)) : nullptr;
  run(parts, threads, [&](int64_t share) {
    Gradients<T> gradients(net, call, wanted);
    Few<T*> weights;
    const auto target = share == 0 ? wanted : gradients.elsewhere(partial + (share - 1) * parameters, weights);
    const int64_t per_lane = gradients.elements_per_lane();
    const int64_t chunk =
        std::max<int64_t>(1, thread_chunk_bytes / (std::max<int64_t>(1, per_lane) * sizeof(T) * lanes)) * lanes;
    const int64_t begin = tiles_in_all * share / parts * lanes;
    const int64_t end = std::min(call.rows, tiles_in_all * (share + 1) / parts * lanes);
    for (int64_t row = begin; row < end; row += chunk) {
      const auto tiles = tiles_of(row, std::min(end, row + chunk), lanes);
      T* const memory = thread_memory<T>(elements + per_lane * std::min(chunk, padded_rows(end - row)));
      const auto& kept = gradients.place(memory + elements, tiles.back().offset + tiles.back().lanes);
      for (const auto& tile : tiles) kernel.training(net, call, kept, tile, {memory, elements});
      for (const auto& piece : gradients.pieces(target, row > begin, 1)) {
        kernel.weight_gradient(piece.gradient, tiles.data(), tiles.size(), piece.panel, piece.begin, piece.end);
      }
      gradients.sums(target, tiles, row > begin);
    }
  });
  if (parts > 1) {
    const Gradients<T> gradients(net, call, wanted);
    int64_t offset = 0;
    gradients.for_each(wanted, [&](T* gradient, int64_t count) {
      for (int share = 1; share < parts; ++share) {
        const T* const part = partial + (share - 1) * parameters + offset;
        for (int64_t i = 0; i < count; ++i) gradient[i] += part[i];
      }
      offset += count;
    });
  }
}

// Threads share the tiles of a chunk, and then the elements of the weight gradients. This is for large networks:
// gradients are written once.
template <class T>
void training_by_gradients(const Network<T>& net, const TrainingArguments<T>& call, const ParameterGradients<T>& wanted,
                           int64_t lanes, int threads, int parts) {
  const auto& kernel = kernels<T>();
  Gradients<T> gradients(net, call, wanted);
  const int64_t elements = kernel.training_scratch(net), per_lane = gradients.elements_per_lane();
  const int64_t affordable = shared_chunk_bytes / (std::max<int64_t>(1, per_lane) * sizeof(T) * lanes);
  const int64_t chunk = std::max<int64_t>(2 * parts, affordable) * lanes;
  for (int64_t row = 0; row < call.rows; row += chunk) {
    const auto tiles = tiles_of(row, std::min(call.rows, row + chunk), lanes);
    const int64_t all_lanes = tiles.back().offset + tiles.back().lanes;
    const auto& kept = gradients.place(shared_memory<T>(per_lane * all_lanes), all_lanes);
    run(tiles.size(), threads,
        [&](int64_t i) { kernel.training(net, call, kept, tiles[i], {thread_memory<T>(elements), elements}); });
    const auto pieces = gradients.pieces(wanted, row > 0, parts);
    run(pieces.size() + 1, threads, [&](int64_t i) {
      if (i == int64_t(pieces.size())) return gradients.sums(wanted, tiles, row > 0);
      const auto& piece = pieces[i];
      kernel.weight_gradient(piece.gradient, tiles.data(), tiles.size(), piece.panel, piece.begin, piece.end);
    });
  }
}

}  // namespace

template <class T>
void fused_training_terms(const Network<T>& net, const TrainingArguments<T>& call,
                          const ParameterGradients<T>& wanted) {
  if (call.rows == 0) return;
  const int64_t lanes = tile_lanes(call.rows, kernels<T>().tile_lanes), tiles = (call.rows + lanes - 1) / lanes;
  const double flops = 2 * sweep_flops(net) * call.rows;
  const int threads = threads_for(tiles, flops), parts = parts_for(tiles, flops, threads);
  if (parts == 1) return training_by_rows(net, call, wanted, lanes, threads, parts);
  // elements moved: parts of gradients are written and read, or operands are read on another core
  const Gradients<T> gradients(net, call, wanted);
  const bool by_rows = 2 * gradients.parameters() * parts < gradients.elements_per_lane() * call.rows;
  by_rows ? training_by_rows(net, call, wanted, lanes, threads, parts)
          : training_by_gradients(net, call, wanted, lanes, threads, parts);
}

template void fused_map(const Network<float>&, const MapArguments<float>&);
template void fused_map(const Network<double>&, const MapArguments<double>&);
template void fused_jvp(const Network<float>&, const JvpArguments<float>&);
template void fused_jvp(const Network<double>&, const JvpArguments<double>&);
template void fused_training_terms(const Network<float>&, const TrainingArguments<float>&,
                                   const ParameterGradients<float>&);
template void fused_training_terms(const Network<double>&, const TrainingArguments<double>&,
                                   const ParameterGradients<double>&);

}  // namespace ilvae::cpu
