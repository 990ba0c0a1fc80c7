// CPU loops of topk_gate's backward, compiled once per CPU level, with the same bits at all of them.
#include "gating/gate_rows.h"
#include "gating/topk_gate.h"

namespace taskloom {
namespace {

template <class Acc>
class GateSlopes {
 public:
  GateSlopes(const TopKGateBackward& gate, Acc* scratch)
      : gate_(gate),
        n_(padded_experts(gate.experts)),
        factor_(static_cast<Acc>(gate.inverse_temperature)),
        softmax_of_chosen_(!gate.sigmoid && gate.renormalize && gate.eps == 0) {
    const int64_t row = n_ + gate_row_step;
    row_ = scratch;
    scores_ = row_ + row;
    out_ = scores_ + row;
    sums_ = out_ + row;
    if (gate.for_prob_sum == nullptr) return;
    load_block(dtype_of_arithmetic<Acc>, gate.for_prob_sum, 0, gate.experts, sums_);
    for (int64_t i = gate.experts; i < n_; ++i) sums_[i] = 0;
  }

  void run(int64_t row) {
    const bool dense_softmax = !gate_.sigmoid && !softmax_of_chosen_ && gate_.for_weight != nullptr;
    const bool sums = gate_.for_prob_sum != nullptr, lse = gate_.for_lse != nullptr;
    row_number_ = row;
    to_ = target_run<Acc>(gate_.logits.dtype, gate_.for_logits, row * gate_.experts, out_);
    x_ = nullptr;
    Acc slopes[most_chosen];
    if (dense_softmax || lse || (sums && !gate_.sigmoid)) {
      read_row();
      const Acc center = largest_of_row(x_, n_) * factor_;
      inverse_sum_ = Acc{1} / sum_exponentials(x_, n_, factor_, center, scores_);
      Acc inner = lse ? -load_at<Acc>(gate_.for_lse, row) : Acc{0};
      if (dense_softmax) inner = inner + chosen_softmax_slopes(slopes);
      if (sums && !gate_.sigmoid) inner = inner + products(sums_, scores_) * inverse_sum_;
      fill_softmax(inner, sums && !gate_.sigmoid);
      if (dense_softmax) add_chosen(slopes);
    } else {
      fill_run(to_, gate_.experts, Acc{0});
    }
    if (sums && gate_.sigmoid) add_sigmoid_sums();
    if (gate_.for_weight != nullptr && !dense_softmax) {
      softmax_of_chosen_ ? renormalized_slopes(slopes) : sigmoid_slopes(slopes);
      add_chosen(slopes);
    }
    write_run(gate_.logits.dtype, gate_.for_logits, row * gate_.experts, gate_.experts, to_);
  }

 private:
  void read_row() {
    if (x_ == nullptr) x_ = read_padded(gate_.logits, row_number_ * gate_.row_stride, gate_.experts, row_, lowest_value<Acc>());
  }

  int64_t id(int64_t slot) const { return id_at(gate_.ids, gate_.long_ids, row_number_ * gate_.k + slot); }
  Acc weight(int64_t slot) const { return load_at<Acc>(gate_.weight, row_number_ * gate_.k + slot); }
  Acc slope(int64_t slot) const { return load_at<Acc>(gate_.for_weight, row_number_ * gate_.k + slot); }

  Acc products(const Acc* a, const Acc* b) const {
    Lanes<Acc> sum = every_lane(Acc{0});
    for (int64_t place = 0; place < n_; place += lanes) sum = sum + load_whole(a + place) * load_whole(b + place);
    return sum_of_lanes(sum);
  }

  // The gradient of a row's chosen scores, from these; NaN where the weight is.
  void score_slopes(const Acc* score, Acc* slopes) const {
    const Acc scale = static_cast<Acc>(gate_.scale);
    Acc sum = 0, inner = 0;
    for (int64_t slot = 0; slot < gate_.k; ++slot) {
      slopes[slot] = scale * slope(slot);
      sum = sum + score[slot];
      inner = inner + slopes[slot] * score[slot];
    }
    if (gate_.renormalize) {
      sum = sum + static_cast<Acc>(gate_.eps);
      inner = inner / sum;
      for (int64_t slot = 0; slot < gate_.k; ++slot) slopes[slot] = (slopes[slot] - inner) / sum;
    }
    for (int64_t slot = 0; slot < gate_.k; ++slot) {
      if (weight(slot) != weight(slot)) slopes[slot] = weight(slot);
    }
  }

  // What is added to the gradients of the chosen logits, times the temperature, in each of the three ways; the first returns the sum.
  Acc chosen_softmax_slopes(Acc* slopes) const {
    Acc score[most_chosen], sum = 0;
    for (int64_t slot = 0; slot < gate_.k; ++slot) score[slot] = scores_[id(slot)] * inverse_sum_;
    score_slopes(score, slopes);
    for (int64_t slot = 0; slot < gate_.k; ++slot) {
      slopes[slot] = slopes[slot] * score[slot];
      sum = sum + slopes[slot];
    }
    return sum;
  }

