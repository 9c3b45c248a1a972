// Fibers: stacks of their own that a single CPU thread runs in turn. AddressSanitizer is told of each change of stack.
#pragma once
#include <cstddef>
#include <cstdint>
#include <sys/mman.h>
#include <unistd.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace stable_rnn::executor {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 256 << 10;   // red zones around every local
#else
constexpr size_t STACK = 64 << 10;
#endif

// Stacks side by side, each above a page that may not be touched.
struct Stacks {
  char* memory = nullptr;
  size_t count = 0;

  bool reserve(size_t want) {
    if (want <= count) return true;
    if (memory) munmap(memory, count * STACK);
    memory = static_cast<char*>(
        mmap(nullptr, want * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    count = memory == MAP_FAILED ? 0 : want;
    if (!count) memory = nullptr;
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (size_t i = 0; i < count; ++i) mprotect(memory + i * STACK, page, PROT_NONE);
    return count > 0;
  }
};

// One side of a switch: a fiber, or the thread that runs them.
struct Side {
#if defined(__x86_64__)
  void* registers;   // the stack pointer; the rest is on the stack
#else
  ucontext_t registers;
#endif
  const void* stack;
  size_t size;
};

#if defined(__x86_64__)
// Saves what a call must preserve, and returns into whoever saved `to`. swapcontext does the same and a system call.
extern "C" __attribute__((visibility("hidden"))) void stable_rnn_switch(void** from, void* to);
#endif

inline void switch_to(Side& from, Side& to, bool from_ends = false) {
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &fake, to.stack, to.size);
#else
  (void)from_ends;
#endif
#if defined(__x86_64__)
  stable_rnn_switch(&from.registers, to.registers);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// A fiber that begins with entry(), which never returns.
inline void prepare(Side& side, char* stack, void (*entry)()) {
  side.stack = stack;
  side.size = STACK;
#ifdef __SANITIZE_ADDRESS__
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  __asan_unpoison_memory_region(stack + page, STACK - page);
#endif
#if defined(__x86_64__)
  void** top =
      reinterpret_cast<void**>(stack + STACK) - 8;   // six registers, the address to return to, the caller of entry()
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(entry);
  side.registers = top;
#else
  getcontext(&side.registers);
  side.registers.uc_stack.ss_sp = stack;
  side.registers.uc_stack.ss_size = STACK;
  side.registers.uc_link = nullptr;
  makecontext(&side.registers, entry, 0);
#endif
}

// The first lines of entry(): where the thread's own stack lies.
inline void begin([[maybe_unused]] Side& thread) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &thread.stack, &thread.size);
#endif
}

}   // namespace stable_rnn::executor
