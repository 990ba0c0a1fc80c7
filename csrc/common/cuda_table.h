// Tables of plain rows (pointers, sizes, weights of any number of tensors) in device memory. They travel as kernel arguments, so nothing on
// the host has to outlive the call, no copy waits, and a CUDA graph replays them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/checks.h"
#include "common/cuda_launch.h"

namespace taskloom {
namespace {

// Kernel arguments take 4 KiB on every device.
constexpr int64_t table_part_bytes = 3072;

struct TablePart {
  uint64_t words[table_part_bytes / 8];
};

__global__ void __launch_bounds__(cuda_threads) write_table_kernel(TablePart part, int64_t words, uint64_t* table) {
  for (int64_t word = threadIdx.x; word < words; word += blockDim.x) table[word] = part.words[word];
}

}  // namespace

// A byte tensor on the device of `where` that holds `rows` one after the other.
template <class Row>
torch::stable::Tensor device_table(const torch::stable::Tensor& where, const std::vector<Row>& rows) {
  static_assert(std::is_trivially_copyable_v<Row> && sizeof(Row) % 8 == 0);
  const int64_t bytes = static_cast<int64_t>(rows.size() * sizeof(Row));
  torch::stable::Tensor table = torch::stable::new_empty(where, {bytes}, ScalarType::Byte);
  for (int64_t begin = 0; begin < bytes; begin += table_part_bytes) {
    const int64_t size = std::min(table_part_bytes, bytes - begin);
    TablePart part{};
    std::memcpy(part.words, reinterpret_cast<const char*>(rows.data()) + begin, static_cast<size_t>(size));
    launch(where, {dim3(1)}, write_table_kernel, part, size / 8,
           reinterpret_cast<uint64_t*>(static_cast<char*>(table.mutable_data_ptr()) + begin));
  }
  return table;
}

template <class Row>
const Row* rows_of(const torch::stable::Tensor& table) {
  return static_cast<const Row*>(table.const_data_ptr());
}

}  // namespace taskloom
