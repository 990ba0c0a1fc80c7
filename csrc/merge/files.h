// Input files mapped read-only and output files written by position. A failure throws std::runtime_error naming the file and the cause.
//
// A mapped file that is cut short while it is read, or whose disk fails, raises SIGBUS, which would end the process. Here the pages in
// question are replaced by zeros and the file is marked: whoever has read it calls check_readable() before the result is used.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace taskloom {

struct MappedRange;

// A whole file, mapped; or, from an address, the process's own memory.
class InputFile {
 public:
  explicit InputFile(const std::string& path);
  explicit InputFile(uintptr_t address) : data_(reinterpret_cast<const char*>(address)) {}
  InputFile(InputFile&& other) noexcept;
  ~InputFile();
  const char* at(int64_t offset, int64_t bytes) const;
  void check_readable() const;
  // Read ahead; and forget the pages of a range that will not be used again.
  void will_need(int64_t offset, int64_t bytes) const { advise(offset, bytes, true); }
  void done_with(int64_t offset, int64_t bytes) const { advise(offset, bytes, false); }

 private:
  void advise(int64_t offset, int64_t bytes, bool ahead) const;
  std::string path_;
  const char* data_ = nullptr;
  int64_t size_ = 0;  // 0 where this is not a file
  MappedRange* range_ = nullptr;
};

// A file to be written in place, or, from an address, the process's own memory.
class OutputFile {
 public:
  OutputFile(std::string path, std::string header, int64_t size) : path_(std::move(path)), header_(std::move(header)), size_(size) {}
  explicit OutputFile(uintptr_t address) : memory_(reinterpret_cast<char*>(address)) {}
  OutputFile(OutputFile&& other) noexcept;
  ~OutputFile();
  // Creates the file at its full size, with its room on the disk where the file system can, and writes the header. The file must not exist.
  void reserve() const;
  // Opens the reserved file for writing.
  void open();
  void write(int64_t offset, const void* data, int64_t bytes) const;
  char* memory(int64_t offset) const;
  bool in_memory() const { return path_.empty(); }
  void close();

 private:
  void write_to(int descriptor, int64_t offset, const void* data, int64_t bytes) const;
  std::string path_;
  std::string header_;
  int64_t size_ = 0;
  int descriptor_ = -1;
  char* memory_ = nullptr;
};

// Swaps the names of two files or folders in one step; false where the file system cannot. Throws for any other failure.
bool exchange_names(const std::string& first, const std::string& second);

}  // namespace taskloom
