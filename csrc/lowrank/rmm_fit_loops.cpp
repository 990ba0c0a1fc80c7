// CPU loops of rmm_fit, compiled once per CPU level. Every quantity is held for eight positions at a time, a lane each; a lane's bits do
// not depend on what the others hold, up to the signs of zeros.
#include <cmath>

#include "common/convert.h"
#include "lowrank/rmm_fit.h"
#include "lowrank/rmm_fit_position.h"

namespace taskloom {
namespace {

typedef double Lanes __attribute__((vector_size(64)));
typedef int64_t Flags __attribute__((vector_size(64)));

// One thread, for all positions of a register.
struct Thread {
  using Real = Lanes;
  using Flag = Flags;
  using Index = int64_t;

  template <class Body>
  void each(int64_t n, const Body& body) const {
    for (int64_t i = 0; i < n; ++i) body(i);
  }

  template <class Body>
  void once(const Body& body) const {
    body();
  }

  bool any(const Flags* flags) const {
    int64_t found = 0;
    for (int64_t lane = 0; lane < fit_lanes; ++lane) found |= (*flags)[lane];
    return found != 0;
  }

  void dot(const Lanes* a, const Lanes* b, int64_t n, int64_t stride, Lanes* out) const { fit_dot(a, b, n, stride, out); }

  static void root(Lanes* values) {
    for (int64_t lane = 0; lane < fit_lanes; ++lane) (*values)[lane] = std::sqrt((*values)[lane]);
  }

  void sync() const {}
};

FitPlan<int64_t> plan_of(const RmmFit& view) {
  return plan_fit<int64_t>(view.tasks, view.width, view.rank, view.center, view.vectors.dtype);
}

// `count` rows of n elements from `offset` on, row l into lane l; the lanes after them become 0.
void load_lanes(const Elements& from, int64_t offset, int64_t count, int64_t n, double* rows, Lanes* out) {
  load_block(from.dtype, from.data, offset, count * n, rows);
  for (int64_t i = count * n; i < fit_lanes * n; ++i) rows[i] = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t lane = 0; lane < fit_lanes; ++lane) out[i][lane] = rows[lane * n + i];
  }
}

// The lanes' matrices of `high` rows, one after the other from `offset` on.
void store_lanes(const Lanes* from, int64_t high, int64_t wide, int64_t stride, int64_t count, double* rows, DType dtype, void* to,
                 int64_t offset) {
  for (int64_t k = 0; k < high; ++k) {
    for (int64_t j = 0; j < wide; ++j) {
      for (int64_t lane = 0; lane < fit_lanes; ++lane) rows[(lane * high + k) * wide + j] = from[k * stride + j][lane];
    }
  }
  store_block(dtype, rows, count * high * wide, to, offset);
}

void fit(const RmmFit& view, int64_t first, int64_t count, void* scratch) {
  const FitPlan<int64_t> plan = plan_of(view);
  const int64_t width = view.width, rank = view.rank;
  Lanes* const room = static_cast<Lanes*>(scratch);
  double* const rows = reinterpret_cast<double*>(room + plan.count);
  for (int64_t i = 0; i < view.tasks; ++i) {
    load_lanes(view.vectors, (i * view.positions + first) * width, count, width, rows, room + i * plan.vector_stride);
  }
  const Thread thread;
  PositionFit<Thread>(thread, plan, room).run();
  const DType dtype = view.vectors.dtype;
  store_lanes(room + plan.mean, 1, width, width, count, rows, dtype, view.mean, first * width);
  store_lanes(room + plan.basis, rank, width, plan.vector_stride, count, rows, dtype, view.basis, first * rank * width);
  for (int64_t i = 0; i < view.tasks; ++i) {
    store_lanes(room + plan.coefficients + i * rank, 1, rank, rank, count, rows, dtype, view.coefficients,
                (i * view.positions + first) * rank);
  }
}

int64_t scratch(const RmmFit& view) { return (plan_of(view).count + view.rank * view.width) * static_cast<int64_t>(sizeof(Lanes)); }

const RmmFitLoops table = {scratch, fit};

}  // namespace

TASKLOOM_EXPORT_LOOPS(RmmFitLoops, rmm_fit_loops, table)

}  // namespace taskloom
