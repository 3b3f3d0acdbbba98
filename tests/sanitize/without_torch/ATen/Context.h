// torch's switch for deterministic algorithms, for kernels that are compiled without torch.
#pragma once

namespace at {

struct Context {
  bool deterministic = false;
  bool deterministicAlgorithms() const { return deterministic; }
};
inline Context& globalContext() {
  static thread_local Context context;
  return context;
}

}  // namespace at
