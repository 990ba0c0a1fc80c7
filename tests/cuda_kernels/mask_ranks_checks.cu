// What masked/mask_ranks_cuda.h finds, as tensors that tests can look at.
#include <tuple>
#include <vector>

#include "masked/mask_ranks_cuda.h"

namespace taskloom {
namespace {

__global__ void __launch_bounds__(cuda_threads)
    words_kernel(const RankedMask* masks, int64_t count, DeviceRanks ranks, int64_t tiles, int64_t* before, int64_t* bits) {
  for (int64_t tile = grid_index() / warp_size; tile < tiles; tile += grid_stride() / warp_size) {
    const RankedMask mask = masks[row_of<&RankedMask::first_tile>(masks, count, tile)];
    const int64_t own = tile - mask.first_tile;
    const TileBits found = load_tile(mask, own);
    before[tile * warp_size + threadIdx.x % warp_size] = ranks.before(mask, own) + found.before;
    bits[tile * warp_size + threadIdx.x % warp_size] = found.bits;
  }
}

// For each word of 32 entries of all masks' tiles: how many entries of its mask are set before it, its bits; and each mask's total.
std::tuple<Tensor, Tensor, Tensor> mask_ranks(std::vector<Tensor> packed, std::vector<int64_t> numel) {
  std::vector<RankedMask> masks;
  for (size_t i = 0; i < packed.size(); ++i) masks.push_back(ranked_mask(packed[i], numel[i]));
  const MaskRanks ranks = rank_masks(packed[0], masks);
  Tensor before = torch::stable::new_empty(packed[0], {ranks.tiles * warp_size}, ScalarType::Long);
  Tensor bits = torch::stable::new_empty(packed[0], {ranks.tiles * warp_size}, ScalarType::Long);
  const Tensor table = device_table(packed[0], ranks.masks);
  launch_striding(packed[0], ranks.tiles * warp_size, words_kernel, rows_of<RankedMask>(table), static_cast<int64_t>(masks.size()),
                  ranks.device(), ranks.tiles, static_cast<int64_t*>(before.mutable_data_ptr()),
                  static_cast<int64_t*>(bits.mutable_data_ptr()));
  return {before, bits, ranks.totals};
}

// How many entries of a mask are set before each of its chunks, and in all.
std::tuple<Tensor, Tensor> chunk_ranks(const Tensor& packed, int64_t numel) {
  const MaskRanks ranks = rank_masks(packed, {ranked_mask(packed, numel)});
  return {ranks.before_chunk, ranks.totals};
}

}  // namespace

STABLE_TORCH_LIBRARY(taskloom_mask_ranks_checks, m) {
  m.def("mask_ranks(Tensor[] packed, SymInt[] numel) -> (Tensor, Tensor, Tensor)");
  m.def("chunk_ranks(Tensor packed, SymInt numel) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(taskloom_mask_ranks_checks, CPU, m) {
  m.impl("mask_ranks", TORCH_BOX(&mask_ranks));
  m.impl("chunk_ranks", TORCH_BOX(&chunk_ranks));
}

}  // namespace taskloom
