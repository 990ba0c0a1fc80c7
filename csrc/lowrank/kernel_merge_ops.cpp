// kernel_merge, kernel_merge_out, kernel_merge_backward, kernel_quantile: stable-ABI wrappers.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "lowrank/kernel_merge_tensors.h"

namespace taskloom {
namespace {

Tensor kernel_quantile_cpu(const Tensor& a, const Tensor& b, const Tensor& coef, OptionalTensor alpha, OptionalTensor gamma,
                           OptionalTensor beta, Text kernel, double sparsity, Text gate) {
  KernelTensors tensors(a, b, coef, alpha, gamma, beta, kernel, gate, false);
  tensors.find_row_stats();
  return tensors.find_threshold(sparsity);
}

struct Statistics {
  Tensor threshold, row_stats;
};

// Into a contiguous `out`, which may be base itself.
Statistics merge_into(KernelTensors& tensors, const OptionalTensor& base, double sparsity, Tensor& out) {
  const KernelFactors& f = tensors.factors();
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == f.m && out.size(1) == f.n, "out: expected shape [", f.m, ", ", f.n, "]");
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  const DType dtype = dtype_of(out, "out");
  Tensor plain;
  Elements origin;
  if (base.has_value()) {
    STD_TORCH_CHECK(base->dim() == 2 && base->size(0) == f.m && base->size(1) == f.n, "base: expected shape [", f.m, ", ", f.n, "]");
    plain = torch::stable::contiguous(*base);
    origin = elements_of(plain, "base");
  }
  if (!base.has_value() || !share_memory(plain, out)) tensors.keep_in(out.mutable_data_ptr(), dtype);
  Tensor row_stats = tensors.find_row_stats();
  Tensor threshold = tensors.find_threshold(sparsity);
  tensors.merge(origin, dtype, out.mutable_data_ptr());
  return {threshold, row_stats};
}

std::tuple<Tensor, Tensor, Tensor> kernel_merge_cpu(const Tensor& a, const Tensor& b, const Tensor& coef, OptionalTensor alpha,
                                                    OptionalTensor gamma, OptionalTensor beta, OptionalTensor base, Text kernel,
                                                    double sparsity, Text gate) {
  KernelTensors tensors(a, b, coef, alpha, gamma, beta, kernel, gate, is_wide(base));
  const KernelFactors& f = tensors.factors();
  Tensor merged = torch::stable::empty({f.m, f.n}, base.has_value() ? base->scalar_type() : a.scalar_type());
  const Statistics found = merge_into(tensors, base, sparsity, merged);
  return {merged, found.threshold, found.row_stats};
}

void kernel_merge_out_cpu(const Tensor& a, const Tensor& b, const Tensor& coef, OptionalTensor alpha, OptionalTensor gamma,
                          OptionalTensor beta, OptionalTensor base, Text kernel, double sparsity, Text gate, Tensor out) {
  KernelTensors tensors(a, b, coef, alpha, gamma, beta, kernel, gate, is_wide(base));
  merge_into(tensors, base, sparsity, out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> kernel_merge_backward_cpu(const Tensor& gradient, const Tensor& a, const Tensor& b,
                                                                     const Tensor& coef, OptionalTensor alpha, OptionalTensor gamma,
                                                                     OptionalTensor beta, const Tensor& threshold, const Tensor& row_stats,
                                                                     Text kernel, Text gate) {
  KernelTensors tensors(a, b, coef, alpha, gamma, beta, kernel, gate, is_wide(threshold));
  const KernelFactors& f = tensors.factors();
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.size(0) == f.m && gradient.size(1) == f.n, "gradient: expected shape [", f.m, ", ", f.n,
                  "]");
  tensors.set_row_stats(row_stats);
  tensors.set_threshold(threshold);
  const Tensor plain = torch::stable::contiguous(gradient);
  KernelTensors::Gradients out = tensors.backward(elements_of(plain, "gradient"));
  return {out.a, out.b, out.coef, out.scalars};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) {
  m.impl("kernel_quantile", TORCH_BOX(&kernel_quantile_cpu));
  m.impl("kernel_merge", TORCH_BOX(&kernel_merge_cpu));
  m.impl("kernel_merge_out", TORCH_BOX(&kernel_merge_out_cpu));
  m.impl("kernel_merge_backward", TORCH_BOX(&kernel_merge_backward_cpu));
}

}  // namespace taskloom
