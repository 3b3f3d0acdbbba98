// torch.use_deterministic_algorithms: results of the CPU then do not depend on the number of threads.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>

namespace ilvae::cpu {

inline bool deterministic() { return at::globalContext().deterministicAlgorithms(); }

// For the life of it ATen and BLAS, which divide sums by the number of threads, have one where results must be
// deterministic. Nothing less does: MKL takes the threads it was given last even inside a parallel region.
class OneThread {
 public:
  OneThread() {
    if (threads_ > 1) at::set_num_threads(1);
  }
  ~OneThread() {
    if (threads_ > 1) at::set_num_threads(threads_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  const int threads_ = deterministic() && !at::in_parallel_region() ? at::get_num_threads() : 1;
};

}  // namespace ilvae::cpu
