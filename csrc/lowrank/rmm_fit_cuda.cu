// rmm_fit: CUDA kernel. Bytes moved: the vectors in, mean, basis and coefficients out, each once; nothing of the vectors' size is kept in
// between. A group of 4 to 32 lanes of a warp takes a position; a warp's positions lie next to each other, so that it reads and writes
// neighbouring entries. What a position works in is shared memory, or where that is too small for one (2 n^2 + n r doubles and a few more
// for n tasks of r >= n entries: above 6144 of them), global memory for as many positions as run at once. The time goes into the rotations,
// one after the other as on the CPU: their square roots and divisions are the same in all lanes of a group, so a group is small.
#include <algorithm>
#include <tuple>

#include "common/checks.h"
#include "common/cuda_entries.h"
#include "common/cuda_launch.h"
#include "lowrank/rmm_fit_position.h"

namespace taskloom {
namespace {

constexpr int64_t shared_doubles = 6144;  // 48 KiB
constexpr int64_t most_warps = cuda_threads / warp_size;
// Warps on each multiprocessor where positions are in global memory: what they work in stays in its cache.
constexpr int64_t warps_in_global_memory = 4;

// `lanes` neighbours of a warp, at least four. Groups of a warp go the same way together.
template <int lanes>
struct LaneGroup {
  using Real = double;
  using Flag = bool;
  using Index = int;

  int lane;

  template <class Body>
  __device__ void each(int n, const Body& body) const {
    for (int i = lane; i < n; i += lanes) body(i);
  }

  template <class Body>
  __device__ void once(const Body& body) const {
    if (lane == 0) body();
  }

  __device__ bool any(const bool* flag) const {
    const bool found = __any_sync(whole_warp, *flag) != 0;
    __syncwarp();
    return found;
  }

  __device__ void dot(const double* a, const double* b, int n, int stride, double* out) const {
    double sum = 0;
    for (int i = lane % 4; i < n; i += 4) sum += a[i * stride] * b[i * stride];
    sum += __shfl_xor_sync(whole_warp, sum, 2);
    sum += __shfl_xor_sync(whole_warp, sum, 1);
    __syncwarp();
    *out = sum;
  }

  static __device__ void root(double* value) { *value = sqrt(*value); }

