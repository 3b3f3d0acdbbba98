// torch's setting for deterministic algorithms.
#pragma once

namespace at {

struct Context {
  bool deterministic = false;
  bool deterministicAlgorithms() const { return deterministic; }
};

inline Context& globalContext() {
  static Context context;
  return context;
}

}  // namespace at
