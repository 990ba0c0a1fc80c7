// The pybind11 module taskloom._native: build facts, the CPU level and its override, the planner of windows,
// and the streaming merge executor.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "common/cpu_level.h"
#include "merge/binding.h"
#include "routed/plan_windows.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = TASKLOOM_VERSION;
  info["compiler"] = TASKLOOM_COMPILER;
  info["torch_headers"] = TASKLOOM_TORCH_HEADERS;
  info["levels"] = split(TASKLOOM_LEVEL_NAMES);
  info["cuda_compiler"] = std::string(TASKLOOM_CUDA_BUILT).empty() ? py::object(py::none()) : py::object(py::str(TASKLOOM_CUDA_BUILT));
  info["cuda_architectures"] = split(TASKLOOM_CUDA_ARCHITECTURES);
  return info;
}

using Integers = py::array_t<int64_t, py::array::c_style>;

// The vector's numbers without a copy; the array keeps them alive.
Integers array_of(std::vector<int64_t>&& values) {
  auto* kept = new std::vector<int64_t>(std::move(values));
  const py::capsule owner(kept, [](void* held) { delete static_cast<std::vector<int64_t>*>(held); });
  return Integers(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

py::tuple plan_windows(const Integers& keys) {
  if (keys.ndim() != 2) throw py::value_error("plan_windows: keys: expected 2 dimensions, got " + std::to_string(keys.ndim()));
  taskloom::WindowPlan plan = taskloom::plan_windows(keys.data(), keys.shape(0), keys.shape(1));
  return py::make_tuple(array_of(std::move(plan.order)), array_of(std::move(plan.bounds)));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Taskloom's compiled host side: build facts, CPU level, planner of windows, merge executor.";
  m.def("build_info", &build_info, "Versions and options that this build was made with.");
  m.def("cpu_level", [] { return std::string(taskloom::cpu_level_name(taskloom::cpu_level())); }, "Name of the CPU level in force.");
  m.def(
      "detected_cpu_level", [] { return std::string(taskloom::cpu_level_name(taskloom::detected_cpu_level())); },
      "Name of the highest CPU level that this machine reaches.");
  m.def(
      "force_cpu_level", [](const std::string& name) { taskloom::force_cpu_level(name.c_str()); }, py::arg("name"),
      "Force a CPU level for this module's loops; an empty name goes back to detection.");
  m.def("plan_windows", &plan_windows, py::arg("keys"),
        "Samples grouped by window. keys: int64 [N, K], the window of each sample, as (start, width). Gives int64 (order [N], bounds [G + "
        "1]): "
        "group g is order[bounds[g]:bounds[g + 1]]; groups come sorted by their keys, the samples of one by their index.");
  taskloom::bind_merge(m);
}