  void renormalized_slopes(Acc* slopes) const {
    Acc inner = 0;
    for (int64_t slot = 0; slot < gate_.k; ++slot) inner = inner + weight(slot) * slope(slot);
    // Where the scale is 0 in this arithmetic, so are the weights.
    const Acc scale = static_cast<Acc>(gate_.scale);
    inner = scale == 0 ? Acc{0} : inner / scale;
    for (int64_t slot = 0; slot < gate_.k; ++slot) slopes[slot] = weight(slot) * (slope(slot) - inner);
  }

  void sigmoid_slopes(Acc* slopes) const {
    Acc score[most_chosen];
    for (int64_t slot = 0; slot < most_chosen; ++slot) score[slot] = 0;
    for (int64_t slot = 0; slot < gate_.k; ++slot) load_block(gate_.logits.dtype, gate_.logits.data, logit_place(slot), 1, score + slot);
    for (int64_t place = 0; place < most_chosen; place += lanes) {
      store_whole(score + place, logistic(load_whole(score + place) * every_lane(factor_)));
    }
    score_slopes(score, slopes);
    for (int64_t slot = 0; slot < gate_.k; ++slot) slopes[slot] = slopes[slot] * score[slot] * (Acc{1} - score[slot]);
  }

  int64_t logit_place(int64_t slot) const { return row_number_ * gate_.row_stride + id(slot); }

  void add_chosen(const Acc* slopes) {
    for (int64_t slot = 0; slot < gate_.k; ++slot) store_at(to_, id(slot), load_at<Acc>(to_, id(slot)) + slopes[slot] * factor_);
  }

  // p (d - inner) by lanes, for the softmax p and the gradient d of its sums, or 0.
  void fill_softmax(Acc inner, bool sums) {
    const Lanes<Acc> share = every_lane(inverse_sum_ * factor_), inners = every_lane(inner);
    over_lanes(gate_.experts, [&](int64_t place, auto count) __attribute__((always_inline)) {
      const Lanes<Acc> d = sums ? load_whole(sums_ + place) : every_lane(Acc{0});
      store_some(to_ + place, count, load_whole(scores_ + place) * share * (d - inners));
    });
  }

  void add_sigmoid_sums() {
    read_row();
    const Acc total = sum_sigmoids(x_, n_, factor_, scores_);
    if (total < least_sigmoid_sum<Acc>) return add_softmax_sums();
    const Lanes<Acc> inner = every_lane(products(sums_, scores_) / total), share = every_lane(factor_ / total), one = every_lane(Acc{1});
    over_lanes(gate_.experts, [&](int64_t place, auto count) __attribute__((always_inline)) {
      const Lanes<Acc> score = load_whole(scores_ + place);
      const Lanes<Acc> added = (load_whole(sums_ + place) - inner) * share * (score * (one - score));
      store_some(to_ + place, count, load_some(to_ + place, count, Acc{0}) + added);
    });
  }

  void add_softmax_sums() {
    const Acc share = Acc{1} / sum_exponentials(x_, n_, factor_, largest_of_row(x_, n_) * factor_, scores_);
    const Lanes<Acc> inner = every_lane(products(sums_, scores_) * share), shares = every_lane(share * factor_);
    over_lanes(gate_.experts, [&](int64_t place, auto count) __attribute__((always_inline)) {
      const Lanes<Acc> added = load_whole(scores_ + place) * shares * (load_whole(sums_ + place) - inner);
      store_some(to_ + place, count, load_some(to_ + place, count, Acc{0}) + added);
    });
  }

  const TopKGateBackward& gate_;
  const int64_t n_;
  const Acc factor_;
  const bool softmax_of_chosen_;
  Acc *row_, *scores_, *out_, *sums_;
  const Acc* x_ = nullptr;
  Acc* to_ = nullptr;
  Acc inverse_sum_ = 0;
  int64_t row_number_ = 0;
};

template <class Acc>
void run_rows(const TopKGateBackward& gate, int64_t begin, int64_t end, void* scratch) {
  GateSlopes<Acc> rows(gate, static_cast<Acc*>(scratch));
  for (int64_t row = begin; row < end; ++row) rows.run(row);
}

void backward(bool wide, const TopKGateBackward& gate, int64_t begin, int64_t end, void* scratch) {
  wide ? run_rows<double>(gate, begin, end, scratch) : run_rows<float>(gate, begin, end, scratch);
}

const TopKGateBackwardLoops table = {backward};

}  // namespace

TASKLOOM_EXPORT_LOOPS(TopKGateBackwardLoops, topk_gate_backward_loops, table)

}  // namespace taskloom
