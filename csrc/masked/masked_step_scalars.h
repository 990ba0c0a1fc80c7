// The numbers of a fused optimiser step, computed in double on the host.
#pragma once

#include <cmath>
#include <vector>

#include "masked/masked_adamw.h"
#include "masked/masked_sgd.h"

namespace taskloom {

// One of each for every parameter, whose step is number step[i].
inline std::vector<AdamwScalars> adamw_scalars(const std::vector<double>& step, double lr, double beta1, double beta2, double eps,
                                               double weight_decay, bool maximize) {
  std::vector<AdamwScalars> scalars;
  for (const double count : step) {
    const double correction1 = 1 - std::pow(beta1, count), correction2 = 1 - std::pow(beta2, count);
    scalars.push_back({1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, std::sqrt(correction2), eps, -(lr / correction1), maximize});
  }
  return scalars;
}

inline std::vector<SgdScalars> sgd_scalars(const std::vector<double>& step, double lr, double momentum, double dampening,
                                           double weight_decay, bool nesterov, bool maximize) {
  std::vector<SgdScalars> scalars;
  for (const double count : step) {
    scalars.push_back({-lr, momentum, 1 - dampening, weight_decay, count <= 1, nesterov, maximize});
  }
  return scalars;
}

}  // namespace taskloom
