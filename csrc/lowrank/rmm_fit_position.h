// The arithmetic of rmm_fit at a position, written once for CPUs and GPUs: the same operations in the same order give the same bits on
// both, up to the signs of zeros. All of it is double. Torch-free; everything here has internal linkage.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#ifdef __CUDACC__
#define TASKLOOM_FIT __device__ inline
#else
#define TASKLOOM_FIT inline
#endif

namespace taskloom {
namespace {

constexpr double fit_epsilon = 0x1p-52, fit_single_epsilon = 0x1p-23;
// Below this share of the trace an entry of the Gram matrix is far under what rounding has left in it.
constexpr double fit_negligible = 0x1p-64;
// A trace below this has lost its digits.
constexpr double fit_least_trace = 0x1p-1000;
// Cyclic Jacobi converges quadratically: fewer than ten sweeps for any matrix seen.
constexpr int fit_most_sweeps = 40;

// Sizes of a position's fit, and where each piece begins in the memory that it works in (the vectors at 0). Rows have odd lengths: entries
// below each other lie in other banks of a GPU's shared memory, and in other sets of a CPU's cache.
template <class Index>
struct FitPlan {
  Index tasks, width, rank;
  Index size;  // of the smaller Gram matrix
  Index vector_stride, matrix_stride;
  Index mean, matrix, directions, basis, coefficients;
  Index count;  // of quantities in all
  bool by_task, center;
  // No longer than this share of the vectors' length is what rounding leaves of a direction: that of the arithmetic, or that which float32
  // vectors bring along.
  double floor_share;
};

template <class Index>
FitPlan<Index> plan_fit(Index tasks, Index width, Index rank, bool center, DType dtype) {
  FitPlan<Index> plan{};
  plan.tasks = tasks, plan.width = width, plan.rank = rank, plan.center = center;
  plan.by_task = tasks <= width;
  plan.size = plan.by_task ? tasks : width;
  plan.vector_stride = width | 1, plan.matrix_stride = plan.size | 1;
  plan.mean = tasks * plan.vector_stride;
  plan.matrix = plan.mean + width;
  // When the eigenvectors are there, the place of the matrix is free for what is made of them.
  const Index matrix = plan.size * plan.matrix_stride, basis = plan.by_task ? rank * plan.vector_stride : 0, results = basis + tasks * rank;
  plan.directions = plan.matrix + (matrix > results ? matrix : results);
  // Eigenvectors over the entries are the basis.
  plan.basis = plan.by_task ? plan.matrix : plan.directions;
  plan.coefficients = plan.matrix + basis;
  plan.count = plan.directions + matrix;
  const double computed = fit_epsilon * static_cast<double>(tasks > width ? tasks : width);
  plan.floor_share = dtype == DType::f64 || computed > fit_single_epsilon ? computed : fit_single_epsilon;
  return plan;
}

// A sum of products in four parts, of every fourth product each, so that it need not wait for each addition.
template <class Real, class Index>
TASKLOOM_FIT void fit_dot(const Real* a, const Real* b, Index n, Index stride, Real* out) {
  Real first = {}, second = {}, third = {}, fourth = {};
  Index i = 0;
  for (; i + 4 <= n; i += 4) {
    first += a[i * stride] * b[i * stride];
    second += a[(i + 1) * stride] * b[(i + 1) * stride];
    third += a[(i + 2) * stride] * b[(i + 2) * stride];
    fourth += a[(i + 3) * stride] * b[(i + 3) * stride];
  }
  if (i < n) first += a[i * stride] * b[i * stride];
  if (i + 1 < n) second += a[(i + 1) * stride] * b[(i + 1) * stride];
  if (i + 2 < n) third += a[(i + 2) * stride] * b[(i + 2) * stride];
  *out = (first + third) + (second + fourth);
}

// The fit of one position, or of several at once in the lanes of a register. A Team says who does it:
//   Real, Flag, Index            a quantity of a position, whether something holds there, a count
//   each(n, body)                body(i) for i = 0 .. n - 1, spread over the team
//   once(body)                   body() in one of the team
//   any(&flag)                   whether a flag is set at any position
//   dot(a, b, n, stride, &out)   fit_dot, shared by the team
//   root(&value)                 its square root
//   sync()                       what the team wrote before is there for all of it after
// All of a team take the same branches; `any` and `dot` end with a sync. Quantities go by address: a register as an argument would tie the
// code to one CPU level's calling convention.
template <class Team>
class PositionFit {
  using Real = typename Team::Real;
  using Flag = typename Team::Flag;
  using Index = typename Team::Index;

 public:
  TASKLOOM_FIT PositionFit(const Team& team, const FitPlan<Index>& plan, Real* room)
      : team(team),
        plan(plan),
        vectors(room),
        mean(room + plan.mean),
        matrix(room + plan.matrix),
        directions(room + plan.directions),
        basis(room + plan.basis),
        coefficients(room + plan.coefficients) {}

