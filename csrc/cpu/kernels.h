// The kernels of each instruction set. `entries` are the lanes to run, longest first: places in `select`, or lane ids.
#pragma once
#include "isa.h"
#include "stable_rnn/params.h"

namespace stable_rnn {

STABLE_RNN_EACH_ISA(const char* forward(const ForwardParams&, const int64_t* entries, int64_t lanes);
                    const char* backward(const BackwardParams&, const int64_t* entries, int64_t lanes);
                    const char* windowed_backward(const WindowedBackwardParams&, const int64_t* entries, int64_t lanes);
                    const char* input_projection(const InputProjectionParams&);
                    const char* product(const ProductParams&); const char* cell_step(const CellStepParams&);)

constexpr const char* out_of_memory = "out of memory";

}   // namespace stable_rnn
