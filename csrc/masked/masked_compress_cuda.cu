// masked_compress, masked_restore: CUDA kernels. Bytes moved by compress: the mask twice, the set entries in and out; by restore: the mask
// twice, the set entries from `compressed` and the others from base, all out. A warp takes a tile of 1024 entries, 32 neighbours at a time,
// so what it reads and writes lies together; entries that are not needed are not read. Compress waits once for the number of set entries,
// which is its length; restore has the device compare it.
#include "common/checks.h"
#include "common/cuda_assert.h"
#include "common/cuda_host_copy.h"
#include "common/cuda_launch.h"
#include "masked/mask_ranks_cuda.h"

namespace taskloom {
namespace {

constexpr int rounds_ahead = 8;  // loads under way per thread

// Of eight rounds of a tile, in each of which a lane has one entry: whether it is set (a bit a round), and how many of the tile's entries
// are set before it.
struct Rounds {
  uint32_t chosen = 0;
  uint32_t before[rounds_ahead];
};

// Rounds `first` and on; `bits` are the lane's own word of the tile, `passed` the set entries of the rounds before, and of these then too.
__device__ Rounds rounds_from(uint32_t bits, int first, uint32_t& passed) {
  Rounds rounds;
#pragma unroll
  for (int i = 0; i < rounds_ahead; ++i) {
    const uint32_t word = __shfl_sync(whole_warp, bits, first + i);
    rounds.chosen |= (word >> (threadIdx.x % warp_size) & 1u) << i;
    rounds.before[i] = passed + static_cast<uint32_t>(__popc(word & lanes_before()));
    passed += static_cast<uint32_t>(__popc(word));
  }
  return rounds;
}

template <class Lane>
__global__ void __launch_bounds__(cuda_threads)
    masked_compress_kernel(const Lane* __restrict__ values, RankedMask mask, DeviceRanks ranks, int64_t tiles, Lane* __restrict__ out) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  for (int64_t tile = grid_index() / warp_size; tile < tiles; tile += grid_stride() / warp_size) {
    const uint32_t bits = mask_word(mask, tile * warp_size + lane);
    if (__any_sync(whole_warp, bits != 0) == 0) continue;
    const Lane* const from = values + tile * rank_tile + lane;
    Lane* const to = out + ranks.before(mask, tile);
    uint32_t passed = 0;
    for (int first = 0; first < warp_size; first += rounds_ahead) {
      const Rounds rounds = rounds_from(bits, first, passed);
      Lane taken[rounds_ahead];
#pragma unroll
      for (int i = 0; i < rounds_ahead; ++i) {
        if (rounds.chosen >> i & 1u) taken[i] = from[(first + i) * warp_size];
      }
#pragma unroll
      for (int i = 0; i < rounds_ahead; ++i) {
        if (rounds.chosen >> i & 1u) to[rounds.before[i]] = taken[i];
      }
    }
  }
}

template <class Lane>
__global__ void __launch_bounds__(cuda_threads)
    masked_restore_kernel(const Lane* __restrict__ compressed, RankedMask mask, DeviceRanks ranks, const Lane* __restrict__ base,
                          int64_t tiles, Lane* __restrict__ out) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  for (int64_t tile = grid_index() / warp_size; tile < tiles; tile += grid_stride() / warp_size) {
    const uint32_t bits = mask_word(mask, tile * warp_size + lane);
    const Lane* const stored = compressed + ranks.before(mask, tile);
    const Lane* const under = base + tile * rank_tile + lane;
    Lane* const to = out + tile * rank_tile + lane;
    const int size = static_cast<int>(min(mask.numel - tile * rank_tile, rank_tile)) - lane;
    uint32_t passed = 0;
    for (int first = 0; first < warp_size; first += rounds_ahead) {
      const Rounds rounds = rounds_from(bits, first, passed);
      Lane taken[rounds_ahead];
#pragma unroll
      for (int i = 0; i < rounds_ahead; ++i) {
        const int at = (first + i) * warp_size;
        const Lane* const from = rounds.chosen >> i & 1u ? stored + rounds.before[i] : under + at;
        if (at < size) taken[i] = *from;
      }
#pragma unroll
      for (int i = 0; i < rounds_ahead; ++i) {
        const int at = (first + i) * warp_size;
        if (at < size) to[at] = taken[i];
      }
    }
  }
}

int64_t element_bytes(const Tensor& tensor, const char* name) {
  const auto size = static_cast<int64_t>(tensor.element_size());
  STD_TORCH_CHECK(size == 1 || size == 2 || size == 4 || size == 8, name, ": expected elements of 1, 2, 4 or 8 bytes, got ", size);
  return size;
}

// Calls body(Lane{}) with an unsigned integer of `size` bytes.
template <class Body>
void with_lane(int64_t size, const Body& body) {
  switch (size) {
    case 1:
      return body(uint8_t{});
    case 2:
      return body(uint16_t{});
    case 4:
      return body(uint32_t{});
    default:
      return body(uint64_t{});
  }
}

Tensor masked_compress_cuda(const Tensor& values, const Tensor& packed) {
  const int64_t numel = values.numel(), size = element_bytes(values, "values");
  check_packed(packed, numel, "packed");
  const Tensor flat = contiguous_of(values), bits = contiguous_of(packed);
  const MaskRanks ranks = rank_masks(flat, {ranked_mask(bits, numel)});
  Tensor out = torch::stable::new_empty(flat, {host_value(ranks.totals)}, values.scalar_type());
  with_lane(size, [&](auto lane) {
    using Lane = decltype(lane);
    launch_striding(flat, ranks.tiles * warp_size, masked_compress_kernel<Lane>, static_cast<const Lane*>(flat.const_data_ptr()),
                    ranks.masks[0], ranks.device(), ranks.tiles, static_cast<Lane*>(out.mutable_data_ptr()));
  });
  return out;
}

Tensor masked_restore_cuda(const Tensor& compressed, const Tensor& packed, const Tensor& base) {
  const int64_t numel = base.numel(), size = element_bytes(base, "base");
  STD_TORCH_CHECK(compressed.scalar_type() == base.scalar_type(), "compressed: expected the dtype of base");
  check_packed(packed, numel, "packed");
  const Tensor flat = contiguous_of(base), bits = contiguous_of(packed);
  const Tensor stored = contiguous_of(compressed);
  const MaskRanks ranks = rank_masks(flat, {ranked_mask(bits, numel)});
  assert_between(ranks.totals, stored.numel(), stored.numel(), "compressed: expected one element for each set entry");
  Tensor out = torch::stable::new_empty(flat, base.sizes(), base.scalar_type());
  with_lane(size, [&](auto lane) {
    using Lane = decltype(lane);
    launch_striding(flat, ranks.tiles * warp_size, masked_restore_kernel<Lane>, static_cast<const Lane*>(stored.const_data_ptr()),
                    ranks.masks[0], ranks.device(), static_cast<const Lane*>(flat.const_data_ptr()), ranks.tiles,
                    static_cast<Lane*>(out.mutable_data_ptr()));
  });
  return out;
}

}  // namespace

TASKLOOM_CUDA_OPS(m) {
  m.impl("masked_compress", TORCH_BOX(&masked_compress_cuda));
  m.impl("masked_restore", TORCH_BOX(&masked_restore_cuda));
}

}  // namespace taskloom
