// Cases of the sanitizer driver: counted, named for the report of a sanitizer that stops one, and compared from CPU level to CPU level.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "buffers.h"
#include "common/cpu_level.h"
#include "common/dtype.h"

namespace taskloom::sanitize {

// Of the case that runs, printed with a failure and by the sanitizer's death callback.
inline char case_name[512] = "none";
inline int64_t case_count = 0;

template <class... Arguments>
void begin_case(const char* format, Arguments... arguments) {
  std::snprintf(case_name, sizeof case_name, format, arguments...);
  ++case_count;
}

[[noreturn]] inline void fail(const char* file, int line, const char* what) {
  std::fprintf(stderr, "%s:%d: expected %s\n  in case: %s\n", file, line, what, case_name);
  std::exit(1);
}

#define EXPECT(condition)                                                         \
  do {                                                                            \
    if (!(condition)) ::taskloom::sanitize::fail(__FILE__, __LINE__, #condition); \
  } while (false)

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::f16:
      return "f16";
    case DType::bf16:
      return "bf16";
    default:
      return "f64";
  }
}

constexpr DType dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

// The levels that this machine reaches, lowest first.
inline const std::vector<std::string>& levels() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found;
    for (const CpuLevel level : {CpuLevel::baseline, CpuLevel::v2, CpuLevel::v3, CpuLevel::v4}) {
      if (level > detected_cpu_level() || (level == CpuLevel::baseline && detected_cpu_level() != level)) continue;
      found.emplace_back(cpu_level_name(level));
    }
    return found;
  }();
  return names;
}

// The level of each of the runs that are compared: every level, and the only one twice where there is but one. Threads meet in the same
// places at every level, so ThreadSanitizer sees the highest.
inline std::vector<std::string> compared_levels() {
#ifdef __SANITIZE_THREAD__
  return {levels().back()};
#endif
  std::vector<std::string> runs = levels();
  if (runs.size() == 1) runs.push_back(runs.front());
  return runs;
}

// Whether two arrays of n elements have the same bits, where a NaN equals any other: its payload is nobody's promise.
inline bool same_values(DType dtype, const char* a, const char* b, int64_t n) {
  const int64_t size = element_size(dtype);
  if (n == 0 || std::memcmp(a, b, static_cast<size_t>(n * size)) == 0) return true;
  for (int64_t i = 0; i < n; ++i) {
    if (std::memcmp(a + i * size, b + i * size, static_cast<size_t>(size)) == 0) continue;
    if (!is_nan(dtype, a + i * size) || !is_nan(dtype, b + i * size)) return false;
  }
  return true;
}

// Runs run(out) at every level, into memory of exactly `n` elements that holds other bytes each time, so that an element that nobody wrote
// differs too; returns what the last one wrote.
template <class Run>
std::vector<char> agree(DType dtype, int64_t n, Placement placement, const Run& run) {
  std::vector<char> first;
  int fill = 0x5a;
  bool again = false;
  for (const std::string& level : compared_levels()) {
    force_cpu_level(level.c_str());
    Buffer out(n * element_size(dtype), placement);
    out.fill(fill);
    fill ^= 0xff;
    run(out.data());
    if (again) EXPECT(same_values(dtype, first.data(), out.data(), n));
    first.assign(out.data(), out.data() + out.bytes());
    again = true;
  }
  force_cpu_level("");
  return first;
}

// The same for plain bytes.
template <class Run>
std::vector<char> agree_bytes(int64_t bytes, Placement placement, const Run& run) {
  std::vector<char> first;
  int fill = 0x5a;
  bool again = false;
  for (const std::string& level : compared_levels()) {
    force_cpu_level(level.c_str());
    Buffer out(bytes, placement);
    out.fill(fill);
    fill ^= 0xff;
    run(out.data());
    if (again) EXPECT(bytes == 0 || std::memcmp(first.data(), out.data(), static_cast<size_t>(bytes)) == 0);
    first.assign(out.data(), out.data() + bytes);
    again = true;
  }
  force_cpu_level("");
  return first;
}

}  // namespace taskloom::sanitize
