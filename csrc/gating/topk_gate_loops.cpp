// CPU loops of topk_gate, compiled once per CPU level. Scores and sums go by sixteen lanes at every level, and no product is fused with an
// add, so that experts and bits are the same at all levels.
#include <cmath>

#include "gating/row_choice.h"
#include "gating/row_groups.h"
#include "gating/topk_gate.h"

namespace taskloom {
namespace {

template <class Acc>
class GateRows {
 public:
  GateRows(const TopKGate& gate, Acc* scratch)
      : gate_(gate),
        n_(padded_experts(gate.experts)),
        factor_(static_cast<Acc>(gate.inverse_temperature)),
        by_scores_(chosen_by_scores(gate)),
        limited_(gate.kept_groups < gate.groups) {
    const int64_t row = n_ + gate_row_step, groups = padded_experts(gate.groups);
    row_ = scratch;
    bias_ = row_ + row;
    choice_ = bias_ + row;
    scores_ = choice_ + row;
    compact_ = scores_ + row;
    room_ = {compact_ + row, reinterpret_cast<int32_t*>(compact_ + 2 * row)};
    judged_ = compact_ + 3 * row;
    kept_ = reinterpret_cast<int32_t*>(judged_ + groups);
    if (by_scores_) read_bias();
  }

  void run(int64_t row, int32_t* counts, Acc* prob_sum) {
    x_ = read_padded(gate_.logits, row * gate_.row_stride, gate_.experts, row_, lowest_value<Acc>());
    has_sum_ = has_scores_ = false;
    const bool fine = by_scores_ ? choose_by_scores() : choose(x_);
    if (!fine) {
      for (int32_t slot = 0; slot < gate_.k; ++slot) place_[slot] = slot;
    }
    weigh(fine);
    store(row);
    if (gate_.log_sum_exp == nullptr) return;
    for (int64_t slot = 0; slot < gate_.k; ++slot) ++counts[place_[slot]];
    add_statistics(row, prob_sum);
  }

 private:
  // The bias as added to scores, -inf in the padding so that it is never the best.
  void read_bias() {
    if (gate_.bias.data == nullptr) {
      for (int64_t i = 0; i < gate_.experts; ++i) bias_[i] = 0;
    } else {
      load_block(gate_.bias.dtype, gate_.bias.data, 0, gate_.experts, bias_);
    }
    for (int64_t i = gate_.experts; i < n_; ++i) bias_[i] = lowest_value<Acc>();
  }

  // The exponentials' centre and sum over all experts; they themselves too where `kept`.
  void find_sum(bool kept) {
    if (has_sum_ && (has_scores_ || !kept)) return;
    center_ = largest_of_row(x_, n_) * factor_;
    sum_ = sum_exponentials(x_, n_, factor_, center_, kept ? scores_ : nullptr);
    has_sum_ = true;
    has_scores_ = kept;
  }

  bool choose_by_scores() {
    if (gate_.sigmoid) {
      sum_sigmoids(x_, n_, factor_, choice_);
      add_bias(choice_, std::false_type{});
    } else {
      find_sum(true);
      add_bias(scores_, std::true_type{});
    }
    return choose(choice_);
  }

  template <class Divided>
  void add_bias(const Acc* scores, Divided) {
    const Lanes<Acc> sum = every_lane(sum_);
    for (int64_t place = 0; place < n_; place += lanes) {
      Lanes<Acc> score = load_whole(scores + place);
      if constexpr (Divided::value) score = score / sum;
      store_whole(choice_ + place, score + load_whole(bias_ + place));
    }
  }

  bool choose(const Acc* values) {
    if (!limited_) return choose_best(values, n_, gate_.k, room_, place_);
    const int64_t size = gate_.experts / gate_.groups;
    if (gate_.by_two_best) {
      judge_groups<true>(values, gate_.groups, size, judged_);
    } else {
      judge_groups<false>(values, gate_.groups, size, judged_);
    }
    if (!keep_groups(judged_, gate_.groups, gate_.kept_groups, kept_)) return false;
    return gate_.group_mask == -__builtin_inf() ? choose_in_groups(values, size) : choose_masked(values, size);
  }

