// topk_gate: CUDA kernels. Bytes moved: the logits in, weights and experts out, each once. A warp takes a row and never waits for another.
// Experts are chosen as integers in the order of the values: the largest of a warp is one instruction, and so is the lowest expert that has
// it. Statistics are sums of each warp's rows, added up by a second kernel in an order that depends on the shape alone.
#include <algorithm>
#include <limits>
#include <tuple>

#include "common/stable_gaps.h"
#include "gating/gate_arguments.h"
#include "gating/warp_rows.h"

namespace taskloom {
namespace {

constexpr int64_t gate_warps = 4;
constexpr int64_t groups_in_registers = 32;

struct DeviceGate {
  DeviceValues logits, bias;  // no bias: no data
  int64_t row_stride, tokens;
  int experts, k;
  bool sigmoid, by_scores, limited, by_two_best, masked, renormalize, long_ids;
  int groups, kept_groups, group_size;
  unsigned group_factor;  // 2^32 / group_size, rounded up
  double group_mask, scale, eps, factor;
  void *weight, *ids;
  // Statistics, or null: of each warp's rows, and each row's.
  int32_t* counts;
  void *prob_sum, *lse;
  int64_t rows_per_warp;
  void* judged;  // [tokens, groups] keys where they are not in registers
};

template <class Acc, int per_lane>
class WarpGate {
 public:
  using Key = KeyOf<Acc>;

  __device__ WarpGate(const DeviceGate& gate, int64_t row, int lane)
      : gate_(gate), lane_(lane), row_number_(row), row_(gate.logits, row * gate.row_stride, gate.experts, lane) {}

  // The experts and their weights; lane `slot` returns its expert.
  __device__ int run() {
    factor_ = static_cast<Acc>(gate_.factor);
    softmax_of_chosen_ = !gate_.sigmoid && gate_.renormalize && gate_.eps == 0;
    if (gate_.counts != nullptr || (!gate_.sigmoid && (gate_.by_scores || !softmax_of_chosen_))) {
      center_ = row_.largest() * factor_;
      sum_ = row_.sum_exponentials(factor_, center_);
    }
    bool bad = false;
    each_expert<per_lane>(gate_.experts, lane_, [&](int i, int expert) {
      const Acc value = choice(i, expert);
      bad = bad || value != value;
      if constexpr (per_lane > 0) key_[i] = ordered_key(value);
    });
    if (gate_.limited) bad = limit_groups() || bad;
    bad = __any_sync(whole_warp, bad) != 0;
    const int chosen = bad ? lane_ : choose();
    store(chosen, weigh(chosen), bad);
    return chosen;
  }

  // Adds the row's shares to the lane's sums, and writes its log-sum-exp.
  template <class Sums>
  __device__ void add_statistics(const Sums& add) {
    Acc total = sum_;
    bool sigmoid = gate_.sigmoid;
    if (sigmoid) {
      total = 0;
      each_expert<per_lane>(gate_.experts, lane_,
                            [&](int i, int expert) { total = total + exact_sigmoid(row_.logit(i, expert) * factor_); });
      total = warp_sum(total);
      sigmoid = !(total < least_sigmoid_sum<Acc>);
      if (!sigmoid) total = sum_;
    }
    const Acc share = Acc{1} / total;
    bool nan = false;
    each_expert<per_lane>(gate_.experts, lane_, [&](int i, int expert) {
      const Acc x = row_.logit(i, expert);
      nan = nan || x != x;
      add(i, expert, (sigmoid ? exact_sigmoid(x * factor_) : exact_exp(x * factor_ - center_)) * share);
    });
    nan = __any_sync(whole_warp, nan) != 0;
    const bool infinite = center_ - center_ != 0 && !nan;
    if (lane_ == 0) static_cast<Acc*>(gate_.lse)[row_number_] = infinite ? center_ : center_ + log(sum_);
  }

 private:
  __device__ Acc choice(int i, int expert) const {
    const Acc x = row_.logit(i, expert);
    if (!gate_.by_scores) return x;
    const Acc score = gate_.sigmoid ? exact_sigmoid(x * factor_) : exact_exp(x * factor_ - center_) / sum_;
    return gate_.bias.data == nullptr ? score : score + load_entry<Acc>(gate_.bias, expert);
  }

