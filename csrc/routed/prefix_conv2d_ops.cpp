// prefix_conv2d on the CPU: oneDNN's convolution, or matrix products, of views of the weight, with no Python between. What oneDNN does not
// take is left to a composition of torch's own products.
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/stable_gaps.h"

namespace taskloom {
namespace {

using Optional = std::optional<Tensor>;
using torch::stable::detail::from;
using torch::stable::detail::to;

// Where one thread multiplies faster than oneDNN convolves with a kernel of 1 by 1: from so many pixels of a sample on, or up to so many
// products of a sample. More threads share a convolution better than a product.
constexpr int64_t product_pixels = 128, product_pixels_bf16 = 512, small_products = 1200000;

struct Steps {
  std::vector<int64_t> stride, padding, dilation;

  bool is_plain() const { return stride[0] == 1 && stride[1] == 1 && padding[0] == 0 && padding[1] == 0; }
};

// What Python found out about this torch, once for each dtype.
bool ask_onednn(const Tensor& x) {
  std::array<StableIValue, 1> stack{from(x)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("taskloom_loops::onednn_convolves", "", stack.data(), TORCH_ABI_VERSION));
  return to<bool>(stack[0]);
}

bool onednn_convolves(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) {
    static const bool found = ask_onednn(x);
    return found;
  }
  if (x.scalar_type() == ScalarType::BFloat16) {
    static const bool found = ask_onednn(x);
    return found;
  }
  return false;
}

Tensor convolve(const Tensor& x, const Tensor& weight, const Optional& bias, const Steps& steps, int64_t groups) {
  std::array<StableIValue, 7> stack{from(x),     from(weight), from(bias), from(steps.padding), from(steps.stride), from(steps.dilation),
                                    from(groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mkldnn_convolution", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor first(Tensor tensor, int64_t dim, int64_t size) {
  return tensor.size(dim) == size ? tensor : torch::stable::narrow(tensor, dim, 0, size);
}

// Whether a pixel's channels lie next to each other; a view of a prefix counts.
bool is_channels_last(const Tensor& x) { return x.stride(1) == 1 && x.size(1) > 1 && x.stride(3) > 1; }

// The tensor in the layout that the result has to have: torch's convolution looks at the weight's too.
Tensor laid_out(Tensor y, bool last) {
  const int64_t channels = y.size(1), down = y.size(2), across = y.size(3);
  const std::array<int64_t, 4> plain{channels * down * across, down * across, across, 1};
  const std::array<int64_t, 4> by_pixel{channels * down * across, 1, across * channels, channels};
  const std::array<int64_t, 4>& expected = last ? by_pixel : plain;
  if (std::equal(expected.begin(), expected.end(), y.strides().begin())) return y;
  using torch::headeronly::MemoryFormat;
  const std::array<int64_t, 4> sizes{y.size(0), channels, down, across};
  Tensor fresh = torch::stable::empty(sizes, y.scalar_type(), std::nullopt, y.device(), std::nullopt,
                                      last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  torch::stable::copy_(fresh, y);
  return fresh;
}

Tensor matrix_at(const Tensor& tensor, int64_t entry, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  auto* const data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())) + entry * static_cast<int64_t>(tensor.element_size());
  return torch::stable::from_blob(data, {rows, columns}, {row_stride, column_stride}, tensor.device(), tensor.scalar_type());
}

// Whether a convolution is a product of each sample's pixels, which are a view, and one thread is faster with it.
bool is_product(const Tensor& x, const Tensor& part, const Optional& bias, const Steps& steps, int64_t groups) {
  if (groups != 1 || part.size(2) != 1 || part.size(3) != 1 || !steps.is_plain()) return false;
  if (x.stride(3) != 1 || x.stride(2) != x.size(3) || torch::stable::get_num_threads() != 1) return false;
  const int64_t pixels = x.size(2) * x.size(3);
  if (x.scalar_type() == ScalarType::BFloat16) return pixels >= product_pixels_bf16 && !bias.has_value();
  return pixels >= product_pixels || pixels * part.size(0) * part.size(1) <= small_products;
}

// A product for each sample: a batched one sums in another order for a batch of one.
Tensor multiply_samples(const Tensor& x, const Tensor& part, const Optional& bias) {
  const int64_t outputs = part.size(0), inputs = part.size(1), pixels = x.size(2) * x.size(3);
  Tensor y = empty_cpu(std::array<int64_t, 4>{x.size(0), outputs, x.size(2), x.size(3)}, x.scalar_type());
  const Tensor left = matrix_at(part, 0, outputs, inputs, part.stride(0), part.stride(1));
  const Tensor start = bias.has_value() ? matrix_at(*bias, 0, outputs, pixels, bias->stride(0), 0) : left;
  for (int64_t n = 0; n < x.size(0); ++n) {
    const Tensor out = matrix_at(y, n * outputs * pixels, outputs, pixels, pixels, 1);
    const Tensor right = matrix_at(x, n * x.stride(0), inputs, pixels, x.stride(1), 1);
    if (bias.has_value()) {
      multiply_from(start, out, left, right);
    } else {
      multiply(out, left, right, false);
    }
  }
  return y;
}

Tensor compose(const Tensor& x, const Tensor& weight, const Optional& bias, int64_t outputs, const Steps& steps, int64_t groups) {
  std::array<StableIValue, 8> stack{
      from(x), from(weight), from(bias), from(outputs), from(steps.stride), from(steps.padding), from(steps.dilation), from(groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("taskloom_loops::prefix_conv2d_composed", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor prefix_conv2d_cpu(const Tensor& x, const Tensor& weight, Optional bias, int64_t outputs, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "x, weight: expected four dimensions");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, "stride, padding, dilation: expected two numbers");
  const Steps steps{std::move(stride), std::move(padding), std::move(dilation)};
  if (x.numel() == 0 || weight.numel() == 0 || !onednn_convolves(x)) return compose(x, weight, bias, outputs, steps, groups);
  const int64_t active = groups == 1 ? 1 : x.size(1) / weight.size(1);
  const Tensor part = first(groups == 1 ? first(weight, 1, x.size(1)) : weight, 0, outputs);
  const Optional offset = bias.has_value() ? Optional(first(*bias, 0, outputs)) : std::nullopt;
  const bool last = is_channels_last(x);
  if (!last && is_product(x, part, offset, steps, active)) return multiply_samples(x, part, offset);
  return laid_out(convolve(x, part, offset, steps, active), last);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(taskloom_loops, m) {
  m.def("onednn_convolves(Tensor x) -> bool");
  m.def(
      "prefix_conv2d_composed(Tensor x, Tensor weight, Tensor? bias, int out_channels, int[] stride, int[] padding, int[] dilation, int "
      "groups) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(taskloom, CPU, m) { m.impl("prefix_conv2d", TORCH_BOX(&prefix_conv2d_cpu)); }

}  // namespace taskloom
