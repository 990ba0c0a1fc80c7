# libtaskloom_cuda: built where nvcc is, against the same torch headers (a CPU-only torch has them), linked to libtorch_cpu alone.
# aoti_torch_get_current_cuda_stream is resolved at load time from a CUDA torch, so the library allows that undefined symbol.
set(TASKLOOM_CUDA_COMPILER_TEXT "")
set(TASKLOOM_CUDA_ARCHITECTURES_BUILT "")
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/*/*_cuda.cu)

if(TASKLOOM_CUDA STREQUAL "OFF")
  message(STATUS "taskloom: CUDA library not built (TASKLOOM_CUDA=OFF)")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(TASKLOOM_CUDA STREQUAL "ON")
    message(FATAL_ERROR "TASKLOOM_CUDA=ON but nvcc was not found; put it on the PATH or set CUDACXX")
  endif()
  message(STATUS "taskloom: CUDA library not built (nvcc was not found)")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES ${TASKLOOM_CUDA_ARCHITECTURES})
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(TASKLOOM_CUDA_COMPILER_TEXT "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
set(TASKLOOM_CUDA_ARCHITECTURES_BUILT ${TASKLOOM_CUDA_ARCHITECTURES})

if(NOT cuda_sources)
  message(STATUS "taskloom: CUDA library not built (no CUDA kernels yet)")
  return()
endif()
add_library(taskloom_cuda SHARED ${cuda_sources})
target_link_libraries(taskloom_cuda PRIVATE taskloom_flags taskloom_torch)
target_compile_definitions(taskloom_cuda PRIVATE USE_CUDA)
target_compile_options(taskloom_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-fmad=false --expt-relaxed-constexpr -Xcompiler=-Wall,-ffp-contract=off>)
set_target_properties(taskloom_cuda PROPERTIES
  CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden SKIP_BUILD_RPATH ON INSTALL_RPATH "")