  // A lane's choice values as integers, or 0 where an expert cannot be chosen.
  __device__ Key key(int i, int expert) const {
    if constexpr (per_lane > 0) {
      return key_[i];
    } else {
      if (!gate_.limited || judged()[expert / gate_.group_size] == ~Key{0}) return ordered_key(choice(i, expert));
      return gate_.masked ? ordered_key(static_cast<Acc>(gate_.group_mask)) : Key{0};
    }
  }

  __device__ Key* judged() const { return static_cast<Key*>(gate_.judged) + row_number_ * gate_.groups; }

  __device__ int group_of(int expert) const {
    return gate_.group_size == 1 ? expert : static_cast<int>(__umulhi(static_cast<unsigned>(expert), gate_.group_factor));
  }

  // The largest key of the warp's lanes, and the lowest place that has it.
  __device__ Key best_of(Key key, int place, int* first) const {
    const Key best = warp_largest(key);
    *first = static_cast<int>(__reduce_min_sync(whole_warp, key == best ? static_cast<unsigned>(place) : 0xffffffffu));
    return best;
  }

  // What a group is judged by.
  __device__ Acc judge(int group) const {
    const int begin = group * gate_.group_size, end = begin + gate_.group_size;
    Key first = 0, second = 0;
    int place = 0;
    const auto see = [&](int expert, Key key) {
      if (expert < begin || expert >= end) return;
      if (key > first) {
        second = first, first = key, place = expert;
      } else if (key > second) {
        second = key;
      }
    };
    if constexpr (per_lane > 0) {
#pragma unroll
      for (int i = 0; i < per_lane; ++i) {
        if (warp_size * i < end && warp_size * (i + 1) > begin) see(warp_size * i + lane_, key_[i]);
      }
    } else {
      for (int expert = begin + lane_; expert < end; expert += warp_size) see(expert, ordered_key(choice(0, expert)));
    }
    int at;
    const Key best = best_of(first, place, &at);
    if (!gate_.by_two_best) return key_value(best);
    const Key next = warp_largest(first == best && place == at ? second : first);
    return key_value(best) + key_value(next);
  }

  // Leaves only experts of the best groups to choose from; whether a group is judged by NaN.
  __device__ bool limit_groups() {
    bool bad = false;
    if constexpr (per_lane > 0) {
      Key own = 0;
      for (int group = 0; group < gate_.groups; ++group) {
        const Acc found = judge(group);
        bad = bad || found != found;
        if (lane_ == group) own = ordered_key(found);
      }
      unsigned kept = 0;
      for (int round = 0; round < gate_.kept_groups; ++round) {
        int group;
        best_of(own, lane_, &group);
        kept |= 1u << group;
        if (lane_ == group) own = 0;
      }
      const Key other = gate_.masked ? ordered_key(static_cast<Acc>(gate_.group_mask)) : Key{0};
      each_expert<per_lane>(gate_.experts, lane_, [&](int i, int expert) {
        if ((kept >> group_of(expert) & 1u) == 0) key_[i] = other;
      });
    } else {
      for (int group = 0; group < gate_.groups; ++group) {
        const Acc found = judge(group);
        bad = bad || found != found;
        if (lane_ == 0) judged()[group] = ordered_key(found);
      }
      __syncwarp();
      for (int round = 0; round < gate_.kept_groups; ++round) keep_one_group();
    }
    return bad;
  }

  // Marks the best group that is not marked yet.
  __device__ void keep_one_group() const {
    Key best = 0;
    int place = 0;
    for (int group = lane_; group < gate_.groups; group += warp_size) {
      const Key key = judged()[group];
      if (key != ~Key{0} && key > best) best = key, place = group;
    }
    int group;
    best_of(best, place, &group);
    __syncwarp();
    if (lane_ == 0) judged()[group] = ~Key{0};
    __syncwarp();
  }

