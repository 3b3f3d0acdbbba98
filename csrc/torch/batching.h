// Cotangents that carry a hidden batch, from torch.autograd.grad(is_grads_batched=True) (and so
// torch.autograd.functional.jacobian(vectorize=True)) or torch.vmap around torch.autograd.grad.
#pragma once

#include <ATen/ATen.h>
#include <ATen/functorch/BatchedTensorImpl.h>

// the other does not compile after it: its functions have the same names
#include <ATen/LegacyBatchedTensorImpl.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace ilvae {

// A tensor without the outermost batch that vmap hides in it; autograd still has the vmap of its own, the older one.
struct Hidden {
  at::Tensor value;
  int64_t dim, level;
  bool legacy;

  static std::optional<Hidden> in(const at::Tensor& t) {
    if (!t.defined()) return std::nullopt;
    if (const auto* const impl = at::functorch::maybeGetBatchedImpl(t)) {
      return Hidden{impl->value(), impl->bdim(), impl->level(), false};
    }
    const auto* const impl = at::maybeGetBatchedImpl(t);
    if (!impl) return std::nullopt;
    const auto batches = impl->bdims();
    TORCH_CHECK_NOT_IMPLEMENTED(batches.size() == 1, "cotangents: got ", batches.size(), " nested batches, wanted one");
    return Hidden{impl->value(), batches[0].dim(), batches[0].level(), true};
  }
  bool same_batch(const Hidden& other) const { return level == other.level && legacy == other.legacy; }
};

// call(cotangents) -> gradients, in turn for each cotangent of the batches hidden in them: the operators have rules for
// batches of rows, but gradients of parameters are sums over rows.
template <class Call>
std::vector<at::Tensor> for_each_cotangent(const std::vector<at::Tensor>& cotangents, const Call& call) {
  std::optional<Hidden> batch;
  for (const auto& c : cotangents) {
    const auto hidden = Hidden::in(c);
    if (hidden && (!batch || hidden->level > batch->level)) batch = hidden;
  }
  if (!batch) return call(cotangents);
  const int64_t count = batch->value.size(batch->dim);
  std::vector<std::vector<at::Tensor>> results;
  for (int64_t i = 0; i < std::max<int64_t>(1, count); ++i) {  // once for an empty batch too: the shapes
    auto one = cotangents;
    for (auto& c : one) {
      const auto hidden = Hidden::in(c);
      if (!hidden || !hidden->same_batch(*batch)) continue;
      c = count ? hidden->value.select(hidden->dim, i) : hidden->value.sum(hidden->dim);
    }
    results.push_back(for_each_cotangent(one, call));
  }
  std::vector<at::Tensor> gradients;
  for (size_t k = 0; k < results[0].size(); ++k) {
    if (!results[0][k].defined()) {
      gradients.emplace_back();
      continue;
    }
    std::vector<at::Tensor> parts;
    for (const auto& result : results) parts.push_back(result[k]);
    const auto whole = at::stack(parts).narrow(0, 0, count);
    gradients.push_back(batch->legacy ? at::makeBatched(whole, {{batch->level, 0}})
                                      : at::functorch::makeBatched(whole, 0, batch->level));
  }
  return gradients;
}

}  // namespace ilvae
