// Cases of expert_sort, and of the loops of expert_combine and manifold_loss: entries and rows divided among threads, each with exactly the
// scratch that it was promised.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "check.h"
#include "gating/expert_combine.h"
#include "gating/expert_sort.h"
#include "gating/manifold_loss.h"
#include "groups.h"
#include "teams.h"

namespace taskloom::sanitize {
namespace {

// Indices below `count`, as many as asked for, in the width asked for.
struct DrawnIndices {
  std::vector<int64_t> values;
  Buffer stored;
  bool wide;

  DrawnIndices(std::vector<int64_t> given, bool wide_ones, Placement placement)
      : values(std::move(given)), stored(static_cast<int64_t>(values.size()) * (wide_ones ? 8 : 4), placement), wide(wide_ones) {
    for (size_t i = 0; i < values.size(); ++i) {
      const auto narrow = static_cast<int32_t>(values[i]);
      if (wide) {
        std::memcpy(stored.data() + 8 * i, &values[i], 8);
      } else {
        std::memcpy(stored.data() + 4 * i, &narrow, 4);
      }
    }
  }

  Indices view() const { return {stored.data(), wide}; }
};

DrawnIndices draw_indices(int64_t n, int64_t least, int64_t count, Placement placement, Random& random) {
  std::vector<int64_t> values(static_cast<size_t>(n));
  for (auto& value : values) value = least + random.below(count - least);
  return {std::move(values), random.below(2) == 0, placement};
}

DrawnIndices draw_places(int64_t n, Placement placement, Random& random) {
  std::vector<int64_t> values(static_cast<size_t>(n));
  std::iota(values.begin(), values.end(), int64_t{0});
  for (int64_t i = n - 1; i > 0; --i) std::swap(values[static_cast<size_t>(i)], values[static_cast<size_t>(random.below(i + 1))]);
  return {std::move(values), random.below(2) == 0, placement};
}

void check_order(const DrawnIndices& ids, int64_t experts, int64_t block) {
  const auto entries = static_cast<int64_t>(ids.values.size());
  std::vector<int32_t> order(ids.values.size()), inverse(ids.values.size()), offsets(static_cast<size_t>(experts + 1));
  const Buffer counts(chunk_count(entries, expert_sort_chunk(experts)) * experts * 4, Placement::heap);
  const ExpertSort sort{ids.view(), entries, experts, order.data(), inverse.data(), offsets.data()};
  EXPECT(sort_by_expert(team(), sort, reinterpret_cast<int32_t*>(counts.data())) == -1);
  std::vector<int32_t> expected(ids.values.size());
  std::iota(expected.begin(), expected.end(), 0);
  const auto id_of = [&](int32_t entry) { return ids.values[static_cast<size_t>(entry)]; };
  std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) { return id_of(a) < id_of(b); });
  EXPECT(order == expected);
  for (size_t place = 0; place < order.size(); ++place) EXPECT(inverse[static_cast<size_t>(order[place])] == static_cast<int32_t>(place));
  const int64_t size = padded_size(entries, experts, block);
  std::vector<int32_t> padded(static_cast<size_t>(size)), starts(static_cast<size_t>(experts + 1)),
      owners(static_cast<size_t>(size / block));
  fill_blocks(team(), sort, {block, size, padded.data(), starts.data(), owners.data()});
  EXPECT(std::count_if(padded.begin(), padded.end(), [&](int32_t entry) { return entry < entries; }) == entries);
  for (size_t place = 0; place < padded.size(); ++place) {
    const int32_t owner = owners[place / static_cast<size_t>(block)];
    if (padded[place] < entries) EXPECT(id_of(padded[place]) == owner);
  }
}

void check_wrong_id(const DrawnIndices& ids, int64_t experts, Random& random) {
  const auto entries = static_cast<int64_t>(ids.values.size());
  const int64_t place = random.below(entries);
  auto values = ids.values;
  values[static_cast<size_t>(place)] = random.below(2) == 0 ? -1 : experts;
  const DrawnIndices wrong(std::move(values), ids.wide, Placement::heap);
  const Buffer counts(chunk_count(entries, expert_sort_chunk(experts)) * experts * 4, Placement::heap);
  const ExpertSort sort{wrong.view(), entries, experts, nullptr, nullptr, nullptr};
  EXPECT(sort_by_expert(team(), sort, reinterpret_cast<int32_t*>(counts.data())) == place);
}

