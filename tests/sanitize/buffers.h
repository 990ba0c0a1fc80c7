// Memory of exactly the bytes that a loop was promised, and values to put there.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "common/dtype.h"

namespace taskloom::sanitize {

// heap: AddressSanitizer sees one byte too far. odd: the same at an odd address. page: the end is that of a page with nothing behind it,
// which also stops the masked vector instructions that AddressSanitizer does not look at.
enum class Placement { heap, odd, page };
constexpr Placement placements[] = {Placement::heap, Placement::odd, Placement::page};

class Buffer {
 public:
  Buffer(int64_t bytes, Placement placement) : bytes_(bytes) {
    if (placement != Placement::page) {
      const size_t skipped = placement == Placement::odd ? 1 : 0;
      heap_.reset(new char[static_cast<size_t>(bytes) + skipped]);
      data_ = heap_.get() + skipped;
      return;
    }
    const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    const size_t body = (static_cast<size_t>(bytes) + page - 1) / page * page;
    mapped_ = body + page;
    mapping_ = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping_ == MAP_FAILED) throw std::bad_alloc();
    if (::mprotect(static_cast<char*>(mapping_) + body, page, PROT_NONE) != 0) std::abort();
    data_ = static_cast<char*>(mapping_) + body - bytes;
  }
  Buffer(Buffer&& other) noexcept
      : heap_(std::move(other.heap_)),
        mapping_(std::exchange(other.mapping_, nullptr)),
        mapped_(other.mapped_),
        data_(other.data_),
        bytes_(other.bytes_) {}
  ~Buffer() {
    if (mapping_ != nullptr) ::munmap(mapping_, mapped_);
  }

  char* data() const { return data_; }
  uint8_t* u8() const { return reinterpret_cast<uint8_t*>(data_); }
  int64_t bytes() const { return bytes_; }
  void fill(int value) const { std::memset(data_, value, static_cast<size_t>(bytes_)); }

 private:
  std::unique_ptr<char[]> heap_;
  void* mapping_ = nullptr;
  size_t mapped_ = 0;
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  // 0 .. limit - 1
  int64_t below(int64_t limit) { return static_cast<int64_t>(next() % static_cast<uint64_t>(limit)); }
  // 0 .. 1
  double share() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  template <class T, size_t count>
  T pick(const T (&values)[count]) {
    return values[below(static_cast<int64_t>(count))];
  }

 private:
  uint64_t state_;
};

// plain: about -1 to 1. equal: all the same. zero: zeros of both signs. few: a handful of magnitudes. special: with NaN (quiet and
// signaling), infinity, the largest and subnormal values among plain ones.
enum class Kind { plain, equal, zero, few, special };
constexpr Kind kinds[] = {Kind::plain, Kind::equal, Kind::zero, Kind::few, Kind::special};

// Of a dtype's storage: bits of the exponent and of the fraction.
struct Layout {
  int exponent, fraction;
};

inline Layout layout_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return {8, 23};
    case DType::f16:
      return {5, 10};
    case DType::bf16:
      return {8, 7};
    default:
      return {11, 52};
  }
}

inline uint64_t random_bits(DType dtype, Kind kind, Random& random) {
  const Layout layout = layout_of(dtype);
  const uint64_t bias = (uint64_t{1} << (layout.exponent - 1)) - 1, top = 2 * bias + 1;
  const uint64_t fraction_mask = (uint64_t{1} << layout.fraction) - 1;
  const uint64_t word = random.next();
  const uint64_t sign = (word >> 63) << (layout.exponent + layout.fraction);
  const uint64_t fraction = word & fraction_mask;
  auto number = [&](uint64_t exponent, uint64_t digits) { return sign | exponent << layout.fraction | digits; };
  switch (kind) {
    case Kind::equal:
      return bias << layout.fraction;
    case Kind::zero:
      return sign;
    case Kind::few:
      return number(bias - 1 - (word >> 60) % 3, 0);
    case Kind::special:
      switch ((word >> 56) & 31) {
        case 0:
          return number(top, uint64_t{1} << (layout.fraction - 1));
        case 1:
          return number(top, 1);
        case 2:
          return number(top, 0);
        case 3:
          return number(top - 1, fraction_mask);
        case 4:
          return number(0, fraction);
        default:
          break;
      }
      [[fallthrough]];
    default:
      return number(bias - 1 - (word >> 60) % 8, fraction);
  }
}

inline bool is_nan(DType dtype, const char* element) {
  const Layout layout = layout_of(dtype);
  uint64_t bits = 0;
  std::memcpy(&bits, element, static_cast<size_t>(element_size(dtype)));
  const uint64_t magnitude = bits & ((uint64_t{1} << (layout.exponent + layout.fraction)) - 1);
  return magnitude > ((uint64_t{1} << layout.exponent) - 1) << layout.fraction;
}

inline Buffer values(DType dtype, int64_t n, Kind kind, Placement placement, Random& random) {
  const int64_t size = element_size(dtype);
  Buffer made(n * size, placement);
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t bits = random_bits(dtype, kind, random);
    std::memcpy(made.data() + i * size, &bits, static_cast<size_t>(size));
  }
  return made;
}

// A packed mask; of every `spread` entries about one is set, all of them where it is 1, none where it is 0. Bits behind the n-th are set:
// nobody may count them.
inline Buffer packed_mask(int64_t n, int64_t spread, Placement placement, Random& random) {
  Buffer made((n + 7) / 8, placement);
  made.fill(0);
  for (int64_t i = 0; i < n; ++i) {
    if (spread > 0 && random.below(spread) == 0) made.u8()[i / 8] = static_cast<uint8_t>(made.u8()[i / 8] | 1 << (i & 7));
  }
  for (int64_t i = n; i < 8 * made.bytes(); ++i) made.u8()[i / 8] = static_cast<uint8_t>(made.u8()[i / 8] | 1 << (i & 7));
  return made;
}

inline bool bit_at(const uint8_t* packed, int64_t i) { return ((packed[i / 8] >> (i & 7)) & 1) != 0; }

}  // namespace taskloom::sanitize
