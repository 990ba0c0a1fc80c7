// topk_gate's backward: CUDA kernel. Bytes moved: the gradient out and, where the gradient of a row's logits depends on all of them, the
// logits in; the chosen experts' weights and gradients. A warp takes a row, and its scores are computed again in registers.
#include <algorithm>

#include "common/stable_gaps.h"
#include "gating/gate_arguments.h"
#include "gating/warp_rows.h"

namespace taskloom {
namespace {

constexpr int64_t slope_warps = 4;

struct DeviceSlopes {
  DeviceValues logits, out;
  int64_t row_stride, tokens;
  int experts, k;
  bool long_ids, sigmoid, softmax_of_chosen, renormalize;
  const void *ids, *weight, *for_weight, *for_prob_sum, *for_lse;  // the last three may be null
  double scale, eps, factor;
};

template <class Acc, int per_lane>
class WarpSlopes {
 public:
  __device__ WarpSlopes(const DeviceSlopes& gate, int64_t row, int lane)
      : gate_(gate),
        lane_(lane),
        row_number_(row),
        sums_(gate.for_prob_sum != nullptr),
        dense_weights_(gate.for_weight != nullptr && !gate.sigmoid && !gate.softmax_of_chosen),
        dense_(dense_weights_ || gate.for_lse != nullptr || (sums_ && !gate.sigmoid)),
        row_(gate.logits, row * gate.row_stride, dense_ || sums_ ? gate.experts : 0, lane) {}

  __device__ void run() {
    factor_ = static_cast<Acc>(gate_.factor);
    if (dense_) find_softmax();
    read_chosen();
    Acc added = 0;
    if (gate_.for_weight != nullptr) added = gate_.softmax_of_chosen ? renormalized_slope() : score_slope();
    if (gate_.for_lse != nullptr) inner_ = inner_ - static_cast<const Acc*>(gate_.for_lse)[row_number_];
    if (dense_weights_) inner_ = inner_ + warp_sum(added);
    if (sums_ && !gate_.sigmoid) inner_ = inner_ + inner_product();
    if (sums_ && gate_.sigmoid) {
      sigmoids_ = sigmoid_sum();
      softmax_for_sigmoids_ = sigmoids_ < least_sigmoid_sum<Acc>;
      if (softmax_for_sigmoids_) find_softmax();
      sigmoid_inner_ = softmax_for_sigmoids_ ? inner_product() : inner_product() / sigmoids_;
    }
    const int64_t first = row_number_ * gate_.experts;
    each_expert<per_lane>(gate_.experts, lane_, [&](int i, int expert) {
      store_entry(gate_.out, first + expert, slope(row_.logit(i, expert), expert) * factor_);
    });
    __syncwarp();
    // A chosen expert's is written again, with what its weight adds, so that it is rounded once.
    if (chosen_ >= 0) {
      const Acc x = dense_ || sums_ ? load_entry<Acc>(gate_.logits, row_.first + chosen_) : Acc{0};
      store_entry(gate_.out, first + chosen_, (slope(x, chosen_) + added) * factor_);
    }
  }

 private:
  __device__ void find_softmax() {
    center_ = row_.largest() * factor_;
    share_ = Acc{1} / row_.sum_exponentials(factor_, center_);
  }

  // Lane `slot` holds the expert of that rank, its weight and the weight's gradient; the others an expert that is none.
  __device__ void read_chosen() {
    chosen_ = -1;
    if (lane_ >= gate_.k || gate_.for_weight == nullptr) return;
    const int64_t at = row_number_ * gate_.k + lane_;
    const int64_t expert = gate_.long_ids ? static_cast<const int64_t*>(gate_.ids)[at] : static_cast<const int32_t*>(gate_.ids)[at];
    // What is no expert would be written outside of the row.
    if (expert < 0 || expert >= gate_.experts) return;
    chosen_ = static_cast<int>(expert);
    weight_ = static_cast<const Acc*>(gate_.weight)[at];
    given_ = static_cast<const Acc*>(gate_.for_weight)[at];
  }

  __device__ Acc renormalized_slope() const {
    const Acc inner = warp_sum(weight_ * given_), scale = static_cast<Acc>(gate_.scale);
    return weight_ * (given_ - (scale == 0 ? Acc{0} : inner / scale));
  }

  __device__ Acc score_slope() const {
    Acc score = 0;
    if (chosen_ >= 0) {
      const Acc z = load_entry<Acc>(gate_.logits, row_.first + chosen_) * factor_;
      score = gate_.sigmoid ? exact_sigmoid(z) : exact_exp(z - center_) * share_;
    }
    Acc slope = given_ * static_cast<Acc>(gate_.scale);
    if (gate_.renormalize) {
      const Acc sum = warp_sum(score) + static_cast<Acc>(gate_.eps);
      slope = (slope - warp_sum(slope * score) / sum) / sum;
    }
    if (weight_ != weight_) slope = weight_;
    if (chosen_ < 0) return 0;
    slope = slope * score;
    return gate_.sigmoid ? slope * (Acc{1} - score) : slope;
  }

