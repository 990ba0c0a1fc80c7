// Cases of magnitude_threshold, its loops with exactly their scratch, and magnitude_mask.
#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "check.h"
#include "groups.h"
#include "masked/magnitude_mask.h"
#include "masked/magnitude_threshold.h"
#include "sizes.h"
#include "teams.h"

namespace taskloom::sanitize {
namespace {

// A delta with its tensors, of any dtypes, with or without a base.
struct DeltaCase {
  Buffer tuned, base;
  Delta delta;

  DeltaCase(int64_t n, DType tuned_dtype, DType base_dtype, bool based, Kind kind, Placement placement, Random& random)
      : tuned(values(tuned_dtype, n, kind, placement, random)), base(values(base_dtype, based ? n : 0, kind, placement, random)) {
    delta = {tuned.data(), based ? base.data() : nullptr, tuned_dtype, base_dtype};
  }
};

int64_t magnitude_at(const Buffer& bits, bool wide, int64_t i) {
  if (wide) {
    int64_t value;
    std::memcpy(&value, bits.data() + 8 * i, sizeof value);
    return value;
  }
  int32_t value;
  std::memcpy(&value, bits.data() + 4 * i, sizeof value);
  return value;
}

void count_brackets(const Delta& delta, bool wide, int64_t begin, int64_t n, const Buffer& bits, Random& random) {
  const int64_t width = wide ? 8 : 4;
  const int count = static_cast<int>(1 + random.below(3));
  std::vector<std::array<int64_t, 2>> ends;
  for (int i = 0; i < count; ++i) {
    const int64_t a = n == 0 ? 0 : magnitude_at(bits, wide, random.below(n)), b = n == 0 ? 1 : magnitude_at(bits, wide, random.below(n));
    ends.push_back({std::min(a, b), std::max(a, b)});
  }
  agree_bytes(8 * 4 * count, Placement::page, [&](char* out) {
    std::vector<Buffer> between;
    std::vector<BracketCount> brackets;
    for (const auto& [low, high] : ends) {
      // Room for the whole chunk and one vector.
      between.emplace_back(n * width + 64, Placement::page);
      brackets.push_back({low, high, 1, 1, 1, 1, between.back().data()});
    }
    threshold_loops().count_brackets(wide, delta, begin, n, brackets.data(), count);
    auto* figures = reinterpret_cast<int64_t*>(out);
    for (const BracketCount& bracket : brackets) {
      EXPECT(bracket.above + bracket.equal_high + bracket.between <= n);
      *figures++ = bracket.above;
      *figures++ = bracket.equal_high;
      *figures++ = bracket.equal_low;
      *figures++ = bracket.between;
    }
  });
}

void loops_case(DType tuned_dtype, DType base_dtype, bool based, int64_t n, Random& random) {
  const Placement placement = random.pick(placements);
  const Kind kind = random.pick(kinds);
  const int64_t begin = random.below(20);
  begin_case("threshold_loops %s - %s based=%d n=%ld begin=%ld kind=%d placement=%d", dtype_name(tuned_dtype), dtype_name(base_dtype),
             based, n, begin, static_cast<int>(kind), static_cast<int>(placement));
  const DeltaCase made(begin + n, tuned_dtype, base_dtype, based, kind, placement, random);
  const bool wide = is_wide(made.delta) || random.below(4) == 0;
  const int64_t width = wide ? 8 : 4;
  const std::vector<char> found =
      agree_bytes(width * n, Placement::page, [&](char* out) { threshold_loops().magnitudes(wide, made.delta, begin, n, out); });
  const Buffer bits(width * n, Placement::page);
  std::copy(found.begin(), found.end(), bits.data());
  count_brackets(made.delta, wide, begin, n, bits, random);
  for (int shift = wide ? 48 : 16; shift >= 0; shift -= 16) {
    const int64_t prefix = n == 0 || shift + 16 >= 8 * width ? 0 : magnitude_at(bits, wide, random.below(n)) >> (shift + 16);
    agree_bytes(8 * histogram_bins, Placement::page, [&](char* out) {
      std::memset(out, 0, static_cast<size_t>(8 * histogram_bins));
      threshold_loops().histogram(wide, made.delta, begin, n, shift, prefix, reinterpret_cast<int64_t*>(out));
    });
  }
  for (const int64_t rank : {int64_t{0}, int64_t{1}, n / 3, n - 1, n}) {
    if (rank < 0 || rank > n) continue;
    agree_bytes(16, Placement::page, [&](char* out) {
      const Buffer scratch(width * n, Placement::page);
      const Cut cut = threshold_loops().row_cut(wide, bits.data(), n, rank, scratch.data());
      int64_t inside = 0;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t own = magnitude_at(bits, wide, i);
        inside += own > cut.bits || (own == cut.bits && i < cut.tie_end);
      }
      EXPECT(inside == rank);
      std::memcpy(out, &cut, sizeof cut);
    });
  }
  const std::vector<char> ranks = agree_bytes(4 * n, Placement::page, [&](char* out) {
    const Buffer scratch(row_rank_scratch(wide, n), Placement::heap);
    threshold_loops().row_ranks(wide, bits.data(), n, reinterpret_cast<int32_t*>(out), scratch.data());
  });
  std::vector<bool> seen(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    int32_t rank;
    std::memcpy(&rank, ranks.data() + 4 * i, sizeof rank);
    EXPECT(rank >= 0 && rank < n && !seen[static_cast<size_t>(rank)]);
    seen[static_cast<size_t>(rank)] = true;
  }
}

bool same(const Threshold& a, const Threshold& b) {
  return a.cut.bits == b.cut.bits && a.cut.tie_end == b.cut.tie_end && a.above == b.above && a.equal == b.equal &&
         a.equal_kept == b.equal_kept;
}

std::vector<int64_t> ranks_of(int64_t n, int64_t count, Random& random) {
  std::vector<int64_t> ranks;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t ends[] = {0, n, n > 0 ? 1 : 0, n > 0 ? n - 1 : 0, random.below(n + 1), random.below(n + 1), random.below(n + 1)};
    ranks.push_back(random.pick(ends));
  }
  return ranks;
}

