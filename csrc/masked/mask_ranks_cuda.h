// How many entries a packed mask sets before each of its tiles, for one mask or for many in the same launches: what kernels need that read
// or write the set entries next to each other. A warp takes a tile; within it a lane holds 32 entries' bits. Bytes moved: the masks' own,
// and about a thirtieth of these in counts. Nothing waits for the device: one kernel counts, another sums the chunks' counts.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "common/checks.h"
#include "common/cuda_launch.h"
#include "common/cuda_rows.h"
#include "common/cuda_table.h"

namespace taskloom {

constexpr int64_t rank_tile = 1024;  // entries
constexpr int64_t rank_chunk_tiles = 64;
constexpr int rank_warps = cuda_threads / warp_size;
constexpr int rank_warp_tiles = rank_chunk_tiles / rank_warps;

// A packed mask of numel entries on the device, and where its tiles and chunks of tiles begin among those of all masks.
struct RankedMask {
  const uint8_t* data = nullptr;
  int64_t numel = 0;
  int64_t first_tile = 0, first_chunk = 0;
  int64_t aligned = 0;  // whether data is a multiple of 4 bytes

  __host__ __device__ int64_t tiles() const { return (numel + rank_tile - 1) / rank_tile; }
  __host__ __device__ int64_t chunks() const { return (tiles() + rank_chunk_tiles - 1) / rank_chunk_tiles; }
};

// The counts as kernels read them.
struct DeviceRanks {
  const uint32_t* in_chunk = nullptr;     // set entries of a chunk before each of its tiles
  const int64_t* before_chunk = nullptr;  // set entries of a mask before each of its chunks

  // Set entries of `mask` before its tile `tile`, which counts from 0 in each mask.
  __device__ int64_t before(const RankedMask& mask, int64_t tile) const {
    const int64_t chunk = mask.first_chunk + tile / rank_chunk_tiles;
    return before_chunk[chunk] + in_chunk[mask.first_chunk * rank_chunk_tiles + tile];
  }
};

// The bits of entries 32 * word .. 32 * word + 32; those at numel and beyond are 0.
__device__ inline uint32_t mask_word(const RankedMask& mask, int64_t word) {
  const int64_t left = mask.numel - 32 * word;
  if (left <= 0) return 0;
  const uint32_t inside = left >= 32 ? 0xffffffffu : (1u << left) - 1u;
  if (mask.aligned && left >= 32) return reinterpret_cast<const uint32_t*>(mask.data)[word];
  uint32_t bits = 0;
  for (int byte = 0; byte < 4 && 8 * byte < left; ++byte) bits |= static_cast<uint32_t>(mask.data[4 * word + byte]) << (8 * byte);
  return bits & inside;
}

// The sum of the values of the lanes before this one. Of whole warps.
__device__ inline uint32_t warp_sum_before(uint32_t value) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  uint32_t sum = value;
#pragma unroll
  for (int step = 1; step < warp_size; step *= 2) {
    const uint32_t other = __shfl_up_sync(whole_warp, sum, step);
    if (lane >= step) sum += other;
  }
  return sum - value;
}

// What lane l of a warp knows of a tile: the bits of entries 32 * l .. 32 * l + 32 of it, and how many of the tile are set before these.
struct TileBits {
  uint32_t bits, before;
};

// Of whole warps, each with one tile.
__device__ inline TileBits load_tile(const RankedMask& mask, int64_t tile) {
  const uint32_t bits = mask_word(mask, tile * warp_size + threadIdx.x % warp_size);
  return {bits, warp_sum_before(static_cast<uint32_t>(__popc(bits)))};
}

// The bits of the lanes before this one.
__device__ inline uint32_t lanes_before() { return (1u << (threadIdx.x % warp_size)) - 1u; }

namespace {

// A block takes a chunk of tiles at a time: in_chunk of each of its tiles, and how many entries the chunk sets.
__global__ void __launch_bounds__(cuda_threads)
    count_tiles_kernel(RankedMask only, const RankedMask* masks, int64_t count, int64_t chunks, uint32_t* in_chunk, int64_t* chunk_counts) {
  TASKLOOM_SHARED(uint32_t, warp_counts, rank_warps);
  const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const RankedMask mask = masks == nullptr ? only : masks[row_of<&RankedMask::first_chunk>(masks, count, chunk)];
    const int64_t tile = (chunk - mask.first_chunk) * rank_chunk_tiles + warp * rank_warp_tiles;
    uint32_t words[rank_warp_tiles];
#pragma unroll
    for (int i = 0; i < rank_warp_tiles; ++i) words[i] = mask_word(mask, (tile + i) * warp_size + lane);
    uint32_t total = 0, before = 0;
#pragma unroll
    for (int i = 0; i < rank_warp_tiles; ++i) {
      if (lane == i) before = total;
      total += __reduce_add_sync(whole_warp, static_cast<unsigned>(__popc(words[i])));
    }
    if (lane == 0) warp_counts[warp] = total;
    __syncthreads();
    uint32_t earlier = 0, all = 0;
#pragma unroll
    for (int other = 0; other < rank_warps; ++other) {
      if (other == warp) earlier = all;
      all += warp_counts[other];
    }
    if (lane < rank_warp_tiles) in_chunk[chunk * rank_chunk_tiles + warp * rank_warp_tiles + lane] = earlier + before;
    if (threadIdx.x == 0) chunk_counts[chunk] = all;
    __syncthreads();
  }
}

