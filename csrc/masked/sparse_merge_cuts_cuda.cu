// Selection of sparse_merge by magnitudes within rows: packed bits from the rows' cuts. Bytes moved: base and tuned entries and the cuts
// in, a bit an entry out.
#include "masked/sparse_merge_stages.h"

namespace taskloom {
namespace {

// Kept entries of the vector that starts at `begin`, whose first entry is entry `place` of row `row`. `cuts`: [rows][2] of one task.
template <class Acc>
__device__ uint32_t kept_in_rows(const DeviceCut* cuts, int64_t row, int64_t place, int64_t length, int64_t rows, Bits<Acc> most,
                                 const Acc (&delta)[vector_entries]) {
  DeviceCut removed = cuts[2 * row], kept = cuts[2 * row + 1];
  uint32_t inside = 0;
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) {
    const Bits<Acc> bits = magnitude_bits(delta[i], most);
    inside |= (inside_cut(bits, place, kept) && !inside_cut(bits, place, removed) ? 1u : 0u) << i;
    if (++place < length) continue;
    place = 0;
    if (++row == rows) break;
    removed = cuts[2 * row], kept = cuts[2 * row + 1];
  }
  return inside;
}

template <class Acc>
__global__ void __launch_bounds__(cuda_threads, 3) select_row_bands_kernel(DeviceMerge merge, int64_t length, const DeviceCut* cuts) {
  const int64_t groups = vectors(merge.end - merge.begin), rows = (merge.end - merge.begin) / length;
  for (int64_t group = grid_index(); group < groups; group += grid_stride()) {
    const int64_t begin = merge.begin + group * vector_entries;
    const int64_t row = group * vector_entries / length, place = group * vector_entries - row * length;
    Acc base[vector_entries], delta[vector_entries];
    load_base(merge, begin, base);
    for (int t = 0; t < merge.count; ++t) {
      const DeviceTask& task = merge.tasks[t];
      load_delta(merge, task, begin, base, delta);
      const uint32_t kept = kept_in_rows(cuts + 2 * rows * t, row, place, length, rows, most_bits<Acc>(merge, task), delta);
      task.mask[(begin - merge.first) / vector_entries] = static_cast<uint8_t>(kept);
    }
  }
}

}  // namespace

void select_row_bands(const Tensor& where, bool wide, const DeviceMerge& merge, int64_t length, const DeviceCut* cuts) {
  const int64_t groups = vectors(merge.end - merge.begin);
  if (wide) {
    launch_striding(where, groups, select_row_bands_kernel<double>, merge, length, cuts);
  } else {
    launch_striding(where, groups, select_row_bands_kernel<float>, merge, length, cuts);
  }
}

}  // namespace taskloom