  __device__ Acc probability(Acc x) const { return exact_exp(x * factor_ - center_) * share_; }

  // The gradient of an expert's logit, but for what its weight adds and for the temperature.
  __device__ Acc slope(Acc x, int expert) const {
    const Acc d = sums_ ? static_cast<const Acc*>(gate_.for_prob_sum)[expert] : Acc{0};
    Acc found = dense_ ? probability(x) * ((gate_.sigmoid ? Acc{0} : d) - inner_) : Acc{0};
    if (softmax_for_sigmoids_) {
      found = found + probability(x) * (d - sigmoid_inner_);
    } else if (sums_ && gate_.sigmoid) {
      const Acc score = exact_sigmoid(x * factor_);
      found = found + (d - sigmoid_inner_) / sigmoids_ * (score * (Acc{1} - score));
    }
    return found;
  }

  // Of the sums' gradient with the probabilities, or with the sigmoids.
  __device__ Acc inner_product() const {
    Acc sum = 0;
    each_expert<per_lane>(gate_.experts, lane_, [&](int i, int expert) {
      const Acc x = row_.logit(i, expert), share = gate_.sigmoid && !softmax_for_sigmoids_ ? exact_sigmoid(x * factor_) : probability(x);
      sum = sum + share * static_cast<const Acc*>(gate_.for_prob_sum)[expert];
    });
    return warp_sum(sum);
  }

  __device__ Acc sigmoid_sum() const {
    Acc sum = 0;
    each_expert<per_lane>(gate_.experts, lane_, [&](int i, int expert) { sum = sum + exact_sigmoid(row_.logit(i, expert) * factor_); });
    return warp_sum(sum);
  }

  const DeviceSlopes& gate_;
  const int lane_;
  const int64_t row_number_;
  const bool sums_, dense_weights_, dense_;  // dense: whether every logit has a gradient by the softmax over all
  const WarpRow<Acc, per_lane> row_;
  Acc factor_ = 1, center_ = 0, share_ = 0, inner_ = 0, sigmoids_ = 1, sigmoid_inner_ = 0;
  bool softmax_for_sigmoids_ = false;
  int chosen_ = -1;
  Acc weight_ = 0, given_ = 0;
};

template <class Acc, int per_lane>
__global__ void __launch_bounds__(slope_warps* warp_size, 1) topk_gate_backward_kernel(DeviceSlopes gate) {
  const int64_t row = grid_index() / warp_size;
  if (row < gate.tokens) WarpSlopes<Acc, per_lane>(gate, row, static_cast<int>(threadIdx.x) % warp_size).run();
}

template <class Acc>
void run_slopes(const Tensor& where, const DeviceSlopes& gate) {
  const auto blocks = static_cast<unsigned>((gate.tokens + slope_warps - 1) / slope_warps);
  const auto threads = static_cast<unsigned>(std::clamp<int64_t>(gate.tokens, 1, slope_warps) * warp_size);
  with_registers(gate.experts, sizeof(Acc) == 4, [&](auto per_lane) {
    constexpr int registers = sizeof(Acc) == 4 ? decltype(per_lane)::value : 0;
    launch(where, {dim3(blocks), threads}, topk_gate_backward_kernel<Acc, registers>, gate);
  });
}

Tensor topk_gate_backward_cuda(const Tensor& logits, const Tensor& ids, const Tensor& weight, OptionalTensor dweight,
                               OptionalTensor dprob_sum, OptionalTensor dlse, Text score, bool renormalize, double scale, double eps,
                               double temperature) {
  for (const Tensor& one : {logits, ids, weight}) check_on_device(one);
  for (const OptionalTensor& one : {dweight, dprob_sum, dlse}) {
    if (one) check_on_device(*one);
  }
  const GateSlopeTensors given(logits, ids, weight, dweight, dprob_sum, dlse);
  Tensor out = torch::stable::new_empty(logits, {given.shape.tokens, given.shape.experts}, logits.scalar_type());
  const bool sigmoid = is_sigmoid(score.value);
  const TopKGateBackward view = given.view(elements_of(given.logits, "logits"), sigmoid, renormalize, scale, eps, 1 / temperature, out);
  const DeviceSlopes gate{{const_cast<void*>(view.logits.data), view.logits.dtype},
                          device_values(out, "out"),
                          view.row_stride,
                          given.shape.tokens,
                          static_cast<int>(view.experts),
                          static_cast<int>(view.k),
                          view.long_ids,
                          sigmoid,
                          !sigmoid && renormalize && eps == 0,
                          renormalize,
                          view.ids,
                          view.weight,
                          view.for_weight,
                          view.for_prob_sum,
                          view.for_lse,
                          scale,
                          eps,
                          view.inverse_temperature};
  given.wide ? run_slopes<double>(logits, gate) : run_slopes<float>(logits, gate);
  return out;
}

}  // namespace

TASKLOOM_CUDA_OPS(m) { m.impl("topk_gate_backward", TORCH_BOX(&topk_gate_backward_cuda)); }

}  // namespace taskloom
