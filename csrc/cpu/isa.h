// Which instruction set the kernels use. Sources in csrc/cpu/kernels/ are compiled once for each, in namespace STABLE_RNN_NS;
// everything inline that they use must live in that namespace or be static, or the linker would keep one copy for all.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define STABLE_RNN_X86 1
#else
#define STABLE_RNN_X86 0
#endif

#ifndef STABLE_RNN_NS
#define STABLE_RNN_NS plain
#endif

namespace stable_rnn {

enum class Isa { plain, avx2, avx512, avx512bf16, amx };

Isa isa();   // what STABLE_RNN_ISA or set_isa asked for, or the best of this machine but for `amx`, which nobody has measured yet
const char* isa_name();
bool set_isa(const char* name);   // false where the name is unknown or the machine cannot run it
bool has_amx_bfloat16();          // the machine has tiles of bfloat16 (AMX)
const char* isa_problem();        // null, or what is wrong with STABLE_RNN_ISA

}   // namespace stable_rnn

// STABLE_RNN_DISPATCH(f(x)) calls plain::f(x), avx2::f(x), avx512::f(x), avx512bf16::f(x) or, where it was compiled, amx::f(x).
// STABLE_RNN_EACH_ISA(int f(int);) declares f in each of these namespaces.
#if defined(STABLE_RNN_AMX)
#define STABLE_RNN_WITH_AMX(call, other) (isa() == Isa::amx ? amx::call : (other))
#else
#define STABLE_RNN_WITH_AMX(call, other) (other)
#endif
#if STABLE_RNN_X86
#define STABLE_RNN_DISPATCH(call)                                       \
  STABLE_RNN_WITH_AMX(call, isa() == Isa::avx512bf16 ? avx512bf16::call \
                            : isa() == Isa::avx512   ? avx512::call     \
                            : isa() == Isa::avx2     ? avx2::call       \
                                                     : plain::call)
#define STABLE_RNN_EACH_ISA(...) \
  namespace plain {              \
  __VA_ARGS__                    \
  }                              \
  namespace avx2 {               \
  __VA_ARGS__                    \
  }                              \
  namespace avx512 {             \
  __VA_ARGS__                    \
  }                              \
  namespace avx512bf16 {         \
  __VA_ARGS__                    \
  }                              \
  namespace amx {                \
  __VA_ARGS__                    \
  }
#else
#define STABLE_RNN_DISPATCH(call) (plain::call)
#define STABLE_RNN_EACH_ISA(...) \
  namespace plain {              \
  __VA_ARGS__                    \
  }
#endif