  // NaN of groups that are not kept counts too.
  static bool all_numbers(const Acc* values, int64_t n) {
    const Lanes<Acc> zero = every_lane(Acc{0}), one = every_lane(Acc{1});
    Lanes<Acc> nan = zero;
    for (int64_t place = 0; place < n; place += lanes) nan = where_nan(load_whole(values + place), one, nan);
    return sum_of_lanes(nan) == 0;
  }

  bool choose_in_groups(const Acc* values, int64_t size) {
    if (!all_numbers(values, n_)) return false;
    const int64_t experts = gate_.kept_groups * size, n = padded_experts(experts);
    for (int64_t group = 0; group < gate_.kept_groups; ++group) {
      const Acc* const from = values + kept_[group] * size;
      Acc* const to = compact_ + group * size;
      over_lanes(size, [&](int64_t place, auto count)
                           __attribute__((always_inline)) { store_some(to + place, count, load_some(from + place, count, Acc{0})); });
    }
    for (int64_t i = experts; i < n; ++i) compact_[i] = lowest_value<Acc>();
    choose_best(compact_, n, gate_.k, room_, place_);
    const auto step = static_cast<int32_t>(size);
    for (int64_t slot = 0; slot < gate_.k; ++slot) place_[slot] = kept_[place_[slot] / step] * step + place_[slot] % step;
    return true;
  }

  bool choose_masked(const Acc* values, int64_t size) {
    if (!all_numbers(values, n_)) return false;
    fill_run(compact_, gate_.experts, static_cast<Acc>(gate_.group_mask));
    for (int64_t i = gate_.experts; i < n_; ++i) compact_[i] = lowest_value<Acc>();
    for (int64_t group = 0; group < gate_.kept_groups; ++group) {
      const int64_t begin = kept_[group] * size;
      for (int64_t i = begin; i < begin + size; ++i) compact_[i] = load_at<Acc>(values, i);
    }
    return choose_best(compact_, n_, gate_.k, room_, place_);
  }

  void weigh(bool fine) {
    if (!fine) {
      for (Acc& weight : weight_) weight = static_cast<Acc>(__builtin_nan(""));
      return;
    }
    for (int64_t slot = 0; slot < most_chosen; ++slot)
      weight_[slot] = slot < gate_.k ? load_at<Acc>(x_, place_[slot]) : lowest_value<Acc>();
    if (gate_.k <= lanes) {
      weigh_lanes(std::integral_constant<int, 1>{});
    } else {
      weigh_lanes(std::integral_constant<int, 2>{});
    }
  }

  // From chosen logits, -inf in the padding, to their weights.
  template <int parts>
  void weigh_lanes(std::integral_constant<int, parts>) {
    Lanes<Acc> w[parts];
    const Lanes<Acc> factor = every_lane(factor_), scale = every_lane(static_cast<Acc>(gate_.scale));
    for (int part = 0; part < parts; ++part) w[part] = load_whole(weight_ + part * lanes) * factor;
    const bool softmax_of_chosen = !gate_.sigmoid && gate_.renormalize && gate_.eps == 0;
    if (gate_.sigmoid) {
      for (int part = 0; part < parts; ++part) w[part] = logistic(w[part]);
    } else {
      Acc center;
      if (softmax_of_chosen) {
        center = by_scores_ ? largest_of_lanes(parts == 1 ? w[0] : larger(w[0], w[parts - 1])) : weight_[0] * factor_;
      } else {
        find_sum(gate_.log_sum_exp != nullptr);
        center = center_;
      }
      const Lanes<Acc> centers = every_lane(center);
      for (int part = 0; part < parts; ++part) w[part] = exponential_below_zero(w[part] - centers);
      if (!softmax_of_chosen) {
        for (int part = 0; part < parts; ++part) w[part] = w[part] / every_lane(sum_);
      }
    }
    if (gate_.renormalize) {
      const Acc sum = sum_of_lanes(parts == 1 ? w[0] : w[0] + w[parts - 1]) + static_cast<Acc>(gate_.eps);
      for (int part = 0; part < parts; ++part) w[part] = w[part] / every_lane(sum);
    }
    for (int part = 0; part < parts; ++part) store_whole(weight_ + part * lanes, with_one_nan(w[part] * scale));
  }