// One delta's thresholds at every level, alone and by the team; and found again from what was found.
void drivers_case(int64_t n, Random& random) {
  const Placement placement = random.pick(placements);
  const Kind kind = random.pick(kinds);
  const DType dtype = random.pick(dtypes);
  const int tasks = static_cast<int>(1 + random.below(3)), cuts = static_cast<int>(1 + random.below(3));
  begin_case("magnitude_thresholds tasks=%d cuts=%d dtype=%s n=%ld kind=%d placement=%d", tasks, cuts, dtype_name(dtype), n,
             static_cast<int>(kind), static_cast<int>(placement));
  std::vector<DeltaCase> made;
  std::vector<Delta> deltas;
  bool wide = random.below(4) == 0;
  for (int t = 0; t < tasks; ++t) {
    made.emplace_back(n, random.below(2) == 0 ? dtype : random.pick(dtypes), dtype, random.below(3) > 0, kind, placement, random);
    deltas.push_back(made.back().delta);
    wide = wide || is_wide(deltas.back());
  }
  const std::vector<int64_t> ranks = ranks_of(n, tasks * cuts, random);
  std::vector<Threshold> first;
  for (const std::string& level : compared_levels()) {
    force_cpu_level(level.c_str());
    for (const int64_t room : {default_room, least_threshold_room}) {
      for (const ParallelFor& parallel : {serial(), team()}) {
        const std::vector<Threshold> found = magnitude_thresholds(deltas.data(), tasks, n, ranks.data(), cuts, wide, room, parallel);
        if (first.empty()) first = found;
        EXPECT(std::equal(first.begin(), first.end(), found.begin(), found.end(), same));
      }
    }
  }
  force_cpu_level("");
  for (int i = 0; i < tasks * cuts; ++i) {
    const int64_t rank = ranks[static_cast<size_t>(i)];
    if (rank == 0 || n == 0) continue;
    const Delta& delta = deltas[static_cast<size_t>(i / cuts)];
    const Threshold exact = exact_magnitude_threshold(delta, n, rank, wide, team());
    EXPECT(exact.above + exact.equal_kept == rank && exact.equal_kept <= exact.equal);
    const Cut again = cut_of_threshold(delta, n, exact.cut.bits, exact.equal_kept, wide, team());
    EXPECT(again.bits == exact.cut.bits && (again.tie_end == exact.cut.tie_end || rank == n));
  }
}

void joint_case(Random& random) {
  const int64_t count = 1 + random.below(4);
  const Kind kind = random.pick(kinds);
  const Placement placement = random.pick(placements);
  std::vector<DeltaCase> made;
  std::vector<DeltaSegment> segments;
  int64_t total = 0;
  constexpr int64_t lengths[] = {0, 1, 17, 1000, (1 << 17) + 1};
  for (int64_t s = 0; s < count; ++s) {
    const int64_t n = random.pick(lengths);
    made.emplace_back(n, random.pick(dtypes), random.pick(dtypes), random.below(2) == 0, kind, placement, random);
    segments.push_back({made.back().delta, n});
    total += n;
  }
  begin_case("joint_magnitude_thresholds segments=%ld total=%ld kind=%d placement=%d", count, total, static_cast<int>(kind),
             static_cast<int>(placement));
  const std::vector<int64_t> ranks = ranks_of(total, 2, random);
  std::vector<int64_t> first_ends;
  for (const std::string& level : compared_levels()) {
    force_cpu_level(level.c_str());
    std::vector<int64_t> ends;
    const std::vector<Threshold> found =
        joint_magnitude_thresholds(segments, ranks, &ends, team(), random.below(2) == 0 && first_ends.empty());
    EXPECT(found.size() == 2 && ends.size() == 2 * segments.size());
    if (!first_ends.empty()) break;
    first_ends = ends;
  }
  force_cpu_level("");
}

