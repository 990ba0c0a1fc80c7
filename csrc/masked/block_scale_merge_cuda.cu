// block_scale_merge: CUDA kernel. Bytes moved: each block's base, deltas and partition in, the result out, once each; any number of blocks
// and tasks in one launch (a second one where some blocks are computed in double). Coefficients stay in device memory: one for a task and
// block, or a gather among those of its groups, which lie together and are read from the L1 cache.
#include "masked/block_scale_merge_cuda.h"

namespace taskloom {
namespace {

constexpr int64_t merge_piece = 4096;

struct Coefficients {
  const void* data;
  DType dtype;

  template <class Acc>
  __device__ Acc at(int64_t index) const {
    if (sizeof(Acc) == 8 && dtype == DType::f64) return static_cast<Acc>(static_cast<const double*>(data)[index]);
    return static_cast<Acc>(static_cast<const float*>(data)[index]);
  }
};

template <class Acc>
__global__ void __launch_bounds__(cuda_threads)
    block_scale_merge_kernel(const ScaleRow* __restrict__ rows, int64_t count, int64_t pieces, const DeviceValues* __restrict__ deltas,
                             int64_t tasks, int64_t blocks, Coefficients coef, int64_t groups, long long* noted) {
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const ScaleRow& row = rows[row_of<&ScaleRow::first_piece>(rows, count, piece)];
    const int64_t first = (piece - row.first_piece) * merge_piece, end = min(first + merge_piece, row.numel);
    for (int64_t begin = first + vector_entries * threadIdx.x; begin < end; begin += vector_entries * cuda_threads) {
      EightGroups group;
      int largest = 0;
      if (row.partition != nullptr) group = load_groups(row, begin, groups, largest);
      note_largest(largest, groups, noted);
      Acc sum[vector_entries] = {};
      each_eight<Acc>(
          tasks, begin, row.numel, [&](int64_t task) { return deltas[task * blocks + row.place]; },
          [&](int64_t task, const Acc(&delta)[vector_entries]) {
            const int64_t at = (task * blocks + row.place) * groups;
            if (groups == 1) {
              const Acc factor = coef.at<Acc>(at);
#pragma unroll
              for (int i = 0; i < vector_entries; ++i) sum[i] += factor * delta[i];
            } else {
#pragma unroll
              for (int i = 0; i < vector_entries; ++i) sum[i] += coef.at<Acc>(at + group.of(i)) * delta[i];
            }
          });
      Acc values[vector_entries];
      load_eight(row.values, begin, row.numel, values);
#pragma unroll
      for (int i = 0; i < vector_entries; ++i) values[i] += sum[i];
      store_eight(row.out, begin, row.numel, values);
    }
  }
}

std::vector<Tensor> block_scale_merge_cuda(std::vector<Tensor> base, std::vector<Tensor> deltas, const Tensor& coef,
                                           std::vector<Tensor> partition) {
  STD_TORCH_CHECK(coef.dim() == 3, "coef: expected three dimensions, got ", coef.dim());
  STD_TORCH_CHECK(!base.empty(), "base: expected at least one block, got none");
  ScaleTensors all(base, "base", deltas, partition, coef.size(2));
  const auto blocks = static_cast<int64_t>(base.size());
  check_scale_coef(coef, all.tasks, blocks);
  const Tensor flat = contiguous_of(coef);
  const Coefficients coefficients{flat.const_data_ptr(), dtype_of(flat, "coef")};
  std::vector<Tensor> out;
  std::vector<ScaleRow> narrow, wide;
  for (size_t b = 0; b < base.size(); ++b) {
    out.push_back(torch::stable::new_empty(base[b], base[b].sizes(), base[b].scalar_type()));
    all.rows[b].out = device_values(out.back(), "base");
    (coefficients.dtype == DType::f64 || all.wide(all.rows[b]) ? wide : narrow).push_back(all.rows[b]);
  }
  const Tensor delta_table = device_table(base[0], all.deltas);
  const auto merge = [&](std::vector<ScaleRow>& rows, auto kernel) {
    const int64_t pieces = number_pieces(rows, merge_piece);
    if (pieces == 0) return;
    const Tensor table = device_table(base[0], rows);
    launch(base[0], {dim3(static_cast<unsigned>(striding_blocks(base[0], pieces, 1)))}, kernel, rows_of<ScaleRow>(table),
           static_cast<int64_t>(rows.size()), pieces, rows_of<DeviceValues>(delta_table), all.tasks, blocks, coefficients, all.groups,
           all.noted());
  };
  merge(narrow, block_scale_merge_kernel<float>);
  merge(wide, block_scale_merge_kernel<double>);
  all.check_groups();
  return out;
}

}  // namespace

TASKLOOM_CUDA_OPS(m) { m.impl("block_scale_merge", TORCH_BOX(&block_scale_merge_cuda)); }

}  // namespace taskloom
