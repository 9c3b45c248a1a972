// The Python module stable_rnn._C. Pointers come as integers (tensor.data_ptr(); 0 is null), sizes as integers; Python owns all memory.
// Every entry point takes the fields of its struct in params.h, in that order, by position or by name; optional pointers default to 0.
// The CUDA ones are named *_cuda and take the fields of CudaLaunch behind those; without STABLE_RNN_CUDA they do not exist.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "crowd.h"
#include "isa.h"
#include "memory.h"
#include "stable_rnn/cuda.h"

namespace py = pybind11;
using namespace stable_rnn;

namespace {

using Address = std::uintptr_t;

// An address on its way to whatever pointer type the field has.
struct Pointer {
  Address address;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};

template <class Kernel>
void run(const Kernel& kernel) {
  const char* problem;
  {
    py::gil_scoped_release unlocked;
    problem = kernel();
  }
  if (problem) throw std::runtime_error(problem);
}

// The Python functions of a kernel, from the function that gathers its fields into its struct.
template <class Params, class... Fields>
auto on_cpu(Params (*gather)(Fields...), const char* (*kernel)(const Params&)) {
  return [=](Fields... fields) { run([&] { return kernel(gather(fields...)); }); };
}
// With the groups of a cascade behind the fields.
template <class Params, class... Fields>
auto on_cascade(Params (*gather)(Fields...), const char* (*kernel)(const Params&, const CascadeGroups&)) {
  return [=](Fields... fields, Address groups, int64_t n_groups) {
    run([&] { return kernel(gather(fields...), CascadeGroups{Pointer{groups}, n_groups}); });
  };
}
#ifdef STABLE_RNN_CUDA
template <class Params, class... Fields>
auto on_cuda(Params (*gather)(Fields...), const char* (*kernel)(const Params&, const CudaLaunch&)) {
  return [=](Fields... fields, int device, Address stream, Address workspace, int64_t workspace_bytes) {
    run([&] {
      return kernel(gather(fields...), CudaLaunch{device, Pointer{stream}, Pointer{workspace}, workspace_bytes});
    });
  };
}
#endif

Lanes make_lanes(int64_t steps, int64_t batch, int64_t step, int64_t stride, int64_t warmup, Address base,
                 Address length, Address resets, Address select, int64_t n_select) {
  return {steps,           batch,           step,    stride, warmup, Pointer{base}, Pointer{length},
          Pointer{resets}, Pointer{select}, n_select};
}

// clang-format off: fields stand in groups, as in params.h
ForwardParams forward_params(int cell, int dtype, int threads, int64_t hidden, int64_t out, float cap,
                             int64_t steps, int64_t batch, int64_t step, int64_t stride, int64_t warmup,
                             Address base, Address length, Address resets, Address select, int64_t n_select,
                             Address xp, Address w_hh, Address w_hr, Address h0, Address c0, Address h_init, Address c_init,
                             Address hidden_bias, Address y, Address h_n, Address c_n, Address saved, Address cells,
                             Address h_start, Address c_start, Address h_end, Address c_end, Address decay) {
  return {cell, dtype, threads, hidden, out, cap,
          make_lanes(steps, batch, step, stride, warmup, base, length, resets, select, n_select),
          Pointer{xp}, Pointer{w_hh}, Pointer{w_hr}, Pointer{h0}, Pointer{c0}, Pointer{h_init}, Pointer{c_init},
          Pointer{hidden_bias}, Pointer{y}, Pointer{h_n}, Pointer{c_n}, Pointer{saved}, Pointer{cells},
          Pointer{h_start}, Pointer{c_start}, Pointer{h_end}, Pointer{c_end}, Pointer{decay}};
}

BackwardParams backward_params(int cell, int dtype, int threads, int64_t hidden, int64_t out, float cap,
                               int64_t steps, int64_t batch, int64_t step, int64_t stride, int64_t warmup,
                               Address base, Address length, Address resets, Address select, int64_t n_select,
                               Address dy, Address y, Address saved, Address cells, Address w_hh, Address w_hr, Address c0,
                               Address dh_n, Address dc_n, Address dh_init, Address dc_init, Address h0,
                               Address dz, Address dh, Address dh0, Address dc0,
                               Address dh_start, Address dc_start, Address dh_end, Address dc_end, Address decay) {
  return {cell, dtype, threads, hidden, out, cap,
          make_lanes(steps, batch, step, stride, warmup, base, length, resets, select, n_select),
          Pointer{dy}, Pointer{y}, Pointer{saved}, Pointer{cells}, Pointer{w_hh}, Pointer{w_hr}, Pointer{c0},
          Pointer{dh_n}, Pointer{dc_n}, Pointer{dh_init}, Pointer{dc_init}, Pointer{h0},
          Pointer{dz}, Pointer{dh}, Pointer{dh0}, Pointer{dc0},
          Pointer{dh_start}, Pointer{dc_start}, Pointer{dh_end}, Pointer{dc_end}, Pointer{decay}};
}

WindowedBackwardParams windowed_backward_params(int cell, int dtype, int threads, int64_t hidden, int64_t out, float cap,
                                                int64_t steps, int64_t batch, int64_t step, int64_t stride, int64_t warmup,
                                                Address base, Address length, Address resets, Address select, int64_t n_select,
                                                int64_t first, int64_t last,
                                                Address xp, Address w_hh, Address w_hr, Address h0, Address c0,
                                                Address dy, Address dh_n, Address dc_n, Address hidden_bias,
                                                Address dz, Address d_hidden, Address h_prev, Address dh, Address m,
                                                Address dxp, Address dh0, Address dc0) {
  return {cell, dtype, threads, hidden, out, cap,
          make_lanes(steps, batch, step, stride, warmup, base, length, resets, select, n_select), first, last,
          Pointer{xp}, Pointer{w_hh}, Pointer{w_hr}, Pointer{h0}, Pointer{c0},
          Pointer{dy}, Pointer{dh_n}, Pointer{dc_n}, Pointer{hidden_bias},
          Pointer{dz}, Pointer{d_hidden}, Pointer{h_prev}, Pointer{dh}, Pointer{m},
          Pointer{dxp}, Pointer{dh0}, Pointer{dc0}};
}

InputProjectionParams input_projection_params(int dtype, int threads, int64_t rows, int64_t input, int64_t sums, Address x, Address w_ih,
                                              Address b_ih, Address b_hh, Address xp) {
  return {dtype, threads, rows, input, sums, Pointer{x}, Pointer{w_ih}, Pointer{b_ih}, Pointer{b_hh}, Pointer{xp}};
}

ProductParams product_params(int threads, bool transposed, bool more, int64_t rows, int64_t inner, int64_t columns,
                             Address a, Address b, Address c) {
  return {threads, transposed, more, rows, inner, columns, Pointer{a}, Pointer{b}, Pointer{c}};
}

CellStepParams cell_step_params(int cell, int dtype, int threads, int64_t batch, int64_t input, int64_t hidden, float cap,
                                Address x, Address h, Address c, Address w_ih, Address w_hh, Address b_ih, Address b_hh,
                                Address h_out, Address c_out) {
  return {cell, dtype, threads, batch, input, hidden, cap, Pointer{x}, Pointer{h}, Pointer{c},
          Pointer{w_ih}, Pointer{w_hh}, Pointer{b_ih}, Pointer{b_hh}, Pointer{h_out}, Pointer{c_out}};
}

CascadeReadsParams cascade_reads_params(int dtype, int64_t gates, int64_t hidden, Address w_hh, Address reads) {
  return {dtype, gates, hidden, Pointer{w_hh}, Pointer{reads}};
}

// matrices is a table of int64 with the fields of SpectralMatrix in its columns.
SpectralParams spectral_params(int threads, bool scale, int iterations, int64_t fresh, uint64_t seed, int64_t count, Address matrices,
                               Address bounds, Address norms, Address near) {
  return {threads, scale, iterations, fresh, seed, count, Pointer{matrices}, Pointer{bounds}, Pointer{norms},
          Pointer{near}};
}
// clang-format on

#ifdef STABLE_RNN_CUDA
// clang-format off
ScanParams scan_params(int cell, int dtype, int64_t hidden, int64_t unit, int64_t units, float cap,
                       int64_t steps, int64_t batch, int64_t step, Address base, Address length, Address resets,
                       Address xp, Address sums, Address hidden_bias, Address h0, Address c0,
                       Address y, Address h_n, Address c_n, Address saved, Address cells, Address before) {
  return {cell, dtype, hidden, unit, units, cap, steps, batch, step, Pointer{base}, Pointer{length}, Pointer{resets},
          Pointer{xp}, Pointer{sums}, Pointer{hidden_bias}, Pointer{h0}, Pointer{c0},
          Pointer{y}, Pointer{h_n}, Pointer{c_n}, Pointer{saved}, Pointer{cells}, Pointer{before}};
}

ScanBackwardParams scan_backward_params(int cell, int dtype, int64_t hidden, int64_t unit, int64_t units, float cap,
                                        int64_t steps, int64_t batch, int64_t step, Address base, Address length, Address resets,
                                        Address dy, Address y, Address saved, Address cells, Address h0, Address c0,
                                        Address dh_n, Address dc_n, Address sums,
                                        Address dz, Address dh0, Address dc0, Address after) {
  return {cell, dtype, hidden, unit, units, cap, steps, batch, step, Pointer{base}, Pointer{length}, Pointer{resets},
          Pointer{dy}, Pointer{y}, Pointer{saved}, Pointer{cells}, Pointer{h0}, Pointer{c0},
          Pointer{dh_n}, Pointer{dc_n}, Pointer{sums},
          Pointer{dz}, Pointer{dh0}, Pointer{dc0}, Pointer{after}};
}
// clang-format on

using Limits = std::array<int64_t, 4>;   // the fields of CudaLimits

CudaLimits make_limits(const Limits& l) { return {int(l[0]), int(l[1]), l[2], int(l[3])}; }

Limits limits_of(int device) {
  CudaLimits found;
  run([&] { return cuda_limits(device, &found); });
  return {found.arch, found.sms, found.shared_bytes, found.max_cluster};
}

int64_t spectral_workspace(int64_t count, Address matrices, const Limits& limits) {
  SpectralParams params{};
  params.count = count;
  params.matrices = Pointer{matrices};
  return spectral_workspace_cuda(params, make_limits(limits));
}

py::dict recurrence_tiling(bool backward, int cell, int dtype, int64_t hidden, int64_t out, int64_t entries,
                           const Limits& limits) {
  const CudaTiling tiling = recurrence_tiling_cuda(backward, cell, dtype, hidden, out, entries, make_limits(limits));
  py::dict fields;
  if (tiling.message) {
    fields["message"] = tiling.message;
    return fields;
  }
  fields["message"] = py::none();
  fields["blocks"] = tiling.blocks;
  fields["cluster"] = tiling.cluster;
  fields["lanes"] = tiling.lanes;
  fields["units"] = tiling.units;
  fields["warps"] = tiling.warps;
  fields["place"] = tiling.place;
  fields["teams"] = tiling.teams;
  fields["shared_bytes"] = tiling.shared_bytes;
  fields["workspace_bytes"] = tiling.workspace_bytes;
  fields["clocks"] = tiling.clocks;
  fields["product"] = tiling.product;
  fields["exchange"] = tiling.exchange;
  return fields;
}

double clock_of(int device) {
  double hertz;
  run([&] { return cuda_clock(device, &hertz); });
  return hertz;
}

using Costs = std::array<double, step_cost_count>;   // the fields of StepCosts

py::dict step_costs() {
  const StepCosts costs;
  Costs values;
  std::memcpy(values.data(), &costs, sizeof costs);
  py::dict found;
  for (int i = 0; i < step_cost_count; ++i) found[step_cost_names[i]] = values[i];
  return found;
}

double step_clocks(bool backward, int cell, int dtype, int64_t hidden, int64_t entries, const py::dict& fields,
                   const Limits& limits, const Costs& costs) {
  const auto field = [&](const char* name) { return fields[name].cast<int>(); };
  CudaTiling tiling{};
  tiling.blocks = field("blocks"), tiling.cluster = field("cluster"), tiling.lanes = field("lanes");
  tiling.units = field("units"), tiling.warps = field("warps"), tiling.place = field("place");
  StepCosts by;
  std::memcpy(static_cast<void*>(&by), costs.data(), sizeof by);
  const double clocks = step_clocks_cuda(backward, cell, dtype, hidden, entries, tiling, make_limits(limits), by);
  if (clocks < 0) throw py::value_error("the kernels have no such tiling");
  return clocks;
}
#endif

py::dict cpu_features() {
  py::dict features;
  features["isa"] = isa_name();
  features["amx_bfloat16"] = has_amx_bfloat16();
#ifdef _OPENMP
  features["openmp"] = true;
#else
  features["openmp"] = false;
#endif
  return features;
}

py::dict known_crowd() {
  const Crowd known = crowd();
  const int64_t left = known.until - nanoseconds();
  py::dict found;
  found["threads"] = left > 0 ? py::object(py::int_(known.limit)) : py::none();
  found["seconds"] = left > 0 ? left * 1e-9 : 0;
  return found;
}

void choose_isa(const std::string& name) {
  if (!set_isa(name.c_str()))
    throw py::value_error("isa '" + name +
                          "' is not one that this machine can run (plain, avx2, avx512, avx512bf16, amx)");
}

}   // namespace

