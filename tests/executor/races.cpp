// The race detector. Kernels are compiled with -fsanitize=thread and linked with the hooks below instead of
// ThreadSanitizer: every load and store of device code comes by here, and a shadow remembers who touched each two bytes
// and since which barrier.
//
// Two accesses to the same bytes, at least one of them a write and not both atomic, race unless one thread made both,
// or a block barrier, or within a warp a warp barrier, lies between them. A cp.async may land at any time
// between its issue and the wait of the thread that issued it: until then every access races. Blocks of one launch are
// never ordered.
#include "runtime.h"

#if !defined(EXECUTOR_RACES)

namespace executor {
void races_begin_launch() {}
void races_begin_block() {}
void races_access(const void*, size_t, Kind, const void*) {}
void note_atomic(void*, size_t) {}
}  // namespace executor

#else

#include <dlfcn.h>

#include <cstdio>
#include <memory>
#include <set>
#include <unordered_map>

namespace executor {
namespace {

struct Access {
  uint32_t thread = 0;  // id within the launch; 0: none
  uint32_t block_epoch = 0, warp_epoch = 0;
  uint32_t code = 0;  // offset of the instruction in this library
  Kind kind = Kind::read;

  uint32_t block() const { return (thread - 1) / threads_per_block; }
  uint32_t warp() const { return (thread - 1) % threads_per_block / 32; }
};

struct Cell {
  Access write, read, other_read;
};

constexpr uintptr_t granule = 2, page_bytes = 4096;

struct Page {
  uint32_t launch = 0;
  Cell cells[page_bytes / granule];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page> > pages;  // of memory that is not shared
uintptr_t last_number = ~uintptr_t(0);
Page* last_page = nullptr;
std::vector<Cell> shared_cells;
uint32_t this_launch = 0;
std::set<std::pair<uint32_t, uint32_t> > reported;

uintptr_t library() {
  static const uintptr_t base = [] {
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(&races_begin_launch), &info);
    return reinterpret_cast<uintptr_t>(info.dli_fbase);
  }();
  return base;
}

Cell& cell_of(uintptr_t address) {
  if (shared_memory.contains(reinterpret_cast<void*>(address)))
    return shared_cells[(address - reinterpret_cast<uintptr_t>(shared_memory.begin)) / granule];
  const uintptr_t number = address / page_bytes;
  if (number != last_number) {
    auto& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    last_number = number;
    last_page = page.get();
  }
  if (last_page->launch != this_launch) {
    *last_page = Page();
    last_page->launch = this_launch;
  }
  return last_page->cells[address % page_bytes / granule];
}

bool races(const Access& before, const Access& now) {
  if (before.thread == 0) return false;
  if (before.kind == Kind::copy_begins) return now.kind != Kind::copy_ends || before.thread != now.thread;
  if (before.thread == now.thread || (before.kind == Kind::atomic && now.kind == Kind::atomic)) return false;
  if (before.block() != now.block()) return true;
  if (before.block_epoch != now.block_epoch) return false;
  return before.warp() != now.warp() || before.warp_epoch == now.warp_epoch;
}

std::string where(uintptr_t address) {
  if (shared_memory.contains(reinterpret_cast<void*>(address)))
    return "shared memory + " + std::to_string(address - reinterpret_cast<uintptr_t>(shared_memory.begin));
  char text[32];
  std::snprintf(text, sizeof text, "address %#zx", size_t(address));
  return text;
}

std::string code(const Access& access) {  // the caller in Python replaces this by file and line
  char text[32];
  std::snprintf(text, sizeof text, "{code %#x}", access.code);
  return text;
}

const char* verb(const Access& access) {
  switch (access.kind) {
    case Kind::read:
      return " reads ";
    case Kind::copy_begins:
      return " begins to copy to ";
    case Kind::copy_ends:
      return " ends copying to ";
    default:
      return " writes ";
  }
}

void complain(const Access& before, const Access& now, uintptr_t address) {
  if (!reported.insert({before.code, now.code}).second) return;
  report("data race: " + place(before.thread) + verb(before) + where(address) + " at " + code(before) + ", " +
         place(now.thread) + verb(now) + "it at " + code(now) + ", and no " +
         (before.kind == Kind::copy_begins ? "wait" : "barrier") + " lies between");
}

// Keeps two readers that are as different as possible, so that a later write meets one it races with.
void remember_read(Cell& cell, const Access& now) {
  Access &a = cell.read, &b = cell.other_read;
  const auto stale = [&](const Access& x) {
    return x.thread == 0 || (x.block() == now.block() && x.block_epoch != now.block_epoch);
  };
  if (stale(a) || a.thread == now.thread)
    a = now;
  else if (stale(b) || b.thread == now.thread || a.block() != now.block() || a.warp() != now.warp())
    b = now;
  else if (b.block() == now.block() && b.warp() == now.warp())
    b = now;
}

}  // namespace

void races_begin_launch() {
  ++this_launch;
  reported.clear();
}

void races_begin_block() { shared_cells.assign(shared_memory.bytes / granule + 1, Cell()); }

void races_access(const void* memory, size_t bytes, Kind kind, const void* caller) {
  if (!running || stacks.contains(memory)) return;
  const Access now{running->id, block_epoch, warp_epochs[running->warp],
                   uint32_t(reinterpret_cast<uintptr_t>(caller) - library()), kind};
  const bool write = kind != Kind::read;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  for (uintptr_t address = begin - begin % granule; address < begin + bytes; address += granule) {
    Cell& cell = cell_of(address);
    if (races(cell.write, now)) complain(cell.write, now, address);
    if (write) {
      for (const Access& read : {cell.read, cell.other_read})
        if (races(read, now)) complain(read, now, address);
      cell.write = now;
    } else {
      if (cell.write.thread == 0 && shared_memory.contains(memory) && reported.insert({0, now.code}).second)
        report("uninitialised: " + place() + " reads " + where(address) + " at " + code(now) + ", which nobody wrote");
      remember_read(cell, now);
    }
  }
}

__attribute__((noinline)) void note_atomic(void* address, size_t bytes) {
  races_access(address, bytes, Kind::atomic, __builtin_return_address(0));
}

}  // namespace executor

// ---- what -fsanitize=thread calls

#define HOOK(name, bytes, kind)                                                                \
  extern "C" __attribute__((noinline)) void __tsan_##name(void* address) {                     \
    executor::races_access(address, bytes, executor::Kind::kind, __builtin_return_address(0)); \
  }
#define HOOKS(bytes)                         \
  HOOK(read##bytes, bytes, read)             \
  HOOK(write##bytes, bytes, write)           \
  HOOK(unaligned_read##bytes, bytes, read)   \
  HOOK(unaligned_write##bytes, bytes, write) \
  HOOK(volatile_read##bytes, bytes, read)    \
  HOOK(volatile_write##bytes, bytes, write)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" {
__attribute__((noinline)) void __tsan_read_range(void* address, unsigned long bytes) {
  executor::races_access(address, bytes, executor::Kind::read, __builtin_return_address(0));
}
__attribute__((noinline)) void __tsan_write_range(void* address, unsigned long bytes) {
  executor::races_access(address, bytes, executor::Kind::write, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

#endif
