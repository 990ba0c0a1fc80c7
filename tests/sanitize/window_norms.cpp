// Cases of the loops of window_layer_norm, window_group_norm_silu and channel_scale and of the sums of their gradients: tensors and scratch
// of exactly their sizes, and pieces divided among threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "check.h"
#include "common/parallel.h"
#include "groups.h"
#include "routed/channel_scale.h"
#include "routed/run_sums.h"
#include "routed/window_group_norm.h"
#include "routed/window_layer_norm.h"
#include "teams.h"

namespace taskloom::sanitize {
namespace {

DType arithmetic(bool wide) { return wide ? DType::f64 : DType::f32; }

// Windows of a batch: empty ones, whole ones, and such that begin and end anywhere.
struct RandomWindows {
  std::vector<int64_t> start, width;

  RandomWindows(int64_t samples, int64_t channels, Random& random) {
    for (int64_t n = 0; n < samples; ++n) {
      const int64_t first = random.below(3) == 0 ? 0 : random.below(channels + 1), rest = channels - first;
      start.push_back(first);
      width.push_back(random.below(4) == 0 ? rest : random.below(rest + 1));
    }
  }

  Windows view() const { return {start.data(), width.data()}; }
};

// One tensor of a case; or none, where an argument may be missing.
struct Given {
  DType dtype;
  Buffer buffer;
  bool present;

  Given(DType dtype, int64_t n, Kind kind, Placement placement, Random& random, bool present = true)
      : dtype(dtype), buffer(values(dtype, n, kind, placement, random)), present(present) {}

  Elements view() const { return present ? Elements{buffer.data(), dtype} : Elements{nullptr, dtype}; }
  const void* data() const { return present ? buffer.data() : nullptr; }
};

// What the tensors of a case are made of.
struct Source {
  Random& random;
  DType dtype;
  bool wide;
  Kind kind;
  Placement placement;

  explicit Source(Random& random)
      : random(random),
        dtype(random.pick(dtypes)),
        wide(dtype == DType::f64 || random.below(6) == 0),
        kind(random.pick(kinds)),
        placement(random.pick(placements)) {}

  Given tensor(int64_t n) const { return {dtype, n, kind, placement, random}; }
  // Of any dtype that the arithmetic takes.
  Given parameter(int64_t n, bool present) const {
    const DType of = random.below(2) == 0 ? dtype : wide ? DType::f64 : DType::f32;
    return {of, n, kind, placement, random, present};
  }
  Given accumulators(int64_t n, bool present = true) const { return {arithmetic(wide), n, Kind::plain, placement, random, present}; }
  bool coin() const { return random.below(2) == 0; }
};

Buffer scratch_of(bool wide, int64_t accumulators) { return Buffer(accumulators * element_size(arithmetic(wide)), Placement::page); }

// Several results of a case in one piece of memory, each at a multiple of 64 bytes, with what follows it untouched.
class Results {
 public:
  int64_t add(int64_t bytes) {
    const int64_t place = bytes_;
    bytes_ += (bytes + 63) / 64 * 64;
    ends_.push_back({place + bytes, bytes_});
    return place;
  }
  // Gaps have the same bytes on every run.
  void clear_gaps(char* out) const {
    for (const auto& [begin, end] : ends_) std::memset(out + begin, 0, static_cast<size_t>(end - begin));
  }
  int64_t bytes() const { return bytes_; }

