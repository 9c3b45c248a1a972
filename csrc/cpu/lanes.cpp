#include "lanes.h"

#include <algorithm>
#include <utility>

namespace stable_rnn {

std::vector<int64_t> longest_first(const Lanes& lanes, int64_t first, int64_t last, RunOf run_of, bool from_init) {
  std::vector<std::pair<int64_t, int64_t>> found;   // -(stages + steps), entry
  for (int64_t entry = first; entry < last; ++entry) {
    const Run run = run_of(lanes, entry, from_init);
    if (run.steps > 0) found.emplace_back(-(run.stages + run.steps), entry);
  }
  const auto longer = [](const auto& a, const auto& b) { return a.first < b.first; };
  if (!std::is_sorted(found.begin(), found.end(),
                      longer)) {   // most lanes are as long as the longest: sort the others only
    const int64_t best = std::min_element(found.begin(), found.end(), longer)->first;
    const auto others =
        std::stable_partition(found.begin(), found.end(), [&](const auto& x) { return x.first == best; });
    std::stable_sort(others, found.end(), longer);
  }
  std::vector<int64_t> entries(found.size());
  std::transform(found.begin(), found.end(), entries.begin(), [](const auto& x) { return x.second; });
  return entries;
}

}   // namespace stable_rnn
