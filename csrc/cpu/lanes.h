// Which lanes a CPU kernel runs, in which order.
#pragma once
#include <cstdint>
#include <vector>

#include "stable_rnn/lanes.h"

namespace stable_rnn {

// The entries that have steps, longest first and otherwise in order, so that the lanes of a tile still running are always its first.
using RunOf = Run (*)(const Lanes&, int64_t entry, bool from_init);
std::vector<int64_t> longest_first(const Lanes& lanes, int64_t first, int64_t last, RunOf run_of, bool from_init);

}   // namespace stable_rnn
