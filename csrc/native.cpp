// The pybind11 module taskloom._native: build facts, the CPU level and its override, and the streaming merge executor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "common/cpu_level.h"
#include "merge/binding.h"

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

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Taskloom's compiled host side: build facts, CPU level, merge executor.";
  m.def("build_info", &build_info, "Versions and options that this build was made with.");
  m.def("cpu_level", [] { return std::string(taskloom::cpu_level_name(taskloom::cpu_level())); }, "Name of the CPU level in force.");
  m.def(
      "detected_cpu_level", [] { return std::string(taskloom::cpu_level_name(taskloom::detected_cpu_level())); },
      "Name of the highest CPU level that this machine reaches.");
  m.def(
      "force_cpu_level", [](const std::string& name) { taskloom::force_cpu_level(name.c_str()); }, py::arg("name"),
      "Force a CPU level for this module's loops; an empty name goes back to detection.");
  taskloom::bind_merge(m);
}
