// mask_count: CUDA kernel. Bytes moved: each mask in, one mask and the histogram out. A thread counts 32 entries with counters cut into
// planes: plane p holds bit p of the entries' counts, so that a mask's word costs a few operations. The histogram's bins are taken one by
// one: the entries whose planes spell the bin's number.
#include <tuple>
#include <vector>

#include "common/cuda_launch.h"
#include "common/cuda_table.h"
#include "masked/mask_checks.h"

namespace taskloom {
namespace {

constexpr int plane_limit = 20;
constexpr int64_t shared_bins = 4096;

struct CountedMask {
  const uint8_t* data;
  int64_t aligned;  // whether data is a multiple of 4 bytes
};

// Word `word` of a mask of `bytes` bytes; what lies beyond these is 0.
__device__ uint32_t load_word(const CountedMask& mask, int64_t word, int64_t bytes) {
  if (mask.aligned && 4 * word + 4 <= bytes) return reinterpret_cast<const uint32_t*>(mask.data)[word];
  uint32_t bits = 0;
  for (int byte = 0; byte < 4 && 4 * word + byte < bytes; ++byte) bits |= static_cast<uint32_t>(mask.data[4 * word + byte]) << (8 * byte);
  return bits;
}

__device__ uint32_t full_add(uint32_t a, uint32_t b, uint32_t c, uint32_t* carry) {
  *carry = (a & b) | ((a ^ b) & c);
  return a ^ b ^ c;
}

template <int planes>
struct Counts {
  uint32_t plane[planes];

  // Adds `carry` to the planes from `first` on.
  __device__ void ripple(int first, uint32_t carry) {
#pragma unroll
    for (int p = 0; p < planes; ++p) {
      if (p < first) continue;
      const uint32_t next = plane[p] & carry;
      plane[p] ^= carry;
      carry = next;
    }
  }

  // Seven full adders take eight masks into the planes of 1, 2 and 4; what they carry is the sum's bit of 8.
  __device__ void add_eight(const uint32_t (&m)[8]) {
    uint32_t two_a, two_b, four_a, four_b, eight;
    plane[0] = full_add(plane[0], m[0], m[1], &two_a);
    plane[0] = full_add(plane[0], m[2], m[3], &two_b);
    plane[1] = full_add(plane[1], two_a, two_b, &four_a);
    plane[0] = full_add(plane[0], m[4], m[5], &two_a);
    plane[0] = full_add(plane[0], m[6], m[7], &two_b);
    plane[1] = full_add(plane[1], two_a, two_b, &four_b);
    plane[2] = full_add(plane[2], four_a, four_b, &eight);
    ripple(3, eight);
  }

  // Entries whose count is at least k, which the planes can hold.
  __device__ uint32_t at_least(int64_t k) const {
    uint32_t greater = 0, equal = 0xffffffffu;
#pragma unroll
    for (int p = planes - 1; p >= 0; --p) {
      const uint32_t wanted = k >> p & 1 ? 0xffffffffu : 0u;
      greater |= equal & plane[p] & ~wanted;
      equal &= ~(plane[p] ^ wanted);
    }
    return greater | equal;
  }

