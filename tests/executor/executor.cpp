// The scheduler: every thread of a block is a fiber; a warp runs until its lanes wait, lanes meet in warp-wide
// operations, warps at the block barrier.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <sstream>

#include "runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace executor {

Thread* running = nullptr;
uint32_t block_epoch = 0;
std::vector<uint32_t> warp_epochs;
Memory shared_memory, stacks;
uint32_t threads_per_block = 0;

namespace {

constexpr int max_threads = 1024;
constexpr size_t stack_bytes = 512 << 10;  // reserved; committed when touched
constexpr size_t max_shared_bytes = 232448;
constexpr size_t max_findings = 20;

enum class State { ready, at_warp, at_block, finished };

struct Fiber : Thread {
  State state = State::finished;
  uint3 index;
  uint32_t mask = 0;  // what it waits for
  const char* what = "";
  Where where;
  void (*perform)(void* const*) = nullptr;
  void* record = nullptr;

  ucontext_t start;
  jmp_buf context;
  bool started = false;
  unsigned char* stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

std::vector<Fiber> fibers(max_threads);
Fiber* current = nullptr;
jmp_buf scheduler;
ucontext_t scheduler_start;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

void (*kernel)(void*) = nullptr;
void* kernel_context = nullptr;

std::string removed_file;  // of the block barrier that is passed by
int64_t removed_line = 0;

std::mt19937 generator;
bool sequential = true;
bool failed = false;  // a deadlock: fibers are abandoned, later launches of the call skipped
std::vector<std::string> findings;
std::string findings_text;

// ---- fibers: made by ucontext, switched by setjmp and longjmp, which make no system calls

void body();

void to_scheduler() {
  Fiber& fiber = *current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
  if (_setjmp(fiber.context) == 0) _longjmp(scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void body() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  for (;;) {
    kernel(kernel_context);
    current->state = State::finished;
    to_scheduler();
  }
}

void run(Fiber& fiber) {
  current = &fiber;
  running = &fiber;
  threadIdx = fiber.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, stack_bytes);
#endif
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = stack_bytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, body, 0);
    swapcontext(&scheduler_start, &fiber.start);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

void wait(State state, uint32_t mask, const char* what, Where where, void (*perform)(void* const*), void* record) {
  Fiber& fiber = *current;
  fiber.state = state;
  fiber.mask = mask;
  fiber.what = what;
  fiber.where = where;
  fiber.perform = perform;
  fiber.record = record;
  to_scheduler();
}

void allocate_stacks() {
  if (stacks.begin) return;
  stacks.bytes = stack_bytes * max_threads;
  void* memory =
      mmap(nullptr, stacks.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("executor: no memory for stacks");
    std::abort();
  }
  stacks.begin = static_cast<unsigned char*>(memory);
  for (int i = 0; i < max_threads; ++i) fibers[i].stack = stacks.begin + i * stack_bytes;
}

// ---- what a thread waits for, in words

std::string file_of(Where where) {
  const std::string path = where.file_name();
  return path.substr(path.find_last_of('/') + 1);
}

std::string at(Where where) { return file_of(where) + ":" + std::to_string(where.line()); }

std::string waits_for(const Fiber& fiber) {
  switch (fiber.state) {
    case State::ready:
      return "runs";
    case State::finished:
      return "has left the kernel";
    case State::at_block:
      return "waits at the block barrier of " + at(fiber.where);
    case State::at_warp:
      break;
  }
  std::ostringstream text;
  text << "waits in " << fiber.what << " at " << at(fiber.where) << " for lanes " << std::hex << fiber.mask;
  return text.str();
}

void fail(const std::string& what, const Fiber& a, const Fiber& b) {
  report(what + ": " + place(a.id) + " " + waits_for(a) + ", " + place(b.id) + " " + waits_for(b));
  failed = true;
}

bool same_place(const Fiber& a, const Fiber& b) {
  const auto same = [](const char* s, const char* t) { return s == t || std::strcmp(s, t) == 0; };
  return a.where.line() == b.where.line() && a.where.column() == b.where.column() && same(a.what, b.what) &&
         same(a.where.file_name(), b.where.file_name());
}

// ---- warps

struct Warp {
  Fiber* lanes;
  int count;

