// Cases of the loops of kernel_merge: every pass, in memory of exactly the bytes that it was promised.
#include <algorithm>
#include <vector>

#include "check.h"
#include "common/dtype.h"
#include "groups.h"
#include "lowrank/kernel_merge.h"
#include "lowrank/kernel_ranks.h"
#include "teams.h"

namespace taskloom::sanitize {
namespace {

constexpr MergeKernel kernels[] = {MergeKernel::linear, MergeKernel::pwl, MergeKernel::sigmoid, MergeKernel::rbf, MergeKernel::mixk};
constexpr MergeGate gates[] = {MergeGate::none, MergeGate::magnitude, MergeGate::soft, MergeGate::hard};
constexpr DType dtypes[] = {DType::f32, DType::f16, DType::bf16, DType::f64};

// Numbers of the arithmetic, from -1 to 1, aligned as torch's own.
std::vector<char> numbers(bool wide, int64_t count, Random& random) {
  std::vector<char> held(static_cast<size_t>(count * (wide ? 8 : 4)));
  for (int64_t i = 0; i < count; ++i) {
    const double value = 2 * random.share() - 1;
    if (wide) {
      reinterpret_cast<double*>(held.data())[i] = value;
    } else {
      reinterpret_cast<float*>(held.data())[i] = static_cast<float>(value);
    }
  }
  return held;
}

struct Shape {
  int64_t n, m, chunks, width;
};

// Factors with all that the passes need of them; mixk's statistics of rows, which keep what they make where there is room.
struct Made {
  std::vector<char> a, b, coef, strips, row_max, row_sum;
  KernelFactors f{};

  Made(const Shape& shape, MergeKernel kernel, bool wide, Random& random)
      : a(numbers(wide, shape.chunks * shape.n * shape.width, random)),
        b(numbers(wide, shape.chunks * shape.m * shape.width, random)),
        coef(numbers(wide, shape.chunks, random)) {
    f.wide = wide, f.kernel = kernel, f.gate = MergeGate::hard;
    f.n = shape.n, f.m = shape.m, f.chunks = shape.chunks, f.width = shape.width;
    f.alpha = 0.7, f.gamma = 0.4, f.beta = 0.3;
    const auto rows = static_cast<size_t>(f.strips() * strip_rows * (wide ? 8 : 4));
    strips.resize(rows * static_cast<size_t>(f.chunks * f.width));
    row_max.resize(rows), row_sum.resize(rows);
    kernel_merge_loops().pack(wide, a.data(), f.chunks, f.n, f.width, strips.data());
    f.a = strips.data(), f.b = b.data(), f.coef = coef.data();
  }
  Made(const Made&) = delete;

