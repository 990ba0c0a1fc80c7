// magnitude_mask: stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "masked/delta_tensors.h"
#include "masked/magnitude_mask.h"

namespace taskloom {
namespace {

MagnitudeBand band_of_ranks(const Delta& delta, int64_t numel, int64_t rank_begin, int64_t rank_end, bool wide,
                            const ParallelFor& parallel) {
  const int64_t ranks[] = {rank_end, rank_begin};
  const std::vector<Threshold> found = magnitude_thresholds(&delta, 1, numel, ranks, 2, wide, default_room, parallel);
  return {found[0].cut, found[1].cut};
}

Tensor magnitude_mask_cpu(const Tensor& tuned, std::optional<Tensor> base, int64_t rank_begin, int64_t rank_end, bool by_row,
                          std::optional<Tensor> threshold, std::optional<Tensor> equal_kept, bool packed) {
  const DeltaTensors tensors(tuned, base);
  const Delta delta = tensors.delta();
  const int64_t numel = tensors.numel;
  const bool wide = is_wide(delta);
  const int64_t length = by_row ? tensors.row_length : numel;
  const bool given = threshold.has_value();
  STD_TORCH_CHECK(given == equal_kept.has_value(), "threshold, equal_kept: expected both or neither");
  STD_TORCH_CHECK(given || (0 <= rank_begin && rank_begin <= rank_end && rank_end <= length),
                  "rank: expected 0 <= rank_begin <= rank_end <= ", length, ", got ", rank_begin, " and ", rank_end);
  Tensor mask = packed ? empty_cpu({(numel + 7) / 8}, ScalarType::Byte) : empty_cpu(tuned.sizes(), ScalarType::Bool);
  auto* to = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const ParallelFor parallel = torch_parallel();
  if (by_row && !given && tensors.rows() > 1) {
    row_magnitude_mask(delta, tensors.rows(), length, wide, rank_begin, rank_end, packed, to, parallel);
    return mask;
  }
  MagnitudeBand band{};
  if (given) {
    const GivenCuts cuts(*threshold, *equal_kept, 1, wide);
    band = {cuts.cut(1, delta, numel, wide, parallel), cuts.cut(0, delta, numel, wide, parallel)};
  } else {
    band = band_of_ranks(delta, numel, rank_begin, rank_end, wide, parallel);
  }
  magnitude_mask(delta, numel, wide, band, packed, to, parallel);
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("magnitude_mask", TORCH_BOX(&magnitude_mask_cpu)); }

}  // namespace taskloom
