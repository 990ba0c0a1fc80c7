// Drivers of magnitude_threshold: a sampled bracket and one counting pass find a threshold; where the sample misled (or over a whole
// model) exact radix histograms do.
#include "masked/magnitude_threshold.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace taskloom {
namespace {

constexpr int64_t chunk = 1 << 17;
// Up to here all magnitudes are copied and partially sorted: cheaper than a sample and a pass.
constexpr int64_t small = 1 << 16;
constexpr int64_t sample_run = 16;
constexpr int64_t vector_room = 64;
constexpr int64_t most_between = 64 << 20;

// Scratch of one thread, kept for its next chunk: fresh pages cost more than the work done on them.
template <class T>
T* thread_scratch(int64_t count) {
  thread_local std::vector<T> scratch;
  if (static_cast<int64_t>(scratch.size()) < count) scratch.resize(static_cast<size_t>(count));
  return scratch.data();
}

struct ChunkRange {
  int64_t begin, length;
};

ChunkRange chunk_range(int64_t index, int64_t numel) {
  const int64_t begin = index * chunk;
  return {begin, std::min(chunk, numel - begin)};
}

// tie_end for the `kept` lowest indices that equal `bits`, where chunk_equal[c] of them lie in chunk c.
template <class Count>
int64_t locate_tie(bool wide, const Delta& delta, int64_t numel, int64_t bits, int64_t kept, const Count& chunk_equal) {
  if (kept == 0) return 0;
  int64_t index = 0;
  while (kept > chunk_equal(index)) kept -= chunk_equal(index++);
  const ChunkRange range = chunk_range(index, numel);
  auto search = [&](auto* magnitudes) {
    threshold_loops().magnitudes(wide, delta, range.begin, range.length, magnitudes);
    for (int64_t i = 0;; ++i) {
      if (static_cast<int64_t>(magnitudes[i]) == bits && --kept == 0) return range.begin + i + 1;
    }
  };
  return wide ? search(thread_scratch<int64_t>(range.length)) : search(thread_scratch<int32_t>(range.length));
}

Threshold trivial(bool wide, int64_t numel, int64_t rank) {
  if (rank <= 0) return {cut_none(wide), 0, 0, 0};
  return {cut_all(), numel, 0, 0};
}

// All entries of ranks strictly between 0 and numel, by a partial sort of a copy.
template <class Bits>
Threshold from_copy(const Bits* magnitudes, int64_t numel, int64_t rank, std::vector<Bits>& copy) {
  copy.assign(magnitudes, magnitudes + numel);
  std::nth_element(copy.begin(), copy.begin() + (rank - 1), copy.end(), std::greater<Bits>());
  const Bits bits = copy[static_cast<size_t>(rank - 1)];
  int64_t above = 0, equal = 0;
  for (int64_t i = 0; i < numel; ++i) {
    above += magnitudes[i] > bits;
    equal += magnitudes[i] == bits;
  }
  int64_t left = rank - above;
  Threshold found{{bits, INT64_MAX}, above, equal, left};
  if (left == equal) return found;
  for (int64_t i = 0;; ++i) {
    if (magnitudes[i] == bits && --left == 0) {
      found.cut.tie_end = i + 1;
      return found;
    }
  }
}

template <class Bits>
void small_thresholds(const Delta& delta, int64_t numel, const int64_t* ranks, int cuts, Threshold* out) {
  constexpr bool wide = sizeof(Bits) == 8;
  Bits* magnitudes = thread_scratch<Bits>(numel);
  threshold_loops().magnitudes(wide, delta, 0, numel, magnitudes);
  thread_local std::vector<Bits> copy;
  for (int i = 0; i < cuts; ++i) {
    if (ranks[i] > 0 && ranks[i] < numel) out[i] = from_copy(magnitudes, numel, ranks[i], copy);
  }
}

// Entries of a sample of `numel` magnitudes.
int64_t sample_size(int64_t numel) { return std::max(std::clamp<int64_t>(numel / 64, 1 << 13, 1 << 17), numel / 512); }

// Half the width of a bracket, in entries of the sample: several standard deviations of a rank in it.
double bracket_margin(double size, double share) { return 6.0 * std::sqrt(size * share * (1 - share)) + 16; }

// Thresholds that may be sought at once, so that the magnitudes kept between their brackets stay within `most_between` bytes.
int64_t thresholds_at_once(int64_t numel, int64_t width) {
  const double size = static_cast<double>(sample_size(numel));
  const double between = 2 * bracket_margin(size, 0.5) / size * static_cast<double>(numel * width);
  return std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(most_between) / between));
}

