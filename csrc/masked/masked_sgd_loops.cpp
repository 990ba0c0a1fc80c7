// CPU loops of masked_sgd_, compiled once per CPU level.
#include "masked/masked_sgd.h"
#include "masked/masked_step_loops.h"

namespace taskloom {
namespace {

template <class Acc>
struct SgdRule {
  Acc *first, *second;  // the momentum buffer, or null; null
  const SgdScalars& scalars;

  void step(Acc* __restrict__ parameter, Acc* __restrict__ gradient, Acc* __restrict__ buffer, Acc*, int64_t n) const {
    const Acc sign = scalars.maximize ? Acc{-1} : Acc{1};
    for (int64_t i = 0; i < n; ++i) gradient[i] *= sign;
    if (scalars.weight_decay != 0) {
      const auto decay = static_cast<Acc>(scalars.weight_decay);
      for (int64_t i = 0; i < n; ++i) gradient[i] += decay * parameter[i];
    }
    if (buffer != nullptr) follow(gradient, buffer, n);
    const auto step_size = static_cast<Acc>(scalars.step_size);
    for (int64_t i = 0; i < n; ++i) parameter[i] += step_size * gradient[i];
  }

  // The gradient becomes the direction of the step.
  void follow(Acc* __restrict__ gradient, Acc* __restrict__ velocity, int64_t n) const {
    const auto momentum = static_cast<Acc>(scalars.momentum), undamped = static_cast<Acc>(scalars.undamped);
    if (scalars.first) {
      for (int64_t i = 0; i < n; ++i) velocity[i] = gradient[i];
    } else {
      for (int64_t i = 0; i < n; ++i) velocity[i] = velocity[i] * momentum + undamped * gradient[i];
    }
    if (scalars.nesterov) {
      for (int64_t i = 0; i < n; ++i) gradient[i] += momentum * velocity[i];
    } else {
      for (int64_t i = 0; i < n; ++i) gradient[i] = velocity[i];
    }
  }
};

void step(const MaskedParameter& of, void* buffer, const SgdScalars& scalars, const MaskedPiece& piece) {
  step_piece(of, piece, SgdRule<float>{static_cast<float*>(buffer), nullptr, scalars},
             SgdRule<double>{static_cast<double*>(buffer), nullptr, scalars});
}

const MaskedSgdLoops table = {step};

}  // namespace

TASKLOOM_EXPORT_LOOPS(MaskedSgdLoops, masked_sgd_loops, table)

}  // namespace taskloom
