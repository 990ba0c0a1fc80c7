// The parameters of a fused optimiser step on CUDA: one table row each, cut into tiles of 1024 entries that warps take, and what is checked
// of them on the device. Nothing waits for the device.
#pragma once

#include <cuda_runtime.h>

#include <optional>
#include <string>
#include <vector>

#include "common/cuda_assert.h"
#include "common/cuda_fetch.h"
#include "common/cuda_launch.h"
#include "common/cuda_rows.h"
#include "common/cuda_table.h"
#include "masked/mask_ranks_cuda.h"
#include "masked/masked_step_arguments.h"

namespace taskloom {

constexpr int step_numbers = 8;
constexpr int step_states = 2;

// Acc is double for parameters of float64, else float.
template <class Acc>
struct StepRow {
  void* parameter;
  const void* gradient;
  Acc* state[step_states];  // null: the rule has none
  const void* active;
  RankedMask mask;  // of a packed parameter
  int64_t entries;  // of the parameter, or indices
  int64_t first_tile;
  int32_t dtype, kind;
  Acc numbers[step_numbers];

  int64_t tiles() const { return (entries + rank_tile - 1) / rank_tile; }
};

// A list of indices, to be checked.
struct IndexRow {
  const void* indices;
  int64_t count, numel, first_tile, wide;
};

__device__ inline int64_t load_index(const void* indices, bool wide, int64_t place) {
  return wide ? static_cast<const int64_t*>(indices)[place] : static_cast<const int32_t*>(indices)[place];
}

namespace {

// Counts the indices that do not ascend or leave their parameter.
__global__ void __launch_bounds__(cuda_threads)
    check_indices_kernel(const IndexRow* __restrict__ rows, int64_t count, int64_t tiles, unsigned long long* wrong) {
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const IndexRow row = rows[row_of<&IndexRow::first_tile>(rows, count, tile)];
    bool bad = false;
    const int64_t first = (tile - row.first_tile) * rank_tile;
    for (int64_t place = first + threadIdx.x; place < min(first + rank_tile, row.count); place += cuda_threads) {
      const int64_t here = load_index(row.indices, row.wide, place);
      const int64_t before = place == 0 ? -1 : load_index(row.indices, row.wide, place - 1);
      bad = bad || here <= before || here >= row.numel;
    }
    if (bad) atomicAdd(wrong, 1ull);
  }
}

// fine[0]: no index is wrong; fine[1 + s]: every packed parameter has as many elements of state s as its mask sets entries. `sizes` holds
// the parameters' sizes of state 0, then of state 1; -1 where there is nothing to check. One block.
__global__ void __launch_bounds__(cuda_threads) check_sizes_kernel(const int64_t* __restrict__ totals, const int64_t* __restrict__ sizes,
                                                                   int64_t count, const unsigned long long* wrong, uint8_t* fine) {
  for (int state = 0; state < step_states; ++state) {
    bool equal = true;
    for (int64_t row = threadIdx.x; row < count; row += blockDim.x) {
      const int64_t size = sizes[state * count + row];
      equal = equal && (size < 0 || size == totals[row]);
    }
    const int all = __syncthreads_and(equal);
    if (threadIdx.x == 0) fine[1 + state] = all != 0;
  }
  if (threadIdx.x == 0) fine[0] = *wrong == 0;
}

}  // namespace

// Make one, add_state() for each state, then check(); then rows of parameters may be stepped, and put back.
class StepTables : public StepArguments {
 public:
  using StepArguments::put_back;

  StepTables(std::vector<Tensor> params, const std::vector<Tensor>& grads, const std::vector<Tensor>& active)
      : StepArguments(std::move(params), grads, active) {
    for (size_t i = 0; i < this->size(); ++i) known_.push_back(known_count(i));
  }

  const Tensor& where() const { return params_[0]; }
  const MaskRanks& ranks() const { return *ranks_; }