  // Lane `slot` gets the expert of that rank.
  __device__ int choose() {
    int mine = 0, last = -1;
    Key last_key = ~Key{0};
    for (int slot = 0; slot < gate_.k; ++slot) {
      Key best = 0;
      int place = 0x7fffffff;
      each_expert<per_lane>(gate_.experts, lane_, [&](int i, int expert) {
        const Key own = key(i, expert);
        if constexpr (per_lane == 0) {
          if (own > last_key || (own == last_key && expert <= last)) return;
        }
        if (own > best) best = own, place = expert;
      });
      int expert;
      last_key = best_of(best, place, &expert);
      last = expert;
      if (lane_ == slot) mine = expert;
      if constexpr (per_lane > 0) {
#pragma unroll
        for (int i = 0; i < per_lane; ++i) {
          if (warp_size * i + lane_ == expert) key_[i] = 0;
        }
      }
    }
    return mine;
  }

  __device__ Acc weigh(int chosen) const {
    const bool taken = lane_ < gate_.k;
    const Acc z = taken ? load_entry<Acc>(gate_.logits, row_.first + chosen) * factor_ : Acc{0};
    Acc w = 0;
    if (gate_.sigmoid) {
      w = exact_sigmoid(z);
    } else if (softmax_of_chosen_) {
      const Acc most = key_value(warp_largest(taken ? ordered_key(z) : Key{0}));
      w = exact_exp(z - most);
    } else {
      w = exact_exp(z - center_) / sum_;
    }
    if (gate_.renormalize) w = w / (warp_sum(taken ? w : Acc{0}) + static_cast<Acc>(gate_.eps));
    return w * static_cast<Acc>(gate_.scale);
  }

  __device__ void store(int chosen, Acc weight, bool bad) const {
    if (lane_ >= gate_.k) return;
    const int64_t at = row_number_ * gate_.k + lane_;
    static_cast<Acc*>(gate_.weight)[at] = bad ? from_bits(static_cast<typename Words<Acc>::Int>(
                                                    Words<Acc>::infinity | typename Words<Acc>::Int{1} << (Words<Acc>::mantissa - 1)))
                                              : weight;
    if (gate_.long_ids) {
      static_cast<int64_t*>(gate_.ids)[at] = chosen;
    } else {
      static_cast<int32_t*>(gate_.ids)[at] = chosen;
    }
  }

  const DeviceGate& gate_;
  const int lane_;
  const int64_t row_number_;
  const WarpRow<Acc, per_lane> row_;
  Key key_[per_lane > 0 ? per_lane : 1];
  Acc factor_ = 1, center_ = 0, sum_ = 1;
  bool softmax_of_chosen_ = false;
};

template <class Acc, int per_lane>
__global__ void __launch_bounds__(gate_warps* warp_size, 1) topk_gate_kernel(DeviceGate gate) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int64_t row = grid_index() / warp_size;
  if (row < gate.tokens) WarpGate<Acc, per_lane>(gate, row, lane).run();
}

// The same with statistics: a warp's rows are neighbours.
template <class Acc, int per_lane>
__global__ void __launch_bounds__(gate_warps* warp_size, 1) topk_gate_statistics_kernel(DeviceGate gate) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int64_t warp = grid_index() / warp_size, begin = warp * gate.rows_per_warp;
  const int64_t end = min(begin + gate.rows_per_warp, gate.tokens);
  if (begin >= end) return;
  int32_t* const counts = gate.counts + warp * gate.experts;
  Acc* const sums = static_cast<Acc*>(gate.prob_sum) + warp * gate.experts;
  Acc kept[per_lane > 0 ? per_lane : 1];
  each_expert<per_lane>(gate.experts, lane, [&](int i, int expert) {
    counts[expert] = 0;
    if constexpr (per_lane > 0) {
      kept[i] = 0;
    } else {
      sums[expert] = 0;
    }
  });
  for (int64_t row = begin; row < end; ++row) {
    WarpGate<Acc, per_lane> rows(gate, row, lane);
    const int chosen = rows.run();
    rows.add_statistics([&](int i, int expert, Acc share) {
      if constexpr (per_lane > 0) {
        kept[i] = kept[i] + share;
      } else {
        sums[expert] = sums[expert] + share;
      }
    });
    // The chosen of a row differ, so that lanes do not meet; rows come one after the other.
    __syncwarp();
    if (lane < gate.k) counts[chosen] += 1;
  }
  if constexpr (per_lane > 0) {
    each_expert<per_lane>(gate.experts, lane, [&](int i, int expert) { sums[expert] = kept[i]; });
  }
}

