// Eight entries of several tensors at once: their bits are loaded first and converted afterwards, so that a thread waits for many loads
// together and not for one after the other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_entries.h"

namespace taskloom {

// The bits of eight entries of a tensor. Where Acc is float no tensor is float64.
template <class Acc>
struct Fetched {
  static constexpr int words_held = vector_entries * sizeof(Acc) / 4;
  uint32_t words[words_held];
};

// with_storage for the types that a kernel computing in Acc reads.
template <class Acc, class Body>
__device__ inline void with_storage_of(DType dtype, Body body) {
  if constexpr (sizeof(Acc) == 8) {
    with_storage(dtype, body);
  } else {
    switch (dtype) {
      case DType::f32:
        return body(Storage<DType::f32>{});
      case DType::f16:
        return body(Storage<DType::f16>{});
      default:
        return body(Storage<DType::bf16>{});
    }
  }
}

// Entries begin .. begin + 8, of which those at `numel` and beyond are 0; `begin` is a multiple of 8.
template <class Acc>
__device__ inline void fetch_eight(const DeviceValues& from, int64_t begin, int64_t numel, Fetched<Acc>& to) {
  const bool whole = from.aligned && begin + vector_entries <= numel;
  with_storage_of<Acc>(from.dtype, [&](auto storage) {
    using Entry = typename decltype(storage)::Entry;
    uint32_t words[storage.words];
    if (whole) {
      storage.read(from.data, begin, words);
    } else {
      const auto* const data = static_cast<const Entry*>(from.data);
#pragma unroll
      for (int word = 0; word < storage.words; ++word) words[word] = 0;
#pragma unroll
      for (int i = 0; i < vector_entries; ++i) {
        const uint64_t bits = begin + i < numel ? data[begin + i] : Entry{0};
        if constexpr (sizeof(Entry) == 8) {
          words[2 * i] = static_cast<uint32_t>(bits), words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
        } else if constexpr (sizeof(Entry) == 4) {
          words[i] = static_cast<uint32_t>(bits);
        } else {
          words[i / 2] |= static_cast<uint32_t>(bits) << (16 * (i % 2));
        }
      }
    }
#pragma unroll
    for (int word = 0; word < storage.words; ++word) to.words[word] = words[word];
  });
}

template <class Acc>
__device__ inline void convert_eight(const DeviceValues& from, const Fetched<Acc>& fetched, Acc (&values)[vector_entries]) {
  with_storage_of<Acc>(from.dtype, [&](auto storage) {
    uint32_t words[storage.words];
#pragma unroll
    for (int word = 0; word < storage.words; ++word) words[word] = fetched.words[word];
    storage.unpack(words, values);
  });
}

// Calls use(t, values) for eight entries of each of `count` tensors in their order, with several tensors' loads under way; tensor(t) is
// tensor t.
template <class Acc, class Tensors, class Use>
__device__ inline void each_eight(int64_t count, int64_t begin, int64_t numel, const Tensors& tensor, const Use& use) {
  constexpr int ahead = 2;
  for (int64_t first = 0; first < count; first += ahead) {
    DeviceValues some[ahead];
    Fetched<Acc> fetched[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (first + i >= count) continue;
      some[i] = tensor(first + i);
      fetch_eight(some[i], begin, numel, fetched[i]);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (first + i >= count) continue;
      Acc values[vector_entries];
      convert_eight(some[i], fetched[i], values);
      use(first + i, values);
    }
  }
}

}  // namespace taskloom
