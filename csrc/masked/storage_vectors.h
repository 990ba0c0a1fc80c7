// Native vectors of a CPU level, of float or double, straight from elements of any storage type and address: the same values as load_block
// gives, in registers. For NAME_loops.cpp files: everything here has internal linkage. Torch-free.
#pragma once

#include "common/convert.h"
#include "lowrank/lanes.h"

namespace taskloom {
namespace {

template <class Acc>
using Vector = typename Lanes<Acc>::Native;

template <class Acc>
constexpr int vector_size = native_bytes / static_cast<int>(sizeof(Acc));

template <DType dtype>
constexpr int stored_bytes = dtype == DType::f64   ? 8
                             : dtype == DType::f32 ? 4
                                                   : 2;

// Whether elements of 16 bits become vectors by instructions; without, load_block's loops are the faster way to doubles.
#ifdef __F16C__
constexpr bool converts_halves = true;
#else
constexpr bool converts_halves = false;
#endif

// `bytes` of floats, a whole vector or half of one.
template <int bytes>
struct Floats {
  static constexpr int count = bytes / 4;
  typedef float Values __attribute__((vector_size(bytes)));
  typedef uint32_t Words __attribute__((vector_size(bytes)));
};

template <DType dtype, int bytes>
inline __attribute__((always_inline)) typename Floats<bytes>::Values stored_floats(const char* from) {
  using Few = Floats<bytes>;
  typename Few::Values values;
  if constexpr (dtype == DType::f32) {
    std::memcpy(&values, from, sizeof values);
    return values;
  }
#ifdef __F16C__
  // By name: gcc 12 takes its own conversions of vectors apart.
  if constexpr (bytes == 16) {
    const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    values = dtype == DType::f16 ? _mm_cvtph_ps(halves) : _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16));
  } else if constexpr (bytes == 32) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    values = dtype == DType::f16 ? _mm256_cvtph_ps(halves) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  } else {
#ifdef __AVX512F__
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    values = dtype == DType::f16 ? _mm512_cvtph_ps(halves) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#endif
  }
#else
  for (int lane = 0; lane < Few::count; ++lane) {
    const auto bits = load_at<uint16_t>(from, lane);
    values[lane] = dtype == DType::bf16 ? bfloat16_to_float(bits) : half_to_float(bits);
  }
#endif
  return values;
}

inline __attribute__((always_inline)) Vector<double> doubles_of(typename Floats<native_bytes / 2>::Values values) {
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(values);
#elif defined(__AVX__)
  return _mm256_cvtps_pd(values);
#else
  return __builtin_convertvector(values, Vector<double>);
#endif
}

// The elements at `from`, as many as a vector of Acc has. float64 elements come as doubles only.
template <class Acc, DType dtype>
inline __attribute__((always_inline)) Vector<Acc> stored_vector(const char* from) {
  if constexpr (dtype == DType::f64) {
    static_assert(sizeof(Acc) == 8);
    Vector<Acc> values;
    std::memcpy(&values, from, sizeof values);
    return values;
  } else if constexpr (sizeof(Acc) == 8) {
    return doubles_of(stored_floats<dtype, native_bytes / 2>(from));
  } else {
    return stored_floats<dtype, native_bytes>(from);
  }
}

template <class Acc>
inline __attribute__((always_inline)) Vector<Acc> vector_at(const void* from) {
  return stored_vector<Acc, sizeof(Acc) == 8 ? DType::f64 : DType::f32>(static_cast<const char*>(from));
}

template <class Acc>
inline __attribute__((always_inline)) void put_vector(void* to, Vector<Acc> values) {
  std::memcpy(to, &values, sizeof values);
}

template <class Acc>
inline __attribute__((always_inline)) Vector<Acc> every(Acc value) {
  return value - Vector<Acc>{};
}

// sum + a * b, where the product is exact (of two floats, in double), so that it does not matter whether it is rounded before the add.
inline __attribute__((always_inline)) Vector<double> plus_exact_product(Vector<double> sum, Vector<double> a, Vector<double> b) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, sum);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, sum);
#else
  return sum + a * b;
#endif
}

}  // namespace
}  // namespace taskloom
