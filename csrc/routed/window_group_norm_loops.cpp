// CPU loops of window_group_norm_silu, compiled once per CPU level. Sums go by sixteen lanes at every level and from block to block in
// double, and no product is fused with an add, so that the bits are the same at all levels.
#include "common/unaligned.h"
#include "routed/activations.h"
#include "routed/lane_spans.h"
#include "routed/window_group_norm.h"

namespace taskloom {
namespace {

constexpr int64_t block = group_norm_block;

// A group's channels begin .. end, and those of them that the window holds: start .. stop.
struct Range {
  int64_t begin, start, stop, end;

  Range(const WindowGroupNorm& view, int64_t sample, int64_t group) {
    const int64_t each = view.channels / view.groups;
    begin = group * each;
    end = begin + each;
    const int64_t low = view.windows.start[sample], high = low + view.windows.width[sample];
    start = low < begin ? begin : low > end ? end : low;
    stop = high < start ? start : high > end ? end : high;
  }

  bool holds(int64_t channel) const { return channel >= start && channel < stop; }
};

// What the group's channels are multiplied by and added.
template <class Acc>
struct Affine {
  Acc *weight, *bias;

  Affine(const WindowGroupNorm& view, const Range& range, Acc* memory) : weight(memory), bias(memory + (range.end - range.begin)) {
    const int64_t n = range.end - range.begin;
    load_or_fill(view.weight, range.begin, n, Acc{1}, weight);
    load_or_fill(view.bias, range.begin, n, Acc{0}, bias);
  }

  static void load_or_fill(const Elements& from, int64_t offset, int64_t n, Acc value, Acc* to) {
    if (from.data == nullptr) {
      fill_run(to, n, value);
    } else {
      load_block(from.dtype, from.data, offset, n, to);
    }
  }
};

template <class F>
inline void over_blocks(int64_t offset, int64_t n, const F& work) {
  for (int64_t done = 0; done < n; done += block) work(offset + done, n - done < block ? n - done : block);
}

struct Moments {
  double mean = 0, squares = 0;  // the mean, and the sum of squares about it
  int64_t count = 0;

  // With n more, as Chan, Golub and LeVeque put it.
  void add(double other_mean, double other_squares, int64_t n) {
    if (n == 0) return;
    const double total = static_cast<double>(count + n), apart = other_mean - mean;
    const double share = static_cast<double>(n) / total;
    squares += other_squares + apart * apart * (static_cast<double>(count) * share);
    mean += apart * share;
    count += n;
  }
};

template <class Acc>
inline Acc activated_constant(Acc value) {
  Acc all[lanes];
  store_lanes(all, activated<Activation::silu>(every_lane(value)));
  return all[0];
}

template <class Acc>
inline Acc slope_of_constant(Acc value) {
  Acc all[lanes];
  store_lanes(all, slope_of<Activation::silu>(every_lane(value)));
  return all[0];
}

template <class Acc>
inline void normalize_block(const Acc* x, Acc mean, Acc rstd, Acc weight, Acc bias, int64_t n, Acc* out) {
  const Lanes<Acc> middle = every_lane(mean), factor = every_lane(rstd), gain = every_lane(weight), shift = every_lane(bias);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> inner = (load_some(x + place, count, Acc{0}) - middle) * factor * gain + shift;
    store_some(out + place, count, activated<Activation::silu>(inner));
  });
}

template <class Acc>
void forward_as(const WindowGroupNorm& view, int64_t sample, int64_t group, Acc* scratch) {
  Acc *const loaded = scratch, *const made = loaded + block;
  const Range range(view, sample, group);
  const Affine<Acc> affine(view, range, scratch + 3 * block);
  const int64_t origin = sample * view.channels, places = view.places, outside = (range.end - range.begin) - (range.stop - range.start);
  Moments moments;
  over_blocks((origin + range.start) * places, (range.stop - range.start) * places, [&](int64_t offset, int64_t n) {
    const Acc* const x = read_run(view.x, offset, n, loaded);
    const Acc mean = sum_of_run(x, n) / static_cast<Acc>(n);
    moments.add(static_cast<double>(mean), static_cast<double>(squares_of_run(x, n, mean)), n);
  });
  moments.add(0, 0, outside * places);
  const Acc mean = static_cast<Acc>(moments.mean);
  const Acc rstd = inverse_deviation(static_cast<Acc>(moments.squares / static_cast<double>(moments.count)), view.eps);
  static_cast<Acc*>(view.mean)[sample * view.groups + group] = mean;
  static_cast<Acc*>(view.rstd)[sample * view.groups + group] = rstd;
  for (int64_t channel = range.begin; channel < range.end; ++channel) {
    const Acc weight = affine.weight[channel - range.begin], bias = affine.bias[channel - range.begin];
    const bool inside = range.holds(channel);
    const Acc constant = inside || !view.outside ? Acc{0} : activated_constant(-mean * rstd * weight + bias);
    over_blocks((origin + channel) * places, places, [&](int64_t offset, int64_t n) {
      Acc* const out = target_run(view.x.dtype, view.y, offset, made);
      if (inside) {
        normalize_block(read_run(view.x, offset, n, loaded), mean, rstd, weight, bias, n, out);
      } else {
        fill_run(out, n, constant);
      }
      write_run(view.x.dtype, view.y, offset, n, out);
    });
  }
}

// What the gradients of a channel's inner values add up to, by themselves and times the normalised values.
struct ChannelSums {
  double plain = 0, times_normal = 0;
};

