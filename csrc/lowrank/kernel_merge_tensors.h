// The arguments that the ops of kernel_merge share, checked and laid out as the loops take them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/stable_gaps.h"
#include "lowrank/kernel_merge.h"

namespace taskloom {

using OptionalTensor = std::optional<Tensor>;

// The tensor, contiguous and in a dtype, at an address that suits it: a tensor of a mapped file may lie at any.
Tensor aligned_tensor(const Tensor& tensor, ScalarType dtype);

// What follows from factors and scalars alone.
class KernelTensors {
 public:
  // float64 arithmetic where any tensor, or `others`, is float64.
  KernelTensors(const Tensor& a, const Tensor& b, const Tensor& coef, const OptionalTensor& alpha, const OptionalTensor& gamma,
                const OptionalTensor& beta, const Text& kernel, const Text& gate, bool wide_others);

  const KernelFactors& factors() const { return factors_; }
  ScalarType arithmetic() const { return factors_.wide ? ScalarType::Double : ScalarType::Float; }
  int64_t value_size() const { return factors_.wide ? 8 : 4; }
  int64_t padded_rows() const { return factors_.strips() * strip_rows; }

  // Lets passes leave values for later ones in the memory of the merge's result, which must be apart from every input; before all of them.
  void keep_in(void* out, DType dtype);

  // mixk's maximum and sum of exponentials of every row, [2, n]; empty for other kernels. Then used by all that follows.
  Tensor find_row_stats();
  void set_row_stats(const Tensor& row_stats);
  // The threshold that the gate takes of |E|, a scalar; 0 without a gate. Then used by all that follows.
  Tensor find_threshold(double sparsity);
  void set_threshold(const Tensor& threshold);

  // out[j, i] = base[j, i] + gated E; `base` may be nothing.
  void merge(Elements base, DType dtype, void* out) const;

  struct Gradients {
    Tensor a, b, coef, scalars;  // scalars: alpha, gamma, beta
  };
  Gradients backward(Elements gradient) const;

 private:
  void tiles(const KernelGradients& gradients, std::vector<double>& totals) const;

  KernelFactors factors_;
  Tensor a_, b_, coef_;
  std::vector<char> strips_, row_max_, row_sum_;
};

inline bool is_wide(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }
inline bool is_wide(const OptionalTensor& tensor) { return tensor.has_value() && is_wide(*tensor); }

}  // namespace taskloom