// Magnitudes at jittered places: runs of `sample_run`, one in each of equal stretches.
template <class Bits>
std::vector<Bits> draw_sample(const Delta& delta, int64_t numel) {
  constexpr bool wide = sizeof(Bits) == 8;
  const int64_t runs = sample_size(numel) / sample_run;
  const int64_t stretch = numel / runs;
  std::vector<Bits> sample(static_cast<size_t>(runs * sample_run));
  uint64_t state = 0x9E3779B97F4A7C15ull;
  for (int64_t run = 0; run < runs; ++run) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    const int64_t jitter = static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(stretch - sample_run + 1));
    threshold_loops().magnitudes(wide, delta, run * stretch + jitter, sample_run, sample.data() + run * sample_run);
  }
  return sample;
}

// The magnitudes of a sample between which the rank's threshold lies, with a margin of several standard deviations.
template <class Bits>
BracketCount bracket_of(std::vector<Bits>& sample, int64_t numel, int64_t rank) {
  const double size = static_cast<double>(sample.size());
  const double share = static_cast<double>(rank) / static_cast<double>(numel);
  const double margin = bracket_margin(size, share);
  auto at = [&](double position) {
    const int64_t index = std::clamp<int64_t>(static_cast<int64_t>(position), 0, static_cast<int64_t>(sample.size()) - 1);
    std::nth_element(sample.begin(), sample.begin() + index, sample.end(), std::greater<Bits>());
    return static_cast<int64_t>(sample[static_cast<size_t>(index)]);
  };
  BracketCount bracket{};
  // Near an end of the sample the end of the range is the safe bound.
  bracket.high = share * size < margin ? (sizeof(Bits) == 8 ? INT64_MAX : INT32_MAX) : at(share * size - margin);
  bracket.low = share * size + margin >= size ? -1 : at(share * size + margin);
  return bracket;
}

// What one bracket found in one chunk.
template <class Bits>
struct ChunkCount {
  int64_t above, equal_high, equal_low;
  std::vector<Bits> between;
};

struct Wanted {
  int task, cut;
  int64_t rank;
  BracketCount bracket;
};

// The digits of a threshold, most significant first, by histograms over all chunks.
template <class Histogram>
Threshold by_histograms(bool wide, int64_t rank, const Histogram& histogram) {
  std::vector<int64_t> counts(histogram_bins);
  int64_t prefix = 0, above = 0, equal = 0;
  for (int shift = wide ? 48 : 16; shift >= 0; shift -= 16) {
    std::fill(counts.begin(), counts.end(), 0);
    histogram(shift, prefix, counts.data());
    int64_t digit = histogram_bins - 1;
    while (above + counts[static_cast<size_t>(digit)] < rank) above += counts[static_cast<size_t>(digit--)];
    prefix = (prefix << 16) | digit;
    equal = counts[static_cast<size_t>(digit)];
  }
  return {{prefix, INT64_MAX}, above, equal, rank - above};
}

std::vector<int64_t> equal_per_chunk(bool wide, const Delta& delta, int64_t numel, int64_t bits, const ParallelFor& parallel) {
  std::vector<int64_t> equal(static_cast<size_t>(chunk_count(numel, chunk)));
  parallel(static_cast<int64_t>(equal.size()), [&](int64_t index) {
    const ChunkRange range = chunk_range(index, numel);
    // An empty bracket: nothing lies between, so no room is needed for it.
    BracketCount count{bits, bits, 0, 0, 0, 0, nullptr};
    threshold_loops().count_brackets(wide, delta, range.begin, range.length, &count, 1);
    equal[static_cast<size_t>(index)] = count.equal_high;
  });
  return equal;
}

Threshold exact_threshold(bool wide, const Delta& delta, int64_t numel, int64_t rank, const ParallelFor& parallel) {
  Threshold found = by_histograms(wide, rank, [&](int shift, int64_t prefix, int64_t* counts) {
    add_magnitude_histogram(delta, wide, numel, shift, prefix, counts, parallel);
  });
  if (found.equal_kept == found.equal) return found;
  const std::vector<int64_t> equal = equal_per_chunk(wide, delta, numel, found.cut.bits, parallel);
  found.cut.tie_end =
      locate_tie(wide, delta, numel, found.cut.bits, found.equal_kept, [&](int64_t c) { return equal[static_cast<size_t>(c)]; });
  return found;
}

