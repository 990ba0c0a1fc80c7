// kernel_linear and its backward: stable-ABI wrappers around the merge and torch's matrix product.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/thread_scratch.h"
#include "lowrank/kernel_merge_tensors.h"

namespace taskloom {
namespace {

// A matrix in the calling thread's scratch, which the next layer uses again: fresh pages cost more than the merge.
class Workspace {
 public:
  Workspace(int64_t rows, int64_t columns, ScalarType dtype)
      : scratch_(ScratchUse::weight, std::max<int64_t>(1, rows * columns) * (dtype == ScalarType::Double ? 8 : 4)),
        tensor_(torch::stable::from_blob(scratch_.data(), {rows, columns}, {columns, 1},
                                         torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype)) {}
  const Tensor& tensor() const { return tensor_; }
  void* data() const { return scratch_.data(); }

 private:
  ThreadScratch scratch_;
  Tensor tensor_;
};

// [..., columns] as a matrix, in the dtype of the arithmetic.
Tensor rows_of(const Tensor& x, ScalarType dtype) {
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) rows *= x.size(dim);
  const Tensor matrix = torch::stable::reshape(x, {rows, x.size(x.dim() - 1)});
  return aligned_tensor(matrix, dtype);
}

Elements plain_base(const OptionalTensor& base, const KernelFactors& f, Tensor& kept) {
  if (!base.has_value()) return {};
  STD_TORCH_CHECK(base->dim() == 2 && base->size(0) == f.m && base->size(1) == f.n, "base: expected shape [", f.m, ", ", f.n, "]");
  kept = torch::stable::contiguous(*base);
  return elements_of(kept, "base");
}

template <class T>
void add_bias(const T* bias, int64_t rows, int64_t columns, T* y) {
  constexpr int64_t piece = 64;
  torch_parallel()(chunk_count(rows, piece), [&](int64_t index) {
    for (int64_t row = index * piece; row < std::min((index + 1) * piece, rows); ++row)
      for (int64_t column = 0; column < columns; ++column) y[row * columns + column] += bias[column];
  });
}

std::vector<int64_t> with_last(const Tensor& like, int64_t last) {
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape.back() = last;
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> kernel_linear_cpu(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& coef,
                                                     OptionalTensor alpha, OptionalTensor gamma, OptionalTensor beta, OptionalTensor base,
                                                     OptionalTensor bias, Text kernel, double sparsity, Text gate) {
  KernelTensors tensors(a, b, coef, alpha, gamma, beta, kernel, gate, is_wide(x) || is_wide(base) || is_wide(bias));
  const KernelFactors& f = tensors.factors();
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == f.n, "x: expected a last dimension of ", f.n);
  STD_TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == f.m), "bias: expected ", f.m, " values");
  const ScalarType arithmetic = tensors.arithmetic();
  Tensor kept;
  const Elements origin = plain_base(base, f, kept);
  const DType dtype = f.wide ? DType::f64 : DType::f32;
  const Workspace merged(f.m, f.n, arithmetic);
  tensors.keep_in(merged.data(), dtype);
  Tensor row_stats = tensors.find_row_stats();
  Tensor threshold = tensors.find_threshold(sparsity);
  tensors.merge(origin, dtype, merged.data());
  const Tensor rows = rows_of(x, arithmetic);
  Tensor y = torch::stable::empty({rows.size(0), f.m}, arithmetic);
  multiply(y, rows, torch::stable::transpose(merged.tensor(), 0, 1), false);
  if (bias.has_value()) {
    const Tensor plain = aligned_tensor(*bias, arithmetic);
    if (f.wide) {
      add_bias(static_cast<const double*>(plain.const_data_ptr()), y.size(0), f.m, static_cast<double*>(y.mutable_data_ptr()));
    } else {
      add_bias(static_cast<const float*>(plain.const_data_ptr()), y.size(0), f.m, static_cast<float*>(y.mutable_data_ptr()));
    }
  }
  return {torch::stable::reshape(torch::stable::to(y, x.scalar_type()), with_last(x, f.m)), threshold, row_stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kernel_linear_backward_cpu(
    const Tensor& gradient, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& coef, OptionalTensor alpha,
    OptionalTensor gamma, OptionalTensor beta, OptionalTensor base, const Tensor& threshold, const Tensor& row_stats, Text kernel,
    Text gate, bool for_x, bool for_base, bool for_factors) {
  KernelTensors tensors(a, b, coef, alpha, gamma, beta, kernel, gate, is_wide(threshold));
  const KernelFactors& f = tensors.factors();
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == f.n, "x: expected a last dimension of ", f.n);
  STD_TORCH_CHECK(gradient.dim() == x.dim() && gradient.size(x.dim() - 1) == f.m, "gradient: expected a last dimension of ", f.m);
  const ScalarType arithmetic = tensors.arithmetic();
  tensors.set_row_stats(row_stats);
  tensors.set_threshold(threshold);
  const Tensor rows = rows_of(gradient, arithmetic);
  const Workspace weight(f.m, f.n, arithmetic);
  const Tensor none = torch::stable::empty({0}, arithmetic);
  Tensor for_input = torch::stable::empty({0}, x.scalar_type()), for_weight = none;
  KernelTensors::Gradients out{none, none, none, none};
  if (for_x) {
    Tensor kept;
    tensors.merge(plain_base(base, f, kept), f.wide ? DType::f64 : DType::f32, weight.data());
    Tensor wide = torch::stable::empty({rows.size(0), f.n}, arithmetic);
    multiply(wide, rows, weight.tensor(), false);
    for_input = torch::stable::reshape(torch::stable::to(wide, x.scalar_type()), with_last(x, f.n));
  }
  if (for_base || for_factors) {
    multiply(weight.tensor(), torch::stable::transpose(rows, 0, 1), rows_of(x, arithmetic), false);
    if (for_base) {
      for_weight = torch::stable::empty({f.m, f.n}, arithmetic);
      torch::stable::copy_(for_weight, weight.tensor());
    }
    if (for_factors) out = tensors.backward({weight.data(), f.wide ? DType::f64 : DType::f32});
  }
  return {for_input, out.a, out.b, out.coef, out.scalars, for_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("kernel_linear", TORCH_BOX(&kernel_linear_cpu));
  m.impl("kernel_linear_backward", TORCH_BOX(&kernel_linear_backward_cpu));
}

}  // namespace taskloom
