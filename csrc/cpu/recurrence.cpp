// The entry points of params.h: what they cannot do, what needs no kernel, and the way to the kernels of this machine.
#include <cstring>

#include "kernels.h"
#include "lanes.h"
#include "stable_rnn/cells.h"

namespace stable_rnn {
namespace {

constexpr const char* bad_dtype = "dtype must be 0 (float32) or 1 (bfloat16)";
constexpr const char* bad_recurrence_dtype =
    "dtype must be 0 (float32), 1 (bfloat16), 5 (float32 with weights in bfloat16) or 6 (with products of bfloat16)";

constexpr int64_t size_of(int dtype) { return dtype == BF16 ? 2 : 4; }

template <class Params>
const char* check(const Params& p) {
  if (!is_cell(p.cell)) return unknown_cell;
  if (p.hidden < 0 || !(p.cap > 0 && p.cap <= 1)) return "hidden must not be negative, and cap must lie in (0, 1]";
  return nullptr;
}

template <class Params>
const char* check_recurrence(const Params& p) {
  if (const char* problem = check(p)) return problem;
  if (p.dtype != F32 && p.dtype != BF16 && p.dtype != BF16_WEIGHTS && p.dtype != BF16X3) return bad_recurrence_dtype;
  const Lanes& lanes = p.lanes;
  if (lanes.steps < 0 || lanes.batch < 0 || lanes.stride < 1 || lanes.warmup < 0 || lanes.n_select < 0)
    return "steps, batch, warmup and n_select must not be negative, and stride must be positive";
  if (lanes.resets) return "the CPU kernels take no resets: cut rows into pieces";
  if (p.w_hr && !projects(p.cell)) return "a projection (w_hr) needs cell lstm";
  if (!p.w_hr && p.out != p.hidden) return "out must equal hidden where there is no projection (w_hr)";
  if (p.w_hr && p.out < 1) return "out must be positive";
  return nullptr;
}

void copy_row(void* to, const void* from, int64_t b, int64_t bytes) {
  if (!to) return;
  if (from) std::memcpy(static_cast<char*>(to) + b * bytes, static_cast<const char*>(from) + b * bytes, bytes);
  else std::memset(static_cast<char*>(to) + b * bytes, 0, bytes);
}

const char* check(const CascadeGroups& groups, int dtype, const Lanes& lanes, int64_t hidden, const void* w_hr,
                  const void* init) {
  if (dtype != F32 && dtype != BF16) return bad_dtype;
  if (w_hr || init || lanes.select || lanes.stride < lanes.steps || lanes.warmup)
    return "a cascade is run over whole sequences, from h0, without a projection (w_hr)";
  if (groups.count < (hidden > 0) || !groups.first || groups.first[0] != 0 || groups.first[groups.count] != hidden)
    return "groups must begin with 0 and end with hidden";
  for (int64_t g = 0; g < groups.count; ++g)
    if (groups.first[g] >= groups.first[g + 1] && hidden) return "the first units of groups must ascend";
  return nullptr;
}

int64_t entries_of(const Lanes& lanes) { return lanes.select ? lanes.n_select : lanes_per_row(lanes) * lanes.batch; }

const char* run(const ForwardParams& p, const CascadeGroups* groups) {
  if (const char* problem = check_recurrence(p)) return problem;
  for (int64_t b = 0; b < p.lanes.batch; ++b)
    if (length_of(p.lanes, b) == 0) {
      copy_row(p.h_n, p.h0, b, p.out * size_of(p.dtype));
      if (has_cell(p.cell)) copy_row(p.c_n, p.c0, b, p.hidden * size_of(p.dtype));
    }
  if (groups)
    if (const char* problem = check(*groups, p.dtype, p.lanes, p.hidden, p.w_hr, p.h_init)) return problem;
  if (p.hidden == 0) return nullptr;
  const auto entries = longest_first(p.lanes, 0, entries_of(p.lanes), forward_run, p.h_init != nullptr);
  const int64_t* first = entries.data();
  const auto count = int64_t(entries.size());
  if (!count) return nullptr;
  return groups ? STABLE_RNN_DISPATCH(scanned_forward(p, groups->first, groups->count, first, count))
                : STABLE_RNN_DISPATCH(forward(p, first, count));
}

const char* run(const BackwardParams& p, const CascadeGroups* groups) {
  if (const char* problem = check_recurrence(p)) return problem;
  for (int64_t b = 0; b < p.lanes.batch; ++b)
    if (length_of(p.lanes, b) == 0) {
      copy_row(p.dh0, p.dh_n, b, p.out * size_of(p.dtype));
      if (has_cell(p.cell)) copy_row(p.dc0, p.dc_n, b, p.hidden * size_of(p.dtype));
    }
  if (groups)
    if (const char* problem = check(*groups, p.dtype, p.lanes, p.hidden, p.w_hr, p.dh_init)) return problem;
  if (p.hidden == 0) return nullptr;
  const auto entries = longest_first(p.lanes, 0, entries_of(p.lanes), backward_run, p.dh_init != nullptr);
  const int64_t* first = entries.data();
  const auto count = int64_t(entries.size());
  if (!count) return nullptr;
  return groups ? STABLE_RNN_DISPATCH(scanned_backward(p, groups->first, groups->count, first, count))
                : STABLE_RNN_DISPATCH(backward(p, first, count));
}

}   // namespace

const char* recurrence_forward_cpu(const ForwardParams& p) { return run(p, nullptr); }
const char* recurrence_backward_cpu(const BackwardParams& p) { return run(p, nullptr); }
const char* scanned_forward_cpu(const ForwardParams& p, const CascadeGroups& groups) { return run(p, &groups); }
const char* scanned_backward_cpu(const BackwardParams& p, const CascadeGroups& groups) { return run(p, &groups); }

const char* recurrence_windowed_backward_cpu(const WindowedBackwardParams& p) {
  if (const char* problem = check_recurrence(p)) return problem;
  if (p.lanes.stride != 1 || p.lanes.select) return "windows need stride 1 and no selection";
  if (p.first < 0 || p.last > entries_of(p.lanes)) return "first and last must lie within the lanes";
  if (p.hidden == 0 || p.first >= p.last) return nullptr;
  const auto entries = longest_first(p.lanes, p.first, p.last, window_run, false);
  return STABLE_RNN_DISPATCH(windowed_backward(p, entries.data(), int64_t(entries.size())));
}

const char* input_projection_cpu(const InputProjectionParams& p) {
  if (p.dtype != F32 && p.dtype != BF16) return bad_dtype;
  if (p.rows < 0 || p.input < 0 || p.sums < 0) return "rows, input and sums must not be negative";
  return p.rows == 0 || p.sums == 0 ? nullptr : STABLE_RNN_DISPATCH(input_projection(p));
}

const char* product_cpu(const ProductParams& p) {
  if (p.rows < 0 || p.inner < 1 || p.columns < 0)
    return "rows and columns must not be negative, and inner must be positive";
  return p.rows == 0 || p.columns == 0 ? nullptr : STABLE_RNN_DISPATCH(product(p));
}

const char* cell_step_cpu(const CellStepParams& p) {
  if (const char* problem = check(p)) return problem;
  if (p.dtype != F32 && p.dtype != BF16) return bad_dtype;
  if (p.batch < 0 || p.input < 0) return "batch and input must not be negative";
  return p.hidden == 0 || p.batch == 0 ? nullptr : STABLE_RNN_DISPATCH(cell_step(p));
}

}   // namespace stable_rnn
