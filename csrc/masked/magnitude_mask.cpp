// Drivers of magnitude_mask: chunks that begin at whole bytes of a packed mask.
#include "masked/magnitude_mask.h"

#include <algorithm>
#include <vector>

#include "masked/packed_mask.h"

namespace taskloom {
namespace {

constexpr int64_t chunk = 1 << 18;
constexpr int64_t piece = 1 << 13;

// Calls fill(begin, n, bytes) for every chunk, where `bytes` takes 0 or 1 for each entry, and packs what it filled.
template <class Fill>
void for_chunks(int64_t numel, int64_t length, bool packed, uint8_t* mask, const ParallelFor& parallel, const Fill& fill) {
  parallel(chunk_count(numel, length), [&](int64_t index) {
    const int64_t begin = index * length;
    const int64_t n = std::min(length, numel - begin);
    if (!packed) return fill(begin, n, mask + begin);
    thread_local std::vector<uint8_t> bytes;
    bytes.resize(static_cast<size_t>(n));
    fill(begin, n, bytes.data());
    packed_mask_loops().pack(bytes.data(), n, mask + begin / 8);
  });
}

// Room for the magnitudes of n entries.
void* magnitude_room(bool wide, int64_t n) {
  thread_local std::vector<int64_t> room;
  const auto words = static_cast<size_t>(wide ? n : n / 2 + 1);
  if (room.size() < words) room.resize(words);
  return room.data();
}

}  // namespace

void magnitude_mask(const Delta& delta, int64_t numel, bool wide, const MagnitudeBand& band, bool packed, uint8_t* mask,
                    const ParallelFor& parallel) {
  for_chunks(numel, chunk, packed, mask, parallel, [&](int64_t begin, int64_t n, uint8_t* bytes) {
    void* bits = magnitude_room(wide, piece);
    for (int64_t done = 0; done < n; done += piece) {
      const int64_t size = std::min(piece, n - done);
      threshold_loops().magnitudes(wide, delta, begin + done, size, bits);
      magnitude_mask_loops().keep(wide, bits, size, begin + done, band, bytes + done);
    }
  });
}

void row_magnitude_mask(const Delta& delta, int64_t rows, int64_t row_length, bool wide, int64_t rank_begin, int64_t rank_end, bool packed,
                        uint8_t* mask, const ParallelFor& parallel) {
  if (row_length == 0) return;
  const int64_t group = std::max<int64_t>(8, chunk / row_length / 8 * 8);
  for_chunks(rows * row_length, group * row_length, packed, mask, parallel, [&](int64_t begin, int64_t n, uint8_t* bytes) {
    // Magnitudes of one row, and behind them the scratch of its cuts.
    auto* bits = static_cast<char*>(magnitude_room(wide, 2 * row_length));
    char* scratch = bits + row_length * (wide ? 8 : 4);
    for (int64_t row = 0; row < n; row += row_length) {
      threshold_loops().magnitudes(wide, delta, begin + row, row_length, bits);
      const MagnitudeBand band{threshold_loops().row_cut(wide, bits, row_length, rank_end, scratch),
                               threshold_loops().row_cut(wide, bits, row_length, rank_begin, scratch)};
      magnitude_mask_loops().keep(wide, bits, row_length, 0, band, bytes + row);
    }
  });
}

}  // namespace taskloom
