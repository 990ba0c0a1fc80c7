// magnitude_mask: CUDA kernel. Once the cuts are found (magnitude_ranks_cuda.cu, magnitude_rows_cuda.cu), bytes moved: tuned and base in,
// n / 8 bytes out packed and n otherwise; each thread handles the 8 entries of one packed byte.
#include <optional>

#include "common/cuda_launch.h"
#include "common/cuda_mask.h"
#include "masked/device_delta_cuda.h"

namespace taskloom {
namespace {

struct MaskOutput {
  uint8_t* data;
  int32_t packed, aligned;  // whether data is a multiple of 8 bytes
};

// The entries between a first and an end rank.
struct DeviceBand {
  DeviceCut inner, outer;
};

__device__ inline void store_mask(const MaskOutput& to, int64_t group, int64_t numel, uint32_t chosen) {
  const int64_t begin = group * vector_entries;
  if (to.packed) {
    to.data[group] = static_cast<uint8_t>(chosen);
  } else if (to.aligned && begin + vector_entries <= numel) {
    *reinterpret_cast<uint64_t*>(to.data + begin) = scatter_bits(chosen);
  } else {
    for (int i = 0; i < vector_entries && begin + i < numel; ++i) to.data[begin + i] = static_cast<uint8_t>(chosen >> i & 1u);
  }
}

template <class Bits>
__device__ inline uint32_t entries_between(const Bits (&bits)[vector_entries], int64_t index, const DeviceBand& band) {
  return entries_inside(bits, index, band.outer) & ~entries_inside(bits, index, band.inner);
}

// One band for all entries, or one for each row of `row_length`.
template <bool wide>
__global__ void __launch_bounds__(cuda_threads)
    magnitude_mask_kernel(DeviceDelta delta, int64_t numel, const DeviceBand* bands, int64_t row_length, MaskOutput out) {
  const int64_t groups = (numel + vector_entries - 1) / vector_entries;
  for (int64_t group = grid_index(); group < groups; group += grid_stride()) {
    const int64_t begin = group * vector_entries;
    MagnitudeBits<wide> bits[vector_entries];
    load_magnitudes<wide>(delta, begin, numel, bits);
    int64_t row = row_length == numel ? 0 : begin / row_length;
    int64_t index = begin - row * row_length;
    uint32_t chosen = 0;
    if (index + vector_entries <= row_length || row_length == numel) {
      chosen = entries_between(bits, index, bands[row]);
    } else {
#pragma unroll
      for (int i = 0; i < vector_entries; ++i) {
        if (index == row_length) {
          ++row;
          index = 0;
        }
        if (begin + i < numel && inside_cut(bits[i], index, bands[row].outer) && !inside_cut(bits[i], index, bands[row].inner)) {
          chosen |= 1u << i;
        }
        ++index;
      }
    }
    store_mask(out, group, numel, chosen);
  }
}

Tensor find_bands(const DeltaTensors& tensors, int64_t rank_begin, int64_t rank_end, bool rows, const std::optional<Tensor>& threshold,
                  const std::optional<Tensor>& equal_kept, bool wide) {
  const std::vector<DeviceDelta> deltas{device_delta(tensors)};
  if (threshold.has_value()) {
    const Tensor bits = torch::stable::contiguous(*threshold), kept = torch::stable::contiguous(*equal_kept);
    const DType dtype = dtype_of(bits, "threshold");
    STD_TORCH_CHECK(dtype == DType::f32 || (wide && dtype == DType::f64),
                    "threshold: expected float32 (or float64 where a tensor is float64)");
    check_dtype(kept, ScalarType::Long, "equal_kept", "int64");
    STD_TORCH_CHECK(bits.numel() == 2 && kept.numel() == 2, "threshold, equal_kept: expected 2 entries");
    return cuts_of_thresholds(tensors.tuned, deltas, tensors.numel, bits, kept, 2, wide);
  }
  if (rows) return find_row_cuts(tensors.tuned, deltas, tensors.rows(), tensors.row_length, {rank_begin, rank_end}, 2, wide);
  return find_cuts(tensors.tuned, deltas, tensors.numel, {rank_begin, rank_end}, 2, wide);
}

Tensor magnitude_mask_cuda(const Tensor& tuned, std::optional<Tensor> base, int64_t rank_begin, int64_t rank_end, bool by_row,
                           std::optional<Tensor> threshold, std::optional<Tensor> equal_kept, bool packed) {
  const DeltaTensors tensors(tuned, base);
  const int64_t numel = tensors.numel;
  const bool wide = is_wide(tensors.delta());
  const int64_t length = by_row ? tensors.row_length : numel;
  const bool given = threshold.has_value();
  STD_TORCH_CHECK(given == equal_kept.has_value(), "threshold, equal_kept: expected both or neither");
  STD_TORCH_CHECK(given || (0 <= rank_begin && rank_begin <= rank_end && rank_end <= length),
                  "rank: expected 0 <= rank_begin <= rank_end <= ", length, ", got ", rank_begin, " and ", rank_end);
  Tensor mask = packed ? torch::stable::new_empty(tensors.tuned, {(numel + 7) / 8}, ScalarType::Byte)
                       : torch::stable::new_empty(tensors.tuned, tuned.sizes(), ScalarType::Bool);
  if (numel == 0) return mask;
  const bool rows = by_row && !given && tensors.rows() > 1;
  const Tensor bands = find_bands(tensors, rank_begin, rank_end, rows, threshold, equal_kept, wide);
  auto* const to = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const MaskOutput out{to, packed, (reinterpret_cast<uintptr_t>(to) & 7) == 0};
  launch_striding(tensors.tuned, (numel + 7) / 8, wide ? magnitude_mask_kernel<true> : magnitude_mask_kernel<false>, device_delta(tensors),
                  numel, static_cast<const DeviceBand*>(bands.const_data_ptr()), rows ? length : numel, out);
  return mask;
}

}  // namespace

TASKLOOM_CUDA_OPS(m) { m.impl("magnitude_mask", TORCH_BOX(&magnitude_mask_cuda)); }

}  // namespace taskloom