constexpr int sum_lines = 8;

// The warps' sums added up: every eighth in order, then the eight.
template <class Acc>
__global__ void __launch_bounds__(sum_lines* warp_size)
    add_statistics_kernel(const int32_t* __restrict__ counts, const Acc* __restrict__ sums, int64_t warps, int experts,
                          int32_t* __restrict__ counted, Acc* __restrict__ summed) {
  TASKLOOM_SHARED(Acc, parts, sum_lines * warp_size);
  TASKLOOM_SHARED(int32_t, part_counts, sum_lines* warp_size);
  const int thread = static_cast<int>(threadIdx.x), line = thread / warp_size;
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * warp_size + thread % warp_size;
  Acc sum = 0;
  int32_t count = 0;
  if (expert < experts) {
    for (int64_t warp = line; warp < warps; warp += sum_lines) {
      sum = sum + sums[warp * experts + expert];
      count += counts[warp * experts + expert];
    }
  }
  parts[thread] = sum;
  part_counts[thread] = count;
  __syncthreads();
  if (line != 0 || expert >= experts) return;
  for (int other = 1; other < sum_lines; ++other) {
    sum = sum + parts[other * warp_size + thread];
    count += part_counts[other * warp_size + thread];
  }
  counted[expert] = count;
  summed[expert] = sum;
}

dim3 blocks_of(int64_t warps) { return dim3(static_cast<unsigned>((warps + gate_warps - 1) / gate_warps)); }

// A block of few rows has no idle warps.
unsigned threads_for(int64_t warps) { return static_cast<unsigned>(std::clamp<int64_t>(warps, 1, gate_warps) * warp_size); }

Tensor empty(const Tensor& where, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return torch::stable::new_empty(where, sizes, dtype);
}

template <class Acc>
void run_gate(const Tensor& where, const DeviceGate& gate, bool in_registers) {
  const bool statistics = gate.counts != nullptr;
  const int64_t warps = statistics ? (gate.tokens + gate.rows_per_warp - 1) / gate.rows_per_warp : gate.tokens;
  with_registers(gate.experts, in_registers && sizeof(Acc) == 4, [&](auto per_lane) {
    constexpr int registers = sizeof(Acc) == 4 ? decltype(per_lane)::value : 0;
    const Launch shape{blocks_of(warps), threads_for(warps)};
    if (statistics) {
      launch(where, shape, topk_gate_statistics_kernel<Acc, registers>, gate);
    } else {
      launch(where, shape, topk_gate_kernel<Acc, registers>, gate);
    }
  });
}