  __device__ uint32_t equal_to(uint32_t count) const {
    uint32_t equal = 0xffffffffu;
#pragma unroll
    for (int p = 0; p < planes; ++p) equal &= plane[p] ^ (count >> p & 1u ? 0u : 0xffffffffu);
    return equal;
  }
};

// A block's own histogram holds fewer than 2^32 entries a bin: a grid of one block an SM would need 2^32 entries each.
template <int planes>
__global__ void __launch_bounds__(cuda_threads)
    mask_count_kernel(const CountedMask* __restrict__ masks, int64_t tasks, int64_t k, int64_t numel, uint8_t* __restrict__ selected,
                      unsigned long long* histogram) {
  TASKLOOM_DYNAMIC_SHARED(uint32_t, bins);
  const bool in_shared = tasks < shared_bins;
  if (in_shared) {
    for (int64_t c = threadIdx.x; c <= tasks; c += blockDim.x) bins[c] = 0;
  }
  __syncthreads();
  const int64_t words = (numel + 31) / 32, bytes = (numel + 7) / 8;
  const bool reachable = k >> planes == 0;
  // Whole warps: lanes beyond the last word take part with no entries.
  for (int64_t first = grid_index() - threadIdx.x % warp_size; first < words; first += grid_stride()) {
    const int64_t word = first + threadIdx.x % warp_size, left = numel - 32 * word;
    const uint32_t entries = left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1u;
    Counts<planes> counts{};
    int64_t task = 0;
    for (; task + 8 <= tasks; task += 8) {
      uint32_t eight[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) eight[i] = load_word(masks[task + i], word, bytes);
      counts.add_eight(eight);
    }
    for (; task < tasks; ++task) counts.ripple(0, load_word(masks[task], word, bytes));
    const uint32_t enough = reachable ? counts.at_least(k) & entries : 0u;
    if (left >= 32) {
      reinterpret_cast<uint32_t*>(selected)[word] = enough;
    } else {
      for (int64_t byte = 4 * word; byte < bytes; ++byte) selected[byte] = static_cast<uint8_t>(enough >> (8 * (byte - 4 * word)));
    }
    for (int64_t c = 0; c <= tasks; ++c) {
      const uint32_t members = counts.equal_to(static_cast<uint32_t>(c)) & entries;
      const unsigned size = __reduce_add_sync(whole_warp, static_cast<unsigned>(__popc(members)));
      if (size == 0 || threadIdx.x % warp_size != 0) continue;
      if (in_shared) {
        atomicAdd(bins + c, size);
      } else {
        atomicAdd(histogram + c, static_cast<unsigned long long>(size));
      }
    }
  }
  __syncthreads();
  if (!in_shared) return;
  for (int64_t c = threadIdx.x; c <= tasks; c += blockDim.x) {
    if (bins[c] != 0) atomicAdd(histogram + c, static_cast<unsigned long long>(bins[c]));
  }
}

std::tuple<Tensor, Tensor> mask_count_cuda(std::vector<Tensor> packed, int64_t numel, int64_t k) {
  check_mask_count(packed, numel, k);
  const auto tasks = static_cast<int64_t>(packed.size());
  std::vector<Tensor> flat;
  std::vector<CountedMask> masks;
  for (const Tensor& one : packed) {
    flat.push_back(contiguous_of(one));
    const auto* const data = static_cast<const uint8_t*>(flat.back().const_data_ptr());
    masks.push_back({data, (reinterpret_cast<uintptr_t>(data) & 3) == 0});
  }
  Tensor selected = torch::stable::new_empty(packed[0], {(numel + 7) / 8}, ScalarType::Byte);
  Tensor histogram = torch::stable::new_empty(packed[0], {tasks + 1}, ScalarType::Long);
  clear(histogram);
  const Tensor table = device_table(packed[0], masks);
  const auto kernel = tasks < 16 ? mask_count_kernel<4> : tasks < int64_t{1} << 8 ? mask_count_kernel<8> : mask_count_kernel<plane_limit>;
  const Launch shape{dim3(static_cast<unsigned>(striding_blocks(packed[0], (numel + 31) / 32, cuda_threads))), cuda_threads,
                     static_cast<unsigned>(tasks < shared_bins ? 4 * (tasks + 1) : 0)};
  launch(packed[0], shape, kernel, rows_of<CountedMask>(table), tasks, k, numel, static_cast<uint8_t*>(selected.mutable_data_ptr()),
         static_cast<unsigned long long*>(histogram.mutable_data_ptr()));
  return {selected, histogram};
}

}  // namespace

TASKLOOM_CUDA_OPS(m) { m.impl("mask_count", TORCH_BOX(&mask_count_cuda)); }

}  // namespace taskloom
