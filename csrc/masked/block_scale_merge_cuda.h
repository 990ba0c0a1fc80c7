// The blocks of a block_scale_merge call as its CUDA kernels read them: rows of a table, work cut into pieces of one size through all of
// them, so that many small blocks and few huge ones spread alike.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "common/cuda_assert.h"
#include "common/cuda_fetch.h"
#include "common/cuda_launch.h"
#include "common/cuda_rows.h"
#include "common/cuda_table.h"
#include "masked/block_scale_merge_checks.h"

namespace taskloom {

struct ScaleRow {
  DeviceValues values, out;            // backward: the gradient of the output, and nothing
  const uint8_t* partition = nullptr;  // the group of each entry; null: all are in group 0
  int64_t partition_aligned = 0;       // whether it is a multiple of 8 bytes
  int64_t numel = 0, first_piece = 0;
  int64_t place = 0;  // among the call's blocks
};

// The groups of eight entries, a byte each.
struct EightGroups {
  uint64_t bytes = 0;

  __device__ int of(int entry) const { return static_cast<int>(bytes >> (8 * entry) & 0xff); }
};

// Entries begin .. begin + 8, those at numel and beyond in group 0. Groups from `groups` on become the last one, and raise `largest`.
__device__ inline EightGroups load_groups(const ScaleRow& row, int64_t begin, int64_t groups, int& largest) {
  EightGroups found;
  const uint8_t* const from = row.partition + begin;
  if (row.partition_aligned && begin + vector_entries <= row.numel) {
    found.bytes = *reinterpret_cast<const uint64_t*>(from);
  } else {
    for (int i = 0; i < vector_entries && begin + i < row.numel; ++i) found.bytes |= static_cast<uint64_t>(from[i]) << (8 * i);
  }
  const int last = static_cast<int>(groups) - 1;
  EightGroups kept;
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) {
    const int group = found.of(i);
    largest = max(largest, group);
    kept.bytes |= static_cast<uint64_t>(min(group, last)) << (8 * i);
  }
  return kept;
}

// Notes a group that is none; in a call without one nothing is written.
__device__ inline void note_largest(int largest, int64_t groups, long long* noted) {
  if (largest >= groups) atomicMax(noted, static_cast<long long>(largest));
}

// A call's tensors on the host: contiguous copies where needed, alive until the kernels are queued.
struct ScaleTensors {
  std::vector<Tensor> kept;
  std::vector<ScaleRow> rows;
  std::vector<DeviceValues> deltas;  // of task t and block b: t * blocks + b
  Tensor largest;                    // int64, on the device: the largest group that is none, or 0
  int64_t tasks, groups;
  bool partitioned;

  ScaleTensors(const std::vector<Tensor>& values, const char* name, const std::vector<Tensor>& deltas_given,
               const std::vector<Tensor>& partition, int64_t groups_given)
      : largest(torch::stable::new_empty(values.at(0), {1}, ScalarType::Long)),
        tasks(check_scale_blocks(values, name, deltas_given, partition, groups_given)),
        groups(groups_given),
        partitioned(!partition.empty()) {
    STD_TORCH_CHECK(partitioned || groups == 1, "groups: expected 1 without a partition, got ", groups);
    if (partitioned) clear(largest);
    for (const Tensor& delta : deltas_given) deltas.push_back(keep(delta, "deltas"));
    for (size_t b = 0; b < values.size(); ++b) {
      ScaleRow row;
      row.values = keep(values[b], name);
      row.numel = values[b].numel();
      row.place = static_cast<int64_t>(b);
      if (partitioned) {
        kept.push_back(contiguous_of(partition[b]));
        row.partition = static_cast<const uint8_t*>(kept.back().const_data_ptr());
        row.partition_aligned = (reinterpret_cast<uintptr_t>(row.partition) & 7) == 0;
      }
      rows.push_back(row);
    }
  }

  DeviceValues keep(const Tensor& tensor, const char* name) {
    kept.push_back(contiguous_of(tensor));
    return device_values(kept.back(), name);
  }

  // Whether a block's arithmetic is double for its own sake.
  bool wide(const ScaleRow& row) const {
    bool any = row.values.dtype == DType::f64;
    const auto blocks = static_cast<int64_t>(rows.size());
    for (int64_t task = 0; task < tasks; ++task) {
      any = any || deltas[static_cast<size_t>(task * blocks + row.place)].dtype == DType::f64;
    }
    return any;
  }

  long long* noted() const { return static_cast<long long*>(largest.mutable_data_ptr()); }

  // The kernels have met every entry's group, and have stayed inside the coefficients meanwhile.
  void check_groups() const {
    if (partitioned) assert_between(largest, 0, groups - 1, "partition: expected values below " + std::to_string(groups));
  }
};

// Numbers the rows' pieces of `entries` entries, and returns how many there are.
inline int64_t number_pieces(std::vector<ScaleRow>& rows, int64_t entries) {
  int64_t pieces = 0;
  for (ScaleRow& row : rows) {
    row.first_piece = pieces;
    pieces += (row.numel + entries - 1) / entries;
  }
  return pieces;
}

}  // namespace taskloom