  void add_state(const std::vector<Tensor>& state, const char* name) {
    states_.push_back(note_state(state, name, known_));
    names_.emplace_back(name);
    for (size_t i = 0; i < this->size(); ++i) sizes_.push_back(known_[i] < 0 ? state[i].numel() : -1);
  }

  // Counts the active entries, and has the device refuse states of another size and wrong indices.
  void check() {
    check_apart();
    std::vector<RankedMask> masks;
    std::vector<IndexRow> lists;
    int64_t tiles = 0;
    bool packed = false;
    for (size_t i = 0; i < this->size(); ++i) {
      const ActiveKind kind = views_[i].kind;
      masks.push_back(kind == ActiveKind::packed ? ranked_mask(kept_[2 * i + 1], params_[i].numel()) : RankedMask());
      packed = packed || kind == ActiveKind::packed;
      if (kind != ActiveKind::index32 && kind != ActiveKind::index64) continue;
      lists.push_back({views_[i].active, known_[i], params_[i].numel(), tiles, kind == ActiveKind::index64});
      tiles += (known_[i] + rank_tile - 1) / rank_tile;
    }
    if (!packed) masks.clear();
    ranks_.emplace(rank_masks(where(), masks));
    sizes_.resize(step_states * this->size(), -1);
    if (!(packed && !names_.empty()) && tiles == 0) return;
    Tensor wrong = torch::stable::new_empty(where(), {1}, ScalarType::Long);
    Tensor fine = torch::stable::new_empty(where(), {1 + step_states}, ScalarType::Bool);
    clear(wrong);
    auto* const found = static_cast<unsigned long long*>(wrong.mutable_data_ptr());
    const Tensor list_table = device_table(where(), lists), size_table = device_table(where(), sizes_);
    launch(where(), {dim3(static_cast<unsigned>(striding_blocks(where(), tiles, 1)))}, check_indices_kernel, rows_of<IndexRow>(list_table),
           static_cast<int64_t>(lists.size()), tiles, found);
    launch(where(), {dim3(1)}, check_sizes_kernel, static_cast<const int64_t*>(ranks_->totals.const_data_ptr()),
           rows_of<int64_t>(size_table), static_cast<int64_t>(this->size()), found, static_cast<uint8_t*>(fine.mutable_data_ptr()));
    if (tiles > 0) {
      assert_on_device(torch::stable::narrow(fine, 0, 0, 1),
                       "active: expected ascending indices without repeats, from 0 to below the parameter's size");
    }
    for (size_t state = 0; packed && state < names_.size(); ++state) {
      assert_on_device(torch::stable::narrow(fine, 0, static_cast<int64_t>(1 + state), 1),
                       names_[state] + ": expected one element for each active entry");
    }
  }

  // The parameters whose arithmetic is Acc's; numbers(i, to) writes a parameter's numbers.
  template <class Acc, class Numbers>
  std::vector<StepRow<Acc>> rows(const Numbers& numbers) const {
    std::vector<StepRow<Acc>> rows;
    int64_t tiles = 0;
    for (size_t i = 0; i < this->size(); ++i) {
      const MaskedParameter& view = views_[i];
      if ((view.dtype == DType::f64) != (sizeof(Acc) == 8)) continue;
      StepRow<Acc> row{};
      row.parameter = view.parameter, row.gradient = view.gradient, row.active = view.active;
      for (size_t state = 0; state < states_.size(); ++state) row.state[state] = static_cast<Acc*>(states_[state][i]);
      if (view.kind == ActiveKind::packed) row.mask = ranks_->masks[i];
      row.entries = known_[i] < 0 ? params_[i].numel() : known_[i];
      row.first_tile = tiles;
      row.dtype = static_cast<int32_t>(view.dtype), row.kind = static_cast<int32_t>(view.kind);
      numbers(i, row.numbers);
      tiles += row.tiles();
      rows.push_back(row);
    }
    return rows;
  }

 private:
  std::vector<int64_t> known_, sizes_;
  std::vector<std::vector<void*>> states_;
  std::vector<std::string> names_;
  std::optional<MaskRanks> ranks_;
};

}  // namespace taskloom
