// CPU loops of window_layer_norm, compiled once per CPU level. Sums go by sixteen lanes at every level, and no product is fused with an
// add, so that the bits are the same at all of them.
#include "common/unaligned.h"
#include "routed/lane_spans.h"
#include "routed/window_layer_norm.h"

namespace taskloom {
namespace {

inline WindowBlocks blocks_of(const Windows& windows, int64_t sample, int64_t channels) {
  return {windows.start[sample], windows.start[sample] + windows.width[sample], channels};
}

// 1 + scale, or ones.
template <class Acc>
void load_gain(const Elements& scale, int64_t sample, int64_t channels, Acc* gain) {
  if (scale.data == nullptr) {
    fill_run(gain, channels, Acc{1});
    return;
  }
  load_block(scale.dtype, scale.data, sample * channels, channels, gain);
  for (int64_t c = 0; c < channels; ++c) gain[c] = Acc{1} + gain[c];
}

// Channels begin .. end of a row of which the blocks that hold the window are there; converted ones are put at their places in `scratch`.
template <class Acc>
inline const Acc* read_row(const Elements& from, int64_t offset, int64_t begin, int64_t end, Acc* scratch) {
  if (from.dtype == dtype_of_arithmetic<Acc>) return static_cast<const Acc*>(from.data) + offset;
  load_block(from.dtype, from.data, offset + begin, end - begin, scratch + begin);
  return scratch;
}

// The mean of a row, and of the squares about it: channels outside of the window are zeros.
template <class Acc>
struct Moments {
  Acc mean, variance;

  Moments(const Acc* x, const WindowBlocks& window) {
    const Lanes<Acc> zero = every_lane(Acc{0});
    Lanes<Acc> sums[slots] = {zero, zero, zero, zero};
    over_window<Acc>(window, [&](int64_t place, auto count, const auto& which, auto slot) __attribute__((always_inline)) {
      sums[slot] = sums[slot] + select_inside(which, load_some(x + place, count, Acc{0}), zero);
    });
    const Acc total = static_cast<Acc>(window.channels);
    mean = sum_of_slots(sums) / total;
    const Lanes<Acc> middle = every_lane(mean);
    for (auto& sum : sums) sum = zero;
    over_window<Acc>(window, [&](int64_t place, auto count, const auto& which, auto slot) __attribute__((always_inline)) {
      const Lanes<Acc> apart = select_inside(which, load_some(x + place, count, Acc{0}) - middle, zero);
      sums[slot] = sums[slot] + apart * apart;
    });
    const Acc outside = static_cast<Acc>(window.channels - (window.stop - window.start));
    variance = (sum_of_slots(sums) + outside * (mean * mean)) / total;
  }
};

// value * gain + shift.
template <class Acc>
inline void modulate_constant(Acc value, const Acc* gain, const Acc* shift, int64_t n, Acc* out) {
  const Lanes<Acc> all = every_lane(value);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    store_some(out + place, count, all * load_some(gain + place, count, Acc{0}) + load_some(shift + place, count, Acc{0}));
  });
}

template <class Acc>
void forward_as(const WindowLayerNorm& view, int64_t sample, int64_t begin, int64_t n, Acc* scratch) {
  const int64_t channels = view.channels;
  Acc *const gain = scratch, *const shift = gain + channels, *const loaded = shift + channels, *const made = loaded + channels;
  load_gain(view.scale, sample, channels, gain);
  if (view.shift.data == nullptr) {
    fill_run(shift, channels, Acc{0});
  } else {
    load_block(view.shift.dtype, view.shift.data, sample * channels, channels, shift);
  }
  const WindowBlocks window = blocks_of(view.windows, sample, channels);
  for (int64_t row = sample * view.rows + begin; row < sample * view.rows + begin + n; ++row) {
    const Acc* const x = read_row(view.x, row * channels, window.first, window.last, loaded);
    const Moments<Acc> moments(x, window);
    const Acc rstd = inverse_deviation(moments.variance, view.eps), constant = -moments.mean * rstd;
    static_cast<Acc*>(view.mean)[row] = moments.mean;
    static_cast<Acc*>(view.rstd)[row] = rstd;
    Acc* const out = target_run(view.x.dtype, view.y, row * channels, made);
    const int64_t rest = channels - window.last;
    if (view.outside) {
      modulate_constant(constant, gain, shift, window.first, out);
      modulate_constant(constant, gain + window.last, shift + window.last, rest, out + window.last);
    } else {
      fill_run(out, window.first, Acc{0});
      fill_run(out + window.last, rest, Acc{0});
    }
    const Lanes<Acc> middle = every_lane(moments.mean), factor = every_lane(rstd), other = every_lane(constant), zero = every_lane(Acc{0});
    over_window<Acc>(window, [&](int64_t place, auto count, const auto& which, auto) __attribute__((always_inline)) {
      const Lanes<Acc> normal = select_inside(which, (load_some(x + place, count, Acc{0}) - middle) * factor, other);
      const Lanes<Acc> made_here = normal * load_some(gain + place, count, Acc{0}) + load_some(shift + place, count, Acc{0});
      store_some(out + place, count, view.outside ? made_here : select_inside(which, made_here, zero));
    });
    write_run(view.x.dtype, view.y, row * channels, channels, out);
  }
}

