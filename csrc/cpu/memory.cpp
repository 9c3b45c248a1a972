#include "memory.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace stable_rnn {

void prefer_huge_pages(void* start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t address = reinterpret_cast<uintptr_t>(start);
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (bytes >= int64_t(2 * page)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

}   // namespace stable_rnn
