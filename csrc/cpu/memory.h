// Fresh large memory costs a page fault every 4 KB as it is first written, which can take longer than the kernels (on a virtual
// machine: a third of a training step). In pages of 2 MB it does not.
#pragma once
#include <cstdint>

namespace stable_rnn {

// Asks the system for huge pages under memory that nobody has written yet. A hint: small ranges, and systems other than Linux, ignore it.
void prefer_huge_pages(void* start, int64_t bytes);

}   // namespace stable_rnn
