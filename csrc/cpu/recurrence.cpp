#include "stable_rnn/params.h"

namespace stable_rnn {

const char* recurrence_forward_cpu(const ForwardParams&) { return "not written yet"; }
const char* recurrence_backward_cpu(const BackwardParams&) { return "not written yet"; }
const char* recurrence_windowed_backward_cpu(const WindowedBackwardParams&) { return "not written yet"; }
const char* cell_step_cpu(const CellStepParams&) { return "not written yet"; }

}  // namespace stable_rnn
