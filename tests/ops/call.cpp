// One call of the CPU kernels, for a machine that is only emulated. Standard input brings the name of an entry of params.h and the fields
// of its struct in their order: numbers as doubles, a pointer as the size in bytes of what it shows (-1: null) and these bytes.
// Standard output takes the bytes behind every pointer, in the same order, after the kernel has run.
#include <cstdio>
#include <cstdlib>
#include <list>
#include <string>
#include <type_traits>
#include <vector>

#include "stable_rnn/params.h"

using namespace stable_rnn;

namespace {

void read(void* to, size_t bytes) {
  if (bytes && std::fread(to, bytes, 1, stdin) != 1) std::fputs("the call ends too early\n", stderr), std::exit(2);
}

struct Field {
  std::list<std::vector<char>> blocks;

  template <class T>
  operator T() {
    if constexpr (std::is_pointer_v<T>) {
      int64_t bytes;
      read(&bytes, sizeof bytes);
      if (bytes < 0) return nullptr;
      read(blocks.emplace_back(bytes + 1).data(), bytes);   // of no size, still a place
      return reinterpret_cast<T>(blocks.back().data());
    } else {
      double number;
      read(&number, sizeof number);
      return T(number);
    }
  }
} f;

Lanes lanes() { return {f, f, f, f, f, f, f, f, f, f}; }

ForwardParams forward() { return {f, f, f, f, f, f, lanes(), f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f}; }

BackwardParams backward() {
  return {f, f, f, f, f, f, lanes(), f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f};
}

WindowedBackwardParams windowed() {
  return {f, f, f, f, f, f, lanes(), f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f};
}

const char* call(const std::string& entry) {
  if (entry == "recurrence_forward") return recurrence_forward_cpu(forward());
  if (entry == "recurrence_backward") return recurrence_backward_cpu(backward());
  if (entry == "recurrence_windowed_backward") return recurrence_windowed_backward_cpu(windowed());
  if (entry == "scanned_forward") {
    const auto p = forward();
    return scanned_forward_cpu(p, {f, f});
  }
  if (entry == "scanned_backward") {
    const auto p = backward();
    return scanned_backward_cpu(p, {f, f});
  }
  return "no such entry";
}

}   // namespace

int main(int, char** arguments) {
  if (const char* problem = call(arguments[1])) return std::fprintf(stderr, "%s\n", problem), 1;
  for (const auto& block : f.blocks) std::fwrite(block.data(), 1, block.size() - 1, stdout);
}
