#include "lowrank/kernel_ranks.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace taskloom {
namespace {

// Matrices up to this size are passed through a bracket that holds them whole.
constexpr int64_t all_inside = int64_t{1} << 16;
constexpr int64_t piece_rows = 128;

uint64_t infinity_of(const KernelFactors& factors) { return factors.wide ? 0x7ff0000000000000u : 0x7f800000u; }
uint64_t all_ones(const KernelFactors& factors) { return factors.wide ? INT64_MAX : INT32_MAX; }

// Magnitudes at scattered places: entries of one row j are alike, so that few of each are taken.
template <class Bits>
std::vector<Bits> draw_sample(const KernelFactors& factors) {
  const int64_t total = factors.n * factors.m, each = strip_rows / sample_stride;
  const int64_t visits = std::clamp<int64_t>(total / 64, int64_t{1} << 13, int64_t{1} << 17) / each, strips = factors.strips();
  std::vector<Bits> sample(static_cast<size_t>(visits * each));
  uint64_t state = 0x9E3779B97F4A7C15u;
  int64_t count = 0;
  for (int64_t visit = 0; visit < visits; ++visit) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const auto j = static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(factors.m));
    count += kernel_merge_loops().sample(factors, visit % strips, j, visit / strips % sample_stride, sample.data() + count);
  }
  sample.resize(static_cast<size_t>(count));
  return sample;
}

// Between which magnitudes of a sample a rank lies, with a margin of several standard deviations; the share of entries expected there.
template <class Bits>
double set_ends(std::vector<Bits>& sample, int64_t rank, int64_t total, MagnitudeBracket& bracket) {
  const auto size = static_cast<double>(sample.size());
  const double share = static_cast<double>(rank) / static_cast<double>(total), center = share * size;
  const double margin = 8 * std::sqrt(size * share * (1 - share)) + 16;
  auto at = [&](double position) {
    const auto place = sample.begin() + static_cast<int64_t>(position);
    std::nth_element(sample.begin(), place, sample.end());
    return static_cast<uint64_t>(*place);
  };
  // Near an end of the sample the end of the range is the safe bound.
  if (center > margin) bracket.low = at(center - margin);
  if (center + margin < size - 1) bracket.high = at(center + margin);
  return 2 * margin / size;
}

// One pass through a bracket around the rank; false where it missed it, or found more there than it has room for.
template <class Bits>
bool ordered_inside(KernelFactors& factors, int64_t rank, const ParallelFor& parallel, int64_t threads, Ordered* found) {
  const int64_t total = factors.n * factors.m, strips = factors.strips(), pieces = chunk_count(factors.m, piece_rows);
  MagnitudeBracket whole{0, all_ones(factors), 0, 0, 0, nullptr, 0};
  double expected = 1;
  if (total > all_inside) {
    std::vector<Bits> sample = draw_sample<Bits>(factors);
    expected = std::min(1.0, 2 * set_ends(sample, rank, total, whole));
  }
  // Tasks take blocks of rows j, strip after strip, so that what they read or write of a row lies together.
  const int64_t units = strips * pieces, tasks = std::clamp<int64_t>(units, 1, threads);
  std::vector<MagnitudeBracket> parts(static_cast<size_t>(tasks), whole);
  std::vector<std::unique_ptr<Bits[]>> rooms(static_cast<size_t>(tasks));
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t most = (units * (task + 1) / tasks - units * task / tasks) * piece_rows * strip_rows;
    MagnitudeBracket& part = parts[static_cast<size_t>(task)];
    part.room = static_cast<int64_t>(expected * static_cast<double>(most)) + 2 * strip_rows;
    rooms[static_cast<size_t>(task)].reset(new Bits[static_cast<size_t>(part.room)]);
    part.found = rooms[static_cast<size_t>(task)].get();
  }
  const KernelFactors pass = factors;
  parallel(tasks, [&](int64_t task) {
    for (int64_t unit = units * task / tasks; unit < units * (task + 1) / tasks; ++unit) {
      const int64_t begin = unit / strips * piece_rows, end = std::min(begin + piece_rows, pass.m);
      kernel_merge_loops().bracket(pass, unit % strips, begin, end, &parts[static_cast<size_t>(task)]);
    }
  });
  if (factors.keep != nullptr) {
    factors.kept = factors.keep;
    factors.keep = nullptr;
    factors.kept_entries = true;
  }
  bool complete = true;
  for (const MagnitudeBracket& part : parts) {
    complete = complete && part.is_complete();
    whole.below += part.below;
    whole.inside += part.inside;
    whole.largest = std::max(whole.largest, part.largest);
  }
  // A NaN is above infinity; one among the values makes every quantile NaN, as in torch.
  if (whole.largest > infinity_of(factors)) {
    *found = {whole.largest, whole.largest};
    return true;
  }
  const int64_t own = rank - whole.below, last = total - 1 - whole.below;
  if (!complete || own < 0 || std::min(own + 1, last) >= whole.inside) return false;
  const auto* values = static_cast<const Bits*>(parts[0].found);
  std::vector<Bits> joined;
  if (tasks > 1) {
    joined.reserve(static_cast<size_t>(whole.inside));
    for (const MagnitudeBracket& part : parts) {
      const auto* from = static_cast<const Bits*>(part.found);
      joined.insert(joined.end(), from, from + part.inside);
    }
    values = joined.data();
  }
  auto* const begin = const_cast<Bits*>(values);
  auto* const end = begin + whole.inside;
  std::nth_element(begin, begin + own, end);
  const auto at = static_cast<uint64_t>(begin[own]);
  *found = {at, own + 1 < whole.inside ? static_cast<uint64_t>(*std::min_element(begin + own + 1, end)) : at};
  return true;
}

