// Which instruction-set level the loops run at: found from CPUID at load, forced by TASKLOOM_CPU_LEVEL or force_cpu_level().
#pragma once

namespace taskloom {

enum class CpuLevel : int { baseline = 0, v2 = 2, v3 = 3, v4 = 4 };

// The level in force. A forced level that this machine or this build lacks throws std::runtime_error, at the first use of a loop.
CpuLevel cpu_level();
CpuLevel detected_cpu_level();
const char* cpu_level_name(CpuLevel level);
// nullptr or "" goes back to detection.
void force_cpu_level(const char* name);

}  // namespace taskloom

// Declares the table of loops of every level and the function that picks one: TASKLOOM_LOOPS(MaskedLoops, masked_loops).
#ifdef TASKLOOM_HAS_LEVEL_v4
#define TASKLOOM_LOOPS(Table, name)               \
  extern "C" const Table* taskloom_##name##_v2(); \
  extern "C" const Table* taskloom_##name##_v3(); \
  extern "C" const Table* taskloom_##name##_v4(); \
  inline const Table& name() {                    \
    switch (cpu_level()) {                        \
      case CpuLevel::v4:                          \
        return *taskloom_##name##_v4();           \
      case CpuLevel::v3:                          \
        return *taskloom_##name##_v3();           \
      default:                                    \
        return *taskloom_##name##_v2();           \
    }                                             \
  }
#else
#define TASKLOOM_LOOPS(Table, name)                     \
  extern "C" const Table* taskloom_##name##_baseline(); \
  inline const Table& name() { return *taskloom_##name##_baseline(); }
#endif

// In a NAME_loops.cpp: the exported accessor of this level's table.
#define TASKLOOM_PASTE_(a, b) a##b
#define TASKLOOM_PASTE(a, b) TASKLOOM_PASTE_(a, b)
#define TASKLOOM_EXPORT_LOOPS(Table, name, table)                               \
  extern "C" const Table* TASKLOOM_PASTE(taskloom_##name##_, TASKLOOM_LEVEL)(); \
  extern "C" const Table* TASKLOOM_PASTE(taskloom_##name##_, TASKLOOM_LEVEL)() { return &table; }
