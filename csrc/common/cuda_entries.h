// Eight entries at a time between memory and registers, in accesses of 16 bytes where the tensor's address allows: the entries of one byte
// of a packed mask. Arithmetic is float, or double where a tensor is float64.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/checks.h"
#include "common/cuda_launch.h"
#include "common/dtype.h"
#ifdef TASKLOOM_CUDA_EMULATED
#include "common/convert.h"
#endif

namespace taskloom {

constexpr int vector_entries = 8;

// A contiguous tensor's storage as kernels take it.
struct DeviceValues {
  void* data = nullptr;
  DType dtype = DType::f32;
  int32_t aligned = 0;  // whether data is a multiple of 16 bytes
};

inline DeviceValues device_values(const Tensor& contiguous, const char* name) {
  check_on_device(contiguous);
  void* const data = const_cast<void*>(contiguous.const_data_ptr());
  return {data, dtype_of(contiguous, name), (reinterpret_cast<uintptr_t>(data) & 15) == 0};
}

inline __device__ float bfloat16_value(uint32_t bits) { return __uint_as_float(bits << 16); }

inline __device__ uint32_t bfloat16_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline __device__ float half_value(uint32_t bits) {
#ifdef TASKLOOM_CUDA_EMULATED
  return half_to_float(static_cast<uint16_t>(bits));
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
  return value;
#endif
}

inline __device__ uint32_t half_bits(float value) {
#ifdef TASKLOOM_CUDA_EMULATED
  return float_to_half(value);
#else
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#endif
}

// Entry `index`.
template <class Acc>
__device__ inline Acc load_entry(const DeviceValues& from, int64_t index) {
  switch (from.dtype) {
    case DType::f32:
      return static_cast<Acc>(static_cast<const float*>(from.data)[index]);
    case DType::f64:
      return static_cast<Acc>(static_cast<const double*>(from.data)[index]);
    case DType::f16:
      return static_cast<Acc>(half_value(static_cast<const uint16_t*>(from.data)[index]));
    default:
      return static_cast<Acc>(bfloat16_value(static_cast<const uint16_t*>(from.data)[index]));
  }
}

template <class Acc>
__device__ inline void store_entry(const DeviceValues& to, int64_t index, Acc value) {
  switch (to.dtype) {
    case DType::f32:
      static_cast<float*>(to.data)[index] = static_cast<float>(value);
      break;
    case DType::f64:
      static_cast<double*>(to.data)[index] = static_cast<double>(value);
      break;
    case DType::f16:
      static_cast<uint16_t*>(to.data)[index] = static_cast<uint16_t>(half_bits(static_cast<float>(value)));
      break;
    default:
      static_cast<uint16_t*>(to.data)[index] = static_cast<uint16_t>(bfloat16_bits(static_cast<float>(value)));
  }
}

// The 32-bit words of eight entries of one storage type, and the entries in them. Every index is known to the compiler, so that words stay
// in registers.
template <DType dtype>
struct Storage {
  static constexpr DType dtype_of_entries = dtype;
  static constexpr int entry_bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  static constexpr int words = vector_entries * entry_bytes / 4;
  using Entry = std::conditional_t<entry_bytes == 8, uint64_t, std::conditional_t<entry_bytes == 4, uint32_t, uint16_t>>;

  static __device__ void read(const void* data, int64_t begin, uint32_t (&to)[words]) {
    const auto* const from = reinterpret_cast<const uint4*>(static_cast<const Entry*>(data) + begin);
#pragma unroll
    for (int part = 0; part < words / 4; ++part) {
      const uint4 four = from[part];
      to[4 * part] = four.x, to[4 * part + 1] = four.y, to[4 * part + 2] = four.z, to[4 * part + 3] = four.w;
    }
  }

  static __device__ void write(void* data, int64_t begin, const uint32_t (&from)[words]) {
    auto* const to = reinterpret_cast<uint4*>(static_cast<Entry*>(data) + begin);
#pragma unroll
    for (int part = 0; part < words / 4; ++part) {
      to[part] = make_uint4(from[4 * part], from[4 * part + 1], from[4 * part + 2], from[4 * part + 3]);
    }
  }

