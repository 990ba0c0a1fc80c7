// The channel window of each sample. Torch-free.
#pragma once

#include <cstdint>

namespace taskloom {

struct Windows {
  const int64_t* start;  // [samples]
  const int64_t* width;  // [samples]
};

}  // namespace taskloom
