// The op library's own CPU level, for tests and `taskloom doctor`: the library has no Python interface besides its ops.
#include <exception>

#include "common/cpu_level.h"

extern "C" {

// Name of the level in force; nullptr where TASKLOOM_CPU_LEVEL asks for one that cannot be had.
__attribute__((visibility("default"))) const char* taskloom_ops_cpu_level() {
  try {
    return taskloom::cpu_level_name(taskloom::cpu_level());
  } catch (const std::exception&) {
    return nullptr;
  }
}

// 0, or 1 where there is no such level here; an empty name goes back to detection.
__attribute__((visibility("default"))) int taskloom_ops_force_cpu_level(const char* name) {
  try {
    taskloom::force_cpu_level(name);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
}