uint64_t histogram(const KernelFactors& factors, int shift, uint64_t prefix, const ParallelFor& parallel, int64_t threads,
                   std::vector<int64_t>& counts) {
  constexpr int64_t bins = int64_t{1} << histogram_bits;
  const int64_t strips = factors.strips();
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(strips / 4, threads));
  counts.assign(static_cast<size_t>(tasks * bins), 0);
  std::vector<uint64_t> next(static_cast<size_t>(tasks), ~uint64_t{0});
  parallel(tasks, [&](int64_t task) {
    uint64_t& least = next[static_cast<size_t>(task)];
    for (int64_t strip = strips * task / tasks; strip < strips * (task + 1) / tasks; ++strip) {
      least = std::min(least, kernel_merge_loops().histogram(factors, strip, shift, prefix, counts.data() + task * bins));
    }
  });
  for (int64_t task = 1; task < tasks; ++task)
    for (int64_t bin = 0; bin < bins; ++bin) counts[static_cast<size_t>(bin)] += counts[static_cast<size_t>(task * bins + bin)];
  counts.resize(bins);
  return *std::min_element(next.begin(), next.end());
}

// Radix selection, for magnitudes without NaN that no bracket divides: of which many are equal, or which a sample does not tell of.
Ordered ordered_by_digits(const KernelFactors& factors, int64_t rank, const ParallelFor& parallel, int64_t threads) {
  const int first = (factors.wide ? 64 : 32) - static_cast<int>(histogram_bits);
  std::vector<int64_t> counts;
  uint64_t prefix = 0, least_above = 0;
  size_t bin = 0;
  for (int shift = first; shift >= 0; shift -= static_cast<int>(histogram_bits)) {
    least_above = histogram(factors, shift, prefix, parallel, threads, counts);
    // The last bin ends the search even where another thread changed the factors between two passes.
    for (bin = 0; bin + 1 < counts.size() && rank >= counts[bin]; ++bin) rank -= counts[bin];
    prefix = (prefix << histogram_bits) | bin;
  }
  if (rank + 1 < counts[bin]) return {prefix, prefix};
  size_t after = bin + 1;
  while (after < counts.size() && counts[after] == 0) ++after;
  return {prefix, after < counts.size() ? prefix - bin + after : least_above};
}

}  // namespace

Ordered ordered_magnitudes(KernelFactors& factors, int64_t rank, const ParallelFor& parallel, int64_t threads) {
  Ordered found{};
  const bool inside = factors.wide ? ordered_inside<int64_t>(factors, rank, parallel, threads, &found)
                                   : ordered_inside<int32_t>(factors, rank, parallel, threads, &found);
  return inside ? found : ordered_by_digits(factors, rank, parallel, threads);
}

}  // namespace taskloom
