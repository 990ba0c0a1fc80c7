# libtaskloom_cuda: built where nvcc is, against the same torch headers as the CPU library (a CPU-only torch has them).
set(TASKLOOM_CUDA_COMPILER_TEXT "")
set(TASKLOOM_CUDA_ARCHITECTURES_BUILT "")

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

# The few symbols that only a CUDA torch has come from libtorch_cuda.so. torch loads it for itself alone, so the library has to name it
# as needed to see them; a stub of that name serves at link time, and nothing stays undefined.
add_library(taskloom_torch_cuda_stub SHARED cmake/torch_cuda_stub.cpp)
set_target_properties(taskloom_torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stub")

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/*/*_cuda.cu)
add_library(taskloom_cuda SHARED ${cuda_sources})
target_link_libraries(taskloom_cuda PRIVATE taskloom_flags taskloom_torch taskloom_torch_cuda_stub)
target_link_options(taskloom_cuda PRIVATE LINKER:--no-undefined)
target_compile_definitions(taskloom_cuda PRIVATE USE_CUDA)
target_compile_options(taskloom_cuda PRIVATE -fmad=false -Xptxas=-v --threads=2 -Xcompiler=-Wall,-Wextra,-ffp-contract=off)
if(TASKLOOM_WERROR)
  target_compile_options(taskloom_cuda PRIVATE -Werror=all-warnings -Xcompiler=-Werror)
endif()
set_target_properties(taskloom_cuda PROPERTIES
  CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden SKIP_BUILD_RPATH ON INSTALL_RPATH "")
# The tests read the report: no kernel may spill or have a stack frame.
find_program(TASKLOOM_SH sh)
if(TASKLOOM_SH)
  set_target_properties(taskloom_cuda PROPERTIES CUDA_COMPILER_LAUNCHER "${TASKLOOM_SH};${CMAKE_CURRENT_LIST_DIR}/keep_report.sh")
endif()
