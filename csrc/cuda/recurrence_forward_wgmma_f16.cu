#include "recurrence_forward.cuh"
template const char* stable_rnn::launch_forward_wgmma<stable_rnn::F16>(const ForwardLaunch&, const Grid&);
