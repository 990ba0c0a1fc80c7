#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "lowrank/kernel_merge_tensors.h"
#include "lowrank/kernel_ranks.h"

namespace taskloom {
namespace {

MergeKernel kernel_named(const std::string& name) {
  if (name == "linear") return MergeKernel::linear;
  if (name == "pwl") return MergeKernel::pwl;
  if (name == "sigmoid") return MergeKernel::sigmoid;
  if (name == "rbf") return MergeKernel::rbf;
  STD_TORCH_CHECK(name == "mixk", "kernel: expected linear, pwl, sigmoid, rbf or mixk, got ", name);
  return MergeKernel::mixk;
}

MergeGate gate_named(const std::string& name) {
  if (name == "none") return MergeGate::none;
  if (name == "magnitude") return MergeGate::magnitude;
  if (name == "soft") return MergeGate::soft;
  STD_TORCH_CHECK(name == "hard", "gate: expected none, magnitude, soft or hard, got ", name);
  return MergeGate::hard;
}

double number(const OptionalTensor& tensor, const char* name, ScalarType arithmetic) {
  if (!tensor.has_value()) return 0;
  STD_TORCH_CHECK(tensor->numel() == 1, name, ": expected one value, got ", tensor->numel());
  const Tensor value = aligned_tensor(*tensor, arithmetic);
  return arithmetic == ScalarType::Double ? *static_cast<const double*>(value.const_data_ptr())
                                          : static_cast<double>(*static_cast<const float*>(value.const_data_ptr()));
}

double value_of(uint64_t bits, bool wide) {
  if (wide) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  const auto narrow = static_cast<uint32_t>(bits);
  float value;
  std::memcpy(&value, &narrow, sizeof value);
  return static_cast<double>(value);
}

// As torch.lerp has it, with the multiplication and addition rounded once.
template <class T>
T interpolated(T from, T to, T weight) {
  return weight < T(0.5) ? std::fma(weight, to - from, from) : std::fma(weight - T(1), to - from, to);
}

struct Place {
  int64_t rank;
  bool exact;  // no interpolation
  double weight;
};

// torch.quantile computes ranks in the values' dtype, and refuses more values than float counts; ours then computes them in double.
Place linear_place(double sparsity, int64_t count, bool wide) {
  constexpr int64_t counted_in_float = int64_t{1} << 24;
  const bool narrow = !wide && count <= counted_in_float;
  const double place = narrow ? static_cast<double>(static_cast<float>(sparsity) * static_cast<float>(count - 1))
                              : sparsity * static_cast<double>(count - 1);
  const auto rank = std::min(static_cast<int64_t>(place), count - 1);
  const double weight = place - static_cast<double>(rank);
  return {rank, weight == 0, weight};
}

void write(const double* values, bool wide, Tensor& out) {
  for (int64_t i = 0; i < out.numel(); ++i) {
    if (wide) {
      static_cast<double*>(out.mutable_data_ptr())[i] = values[i];
    } else {
      static_cast<float*>(out.mutable_data_ptr())[i] = static_cast<float>(values[i]);
    }
  }
}

// Small matrices are done before other threads have woken up.
bool is_small(const KernelFactors& factors) { return factors.n * factors.m <= int64_t{1} << 14; }

ParallelFor threads_for(const KernelFactors& factors) {
  if (!is_small(factors)) return torch_parallel();
  return {[](void*, int64_t count, ParallelFor::Body body, void* argument) {
            for (int64_t index = 0; index < count; ++index) body(index, argument);
          },
          nullptr};
}

template <class Body>
void for_each(const KernelFactors& factors, int64_t count, const Body& body) {
  threads_for(factors)(count, body);
}

Ordered ordered(KernelFactors& factors, int64_t rank) {
  return ordered_magnitudes(factors, rank, threads_for(factors), is_small(factors) ? 1 : torch::stable::get_num_threads());
}

}  // namespace

Tensor aligned_tensor(const Tensor& tensor, ScalarType dtype) {
  const Tensor found = torch::stable::contiguous(torch::stable::to(tensor, dtype));
  return reinterpret_cast<uintptr_t>(found.const_data_ptr()) % found.element_size() == 0 ? found : torch::stable::clone(found);
}

KernelTensors::KernelTensors(const Tensor& a, const Tensor& b, const Tensor& coef, const OptionalTensor& alpha, const OptionalTensor& gamma,
                             const OptionalTensor& beta, const Text& kernel, const Text& gate, bool wide_others)
    : factors_{} {
  STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(2) == b.size(2),
                  "B: expected three dimensions, and chunks and width as A");
  STD_TORCH_CHECK(a.size(0) > 0 && a.size(2) > 0, "A: expected at least one chunk of at least one column");
  STD_TORCH_CHECK(coef.dim() == 1 && coef.size(0) == a.size(0), "coef: expected ", a.size(0), " values as A has chunks, got ",
                  coef.numel());
  KernelFactors& f = factors_;
  f.wide = wide_others || is_wide(a) || is_wide(b) || is_wide(coef) || is_wide(alpha) || is_wide(gamma) || is_wide(beta);
  f.kernel = kernel_named(kernel.value);
  f.gate = gate_named(gate.value);
  f.chunks = a.size(0), f.n = a.size(1), f.m = b.size(1), f.width = a.size(2);
  f.alpha = number(alpha, "alpha", arithmetic());
  f.gamma = number(gamma, "gamma", arithmetic());
  f.beta = number(beta, "beta", arithmetic());
  STD_TORCH_CHECK(f.kernel != MergeKernel::mixk || f.gamma != 0, "gamma: expected a value other than 0 for mixk");
  a_ = aligned_tensor(a, arithmetic());
  b_ = aligned_tensor(b, arithmetic());
  coef_ = aligned_tensor(coef, arithmetic());
  strips_.resize(static_cast<size_t>(f.strips() * f.chunks * f.width * strip_rows * value_size()));
  if (f.n > 0) kernel_merge_loops().pack(f.wide, a_.const_data_ptr(), f.chunks, f.n, f.width, strips_.data());
  f.a = strips_.data();
  f.b = b_.const_data_ptr();
  f.coef = coef_.const_data_ptr();
}

