#pragma once

#include <cstdint>

#include "common/cpu_level.h"

namespace taskloom {

struct PhiloxTable {
  void (*words)(uint64_t seed, uint64_t tensor_key, int64_t begin, int64_t n, uint32_t* out);
};

TASKLOOM_LOOPS(PhiloxTable, philox_table_loops)

}  // namespace taskloom
