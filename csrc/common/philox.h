// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Torch-free; host and device.
// The word of element i is word i % 4 of the block with counter (i / 4, tensor key) under the key `seed`: it depends on nothing else,
// so masks are the same for any thread count, sharding or device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TASKLOOM_HOST_DEVICE __host__ __device__
#else
#define TASKLOOM_HOST_DEVICE
#endif

namespace taskloom {
namespace {

struct PhiloxBlock {
  uint32_t word[4];
};

TASKLOOM_HOST_DEVICE inline PhiloxBlock philox_4x32_10(uint64_t seed, uint64_t tensor_key, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block);
  uint32_t c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(tensor_key);
  uint32_t c3 = static_cast<uint32_t>(tensor_key >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace
}  // namespace taskloom
