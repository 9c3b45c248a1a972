// The CUDA entry points: the structs of params.h and spectral.h with device pointers, a device, a stream and a workspace.
// They enqueue and return: nothing is allocated, nothing waits. Each returns null, or a message with static lifetime (CUDA's own for its errors).
#pragma once
#include <cstdint>

#include "stable_rnn/params.h"
#include "stable_rnn/spectral.h"
#include "stable_rnn/step_costs.h"

namespace stable_rnn {

struct CudaLaunch {
  int device;
  void* stream;
  void* workspace;   // device memory, 256-byte aligned, free to use until the stream has passed the call
  int64_t workspace_bytes;
};

// What a tiling depends on of a device; also made by hand, to ask what another device would do.
struct CudaLimits {
  int arch;   // 80, 90, 100, 120
  int sms;
  int64_t shared_bytes;   // that one block may have
  int max_cluster;        // 1: no clusters
};

// How a team of blocks runs a tile of lanes. The fields from `message` on mean nothing where it is not null.
struct CudaTiling {
  const char* message;       // null, or why no kernel takes this shape
  int blocks;                // S of a team
  int cluster;               // S where the team is a cluster, 1 where it is a single block or meets through L2
  int lanes;                 // N of a tile
  int units;                 // U of a block
  int warps;                 // of a block
  int place;                 // of W between steps: 0 registers, 1 shared memory, 2 L2
  int teams;                 // launched; they take tiles in turn
  int64_t shared_bytes;      // of a block
  int64_t workspace_bytes;   // that the call needs
  double clocks;             // predicted: of an SM, for one step of all lanes
  int product;    // 0 mma, 1 wgmma: many lanes of 16-bit types, forward, sm_90a (STABLE_RNN_PRODUCT: mma, wgmma)
  int exchange;   // of a cluster: 0 its barrier, 1 transactions (STABLE_RNN_EXCHANGE: barrier, transactions)
};

// The scans over time of units [unit, unit + units) of a cascade, whose hidden products `sums` are known for all times: gates, the state that
// a unit keeps itself (c, or h of a cell that carries), and what is saved. The fields that ForwardParams and BackwardParams have too mean
// the same. Sums and adjoints of sums lie unit by unit, each with its gates, so that any range of units is a range of columns.
struct ScanParams {
  int cell, dtype;
  int64_t hidden, unit, units;
  float cap;
  int64_t steps, batch, step;
  const int64_t* base;
  const int64_t* length;
  const bool* resets;
  // inputs
  const void* xp;            // [N, G*H]
  const float* sums;         // [N, units*G] or null: zeros
  const void* hidden_bias;   // [H] or null
  const void* h0;            // [B, H]
  const void* c0;            // [B, H], cells that have c
  // outputs: the columns of these units
  void* y;        // [N, H]
  void* h_n;      // [B, H]
  void* c_n;      // [B, H], cells that have c
  void* saved;    // [N, S*H] or null
  float* cells;   // [N, H] or null
  void* before;   // [N, H] h one step earlier, h0 at time 0: what later groups read
};

struct ScanBackwardParams {
  int cell, dtype;
  int64_t hidden, unit, units;
  float cap;
  int64_t steps, batch, step;
  const int64_t* base;
  const int64_t* length;
  const bool* resets;
  // inputs
  const void* dy;       // [N, H]
  const void* y;        // [N, H]
  const void* saved;    // [N, S*H]
  const float* cells;   // [N, H], cells that have c
  const void* h0;       // [B, H], cells whose step() reads its own h
  const void* c0;       // [B, H], cells that have c
  const void* dh_n;     // [B, H] or null: zeros
  const void* dc_n;     // [B, H] or null: zeros
  const float* sums;    // [N, units] adjoints of h by way of later groups' products, or null: zeros
  // outputs: the columns of these units
  void* dz;   // [N, G*H]
  float*
      dh0;   // [B, H] what reaches h0 without W_hh, cells whose step() reads its own h; where length is 0, nothing of use
  void* dc0;   // [B, H], cells that have c; dc_n where length is 0
  void*
      after;   // [N, H*G] adjoints of the hidden sums one step later: what earlier groups read; not written at the last time
};

const char* cuda_limits(int device, CudaLimits* limits);
const char* cuda_clock(int device, double* hertz);   // the highest that an SM is clocked at
CudaTiling recurrence_tiling_cuda(bool backward, int cell, int dtype, int64_t hidden, int64_t out, int64_t entries,
                                  const CudaLimits& limits);
// `CudaTiling::clocks` by constants of the caller's; negative where the kernels have no such tiling.
double step_clocks_cuda(bool backward, int cell, int dtype, int64_t hidden, int64_t entries, const CudaTiling&,
                        const CudaLimits&, const StepCosts&);
int64_t spectral_workspace_cuda(const SpectralParams&, const CudaLimits& limits);

const char* recurrence_forward_cuda(const ForwardParams&, const CudaLaunch&);   // `threads` is not read
const char* recurrence_backward_cuda(const BackwardParams&, const CudaLaunch&);
const char* scan_forward_cuda(const ScanParams&, const CudaLaunch&);
const char* scan_backward_cuda(const ScanBackwardParams&, const CudaLaunch&);
int64_t scan_workspace_cuda(int64_t steps, int64_t batch, int64_t units);
// `matrices` and `bounds` are host memory; W, blocks, norms and near are device memory.
const char* spectral_step_cuda(const SpectralParams&, const CudaLaunch&);

}   // namespace stable_rnn
