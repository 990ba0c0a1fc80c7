#include "masked/magnitude_brackets.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <type_traits>

#include "common/page_buffer.h"
#include "masked/magnitude_chunks.h"

namespace taskloom {
namespace {

constexpr int64_t sample_run = 16;

// What one bracket found in one chunk; its magnitudes between are `between` entries of the bracket's region from `first` on.
struct ChunkCount {
  int64_t first;
  int32_t above, equal_high, equal_low, between;
};

// Entries of a sample of `numel` magnitudes.
int64_t sample_size(int64_t numel) { return std::max(std::clamp<int64_t>(numel / 64, 1 << 13, 1 << 17), numel / 512); }

int64_t sample_size(int64_t numel, int64_t width, int64_t room) {
  const int64_t most = room / width / sample_run * sample_run;
  return std::max(sample_run, std::min(sample_size(numel) / sample_run * sample_run, most));
}

// Half the width of a bracket, in entries of the sample: several standard deviations of a rank in it.
double bracket_margin(double size, double share) { return 6.0 * std::sqrt(size * share * (1 - share)) + 16; }

// Bytes that the magnitudes between one bracket are expected to take.
int64_t expected_between(int64_t numel, int64_t width, int64_t sample) {
  const double size = static_cast<double>(sample);
  return static_cast<int64_t>(2 * bracket_margin(size, 0.5) / size * static_cast<double>(numel * width));
}

int64_t table_bytes(int64_t numel) { return chunk_count(numel, threshold_chunk) * static_cast<int64_t>(sizeof(ChunkCount)); }

// A region is twice what is expected, as clusters of like magnitudes make brackets wider; more than all entries cannot lie there.
int64_t most_region(int64_t numel, int64_t width, int64_t sample) {
  return std::min(numel * width, 2 * expected_between(numel, width, sample)) + vector_room * width;
}

// Magnitudes at jittered places: runs of `sample_run`, one in each of equal stretches.
template <class Bits>
void draw_sample(const Delta& delta, int64_t numel, Bits* sample, int64_t size) {
  constexpr bool wide = sizeof(Bits) == 8;
  const int64_t runs = size / sample_run;
  const int64_t stretch = numel / runs;
  uint64_t state = 0x9E3779B97F4A7C15ull;
  for (int64_t run = 0; run < runs; ++run) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    const int64_t jitter = static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(stretch - sample_run + 1));
    threshold_loops().magnitudes(wide, delta, run * stretch + jitter, sample_run, sample + run * sample_run);
  }
}

// The magnitudes of a sample between which the rank's threshold lies, with a margin of several standard deviations.
template <class Bits>
BracketCount bracket_of(Bits* sample, int64_t size, int64_t numel, int64_t rank) {
  const double share = static_cast<double>(rank) / static_cast<double>(numel);
  const double center = share * static_cast<double>(size);
  const double margin = bracket_margin(static_cast<double>(size), share);
  auto at = [&](double position) {
    const int64_t index = std::clamp<int64_t>(static_cast<int64_t>(position), 0, size - 1);
    std::nth_element(sample, sample + index, sample + size, std::greater<Bits>());
    return static_cast<int64_t>(sample[index]);
  };
  BracketCount bracket{};
  // Near an end of the sample the end of the range is the safe bound.
  bracket.high = center < margin ? (sizeof(Bits) == 8 ? INT64_MAX : INT32_MAX) : at(center - margin);
  bracket.low = center + margin >= static_cast<double>(size) ? -1 : at(center + margin);
  return bracket;
}

struct Selected {
  int64_t bits, above, equal;
};

// The value of the rank-th largest (rank >= 1) of `n` magnitudes that lie strictly between low and high, by the histograms of ever
// lower digits of their distance from low: the magnitudes stay where they are.
template <class Bits>
Selected select_between(const Bits* values, int64_t n, int64_t rank, int64_t low, int64_t high) {
  using Word = std::make_unsigned_t<Bits>;
  constexpr int digit_bits = 11;
  auto base = static_cast<Word>(low + 1);
  int width = std::bit_width(static_cast<Word>(static_cast<Word>(high) - base));
  int64_t above = 0;
  while (true) {
    const int shift = std::max(0, width - digit_bits);
    int64_t counts[1 << digit_bits] = {};
    for (int64_t i = 0; i < n; ++i) {
      const auto distance = static_cast<Word>(static_cast<Word>(values[i]) - base);
      if ((distance >> width) == 0) ++counts[distance >> shift];
    }
    int64_t digit = (int64_t{1} << (width - shift)) - 1;
    while (above + counts[digit] < rank) above += counts[digit--];
    base = static_cast<Word>(base + (static_cast<Word>(digit) << shift));
    width = shift;
    if (shift == 0) return {static_cast<int64_t>(base), above, counts[digit]};
  }
}

