// Cases of what all loops share: conversions between storage types, inner products, random words.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "common/philox.h"
#include "groups.h"
#include "masked/sparse_merge.h"
#include "philox_table.h"
#include "sizes.h"

namespace taskloom::sanitize {

void conversions() {
  Random random(8);
  for (const int64_t n : sizes_and_chunks()) {
    for (const DType from : dtypes) {
      for (const DType to : dtypes) {
        for (const Kind kind : kinds) {
          if (n > 5000 && kind != Kind::special) continue;
          const Placement placement = random.pick(placements);
          const int64_t begin = random.below(20);
          begin_case("convert %s to %s n=%ld begin=%ld kind=%d placement=%d", dtype_name(from), dtype_name(to), n, begin,
                     static_cast<int>(kind), static_cast<int>(placement));
          const Buffer input = values(from, begin + n, kind, placement, random);
          const std::vector<char> converted =
              agree(to, n, placement, [&](char* out) { sparse_merge_loops().convert(from, input.data(), begin, n, to, out); });
          if (from == to) EXPECT(same_values(to, converted.data(), input.data() + begin * element_size(from), n));
          MergeTask a, b;
          a.tuned = input.data();
          a.dtype = from;
          Buffer other = values(to, begin + n, Kind::plain, placement, random);
          b.tuned = other.data();
          b.dtype = to;
          agree(DType::f64, 3, Placement::page, [&](char* out) {
            std::fill_n(reinterpret_cast<double*>(out), 3, 0.0);
            sparse_merge_loops().inner_products(a, b, begin, n, reinterpret_cast<double*>(out));
          });
        }
      }
    }
  }
}

void philox() {
  Random random(9);
  // The last are around where the low half of a block's counter wraps within a group of blocks.
  constexpr int64_t border = int64_t{1} << 34;
  for (const int64_t begin : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{3}, int64_t{4}, int64_t{31}, int64_t{32}, int64_t{33},
                              border - 40, border - 33, border - 3, border, border + 5}) {
    for (const int64_t n : sizes()) {
      const uint64_t seed = random.next(), key = random.next();
      for (const Placement placement : {Placement::heap, Placement::page}) {
        begin_case("philox begin=%ld n=%ld placement=%d", begin, n, static_cast<int>(placement));
        const std::vector<char> got = agree_bytes(
            4 * n, placement, [&](char* out) { philox_table_loops().words(seed, key, begin, n, reinterpret_cast<uint32_t*>(out)); });
        for (int64_t i = 0; i < n; ++i) {
          uint32_t word;
          std::memcpy(&word, got.data() + 4 * i, sizeof word);
          EXPECT(word == philox_4x32_10(seed, key, static_cast<uint64_t>(begin + i) / 4).word[(begin + i) % 4]);
        }
      }
    }
  }
}

}  // namespace taskloom::sanitize
