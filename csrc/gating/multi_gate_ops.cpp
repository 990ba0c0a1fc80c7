// multi_gate_combine and its backward: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/stable_gaps.h"
#include "common/thread_scratch.h"
#include "gating/multi_gate.h"
#include "routed/window_tensors.h"

namespace taskloom {
namespace {

constexpr int64_t entries_per_piece = 1 << 16;

// A bool table [rows, columns] as the lists of its rows.
class Lists {
 public:
  Lists(int64_t rows, int64_t columns) : begin_(static_cast<size_t>(rows) + 1), columns_(columns) {}

  template <class Holds>
  void fill(const Holds& holds) {
    for (size_t row = 0; row + 1 < begin_.size(); ++row) {
      for (int64_t column = 0; column < columns_; ++column) {
        if (holds(static_cast<int64_t>(row), column)) held_.push_back(static_cast<int32_t>(column));
      }
      begin_[row + 1] = static_cast<int64_t>(held_.size());
    }
  }

  RowLists view() const { return {begin_.data(), held_.data()}; }

 private:
  std::vector<int64_t> begin_;
  int64_t columns_;
  std::vector<int32_t> held_;
};

// The entries of a mask [gates, experts], or no data where there is none; every gate has to have an expert.
class Mask {
 public:
  Mask(const OptionalTensor& mask, int64_t gates, int64_t experts, const char* name) : experts_(experts) {
    if (!mask) return;
    check_dtype(*mask, ScalarType::Bool, name, "bool");
    check_numel(*mask, gates * experts, name, "the gates and experts of logits");
    kept_ = contiguous_of(*mask);
    data_ = static_cast<const bool*>(kept_->const_data_ptr());
    for (int64_t g = 0; g < gates; ++g) {
      STD_TORCH_CHECK(std::find(data_ + g * experts, data_ + (g + 1) * experts, true) != data_ + (g + 1) * experts, name,
                      ": expected an expert for every gate, got none for gate ", g);
    }
  }

  bool holds(int64_t gate, int64_t expert) const { return data_ == nullptr || data_[gate * experts_ + expert]; }

 private:
  OptionalTensor kept_;
  const bool* data_ = nullptr;
  int64_t experts_;
};

// One call's tensors, contiguous, and the lists of its masks.
struct Given {
  int64_t batch, gates, experts, width;
  Tensor logits, z;
  OptionalElements self_logits;
  Mask mask, self_mask;
  Lists read, own, either, readers;
  bool with_self, sigmoid, wide;

  Given(const Tensor& said, const Tensor& values, const OptionalTensor& readable, const std::string& activation,
        const OptionalTensor& self_said, const OptionalTensor& self_readable)
      : batch(checked_batch(said, values)),
        gates(said.size(1)),
        experts(said.size(2)),
        width(values.size(2)),
        logits(contiguous_of(said)),
        z(contiguous_of(values)),
        self_logits(self_said, said.numel(), "self_logits"),
        mask(readable, gates, experts, "mask"),
        self_mask(self_readable, gates, experts, "self_mask"),
        read(gates, experts),
        own(gates, experts),
        either(gates, experts),
        readers(experts, gates),
        with_self(self_said.has_value()),
        sigmoid(activation == "sigmoid"),
        wide(said.scalar_type() == ScalarType::Double || values.scalar_type() == ScalarType::Double || is_double(self_said)) {
    STD_TORCH_CHECK(sigmoid || activation == "softmax", "activation: expected softmax or sigmoid, got ", activation);
    STD_TORCH_CHECK(with_self == self_readable.has_value(), "self_logits, self_mask: expected both or none");
    const auto reads = [&](int64_t g, int64_t e) { return mask.holds(g, e) || (with_self && self_mask.holds(g, e)); };
    read.fill([&](int64_t g, int64_t e) { return mask.holds(g, e); });
    if (with_self) own.fill([&](int64_t g, int64_t e) { return self_mask.holds(g, e); });
    either.fill(reads);
    readers.fill([&](int64_t e, int64_t g) { return reads(g, e); });
  }