template <class Bits>
class BracketPass {
 public:
  BracketPass(const Delta* deltas, int64_t numel, const WantedRank* wanted, int64_t count, int64_t room, const ParallelFor& parallel)
      : deltas_(deltas),
        numel_(numel),
        wanted_(wanted),
        count_(count),
        chunks_(chunk_count(numel, threshold_chunk)),
        sample_(sample_size(numel, sizeof(Bits), room)),
        region_(std::min((room - count * table_bytes(numel)) / count, most_region(numel, sizeof(Bits), sample_)) / width),
        parallel_(parallel),
        brackets_(static_cast<size_t>(count)),
        used_(static_cast<size_t>(count)) {
    find_brackets(room);
    table_ = PageBuffer(count * table_bytes(numel));
    between_ = PageBuffer(count * region_ * width);
    parallel_(chunks_, [this](int64_t chunk) { count_chunk(chunk); });
  }

  std::optional<Threshold> threshold(int64_t index) const {
    const WantedRank& wanted = wanted_[index];
    const BracketCount& bracket = brackets_[static_cast<size_t>(index)];
    const int64_t inside = used_[static_cast<size_t>(index)];
    if (inside > region_) return std::nullopt;
    int64_t above = 0, equal_high = 0, equal_low = 0;
    for (int64_t c = 0; c < chunks_; ++c) {
      const ChunkCount& found = at(index, c);
      above += found.above;
      equal_high += found.equal_high;
      equal_low += found.equal_low;
    }
    if (bracket.low == bracket.high) equal_low = 0;
    int64_t left = wanted.rank - above;
    if (left <= 0 || left > equal_high + inside + equal_low) return std::nullopt;
    if (left <= equal_high) {
      return finish(index, {bracket.high, above, equal_high}, [&](int64_t c) { return int64_t{at(index, c).equal_high}; });
    }
    left -= equal_high;
    above += equal_high;
    if (left > inside) {
      return finish(index, {bracket.low, above + inside, equal_low}, [&](int64_t c) { return int64_t{at(index, c).equal_low}; });
    }
    const Bits* values = region(index);
    Selected selected = select_between<Bits>(values, inside, left, bracket.low, bracket.high);
    selected.above += above;
    const auto bits = static_cast<Bits>(selected.bits);
    return finish(index, selected, [&](int64_t c) {
      const ChunkCount& found = at(index, c);
      return static_cast<int64_t>(std::count(values + found.first, values + found.first + found.between, bits));
    });
  }

 private:
  static constexpr bool wide = sizeof(Bits) == 8;
  static constexpr int64_t width = sizeof(Bits);

  ChunkCount& at(int64_t index, int64_t chunk) const { return reinterpret_cast<ChunkCount*>(table_.data())[index * chunks_ + chunk]; }
  Bits* region(int64_t index) const { return reinterpret_cast<Bits*>(between_.data()) + index * region_; }

  void find_brackets(int64_t room) {
    const int64_t together = std::clamp<int64_t>(room / (sample_ * width), 1, count_);
    const PageBuffer samples(together * sample_ * width);
    for (int64_t first = 0; first < count_; first += together) {
      parallel_(std::min(together, count_ - first), [&](int64_t i) {
        Bits* sample = reinterpret_cast<Bits*>(samples.data()) + i * sample_;
        const WantedRank& wanted = wanted_[first + i];
        draw_sample(deltas_[wanted.task], numel_, sample, sample_);
        brackets_[static_cast<size_t>(first + i)] = bracket_of(sample, sample_, numel_, wanted.rank);
      });
    }
  }

