// masked_switch_: CUDA kernel. Bytes moved: both masks in; base, delta and target in and target out for groups of eight entries of which
// one changes, nothing for the others.
#include "common/cuda_fetch.h"
#include "common/cuda_launch.h"
#include "common/cuda_mask.h"
#include "masked/mask_checks.h"

namespace taskloom {
namespace {

// Of eight entries of a target: `moved` where `on` has a bit, base where `off` has one (its own bits, where the dtypes agree).
template <class Acc>
__device__ void store_switched(const DeviceValues& target, const DeviceValues& base, const Fetched<Acc>& base_bits, int64_t begin,
                               int64_t numel, uint32_t on, uint32_t off, const Acc (&origin)[vector_entries],
                               const Acc (&moved)[vector_entries]) {
  const bool copies = base.dtype == target.dtype, whole = target.aligned && begin + vector_entries <= numel;
  with_storage_of<Acc>(target.dtype, [&](auto storage) {
    using Entry = typename decltype(storage)::Entry;
    uint32_t words[storage.words], restored[storage.words], kept[storage.words];
    storage.pack(moved, words);
    storage.pack(origin, restored);
    if (copies) {
#pragma unroll
      for (int word = 0; word < storage.words; ++word) restored[word] = base_bits.words[word];
    }
    if (whole) {
      storage.read(target.data, begin, kept);
#pragma unroll
      for (int word = 0; word < storage.words; ++word) {
        const uint32_t changed = storage.chosen_bits(on, word), back = storage.chosen_bits(off, word);
        words[word] = (words[word] & changed) | (restored[word] & back) | (kept[word] & ~(changed | back));
      }
      storage.write(target.data, begin, words);
      return;
    }
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) {
      if (((on | off) >> i & 1u) == 0) continue;
      Entry* const to = static_cast<Entry*>(target.data) + begin + i;
      const bool anew = on >> i & 1u;
      if constexpr (sizeof(Entry) == 8) {
        const uint32_t low = anew ? words[2 * i] : restored[2 * i], high = anew ? words[2 * i + 1] : restored[2 * i + 1];
        *to = static_cast<uint64_t>(high) << 32 | low;
      } else if constexpr (sizeof(Entry) == 4) {
        *to = anew ? words[i] : restored[i];
      } else {
        *to = static_cast<uint16_t>((anew ? words[i / 2] : restored[i / 2]) >> (16 * (i % 2)));
      }
    }
  });
}

template <class Acc>
__global__ void __launch_bounds__(cuda_threads) masked_switch_kernel(DeviceValues target, DeviceValues base, DeviceValues delta,
                                                                     DeviceMask old_mask, DeviceMask new_mask, int64_t numel) {
  const int64_t groups = (numel + vector_entries - 1) / vector_entries;
  for (int64_t group = grid_index(); group < groups; group += grid_stride()) {
    const uint32_t wanted = load_mask(new_mask, group, numel), changed = load_mask(old_mask, group, numel) ^ wanted;
    if (changed == 0) continue;
    const int64_t begin = group * vector_entries;
    Fetched<Acc> base_bits, delta_bits;
    fetch_eight(base, begin, numel, base_bits);
    fetch_eight(delta, begin, numel, delta_bits);
    Acc origin[vector_entries], moved[vector_entries];
    convert_eight(base, base_bits, origin);
    convert_eight(delta, delta_bits, moved);
#pragma unroll
    for (int i = 0; i < vector_entries; ++i) moved[i] = origin[i] + moved[i];
    store_switched(target, base, base_bits, begin, numel, changed & wanted, changed & ~wanted, origin, moved);
  }
}

void masked_switch_cuda(Tensor target, const Tensor& base, const Tensor& delta, const Tensor& old_packed, const Tensor& new_packed) {
  const int64_t numel = target.numel(), groups = (numel + vector_entries - 1) / vector_entries;
  check_masked_switch(target, base, delta, old_packed, new_packed);
  const Tensor flat = contiguous_of(target), flat_base = contiguous_of(base);
  const Tensor flat_delta = contiguous_of(delta);
  const Tensor old_mask = contiguous_of(old_packed), new_mask = contiguous_of(new_packed);
  const DeviceValues to = device_values(flat, "target"), origin = device_values(flat_base, "base");
  const DeviceValues step = device_values(flat_delta, "delta");
  const bool wide = to.dtype == DType::f64 || origin.dtype == DType::f64 || step.dtype == DType::f64;
  launch_striding(flat, groups, wide ? masked_switch_kernel<double> : masked_switch_kernel<float>, to, origin, step, device_mask(old_mask),
                  device_mask(new_mask), numel);
  if (!target.is_contiguous()) torch::stable::copy_(target, flat);
}

}  // namespace

TASKLOOM_CUDA_OPS(m) { m.impl("masked_switch_", TORCH_BOX(&masked_switch_cuda)); }

}  // namespace taskloom
