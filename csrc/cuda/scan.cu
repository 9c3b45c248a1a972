// The entry points of a cascade's scans: what they cannot do, and their launches.
#include "scan.cuh"

namespace stable_rnn {
namespace {

constexpr int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }
int64_t bytes_of_parts(const ScanCut& cut, int64_t batch, int64_t units) {
  return aligned(cut.chunks * cut.parts * batch * units * int64_t(sizeof(Map)));
}

template <template <class, class> class Scan, class Params>
const char* run(const Params& p, float cap, const CudaLaunch& at) {
  if (!is_cell(p.cell)) return unknown_cell;
  if (!(p.cap > 0 && p.cap <= 1)) return "cap must lie in (0, 1]";
  if (p.dtype != F32 && p.dtype != BF16 && p.dtype != F16)
    return "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)";
  if (p.steps < 0 || p.batch < 0 || p.unit < 0 || p.units < 0 || p.unit + p.units > p.hidden)
    return "steps, batch and units must not be negative, and units must lie within hidden";
  if (!p.steps || !p.batch || !p.units) return nullptr;
  ScanLaunch<Params> q{};
  q.p = p;
  q.p.cap = cap;
  q.lanes = {p.steps, p.batch, p.step, p.steps, 0, p.base, p.length, p.resets, nullptr, 0};
  q.cut = scan_cut(p.steps, p.units);
  if (q.cut.tiles * q.cut.chunks * p.batch > (int64_t(1) << 31) - 1) return "too many sequences for one scan";
  if (at.workspace_bytes < scan_workspace_cuda(p.steps, p.batch, p.units)) return "the workspace is too small";
  q.of_parts = static_cast<Map*>(at.workspace);
  q.of_chunks = reinterpret_cast<Map*>(static_cast<char*>(at.workspace) + bytes_of_parts(q.cut, p.batch, p.units));
  return with_device(at.device, [&] {
    return dispatch_cell(p.cell, cap, [&](auto cell) {
      using Cell = decltype(cell);
      return p.dtype == BF16  ? launch_scan<Scan, Cell, BF16>(q, at.stream)
             : p.dtype == F16 ? launch_scan<Scan, Cell, F16>(q, at.stream)
                              : launch_scan<Scan, Cell, F32>(q, at.stream);
    });
  });
}

}   // namespace

int64_t scan_workspace_cuda(int64_t steps, int64_t batch, int64_t units) {
  const ScanCut cut = scan_cut(steps, units);
  return bytes_of_parts(cut, batch, units) + aligned(cut.chunks * batch * units * int64_t(sizeof(Map)));
}

const char* scan_forward_cuda(const ScanParams& p, const CudaLaunch& at) { return run<ForwardScan>(p, p.cap, at); }

const char* scan_backward_cuda(const ScanBackwardParams& p,
                               const CudaLaunch& at) {   // the cap as the saved gates were rounded
  return run<BackwardScan>(p, p.dtype == BF16 ? float(Bf16(p.cap)) : p.dtype == F16 ? float(Half(p.cap)) : p.cap, at);
}

}   // namespace stable_rnn