template <class Acc>
void add_up(const Tensor& where, const Tensor& warp_counts, const Tensor& warp_sums, const Tensor& counts, const Tensor& sums) {
  const int64_t experts = counts.numel();
  const Launch shape{dim3(static_cast<unsigned>((experts + warp_size - 1) / warp_size)), sum_lines * warp_size};
  launch(where, shape, add_statistics_kernel<Acc>, static_cast<const int32_t*>(warp_counts.const_data_ptr()),
         static_cast<const Acc*>(warp_sums.const_data_ptr()), warp_counts.size(0), static_cast<int>(experts),
         static_cast<int32_t*>(counts.mutable_data_ptr()), static_cast<Acc*>(sums.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_gate_cuda(const Tensor& logits, OptionalTensor bias, int64_t k, Text score,
                                                                  int64_t n_group, int64_t topk_group, Text group_score, double group_mask,
                                                                  bool renormalize, double scale, double eps, double temperature,
                                                                  bool long_ids, bool statistics) {
  check_on_device(logits);
  if (bias) check_on_device(*bias);
  const GateShape shape(logits, k);
  const int64_t tokens = shape.tokens, experts = shape.experts;
  check_groups(experts, k, n_group, topk_group, group_score.value);
  const Tensor rows = rows_of(logits);
  const OptionalTensor beside = bias ? OptionalTensor(contiguous_of(*bias)) : std::nullopt;
  if (beside) check_numel(*beside, experts, "bias", "the experts of logits");
  const bool wide = is_double(logits) || (beside && is_double(*beside));
  const ScalarType arithmetic = wide ? ScalarType::Double : ScalarType::Float;
  const bool limited = topk_group < n_group, masked = limited && group_mask != -std::numeric_limits<double>::infinity();
  const bool in_registers = !wide && experts <= 32 * warp_size && (!limited || n_group <= groups_in_registers);
  constexpr int64_t least_rows = 4, most_sums = 1024;
  const int64_t rows_per_warp = std::max(least_rows, (tokens + most_sums - 1) / most_sums);
  const int64_t sums = statistics ? (tokens + rows_per_warp - 1) / rows_per_warp : 0;
  Tensor weight = empty(logits, {tokens, k}, arithmetic), ids = empty(logits, {tokens, k}, long_ids ? ScalarType::Long : ScalarType::Int);
  Tensor counts = empty(logits, {statistics ? experts : 0}, ScalarType::Int),
         prob_sum = empty(logits, {statistics ? experts : 0}, arithmetic);
  Tensor lse = empty(logits, {statistics ? tokens : 0}, arithmetic);
  const Tensor warp_counts = statistics ? empty(logits, {sums, experts}, ScalarType::Int) : counts;
  const Tensor warp_sums = statistics ? empty(logits, {sums, experts}, arithmetic) : prob_sum;
  const Tensor judged = limited && !in_registers ? empty(logits, {tokens, n_group}, wide ? ScalarType::Long : ScalarType::Int) : counts;
  const int64_t size = experts / n_group;
  DeviceGate gate{};
  gate.logits = {const_cast<void*>(rows.const_data_ptr()), dtype_of(rows, "logits")};
  if (beside) gate.bias = {const_cast<void*>(beside->const_data_ptr()), dtype_of(*beside, "bias")};
  gate.row_stride = row_stride_of(rows);
  gate.tokens = tokens;
  gate.experts = static_cast<int>(experts);
  gate.k = static_cast<int>(k);
  gate.sigmoid = is_sigmoid(score.value);
  gate.limited = limited;
  gate.by_two_best = group_score.value == "top2";
  gate.masked = masked;
  gate.by_scores = beside.has_value() || masked || (limited && gate.by_two_best);
  gate.renormalize = renormalize;
  gate.long_ids = long_ids;
  gate.groups = static_cast<int>(n_group);
  gate.kept_groups = static_cast<int>(topk_group);
  gate.group_size = static_cast<int>(size);
  gate.group_factor = static_cast<unsigned>(((int64_t{1} << 32) + size - 1) / size);
  gate.group_mask = group_mask;
  gate.scale = scale;
  gate.eps = eps;
  gate.factor = 1 / temperature;
  gate.weight = weight.mutable_data_ptr();
  gate.ids = ids.mutable_data_ptr();
  if (statistics) gate.counts = static_cast<int32_t*>(warp_counts.mutable_data_ptr());
  gate.prob_sum = warp_sums.mutable_data_ptr();
  gate.lse = lse.mutable_data_ptr();
  gate.rows_per_warp = rows_per_warp;
  gate.judged = judged.mutable_data_ptr();
  wide ? run_gate<double>(logits, gate, in_registers) : run_gate<float>(logits, gate, in_registers);
  if (statistics) {
    if (wide) {
      add_up<double>(logits, warp_counts, warp_sums, counts, prob_sum);
    } else {
      add_up<float>(logits, warp_counts, warp_sums, counts, prob_sum);
    }
  }
  return {weight, ids, counts, prob_sum, lse};
}

}  // namespace

TASKLOOM_CUDA_OPS(m) { m.impl("topk_gate", TORCH_BOX(&topk_gate_cuda)); }

}  // namespace taskloom
