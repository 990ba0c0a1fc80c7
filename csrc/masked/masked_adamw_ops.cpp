// masked_adamw_: stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include "masked/masked_step_scalars.h"
#include "masked/masked_step_tensors.h"

namespace taskloom {
namespace {

void masked_adamw_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avg, std::vector<Tensor> exp_avg_sq,
                      std::vector<Tensor> active, std::vector<double> step, double lr, double beta1, double beta2, double eps,
                      double weight_decay, bool maximize) {
  STD_TORCH_CHECK(step.size() == params.size(), "step: expected ", params.size(), " numbers as in params, got ", step.size());
  StepTensors tensors(params, grads, active);
  const std::vector<void*> first = tensors.check_state(exp_avg, "exp_avg"), second = tensors.check_state(exp_avg_sq, "exp_avg_sq");
  const std::vector<AdamwScalars> scalars = adamw_scalars(step, lr, beta1, beta2, eps, weight_decay, maximize);
  tensors.run([&](size_t index, const MaskedParameter& of, const MaskedPiece& piece) {
    masked_adamw_loops().step(of, first[index], second[index], scalars[index], piece);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("masked_adamw_", TORCH_BOX(&masked_adamw_cpu)); }

}  // namespace taskloom