 private:
  struct Gap {
    int64_t begin, end;
  };
  std::vector<Gap> ends_;
  int64_t bytes_ = 0;
};

// Whether results of two runs agree is asked of their bytes, so that NaN, whose bits may differ, is not among the values of these cases.
template <class Run>
void agree_on(const Results& results, const Run& run) {
  agree_bytes(results.bytes(), Placement::page, [&](char* out) {
    results.clear_gaps(out);
    run(out);
  });
}

void one_layer_norm(Random& random) {
  Source source(random);
  if (source.kind == Kind::special) source.kind = Kind::plain;
  const int64_t samples = 1 + random.below(3), rows = random.below(6), channels = 1 + random.below(random.below(3) == 0 ? 1100 : 40);
  const bool wide = source.wide, outside = source.coin();
  begin_case("window_layer_norm samples=%ld rows=%ld channels=%ld %s wide=%d outside=%d kind=%d placement=%d", samples, rows, channels,
             dtype_name(source.dtype), wide, outside, static_cast<int>(source.kind), static_cast<int>(source.placement));
  const RandomWindows windows(samples, channels, random);
  const int64_t numel = samples * rows * channels, size = element_size(source.dtype), statistic = element_size(arithmetic(wide));
  const Given x = source.tensor(numel), gradient = source.tensor(numel);
  const Given shift = source.parameter(samples * channels, source.coin()), scale = source.parameter(samples * channels, source.coin());
  const int64_t step = 1 + random.below(3), each = chunk_count(rows, step);
  const auto for_pieces = [&](const auto& body) {
    team()(samples * each, [&](int64_t piece) {
      const int64_t begin = piece % each * step;
      const Buffer scratch = scratch_of(wide, 4 * channels);
      body(piece, piece / each, begin, std::min(step, rows - begin), scratch.data());
    });
  };
  Results forward;
  const int64_t y = forward.add(numel * size), mean = forward.add(samples * rows * statistic),
                rstd = forward.add(samples * rows * statistic);
  agree_on(forward, [&](char* out) {
    const WindowLayerNorm view{x.view(), windows.view(), rows,    channels,   shift.view(), scale.view(),
                               1e-5,     outside,        out + y, out + mean, out + rstd};
    for_pieces([&](int64_t, int64_t sample, int64_t begin, int64_t n, void* scratch) {
      window_layer_norm_loops().forward(wide, view, sample, begin, n, scratch);
    });
  });
  const Given means = source.accumulators(samples * rows), rstds = source.accumulators(samples * rows);
  const Given for_mean = source.accumulators(samples * rows, source.coin()), for_rstd = source.accumulators(samples * rows, source.coin());
  const bool for_x = source.coin(), for_sums = source.coin();
  Results backward;
  const int64_t dx = backward.add(for_x ? numel * size : 0), sums = backward.add(for_sums ? samples * each * 2 * channels * statistic : 0);
  agree_on(backward, [&](char* out) {
    const WindowLayerNormBackward view{gradient.view(), x.view(),        windows.view(), rows,
                                       channels,        scale.view(),    means.data(),   rstds.data(),
                                       for_mean.data(), for_rstd.data(), outside,        for_x ? out + dx : nullptr};
    for_pieces([&](int64_t piece, int64_t sample, int64_t begin, int64_t n, void* scratch) {
      char* const own = for_sums ? out + sums + piece * 2 * channels * statistic : nullptr;
      window_layer_norm_loops().backward(wide, view, sample, begin, n, own, scratch);
    });
  });
}

void one_group_norm(Random& random) {
  Source source(random);
  if (source.kind == Kind::special) source.kind = Kind::plain;
  const int64_t samples = 1 + random.below(3), groups = 1 + random.below(4), channels = groups * (1 + random.below(9));
  const int64_t places = 1 + random.below(random.below(3) == 0 ? 2100 : 40);
  const bool wide = source.wide, outside = source.coin();
  begin_case("window_group_norm samples=%ld groups=%ld channels=%ld places=%ld %s wide=%d outside=%d kind=%d placement=%d", samples, groups,
             channels, places, dtype_name(source.dtype), wide, outside, static_cast<int>(source.kind), static_cast<int>(source.placement));
  const RandomWindows windows(samples, channels, random);
  const int64_t numel = samples * channels * places, size = element_size(source.dtype), statistic = element_size(arithmetic(wide));
  const Given x = source.tensor(numel), gradient = source.tensor(numel);
  const Given weight = source.parameter(channels, source.coin()), bias = source.parameter(channels, source.coin());
  const auto for_groups = [&](const auto& body) {
    team()(samples * groups, [&](int64_t index) {
      const Buffer scratch = scratch_of(wide, 3 * group_norm_block + 2 * (channels / groups));
      body(index / groups, index % groups, scratch.data());
    });
  };
  const auto view_of = [&](void* y, void* mean, void* rstd) -> WindowGroupNorm {
    return {x.view(), windows.view(), channels, places, groups, weight.view(), bias.view(), 1e-5, outside, y, mean, rstd};
  };
  Results forward;
  const int64_t y = forward.add(numel * size), mean = forward.add(samples * groups * statistic),
                rstd = forward.add(samples * groups * statistic);
  agree_on(forward, [&](char* out) {
    const WindowGroupNorm view = view_of(out + y, out + mean, out + rstd);
    for_groups(
        [&](int64_t sample, int64_t group, void* scratch) { window_group_norm_loops().forward(wide, view, sample, group, scratch); });
  });
  const Given means = source.accumulators(samples * groups), rstds = source.accumulators(samples * groups);
  const Given for_mean = source.accumulators(samples * groups, source.coin()),
              for_rstd = source.accumulators(samples * groups, source.coin());
  const bool for_x = source.coin();
  Results backward;
  const int64_t dx = backward.add(for_x ? numel * size : 0), sums = backward.add(samples * 2 * channels * statistic);
  agree_on(backward, [&](char* out) {
    const WindowGroupNormBackward view{view_of(for_x ? out + dx : nullptr, means.buffer.data(), rstds.buffer.data()), gradient.view(),
                                       for_mean.data(), for_rstd.data(), out + sums};
    for_groups(
        [&](int64_t sample, int64_t group, void* scratch) { window_group_norm_loops().backward(wide, view, sample, group, scratch); });
  });
}

void one_channel_scale(Random& random) {
  Source source(random);
  if (source.kind == Kind::special) source.kind = Kind::plain;
  const int64_t samples = 1 + random.below(3), channels = 1 + random.below(30), places = 1 + random.below(random.below(3) == 0 ? 2100 : 40);
  const bool wide = source.wide;
  constexpr Activation activations[] = {Activation::none, Activation::relu, Activation::gelu, Activation::silu};
  const Activation activation = random.pick(activations);
  begin_case("channel_scale samples=%ld channels=%ld places=%ld %s wide=%d activation=%d kind=%d placement=%d", samples, channels, places,
             dtype_name(source.dtype), wide, static_cast<int>(activation), static_cast<int>(source.kind),
             static_cast<int>(source.placement));
  const RandomWindows windows(samples, channels, random);
  const int64_t numel = samples * channels * places, size = element_size(source.dtype), statistic = element_size(arithmetic(wide));
  const Given x = source.tensor(numel), gradient = source.tensor(numel);
  const Given scale = source.parameter(samples * channels, true), bias = source.parameter(channels, source.coin());
  const int64_t step = 1 + random.below(channels), each = chunk_count(channels, step);
  const auto for_pieces = [&](int64_t blocks, int64_t lines, const auto& body) {
    team()(samples * each, [&](int64_t piece) {
      const int64_t begin = piece % each * step, n = std::min(step, channels - begin);
      const Buffer scratch = scratch_of(wide, blocks * channel_scale_block + lines * n);
      body(piece / each, begin, n, scratch.data());
    });
  };
  const auto view_of = [&](void* y) -> ChannelScale {
    return {x.view(), windows.view(), channels, places, scale.view(), bias.view(), activation, y};
  };
  Results forward;
  const int64_t y = forward.add(numel * size);
  agree_on(forward, [&](char* out) {
    const ChannelScale view = view_of(out + y);
    for_pieces(4, 2, [&](int64_t sample, int64_t begin, int64_t n, void* scratch) {
      channel_scale_loops().forward(wide, view, sample, begin, n, scratch);
    });
  });
  const bool for_x = source.coin(), for_scale = source.coin(), for_bias = source.coin();
  Results backward;
  const int64_t dx = backward.add(for_x ? numel * size : 0),
                dscale = backward.add(for_scale ? samples * channels * element_size(scale.dtype) : 0),
                sums = backward.add(for_bias ? samples * channels * statistic : 0);
  agree_on(backward, [&](char* out) {
    const ChannelScaleBackward view{view_of(for_x ? out + dx : nullptr), gradient.view(), for_scale ? out + dscale : nullptr,
                                    for_bias ? out + sums : nullptr};
    for_pieces(7, 4, [&](int64_t sample, int64_t begin, int64_t n, void* scratch) {
      channel_scale_loops().backward(wide, view, sample, begin, n, scratch);
    });
  });
}

void one_sum(Random& random) {
  const Source source(random);
  const int64_t pieces = 1 + random.below(5), n = random.below(300), stride = n + random.below(9), offset = random.below(7);
  begin_case("run_sums pieces=%ld stride=%ld n=%ld %s wide=%d offset=%ld placement=%d", pieces, stride, n, dtype_name(source.dtype),
             source.wide, offset, static_cast<int>(source.placement));
  const Given given = source.accumulators((pieces - 1) * stride + n);
  agree(source.dtype, offset + n, source.placement, [&](char* out) {
    std::memset(out, 0, static_cast<size_t>(offset * element_size(source.dtype)));
    const Buffer sums(given.buffer.bytes(), source.placement == Placement::odd ? Placement::page : source.placement);
    std::memcpy(sums.data(), given.buffer.data(), static_cast<size_t>(sums.bytes()));
    run_sums_loops().add_up(source.wide, sums.data(), pieces, stride, n, source.dtype, out, offset);
  });
}

void repeat(int times, uint64_t seed, void (*one)(Random&)) {
  Random random(seed);
  for (int i = 0; i < times; ++i) one(random);
}

}  // namespace

void window_layer_norms() { repeat(300, 31, one_layer_norm); }

void window_group_norms() { repeat(300, 32, one_group_norm); }

void channel_scales() { repeat(300, 33, one_channel_scale); }

void run_sums() { repeat(200, 34, one_sum); }

}  // namespace taskloom::sanitize
