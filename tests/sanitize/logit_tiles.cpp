// Cases of the loops of weighted_ce: tiles of logits in memory of exactly their size.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "groups.h"
#include "masked/weighted_ce.h"
#include "sizes.h"

namespace taskloom::sanitize {
namespace {

// A tile has room for whole lanes behind the last column of its last row, and not a byte more.
Buffer copied(const Buffer& from, Placement placement) {
  Buffer made(from.bytes(), placement);
  std::memcpy(made.data(), from.data(), static_cast<size_t>(from.bytes()));
  return made;
}

double number(DType dtype, const char* data, int64_t index) {
  if (dtype == DType::f64) {
    double value;
    std::memcpy(&value, data + 8 * index, sizeof value);
    return value;
  }
  float value;
  std::memcpy(&value, data + 4 * index, sizeof value);
  return static_cast<double>(value);
}

void check_row(DType dtype, const char* logits, int64_t columns, double largest, double sum) {
  double top = -INFINITY, total = 0;
  for (int64_t i = 0; i < columns; ++i) top = std::fmax(top, number(dtype, logits, i));
  for (int64_t i = 0; i < columns; ++i) total += std::exp(number(dtype, logits, i) - top);
  EXPECT(largest == top);
  EXPECT(std::fabs(sum - total) <= (dtype == DType::f64 ? 1e-13 : 1e-6) * total);
}

}  // namespace

void logit_tiles() {
  Random random(11);
  for (const int64_t columns : sizes()) {
    if (columns == 0) continue;
    for (const DType dtype : {DType::f32, DType::f64}) {
      for (const Kind kind : kinds) {
        const bool wide = dtype == DType::f64;
        const int64_t unit = element_size(dtype), rows = 1 + random.below(3);
        const int64_t padded = (columns + tile_lanes - 1) / tile_lanes * tile_lanes, stride = padded + random.below(20);
        // Tiles are scratch of ours, which is aligned: never at an odd address.
        const Placement placement = random.below(2) == 0 ? Placement::heap : Placement::page;
        begin_case("logit tile columns=%ld rows=%ld stride=%ld dtype=%s kind=%d placement=%d", columns, rows, stride, dtype_name(dtype),
                   static_cast<int>(kind), static_cast<int>(placement));
        const Buffer tile = values(dtype, (rows - 1) * stride + padded, kind, placement, random);
        const std::vector<char> seen = agree(dtype, 2 * rows, placement, [&](char* out) {
          const Buffer own = copied(tile, placement);
          weighted_ce_loops().reduce(wide, {own.data(), rows, columns, stride}, out, out + rows * unit);
        });
        for (int64_t row = 0; row < rows && kind != Kind::special; ++row) {
          check_row(dtype, tile.data() + row * stride * unit, columns, number(dtype, seen.data(), row),
                    number(dtype, seen.data(), rows + row));
        }
        const Buffer factors = values(dtype, rows, Kind::plain, placement, random);
        std::vector<int64_t> target(static_cast<size_t>(rows));
        for (int64_t& one : target) one = random.below(3 * columns) - columns;
        agree(dtype, (rows - 1) * stride + padded, placement, [&](char* out) {
          std::memcpy(out, tile.data(), static_cast<size_t>(tile.bytes()));
          weighted_ce_loops().slope(wide, {out, rows, columns, stride}, seen.data(), factors.data(), target.data());
        });
      }
    }
  }
}

}  // namespace taskloom::sanitize
