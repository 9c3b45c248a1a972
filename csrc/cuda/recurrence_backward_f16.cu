#include "recurrence_backward.cuh"
template const char* stable_rnn::launch_backward<stable_rnn::F16>(const BackwardLaunch&, const Grid&);
