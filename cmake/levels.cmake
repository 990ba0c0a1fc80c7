# Each NAME_loops.cpp is compiled once per CPU level, into objects that share no symbol; csrc/common/cpu_level.cpp picks one at load.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(TASKLOOM_LEVELS v2 v3 v4)
  set(TASKLOOM_LEVEL_FLAGS_v2 -march=x86-64-v2 -mtune=generic)
  set(TASKLOOM_LEVEL_FLAGS_v3 -march=x86-64-v3 -mtune=generic)
  set(TASKLOOM_LEVEL_FLAGS_v4 -march=x86-64-v4 -mtune=generic -mprefer-vector-width=512)
else()
  set(TASKLOOM_LEVELS baseline)
  set(TASKLOOM_LEVEL_FLAGS_baseline "")
endif()

set(TASKLOOM_LEVEL_DEFINITIONS "")
foreach(level IN LISTS TASKLOOM_LEVELS)
  list(APPEND TASKLOOM_LEVEL_DEFINITIONS "TASKLOOM_HAS_LEVEL_${level}=1")
endforeach()

macro(taskloom_level_loops target keyword pattern)
  file(GLOB loop_sources CONFIGURE_DEPENDS ${pattern})
  set(TASKLOOM_LOOP_OBJECTS "")
  foreach(level IN LISTS TASKLOOM_LEVELS)
    add_library(${target}_${level} OBJECT ${loop_sources})
    target_link_libraries(${target}_${level} PRIVATE taskloom_flags)
    target_compile_definitions(${target}_${level} PRIVATE TASKLOOM_LEVEL=${level})
    # Exceptions and RTTI would bring in weak symbols; -fno-math-errno lets sqrt become an instruction.
    target_compile_options(${target}_${level} PRIVATE
      # Left to itself gcc turns loops that copy a block into "rep movs", which takes several times as long as the loop.
      $<$<CXX_COMPILER_ID:GNU>:-fno-tree-loop-distribute-patterns>
      -O3 ${TASKLOOM_LEVEL_FLAGS_${level}} -fno-exceptions -fno-rtti -fno-math-errno -fno-trapping-math
      # gcc 12 takes the deliberately undefined operands inside its own AVX-512 header for mistakes.
      $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized;-Wno-uninitialized>)
    list(APPEND TASKLOOM_LOOP_OBJECTS $<TARGET_OBJECTS:${target}_${level}>)
  endforeach()
endmacro()