  void store(int64_t row) const {
    const int64_t first = row * gate_.k;
    for (int64_t slot = 0; slot < gate_.k; ++slot) store_at(gate_.weight, first + slot, weight_[slot]);
    if (gate_.long_ids) {
      for (int64_t slot = 0; slot < gate_.k; ++slot) store_at<int64_t>(gate_.ids, first + slot, place_[slot]);
    } else {
      for (int64_t slot = 0; slot < gate_.k; ++slot) store_at(gate_.ids, first + slot, place_[slot]);
    }
  }

  void add_statistics(int64_t row, Acc* prob_sum) {
    Acc total = 0;
    if (gate_.sigmoid) {
      find_sum(false);
      total = sum_sigmoids(x_, n_, factor_, scores_);
      has_scores_ = false;
    }
    if (!gate_.sigmoid || total < least_sigmoid_sum<Acc>) {
      find_sum(true);
      total = sum_;
    }
    const Lanes<Acc> share = every_lane(Acc{1} / total);
    over_lanes(gate_.experts, [&](int64_t place, auto count) __attribute__((always_inline)) {
      const Lanes<Acc> added = load_whole(scores_ + place) * share;
      store_some(prob_sum + place, count, load_some(prob_sum + place, count, Acc{0}) + added);
    });
    const bool infinite = center_ == bits_infinity<Acc>() || center_ == lowest_value<Acc>();
    const Acc found = static_cast<Acc>(static_cast<double>(center_) + std::log(static_cast<double>(sum_)));
    const Acc nan = static_cast<Acc>(__builtin_nan(""));
    store_at(gate_.log_sum_exp, row, infinite && all_numbers(x_, n_) ? center_ : found == found ? found : nan);
  }

  const TopKGate& gate_;
  const int64_t n_;
  const Acc factor_;
  const bool by_scores_, limited_;
  Acc *row_, *bias_, *choice_, *scores_, *compact_, *judged_;
  Candidates<Acc> room_;
  int32_t* kept_;
  const Acc* x_;
  Acc center_, sum_ = 1;
  bool has_sum_, has_scores_;
  int32_t place_[most_chosen];
  Acc weight_[most_chosen];
};

template <class Acc>
void run_rows(const TopKGate& gate, int64_t begin, int64_t end, int32_t* counts, Acc* prob_sum, void* scratch) {
  GateRows<Acc> rows(gate, static_cast<Acc*>(scratch));
  if (gate.log_sum_exp != nullptr) {
    for (int64_t i = 0; i < gate.experts; ++i) counts[i] = 0;
    fill_run(prob_sum, gate.experts, Acc{0});
  }
  for (int64_t row = begin; row < end; ++row) rows.run(row, counts, prob_sum);
  if (gate.log_sum_exp == nullptr) return;
  over_lanes(gate.experts, [&](int64_t place, auto count) __attribute__((always_inline)) {
    store_some(prob_sum + place, count, with_one_nan(load_some(prob_sum + place, count, Acc{0})));
  });
}

void forward(bool wide, const TopKGate& gate, int64_t begin, int64_t end, int32_t* counts, void* prob_sum, void* scratch) {
  if (wide) {
    run_rows(gate, begin, end, counts, static_cast<double*>(prob_sum), scratch);
  } else {
    run_rows(gate, begin, end, counts, static_cast<float*>(prob_sum), scratch);
  }
}

const TopKGateLoops table = {forward};

}  // namespace

TASKLOOM_EXPORT_LOOPS(TopKGateLoops, topk_gate_loops, table)

}  // namespace taskloom