  template <class Acc>
  static __device__ void unpack(const uint32_t (&from)[words], Acc (&values)[vector_entries]) {
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      if constexpr (dtype == DType::f64) {
        const uint64_t bits = static_cast<uint64_t>(from[2 * i + 1]) << 32 | from[2 * i];
        values[i] = static_cast<Acc>(__longlong_as_double(static_cast<long long>(bits)));
      } else if constexpr (dtype == DType::f32) {
        values[i] = static_cast<Acc>(__uint_as_float(from[i]));
      } else {
        const uint32_t bits = i % 2 == 0 ? from[i / 2] & 0xffffu : from[i / 2] >> 16;
        values[i] = static_cast<Acc>(dtype == DType::f16 ? half_value(bits) : bfloat16_value(bits));
      }
    }
  }

  template <class Acc>
  static __device__ void pack(const Acc (&values)[vector_entries], uint32_t (&to)[words]) {
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      if constexpr (dtype == DType::f64) {
        const auto bits = static_cast<uint64_t>(__double_as_longlong(static_cast<double>(values[i])));
        to[2 * i] = static_cast<uint32_t>(bits);
        to[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
      } else if constexpr (dtype == DType::f32) {
        to[i] = __float_as_uint(static_cast<float>(values[i]));
      } else {
        const float value = static_cast<float>(values[i]);
        const uint32_t bits = dtype == DType::f16 ? half_bits(value) : bfloat16_bits(value);
        to[i / 2] = i % 2 == 0 ? bits : to[i / 2] | bits << 16;
      }
    }
  }

  // Bits of a word that belong to the entries which `chosen` sets.
  static __device__ uint32_t chosen_bits(uint32_t chosen, int word) {
    if constexpr (entry_bytes == 2) {
      const uint32_t pair = chosen >> (2 * word);
      return (pair & 1u ? 0x0000ffffu : 0u) | (pair & 2u ? 0xffff0000u : 0u);
    } else {
      return chosen >> (word * 4 / entry_bytes) & 1u ? 0xffffffffu : 0u;
    }
  }
};

// Calls body(Storage<dtype>{}) for a dtype that only the run knows.
template <class Body>
__device__ inline void with_storage(DType dtype, Body body) {
  switch (dtype) {
    case DType::f32:
      return body(Storage<DType::f32>{});
    case DType::f64:
      return body(Storage<DType::f64>{});
    case DType::f16:
      return body(Storage<DType::f16>{});
    default:
      return body(Storage<DType::bf16>{});
  }
}

// Entries begin .. begin + 8, of which those at `numel` and beyond are 0; `begin` is a multiple of 8.
template <class Acc>
__device__ inline void load_eight(const DeviceValues& from, int64_t begin, int64_t numel, Acc (&values)[vector_entries]) {
  if (!from.aligned || begin + vector_entries > numel) {
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) values[i] = begin + i < numel ? load_entry<Acc>(from, begin + i) : Acc(0);
    return;
  }
  with_storage(from.dtype, [&](auto storage) {
    uint32_t words[storage.words];
    storage.read(from.data, begin, words);
    storage.unpack(words, values);
  });
}

template <class Acc>
__device__ inline void store_eight(const DeviceValues& to, int64_t begin, int64_t numel, const Acc (&values)[vector_entries]) {
  if (!to.aligned || begin + vector_entries > numel) {
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      if (begin + i < numel) store_entry(to, begin + i, values[i]);
    }
    return;
  }
  with_storage(to.dtype, [&](auto storage) {
    uint32_t words[storage.words];
    storage.pack(values, words);
    storage.write(to.data, begin, words);
  });
}

// Writes `values` where `chosen` has a bit and `rest`'s own bits elsewhere; `rest` is of the same dtype, and may be `to` itself.
template <class Acc>
__device__ inline void store_chosen(const DeviceValues& to, const DeviceValues& rest, int64_t begin, int64_t numel, uint32_t chosen,
                                    const Acc (&values)[vector_entries]) {
  const bool whole = to.aligned && rest.aligned && begin + vector_entries <= numel;
  with_storage(to.dtype, [&](auto storage) {
    using Entry = typename decltype(storage)::Entry;
    if (whole) {
      uint32_t words[storage.words], kept[storage.words];
      storage.pack(values, words);
      storage.read(rest.data, begin, kept);
#pragma unroll
      for (int word = 0; word < storage.words; ++word) {
        const uint32_t bits = storage.chosen_bits(chosen, word);
        words[word] = (kept[word] & ~bits) | (words[word] & bits);
      }
      storage.write(to.data, begin, words);
      return;
    }
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      if (begin + i >= numel) continue;
      if (chosen >> i & 1u) {
        store_entry(to, begin + i, values[i]);
      } else {
        static_cast<Entry*>(to.data)[begin + i] = static_cast<const Entry*>(rest.data)[begin + i];
      }
    }
  });
}

}  // namespace taskloom
