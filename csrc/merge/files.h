// Input files mapped read-only and output files written by position. A failure throws std::runtime_error naming the file and the cause.
#pragma once

#include <cstdint>
#include <string>

namespace taskloom {

// A whole file, mapped; or, from an address, the process's own memory.
class InputFile {
 public:
  explicit InputFile(const std::string& path);
  explicit InputFile(uintptr_t address) : data_(reinterpret_cast<const char*>(address)) {}
  InputFile(InputFile&& other) noexcept;
  ~InputFile();
  const char* at(int64_t offset, int64_t bytes) const;
  // Read ahead; and forget the pages of a range that will not be used again.
  void will_need(int64_t offset, int64_t bytes) const { advise(offset, bytes, true); }
  void done_with(int64_t offset, int64_t bytes) const { advise(offset, bytes, false); }

 private:
  void advise(int64_t offset, int64_t bytes, bool ahead) const;
  std::string path_;
  const char* data_ = nullptr;
  int64_t size_ = 0;  // 0 where this is not a file
};

class OutputFile {
 public:
  // Creates the file at its full size and writes the header.
  OutputFile(const std::string& path, const std::string& header, int64_t size);
  explicit OutputFile(uintptr_t address) : memory_(reinterpret_cast<char*>(address)) {}
  OutputFile(OutputFile&& other) noexcept;
  ~OutputFile();
  void write(int64_t offset, const void* data, int64_t bytes) const;
  char* memory(int64_t offset) const { return in_memory() ? memory_ + offset : nullptr; }
  bool in_memory() const { return descriptor_ < 0; }
  void close();

 private:
  std::string path_;
  int descriptor_ = -1;
  char* memory_ = nullptr;
};

}  // namespace taskloom
