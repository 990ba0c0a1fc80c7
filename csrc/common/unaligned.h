// Elements at any address: tensors come from mapped files and other programs' buffers, whose addresses need not suit their type. For
// NAME_loops.cpp files, so that every CPU level compiles its own copy: everything here has internal linkage. Torch-free.
#pragma once

#include <cstdint>
#include <cstring>

namespace taskloom {
namespace {

// A plain load or store once compiled; through a pointer to T an odd address would be undefined.
template <class T>
inline T load_at(const void* data, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + index * static_cast<int64_t>(sizeof(T)), sizeof value);
  return value;
}

template <class T>
inline void store_at(void* data, int64_t index, T value) {
  std::memcpy(static_cast<char*>(data) + index * static_cast<int64_t>(sizeof(T)), &value, sizeof value);
}

}  // namespace
}  // namespace taskloom