  void find_row_stats(void* keep) {
    f.keep = keep;
    f.kept = nullptr, f.kept_entries = false, f.row_max = f.row_sum = nullptr;
    if (f.kernel != MergeKernel::mixk) return;
    for (int64_t strip = 0; strip < f.strips(); ++strip) kernel_merge_loops().row_stats(f, strip, row_max.data(), row_sum.data());
    f.row_max = row_max.data(), f.row_sum = row_sum.data(), f.kept = f.keep;
  }
};

// Every entry's magnitude in order, by a merge without a gate.
template <class T>
std::vector<T> ordered_entries(Made& made) {
  const auto count = static_cast<size_t>(made.f.n * made.f.m);
  std::vector<T> values(count);
  made.find_row_stats(nullptr);
  made.f.gate = MergeGate::none;
  const DType dtype = made.f.wide ? DType::f64 : DType::f32;
  for (int64_t strip = 0; strip < made.f.strips(); ++strip)
    kernel_merge_loops().merge(made.f, strip, 0, made.f.m, {}, dtype, values.data());
  made.f.gate = MergeGate::hard;
  for (T& value : values) value = value < 0 ? -value : value;
  std::sort(values.begin(), values.end());
  return values;
}

template <class T>
void check_ranks(Made& made, Random& random) {
  const std::vector<T> ordered = ordered_entries<T>(made);
  const int64_t total = made.f.n * made.f.m;
  for (const int64_t rank : {int64_t{0}, random.below(total), total * 9 / 10, total - 1}) {
    for (const bool keeps : {false, true}) {
      const Buffer room(keeps ? total * static_cast<int64_t>(sizeof(T)) : 0, Placement::page);
      for (const int64_t threads : {1, 2, 5}) {
        made.find_row_stats(keeps ? room.data() : nullptr);
        const Ordered found = ordered_magnitudes(made.f, rank, threads == 1 ? serial() : team(), threads);
        T at, next;
        std::memcpy(&at, &found.at, sizeof at);
        std::memcpy(&next, &found.next, sizeof next);
        EXPECT(at == ordered[static_cast<size_t>(rank)]);
        EXPECT(next == ordered[static_cast<size_t>(std::min(rank + 1, total - 1))] || rank == total - 1);
        EXPECT(made.f.kept_entries == keeps);
      }
    }
  }
}

void one_shape(const Shape& shape, Random& random) {
  const bool wide = random.below(4) == 0;
  const int64_t size = wide ? 8 : 4;
  KernelFactors f{};
  f.wide = wide;
  f.kernel = random.pick(kernels);
  f.gate = random.pick(gates);
  f.n = shape.n, f.m = shape.m, f.chunks = shape.chunks, f.width = shape.width;
  f.alpha = 0.7, f.gamma = 0.4, f.beta = 0.3, f.threshold = 0.2;
  const std::vector<char> a = numbers(wide, f.chunks * f.n * f.width, random), b = numbers(wide, f.chunks * f.m * f.width, random);
  const std::vector<char> coef = numbers(wide, f.chunks, random);
  const int64_t rows = f.strips() * strip_rows, values = f.chunks * f.width;
  std::vector<char> strips(static_cast<size_t>(rows * values * size)), row_max(static_cast<size_t>(rows * size)), row_sum(row_max.size());
  const KernelMergeLoops& loops = kernel_merge_loops();
  loops.pack(wide, a.data(), f.chunks, f.n, f.width, strips.data());
  f.a = strips.data(), f.b = b.data(), f.coef = coef.data();
  if (f.kernel == MergeKernel::mixk) {
    for (int64_t strip = 0; strip < f.strips(); ++strip) loops.row_stats(f, strip, row_max.data(), row_sum.data());
    f.row_max = row_max.data(), f.row_sum = row_sum.data();
  }
  std::vector<int64_t> counts(size_t{1} << histogram_bits);
  const int first = (wide ? 64 : 32) - static_cast<int>(histogram_bits);
  for (int64_t strip = 0; strip < f.strips(); ++strip) loops.histogram(f, strip, first, 0, counts.data());
  int64_t counted = 0;
  for (const int64_t count : counts) counted += count;
  EXPECT(counted == f.n * f.m);

  const Placement placement = random.pick(placements);
  const DType dtype = random.pick(dtypes);
  Buffer base(f.n * f.m * element_size(dtype), placement), gradient(f.n * f.m * element_size(dtype), placement);
  base.fill(0);
  gradient.fill(0x11);
  agree_bytes(base.bytes(), placement, [&](char* out) {
    for (int64_t strip = 0; strip < f.strips(); ++strip) {
      kernel_merge_loops().merge(f, strip, 0, f.m / 2, {base.data(), dtype}, dtype, out);
      kernel_merge_loops().merge(f, strip, f.m / 2, f.m, {base.data(), dtype}, dtype, out);
    }
  });
  agree_bytes((f.n + f.m) * values * size, Placement::heap, [&](char* out) {
    std::vector<char> pulled(strips.size(), 0), dots(row_max.size(), 0), scratch(static_cast<size_t>(backward_scratch(f) * size));
    std::vector<double> sums(static_cast<size_t>(f.chunks) + 3);
    char* const for_b = out + f.n * values * size;
    std::fill(for_b, for_b + f.m * values * size, 0);
    KernelGradients g{gradient.data(), dtype, nullptr, pulled.data(), for_b};
    if (f.kernel == MergeKernel::mixk) {
      for (int64_t strip = 0; strip < f.strips(); ++strip) kernel_merge_loops().row_dots(f, g, strip, dots.data());
      g.row_dot = dots.data();
    }
    kernel_merge_loops().backward(f, g, 0, f.strips(), 0, f.m, sums.data(), scratch.data());
    kernel_merge_loops().unpack(wide, pulled.data(), f.chunks, f.n, f.width, out);
  });
}

}  // namespace

// The sizes on both sides of that up to which no sample is drawn; equal entries, of which a bracket has too many.
void kernel_ranks() {
  Random random(31);
  for (const Shape& shape : {Shape{1, 1, 1, 1}, Shape{65, 70, 2, 3}, Shape{70, 129, 1, 4}, Shape{250, 270, 2, 2}, Shape{259, 301, 1, 3}}) {
    for (const MergeKernel kernel : {MergeKernel::pwl, MergeKernel::rbf, MergeKernel::mixk}) {
      for (const bool wide : {false, true}) {
        for (const bool equal : {false, true}) {
          begin_case("kernel_ranks n=%ld m=%ld kernel=%d wide=%d equal=%d", shape.n, shape.m, static_cast<int>(kernel), wide, equal);
          Made made(shape, kernel, wide, random);
          if (equal) std::fill(made.strips.begin(), made.strips.end(), 0), std::fill(made.b.begin(), made.b.end(), 0);
          wide ? check_ranks<double>(made, random) : check_ranks<float>(made, random);
        }
      }
    }
  }
}

void kernel_merges() {
  Random random(17);
  for (const int64_t n : {1, 2, 15, 17, 63, 64, 65, 130}) {
    for (const int64_t m : {1, 3, 16, 33, 70}) {
      for (const int64_t width : {1, 4, 5}) {
        const Shape shape{n, m, 1 + random.below(3), width};
        begin_case("kernel_merge n=%ld m=%ld chunks=%ld width=%ld", n, m, shape.chunks, width);
        one_shape(shape, random);
      }
    }
  }
}

}  // namespace taskloom::sanitize