  void count_chunk(int64_t chunk) {
    const ChunkRange range = chunk_range(chunk, numel_);
    const int64_t room = threshold_chunk + vector_room;
    for (int64_t first = 0, last = 0; first < count_; first = last) {
      while (last < count_ && wanted_[last].task == wanted_[first].task) ++last;
      const ThreadScratch scratch(ScratchUse::magnitudes, room * (last - first) * width);
      std::vector<BracketCount> counts(brackets_.begin() + first, brackets_.begin() + last);
      for (int64_t i = 0; i < last - first; ++i) counts[static_cast<size_t>(i)].between_bits = scratch.as<Bits>() + room * i;
      threshold_loops().count_brackets(wide, deltas_[wanted_[first].task], range.begin, range.length, counts.data(),
                                       static_cast<int>(last - first));
      for (int64_t i = first; i < last; ++i) keep(i, chunk, counts[static_cast<size_t>(i - first)]);
    }
  }

  void keep(int64_t index, int64_t chunk, const BracketCount& count) {
    const int64_t first = used_[static_cast<size_t>(index)].fetch_add(count.between, std::memory_order_relaxed);
    at(index, chunk) = {first, static_cast<int32_t>(count.above), static_cast<int32_t>(count.equal_high),
                        static_cast<int32_t>(count.equal_low), static_cast<int32_t>(count.between)};
    if (first + count.between <= region_) std::copy_n(static_cast<const Bits*>(count.between_bits), count.between, region(index) + first);
  }

  template <class ChunkEqual>
  Threshold finish(int64_t index, const Selected& selected, const ChunkEqual& chunk_equal) const {
    const WantedRank& wanted = wanted_[index];
    const int64_t kept = wanted.rank - selected.above;
    Threshold found{{selected.bits, INT64_MAX}, selected.above, selected.equal, kept};
    if (kept < selected.equal) {
      found.cut.tie_end = locate_tie(wide, deltas_[wanted.task], numel_, selected.bits, kept, chunk_equal);
    }
    return found;
  }

  const Delta* deltas_;
  int64_t numel_;
  const WantedRank* wanted_;
  int64_t count_, chunks_;
  int64_t sample_, region_;  // entries
  const ParallelFor& parallel_;
  std::vector<BracketCount> brackets_;
  std::vector<std::atomic<int64_t>> used_;
  PageBuffer table_, between_;
};

// Thresholds that may be sought at once.
int64_t ranks_at_once(int64_t numel, int64_t width, int64_t room) {
  const int64_t between = expected_between(numel, width, sample_size(numel, width, room));
  return room / (between + between / 4 + vector_room * width + table_bytes(numel));
}

template <class Bits>
void find_all(const Delta* deltas, int64_t numel, const std::vector<WantedRank>& wanted, int64_t room, const ParallelFor& parallel,
              std::vector<std::optional<Threshold>>* found) {
  const auto count = static_cast<int64_t>(wanted.size());
  const int64_t together = ranks_at_once(numel, sizeof(Bits), room);
  if (together == 0) return;
  for (int64_t first = 0; first < count; first += together) {
    const int64_t part = std::min(together, count - first);
    const BracketPass<Bits> pass(deltas, numel, wanted.data() + first, part, room, parallel);
    parallel(part, [&](int64_t i) { (*found)[static_cast<size_t>(first + i)] = pass.threshold(i); });
  }
}

}  // namespace

std::vector<std::optional<Threshold>> bracketed_thresholds(const Delta* deltas, int64_t numel, const std::vector<WantedRank>& wanted,
                                                           bool wide, int64_t room, const ParallelFor& parallel) {
  std::vector<std::optional<Threshold>> found(wanted.size());
  if (wide) {
    find_all<int64_t>(deltas, numel, wanted, room, parallel, &found);
  } else {
    find_all<int32_t>(deltas, numel, wanted, room, parallel, &found);
  }
  return found;
}

int64_t most_bracket_room(int64_t numel, int64_t wanted, bool wide) {
  const int64_t width = wide ? 8 : 4;
  const int64_t sample = sample_size(numel) / sample_run * sample_run;
  return wanted * std::max(sample * width, table_bytes(numel) + most_region(numel, width, sample));
}

}  // namespace taskloom
