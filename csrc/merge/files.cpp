#include "merge/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "merge/mapped_range.h"

namespace taskloom {
namespace {

[[noreturn]] void fail(const std::string& action, const std::string& path) {
  throw std::runtime_error(action + " " + path + ": " + std::strerror(errno));
}

// Gives a file its size, with its room on the disk where the file system can: a full disk shows before anything is merged, and writing into
// reserved room costs a third less. False, with errno set, where that fails.
bool reserve_room(int descriptor, int64_t size) {
#ifdef __linux__
  if (size > 0 && ::fallocate(descriptor, 0, 0, size) == 0) return true;
  if (size > 0 && errno != EOPNOTSUPP && errno != ENOSYS && errno != EINTR) return false;
#endif
  return ::ftruncate(descriptor, size) == 0;
}

// Of the process's own memory the offset is the address, counted from a null pointer, which pointer arithmetic does not allow.
const char* moved(const char* begin, int64_t offset) {
  return reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(offset));
}

void touch_pages(const char* begin, int64_t bytes) {
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  for (int64_t at = 0; at < bytes; at += page) (void)*static_cast<const volatile char*>(begin + at);
  (void)*static_cast<const volatile char*>(begin + bytes - 1);
}

}  // namespace

InputFile::InputFile(const std::string& path) : path_(path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail("cannot open", path);
  struct stat status{};
  if (::fstat(descriptor, &status) != 0) {
    ::close(descriptor);
    fail("cannot read the size of", path);
  }
  size_ = status.st_size;
  if (size_ == 0) {
    ::close(descriptor);
    throw std::runtime_error("cannot map " + path + ": it is empty");
  }
  void* mapped = ::mmap(nullptr, static_cast<size_t>(size_), PROT_READ, MAP_SHARED, descriptor, 0);
  ::close(descriptor);
  if (mapped == MAP_FAILED) {
    size_ = 0;
    fail("cannot map", path);
  }
  data_ = static_cast<const char*>(mapped);
  range_ = watch_mapping(data_, size_);
}

InputFile::InputFile(InputFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      range_(std::exchange(other.range_, nullptr)) {}

InputFile::~InputFile() {
  if (range_ != nullptr) release_mapping(range_);
  if (size_ > 0) ::munmap(const_cast<char*>(data_), static_cast<size_t>(size_));
}

const char* InputFile::at(int64_t offset, int64_t bytes) const {
  if (!path_.empty() && (offset < 0 || bytes < 0 || offset > size_ || bytes > size_ - offset)) {
    throw std::runtime_error(path_ + " is shorter than its header says: it changed after it was read");
  }
  return moved(data_, offset);
}

void InputFile::check_readable() const {
  if (range_ == nullptr || !range_->failed.load(std::memory_order_acquire)) return;
  struct stat status{};
  const bool cut = ::stat(path_.c_str(), &status) == 0 && status.st_size < size_;
  throw std::runtime_error(path_ + (cut ? " was cut short while it was read: " + std::to_string(size_) + " bytes before, " +
                                              std::to_string(status.st_size) + " now"
                                        : " could not be read: the disk or network under it reported an error"));
}

void InputFile::advise(int64_t offset, int64_t bytes, bool ahead) const {
  if (path_.empty() || bytes <= 0) return;
  const int64_t page = ::sysconf(_SC_PAGESIZE);
  const int64_t begin = offset / page * page;
  // Only a hint: a kernel that refuses it changes nothing but speed.
  (void)::madvise(const_cast<char*>(data_) + begin, static_cast<size_t>(offset + bytes - begin), ahead ? MADV_WILLNEED : MADV_DONTNEED);
}

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::move(other.path_)),
      header_(std::move(other.header_)),
      size_(other.size_),
      descriptor_(std::exchange(other.descriptor_, -1)),
      memory_(std::exchange(other.memory_, nullptr)) {}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void OutputFile::reserve() const {
  if (in_memory()) return;
  const int descriptor = ::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (descriptor < 0) fail("cannot create", path_);
  try {
    if (!reserve_room(descriptor, size_)) fail("cannot set the size of", path_);
    write_to(descriptor, 0, header_.data(), static_cast<int64_t>(header_.size()));
  } catch (...) {
    ::close(descriptor);
    throw;
  }
  if (::close(descriptor) != 0) fail("cannot finish writing", path_);
}

void OutputFile::open() {
  if (in_memory()) return;
  // A run that failed left it open.
  if (descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
  descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
  if (descriptor_ < 0) fail("cannot open", path_);
}

char* OutputFile::memory(int64_t offset) const { return in_memory() ? const_cast<char*>(moved(memory_, offset)) : nullptr; }

void OutputFile::write(int64_t offset, const void* data, int64_t bytes) const {
  if (in_memory()) {
    if (bytes > 0) std::memcpy(memory(offset), data, static_cast<size_t>(bytes));
  } else {
    write_to(descriptor_, offset, data, bytes);
#ifdef __linux__
    // A hint: the disk starts at once, so that less is left to wait for when the file is synced.
    (void)::sync_file_range(descriptor_, offset, bytes, SYNC_FILE_RANGE_WRITE);
#endif
  }
}

void OutputFile::write_to(int descriptor, int64_t offset, const void* data, int64_t bytes) const {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::pwrite(descriptor, from, static_cast<size_t>(bytes), offset);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0 && errno == EFAULT) {
      // The kernel could not read a mapped input and reports it here instead of by SIGBUS; a read from the program does raise that.
      touch_pages(from, bytes);
      continue;
    }
    if (written <= 0) fail("cannot write", path_);
    from += written;
    offset += written;
    bytes -= written;
  }
}

void OutputFile::close() {
  if (descriptor_ >= 0 && ::close(std::exchange(descriptor_, -1)) != 0) fail("cannot finish writing", path_);
}

bool exchange_names(const std::string& first, const std::string& second) {
#if defined(__linux__) && defined(SYS_renameat2)
  constexpr unsigned exchange = 2;  // RENAME_EXCHANGE, whose header not every C library has
  if (::syscall(SYS_renameat2, AT_FDCWD, first.c_str(), AT_FDCWD, second.c_str(), exchange) == 0) return true;
  if (errno != EINVAL && errno != ENOSYS && errno != EOPNOTSUPP) fail("cannot exchange " + first + " and", second);
#else
  (void)first, (void)second;
#endif
  return false;
}

}  // namespace taskloom