  // From the vectors in the room to mean, basis and coefficients there.
  TASKLOOM_FIT void run() const {
    center();
    form_gram();
    Real trace = {}, floor;
    for (Index a = 0; a < plan.size; ++a) trace += matrix[a * plan.matrix_stride + a];
    find_floor(&trace, &floor);
    divide(&trace);
    diagonalize();
    sort_directions();
    if (plan.by_task) sum_directions(&floor);
    fix_signs();
    project(&floor);
  }

 private:
  const Team& team;
  const FitPlan<Index>& plan;
  Real *const vectors, *const mean, *const matrix, *const directions, *const basis, *const coefficients;

  static TASKLOOM_FIT void absolute(const Real* value, Real* out) { *out = *value < 0.0 ? -*value : *value; }

  // Takes the mean off the vectors.
  TASKLOOM_FIT void center() const {
    team.each(plan.width, [&](Index j) {
      Real sum = {};
      if (plan.center) {
        for (Index i = 0; i < plan.tasks; ++i) sum += vectors[i * plan.vector_stride + j];
        sum /= static_cast<double>(plan.tasks);
        for (Index i = 0; i < plan.tasks; ++i) vectors[i * plan.vector_stride + j] -= sum;
      }
      mean[j] = sum;
    });
    team.sync();
  }

  // The products of the tasks' vectors with each other, or of the entries where there are fewer of these.
  TASKLOOM_FIT void form_gram() const {
    const Index step = plan.by_task ? plan.vector_stride : 1, n = plan.by_task ? plan.width : plan.tasks;
    const Index stride = plan.by_task ? 1 : plan.vector_stride;
    for (Index a = 0; a < plan.size; ++a) {
      team.each(a + 1, [&](Index b) {
        Real sum;
        fit_dot(vectors + a * step, vectors + b * step, n, stride, &sum);
        matrix[a * plan.matrix_stride + b] = sum;
        matrix[b * plan.matrix_stride + a] = sum;
      });
    }
    team.sync();
  }

  // A share of the length of the vectors as they came.
  TASKLOOM_FIT void find_floor(const Real* trace, Real* floor) const {
    Real of_mean;
    team.dot(mean, mean, plan.width, Index{1}, &of_mean);
    *floor = *trace + static_cast<double>(plan.tasks) * of_mean;
    Team::root(floor);
    *floor *= plan.floor_share;
  }

  // Divides the matrix by its trace: the squares of its entries are then in the range of a double for all vectors whose own squares are.
  TASKLOOM_FIT void divide(const Real* trace) const {
    const Real none = {};
    const Flag some = *trace > fit_least_trace;
    const Real factor = some ? 1.0 / *trace : none;
    for (Index a = 0; a < plan.size; ++a) {
      team.each(plan.size, [&](Index b) { matrix[a * plan.matrix_stride + b] *= factor; });
    }
    team.sync();
  }

  // One rotation that makes entry (a, b) of the matrix 0; false where no position needs it.
  TASKLOOM_FIT bool rotate(Index a, Index b) const {
    const Index stride = plan.matrix_stride;
    Real* const row_a = matrix + a * stride;
    Real* const row_b = matrix + b * stride;
    const Real low = row_a[a], high = row_b[b], off = row_a[b];
    Real magnitude, product = low * high;
    absolute(&off, &magnitude);
    absolute(&product, &product);
    const Flag needed = (off * off > fit_epsilon * fit_epsilon * product) & (magnitude > fit_negligible);
    if (!team.any(&needed)) return false;
    // The smaller root of t^2 + t gap / off = 1.
    const Real gap = high - low, twice = off + off, none = {};
    Real length = gap * gap + twice * twice, width;
    Team::root(&length);
    absolute(&gap, &width);
    const Real ratio = (gap < 0.0 ? -twice : twice) / (width + length);
    const Real tangent = needed ? ratio : none;
    Real norm = tangent * tangent + 1.0;
    Team::root(&norm);
    const Real cosine = 1.0 / norm, sine = tangent * cosine;
    Real* const direction_a = directions + a * stride;
    Real* const direction_b = directions + b * stride;
    team.each(plan.size, [&](Index i) {
      const Real along_a = direction_a[i], along_b = direction_b[i];
      direction_a[i] = cosine * along_a - sine * along_b;
      direction_b[i] = sine * along_a + cosine * along_b;
      if (i == a || i == b) return;
      const Real with_a = row_a[i], with_b = row_b[i];
      row_a[i] = matrix[i * stride + a] = cosine * with_a - sine * with_b;
      row_b[i] = matrix[i * stride + b] = sine * with_a + cosine * with_b;
    });
    team.once([&] {
      row_a[a] = low - tangent * off;
      row_b[b] = high + tangent * off;
      row_a[b] = row_b[a] = needed ? none : off;
    });
    team.sync();
    return true;
  }