// Channels outside of the window, whose normalised value is one constant: the sum of their gradients times the gain.
template <class Acc>
inline Acc add_constant(const Acc* slopes, Acc constant, const Acc* gain, int64_t n, Acc* for_shift, Acc* for_scale) {
  Lanes<Acc> sum = every_lane(Acc{0});
  const Lanes<Acc> normal = every_lane(constant);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> slope = load_some(slopes + place, count, Acc{0});
    sum = sum + slope * load_some(gain + place, count, Acc{0});
    if (for_shift == nullptr) return;
    store_some(for_shift + place, count, load_some(for_shift + place, count, Acc{0}) + slope);
    store_some(for_scale + place, count, load_some(for_scale + place, count, Acc{0}) + slope * normal);
  });
  return sum_of_lanes(sum);
}

template <class Acc>
void backward_as(const WindowLayerNormBackward& view, int64_t sample, int64_t begin, int64_t n, Acc* sums, Acc* scratch) {
  const int64_t channels = view.channels;
  Acc *const gain = scratch, *const loaded_x = gain + channels, *const loaded = loaded_x + channels, *const made = loaded + channels;
  Acc *const for_shift = sums, *const for_scale = sums == nullptr ? nullptr : sums + channels;
  load_gain(view.scale, sample, channels, gain);
  if (sums != nullptr) fill_run(sums, 2 * channels, Acc{0});
  const WindowBlocks window = blocks_of(view.windows, sample, channels);
  const int64_t low = view.outside ? 0 : window.first, high = view.outside ? channels : window.last;
  const Acc total = static_cast<Acc>(channels);
  const Lanes<Acc> zero = every_lane(Acc{0});
  for (int64_t row = sample * view.rows + begin; row < sample * view.rows + begin + n; ++row) {
    const Acc mean = load_at<Acc>(view.mean, row), rstd = load_at<Acc>(view.rstd, row), constant = -mean * rstd;
    const Acc* const x = read_row(view.x, row * channels, window.first, window.last, loaded_x);
    const Acc* const slopes = read_row(view.gradient, row * channels, low, high, loaded);
    const Lanes<Acc> middle = every_lane(mean), factor = every_lane(rstd), other = every_lane(constant);
    Lanes<Acc> plain[slots] = {zero, zero, zero, zero}, times_normal[slots] = {zero, zero, zero, zero};
    over_window<Acc>(window, [&](int64_t place, auto count, const auto& which, auto slot) __attribute__((always_inline)) {
      const Lanes<Acc> normal = select_inside(which, (load_some(x + place, count, Acc{0}) - middle) * factor, other);
      const Lanes<Acc> given = load_some(slopes + place, count, Acc{0});
      const Lanes<Acc> slope = view.outside ? given : select_inside(which, given, zero);
      const Lanes<Acc> inner = slope * load_some(gain + place, count, Acc{0});
      plain[slot] = plain[slot] + inner;
      times_normal[slot] = times_normal[slot] + inner * normal;
      if (for_shift == nullptr) return;
      store_some(for_shift + place, count, load_some(for_shift + place, count, Acc{0}) + slope);
      store_some(for_scale + place, count, load_some(for_scale + place, count, Acc{0}) + slope * normal);
    });
    Acc around = 0;
    if (view.outside) {
      const int64_t last = window.last;
      around = add_constant(slopes, constant, gain, window.first, for_shift, for_scale);
      around += add_constant(slopes + last, constant, gain + last, channels - last, for_shift == nullptr ? nullptr : for_shift + last,
                             for_shift == nullptr ? nullptr : for_scale + last);
    }
    if (view.dx == nullptr) continue;
    Acc all = sum_of_slots(plain) + around, all_times_normal = sum_of_slots(times_normal) + constant * around;
    if (view.for_mean != nullptr) all = all - load_at<Acc>(view.for_mean, row) / rstd;
    if (view.for_rstd != nullptr) all_times_normal = all_times_normal + load_at<Acc>(view.for_rstd, row) * rstd;
    Acc* const out = target_run(view.x.dtype, view.dx, row * channels, made);
    fill_run(out, window.first, Acc{0});
    fill_run(out + window.last, channels - window.last, Acc{0});
    const Lanes<Acc> part = every_lane(all / total), normal_part = every_lane(all_times_normal / total);
    over_window<Acc>(window, [&](int64_t place, auto count, const auto& which, auto) __attribute__((always_inline)) {
      const Lanes<Acc> normal = (load_some(x + place, count, Acc{0}) - middle) * factor;
      const Lanes<Acc> inner = load_some(slopes + place, count, Acc{0}) * load_some(gain + place, count, Acc{0});
      store_some(out + place, count, select_inside(which, factor * ((inner - part) - normal * normal_part), zero));
    });
    write_run(view.x.dtype, view.dx, row * channels, channels, out);
  }
}

void forward(bool wide, const WindowLayerNorm& view, int64_t sample, int64_t begin, int64_t n, void* scratch) {
  if (wide) {
    forward_as(view, sample, begin, n, static_cast<double*>(scratch));
  } else {
    forward_as(view, sample, begin, n, static_cast<float*>(scratch));
  }
}

void backward(bool wide, const WindowLayerNormBackward& view, int64_t sample, int64_t begin, int64_t n, void* sums, void* scratch) {
  if (wide) {
    backward_as(view, sample, begin, n, static_cast<double*>(sums), static_cast<double*>(scratch));
  } else {
    backward_as(view, sample, begin, n, static_cast<float*>(sums), static_cast<float*>(scratch));
  }
}

const WindowLayerNormLoops table = {forward, backward};

}  // namespace

TASKLOOM_EXPORT_LOOPS(WindowLayerNormLoops, window_layer_norm_loops, table)

}  // namespace taskloom
