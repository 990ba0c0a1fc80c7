// masked_adamw_, masked_sgd_: CUDA kernels. Bytes moved: the masks twice or the indices twice, and of active entries alone parameter and
// state in and out and the gradient in (whole sectors of 32 bytes, where they lie apart). Any number of parameters in one launch, a second
// one for those of float64. A warp takes a tile of 1024 entries: it lists the places of those that its mask sets, then each lane steps one
// after the other, so that all lanes work at any density and state is read and written next to each other.
#include "masked/masked_step_cuda.h"
#include "masked/masked_step_scalars.h"

namespace taskloom {
namespace {

// Whose loads a thread has under way.
template <class Acc>
constexpr int entries_together = sizeof(Acc) == 8 ? 2 : 4;

__device__ float square_root(float value) { return sqrtf(value); }
__device__ double square_root(double value) { return sqrt(value); }

// The rules take an entry's value, gradient and state, and leave the new value and state. Each operation is rounded, in the order of the
// CPU's loops.
struct AdamwRule {
  bool maximize;
  static constexpr int states = 2;

  template <class Acc>
  static void write_numbers(const AdamwScalars& of, Acc (&to)[step_numbers]) {
    const double numbers[] = {of.kept, of.rate1, of.beta2, of.rate2, of.root_correction2, of.eps, of.step_size};
    for (int i = 0; i < 7; ++i) to[i] = static_cast<Acc>(numbers[i]);
  }

  template <class Acc>
  __device__ void step(const Acc (&number)[step_numbers], Acc& value, Acc gradient, Acc (&state)[step_states]) const {
    const Acc slope = maximize ? -gradient : gradient;
    const Acc mean = state[0] + (slope - state[0]) * number[1];
    const Acc square = state[1] * number[2] + (number[3] * slope) * slope;
    state[0] = mean;
    state[1] = square;
    value = value * number[0] + (number[6] * mean) / (square_root(square) / number[4] + number[5]);
  }
};

struct SgdRule {
  bool maximize, decays, follows, nesterov;
  static constexpr int states = 1;

  template <class Acc>
  static void write_numbers(const SgdScalars& of, Acc (&to)[step_numbers]) {
    const double numbers[] = {of.step_size, of.momentum, of.undamped, of.weight_decay, of.first ? 1.0 : 0.0};
    for (int i = 0; i < 5; ++i) to[i] = static_cast<Acc>(numbers[i]);
  }

  template <class Acc>
  __device__ void step(const Acc (&number)[step_numbers], Acc& value, Acc gradient, Acc (&state)[step_states]) const {
    Acc slope = maximize ? -gradient : gradient;
    if (decays) slope += number[3] * value;
    if (follows) {
      state[0] = number[4] != 0 ? slope : state[0] * number[1] + number[2] * slope;
      slope = nesterov ? slope + number[1] * state[0] : state[0];
    }
    value += number[0] * slope;
  }
};

template <class Acc, DType dtype>
__device__ Acc value_of(typename Storage<dtype>::Entry bits) {
  if constexpr (dtype == DType::f64) {
    return static_cast<Acc>(__longlong_as_double(static_cast<long long>(bits)));
  } else if constexpr (dtype == DType::f32) {
    return static_cast<Acc>(__uint_as_float(bits));
  } else {
    return static_cast<Acc>(dtype == DType::f16 ? half_value(bits) : bfloat16_value(bits));
  }
}

template <class Acc, DType dtype>
__device__ typename Storage<dtype>::Entry bits_of(Acc value) {
  if constexpr (dtype == DType::f64) {
    return static_cast<uint64_t>(__double_as_longlong(static_cast<double>(value)));
  } else if constexpr (dtype == DType::f32) {
    return __float_as_uint(static_cast<float>(value));
  } else {
    const float narrow = static_cast<float>(value);
    return static_cast<uint16_t>(dtype == DType::f16 ? half_bits(narrow) : bfloat16_bits(narrow));
  }
}

// Steps `count` active entries by a warp: entry(i) is the i-th's place in the parameter, `place` the first's among the states.
template <class Acc, DType dtype, class Rule, class Entry>
__device__ void step_entries(const StepRow<Acc>& row, const Rule& rule, int count, int64_t place, const Entry& entry) {
  using Bits = typename Storage<dtype>::Entry;
  constexpr int together = entries_together<Acc>;
  auto* const parameter = static_cast<Bits*>(row.parameter);
  const auto* const gradient = static_cast<const Bits*>(row.gradient);
  for (int first = static_cast<int>(threadIdx.x) % warp_size; first < count; first += together * warp_size) {
    int64_t at[together];
    Bits value_bits[together], gradient_bits[together];
    Acc state[together][step_states];
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const int i = first + j * warp_size;
      if (i >= count) continue;
      at[j] = entry(i);
      value_bits[j] = parameter[at[j]];
      gradient_bits[j] = gradient[at[j]];
#pragma unroll
      for (int s = 0; s < Rule::states; ++s) {
        if (row.state[s] != nullptr) state[j][s] = row.state[s][place + i];
      }
    }
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const int i = first + j * warp_size;
      if (i >= count) continue;
      Acc value = value_of<Acc, dtype>(value_bits[j]);
      rule.step(row.numbers, value, value_of<Acc, dtype>(gradient_bits[j]), state[j]);
      parameter[at[j]] = bits_of<Acc, dtype>(value);
#pragma unroll
      for (int s = 0; s < Rule::states; ++s) {
        if (row.state[s] != nullptr) row.state[s][place + i] = state[j][s];
      }
    }
  }
}