void KernelTensors::keep_in(void* out, DType dtype) {
  // Beyond the caches it takes longer to read values than to make them again.
  constexpr int64_t most_kept = int64_t{1} << 22;
  const KernelFactors& f = factors_;
  const bool used_again = f.kernel == MergeKernel::mixk || f.gate != MergeGate::none;
  if (used_again && f.n * f.m <= most_kept && dtype == (f.wide ? DType::f64 : DType::f32)) factors_.keep = out;
}

Tensor KernelTensors::find_row_stats() {
  KernelFactors& f = factors_;
  if (f.kernel != MergeKernel::mixk) return torch::stable::empty({0}, arithmetic());
  Tensor out = torch::stable::empty({2, f.n}, arithmetic());
  const auto bytes = static_cast<size_t>(padded_rows() * value_size());
  row_max_.resize(bytes);
  row_sum_.resize(bytes);
  for_each(f, f.strips(), [&](int64_t strip) { kernel_merge_loops().row_stats(f, strip, row_max_.data(), row_sum_.data()); });
  f.row_max = row_max_.data();
  f.row_sum = row_sum_.data();
  f.kept = f.keep;
  const auto length = static_cast<size_t>(f.n * value_size());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  if (length > 0) std::memcpy(to, row_max_.data(), length), std::memcpy(to + length, row_sum_.data(), length);
  return out;
}

void KernelTensors::set_row_stats(const Tensor& row_stats) {
  KernelFactors& f = factors_;
  if (f.kernel != MergeKernel::mixk) return;
  STD_TORCH_CHECK(row_stats.dim() == 2 && row_stats.size(0) == 2 && row_stats.size(1) == f.n, "row_stats: expected shape [2, ", f.n, "]");
  const Tensor stats = aligned_tensor(row_stats, arithmetic());
  const auto length = static_cast<size_t>(f.n * value_size()), size = static_cast<size_t>(value_size());
  const auto* from = static_cast<const char*>(stats.const_data_ptr());
  row_max_.resize(static_cast<size_t>(padded_rows()) * size);
  row_sum_.resize(row_max_.size());
  // Rows past n repeat the last one, as those of A do.
  for (size_t at = 0; at < row_max_.size(); at += size) {
    const size_t source = std::min(at, length - size);
    std::memcpy(row_max_.data() + at, from + source, size);
    std::memcpy(row_sum_.data() + at, from + length + source, size);
  }
  f.row_max = row_max_.data();
  f.row_sum = row_sum_.data();
}

// A row of tiles and a column of tiles belong to one task at a time: in each round, every task takes the tile of its own row in another
// column. So each sum has one writer, in an order that depends on the shape alone.
void KernelTensors::tiles(const KernelGradients& gradients, std::vector<double>& totals) const {
  constexpr int64_t few = 8, many = 16, large = int64_t{1} << 22;
  const KernelFactors& f = factors_;
  const int64_t strips = f.strips(), blocks = chunk_count(f.m, merge_block);
  const int64_t wanted = f.n * f.m >= large ? many : few, side = std::min(wanted, std::max(strips, blocks));
  const auto each = static_cast<size_t>(f.chunks) + 3;
  std::vector<double> sums(static_cast<size_t>(side * side) * each);
  const auto scratch = static_cast<size_t>(backward_scratch(f) * value_size());
  std::vector<char> scratches(scratch * static_cast<size_t>(side));
  for (int64_t round = 0; round < side; ++round) {
    for_each(f, side, [&](int64_t row) {
      const int64_t column = (row + round) % side;
      const int64_t strip_begin = strips * row / side, strip_end = strips * (row + 1) / side;
      const int64_t j_begin = blocks * column / side * merge_block, j_end = std::min(blocks * (column + 1) / side * merge_block, f.m);
      if (strip_begin == strip_end || j_begin >= j_end) return;
      kernel_merge_loops().backward(f, gradients, strip_begin, strip_end, j_begin, j_end,
                                    sums.data() + static_cast<size_t>(row * side + column) * each,
                                    scratches.data() + scratch * static_cast<size_t>(row));
    });
  }
  for (size_t at = 0; at < sums.size(); ++at) totals[at % each] += sums[at];
}