// The threshold of a rank from the counts of its bracket; false where the bracket missed it.
template <class Bits, class ChunkOf>
bool resolve(const Wanted& wanted, const Delta& delta, int64_t numel, int64_t chunks, const ChunkOf& count_of, Threshold* out) {
  constexpr bool wide = sizeof(Bits) == 8;
  int64_t above = 0, equal_high = 0, equal_low = 0;
  size_t room = 0;
  for (int64_t c = 0; c < chunks; ++c) room += count_of(c).between.size();
  std::vector<Bits> between;
  between.reserve(room);
  for (int64_t c = 0; c < chunks; ++c) {
    const ChunkCount<Bits>& count = count_of(c);
    above += count.above;
    equal_high += count.equal_high;
    equal_low += count.equal_low;
    between.insert(between.end(), count.between.begin(), count.between.end());
  }
  const BracketCount& bracket = wanted.bracket;
  if (bracket.low == bracket.high) equal_low = 0;
  const int64_t inside = static_cast<int64_t>(between.size());
  int64_t left = wanted.rank - above;
  if (left <= 0 || left > equal_high + inside + equal_low) return false;
  auto finish = [&](int64_t bits, int64_t greater, int64_t equal, const auto& chunk_equal) {
    const int64_t kept = wanted.rank - greater;
    *out = {{bits, INT64_MAX}, greater, equal, kept};
    if (kept < equal) out->cut.tie_end = locate_tie(wide, delta, numel, bits, kept, chunk_equal);
    return true;
  };
  if (left <= equal_high) return finish(bracket.high, above, equal_high, [&](int64_t c) { return count_of(c).equal_high; });
  left -= equal_high;
  above += equal_high;
  if (left > inside) return finish(bracket.low, above + inside, equal_low, [&](int64_t c) { return count_of(c).equal_low; });
  std::nth_element(between.begin(), between.begin() + (left - 1), between.end(), std::greater<Bits>());
  const Bits bits = between[static_cast<size_t>(left - 1)];
  int64_t greater = above, equal = 0;
  for (const Bits value : between) {
    greater += value > bits;
    equal += value == bits;
  }
  return finish(bits, greater, equal, [&](int64_t c) {
    const std::vector<Bits>& values = count_of(c).between;
    return static_cast<int64_t>(std::count(values.begin(), values.end(), bits));
  });
}

template <class Bits>
void thresholds_together(const Delta* deltas, int64_t numel, std::vector<Wanted>& wanted, int cuts, Threshold* out,
                         const ParallelFor& parallel) {
  constexpr bool wide = sizeof(Bits) == 8;
  const int64_t count = static_cast<int64_t>(wanted.size());
  parallel(count, [&](int64_t i) {
    Wanted& item = wanted[static_cast<size_t>(i)];
    std::vector<Bits> sample = draw_sample<Bits>(deltas[item.task], numel);
    item.bracket = bracket_of(sample, numel, item.rank);
  });
  const int64_t chunks = chunk_count(numel, chunk);
  std::vector<ChunkCount<Bits>> counts(static_cast<size_t>(chunks * count));
  parallel(chunks, [&](int64_t c) {
    const ChunkRange range = chunk_range(c, numel);
    const int64_t room = chunk + vector_room;
    Bits* scratch = thread_scratch<Bits>(room * cuts);
    std::vector<BracketCount> brackets(static_cast<size_t>(cuts));
    for (int64_t first = 0; first < count;) {
      int64_t last = first;
      for (; last < count && wanted[static_cast<size_t>(last)].task == wanted[static_cast<size_t>(first)].task; ++last) {
        BracketCount& bracket = brackets[static_cast<size_t>(last - first)];
        bracket = wanted[static_cast<size_t>(last)].bracket;
        bracket.between_bits = scratch + room * (last - first);
      }
      threshold_loops().count_brackets(wide, deltas[wanted[static_cast<size_t>(first)].task], range.begin, range.length, brackets.data(),
                                       static_cast<int>(last - first));
      for (int64_t i = first; i < last; ++i) {
        const BracketCount& bracket = brackets[static_cast<size_t>(i - first)];
        const Bits* between = static_cast<const Bits*>(bracket.between_bits);
        counts[static_cast<size_t>(c * count + i)] = {
            bracket.above, bracket.equal_high, bracket.equal_low, {between, between + bracket.between}};
      }
      first = last;
    }
  });
  std::vector<char> missed(static_cast<size_t>(count), 0);
  parallel(count, [&](int64_t i) {
    const Wanted& item = wanted[static_cast<size_t>(i)];
    missed[static_cast<size_t>(i)] = !resolve<Bits>(
        item, deltas[item.task], numel, chunks,
        [&](int64_t c) -> const ChunkCount<Bits>& { return counts[static_cast<size_t>(c * count + i)]; },
        &out[item.task * cuts + item.cut]);
  });
  for (int64_t i = 0; i < count; ++i) {
    const Wanted& item = wanted[static_cast<size_t>(i)];
    if (missed[static_cast<size_t>(i)])
      out[item.task * cuts + item.cut] = exact_threshold(wide, deltas[item.task], numel, item.rank, parallel);
  }
}