void combine(int64_t tokens, int64_t slots, int64_t width, DType dtype, Placement placement, Random& random) {
  const DType of_weights = random.pick(dtypes);
  const bool wide = dtype == DType::f64 || of_weights == DType::f64;
  const int64_t rows = tokens * slots, accumulator = wide ? 8 : 4;
  const Buffer y = values(dtype, rows * width, random.pick(kinds), placement, random);
  const Buffer weight = values(of_weights, rows, Kind::plain, placement, random);
  const Buffer gradient = values(dtype, tokens * width, Kind::plain, placement, random);
  const DrawnIndices places = draw_places(rows, placement, random);
  ExpertCombine view{{y.data(), dtype}, {weight.data(), of_weights}, places.view(), rows, slots, width, nullptr};
  constexpr int64_t each = 3;
  const auto pieces = [&](const auto& body) {
    team()(chunk_count(tokens, each), [&](int64_t piece) { body(piece * each, std::min(piece * each + each, tokens)); });
  };
  agree(dtype, tokens * width, placement, [&](char* out) {
    view.out = out;
    pieces([&](int64_t begin, int64_t end) {
      const Buffer scratch(((expert_combine_rows + 1) * expert_combine_block + slots) * accumulator, Placement::heap);
      expert_combine_loops().forward(wide, view, begin, end, scratch.data());
    });
  });
  const auto backward = [&](void* for_y, void* for_weight) {
    const ExpertCombineBackward both{view, {gradient.data(), dtype}, for_y, for_weight};
    pieces([&](int64_t begin, int64_t end) {
      const Buffer scratch(((expert_dot_rows + 2) * expert_combine_block + slots) * accumulator + slots * 8, Placement::heap);
      expert_combine_loops().backward(wide, both, begin, end, scratch.data());
    });
  };
  agree(dtype, rows * width, placement, [&](char* out) { backward(out, nullptr); });
  agree(of_weights, rows, placement, [&](char* out) { backward(nullptr, out); });
}

void manifold(int64_t rows, int64_t neighbours, int64_t width, DType dtype, Placement placement, Random& random) {
  const DType of_table = random.pick(dtypes);
  const bool wide = dtype == DType::f64 || of_table == DType::f64;
  const int64_t known = 1 + random.below(7), accumulator = wide ? 8 : 4;
  const Buffer r = values(dtype, rows * width, random.pick(kinds), placement, random);
  const Buffer table = values(of_table, known * width, random.pick(kinds), placement, random);
  const Buffer weight = values(DType::f32, rows * neighbours, Kind::plain, placement, random);
  const Buffer gradient = values(DType::f32, rows, Kind::plain, placement, random);
  const DrawnIndices ids = draw_indices(rows * neighbours, -1, known, placement, random);
  const ManifoldLoss view{{r.data(), dtype}, {table.data(), of_table}, ids.view(), {weight.data(), DType::f32}, known, neighbours, width};
  constexpr int64_t each = 3;
  const auto pieces = [&](const auto& body) {
    team()(chunk_count(rows, each), [&](int64_t piece) { body(piece * each, std::min(piece * each + each, rows)); });
  };
  agree(wide ? DType::f64 : DType::f32, rows, Placement::heap, [&](char* out) {
    pieces([&](int64_t begin, int64_t end) {
      const Buffer scratch((2 * manifold_block + neighbours) * accumulator + neighbours * 8, Placement::heap);
      manifold_loss_loops().forward(wide, view, begin, end, out, scratch.data());
    });
  });
  agree(dtype, rows * width, placement, [&](char* out) {
    pieces([&](int64_t begin, int64_t end) {
      const Buffer scratch((3 * manifold_block + neighbours) * accumulator, Placement::heap);
      manifold_loss_loops().backward(wide, view, {gradient.data(), DType::f32}, begin, end, out, scratch.data());
    });
  });
}

}  // namespace

void expert_sorts() {
  Random random(31);
  for (const int64_t entries : {1, 2, 77, 16384, 16385, 50000}) {
    for (const int64_t experts : {1, 5, 64, 5000}) {
      const int64_t block = 1 + random.below(40);
      begin_case("expert_sort entries=%ld experts=%ld block=%ld", entries, experts, block);
      const DrawnIndices ids = draw_indices(entries, 0, experts, random.pick(placements), random);
      check_order(ids, experts, block);
      check_wrong_id(ids, experts, random);
    }
  }
}

void expert_rows() {
  Random random(37);
  for (const int64_t rows : {1, 4, 11}) {
    for (const int64_t each : {1, 3, 8, 19}) {
      for (const int64_t width : {1, 16, 75, 512, 1111}) {
        const DType dtype = random.pick(dtypes);
        const Placement placement = random.pick(placements);
        begin_case("expert_rows rows=%ld each=%ld width=%ld %s placement=%d", rows, each, width, dtype_name(dtype),
                   static_cast<int>(placement));
        combine(rows, each, width, dtype, placement, random);
        manifold(rows, each, width, dtype, placement, random);
      }
    }
  }
}

}  // namespace taskloom::sanitize
