#include "isa.h"

#include <cstdlib>
#include <cstring>
#if STABLE_RNN_X86 && defined(_WIN32)
#include <intrin.h>
#include <windows.h>
#elif STABLE_RNN_X86
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace stable_rnn {
namespace {

constexpr const char* names[] = {"plain", "avx2", "avx512", "avx512bf16", "amx"};

#if STABLE_RNN_X86
bool has(unsigned leaf, unsigned part, int word, int bit) {   // words of a part of a leaf of cpuid: eax, ebx, ecx, edx
#if defined(_WIN32)
  int words[4];
  __cpuidex(words, leaf, part);
#else
  unsigned words[4] = {};
  __get_cpuid_count(leaf, part, &words[0], &words[1], &words[2], &words[3]);
#endif
  return words[word] >> bit & 1;
}
#endif

Isa best() {
#if STABLE_RNN_X86 && defined(_WIN32)
  // __builtin_cpu_supports needs a runtime library of Clang's that is not linked there.
  const bool fma = has(1, 0, 2, 12), bw = has(7, 0, 1, 30), dq = has(7, 0, 1, 17), vl = has(7, 0, 1, 31);
  if (!IsProcessorFeaturePresent(PF_AVX2_INSTRUCTIONS_AVAILABLE) || !fma) return Isa::plain;
  if (!IsProcessorFeaturePresent(PF_AVX512F_INSTRUCTIONS_AVAILABLE) || !bw || !dq || !vl) return Isa::avx2;
  return has(7, 1, 0, 5) ? Isa::avx512bf16 : Isa::avx512;
#elif STABLE_RNN_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::plain;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return !wide ? Isa::avx2 : __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
#else
  return Isa::plain;
#endif
}

// Whether this process may use tiles: compiled in, known to the processor, saved by the system and, once asked for, granted (Linux 5.16).
bool may_use_amx() {
#if defined(STABLE_RNN_EMULATE_AMX)
  return true;
#elif defined(STABLE_RNN_AMX)
  if (best() != Isa::avx512bf16 || !has(7, 0, 3, 22) || !has(7, 0, 3, 24)) return false;
  unsigned saved, high;
  asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  constexpr unsigned tiles = 3u << 17;   // their shapes, and their data
  constexpr long request_permission = 0x1023, tile_data = 18;
  return (saved & tiles) == tiles && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

bool can_run(Isa isa) { return isa == Isa::amx ? may_use_amx() : isa <= best(); }

bool find(const char* name, Isa& found) {
  for (int i = 0; i <= static_cast<int>(Isa::amx); ++i)
    if (std::strcmp(name, names[i]) == 0 && can_run(static_cast<Isa>(i))) {
      found = static_cast<Isa>(i);
      return true;
    }
  return false;
}

struct Choice {
  Isa isa = best();
  bool known = true;
  Choice() {
    const char* asked = std::getenv("STABLE_RNN_ISA");
    if (asked && *asked) known = find(asked, isa);
  }
};
Choice choice;

}   // namespace

Isa isa() { return choice.isa; }
const char* isa_name() { return names[static_cast<int>(choice.isa)]; }
bool set_isa(const char* name) { return find(name, choice.isa); }
bool has_amx_bfloat16() {
#if STABLE_RNN_X86
  return has(7, 0, 3, 22);
#else
  return false;
#endif
}
const char* isa_problem() {
  return choice.known
             ? nullptr
             : "STABLE_RNN_ISA must be plain, avx2, avx512, avx512bf16 or amx, and one that this machine can run";
}

}   // namespace stable_rnn
