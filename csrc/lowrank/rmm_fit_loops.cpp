// CPU loops of rmm_fit, compiled once per CPU level. Every quantity is held for eight positions at a time, a lane each; a lane's bits do
// not depend on what the others hold, and all arithmetic is double.
#include <cmath>

#include "common/convert.h"
#include "lowrank/rmm_fit.h"

namespace taskloom {
namespace {

typedef double Lanes __attribute__((vector_size(64)));
typedef int64_t Flags __attribute__((vector_size(64)));

constexpr double epsilon = 0x1p-52, single_epsilon = 0x1p-23;
// Below this share of the trace an entry of the Gram matrix is far under what rounding has left in it.
constexpr double negligible = 0x1p-64;
// Cyclic Jacobi converges quadratically: fewer than ten sweeps for any matrix seen.
constexpr int most_sweeps = 40;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline void root(Lanes* values) {
  for (int64_t lane = 0; lane < fit_lanes; ++lane) (*values)[lane] = std::sqrt((*values)[lane]);
}

inline void absolute(const Lanes* values, Lanes* out) { *out = *values < 0.0 ? -*values : *values; }

inline bool any(const Flags* flags) {
  int64_t found = 0;
  for (int64_t lane = 0; lane < fit_lanes; ++lane) found |= (*flags)[lane];
  return found != 0;
}

inline void dot(const Lanes* a, const Lanes* b, int64_t n, int64_t stride, Lanes* out) {
  Lanes sum = {};
  for (int64_t i = 0; i < n; ++i) sum += a[i * stride] * b[i * stride];
  *out = sum;
}

// The pieces of scratch of one call.
struct Work {
  Lanes *vectors, *mean, *gram, *directions, *basis, *coefficients;
  double* rows;

  static int64_t count(const RmmFit& view) {
    const int64_t size = smaller(view.tasks, view.width);
    return view.tasks * view.width + view.width + 2 * size * size + view.rank * view.width + view.tasks * view.rank +
           view.rank * view.width;
  }

  Work(const RmmFit& view, void* scratch) {
    const int64_t size = smaller(view.tasks, view.width);
    vectors = static_cast<Lanes*>(scratch);
    mean = vectors + view.tasks * view.width;
    gram = mean + view.width;
    directions = gram + size * size;
    basis = directions + size * size;
    coefficients = basis + view.rank * view.width;
    rows = reinterpret_cast<double*>(coefficients + view.tasks * view.rank);
  }
};

// `count` rows of n elements from `offset` on, row l into lane l; the lanes after them become 0.
void load_lanes(const Elements& from, int64_t offset, int64_t count, int64_t n, double* rows, Lanes* out) {
  load_block(from.dtype, from.data, offset, count * n, rows);
  for (int64_t i = count * n; i < fit_lanes * n; ++i) rows[i] = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t lane = 0; lane < fit_lanes; ++lane) out[i][lane] = rows[lane * n + i];
  }
}

void store_lanes(const Lanes* from, int64_t count, int64_t n, double* rows, DType dtype, void* to, int64_t offset) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t lane = 0; lane < fit_lanes; ++lane) rows[lane * n + i] = from[i][lane];
  }
  store_block(dtype, rows, count * n, to, offset);
}

// Takes the mean off the vectors. No longer than the floor is what rounding leaves of a direction: that of the arithmetic, or that which
// float32 vectors bring along.
void center(const RmmFit& view, const Work& work, Lanes* floor) {
  dot(work.vectors, work.vectors, view.tasks * view.width, 1, floor);
  root(floor);
  const double computed = epsilon * static_cast<double>(larger(view.tasks, view.width));
  *floor *= view.vectors.dtype == DType::f64 || computed > single_epsilon ? computed : single_epsilon;
  for (int64_t j = 0; j < view.width; ++j) {
    Lanes sum = {};
    if (view.center) {
      for (int64_t i = 0; i < view.tasks; ++i) sum += work.vectors[i * view.width + j];
      sum /= static_cast<double>(view.tasks);
      for (int64_t i = 0; i < view.tasks; ++i) work.vectors[i * view.width + j] -= sum;
    }
    work.mean[j] = sum;
  }
}

// The products of the tasks' vectors with each other, or of the entries where there are fewer of these.
void form_gram(const RmmFit& view, const Work& work, int64_t size) {
  const bool by_task = size == view.tasks;
  const int64_t step = by_task ? view.width : 1, n = by_task ? view.width : view.tasks, stride = by_task ? 1 : view.width;
  for (int64_t a = 0; a < size; ++a) {
    for (int64_t b = 0; b <= a; ++b) {
      Lanes* at = work.gram + a * size + b;
      dot(work.vectors + a * step, work.vectors + b * step, n, stride, at);
      work.gram[b * size + a] = *at;
    }
  }
}