  // Cyclic Jacobi: the eigenvalues end on the matrix's diagonal, the eigenvectors in the rows of `directions`.
  TASKLOOM_FIT void diagonalize() const {
    for (Index a = 0; a < plan.size; ++a) {
      team.each(plan.size, [&](Index b) { directions[a * plan.matrix_stride + b] = Real{} + (a == b ? 1.0 : 0.0); });
    }
    team.sync();
    bool rotated = true;
    for (int sweep = 0; sweep < fit_most_sweeps && rotated; ++sweep) {
      rotated = false;
      for (Index a = 0; a < plan.size; ++a) {
        for (Index b = a + 1; b < plan.size; ++b) rotated |= rotate(a, b);
      }
    }
  }

  // Brings the first `rank` eigenvectors to the front, by decreasing eigenvalue.
  TASKLOOM_FIT void sort_directions() const {
    for (Index k = 0; k < plan.rank; ++k) {
      for (Index other = k + 1; other < plan.size; ++other) {
        Real* const front = matrix + k * plan.matrix_stride + k;
        Real* const back = matrix + other * plan.matrix_stride + other;
        const Real value = *front, tried = *back;
        const Flag larger = tried > value;
        if (!team.any(&larger)) continue;
        team.once([&] {
          *front = larger ? tried : value;
          *back = larger ? value : tried;
        });
        Real* const direction = directions + k * plan.matrix_stride;
        Real* const another = directions + other * plan.matrix_stride;
        team.each(plan.size, [&](Index i) {
          const Real first = direction[i], second = another[i];
          direction[i] = larger ? second : first;
          another[i] = larger ? first : second;
        });
        team.sync();
      }
    }
  }

  TASKLOOM_FIT void scale(Real* values, const Real* factor) const {
    team.each(plan.width, [&](Index j) { values[j] *= *factor; });
    team.sync();
  }

  // The sums of the vectors that an eigenvector of the tasks' Gram matrix weights, made orthonormal once more: a small eigenvalue has half
  // of the digits only, but what the sums span together is right to the last one.
  TASKLOOM_FIT void sum_directions(const Real* floor) const {
    const Real none = {};
    for (Index k = 0; k < plan.rank; ++k) {
      Real* const made = basis + k * plan.vector_stride;
      const Real* const weights = directions + k * plan.matrix_stride;
      team.each(plan.width, [&](Index j) {
        Real sum = {};
        for (Index i = 0; i < plan.tasks; ++i) sum += weights[i] * vectors[i * plan.vector_stride + j];
        made[j] = sum;
      });
      team.sync();
      Real length;
      team.dot(made, made, plan.width, Index{1}, &length);
      Team::root(&length);
      const Flag kept = length > *floor;
      Real factor = kept ? 1.0 / length : none;
      scale(made, &factor);
      for (int pass = 0; pass < 2; ++pass) {
        for (Index before = 0; before < k; ++before) {
          const Real* const other = basis + before * plan.vector_stride;
          Real along;
          team.dot(made, other, plan.width, Index{1}, &along);
          team.each(plan.width, [&](Index j) { made[j] -= along * other[j]; });
          team.sync();
        }
        Real rest;
        team.dot(made, made, plan.width, Index{1}, &rest);
        Team::root(&rest);
        const Flag more = rest * length > *floor;
        factor = more ? 1.0 / rest : none;
        scale(made, &factor);
        length *= rest;
      }
    }
  }

  // Makes each basis vector's entry of largest magnitude positive.
  TASKLOOM_FIT void fix_signs() const {
    team.each(plan.rank, [&](Index k) {
      Real* const direction = basis + k * plan.vector_stride;
      const Real one = Real{} + 1.0;
      Real top = {}, sign = one;
      for (Index j = 0; j < plan.width; ++j) {
        Real magnitude;
        absolute(direction + j, &magnitude);
        const Real own = direction[j] < 0.0 ? -one : one;
        const Flag larger = magnitude > top;
        sign = larger ? own : sign;
        top = larger ? magnitude : top;
      }
      for (Index j = 0; j < plan.width; ++j) direction[j] *= sign;
    });
    team.sync();
  }

  // The vectors' components along the basis; a basis vector along which there is nothing beyond the floor becomes 0.
  TASKLOOM_FIT void project(const Real* floor) const {
    const Real none = {};
    for (Index k = 0; k < plan.rank; ++k) {
      Real* const direction = basis + k * plan.vector_stride;
      Real* const components = coefficients + k;
      team.each(plan.tasks, [&](Index i) {
        Real along;
        fit_dot(vectors + i * plan.vector_stride, direction, plan.width, Index{1}, &along);
        components[i * plan.rank] = along;
      });
      team.sync();
      Real length;
      team.dot(components, components, plan.tasks, plan.rank, &length);
      Team::root(&length);
      const Flag dropped = length <= *floor;
      team.each(plan.width, [&](Index j) { direction[j] = dropped ? none : direction[j]; });
      team.each(plan.tasks, [&](Index i) { components[i * plan.rank] = dropped ? none : components[i * plan.rank]; });
      team.sync();
    }
  }
};

}  // namespace
}  // namespace taskloom
