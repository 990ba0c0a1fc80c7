// batch_norm_silu and its backward: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "common/stable_gaps.h"
#include "common/thread_scratch.h"
#include "gating/batch_norm_silu.h"
#include "routed/window_tensors.h"

namespace taskloom {
namespace {

constexpr int64_t columns_of_a_join = 1024;

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(false, "activation: expected none, relu or silu, got ", name);
  return Activation::none;
}

// [rows, experts, features] whose features lie next to each other.
struct Stacked {
  Tensor tensor;
  int64_t row_stride, expert_stride;

  explicit Stacked(const Tensor& given) : tensor(given.stride(2) == 1 || given.size(2) == 1 ? given : torch::stable::contiguous(given)) {
    row_stride = tensor.stride(0);
    expert_stride = tensor.stride(1);
  }
  bool is_dense(int64_t features) const { return expert_stride == features; }
};

// A vector [experts, features] of one direction, in the dtype of the arithmetic.
Tensor loaded(const OptionalTensor& given, double missing, int64_t numel, bool wide, const char* name) {
  const OptionalElements elements(given, numel, name);
  Tensor values = empty_cpu({numel}, arithmetic_type(wide));
  batch_norm_silu_loops().load(wide, elements.view(), missing, numel, values.mutable_data_ptr());
  return values;
}

// One call's tensors.
struct Given {
  int64_t rows, experts, features;
  bool wide;
  Stacked z;
  Tensor weight, bias, rstd;
  Activation activation;
  double eps;

  Given(const Tensor& values, const OptionalTensor& factors, const OptionalTensor& addends, double added, const std::string& name,
        bool is_wide)
      : rows(rows_of(values)),
        experts(values.size(1)),
        features(values.size(2)),
        wide(is_wide),
        z(values),
        weight(loaded(factors, 1, experts * features, wide, "weight")),
        bias(loaded(addends, 0, experts * features, wide, "bias")),
        rstd(empty_cpu({experts * features}, arithmetic_type(wide))),
        activation(activation_of(name)),
        eps(added) {}

  static int64_t rows_of(const Tensor& values) {
    STD_TORCH_CHECK(values.dim() == 3, "z: expected three dimensions, got ", values.dim());
    return values.size(0);
  }

  // Experts without gaps between them are one: the wider its columns, the longer the runs that are read.
  BatchNormSilu view(Tensor& mean, Tensor& var, void* y, bool dense) {
    const int64_t experts_seen = dense ? 1 : experts, features_seen = dense ? experts * features : features;
    return {elements_of(z.tensor, "z"),
            z.row_stride,
            z.expert_stride,
            rows,
            experts_seen,
            features_seen,
            weight.const_data_ptr(),
            bias.const_data_ptr(),
            mean.mutable_data_ptr(),
            var.mutable_data_ptr(),
            rstd.mutable_data_ptr(),
            eps,
            activation,
            y};
  }
};

// The rows of each expert's columns in pieces, and their sums over rows, two for each piece and column.
class Pieces {
 public:
  Pieces(const BatchNormSilu& view, bool wide)
      : rows_(view.rows), features_(view.features), columns_(view.experts * view.features), wide_(wide) {
    groups_ = chunk_count(features_, batch_norm_columns);
    parts_ = chunk_count(rows_, batch_norm_rows);
    count_ = view.experts * groups_ * parts_;
  }

  int64_t parts() const { return parts_; }
  int64_t stride() const { return 2 * columns_; }

  // Calls body(piece, place of its sums, scratch of `blocks` blocks) for each piece.
  template <class F>
  void each(int64_t blocks, const F& body) const {
    torch_parallel()(count_, [&](int64_t index) {
      const int64_t part = index / (count_ / parts_), others = index % (count_ / parts_), expert = others / groups_,
                    first_row = part * batch_norm_rows, first = others % groups_ * batch_norm_columns;
      const BatchNormPiece piece{expert, first_row, std::min(batch_norm_rows, rows_ - first_row), first,
                                 std::min(batch_norm_columns, features_ - first)};
      const ThreadScratch scratch(ScratchUse::positions, blocks * batch_norm_block * (wide_ ? 8 : 4));
      body(piece, part * stride() + expert * features_ + first, scratch.data());
    });
  }

  // Calls body(column, n) for runs of columns.
  template <class F>
  void each_join(const F& body) const {
    torch_parallel()(chunk_count(columns_, columns_of_a_join), [&](int64_t index) {
      const int64_t column = index * columns_of_a_join;
      body(column, std::min(columns_of_a_join, columns_ - column));
    });
  }

