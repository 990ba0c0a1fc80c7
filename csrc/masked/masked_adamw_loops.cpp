// CPU loops of masked_adamw_, compiled once per CPU level.
#include "masked/masked_adamw.h"
#include "masked/masked_step_loops.h"

namespace taskloom {
namespace {

template <class Acc>
struct AdamwRule {
  Acc *first, *second;  // exp_avg, exp_avg_sq
  const AdamwScalars& scalars;

  void step(Acc* __restrict__ parameter, const Acc* __restrict__ gradient, Acc* __restrict__ exp_avg, Acc* __restrict__ exp_avg_sq,
            int64_t n) const {
    const auto kept = static_cast<Acc>(scalars.kept), rate1 = static_cast<Acc>(scalars.rate1), beta2 = static_cast<Acc>(scalars.beta2);
    const auto rate2 = static_cast<Acc>(scalars.rate2), root = static_cast<Acc>(scalars.root_correction2);
    const auto eps = static_cast<Acc>(scalars.eps), step_size = static_cast<Acc>(scalars.step_size);
    const Acc sign = scalars.maximize ? Acc{-1} : Acc{1};
    for (int64_t i = 0; i < n; ++i) {
      const Acc slope = sign * gradient[i];
      const Acc mean = exp_avg[i] + (slope - exp_avg[i]) * rate1;
      const Acc square = exp_avg_sq[i] * beta2 + (rate2 * slope) * slope;
      exp_avg[i] = mean;
      exp_avg_sq[i] = square;
      parameter[i] = parameter[i] * kept + (step_size * mean) / (square_root(square) / root + eps);
    }
  }
};

void step(const MaskedParameter& of, void* exp_avg, void* exp_avg_sq, const AdamwScalars& scalars, const MaskedPiece& piece) {
  step_piece(of, piece, AdamwRule<float>{static_cast<float*>(exp_avg), static_cast<float*>(exp_avg_sq), scalars},
             AdamwRule<double>{static_cast<double*>(exp_avg), static_cast<double*>(exp_avg_sq), scalars});
}

const MaskedAdamwLoops table = {step};

}  // namespace

TASKLOOM_EXPORT_LOOPS(MaskedAdamwLoops, masked_adamw_loops, table)

}  // namespace taskloom