PYBIND11_MODULE(_C, module) {
  if (isa_problem())
    throw py::import_error(isa_problem() + std::string(", not '") + std::getenv("STABLE_RNN_ISA") + "'");
  module.doc() =
      "Kernels of stable_rnn: raw addresses in, nothing allocated, nothing returned. Use stable_rnn itself instead.";
  module.attr("interface") = stable_rnn::interface_number;
  using py::arg;

  // recurrence: stable_rnn/params.h
  const auto forward = [&](const char* name, auto function, auto... launch) {
    module.def(name, function, arg("cell"), arg("dtype"), arg("threads"), arg("hidden"), arg("out"), arg("cap"),
               arg("steps"), arg("batch"), arg("step"), arg("stride"), arg("warmup"), arg("base"), arg("length"),
               arg("resets"), arg("select"), arg("n_select"), arg("xp"), arg("w_hh"), arg("w_hr") = 0, arg("h0") = 0,
               arg("c0") = 0, arg("h_init") = 0, arg("c_init") = 0, arg("hidden_bias") = 0, arg("y") = 0,
               arg("h_n") = 0, arg("c_n") = 0, arg("saved") = 0, arg("cells") = 0, arg("h_start") = 0,
               arg("c_start") = 0, arg("h_end") = 0, arg("c_end") = 0, arg("decay") = 0, launch...);
  };
  const auto backward = [&](const char* name, auto function, auto... launch) {
    module.def(name, function, arg("cell"), arg("dtype"), arg("threads"), arg("hidden"), arg("out"), arg("cap"),
               arg("steps"), arg("batch"), arg("step"), arg("stride"), arg("warmup"), arg("base"), arg("length"),
               arg("resets"), arg("select"), arg("n_select"), arg("dy") = 0, arg("y") = 0, arg("saved") = 0,
               arg("cells") = 0, arg("w_hh") = 0, arg("w_hr") = 0, arg("c0") = 0, arg("dh_n") = 0, arg("dc_n") = 0,
               arg("dh_init") = 0, arg("dc_init") = 0, arg("h0") = 0, arg("dz") = 0, arg("dh") = 0, arg("dh0") = 0,
               arg("dc0") = 0, arg("dh_start") = 0, arg("dc_start") = 0, arg("dh_end") = 0, arg("dc_end") = 0,
               arg("decay") = 0, launch...);
  };
  const auto spectral = [&](const char* name, auto function, auto... launch) {   // stable_rnn/spectral.h
    module.def(name, function, arg("threads"), arg("scale"), arg("iterations"), arg("fresh"), arg("seed"), arg("count"),
               arg("matrices"), arg("bounds"), arg("norms"), arg("near"), launch...);
  };
  forward("recurrence_forward", on_cpu(forward_params, recurrence_forward_cpu));
  backward("recurrence_backward", on_cpu(backward_params, recurrence_backward_cpu));
  forward("scanned_forward", on_cascade(forward_params, scanned_forward_cpu), arg("groups"), arg("n_groups"));
  backward("scanned_backward", on_cascade(backward_params, scanned_backward_cpu), arg("groups"), arg("n_groups"));
  module.def("recurrence_windowed_backward", on_cpu(windowed_backward_params, recurrence_windowed_backward_cpu),
             arg("cell"), arg("dtype"), arg("threads"), arg("hidden"), arg("out"), arg("cap"), arg("steps"),
             arg("batch"), arg("step"), arg("stride"), arg("warmup"), arg("base"), arg("length"), arg("resets"),
             arg("select"), arg("n_select"), arg("first"), arg("last"), arg("xp"), arg("w_hh"), arg("w_hr") = 0,
             arg("h0") = 0, arg("c0") = 0, arg("dy") = 0, arg("dh_n") = 0, arg("dc_n") = 0, arg("hidden_bias") = 0,
             arg("dz") = 0, arg("d_hidden") = 0, arg("h_prev") = 0, arg("dh") = 0, arg("m") = 0, arg("dxp") = 0,
             arg("dh0") = 0, arg("dc0") = 0);
  module.def("cascade_reads", on_cpu(cascade_reads_params, cascade_reads_cpu), arg("dtype"), arg("gates"),
             arg("hidden"), arg("w_hh"), arg("reads"));
  module.def("input_projection", on_cpu(input_projection_params, input_projection_cpu), arg("dtype"), arg("threads"),
             arg("rows"), arg("input"), arg("sums"), arg("x"), arg("w_ih"), arg("b_ih"), arg("b_hh"), arg("xp"));
  module.def("product", on_cpu(product_params, product_cpu), arg("threads"), arg("transposed"), arg("more"),
             arg("rows"), arg("inner"), arg("columns"), arg("a"), arg("b"), arg("c"));
  module.def("cell_step", on_cpu(cell_step_params, cell_step_cpu), arg("cell"), arg("dtype"), arg("threads"),
             arg("batch"), arg("input"), arg("hidden"), arg("cap"), arg("x"), arg("h"), arg("c"), arg("w_ih"),
             arg("w_hh"), arg("b_ih"), arg("b_hh"), arg("h_out"), arg("c_out"));
  spectral("spectral_step", on_cpu(spectral_params, spectral_step_cpu));

#ifdef STABLE_RNN_CUDA
  forward("recurrence_forward_cuda", on_cuda(forward_params, recurrence_forward_cuda), arg("device"), arg("stream"),
          arg("workspace"), arg("workspace_bytes"));
  backward("recurrence_backward_cuda", on_cuda(backward_params, recurrence_backward_cuda), arg("device"), arg("stream"),
           arg("workspace"), arg("workspace_bytes"));
  spectral("spectral_step_cuda", on_cuda(spectral_params, spectral_step_cuda), arg("device"), arg("stream"),
           arg("workspace"), arg("workspace_bytes"));
  module.def("scan_forward_cuda", on_cuda(scan_params, scan_forward_cuda), arg("cell"), arg("dtype"), arg("hidden"),
             arg("unit"), arg("units"), arg("cap"), arg("steps"), arg("batch"), arg("step"), arg("base"), arg("length"),
             arg("resets"), arg("xp"), arg("sums"), arg("hidden_bias"), arg("h0"), arg("c0"), arg("y"), arg("h_n"),
             arg("c_n"), arg("saved"), arg("cells"), arg("before"), arg("device"), arg("stream"), arg("workspace"),
             arg("workspace_bytes"));
  module.def("scan_backward_cuda", on_cuda(scan_backward_params, scan_backward_cuda), arg("cell"), arg("dtype"),
             arg("hidden"), arg("unit"), arg("units"), arg("cap"), arg("steps"), arg("batch"), arg("step"), arg("base"),
             arg("length"), arg("resets"), arg("dy"), arg("y"), arg("saved"), arg("cells"), arg("h0"), arg("c0"),
             arg("dh_n"), arg("dc_n"), arg("sums"), arg("dz"), arg("dh0"), arg("dc0"), arg("after"), arg("device"),
             arg("stream"), arg("workspace"), arg("workspace_bytes"));
  module.def("scan_workspace_cuda", scan_workspace_cuda, arg("steps"), arg("batch"), arg("units"),
             "Bytes that a scan needs.");
  module.def("spectral_workspace_cuda", spectral_workspace, arg("count"), arg("matrices"), arg("limits"),
             "Bytes that spectral_step_cuda needs on a device with these limits.");
  module.def("recurrence_tiling_cuda", recurrence_tiling, arg("backward"), arg("cell"), arg("dtype"), arg("hidden"),
             arg("out"), arg("entries"), arg("limits"),
             "How a shape would run on a device with these limits: the fields of CudaTiling.");
  module.def("step_costs_cuda", step_costs, "{name: value} of StepCosts, in its order.");
  module.attr("step_costs_source") = step_costs_source;
  module.def("step_clocks_cuda", step_clocks, arg("backward"), arg("cell"), arg("dtype"), arg("hidden"), arg("entries"),
             arg("tiling"), arg("limits"), arg("costs"),
             "Clocks of a step of all lanes with the fields of a CudaTiling, by these values of StepCosts.");
  module.def("cuda_clock", clock_of, arg("device"), "The highest clock of a device, in Hz.");
  module.def("cuda_limits", limits_of, arg("device"), "(arch, sms, shared_bytes, max_cluster) of a device.");
#endif

  // the machine
  module.def(
      "prefer_huge_pages", [](Address start, int64_t bytes) { prefer_huge_pages(Pointer{start}, bytes); }, arg("start"),
      arg("bytes"), "A hint for large outputs that nobody has written yet: far fewer page faults.");
  module.def("cpu_features", cpu_features,
             "{'isa': plain | avx2 | avx512 | avx512bf16 | amx, 'openmp': bool, "
             "'amx_bfloat16': whether the machine has such tiles}");
  module.def(
      "crowd", known_crowd,
      "{'threads': how many a team starts with at most, as cores were found busy, or None; 'seconds': how long}");
  module.def(
      "leave_at", [](int round, double pause) { leave_at(round, int64_t(pause * 1e9)); }, arg("round"),
      arg("pause") = 0,
      "For tests: forget what is known of busy cores, and let threads leave their team at every (round + 1)-th "
      "barrier; -1: none.");
  module.def("set_isa", choose_isa, arg("name"), "For tests: take another instruction set than the best one.");
}
