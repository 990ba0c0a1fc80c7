// Cases of the loops of rmm_fit and rmm_reconstruct: positions divided among threads, each with exactly the scratch that it was promised.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "groups.h"
#include "lowrank/rmm_fit.h"
#include "lowrank/rmm_reconstruct.h"
#include "teams.h"

namespace taskloom::sanitize {
namespace {

struct Shape {
  int64_t tasks, positions, width, rank;
};

// mean, basis and coefficients, one after the other.
std::vector<char> fitted(const Shape& shape, const Buffer& vectors, DType dtype, bool center) {
  const int64_t mean = shape.positions * shape.width, basis = mean * shape.rank,
                all = mean + basis + shape.tasks * shape.positions * shape.rank;
  return agree(dtype, all, Placement::heap, [&](char* out) {
    const int64_t unit = element_size(dtype);
    const RmmFit view{{vectors.data(), dtype},    shape.tasks, shape.positions, shape.width, shape.rank, center, out, out + mean * unit,
                      out + (mean + basis) * unit};
    team()(chunk_count(shape.positions, fit_lanes), [&](int64_t block) {
      const int64_t bytes = rmm_fit_loops().scratch(view), first = block * fit_lanes;
      // The end of a page: whole lanes of 64 bytes end there, aligned.
      const Buffer scratch(bytes, Placement::page);
      EXPECT(bytes % 64 == 0);
      rmm_fit_loops().fit(view, first, std::min(fit_lanes, shape.positions - first), scratch.data());
    });
  });
}

void check_finite(DType dtype, const std::vector<char>& found) {
  for (size_t at = 0; at < found.size(); at += static_cast<size_t>(element_size(dtype))) EXPECT(!is_nan(dtype, found.data() + at));
}

void reconstruct(const Shape& shape, DType dtype, Placement placement, Random& random) {
  const bool wide = dtype == DType::f64 || random.below(4) == 0;
  const DType others = random.pick(dtypes);
  const Buffer mean = values(dtype, shape.positions * shape.width, Kind::plain, placement, random);
  const Buffer basis = values(others, shape.positions * shape.rank * shape.width, Kind::plain, placement, random);
  const Buffer coefficients = values(others, shape.positions * shape.rank, Kind::special, placement, random);
  constexpr int64_t each = 5;
  agree(dtype, shape.positions * shape.width, placement, [&](char* out) {
    const RmmReconstruct view{{mean.data(), dtype}, {basis.data(), others}, {coefficients.data(), others}, shape.width, shape.rank, out};
    team()(chunk_count(shape.positions, each), [&](int64_t block) {
      const Buffer scratch((2 * shape.width + shape.rank) * (wide ? 8 : 4), Placement::page);
      const int64_t begin = block * each;
      rmm_reconstruct_loops().reconstruct(wide, view, begin, std::min(each, shape.positions - begin), scratch.data());
    });
  });
}

}  // namespace

void rmm_fits() {
  Random random(29);
  for (const int64_t tasks : {1, 2, 5, 9}) {
    for (const int64_t width : {1, 3, 8, 17}) {
      for (const int64_t positions : {1, 7, 8, 9, 25}) {
        const Shape shape{tasks, positions, width, 1 + random.below(std::min(tasks, width))};
        const DType dtype = random.pick(dtypes);
        const Placement placement = random.pick(placements);
        constexpr Kind finite[] = {Kind::plain, Kind::equal, Kind::zero, Kind::few};
        const Kind kind = random.pick(finite);
        const bool center = random.below(2) == 0;
        begin_case("rmm_fit tasks=%ld positions=%ld width=%ld rank=%ld %s kind=%d center=%d placement=%d", tasks, positions, width,
                   shape.rank, dtype_name(dtype), static_cast<int>(kind), center, static_cast<int>(placement));
        const Buffer vectors = values(dtype, tasks * positions * width, kind, placement, random);
        check_finite(dtype, fitted(shape, vectors, dtype, center));
        const Buffer special = values(dtype, tasks * positions * width, Kind::special, placement, random);
        fitted(shape, special, dtype, center);
        reconstruct(shape, dtype, placement, random);
      }
    }
  }
}

}  // namespace taskloom::sanitize