  bool any(State state) const {
    for (int i = 0; i < count; ++i)
      if (lanes[i].state == state) return true;
    return false;
  }
};

// All lanes wait. Performs one warp-wide operation whose lanes are complete; false if there is none.
bool meet(const Warp& warp) {
  for (int i = 0; i < warp.count; ++i) {
    Fiber& first = warp.lanes[i];
    if (first.state != State::at_warp) continue;
    void* records[32] = {};
    for (int j = 0; j < warp.count; ++j) {
      Fiber& other = warp.lanes[j];
      if (!(first.mask >> j & 1)) continue;
      if (other.state != State::at_warp || other.mask != first.mask || !same_place(first, other)) {
        fail("divergent warp", first, other);
        return false;
      }
      records[j] = other.record;
    }
    if (!(first.mask >> i & 1)) {
      report("warp mask: " + place(first.id) + " " + waits_for(first) + ", which leaves itself out");
      failed = true;
      return false;
    }
    if (first.perform) first.perform(records);
    for (int j = 0; j < warp.count; ++j)
      if (first.mask >> j & 1) warp.lanes[j].state = State::ready;
    return true;
  }
  return false;
}

// Runs the warp until it can go no further, or for so many steps.
void advance(const Warp& warp, uint32_t steps) {
  while (steps-- > 0 && !failed) {
    if (!warp.any(State::ready) && !meet(warp)) return;
    const uint32_t offset = sequential ? 0 : random_below(32), stride = sequential ? 1 : 2 * random_below(16) + 1;
    for (uint32_t i = 0; i < 32; ++i) {
      const int lane = (offset + i * stride) & 31;
      if (lane < warp.count && warp.lanes[lane].state == State::ready) run(warp.lanes[lane]);
    }
  }
}

bool finished(const Fiber& fiber) { return fiber.state == State::finished; }

void run_block() {
  const int threads = static_cast<int>(threads_per_block), warps = (threads + 31) / 32;
  const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.id = block * threads_per_block + i + 1;
    fiber.warp = i / 32;
    fiber.lane = i % 32;
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fiber.copies.clear();
    fiber.group = 0;
    fiber.state = State::ready;
  }
  while (!failed) {
    std::vector<Warp> able;
    for (int w = 0; w < warps; ++w) {
      const Warp warp{&fibers[32 * w], std::min(32, threads - 32 * w)};
      if (warp.any(State::ready) || warp.any(State::at_warp)) able.push_back(warp);
    }
    if (!able.empty()) {
      // Half of the time the warp runs ahead to the block barrier, else for a few steps.
      const Warp& warp = able[sequential ? 0 : random_below(able.size())];
      advance(warp, sequential || random_below(2) ? UINT32_MAX : 1 + random_below(8));
      continue;
    }
    // Every thread is at the block barrier or has left: all at the same barrier, or all gone.
    const Fiber& first = fibers[0];
    for (int i = 1; i < threads; ++i) {
      if (finished(fibers[i]) != finished(first) || (!finished(first) && !same_place(first, fibers[i])))
        return fail("divergent block barrier", first, fibers[i]);
    }
    if (finished(first)) return;
    ++block_epoch;
    for (int i = 0; i < threads; ++i) fibers[i].state = State::ready;
  }
}

}  // namespace

void report(std::string finding) {
  if (findings.size() < max_findings) findings.push_back(std::move(finding));
}

std::string place(uint32_t thread_id) {
  return "thread " + std::to_string((thread_id - 1) % threads_per_block) + " of block " +
         std::to_string((thread_id - 1) / threads_per_block);
}
std::string place() { return running ? place(running->id) : "the host"; }

bool in_order() { return sequential; }
uint32_t random_below(uint32_t bound) { return static_cast<uint32_t>(uint64_t(generator()) * bound >> 32); }

void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, int64_t seed, void (*code)(void*), void* context) {
  if (failed) return;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > max_threads || blocks == 0 || blocks * threads > 0x7fffffff ||
      dynamic_shared_bytes > max_shared_bytes) {
    report("launch refused: " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads with " +
           std::to_string(dynamic_shared_bytes) + " bytes of shared memory");
    failed = true;
    return;
  }
  allocate_stacks();
  gridDim = grid;
  blockDim = block;
  threads_per_block = static_cast<uint32_t>(threads);
  kernel = code;
  kernel_context = context;
  sequential = seed == 0;
  generator.seed(static_cast<uint32_t>(seed));
  block_epoch = 0;
  warp_epochs.assign((threads + 31) / 32, 0);
  races_begin_launch();

  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; ++i) order[i] = i;
  for (uint32_t i = 0; i < blocks && !sequential; ++i) std::swap(order[i], order[i + random_below(blocks - i)]);
  for (const uint32_t i : order) {
    if (failed) break;
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    // A fresh allocation of exactly this size, so that AddressSanitizer sees its end.
    if (dynamic_shared_bytes) {
      void* memory = nullptr;
      if (posix_memalign(&memory, 128, dynamic_shared_bytes)) std::abort();
      shared_memory = {static_cast<unsigned char*>(memory), dynamic_shared_bytes};
      std::memset(memory, 0xff, dynamic_shared_bytes);  // NaN in every floating-point format
    }
    ++block_epoch;
    races_begin_block();
    run_block();
    std::free(shared_memory.begin);
    shared_memory = {};
  }
  if (failed) {
    for (Fiber& fiber : fibers) fiber.started = false;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stacks.begin, stacks.bytes);
#endif
  }
}

unsigned char* dynamic_shared() { return shared_memory.begin; }
int lane() { return running->lane; }

void together(uint32_t mask, const char* what, Where where, void (*perform)(void* const*), void* record) {
  wait(State::at_warp, mask, what, where, perform, record);
}

void block_barrier(Where where) {
  if (where.line() == removed_line && file_of(where) == removed_file) return;
  wait(State::at_block, 0, "barrier", where, nullptr, nullptr);
}

void warp_barrier(uint32_t mask, Where where) {
  const auto next_epoch = [](void* const* lanes) {
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) return void(++warp_epochs[static_cast<Thread*>(lanes[i])->warp]);
  };
  wait(State::at_warp, mask, "syncwarp", where, next_epoch, running);
}

}  // namespace executor

// Kernels run as if their source lacked the block barrier of this line. Of one at a time; line 0: of none.
extern "C" void executor_remove_barrier(const char* file, int64_t line) {
  executor::removed_file = file;
  executor::removed_line = line;
}

// What was found since the last call, one finding a line; empty if nothing was.
extern "C" const char* executor_findings() {
  executor::findings_text.clear();
  for (const std::string& finding : executor::findings) executor::findings_text += finding + "\n";
  executor::findings.clear();
  executor::failed = false;
  return executor::findings_text.c_str();
}
