// Kernels with a known answer or a known defect, for the tests of the emulator itself.
#include "common/checks.h"
#include "common/cuda_launch.h"
#include "common/cuda_table.h"

namespace taskloom {
namespace {

// Sums each block's values by warp shuffles and shared memory.
__global__ void block_sums_kernel(const int64_t* values, int64_t numel, int64_t* sums) {
  TASKLOOM_SHARED(int64_t, of_warps, cuda_threads / warp_size);
  int64_t sum = grid_index() < numel ? values[grid_index()] : 0;
  for (int offset = warp_size / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(whole_warp, sum, offset);
  if (threadIdx.x % warp_size == 0) of_warps[threadIdx.x / warp_size] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned warp = 1; warp < blockDim.x / warp_size; ++warp) sum += of_warps[warp];
  sums[blockIdx.x] = sum;
}

__global__ void lane_votes_kernel(int64_t* votes) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  votes[8 * threadIdx.x] = __ballot_sync(whole_warp, lane % 3 == 0);
  votes[8 * threadIdx.x + 1] = __match_any_sync(whole_warp, lane / 4);
  votes[8 * threadIdx.x + 2] = __shfl_xor_sync(whole_warp, lane, 5);
  votes[8 * threadIdx.x + 3] = __shfl_up_sync(whole_warp, lane, 3u);
  votes[8 * threadIdx.x + 4] = __shfl_sync(whole_warp, lane, 7);
  votes[8 * threadIdx.x + 5] = __reduce_add_sync(whole_warp, lane);
  votes[8 * threadIdx.x + 6] = __syncthreads_count(threadIdx.x % 5 == 0);
  votes[8 * threadIdx.x + 7] = __syncthreads_count(threadIdx.x % 7 == 0);
}

// Thread 0 ends before a barrier at which the others wait.
__global__ void left_waiting_kernel(int64_t* out) {
  if (threadIdx.x == 0) return;
  __syncthreads();
  out[0] = 1;
}

// Reads what no thread has written.
__global__ void unwritten_shared_kernel(int64_t* out) {
  TASKLOOM_SHARED(int64_t, values, 4);
  TASKLOOM_DYNAMIC_SHARED(int64_t, more);
  if (threadIdx.x == 0) out[0] = values[3], out[1] = more[0];
}

// Lacks a barrier between writing and reading: what it gives depends on the order of the threads.
__global__ void race_kernel(int64_t* out) {
  TASKLOOM_SHARED(int64_t, values, cuda_threads);
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[(threadIdx.x + 1) % cuda_threads];
}

int64_t* words_of(const Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }

Tensor block_sums(const Tensor& values) {
  const auto blocks = static_cast<unsigned>((values.numel() + cuda_threads - 1) / cuda_threads);
  Tensor sums = torch::stable::new_empty(values, {blocks}, ScalarType::Long);
  launch(values, {dim3(blocks)}, block_sums_kernel, static_cast<const int64_t*>(values.const_data_ptr()), values.numel(), words_of(sums));
  return sums;
}

void run_kernel(Tensor out, int64_t which) {
  const Launch one{dim3(1), cuda_threads, 64};
  if (which == 0) launch(out, one, left_waiting_kernel, words_of(out));
  if (which == 1) launch(out, one, unwritten_shared_kernel, words_of(out));
  if (which == 2) launch(out, one, race_kernel, words_of(out));
  if (which == 3) launch(out, one, lane_votes_kernel, words_of(out));
  if (which == 4) launch(out, {dim3(1), 33}, race_kernel, words_of(out));
}

Tensor table_of(const Tensor& where, int64_t rows) {
  std::vector<int64_t> words(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) words[static_cast<size_t>(row)] = 3 * row;
  return device_table(where, words);
}

}  // namespace

STABLE_TORCH_LIBRARY(taskloom_emulator_checks, m) {
  m.def("block_sums(Tensor values) -> Tensor");
  m.def("run_kernel(Tensor(a!) out, int which) -> ()");
  m.def("table_of(Tensor where, int rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(taskloom_emulator_checks, CPU, m) {
  m.impl("block_sums", TORCH_BOX(&block_sums));
  m.impl("run_kernel", TORCH_BOX(&run_kernel));
  m.impl("table_of", TORCH_BOX(&table_of));
}

}  // namespace taskloom
