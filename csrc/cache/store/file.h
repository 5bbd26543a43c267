// Descriptors and directories. Every failure of the system is a Fault that names the path.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cache/bytes.h"

namespace kdfast::cache {

// An open file; closed when it goes.
class File {
  public:
    File() = default;
    static File read(const std::string& path);       // Fault missing where it is not there, corrupt if it is no file
    static File create(const std::string& path);     // for appending; throws where the name is taken
    static File append_to(const std::string& path);  // one that is there
    ~File();
    File(File&& other) noexcept;
    File& operator=(File&& other) noexcept;
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    explicit operator bool() const { return descriptor_ >= 0; }
    const std::string& path() const { return path_; }
    void moved_to(std::string path) { path_ = std::move(path); }

    std::uint64_t size() const;
    // All of `out`, from `offset` on; Fault truncated where the file ends before. Safe from many threads and after a
    // fork, as it moves no position.
    void read_at(std::uint64_t offset, std::span<std::byte> out) const;
    std::vector<std::byte> bytes_at(std::uint64_t offset, std::uint64_t length) const;
    void append(Bytes bytes);
    void sync_data();
    void truncate(std::uint64_t length);
    // Alone among those who ask, for as long as this descriptor and its copies live; false where somebody else is.
    bool lock();
    void close();  // where a failure to close must be known

  private:
    File(int descriptor, std::string path) : descriptor_(descriptor), path_(std::move(path)) {}
    struct stat status() const;
    int descriptor_ = -1;
    std::string path_;
};

// Names in a directory, sorted.
std::vector<std::string> list_directory(const std::string& path);
bool exists(const std::string& path);
// And nothing else, as a folder or a pipe.
bool is_file(const std::string& path);
// Of a file; nothing where there is none.
std::optional<std::uint64_t> file_size(const std::string& path);
void make_directories(const std::string& path);
void sync_directory(const std::string& path);
void rename_file(const std::string& from, const std::string& to);
void remove_file(const std::string& path);
void remove_if_there(const std::string& path) noexcept;
// Gives `bytes` the name `path` in one step, durably; false where something has that name already.
bool publish(const std::string& directory, const std::string& name, Bytes bytes, const std::string& temporary);
std::string join(const std::string& directory, const std::string& name);

}  // namespace kdfast::cache