  static int64_t checked_batch(const Tensor& said, const Tensor& values) {
    STD_TORCH_CHECK(said.dim() == 3 && values.dim() == 3 && said.size(0) == values.size(0) && said.size(2) == values.size(1),
                    "logits, z: expected shapes [B, G, E] and [B, E, D] of one B and one E");
    STD_TORCH_CHECK(said.size(1) > 0 && said.size(2) > 0, "logits: expected at least one gate and one expert");
    return said.size(0);
  }

  MultiGate view(void* out, void* probs) const {
    return {elements_of(logits, "logits"),
            elements_of(z, "z"),
            self_logits.view(),
            gates,
            experts,
            width,
            read.view(),
            own.view(),
            either.view(),
            readers.view(),
            sigmoid,
            out,
            probs};
  }

  // Calls work(first sample, samples, scratch) on torch's threads.
  template <class F>
  void over_pieces(const F& work) const {
    // Sixteen samples at a time share the work on their weights.
    const int64_t step = 16 * std::max<int64_t>(1, entries_per_piece / (16 * (gates + experts) * (width + gates)));
    const int64_t bytes = multi_gate_scratch(gates, experts, width) * (wide ? 8 : 4);
    torch_parallel()(chunk_count(batch, step), [&](int64_t piece) {
      const ThreadScratch scratch(ScratchUse::positions, bytes);
      work(piece * step, std::min(step, batch - piece * step), scratch.data());
    });
  }
};

std::tuple<Tensor, Tensor> multi_gate_combine_cpu(const Tensor& logits, const Tensor& z, OptionalTensor mask, Text activation,
                                                  OptionalTensor self_logits, OptionalTensor self_mask) {
  const Given given(logits, z, mask, activation.value, self_logits, self_mask);
  Tensor out = empty_cpu({given.batch, given.gates, given.width}, z.scalar_type());
  Tensor probs = empty_of_shape(logits, arithmetic_type(given.wide));
  const MultiGate view = given.view(out.mutable_data_ptr(), probs.mutable_data_ptr());
  given.over_pieces([&](int64_t first, int64_t n, void* scratch) { multi_gate_loops().forward(given.wide, view, first, n, scratch); });
  return {out, probs};
}

std::tuple<Tensor, Tensor, Tensor> multi_gate_combine_backward_cpu(const Tensor& gradient, OptionalTensor for_probs, const Tensor& logits,
                                                                   const Tensor& z, OptionalTensor mask, Text activation,
                                                                   OptionalTensor self_logits, OptionalTensor self_mask, bool for_logits,
                                                                   bool for_z, bool for_self) {
  const Given given(logits, z, mask, activation.value, self_logits, self_mask);
  check_numel(gradient, given.batch * given.gates * given.width, "gradient", "the op's result");
  const Tensor slopes = contiguous_of(gradient);
  const OptionalElements probs(for_probs, logits.numel(), "for_probs");
  for_self = for_self && given.with_self;
  const auto made = [](bool wanted, const Tensor& like) {
    return wanted ? empty_of_shape(like, like.scalar_type()) : empty_cpu({0}, like.scalar_type());
  };
  Tensor dlogits = made(for_logits, logits), dz = made(for_z, z), dself = made(for_self, self_logits ? *self_logits : logits);
  const auto place = [](bool wanted, Tensor& tensor) { return wanted ? tensor.mutable_data_ptr() : nullptr; };
  const MultiGateBackward view{given.view(nullptr, nullptr), given.readers.view(), elements_of(slopes, "gradient"), probs.view(),
                               place(for_logits, dlogits),   place(for_z, dz),     place(for_self, dself)};
  given.over_pieces([&](int64_t first, int64_t n, void* scratch) { multi_gate_loops().backward(given.wide, view, first, n, scratch); });
  return {dlogits, dz, dself};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("multi_gate_combine", TORCH_BOX(&multi_gate_combine_cpu));
  m.impl("multi_gate_combine_backward", TORCH_BOX(&multi_gate_combine_backward_cpu));
}

}  // namespace taskloom
