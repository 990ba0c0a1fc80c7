// block_scale_merge_backward: CUDA kernels. Bytes moved: each block's deltas and partition in, its gradient once for a few tasks (once a
// task with a partition; a piece of it is still in a cache then), and a sum a task and group for each piece. All arithmetic is double. Sums
// have one order: entries to threads, threads to a piece, pieces to a block.
#include "masked/block_scale_merge_cuda.h"

namespace taskloom {
namespace {

constexpr int64_t dots_piece = 16384;  // more with a partition of many groups: a piece writes a sum for each
constexpr int tasks_together = 4;
constexpr int64_t lane_sums = 6144;  // doubles in 48 KiB of shared memory

// Every lane gets the sum over its warp.
__device__ double warp_sum(double value) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) value += __shfl_xor_sync(whole_warp, value, step);
  return value;
}

template <class Acc>
__device__ double dot_eight(const Acc (&a)[vector_entries], const Acc (&b)[vector_entries]) {
  double sum = 0;
#pragma unroll
  for (int i = 0; i < vector_entries; ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

// parts[piece, task], without a partition.
template <class Acc>
__global__ void __launch_bounds__(cuda_threads)
    block_dots_kernel(const ScaleRow* __restrict__ rows, int64_t count, int64_t pieces, const DeviceValues* __restrict__ deltas,
                      int64_t tasks, double* __restrict__ parts) {
  TASKLOOM_SHARED(double, of_warps, tasks_together* cuda_threads / warp_size);
  constexpr int warps = cuda_threads / warp_size;
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const ScaleRow& row = rows[row_of<&ScaleRow::first_piece>(rows, count, piece)];
    const int64_t first = (piece - row.first_piece) * dots_piece, end = min(first + dots_piece, row.numel);
    for (int64_t task = 0; task < tasks; task += tasks_together) {
      double sums[tasks_together] = {};
      for (int64_t begin = first + vector_entries * threadIdx.x; begin < end; begin += vector_entries * cuda_threads) {
        Acc gradient[vector_entries];
        load_eight(row.values, begin, row.numel, gradient);
        each_eight<Acc>(
            min(tasks - task, int64_t{tasks_together}), begin, row.numel, [&](int64_t i) { return deltas[(task + i) * count + row.place]; },
            [&](int64_t which, const Acc(&delta)[vector_entries]) {
              const double dot = dot_eight(gradient, delta);
#pragma unroll
              for (int i = 0; i < tasks_together; ++i) {
                if (i == which) sums[i] += dot;
              }
            });
      }
#pragma unroll
      for (int i = 0; i < tasks_together; ++i) {
        const double sum = warp_sum(sums[i]);
        if (threadIdx.x % warp_size == 0) of_warps[i * warps + threadIdx.x / warp_size] = sum;
      }
      __syncthreads();
      if (threadIdx.x < tasks_together && task + threadIdx.x < tasks) {
        double sum = 0;
        for (int warp = 0; warp < warps; ++warp) sum += of_warps[threadIdx.x * warps + warp];
        parts[piece * tasks + task + threadIdx.x] = sum;
      }
      __syncthreads();
    }
  }
}

// parts[piece, task, group]. A lane adds its entries to sums of its own, one a group, in shared memory; there are `lanes` such lanes (a
// power of two, at most the block's threads): as many as the memory has room for.
template <class Acc>
__global__ void __launch_bounds__(cuda_threads)
    group_dots_kernel(const ScaleRow* __restrict__ rows, int64_t count, int64_t pieces, int64_t piece_entries,
                      const DeviceValues* __restrict__ deltas, int64_t tasks, int64_t groups, int lanes, double* __restrict__ parts,
                      long long* noted) {
  TASKLOOM_DYNAMIC_SHARED(double, sums);
  const int lane = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / warp_size;
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const ScaleRow& row = rows[row_of<&ScaleRow::first_piece>(rows, count, piece)];
    const int64_t first = (piece - row.first_piece) * piece_entries, end = min(first + piece_entries, row.numel);
    for (int64_t task = 0; task < tasks; ++task) {
      const DeviceValues from = deltas[task * count + row.place];
      if (lane < lanes) {
        for (int64_t group = 0; group < groups; ++group) sums[group * lanes + lane] = 0;
        int largest = 0;
        for (int64_t begin = first + vector_entries * lane; begin < end; begin += vector_entries * lanes) {
          Fetched<Acc> gradient_bits, delta_bits;
          fetch_eight(row.values, begin, row.numel, gradient_bits);
          fetch_eight(from, begin, row.numel, delta_bits);
          const EightGroups group = load_groups(row, begin, groups, largest);
          Acc gradient[vector_entries], delta[vector_entries];
          convert_eight(row.values, gradient_bits, gradient);
          convert_eight(from, delta_bits, delta);
#pragma unroll
          for (int i = 0; i < vector_entries; ++i) {
            sums[group.of(i) * lanes + lane] += static_cast<double>(gradient[i]) * static_cast<double>(delta[i]);
          }
        }
        note_largest(largest, groups, noted);
      }
      __syncthreads();
      for (int64_t group = lane / warp_size; group < groups; group += warps) {
        double sum = 0;
        for (int other = lane % warp_size; other < lanes; other += warp_size) sum += sums[group * lanes + other];
        sum = warp_sum(sum);
        if (lane % warp_size == 0) parts[(piece * tasks + task) * groups + group] = sum;
      }
      __syncthreads();
    }
  }
}