template <class Bits>
void large_thresholds(const Delta* deltas, int64_t numel, const std::vector<Wanted>& wanted, int cuts, Threshold* out,
                      const ParallelFor& parallel) {
  const auto count = static_cast<int64_t>(wanted.size());
  const int64_t together = thresholds_at_once(numel, sizeof(Bits));
  for (int64_t first = 0; first < count; first += together) {
    std::vector<Wanted> part(wanted.begin() + first, wanted.begin() + std::min(count, first + together));
    thresholds_together<Bits>(deltas, numel, part, cuts, out, parallel);
  }
}

}  // namespace

std::vector<Threshold> magnitude_thresholds(const Delta* deltas, int tasks, int64_t numel, const int64_t* ranks, int cuts, bool wide,
                                            const ParallelFor& parallel) {
  std::vector<Threshold> found(static_cast<size_t>(tasks * cuts));
  std::vector<Wanted> wanted;
  for (int task = 0; task < tasks; ++task) {
    for (int cut = 0; cut < cuts; ++cut) {
      const int64_t rank = ranks[task * cuts + cut];
      if (rank <= 0 || rank >= numel) {
        found[static_cast<size_t>(task * cuts + cut)] = trivial(wide, numel, rank);
      } else {
        wanted.push_back({task, cut, rank, {}});
      }
    }
  }
  if (wanted.empty()) return found;
  if (numel > small) {
    if (wide) {
      large_thresholds<int64_t>(deltas, numel, wanted, cuts, found.data(), parallel);
    } else {
      large_thresholds<int32_t>(deltas, numel, wanted, cuts, found.data(), parallel);
    }
    return found;
  }
  parallel(tasks, [&](int64_t task) {
    Threshold* out = found.data() + task * cuts;
    if (wide) {
      small_thresholds<int64_t>(deltas[task], numel, ranks + task * cuts, cuts, out);
    } else {
      small_thresholds<int32_t>(deltas[task], numel, ranks + task * cuts, cuts, out);
    }
  });
  return found;
}

Threshold exact_magnitude_threshold(const Delta& delta, int64_t numel, int64_t rank, bool wide, const ParallelFor& parallel) {
  if (rank < numel) return magnitude_thresholds(&delta, 1, numel, &rank, 1, wide, parallel).front();
  return exact_threshold(wide, delta, numel, rank, parallel);
}

void add_magnitude_histogram(const Delta& delta, bool wide, int64_t numel, int shift, int64_t prefix, int64_t* counts,
                             const ParallelFor& parallel) {
  // A fixed number of private histograms, whatever the threads: integers, so the order of the additions does not show.
  const int64_t chunks = chunk_count(numel, chunk);
  const int64_t parts = std::min<int64_t>(chunks, 16);
  std::vector<std::vector<int64_t>> partial(static_cast<size_t>(parts));
  parallel(parts, [&](int64_t part) {
    std::vector<int64_t>& own = partial[static_cast<size_t>(part)];
    own.assign(histogram_bins, 0);
    for (int64_t c = part; c < chunks; c += parts) {
      const ChunkRange range = chunk_range(c, numel);
      threshold_loops().histogram(wide, delta, range.begin, range.length, shift, prefix, own.data());
    }
  });
  for (const std::vector<int64_t>& own : partial) {
    for (int64_t bin = 0; bin < histogram_bins; ++bin) counts[bin] += own[static_cast<size_t>(bin)];
  }
}

