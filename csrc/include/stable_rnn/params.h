// The contract between the Python layer and every compiled backend: plain structs of sizes, strides and pointers.
//
// Words. A *row* of the batch b is one sequence; its time runs t = 0 .. length[b]-1 in the order in which the recurrence visits it.
// Its data lie at buffer rows   row(b, t) = base[b] + t * step.   One formula covers every layout:
//     padded (T, B, .)           base[b] = b                      step =  B
//     padded, reverse direction  base[b] = (length[b]-1) * B + b  step = -B
//     sequences end to end       base[b] = first row              step =  1   (reverse: last row, -1)
// A *lane* is one independent run of the recurrence. Lane j of row b, with id j * batch + b,
//     writes times [j*stride, min((j+1)*stride, length[b])),
//     starts at time max(0, j*stride - warmup): from h0[b], c0[b] where j*stride - warmup <= 0, else from zeros.
// A lane's arithmetic does not depend on how many lanes run beside it, nor on the number of threads: every sum over the hidden units
// runs in one fixed order. So a run of one lane is bitwise the run of the same lane among thousands.
#pragma once
#include <cstdint>

namespace stable_rnn {

// Raised with every change of an entry point or a struct: Python takes no module with another (stable_rnn/_native.py).
constexpr int interface_number = 12;

// Storage of xp, weights, h and what is saved; sums and cells are float32. TF32 is stored as float32, its products round to 10 bits
// (CUDA only, as F16 is). BF16_WEIGHTS is stored as float32, the state weights w_hh and w_hr alone are rounded to bfloat16 (CPU only).
// BF16X3 is stored as float32; states times w_hh may be three products of bfloat16, forward (CPU only, where its tiles multiply that).
// 4 is a type of the Triton kernels.
enum DType : int { F32 = 0, BF16 = 1, F16 = 2, TF32 = 3, BF16_WEIGHTS = 5, BF16X3 = 6 };

struct Lanes {
  int64_t steps;            // T: the largest length
  int64_t batch;            // B
  int64_t step;             // buffer rows between consecutive times, may be negative
  int64_t stride, warmup;   // the schedule; ceil(T / stride) lanes a row
  const int64_t* base;      // [B] or null: b, or (T-1)*B + b where step < 0
  const int64_t* length;    // [B] or null: T for every row
  const bool* resets;       // [N] or null: the state is zero before the step of a buffer row (on the CPU null)
  const int64_t* select;    // [n_select] lane ids, ascending, or null: every lane
  int64_t n_select;
};

// `cell` is the code of a cell of cells.h, which has the formulas of its step. G: its gates; S: what it saves of a step.
// Forward:  h, c = step(h W_hh^T, xp, h, c), then h W_hr^T if w_hr.
// h is rounded to the storage type at each step (what the next step reads is what y holds).
struct ForwardParams {
  int cell, dtype, threads;
  int64_t hidden;   // H
  int64_t out;      // P: size of h; H, or the projection's
  float cap;        // upper bound of the forget gate; 1 = none
  Lanes lanes;
  // inputs
  const void* xp;        // [N, G*H] input projection with both biases (but for hidden_bias)
  const void* w_hh;      // [G*H, P]
  const void* w_hr;      // [P, H] or null
  const void* h0;        // [B, P]
  const void* c0;        // [B, H], cells that have c
  const float* h_init;   // [n_select, P] or null: selected lanes start at j*stride from these, with no warm-up
  const float* c_init;   // [n_select, H]
  const void*
      hidden_bias;   // [H] or null: of the gate whose hidden product has a bias of its own, where the cell has one
  // outputs; rows that no lane writes are left alone
  void* y;        // [N, P] or null
  void* h_n;      // [B, P] or null: state after the last time; h0 where length is 0
  void* c_n;      // [B, H] or null
  void* saved;    // [N, S*H] or null
  float* cells;   // [N, H] or null
  float*
      h_start;   // [lanes*B, P] or null: each lane's state as it begins to write (indexed by lane id, selected lanes too)
  float* c_start;   // [lanes*B, H]
  float* h_end;     // [lanes*B, P] or null: each lane's state after its last written time
  float* c_end;     // [lanes*B, H]
  float* decay;     // [lanes*B, H] or null: product of the forget gates over its written times, cells that forget
};

// Backward: the adjoint recursion over saved states, on lanes in reverse time. Lane j of row b
//     writes times [j*stride, min((j+1)*stride, length[b])), last one first,
//     starts at time min(length[b], (j+1)*stride + warmup) - 1: from dh_n[b], dc_n[b] where that is the last time, else from zeros.
// With stride >= T it is exact back-propagation. The weight gradients are GEMMs over dz, outside.
struct BackwardParams {
  int cell, dtype, threads;
  int64_t hidden, out;
  float cap;
  Lanes lanes;
  // inputs
  const void* dy;       // [N, P] or null: zeros
  const void* y;        // [N, P] saved output, cells whose vjp() reads h
  const void* saved;    // [N, S*H]
  const float* cells;   // [N, H] saved, cells that have c
  const void* w_hh;     // [G*H, P]
  const void* w_hr;     // [P, H] or null
  const void* c0;       // [B, H], cells that have c
  const void* dh_n;     // [B, P] or null: zeros
  const void* dc_n;     // [B, H] or null: zeros
  const float*
      dh_init;   // [n_select, P] or null: selected lanes start at their last written time from these, with no warm-up
  const float* dc_init;   // [n_select, H]
  const void* h0;         // [B, P] or null: zeros; cells whose step() reads its own h
  // outputs
  void* dz;          // [N, G*H] or null: gradient of xp
  void* dh;          // [N, P] or null: the whole adjoint of h (needed for the gradient of w_hr)
  void* dh0;         // [B, P] or null
  void* dc0;         // [B, H] or null; dh_n, dc_n where length is 0
  float* dh_start;   // [lanes*B, P] or null: each lane's adjoint as it begins to write
  float* dc_start;   // [lanes*B, H]
  float*
      dh_end;   // [lanes*B, P] or null: each lane's adjoint after its last written time (that is, of the time before it)
  float* dc_end;   // [lanes*B, H]
  float* decay;    // [lanes*B, H] or null: as in ForwardParams, of the saved forget gates
};

// The backward pass of windows (stride 1, warmup k-1) for the lanes [first, last): each lane runs forward again and then back through
// all its k steps. The group's rows of dz and of the state before each step go to a workspace, in the order (lane - first) * k + s with
// s = 0 .. k-1 and s = k-1 the written time; rows of steps that a lane does not have are zero. dxp collects dz over the overlaps in a
// fixed order; dh0 and dc0 are added to.
struct WindowedBackwardParams {
  int cell, dtype, threads;
  int64_t hidden, out;
  float cap;
  Lanes lanes;           // stride 1, warmup k-1, select null
  int64_t first, last;   // lane ids
  // inputs
  const void* xp;
  const void* w_hh;
  const void* w_hr;
  const void* h0;
  const void* c0;            // as in ForwardParams
  const void* dy;            // [N, P]
  const void* dh_n;          // [B, P] or null: zeros
  const void* dc_n;          // [B, H] or null: zeros
  const void* hidden_bias;   // as in ForwardParams
  // workspace, written
  float* dz;   // [(last-first)*k, G*H]
  float*
      d_hidden;   // [(last-first)*k, G*H] gradient of the hidden product where the cell has a hidden bias; else it is dz
  float* h_prev;   // [(last-first)*k, P]
  float* dh;       // [(last-first)*k, P] or null: whole adjoint of h      (with w_hr)
  float* m;        // [(last-first)*k, H] or null: o * tanh(c)              (with w_hr)
  // outputs, added to
  float* dxp;   // [N, G*H]
  float* dh0;   // [B, P]
  float* dc0;   // [B, H]
};

// The input projection xp = x W_ih^T + b_ih + b_hh of many rows, summed in the order of CellStepParams.
struct InputProjectionParams {
  int dtype, threads;
  int64_t rows, input, sums;
  const void* x;      // [rows, I]
  const void* w_ih;   // [sums, I]
  const void* b_ih;   // [sums] or null
  const void* b_hh;   // [sums] or null
  void* xp;           // [rows, sums], written
};

// The products of the gradients, C = A B, float32: dx = dz W_ih, and dW = dz^T x with A stored (inner, rows).
struct ProductParams {
  int threads;
  bool transposed, more;   // A is stored (inner, rows); C is added to
  int64_t rows, inner, columns;
  const float* a;   // [rows, inner], transposed [inner, rows]
  const float* b;   // [inner, columns]
  float* c;         // [rows, columns]
};

// One step of a plain cell, for streaming: xp = x W_ih^T + b_ih + b_hh, rounded to the storage type, then the step of ForwardParams.
struct CellStepParams {
  int cell, dtype, threads;
  int64_t batch, input, hidden;
  float cap;
  // inputs
  const void* x;      // [B, I]
  const void* h;      // [B, H] or null: zeros
  const void* c;      // [B, H] or null: zeros; cells that have c
  const void* w_ih;   // [G*H, I]
  const void* w_hh;   // [G*H, H]
  const void* b_ih;   // [G*H] or null
  const void* b_hh;   // [G*H] or null
  // outputs
  void* h_out;   // [B, H]
  void* c_out;   // [B, H], cells that have c
};

// The runs of ForwardParams and BackwardParams over whole sequences (stride >= T, no selection, no borders, no w_hr), for weights that are
// a cascade: units stand in groups, and a unit reads (by W_hh of any gate) units of earlier groups only.
struct CascadeGroups {
  const int64_t* first;   // [count + 1] the first unit of each group, ascending from 0, and H
  int64_t count;
};

// Which units a weight lets each unit read: 1 + the last, 0 for none.
struct CascadeReadsParams {
  int dtype;
  int64_t gates, hidden;
  const void* w_hh;   // [G*H, H]
  int64_t* reads;     // [H], written
};

// Each returns null, or a message with static lifetime that says what it cannot do.
const char* recurrence_forward_cpu(const ForwardParams&);
const char* recurrence_backward_cpu(const BackwardParams&);
const char* scanned_forward_cpu(const ForwardParams&, const CascadeGroups&);
const char* scanned_backward_cpu(const BackwardParams&, const CascadeGroups&);
const char* cascade_reads_cpu(const CascadeReadsParams&);
const char* recurrence_windowed_backward_cpu(const WindowedBackwardParams&);
const char* input_projection_cpu(const InputProjectionParams&);
const char* product_cpu(const ProductParams&);
const char* cell_step_cpu(const CellStepParams&);

}   // namespace stable_rnn
