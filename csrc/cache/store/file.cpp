#include "cache/store/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <memory>
#include <system_error>

#include "cache/fault.h"

namespace kdfast::cache {
namespace {

[[noreturn]] void fail(const char* action, const std::string& path) {
    const int number = errno;
    Fault fault(number == ENOENT ? Code::missing : Code::system,
                std::string(action) + ": " + std::generic_category().message(number));
    fault.number = number;
    throw fault.in(path);
}

// Calls again what a signal has interrupted.
template <class Call>
auto uninterrupted(Call call) {
    for (;;) {
        const auto result = call();
        if (result >= 0 || errno != EINTR) return result;
    }
}

}  // namespace

File File::read(const std::string& path) {
    // Of a pipe or a device, which somebody has put here, the opening would wait for ever.
    const int fd = uninterrupted([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); });
    if (fd < 0) fail("cannot open", path);
    File file{fd, path};
    if (!S_ISREG(file.status().st_mode)) throw Fault(Code::corrupt, "this is no file but something else").in(path);
    return file;
}

File File::create(const std::string& path) {
    const int fd =
        uninterrupted([&] { return ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666); });
    if (fd < 0) fail("cannot create", path);
    return {fd, path};
}

File File::append_to(const std::string& path) {
    const int fd = uninterrupted([&] { return ::open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC | O_NONBLOCK); });
    if (fd < 0) fail("cannot open", path);
    return {fd, path};
}

File::~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
}

File::File(File&& other) noexcept : descriptor_(other.descriptor_), path_(std::move(other.path_)) {
    other.descriptor_ = -1;
}

File& File::operator=(File&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    std::swap(path_, other.path_);
    return *this;
}

struct stat File::status() const {
    struct stat status{};
    if (::fstat(descriptor_, &status) != 0) fail("cannot stat", path_);
    return status;
}

std::uint64_t File::size() const { return static_cast<std::uint64_t>(status().st_size); }

void File::read_at(std::uint64_t offset, std::span<std::byte> out) const {
    while (!out.empty()) {
        const ssize_t n =
            uninterrupted([&] { return ::pread(descriptor_, out.data(), out.size(), static_cast<off_t>(offset)); });
        if (n < 0) fail("cannot read", path_);
        if (n == 0) throw Fault(Code::truncated, "the file ends too early").in(path_).at(offset);
        out = out.subspan(static_cast<std::size_t>(n));
        offset += static_cast<std::uint64_t>(n);
    }
}

std::vector<std::byte> File::bytes_at(std::uint64_t offset, std::uint64_t length) const {
    // Before memory is asked for: a length from a damaged file may be anything.
    if (const std::uint64_t end = size(); offset > end || length > end - offset)
        throw Fault(Code::truncated, "the file ends too early").in(path_).at(offset);
    std::vector<std::byte> out(length);
    read_at(offset, out);
    return out;
}

void File::append(Bytes bytes) {
    while (!bytes.empty()) {
        const ssize_t n = uninterrupted([&] { return ::write(descriptor_, bytes.data(), bytes.size()); });
        if (n < 0) fail("cannot write", path_);
        bytes = bytes.subspan(static_cast<std::size_t>(n));
    }
}

void File::sync_data() {
    if (uninterrupted([&] { return ::fdatasync(descriptor_); }) != 0) fail("cannot synchronise", path_);
}

void File::truncate(std::uint64_t length) {
    if (uninterrupted([&] { return ::ftruncate(descriptor_, static_cast<off_t>(length)); }) != 0)
        fail("cannot truncate", path_);
}

bool File::lock() {
    if (uninterrupted([&] { return ::flock(descriptor_, LOCK_EX | LOCK_NB); }) == 0) return true;
    // A file system without locks has none that somebody else could hold.
    if (errno == ENOLCK || errno == ENOTSUP || errno == ENOSYS) return true;
    if (errno != EWOULDBLOCK) fail("cannot lock", path_);
    return false;
}

void File::close() {
    const int fd = descriptor_;
    descriptor_ = -1;
    if (fd >= 0 && ::close(fd) != 0 && errno != EINTR) fail("cannot close", path_);
}

std::vector<std::string> list_directory(const std::string& path) {
    const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir(path.c_str()), &::closedir);
    if (!directory) fail("cannot open the directory", path);
    std::vector<std::string> names;
    for (;;) {
        errno = 0;
        const dirent* entry = ::readdir(directory.get());
        if (!entry) break;
        names.emplace_back(entry->d_name);
    }
    if (errno != 0) fail("cannot list", path);
    std::sort(names.begin(), names.end());
    return names;
}

bool exists(const std::string& path) {
    struct stat status{};
    if (::stat(path.c_str(), &status) == 0) return true;
    if (errno != ENOENT && errno != ENOTDIR) fail("cannot stat", path);
    return false;
}

bool is_file(const std::string& path) {
    struct stat status{};
    if (::stat(path.c_str(), &status) == 0) return S_ISREG(status.st_mode);
    fail("cannot stat", path);
}

std::optional<std::uint64_t> file_size(const std::string& path) {
    struct stat status{};
    if (::stat(path.c_str(), &status) == 0) return static_cast<std::uint64_t>(status.st_size);
    if (errno != ENOENT && errno != ENOTDIR) fail("cannot stat", path);
    return {};
}

void make_directories(const std::string& path) {
    std::error_code error;
    std::filesystem::create_directories(path, error);
    if (error) throw Fault(Code::system, "cannot make the directory: " + error.message()).in(path);
}

void sync_directory(const std::string& path) {
    const int fd = uninterrupted([&] { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
    if (fd < 0) fail("cannot open the directory", path);
    const int result = uninterrupted([&] { return ::fsync(fd); });
    const int number = errno;
    ::close(fd);
    errno = number;
    if (result != 0) fail("cannot synchronise the directory", path);
}

void rename_file(const std::string& from, const std::string& to) {
    if (::rename(from.c_str(), to.c_str()) != 0) fail("cannot rename", from);
}

void remove_if_there(const std::string& path) noexcept { ::unlink(path.c_str()); }

void remove_file(const std::string& path) {
    if (::unlink(path.c_str()) != 0) fail("cannot remove", path);
}

std::string join(const std::string& directory, const std::string& name) {
    return directory.ends_with('/') ? directory + name : directory + "/" + name;
}

bool publish(const std::string& directory, const std::string& name, Bytes bytes, const std::string& temporary) {
    const std::string from = join(directory, temporary), to = join(directory, name);
    File file = File::create(from);
    bool mine = false;
    try {
        file.append(bytes);
        file.sync_data();
        file.close();
        mine = ::link(from.c_str(), to.c_str()) == 0;
        if (!mine && errno != EEXIST) fail("cannot link", to);
    } catch (...) {  // as where no space is left: nothing of it stays
        ::unlink(from.c_str());
        throw;
    }
    remove_file(from);
    sync_directory(directory);
    return mine;
}

}  // namespace kdfast::cache