void rows_case(int64_t rows, int64_t length, Random& random) {
  const Placement placement = random.pick(placements);
  const Kind kind = random.pick(kinds);
  const DType tuned = random.pick(dtypes), base = random.pick(dtypes);
  begin_case("rows %ld x %ld %s - %s kind=%d placement=%d", rows, length, dtype_name(tuned), dtype_name(base), static_cast<int>(kind),
             static_cast<int>(placement));
  const DeltaCase made(rows * length, tuned, base, random.below(3) > 0, kind, placement, random);
  const bool wide = is_wide(made.delta);
  std::vector<int64_t> ranks = ranks_of(length, 2, random);
  std::sort(ranks.begin(), ranks.end());
  std::vector<Threshold> first;
  for (const std::string& level : compared_levels()) {
    force_cpu_level(level.c_str());
    const std::vector<Threshold> found = row_magnitude_thresholds(made.delta, rows, length, ranks.data(), 2, wide, team());
    if (first.empty()) first = found;
    EXPECT(std::equal(first.begin(), first.end(), found.begin(), found.end(), same));
  }
  force_cpu_level("");
  for (const bool packed : {false, true}) {
    const int64_t numel = rows * length;
    const std::vector<char> mask = agree_bytes(packed ? (numel + 7) / 8 : numel, placement, [&](char* out) {
      row_magnitude_mask(made.delta, rows, length, wide, ranks[0], ranks[1], packed, reinterpret_cast<uint8_t*>(out), team());
    });
    int64_t set = 0;
    for (int64_t i = 0; i < numel; ++i) {
      set += packed ? bit_at(reinterpret_cast<const uint8_t*>(mask.data()), i) : mask[static_cast<size_t>(i)] == 1;
    }
    EXPECT(set == rows * (ranks[1] - ranks[0]));
  }
}

void mask_case(int64_t n, Random& random) {
  const Placement placement = random.pick(placements);
  const Kind kind = random.pick(kinds);
  const DType tuned = random.pick(dtypes), base = random.pick(dtypes);
  const DeltaCase made(n, tuned, base, random.below(3) > 0, kind, placement, random);
  const bool wide = is_wide(made.delta), packed = random.below(2) == 0;
  std::vector<int64_t> ranks = ranks_of(n, 2, random);
  std::sort(ranks.begin(), ranks.end());
  begin_case("magnitude_mask n=%ld %s - %s ranks=%ld,%ld packed=%d kind=%d placement=%d", n, dtype_name(tuned), dtype_name(base), ranks[0],
             ranks[1], packed, static_cast<int>(kind), static_cast<int>(placement));
  const std::vector<Threshold> found = magnitude_thresholds(&made.delta, 1, n, ranks.data(), 2, wide, default_room, team());
  const MagnitudeBand band{found[1].cut, found[0].cut};
  const std::vector<char> mask = agree_bytes(packed ? (n + 7) / 8 : n, placement, [&](char* out) {
    magnitude_mask(made.delta, n, wide, band, packed, reinterpret_cast<uint8_t*>(out), team());
  });
  int64_t set = 0;
  for (int64_t i = 0; i < n; ++i) {
    set += packed ? bit_at(reinterpret_cast<const uint8_t*>(mask.data()), i) : mask[static_cast<size_t>(i)] == 1;
  }
  EXPECT(set == ranks[1] - ranks[0]);
}

}  // namespace

void magnitude_loops() {
  Random random(10);
  for (const int64_t n : sizes()) {
    for (const DType tuned : dtypes) {
      for (const DType base : dtypes) {
        for (int repeat = 0; repeat < 3; ++repeat) loops_case(tuned, base, repeat > 0, n, random);
      }
    }
  }
  for (const DType dtype : dtypes) loops_case(dtype, dtype, true, (1 << 17) + 1, random);
}

void magnitude_drivers() {
  Random random(11);
  for (const int64_t n : sizes_and_borders()) {
    for (int repeat = 0; repeat < (n > 5000 ? 10 : 4); ++repeat) drivers_case(n, random);
  }
  for (int repeat = 0; repeat < 20; ++repeat) joint_case(random);
}

void magnitude_masks() {
  Random random(12);
  for (const int64_t n : sizes_and_borders()) {
    for (int repeat = 0; repeat < 4; ++repeat) mask_case(n, random);
  }
  for (const int64_t rows : {1, 2, 7, 9, 300}) {
    for (const int64_t length : {0, 1, 2, 15, 16, 17, 63, 64, 65, 513, 1100}) {
      for (int repeat = 0; repeat < 3; ++repeat) rows_case(rows, length, random);
    }
  }
  rows_case(3, (1 << 17) + 1, random);
}

}  // namespace taskloom::sanitize