  __device__ void sync() const { __syncwarp(); }
};

struct DeviceFit {
  DeviceValues vectors;
  int64_t task_stride, position_stride, entry_stride;
  int64_t positions;
  DeviceValues mean, basis, coefficients;
};

// Calls body(position, row, column) in turn for the entries of a warp's `count` matrices of rows by columns.
template <class Body>
__device__ void each_entry(int count, int rows, int columns, const Body& body) {
  const int size = rows * columns;
  for (int at = static_cast<int>(threadIdx.x) % warp_size; at < count * size; at += warp_size) {
    const int position = at / size, entry = at % size;
    body(position, entry / columns, entry % columns);
  }
}

// The vectors of positions first .. first + count into their rooms; 0 into those of the warp's groups that have no position.
__device__ void load_vectors(const DeviceFit& fit, const FitPlan<int>& plan, int64_t first, int count, int groups, double* rooms) {
  with_storage(fit.vectors.dtype, [&](auto storage) {
    DeviceValues from = fit.vectors;
    from.dtype = storage.dtype_of_entries;
    for (int i = 0; i < plan.tasks; ++i) {
      const int64_t begin = i * fit.task_stride + first * fit.position_stride;
      each_entry(groups, 1, plan.width, [&](int position, int, int j) {
        const int64_t at = begin + position * fit.position_stride + j * fit.entry_stride;
        rooms[position * plan.count + i * plan.vector_stride + j] = position < count ? load_entry<double>(from, at) : 0.0;
      });
    }
  });
}

__device__ void store_results(const DeviceFit& fit, const FitPlan<int>& plan, int64_t first, int count, const double* rooms) {
  const int width = plan.width, rank = plan.rank;
  each_entry(count, 1, width, [&](int position, int, int j) {
    store_entry(fit.mean, (first + position) * width + j, rooms[position * plan.count + plan.mean + j]);
  });
  each_entry(count, rank, width, [&](int position, int k, int j) {
    const double value = rooms[position * plan.count + plan.basis + k * plan.vector_stride + j];
    store_entry(fit.basis, ((first + position) * rank + k) * width + j, value);
  });
  for (int i = 0; i < plan.tasks; ++i) {
    const int64_t begin = (i * fit.positions + first) * rank;
    each_entry(count, 1, rank, [&](int position, int, int k) {
      store_entry(fit.coefficients, begin + position * rank + k, rooms[position * plan.count + plan.coefficients + i * rank + k]);
    });
  }
}

// `scratch` has rooms for every group of the grid; without it they are in shared memory.
template <int lanes, bool in_shared>
__global__ void __launch_bounds__(in_shared ? cuda_threads : warp_size, 1)
    rmm_fit_kernel(DeviceFit fit, FitPlan<int> plan, double* scratch) {
  constexpr int groups = warp_size / lanes;
  TASKLOOM_DYNAMIC_SHARED(double, shared);
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int64_t warp = grid_index() / warp_size;
  double* rooms;
  if constexpr (in_shared) {
    rooms = shared + static_cast<int>(threadIdx.x) / warp_size * groups * plan.count;
  } else {
    rooms = scratch + warp * groups * plan.count;
  }
  const LaneGroup<lanes> group{lane % lanes};
  const int64_t step = grid_stride() / warp_size * groups;
  for (int64_t first = warp * groups; first < fit.positions; first += step) {
    const int count = static_cast<int>(min(fit.positions - first, int64_t{groups}));
    load_vectors(fit, plan, first, count, groups, rooms);
    __syncwarp();
    PositionFit<LaneGroup<lanes>>(group, plan, rooms + lane / lanes * plan.count).run();
    store_results(fit, plan, first, count, rooms);
    __syncwarp();
  }
}

// Doubles from one group's room to the next: groups that work at the same place of their rooms do so in other banks.
int64_t room_of(int64_t doubles, int64_t lanes) {
  constexpr int64_t banks = 16;
  return doubles + (banks + lanes % banks - doubles % banks) % banks;
}

// As few lanes as are half the eigenproblem's size, but so many that a warp's rooms are within shared memory; 0 where a single one is not.
int64_t lanes_for(const FitPlan<int64_t>& plan) {
  int64_t lanes = 4;
  while (lanes < warp_size && 2 * lanes < plan.size) lanes *= 2;
  while (lanes < warp_size && warp_size / lanes * room_of(plan.count, lanes) > shared_doubles) lanes *= 2;
  return warp_size / lanes * room_of(plan.count, lanes) > shared_doubles ? 0 : lanes;
}

template <int lanes>
void fit_in_shared_memory(const Tensor& where, const DeviceFit& fit, const FitPlan<int>& plan) {
  constexpr int64_t groups = warp_size / lanes;
  const int64_t of_warp = groups * plan.count, needed = (fit.positions + groups - 1) / groups;
  // Few positions spread over all multiprocessors.
  const int64_t alike = std::max<int64_t>(needed / multiprocessor_count(where), 1);
  const int64_t warps = std::min({alike, shared_doubles / of_warp, most_warps});
  const int64_t blocks = std::min<int64_t>((needed + warps - 1) / warps, int64_t{1} << 30);
  launch(where, {dim3(static_cast<unsigned>(blocks)), static_cast<unsigned>(warps * warp_size), static_cast<unsigned>(8 * warps * of_warp)},
         rmm_fit_kernel<lanes, true>, fit, plan, static_cast<double*>(nullptr));
}

void fit_in_global_memory(const Tensor& where, const DeviceFit& fit, const FitPlan<int>& plan) {
  const int64_t warps = std::min(fit.positions, multiprocessor_count(where) * warps_in_global_memory);
  const Tensor rooms = torch::stable::new_empty(where, {warps * plan.count}, ScalarType::Double);
  launch(where, {dim3(static_cast<unsigned>(warps)), warp_size}, rmm_fit_kernel<warp_size, false>, fit, plan,
         static_cast<double*>(rooms.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor, Tensor> rmm_fit_cuda(const Tensor& vectors, int64_t rank, bool center) {
  check_on_device(vectors);
  STD_TORCH_CHECK(vectors.dim() == 3, "vectors: expected three dimensions, got ", vectors.dim());
  const int64_t tasks = vectors.size(0), positions = vectors.size(1), width = vectors.size(2);
  STD_TORCH_CHECK(rank >= 1 && rank <= std::min(tasks, width), "rank: expected 1 to ", std::min(tasks, width), ", got ", rank);
  constexpr int64_t most_tasks = 1 << 12, most_width = 1 << 14;
  STD_TORCH_CHECK(tasks <= most_tasks && width <= most_width, "vectors: expected at most ", most_tasks, " tasks of ", most_width,
                  " entries on a GPU, got ", tasks, " of ", width);
  const ScalarType dtype = vectors.scalar_type();
  const DType kind = dtype_of(vectors, "vectors");
  Tensor mean = torch::stable::new_empty(vectors, {positions, width}, dtype);
  Tensor basis = torch::stable::new_empty(vectors, {positions, rank, width}, dtype);
  Tensor coefficients = torch::stable::new_empty(vectors, {tasks, positions, rank}, dtype);
  const DeviceFit fit{{const_cast<void*>(vectors.const_data_ptr()), kind},
                      vectors.stride(0),
                      vectors.stride(1),
                      vectors.stride(2),
                      positions,
                      device_values(mean, "mean"),
                      device_values(basis, "basis"),
                      device_values(coefficients, "coefficients")};
  const int64_t lanes = lanes_for(plan_fit<int64_t>(tasks, width, rank, center, kind));
  FitPlan<int> plan = plan_fit<int>(static_cast<int>(tasks), static_cast<int>(width), static_cast<int>(rank), center, kind);
  if (lanes != 0) plan.count = static_cast<int>(room_of(plan.count, lanes));
  switch (lanes) {
    case 0:
      fit_in_global_memory(vectors, fit, plan);
      break;
    case 4:
      fit_in_shared_memory<4>(vectors, fit, plan);
      break;
    case 8:
      fit_in_shared_memory<8>(vectors, fit, plan);
      break;
    case 16:
      fit_in_shared_memory<16>(vectors, fit, plan);
      break;
    default:
      fit_in_shared_memory<32>(vectors, fit, plan);
  }
  return {mean, basis, coefficients};
}

}  // namespace

TASKLOOM_CUDA_OPS(m) { m.impl("rmm_fit", TORCH_BOX(&rmm_fit_cuda)); }

}  // namespace taskloom
