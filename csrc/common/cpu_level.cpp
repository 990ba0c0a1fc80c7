#include "common/cpu_level.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace taskloom {
namespace {

CpuLevel parse(const std::string& name) {
#ifdef TASKLOOM_HAS_LEVEL_v4
  if (name == "v2") return CpuLevel::v2;
  if (name == "v3") return CpuLevel::v3;
  if (name == "v4") return CpuLevel::v4;
  const char* known = "v2, v3, v4";
#else
  if (name == "baseline") return CpuLevel::baseline;
  const char* known = "baseline";
#endif
  throw std::runtime_error("TASKLOOM_CPU_LEVEL: expected one of " + std::string(known) + ", got '" + name + "'");
}

CpuLevel checked(const std::string& name) {
  const CpuLevel level = parse(name);
  if (level > detected_cpu_level()) {
    throw std::runtime_error("TASKLOOM_CPU_LEVEL: " + name + " was asked for, but this CPU reaches only " +
                             cpu_level_name(detected_cpu_level()));
  }
  return level;
}

constexpr int unset = -1;
std::atomic<int> current{unset};

}  // namespace

CpuLevel detected_cpu_level() {
#ifdef TASKLOOM_HAS_LEVEL_v4
  static const CpuLevel level = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return CpuLevel::v4;
    if (__builtin_cpu_supports("x86-64-v3")) return CpuLevel::v3;
    if (__builtin_cpu_supports("x86-64-v2")) return CpuLevel::v2;
    throw std::runtime_error("taskloom needs an x86-64-v2 processor (SSE4.2, POPCNT)");
  }();
  return level;
#else
  return CpuLevel::baseline;
#endif
}

const char* cpu_level_name(CpuLevel level) {
  switch (level) {
    case CpuLevel::v2:
      return "v2";
    case CpuLevel::v3:
      return "v3";
    case CpuLevel::v4:
      return "v4";
    default:
      return "baseline";
  }
}

CpuLevel cpu_level() {
  int level = current.load(std::memory_order_relaxed);
  if (level == unset) {
    const char* forced = std::getenv("TASKLOOM_CPU_LEVEL");
    level = static_cast<int>(forced != nullptr && *forced != '\0' ? checked(forced) : detected_cpu_level());
    current.store(level, std::memory_order_relaxed);
  }
  return static_cast<CpuLevel>(level);
}

void force_cpu_level(const char* name) {
  current.store(name == nullptr || *name == '\0' ? unset : static_cast<int>(checked(name)), std::memory_order_relaxed);
}

}  // namespace taskloom
