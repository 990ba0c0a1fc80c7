// Cases of the loops of lowrank_merge: factors packed into memory of exactly their size, rows divided among threads, and the norms.
#include <vector>

#include "check.h"
#include "groups.h"
#include "lowrank/lowrank_merge.h"
#include "teams.h"

namespace taskloom::sanitize {
namespace {

constexpr int64_t rows_each = 7;

// One product of two adapters, packed by the level in force; scratch of ours is aligned, never at an odd address.
struct Packed {
  Buffer left, right;
  LowrankFactors factors;

  Packed(bool wide, int64_t rows, int64_t columns, int64_t rank)
      : left(rows * rank * (wide ? 8 : 4), Placement::page),
        right((columns + lowrank_panel - 1) / lowrank_panel * rank * lowrank_panel * (wide ? 8 : 4), Placement::page),
        factors{left.data(), right.data(), rank} {}
};

struct Adapter {
  Buffer a, b;
  DType dtype;
  int64_t rank;
};

void one_shape(int64_t rows, int64_t columns, Random& random) {
  const Placement placement = random.pick(placements);
  const DType dtype = random.pick(dtypes), out_dtype = random.pick(dtypes);
  const bool wide = dtype == DType::f64 || random.below(4) == 0;
  const int64_t stride = columns + random.below(3), tasks = 1 + random.below(3), width = wide ? 8 : 4;
  begin_case("lowrank_merge rows=%ld columns=%ld stride=%ld tasks=%ld %s to %s wide=%d placement=%d", rows, columns, stride, tasks,
             dtype_name(dtype), dtype_name(out_dtype), wide, static_cast<int>(placement));
  const Buffer base = values(dtype, (rows - 1) * stride + columns, Kind::plain, placement, random);
  const Buffer scale = values(wide ? DType::f64 : DType::f32, rows, Kind::plain, Placement::heap, random);
  const bool scaled = random.below(2) == 0;
  std::vector<std::vector<Adapter>> adapters(static_cast<size_t>(tasks));
  for (auto& list : adapters) {
    for (int64_t count = 1 + random.below(2); count > 0; --count) {
      const DType own = random.pick(dtypes);
      const int64_t rank = 1 + random.below(9);
      list.push_back({values(own, rank * columns, Kind::plain, placement, random), values(own, rows * rank, Kind::plain, placement, random),
                      own, rank});
    }
  }
  auto each_part = [&](const auto& run) {
    const int64_t parts = chunk_count(rows, rows_each);
    team()(parts, [&](int64_t part) { run(part * rows_each, part * rows_each + rows_each < rows ? rows_each : rows - part * rows_each); });
  };
  auto packed = [&] {
    std::vector<Packed> made;
    for (const auto& list : adapters) {
      int64_t rank = 0, at = 0;
      for (const Adapter& one : list) rank += one.rank;
      made.emplace_back(wide, rows, columns, rank);
      for (const Adapter& one : list) {
        const LowrankFactors& to = made.back().factors;
        each_part([&](int64_t begin, int64_t n) {
          lowrank_merge_loops().pack_left(wide, {one.b.data(), one.dtype}, one.rank, 0.7, at, to, begin, n);
        });
        lowrank_merge_loops().pack_right(wide, {one.a.data(), one.dtype}, one.rank, columns, at, to);
        at += one.rank;
      }
    }
    return made;
  };
  const LowrankRows origin{base.data(), dtype, stride};
  agree(out_dtype, tasks * rows * columns, placement, [&](char* out) {
    const std::vector<Packed> made = packed();
    std::vector<LowrankFactors> factors;
    for (const Packed& one : made) factors.push_back(one.factors);
    const LowrankMerge merge{origin, rows,      columns, factors.data(), tasks, scaled ? scale.data() : nullptr,
                             out,    out_dtype, columns, rows * columns};
    each_part([&](int64_t begin, int64_t n) { lowrank_merge_loops().merge(wide, merge, begin, n); });
  });
  agree_bytes(rows * width, Placement::page, [&](char* out) {
    const std::vector<Packed> made = packed();
    const LowrankMerge merge{origin, rows, columns, &made.front().factors, 1, nullptr, nullptr, dtype, 0, 0};
    each_part([&](int64_t begin, int64_t n) { lowrank_merge_loops().norms(wide, merge, begin, n, out); });
  });
}

}  // namespace

void lowrank_merges() {
  Random random(23);
  for (const int64_t rows : {1, 3, 6, 23, 24, 25, 50}) {
    for (const int64_t columns : {1, 15, 63, 64, 65, 129}) {
      for (int repeat = 0; repeat < 4; ++repeat) one_shape(rows, columns, random);
    }
  }
}

}  // namespace taskloom::sanitize