template <class Acc>
inline void add_block(const Acc* gradient, const Acc* x, Acc mean, Acc rstd, Acc weight, Acc bias, int64_t n, ChannelSums& sums) {
  Lanes<Acc> plain = every_lane(Acc{0}), times_normal = plain;
  const Lanes<Acc> middle = every_lane(mean), factor = every_lane(rstd), gain = every_lane(weight), shift = every_lane(bias);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> normal = (load_some(x + place, count, Acc{0}) - middle) * factor;
    const Lanes<Acc> slope = load_some(gradient + place, count, Acc{0}) * slope_of<Activation::silu>(normal * gain + shift);
    plain = plain + slope;
    times_normal = times_normal + slope * normal;
  });
  sums.plain += static_cast<double>(sum_of_lanes(plain));
  sums.times_normal += static_cast<double>(sum_of_lanes(times_normal));
}

template <class Acc>
inline void gradient_block(const Acc* gradient, const Acc* x, Acc mean, Acc rstd, Acc weight, Acc bias, Acc mean_plain,
                           Acc mean_times_normal, int64_t n, Acc* out) {
  const Lanes<Acc> middle = every_lane(mean), factor = every_lane(rstd), gain = every_lane(weight), shift = every_lane(bias),
                   plain = every_lane(mean_plain), times_normal = every_lane(mean_times_normal);
  over_lanes(n, [&](int64_t place, auto count) __attribute__((always_inline)) {
    const Lanes<Acc> normal = (load_some(x + place, count, Acc{0}) - middle) * factor;
    const Lanes<Acc> slope = load_some(gradient + place, count, Acc{0}) * slope_of<Activation::silu>(normal * gain + shift);
    store_some(out + place, count, factor * ((slope * gain - plain) - normal * times_normal));
  });
}

template <class Acc>
void backward_as(const WindowGroupNormBackward& view, int64_t sample, int64_t group, Acc* scratch) {
  const WindowGroupNorm& f = view.forward;
  Acc *const loaded = scratch, *const made = loaded + block, *const loaded_gradient = made + block;
  const Range range(f, sample, group);
  const Affine<Acc> affine(f, range, scratch + 3 * block);
  const int64_t origin = sample * f.channels, places = f.places;
  const Acc mean = load_at<Acc>(f.mean, sample * f.groups + group), rstd = load_at<Acc>(f.rstd, sample * f.groups + group);
  double plain = 0, times_normal = 0;
  for (int64_t channel = range.begin; channel < range.end; ++channel) {
    const Acc weight = affine.weight[channel - range.begin], bias = affine.bias[channel - range.begin];
    ChannelSums sums;
    if (range.holds(channel)) {
      over_blocks((origin + channel) * places, places, [&](int64_t offset, int64_t n) {
        const Acc* const gradient = read_run(view.gradient, offset, n, loaded_gradient);
        add_block(gradient, read_run(f.x, offset, n, loaded), mean, rstd, weight, bias, n, sums);
      });
    } else if (f.outside) {
      over_blocks((origin + channel) * places, places, [&](int64_t offset, int64_t n) {
        sums.plain += static_cast<double>(sum_of_run(read_run(view.gradient, offset, n, loaded_gradient), n));
      });
      sums.plain *= static_cast<double>(slope_of_constant(-mean * rstd * weight + bias));
      sums.times_normal = static_cast<double>(-mean * rstd) * sums.plain;
    }
    auto* const to = static_cast<Acc*>(view.sums) + sample * 2 * f.channels + channel;
    to[0] = static_cast<Acc>(sums.times_normal);
    to[f.channels] = static_cast<Acc>(sums.plain);
    plain += static_cast<double>(weight) * sums.plain;
    times_normal += static_cast<double>(weight) * sums.times_normal;
  }
  if (f.y == nullptr) return;
  const int64_t place = sample * f.groups + group;
  if (view.for_mean != nullptr) plain -= static_cast<double>(load_at<Acc>(view.for_mean, place)) / static_cast<double>(rstd);
  if (view.for_rstd != nullptr) {
    times_normal += static_cast<double>(load_at<Acc>(view.for_rstd, place)) * static_cast<double>(rstd);
  }
  const double total = static_cast<double>((range.end - range.begin) * places);
  const Acc mean_plain = static_cast<Acc>(plain / total), mean_times_normal = static_cast<Acc>(times_normal / total);
  for (int64_t channel = range.begin; channel < range.end; ++channel) {
    const Acc weight = affine.weight[channel - range.begin], bias = affine.bias[channel - range.begin];
    over_blocks((origin + channel) * places, places, [&](int64_t offset, int64_t n) {
      Acc* const out = target_run(f.x.dtype, f.y, offset, made);
      if (range.holds(channel)) {
        const Acc* const gradient = read_run(view.gradient, offset, n, loaded_gradient);
        gradient_block(gradient, read_run(f.x, offset, n, loaded), mean, rstd, weight, bias, mean_plain, mean_times_normal, n, out);
      } else {
        fill_run(out, n, Acc{0});
      }
      write_run(f.x.dtype, f.y, offset, n, out);
    });
  }
}

void forward(bool wide, const WindowGroupNorm& view, int64_t sample, int64_t group, void* scratch) {
  if (wide) {
    forward_as(view, sample, group, static_cast<double*>(scratch));
  } else {
    forward_as(view, sample, group, static_cast<float*>(scratch));
  }
}

void backward(bool wide, const WindowGroupNormBackward& view, int64_t sample, int64_t group, void* scratch) {
  if (wide) {
    backward_as(view, sample, group, static_cast<double*>(scratch));
  } else {
    backward_as(view, sample, group, static_cast<float*>(scratch));
  }
}

const WindowGroupNormLoops table = {forward, backward};

}  // namespace

TASKLOOM_EXPORT_LOOPS(WindowGroupNormLoops, window_group_norm_loops, table)

}  // namespace taskloom
