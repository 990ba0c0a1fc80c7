// What torch's stable interface lacks at our target version, one function each, with the torch version that closes the gap.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>
#endif

namespace taskloom {

// A string argument of an op. torch's own conversion to std::string leaks a copy of the string at every call (seen in 2.13).
struct Text {
  std::string value;
};

#ifndef USE_CUDA
// out = a @ b, or out + a @ b, on the CPU and below autograd. torch::stable::matmul (2.10) can only allocate its result, and the stable
// dispatcher takes no scalar; no torch version closes this yet.
inline void multiply(const torch::stable::Tensor& out, const torch::stable::Tensor& a, const torch::stable::Tensor& b, bool add) {
  if (add) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// out = start + a @ b; start has out's shape, in any strides.
inline void multiply_from(const torch::stable::Tensor& start, const torch::stable::Tensor& out, const torch::stable::Tensor& a,
                          const torch::stable::Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), start.get(), a.get(), b.get(), 1.0, 1.0));
}
#endif

#ifdef USE_CUDA
// The stream that torch works on. torch::stable::accelerator::Stream gives no cudaStream_t before torch 2.13 (Stream::nativeHandle).
// A CPU-only torch lacks this symbol, which is why libtaskloom_cuda is loaded beside a CUDA torch only.
inline cudaStream_t current_cuda_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace taskloom

namespace torch::stable::detail {

template <>
struct ToImpl<taskloom::Text> {
  static taskloom::Text call(StableIValue passed, uint64_t /*extension_build_version*/, bool /*is_internal*/) {
    auto* const handle = to<StringHandle>(passed);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    taskloom::Text text{std::string(data, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
