#include <algorithm>

#include "stable_rnn/params.h"

namespace stable_rnn {
namespace {

// 1 + the last of n numbers that is not zero, at least `known`.
template <class Bits>
int64_t used(const Bits* row, int64_t n, int64_t known) {
  constexpr int64_t at_once = 64 / sizeof(Bits);
  const auto any = [row](int64_t begin, int64_t end) {
    Bits found = 0;
    for (int64_t i = begin; i < end; ++i) found |= Bits(row[i] << 1);   // but for the sign
    return found != 0;
  };
  while (n - at_once >= known && !any(n - at_once, n)) n -= at_once;
  while (n > known && !any(n - 1, n)) --n;
  return n;
}

template <class Bits>
void reads_of(const CascadeReadsParams& p) {
  for (int64_t unit = 0; unit < p.hidden; ++unit) {
    int64_t found = 0;
    for (int64_t gate = 0; gate < p.gates; ++gate)
      found = std::max(found,
                       used(static_cast<const Bits*>(p.w_hh) + (gate * p.hidden + unit) * p.hidden, p.hidden, found));
    p.reads[unit] = found;
  }
}

}   // namespace

const char* cascade_reads_cpu(const CascadeReadsParams& p) {
  if (p.dtype != F32 && p.dtype != BF16) return "dtype must be 0 (float32) or 1 (bfloat16)";
  if (p.gates < 0 || p.hidden < 0) return "gates and hidden must not be negative";
  p.dtype == BF16 ? reads_of<uint16_t>(p) : reads_of<uint32_t>(p);
  return nullptr;
}

}   // namespace stable_rnn