// out[task, block, group] of the pieces' sums: a warp each.
__global__ void __launch_bounds__(cuda_threads)
    sum_parts_kernel(const ScaleRow* __restrict__ rows, int64_t count, int64_t pieces, const double* __restrict__ parts, int64_t tasks,
                     int64_t groups, double* __restrict__ out) {
  const int64_t outputs = tasks * count * groups;
  for (int64_t output = grid_index() / warp_size; output < outputs; output += grid_stride() / warp_size) {
    const int64_t group = output % groups, block = output / groups % count, task = output / groups / count;
    const int64_t begin = rows[block].first_piece, end = block + 1 < count ? rows[block + 1].first_piece : pieces;
    double sum = 0;
    for (int64_t piece = begin + threadIdx.x % warp_size; piece < end; piece += warp_size) {
      sum += parts[(piece * tasks + task) * groups + group];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % warp_size == 0) out[output] = sum;
  }
}

Tensor block_scale_merge_backward_cuda(std::vector<Tensor> gradients, std::vector<Tensor> deltas, std::vector<Tensor> partition,
                                       int64_t groups) {
  STD_TORCH_CHECK(!gradients.empty(), "gradients: expected at least one block, got none");
  ScaleTensors all(gradients, "gradients", deltas, partition, groups);
  const auto blocks = static_cast<int64_t>(gradients.size());
  const int64_t piece_entries = dots_piece * std::max<int64_t>(1, groups / 64), pieces = number_pieces(all.rows, piece_entries);
  bool wide = false;
  for (const ScaleRow& row : all.rows) wide = wide || all.wide(row);
  const Tensor& where = gradients[0];
  Tensor parts = torch::stable::new_empty(where, {pieces, all.tasks, groups}, ScalarType::Double);
  Tensor out = torch::stable::new_empty(where, {all.tasks, blocks, groups}, ScalarType::Double);
  auto* const sums = static_cast<double*>(parts.mutable_data_ptr());
  const Tensor row_table = device_table(where, all.rows), delta_table = device_table(where, all.deltas);
  const ScaleRow* const rows = rows_of<ScaleRow>(row_table);
  const DeviceValues* const values = rows_of<DeviceValues>(delta_table);
  const dim3 grid(static_cast<unsigned>(striding_blocks(where, pieces, 1)));
  if (all.partitioned) {
    int lanes = cuda_threads;
    while (lanes * groups > lane_sums) lanes /= 2;
    const auto threads = static_cast<unsigned>(std::max(lanes, warp_size));
    launch(where, {grid, threads, static_cast<unsigned>(8 * lanes * groups)}, wide ? group_dots_kernel<double> : group_dots_kernel<float>,
           rows, blocks, pieces, piece_entries, values, all.tasks, groups, lanes, sums, all.noted());
  } else {
    launch(where, {grid}, wide ? block_dots_kernel<double> : block_dots_kernel<float>, rows, blocks, pieces, values, all.tasks, sums);
  }
  launch_striding(where, all.tasks * blocks * groups * warp_size, sum_parts_kernel, rows, blocks, pieces, static_cast<const double*>(sums),
                  all.tasks, groups, static_cast<double*>(out.mutable_data_ptr()));
  all.check_groups();
  return out;
}

}  // namespace

TASKLOOM_CUDA_OPS(m) { m.impl("block_scale_merge_backward", TORCH_BOX(&block_scale_merge_backward_cuda)); }

}  // namespace taskloom
