// masked_sgd_: stable-ABI wrapper.
#include <torch/csrc/stable/library.h>

#include "masked/masked_step_scalars.h"
#include "masked/masked_step_tensors.h"

namespace taskloom {
namespace {

void masked_sgd_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> momentum_buffer, std::vector<Tensor> active,
                    std::vector<double> step, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                    bool maximize) {
  STD_TORCH_CHECK(step.size() == params.size(), "step: expected ", params.size(), " numbers as in params, got ", step.size());
  StepTensors tensors(params, grads, active);
  const std::vector<void*> buffers =
      momentum == 0 ? std::vector<void*>(params.size()) : tensors.check_state(momentum_buffer, "momentum_buffer");
  const std::vector<SgdScalars> scalars = sgd_scalars(step, lr, momentum, dampening, weight_decay, nesterov, maximize);
  tensors.run([&](size_t index, const MaskedParameter& of, const MaskedPiece& piece) {
    masked_sgd_loops().step(of, buffers[index], scalars[index], piece);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_cpu)); }

}  // namespace taskloom
