// The pybind11 module taskloom._native: build facts, the CPU level and its override, the planner of windows,
// and the streaming merge executor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
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

// A NumPy array of these numbers. Through the buffer protocol: pybind11/numpy.h would leave a symbol of its own for others to see.
py::object array_of(const std::vector<int64_t>& values) {
  py::object made = py::module_::import("numpy").attr("empty")(values.size(), "int64");
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(py::buffer(made).request(true).ptr));
  return made;
}

py::tuple plan_windows(const py::buffer& keys) {
  const py::buffer_info given = keys.request();
  if (given.ndim != 2) throw py::value_error("plan_windows: keys: expected 2 dimensions, got " + std::to_string(given.ndim));
  if (!given.item_type_is_equivalent_to<int64_t>()) throw py::type_error("plan_windows: keys: expected int64, got format " + given.format);
  if (given.strides[1] != given.itemsize || given.strides[0] != given.shape[1] * given.itemsize) {
    throw py::value_error("plan_windows: keys: expected a contiguous array");
  }
  const taskloom::WindowPlan plan = taskloom::plan_windows(static_cast<const int64_t*>(given.ptr), given.shape[0], given.shape[1]);
  return py::make_tuple(array_of(plan.order), array_of(plan.bounds));
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