 private:
  int64_t rows_, features_, columns_, groups_, parts_, count_;
  bool wide_;
};

std::tuple<Tensor, Tensor, Tensor> batch_norm_silu_cpu(const Tensor& z, OptionalTensor weight, OptionalTensor bias,
                                                       OptionalTensor running_mean, OptionalTensor running_var, double eps,
                                                       Text activation) {
  const bool wide =
      z.scalar_type() == ScalarType::Double || is_double(weight) || is_double(bias) || is_double(running_mean) || is_double(running_var);
  Given given(z, weight, bias, eps, activation.value, wide);
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), "running_mean, running_var: expected both or none");
  const int64_t columns = given.experts * given.features;
  Tensor y = empty_of_shape(z, z.scalar_type());
  Tensor mean = empty_cpu({given.experts, given.features}, arithmetic_type(wide)),
         var = empty_cpu({given.experts, given.features}, arithmetic_type(wide));
  const BatchNormSilu view = given.view(mean, var, y.mutable_data_ptr(), given.z.is_dense(given.features));
  const Pieces pieces(view, wide);
  const BatchNormSiluLoops& loops = batch_norm_silu_loops();
  if (running_mean) {
    loops.load(wide, OptionalElements(running_mean, columns, "running_mean").view(), 0, columns, view.mean);
    loops.load(wide, OptionalElements(running_var, columns, "running_var").view(), 0, columns, view.var);
    loops.invert(wide, view.var, eps, columns, view.rstd);
  } else {
    STD_TORCH_CHECK(given.rows > 1, "z: expected at least two rows for a batch's statistics, got ", given.rows);
    Tensor sums = empty_cpu({pieces.parts(), pieces.stride()}, ScalarType::Double);
    auto* const means = static_cast<double*>(sums.mutable_data_ptr());
    double* const squares = means + columns;
    pieces.each(1, [&](const BatchNormPiece& piece, int64_t place, void* scratch) {
      loops.moments(wide, view, piece, means + place, squares + place, scratch);
    });
    pieces.each_join([&](int64_t column, int64_t n) { loops.join_moments(wide, view, column, n, means, squares, pieces.stride()); });
  }
  pieces.each(2, [&](const BatchNormPiece& piece, int64_t, void* scratch) { loops.apply(wide, view, piece, scratch); });
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_silu_backward_cpu(const Tensor& gradient, const Tensor& z, OptionalTensor weight,
                                                                OptionalTensor bias, const Tensor& mean, const Tensor& var, bool running,
                                                                double eps, Text activation, bool for_z, bool for_weight, bool for_bias) {
  const bool wide = mean.scalar_type() == ScalarType::Double;
  Given given(z, weight, bias, eps, activation.value, wide);
  const int64_t columns = given.experts * given.features;
  STD_TORCH_CHECK(mean.scalar_type() == arithmetic_type(wide) && var.scalar_type() == mean.scalar_type(),
                  "mean, var: expected the dtype of the arithmetic");
  check_numel(mean, columns, "mean", "a row of z");
  check_numel(var, columns, "var", "a row of z");
  STD_TORCH_CHECK(
      gradient.dim() == 3 && gradient.size(0) == given.rows && gradient.size(1) == given.experts && gradient.size(2) == given.features,
      "gradient: expected the shape of z");
  const Stacked slopes(gradient);
  Tensor middle = contiguous_of(mean), variance = contiguous_of(var);
  Tensor dz = for_z ? empty_of_shape(z, z.scalar_type()) : empty_cpu({0}, z.scalar_type());
  Tensor dweight = empty_cpu({given.experts, given.features}, arithmetic_type(wide)),
         dbias = empty_cpu({given.experts, given.features}, arithmetic_type(wide));
  const bool dense = given.z.is_dense(given.features) && slopes.is_dense(given.features);
  const BatchNormSiluBackward view{given.view(middle, variance, for_z ? dz.mutable_data_ptr() : nullptr, dense),
                                   elements_of(slopes.tensor, "gradient"),
                                   slopes.row_stride,
                                   slopes.expert_stride,
                                   running,
                                   dweight.mutable_data_ptr(),
                                   dbias.mutable_data_ptr()};
  const BatchNormSiluLoops& loops = batch_norm_silu_loops();
  loops.invert(wide, view.forward.var, eps, columns, view.forward.rstd);
  const Pieces pieces(view.forward, wide);
  Tensor sums = empty_cpu({pieces.parts(), pieces.stride()}, ScalarType::Double);
  auto* const plain = static_cast<double*>(sums.mutable_data_ptr());
  double* const product = plain + columns;
  pieces.each(3, [&](const BatchNormPiece& piece, int64_t place, void* scratch) {
    loops.sums(wide, view, piece, plain + place, product + place, scratch);
  });
  pieces.each_join([&](int64_t column, int64_t n) { loops.join_sums(wide, view, column, n, plain, product, pieces.stride()); });
  if (for_z && !running) {
    pieces.each(3, [&](const BatchNormPiece& piece, int64_t, void* scratch) { loops.finish(wide, view, piece, scratch); });
  }
  const auto result = [](const Tensor& sums, const OptionalTensor& like, bool wanted, ScalarType otherwise) {
    if (!wanted || !like) return empty_cpu({0}, like ? like->scalar_type() : otherwise);
    return sums.scalar_type() == like->scalar_type() ? sums : torch::stable::to(sums, like->scalar_type());
  };
  return {dz, result(dweight, weight, for_weight, z.scalar_type()), result(dbias, bias, for_bias, z.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("batch_norm_silu", TORCH_BOX(&batch_norm_silu_cpu));
  m.impl("batch_norm_silu_backward", TORCH_BOX(&batch_norm_silu_backward_cpu));
}

}  // namespace taskloom
