// magnitude_threshold, magnitude_histogram: CUDA kernels. The search is in magnitude_ranks_cuda.cu and magnitude_rows_cuda.cu; a histogram
// reads tuned and base once, counts in shared memory and adds each block's counts to the 512 KiB of the result, which stay in the L2 cache.
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda_launch.h"
#include "masked/delta_tensors.h"
#include "masked/device_delta_cuda.h"
#include "masked/magnitude_query_cuda.h"

namespace taskloom {
namespace {

// Digits that a block counts in shared memory: those of every magnitude that weights have.
constexpr int window_bins = 8192;

// Where the window begins: of the highest digit it holds 2^-61 .. 2^3 (2^-505 .. 2^7 in float64), of others the lowest part.
int window_of(int shift, bool wide) {
  if (shift == (wide ? 48 : 16)) return wide ? 0x4060 - window_bins : 0x4100 - window_bins;
  return 1;
}

// Lanes with one digit add together, as few distinct ones would queue at one address; -1 counts nowhere. Called by whole warps.
__device__ inline void add_digits(int digit, unsigned long long* counts) {
  const unsigned alike = __match_any_sync(whole_warp, digit);
  const int lane = threadIdx.x % warp_size;
  if (digit >= 0 && __ffs(static_cast<int>(alike)) - 1 == lane) atomicAdd(&counts[digit], static_cast<unsigned long long>(__popc(alike)));
}

template <bool wide>
__global__ void __launch_bounds__(cuda_threads)
    magnitude_histogram_kernel(DeviceDelta delta, int64_t numel, int shift, int64_t prefix, int window, unsigned long long* counts) {
  TASKLOOM_SHARED(uint32_t, inside, window_bins);
  for (int bin = threadIdx.x; bin < window_bins; bin += cuda_threads) inside[bin] = 0;
  __syncthreads();
  const int64_t groups = (numel + vector_entries - 1) / vector_entries;
  const bool top = shift + 16 >= (wide ? 64 : 32);
  const int lane = threadIdx.x % warp_size;
  unsigned long long zeros = 0;
  // Whole warps to the end, for what their lanes do together.
  for (int64_t first = grid_index() - lane; first < groups; first += grid_stride()) {
    MagnitudeBits<wide> bits[vector_entries];
    load_magnitudes<wide>(delta, (first + lane) * vector_entries, numel, bits);
    int others[vector_entries];
    bool any = false;
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      const bool counted = bits[i] != no_magnitude && (top || static_cast<int64_t>(bits[i]) >> (shift + 16) == prefix);
      const int digit = counted ? static_cast<int>(bits[i] >> shift) & 0xffff : -1;
      const auto place = static_cast<uint32_t>(digit - window);
      others[i] = digit > 0 && place >= window_bins ? digit : -1;
      any = any || others[i] >= 0;
      if (digit == 0) ++zeros;
      if (digit > 0 && place < window_bins) atomicAdd(&inside[place], 1u);
    }
    if (!__any_sync(whole_warp, any)) continue;
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) add_digits(others[i], counts);
  }
  if (zeros != 0) atomicAdd(&counts[0], zeros);
  __syncthreads();
  for (int bin = threadIdx.x; bin < window_bins; bin += cuda_threads) {
    if (inside[bin] != 0) atomicAdd(&counts[window + bin], static_cast<unsigned long long>(inside[bin]));
  }
}

std::tuple<Tensor, Tensor> magnitude_threshold_cuda(std::vector<Tensor> tuned, std::vector<Tensor> base, std::vector<int64_t> ranks,
                                                    bool by_row) {
  STD_TORCH_CHECK(!tuned.empty(), "tuned: expected at least one tensor");
  STD_TORCH_CHECK(base.empty() || base.size() == tuned.size(), "base: expected ", tuned.size(), " tensors, got ", base.size());
  STD_TORCH_CHECK(!by_row || tuned.size() == 1, "tuned: rows are of one tensor, got ", tuned.size());
  std::vector<DeltaTensors> tensors;
  RankQuery query{{}, 0, ranks};
  bool wide = false;
  for (size_t i = 0; i < tuned.size(); ++i) {
    tensors.emplace_back(tuned[i], base.empty() ? std::nullopt : std::make_optional(base[i]));
    query.segments.push_back({device_delta(tensors.back()), tensors.back().numel});
    wide = wide || is_wide(tensors.back().delta());
    query.numel += tensors.back().numel;
  }
  const Tensor& where = tensors.front().tuned;
  const int64_t length = by_row ? tensors.front().row_length : query.numel;
  for (const int64_t rank : ranks) {
    STD_TORCH_CHECK(rank >= 0 && rank <= length, "rank: expected 0 <= rank <= ", length, ", got ", rank);
  }
  const auto cuts = static_cast<int64_t>(ranks.size());
  const int64_t rows = by_row ? tensors.front().rows() : 1;
  const std::vector<int64_t> shape = by_row ? std::vector<int64_t>{rows, cuts} : std::vector<int64_t>{cuts};
  Tensor thresholds = torch::stable::new_empty(where, shape, wide ? ScalarType::Double : ScalarType::Float);
  Tensor kept = torch::stable::new_empty(where, shape, ScalarType::Long);
  SearchOutputs outputs;
  outputs.thresholds = thresholds.mutable_data_ptr();
  outputs.kept = static_cast<int64_t*>(kept.mutable_data_ptr());
  if (by_row && rows != 1) {
    find_row_ranks(where, {query.segments.front().delta}, rows, length, ranks, static_cast<int>(cuts), wide, outputs);
  } else {
    find_ranks(where, {query}, wide, outputs);
  }
  return {thresholds, kept};
}

Tensor magnitude_histogram_cuda(const Tensor& tuned, std::optional<Tensor> base, int64_t shift, int64_t prefix, bool wide) {
  const DeltaTensors tensors(tuned, base);
  STD_TORCH_CHECK(wide || !is_wide(tensors.delta()), "wide: float64 tensors are compared in float64");
  STD_TORCH_CHECK(shift == 0 || shift == 16 || (wide && (shift == 32 || shift == 48)),
                  "shift: expected 0 or 16 (or 32 or 48 where wide), got ", shift);
  Tensor counts = torch::stable::new_empty(tensors.tuned, {histogram_bins}, ScalarType::Long);
  clear(counts);
  auto* const to = reinterpret_cast<unsigned long long*>(counts.mutable_data_ptr());
  const int64_t groups = (tensors.numel + vector_entries - 1) / vector_entries;
  launch_striding(tensors.tuned, groups, wide ? magnitude_histogram_kernel<true> : magnitude_histogram_kernel<false>, device_delta(tensors),
                  tensors.numel, static_cast<int>(shift), prefix, window_of(static_cast<int>(shift), wide), to);
  return counts;
}

}  // namespace

TASKLOOM_CUDA_OPS(m) {
  m.impl("magnitude_threshold", TORCH_BOX(&magnitude_threshold_cuda));
  m.impl("magnitude_histogram", TORCH_BOX(&magnitude_histogram_cuda));
}

}  // namespace taskloom