std::vector<Threshold> joint_magnitude_thresholds(const std::vector<DeltaSegment>& segments, const std::vector<int64_t>& ranks,
                                                  std::vector<int64_t>* tie_ends, const ParallelFor& parallel, bool wide) {
  int64_t total = 0;
  for (const DeltaSegment& segment : segments) {
    wide = wide || is_wide(segment.delta);
    total += segment.numel;
  }
  const size_t count = segments.size();
  tie_ends->assign(ranks.size() * count, 0);
  std::vector<Threshold> found;
  for (size_t r = 0; r < ranks.size(); ++r) {
    int64_t* ends = tie_ends->data() + r * count;
    if (ranks[r] <= 0 || ranks[r] >= total) {
      found.push_back(trivial(wide, total, ranks[r]));
      std::fill(ends, ends + count, found.back().cut.tie_end);
      continue;
    }
    found.push_back(by_histograms(wide, ranks[r], [&](int shift, int64_t prefix, int64_t* counts) {
      for (const DeltaSegment& segment : segments) {
        add_magnitude_histogram(segment.delta, wide, segment.numel, shift, prefix, counts, parallel);
      }
    }));
    const Threshold& threshold = found.back();
    int64_t left = threshold.equal_kept;
    if (left == threshold.equal) {
      std::fill(ends, ends + count, INT64_MAX);
      continue;
    }
    for (size_t s = 0; s < count && left > 0; ++s) {
      const DeltaSegment& segment = segments[s];
      const std::vector<int64_t> equal = equal_per_chunk(wide, segment.delta, segment.numel, threshold.cut.bits, parallel);
      int64_t here = 0;
      for (const int64_t value : equal) here += value;
      if (here <= left) {
        ends[s] = INT64_MAX;
      } else {
        ends[s] = locate_tie(wide, segment.delta, segment.numel, threshold.cut.bits, left,
                             [&](int64_t c) { return equal[static_cast<size_t>(c)]; });
      }
      left -= std::min(left, here);
    }
  }
  return found;
}

namespace {

// Entries of one row's magnitudes above its cut, and equal to it.
template <class Bits>
Threshold counted_row_threshold(const Bits* bits, int64_t n, int64_t rank, Bits* scratch) {
  constexpr bool wide = sizeof(Bits) == 8;
  if (rank == 0) return trivial(wide, n, 0);
  Cut cut = threshold_loops().row_cut(wide, bits, n, rank, scratch);
  if (rank == n) cut.bits = *std::min_element(bits, bits + n);
  int64_t above = 0, equal = 0;
  for (int64_t i = 0; i < n; ++i) {
    above += bits[i] > cut.bits;
    equal += bits[i] == cut.bits;
  }
  return {cut, above, equal, rank - above};
}

template <class Bits>
void row_thresholds(const Delta& delta, int64_t begin, int64_t n, const int64_t* ranks, int cuts, Threshold* found) {
  constexpr bool wide = sizeof(Bits) == 8;
  Bits* bits = thread_scratch<Bits>(2 * n);
  threshold_loops().magnitudes(wide, delta, begin, n, bits);
  for (int i = 0; i < cuts; ++i) found[i] = counted_row_threshold(bits, n, ranks[i], bits + n);
}

}  // namespace

std::vector<Threshold> row_magnitude_thresholds(const Delta& delta, int64_t rows, int64_t row_length, const int64_t* ranks, int cuts,
                                                bool wide, const ParallelFor& parallel) {
  std::vector<Threshold> found(static_cast<size_t>(rows * cuts));
  const int64_t group = std::max<int64_t>(1, chunk / std::max<int64_t>(1, row_length));
  parallel(chunk_count(rows, group), [&](int64_t index) {
    for (int64_t row = index * group; row < std::min(rows, (index + 1) * group); ++row) {
      Threshold* out = found.data() + row * cuts;
      if (wide) {
        row_thresholds<int64_t>(delta, row * row_length, row_length, ranks, cuts, out);
      } else {
        row_thresholds<int32_t>(delta, row * row_length, row_length, ranks, cuts, out);
      }
    }
  });
  return found;
}

Cut cut_of_threshold(const Delta& delta, int64_t numel, int64_t bits, int64_t equal_kept, bool wide, const ParallelFor& parallel) {
  if (equal_kept <= 0) return {bits, 0};
  const std::vector<int64_t> equal = equal_per_chunk(wide, delta, numel, bits, parallel);
  int64_t total = 0;
  for (const int64_t value : equal) total += value;
  if (equal_kept >= total) return {bits, INT64_MAX};
  return {bits, locate_tie(wide, delta, numel, bits, equal_kept, [&](int64_t c) { return equal[static_cast<size_t>(c)]; })};
}

}  // namespace taskloom