// A block takes a mask at a time: its chunks' counts become how many entries are set before each, and its total.
__global__ void __launch_bounds__(cuda_threads)
    sum_chunks_kernel(RankedMask only, const RankedMask* masks, int64_t count, int64_t* chunk_counts, int64_t* totals) {
  constexpr int per_thread = 4;
  TASKLOOM_SHARED(int64_t, warp_sums, rank_warps);
  const int warp = static_cast<int>(threadIdx.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size;
  for (int64_t row = blockIdx.x; row < count; row += gridDim.x) {
    const RankedMask mask = masks == nullptr ? only : masks[row];
    const int64_t chunks = mask.chunks();
    int64_t* const counts = chunk_counts + mask.first_chunk;
    int64_t total = 0;
    for (int64_t begin = 0; begin < chunks; begin += per_thread * cuda_threads) {
      const int64_t first = begin + per_thread * threadIdx.x;
      int64_t own[per_thread], sum = 0;
#pragma unroll
      for (int i = 0; i < per_thread; ++i) own[i] = first + i < chunks ? counts[first + i] : 0;
#pragma unroll
      for (int i = 0; i < per_thread; ++i) sum += own[i];
      int64_t through = sum;
#pragma unroll
      for (int step = 1; step < warp_size; step *= 2) {
        const int64_t other = __shfl_up_sync(whole_warp, through, step);
        if (lane >= step) through += other;
      }
      if (lane == warp_size - 1) warp_sums[warp] = through;
      __syncthreads();
      int64_t before = total + through - sum;
#pragma unroll
      for (int other = 0; other < rank_warps; ++other) {
        if (other < warp) before += warp_sums[other];
        total += warp_sums[other];
      }
#pragma unroll
      for (int i = 0; i < per_thread; ++i) {
        if (first + i < chunks) counts[first + i] = before;
        before += own[i];
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) totals[row] = total;
  }
}

}  // namespace

// Masks with the counts that kernels on the same stream may use.
struct MaskRanks {
  torch::stable::Tensor in_chunk, before_chunk;
  torch::stable::Tensor totals;  // int64, on the device: how many entries each mask sets
  std::vector<RankedMask> masks;
  int64_t tiles = 0;

  DeviceRanks device() const {
    return {static_cast<const uint32_t*>(in_chunk.const_data_ptr()), static_cast<const int64_t*>(before_chunk.const_data_ptr())};
  }
};

// A contiguous packed mask of `numel` entries, which must outlive what is done with it.
inline RankedMask ranked_mask(const torch::stable::Tensor& contiguous, int64_t numel) {
  const auto* const data = static_cast<const uint8_t*>(contiguous.const_data_ptr());
  return {data, numel, 0, 0, (reinterpret_cast<uintptr_t>(data) & 3) == 0};
}

// Numbers the masks' tiles and counts their set entries, on the device of `where`. A mask of no entries has no tiles.
inline MaskRanks rank_masks(const torch::stable::Tensor& where, std::vector<RankedMask> masks) {
  const auto count = static_cast<int64_t>(masks.size());
  int64_t tiles = 0, chunks = 0;
  for (RankedMask& mask : masks) {
    mask.first_tile = tiles;
    mask.first_chunk = chunks;
    tiles += mask.tiles();
    chunks += mask.chunks();
  }
  MaskRanks ranks{torch::stable::new_empty(where, {chunks * rank_chunk_tiles}, ScalarType::Int),
                  torch::stable::new_empty(where, {chunks}, ScalarType::Long), torch::stable::new_empty(where, {count}, ScalarType::Long),
                  std::move(masks), tiles};
  if (count == 0) return ranks;
  // The table may go when the kernels are queued: its memory is used again on the same stream alone.
  const torch::stable::Tensor table = device_table(where, count == 1 ? std::vector<RankedMask>() : ranks.masks);
  const RankedMask* const rows = count == 1 ? nullptr : rows_of<RankedMask>(table);
  auto* const counts = static_cast<int64_t*>(ranks.before_chunk.mutable_data_ptr());
  launch(where, {dim3(static_cast<unsigned>(striding_blocks(where, chunks, 1)))}, count_tiles_kernel, ranks.masks[0], rows, count, chunks,
         static_cast<uint32_t*>(ranks.in_chunk.mutable_data_ptr()), counts);
  launch(where, {dim3(static_cast<unsigned>(striding_blocks(where, count, 1)))}, sum_chunks_kernel, ranks.masks[0], rows, count, counts,
         static_cast<int64_t*>(ranks.totals.mutable_data_ptr()));
  return ranks;
}

}  // namespace taskloom
