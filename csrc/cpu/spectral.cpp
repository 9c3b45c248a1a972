#include "stable_rnn/spectral.h"

#include "isa.h"

namespace stable_rnn {

STABLE_RNN_EACH_ISA(const char* spectral_step(const SpectralParams&);)

const char* spectral_step_cpu(const SpectralParams& p) {
  for (int64_t i = 0; i < p.count; ++i)
    if (p.matrices[i].width < 0 || p.matrices[i].width > SPECTRAL_BLOCK) return "a block has more than 16 vectors";
  return STABLE_RNN_DISPATCH(spectral_step(p));
}

}   // namespace stable_rnn
