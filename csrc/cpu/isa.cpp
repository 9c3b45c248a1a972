#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace stable_rnn {
namespace {

constexpr const char* names[] = {"plain", "avx2", "avx512"};

Isa best() {
#if STABLE_RNN_X86
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