inline void rotate_rows(Lanes* a, Lanes* b, int64_t n, const Lanes* cosine, const Lanes* sine) {
  const Lanes c = *cosine, s = *sine;
  for (int64_t i = 0; i < n; ++i) {
    const Lanes first = a[i], second = b[i];
    a[i] = c * first - s * second;
    b[i] = s * first + c * second;
  }
}

// One rotation that makes entry (a, b) of the matrix 0; false where no lane needs it.
bool rotate(Lanes* matrix, Lanes* directions, int64_t size, int64_t a, int64_t b, const Lanes* trace) {
  Lanes* const row_a = matrix + a * size;
  Lanes* const row_b = matrix + b * size;
  const Lanes low = row_a[a], high = row_b[b], off = row_a[b];
  Lanes magnitude, product = low * high;
  absolute(&off, &magnitude);
  absolute(&product, &product);
  const Flags needed = (off * off > epsilon * epsilon * product) & (magnitude > negligible * *trace);
  if (!any(&needed)) return false;
  const Lanes one = 1.0 - Lanes{}, none = {};
  const Lanes theta = (high - low) / (2.0 * (needed ? off : one));
  Lanes length = theta * theta + 1.0, steepness;
  root(&length);
  absolute(&theta, &steepness);
  const Lanes inverse = 1.0 / (steepness + length);
  const Lanes tangent = needed ? (theta < 0.0 ? -inverse : inverse) : none;
  Lanes norm = tangent * tangent + 1.0;
  root(&norm);
  const Lanes cosine = 1.0 / norm, sine = tangent * cosine;
  rotate_rows(row_a, row_b, size, &cosine, &sine);
  for (int64_t i = 0; i < size; ++i) {
    matrix[i * size + a] = row_a[i];
    matrix[i * size + b] = row_b[i];
  }
  row_a[a] = low - tangent * off;
  row_b[b] = high + tangent * off;
  row_a[b] = row_b[a] = needed ? none : off;
  rotate_rows(directions + a * size, directions + b * size, size, &cosine, &sine);
  return true;
}

// Cyclic Jacobi: the eigenvalues end on the matrix's diagonal, the eigenvectors in the rows of `directions`.
void diagonalize(Lanes* matrix, Lanes* directions, int64_t size) {
  Lanes trace = {};
  for (int64_t a = 0; a < size; ++a) {
    trace += matrix[a * size + a];
    for (int64_t b = 0; b < size; ++b) directions[a * size + b] = Lanes{} + (a == b ? 1.0 : 0.0);
  }
  bool rotated = true;
  for (int sweep = 0; sweep < most_sweeps && rotated; ++sweep) {
    rotated = false;
    for (int64_t a = 0; a < size; ++a) {
      for (int64_t b = a + 1; b < size; ++b) rotated |= rotate(matrix, directions, size, a, b, &trace);
    }
  }
}

// Sorts the first `rank` eigenvectors of each lane to the front, by decreasing eigenvalue.
void sort_directions(Lanes* matrix, Lanes* directions, int64_t size, int64_t rank) {
  for (int64_t lane = 0; lane < fit_lanes; ++lane) {
    for (int64_t k = 0; k < rank; ++k) {
      int64_t best = k;
      for (int64_t other = k + 1; other < size; ++other) {
        if (matrix[other * size + other][lane] > matrix[best * size + best][lane]) best = other;
      }
      if (best == k) continue;
      const double value = matrix[k * size + k][lane];
      matrix[k * size + k][lane] = matrix[best * size + best][lane];
      matrix[best * size + best][lane] = value;
      for (int64_t i = 0; i < size; ++i) {
        const double entry = directions[k * size + i][lane];
        directions[k * size + i][lane] = directions[best * size + i][lane];
        directions[best * size + i][lane] = entry;
      }
    }
  }
}