// Lists the set entries of a warp's tile, and returns how many there are.
__device__ int list_places(const TileBits& tile, uint16_t* places) {
  uint32_t next = tile.before;
  for (uint32_t bits = tile.bits; bits != 0; bits &= bits - 1) {
    places[next++] = static_cast<uint16_t>(warp_size * (threadIdx.x % warp_size) + __ffs(static_cast<int>(bits)) - 1);
  }
  return static_cast<int>(__shfl_sync(whole_warp, next, warp_size - 1));
}

template <class Acc, class Rule>
__global__ void __launch_bounds__(cuda_threads)
    masked_step_kernel(const StepRow<Acc>* __restrict__ rows, int64_t count, int64_t tiles, DeviceRanks ranks, Rule rule) {
  TASKLOOM_SHARED(uint16_t, listed, rank_warps* rank_tile);
  uint16_t* const places = listed + threadIdx.x / warp_size * rank_tile;
  for (int64_t tile = grid_index() / warp_size; tile < tiles; tile += grid_stride() / warp_size) {
    const StepRow<Acc>& row = rows[row_of<&StepRow<Acc>::first_tile>(rows, count, tile)];
    const int64_t own = tile - row.first_tile, begin = own * rank_tile;
    const auto kind = static_cast<ActiveKind>(row.kind);
    int active = static_cast<int>(min(row.entries - begin, rank_tile));
    int64_t place = begin;
    if (kind == ActiveKind::packed) {
      active = list_places(load_tile(row.mask, own), places);
      place = ranks.before(row.mask, own);
    }
    __syncwarp();
    with_storage_of<Acc>(static_cast<DType>(row.dtype), [&](auto storage) {
      step_entries<Acc, storage.dtype_of_entries>(row, rule, active, place, [&](int i) -> int64_t {
        if (kind == ActiveKind::packed) return begin + places[i];
        return kind == ActiveKind::all ? begin + i : load_index(row.active, kind == ActiveKind::index64, begin + i);
      });
    });
    __syncwarp();
  }
}

template <class Acc, class Rule, class Scalars>
void step_rows(const StepTables& tables, const Rule& rule, const std::vector<Scalars>& scalars) {
  const std::vector<StepRow<Acc>> rows = tables.rows<Acc>([&](size_t i, Acc(&to)[step_numbers]) { Rule::write_numbers(scalars[i], to); });
  if (rows.empty()) return;
  const int64_t tiles = rows.back().first_tile + rows.back().tiles();
  const Tensor table = device_table(tables.where(), rows);
  launch_striding(tables.where(), tiles * warp_size, masked_step_kernel<Acc, Rule>, rows_of<StepRow<Acc>>(table),
                  static_cast<int64_t>(rows.size()), tiles, tables.ranks().device(), rule);
}

template <class Rule, class Scalars>
void run(StepTables& tables, const Rule& rule, const std::vector<Scalars>& scalars) {
  tables.check();
  step_rows<float>(tables, rule, scalars);
  step_rows<double>(tables, rule, scalars);
  tables.put_back();
}

void check_steps(const std::vector<double>& step, const std::vector<Tensor>& params) {
  STD_TORCH_CHECK(step.size() == params.size(), "step: expected ", params.size(), " numbers as in params, got ", step.size());
}

void masked_adamw_cuda(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq,
                       std::vector<Tensor> active, std::vector<double> step, double lr, double beta1, double beta2, double eps,
                       double weight_decay, bool maximize) {
  check_steps(step, params);
  if (params.empty()) return;
  StepTables tables(params, grads, active);
  tables.add_state(exp_avg, "exp_avg");
  tables.add_state(exp_avg_sq, "exp_avg_sq");
  run(tables, AdamwRule{maximize}, adamw_scalars(step, lr, beta1, beta2, eps, weight_decay, maximize));
}

void masked_sgd_cuda(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffer, std::vector<Tensor> active,
                     std::vector<double> step, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                     bool maximize) {
  check_steps(step, params);
  if (params.empty()) return;
  StepTables tables(params, grads, active);
  if (momentum != 0) tables.add_state(momentum_buffer, "momentum_buffer");
  run(tables, SgdRule{maximize, weight_decay != 0, momentum != 0, nesterov},
      sgd_scalars(step, lr, momentum, dampening, weight_decay, nesterov, maximize));
}

}  // namespace

TASKLOOM_CUDA_OPS(m) {
  m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_cuda));
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_cuda));
}

}  // namespace taskloom
