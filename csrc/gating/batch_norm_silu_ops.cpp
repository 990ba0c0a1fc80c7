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

// What a strip of columns may keep of all rows: more does not stay near a core until it is read again.
constexpr int64_t most_kept = 3 << 20;
// Strips that give many threads work each.
constexpr int64_t many_strips = 32;

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

// The columns of each expert in strips.
struct Strips {
  int64_t features, step, each, count, element;

  Strips(const BatchNormSilu& view, bool wide) : features(view.features), step(batch_norm_columns), element(wide ? 8 : 4) {
    while (step > 16 && view.experts * chunk_count(features, step) < many_strips) step /= 2;
    each = chunk_count(features, step);
    count = view.experts * each;
  }

  int64_t expert(int64_t strip) const { return strip / each; }
  int64_t first(int64_t strip) const { return strip % each * step; }
  int64_t size(int64_t strip) const { return std::min(step, features - first(strip)); }
  int64_t block() const { return batch_norm_rows * batch_norm_columns * element; }
  int64_t all_rows(int64_t rows) const { return rows * step * element; }
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
  const BatchNormSiluLoops& loops = batch_norm_silu_loops();
  if (running_mean) {
    loops.load(wide, OptionalElements(running_mean, columns, "running_mean").view(), 0, columns, view.mean);
    loops.load(wide, OptionalElements(running_var, columns, "running_var").view(), 0, columns, view.var);
    loops.invert(wide, view.var, eps, columns, view.rstd);
    torch_parallel()(columns == 0 ? 0 : chunk_count(given.rows, batch_norm_rows), [&](int64_t piece) {
      const ThreadScratch scratch(ScratchUse::positions, 2 * Strips(view, wide).block());
      const int64_t first = piece * batch_norm_rows;
      batch_norm_silu_loops().apply(wide, view, first, std::min(batch_norm_rows, given.rows - first), scratch.data());
    });
    return {y, mean, var};
  }
  STD_TORCH_CHECK(given.rows > 1, "z: expected at least two rows for a batch's statistics, got ", given.rows);
  const Strips strips(view, wide);
  const bool keep = strips.all_rows(given.rows) <= most_kept;
  torch_parallel()(strips.count, [&](int64_t strip) {
    const ThreadScratch scratch(ScratchUse::positions, strips.block() + std::max(strips.block(), keep ? strips.all_rows(given.rows) : 0));
    batch_norm_silu_loops().train(wide, view, strips.expert(strip), strips.first(strip), strips.size(strip), keep, scratch.data());
  });
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
  batch_norm_silu_loops().invert(wide, view.forward.var, eps, columns, view.forward.rstd);
  const Strips strips(view.forward, wide);
  const bool keep = for_z && !running && 2 * strips.all_rows(given.rows) <= most_kept;
  torch_parallel()(strips.count, [&](int64_t strip) {
    const int64_t kept = std::max(strips.block(), keep ? strips.all_rows(given.rows) : 0);
    const ThreadScratch scratch(ScratchUse::positions, strips.block() + 2 * kept);
    batch_norm_silu_loops().backward(wide, view, strips.expert(strip), strips.first(strip), strips.size(strip), keep, scratch.data());
  });
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
