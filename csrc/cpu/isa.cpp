#include "isa.h"

#include <cstdlib>
#include <cstring>
#if STABLE_RNN_X86 && defined(_WIN32)
#include <intrin.h>
#include <windows.h>
#endif

namespace stable_rnn {
namespace {

constexpr const char* names[] = {"plain", "avx2", "avx512"};

#if STABLE_RNN_X86 && defined(_WIN32)
// __builtin_cpu_supports needs a runtime library of Clang's that is not linked there.
bool has(int leaf, int word, int bit) {   // words of a leaf: eax, ebx, ecx, edx
  int words[4];
  __cpuidex(words, leaf, 0);
  return words[word] >> bit & 1;
}
#endif

Isa best() {
#if STABLE_RNN_X86 && defined(_WIN32)
  const bool fma = has(1, 2, 12), bw = has(7, 1, 30), dq = has(7, 1, 17), vl = has(7, 1, 31);
  if (!IsProcessorFeaturePresent(PF_AVX2_INSTRUCTIONS_AVAILABLE) || !fma) return Isa::plain;
  return IsProcessorFeaturePresent(PF_AVX512F_INSTRUCTIONS_AVAILABLE) && bw && dq && vl ? Isa::avx512 : Isa::avx2;
#elif STABLE_RNN_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::plain;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? Isa::avx512 : Isa::avx2;
#else
  return Isa::plain;
#endif
}

bool find(const char* name, Isa& found) {
  for (int i = 0; i <= static_cast<int>(best()); ++i)
    if (std::strcmp(name, names[i]) == 0) {
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
bool multiplies_bfloat16() {
#if STABLE_RNN_X86
  __builtin_cpu_init();
  return best() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}
const char* isa_problem() {
  return choice.known ? nullptr : "STABLE_RNN_ISA must be plain, avx2 or avx512, and one that this machine can run";
}

}   // namespace stable_rnn