// The sums of the vectors that an eigenvector of the tasks' Gram matrix weights, made orthonormal once more: a small eigenvalue has half of
// the digits only, but what the sums span together is right to the last one.
void directions_of_tasks(const RmmFit& view, const Work& work, int64_t size, const Lanes* floor) {
  const int64_t width = view.width;
  for (int64_t k = 0; k < view.rank; ++k) {
    Lanes* const made = work.basis + k * width;
    for (int64_t j = 0; j < width; ++j) made[j] = Lanes{};
    for (int64_t i = 0; i < view.tasks; ++i) {
      const Lanes weight = work.directions[k * size + i];
      for (int64_t j = 0; j < width; ++j) made[j] += weight * work.vectors[i * width + j];
    }
    Lanes length;
    dot(made, made, width, 1, &length);
    root(&length);
    const Flags kept = length > *floor;
    const Lanes none = {}, inverse = kept ? 1.0 / length : none;
    for (int64_t j = 0; j < width; ++j) made[j] *= inverse;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t before = 0; before < k; ++before) {
        const Lanes* const other = work.basis + before * width;
        Lanes along;
        dot(made, other, width, 1, &along);
        for (int64_t j = 0; j < width; ++j) made[j] -= along * other[j];
      }
      Lanes rest;
      dot(made, made, width, 1, &rest);
      root(&rest);
      const Lanes factor = rest * length > *floor ? 1.0 / rest : none;
      for (int64_t j = 0; j < width; ++j) made[j] *= factor;
      length *= rest;
    }
  }
}

// Makes each basis vector's entry of largest magnitude positive.
void fix_signs(const RmmFit& view, const Work& work) {
  const Lanes one = 1.0 - Lanes{};
  for (int64_t k = 0; k < view.rank; ++k) {
    Lanes* const direction = work.basis + k * view.width;
    Lanes top = {}, sign = one;
    for (int64_t j = 0; j < view.width; ++j) {
      Lanes magnitude;
      absolute(direction + j, &magnitude);
      sign = magnitude > top ? (direction[j] < 0.0 ? -one : one) : sign;
      top = magnitude > top ? magnitude : top;
    }
    for (int64_t j = 0; j < view.width; ++j) direction[j] *= sign;
  }
}

// The vectors' components along the basis; a basis vector along which there is nothing beyond the floor becomes 0.
void project(const RmmFit& view, const Work& work, const Lanes* floor) {
  const Lanes none = {};
  for (int64_t k = 0; k < view.rank; ++k) {
    Lanes* const direction = work.basis + k * view.width;
    for (int64_t i = 0; i < view.tasks; ++i) {
      dot(work.vectors + i * view.width, direction, view.width, 1, work.coefficients + i * view.rank + k);
    }
    Lanes length;
    dot(work.coefficients + k, work.coefficients + k, view.tasks, view.rank, &length);
    root(&length);
    const Flags dropped = length <= *floor;
    for (int64_t j = 0; j < view.width; ++j) direction[j] = dropped ? none : direction[j];
    for (int64_t i = 0; i < view.tasks; ++i) {
      Lanes* const at = work.coefficients + i * view.rank + k;
      *at = dropped ? none : *at;
    }
  }
}

void fit(const RmmFit& view, int64_t first, int64_t count, void* scratch) {
  const Work work(view, scratch);
  const int64_t size = smaller(view.tasks, view.width);
  for (int64_t i = 0; i < view.tasks; ++i) {
    load_lanes(view.vectors, (i * view.positions + first) * view.width, count, view.width, work.rows, work.vectors + i * view.width);
  }
  Lanes floor;
  center(view, work, &floor);
  form_gram(view, work, size);
  diagonalize(work.gram, work.directions, size);
  sort_directions(work.gram, work.directions, size, view.rank);
  if (size == view.tasks) {
    directions_of_tasks(view, work, size, &floor);
  } else {
    for (int64_t i = 0; i < view.rank * size; ++i) work.basis[i] = work.directions[i];
  }
  fix_signs(view, work);
  project(view, work, &floor);
  const DType dtype = view.vectors.dtype;
  store_lanes(work.mean, count, view.width, work.rows, dtype, view.mean, first * view.width);
  store_lanes(work.basis, count, view.rank * view.width, work.rows, dtype, view.basis, first * view.rank * view.width);
  for (int64_t i = 0; i < view.tasks; ++i) {
    store_lanes(work.coefficients + i * view.rank, count, view.rank, work.rows, dtype, view.coefficients,
                (i * view.positions + first) * view.rank);
  }
}

int64_t scratch(const RmmFit& view) { return Work::count(view) * static_cast<int64_t>(sizeof(Lanes)); }

const RmmFitLoops table = {scratch, fit};

}  // namespace

TASKLOOM_EXPORT_LOOPS(RmmFitLoops, rmm_fit_loops, table)

}  // namespace taskloom