Tensor KernelTensors::find_threshold(double sparsity) {
  KernelFactors& f = factors_;
  Tensor out = torch::stable::empty({}, arithmetic());
  const int64_t count = f.n * f.m;
  double threshold = 0;
  if (f.gate == MergeGate::soft && count > 0) {
    const auto rank = std::min(static_cast<int64_t>(std::ceil(sparsity * static_cast<double>(count))), count);
    if (rank > 0) threshold = value_of(ordered(f, rank - 1).at, f.wide);
  } else if (f.gate != MergeGate::none && count > 0) {
    const Place place = linear_place(sparsity, count, f.wide);
    const Ordered found = ordered(f, place.rank);
    const double from = value_of(found.at, f.wide), to = value_of(place.exact ? found.at : found.next, f.wide);
    threshold = f.wide
                    ? interpolated(from, to, place.weight)
                    : static_cast<double>(interpolated(static_cast<float>(from), static_cast<float>(to), static_cast<float>(place.weight)));
  }
  if (f.wide) {
    *static_cast<double*>(out.mutable_data_ptr()) = threshold;
  } else {
    *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(threshold);
  }
  f.threshold = threshold;
  return out;
}

void KernelTensors::set_threshold(const Tensor& threshold) { factors_.threshold = number(threshold, "threshold", arithmetic()); }

void KernelTensors::merge(Elements base, DType dtype, void* out) const {
  constexpr int64_t piece = 128;
  const int64_t strips = factors_.strips();
  // Strip after strip of a few rows j: what lies together in memory is then written by one thread, one after the other.
  for_each(factors_, strips * chunk_count(factors_.m, piece), [&](int64_t index) {
    const int64_t begin = index / strips * piece;
    kernel_merge_loops().merge(factors_, index % strips, begin, std::min(begin + piece, factors_.m), base, dtype, out);
  });
}

KernelTensors::Gradients KernelTensors::backward(Elements gradient) const {
  const KernelFactors& f = factors_;
  const auto size = static_cast<size_t>(value_size());
  std::vector<char> strips(strips_.size(), 0), row_dot;
  Gradients out{torch::stable::empty({f.chunks, f.n, f.width}, arithmetic()), torch::stable::empty({f.chunks, f.m, f.width}, arithmetic()),
                torch::stable::empty({f.chunks}, arithmetic()), torch::stable::empty({3}, arithmetic())};
  if (out.b.numel() > 0) std::memset(out.b.mutable_data_ptr(), 0, static_cast<size_t>(out.b.numel()) * size);
  KernelGradients g{gradient.data, gradient.dtype, nullptr, strips.data(), out.b.mutable_data_ptr()};
  std::vector<double> totals(static_cast<size_t>(f.chunks) + 3);
  if (f.kernel == MergeKernel::mixk) {
    row_dot.resize(static_cast<size_t>(padded_rows()) * size);
    std::vector<double> sums(static_cast<size_t>(f.strips()));
    for_each(f, f.strips(),
             [&](int64_t strip) { sums[static_cast<size_t>(strip)] = kernel_merge_loops().row_dots(f, g, strip, row_dot.data()); });
    g.row_dot = row_dot.data();
    for (const double sum : sums) totals[static_cast<size_t>(f.chunks) + 2] += sum;
    for (int64_t i = 0; i < f.n; ++i) {
      totals[static_cast<size_t>(f.chunks)] +=
          f.wide ? static_cast<const double*>(g.row_dot)[i] : static_cast<double>(static_cast<const float*>(g.row_dot)[i]);
    }
  }
  tiles(g, totals);
  if (f.n > 0) kernel_merge_loops().unpack(f.wide, strips.data(), f.chunks, f.n, f.width, out.a.mutable_data_ptr());
  // The loops leave the derivative of M / gamma to here.
  if (f.kernel == MergeKernel::mixk) totals[static_cast<size_t>(f.chunks) + 1] *= -1 / f.gamma;
  write(totals.data(), f.wide, out.coef);
  write(totals.data() + f.chunks, f.wide, out.scalars);
  return out;
}

}  // namespace taskloom
