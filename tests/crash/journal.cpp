// Loaded into a process by LD_PRELOAD: writes down, in order, what it does to the files below one
// directory, so that a test can build what a power cut at any moment may have left of them
// (power.py). Not responsible for reading: nothing that is only read is noted.
//
// KVC2_JOURNAL: the file of records; KVC2_JOURNAL_UNDER: the directory. A record is a Head, then
// `bytes` bytes. An operation is written down before it is done and again (kDone) when it is: a
// sync covers what was done when it began. Lock files are left out: they hold nothing.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

namespace {

enum Kind : uint32_t {
  kWrite = 1,  // inode, at; the bytes
  kSync,       // inode (of a file or a directory)
  kTruncate,   // inode, at: the size
  kAllocate,   // inode, at: the size at least
  kCreate,     // inode; the path
  kFolder,     // inode; the path
  kUnlink,     // the path
  kRename,     // the path, 0, the new path
  kDone,       // op, at: bytes written, or -1 when it failed
  kNote,       // what the process says
};

struct Head {
  uint32_t kind;
  uint32_t bytes;
  uint64_t op;
  uint64_t inode;
  int64_t at;
  uint64_t durable;  // of kWrite: O_DSYNC
};

constexpr int kFilesMax = 65536;
std::atomic<uint64_t> inodes[kFilesMax];  // by file descriptor; 0: not ours
std::atomic<bool> durable[kFilesMax];
std::atomic<uint64_t> last_op{0};
std::mutex writing;

template <typename F>
F* real(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

int journal() {
  static const int fd = [] {
    const char* path = getenv("KVC2_JOURNAL");
    using Open = int(const char*, int, ...);
    return path ? real<Open>("open64")(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
  }();
  return fd;
}

const std::string& under() {
  static const std::string folder = [] {
    const char* path = getenv("KVC2_JOURNAL_UNDER");
    return path ? std::string(path) + "/" : std::string();
  }();
  return folder;
}

bool ours(const char* path) {
  const std::string& folder = under();
  if (folder.empty()) return false;
  if (folder.compare(0, folder.size() - 1, path) == 0) return true;  // the directory itself
  if (strncmp(path, folder.c_str(), folder.size()) != 0) return false;
  const char* name = strrchr(path, '/') + 1;
  return strcmp(name, "lock") != 0 && strcmp(name, "lock.mdb") != 0;
}

void put(const Head& head, const std::vector<iovec>& parts) {
  static auto* const write_all = real<ssize_t(int, const iovec*, int)>("writev");
  std::vector<iovec> all{{const_cast<Head*>(&head), sizeof head}};
  all.insert(all.end(), parts.begin(), parts.end());
  ssize_t total = sizeof head + head.bytes;
  const std::lock_guard<std::mutex> lock(writing);
  if (write_all(journal(), all.data(), static_cast<int>(all.size())) != total) abort();
}

uint64_t begin(Kind kind, uint64_t inode, int64_t at, const std::string& text = {}) {
  const Head head{kind, static_cast<uint32_t>(text.size()), ++last_op, inode, at, 0};
  put(head, {{const_cast<char*>(text.data()), text.size()}});
  return head.op;
}

void done(uint64_t op, int64_t result) { put({kDone, 0, op, 0, result, 0}, {}); }

uint64_t inode_of(int fd) { return fd >= 0 && fd < kFilesMax ? inodes[fd].load() : 0; }

// A file that is opened is followed; one that this has created is written down.
int opened(int fd, const char* path, int flags, bool existed) {
  if (fd < 0 || fd >= kFilesMax || !ours(path)) return fd;
  struct stat found;
  if (fstat(fd, &found)) return fd;
  inodes[fd] = found.st_ino;
  durable[fd] = flags & (O_DSYNC | O_SYNC);
  if (!existed) {
    done(begin(kCreate, found.st_ino, 0, path), 0);
  } else if (flags & O_TRUNC) {
    done(begin(kTruncate, found.st_ino, 0), 0);
  }
  return fd;
}

int open_at(const char* name, int folder, const char* path, int flags, mode_t mode) {
  using OpenAt = int(int, const char*, int, ...);
  struct stat found;
  const bool existed = !ours(path) || stat(path, &found) == 0;
  const int fd = real<OpenAt>(name)(folder, path, flags, mode);
  return opened(fd, path, flags, existed);
}

template <typename Call>
ssize_t write_at(int fd, std::vector<iovec> parts, off_t at, Call call) {
  const uint64_t inode = inode_of(fd);
  if (!inode) return call();
  Head head{kWrite, 0, ++last_op, inode, at, durable[fd]};
  for (const iovec& part : parts) head.bytes += static_cast<uint32_t>(part.iov_len);
  put(head, parts);
  const ssize_t result = call();
  done(head.op, result);
  return result;
}

template <typename Call>
int noted(bool follow, Kind kind, uint64_t inode, int64_t at, const std::string& text, Call call) {
  if (!follow) return call();
  const uint64_t op = begin(kind, inode, at, text);
  const int result = call();
  done(op, result ? -1 : 0);
  return result;
}

mode_t mode_of(int flags, va_list rest) {
  return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

}  // namespace

extern "C" {

void journal_note(const char* text) { done(begin(kNote, 0, 0, text), 0); }

#define OPEN(name, at_name)                                   \
  int name(const char* path, int flags, ...) {                \
    va_list rest;                                             \
    va_start(rest, flags);                                    \
    const mode_t mode = mode_of(flags, rest);                 \
    va_end(rest);                                             \
    return open_at(#at_name, AT_FDCWD, path, flags, mode);    \
  }                                                           \
  int at_name(int folder, const char* path, int flags, ...) { \
    va_list rest;                                             \
    va_start(rest, flags);                                    \
    const mode_t mode = mode_of(flags, rest);                 \
    va_end(rest);                                             \
    return open_at(#at_name, folder, path, flags, mode);      \
  }
OPEN(open, openat)
OPEN(open64, openat64)

int close(int fd) {
  if (fd >= 0 && fd < kFilesMax) inodes[fd] = 0;
  return real<int(int)>("close")(fd);
}

#define WRITES(suffix, type)                                                                     \
  ssize_t pwrite##suffix(int fd, const void* data, size_t size, type at) {                       \
    return write_at(fd, {{const_cast<void*>(data), size}}, at, [&] {                             \
      return real<ssize_t(int, const void*, size_t, type)>("pwrite64")(fd, data, size, at);      \
    });                                                                                          \
  }                                                                                              \
  ssize_t pwritev##suffix(int fd, const iovec* parts, int count, type at) {                      \
    return write_at(fd, {parts, parts + count}, at, [&] {                                        \
      return real<ssize_t(int, const iovec*, int, type)>("pwritev64")(fd, parts, count, at);     \
    });                                                                                          \
  }                                                                                              \
  int ftruncate##suffix(int fd, type size) {                                                     \
    return noted(inode_of(fd), kTruncate, inode_of(fd), size, {},                                \
                 [&] { return real<int(int, type)>("ftruncate64")(fd, size); });                 \
  }                                                                                              \
  int truncate##suffix(const char* path, type size) {                                            \
    struct stat found;                                                                           \
    const bool follow = ours(path) && stat(path, &found) == 0;                                   \
    return noted(follow, kTruncate, follow ? found.st_ino : 0, size, {},                         \
                 [&] { return real<int(const char*, type)>("truncate64")(path, size); });        \
  }                                                                                              \
  int posix_fallocate##suffix(int fd, type at, type size) {                                      \
    return noted(inode_of(fd), kAllocate, inode_of(fd), at + size, {},                           \
                 [&] { return real<int(int, type, type)>("posix_fallocate64")(fd, at, size); }); \
  }
WRITES(, off_t)
WRITES(64, off64_t)

ssize_t pwritev2(int fd, const iovec* parts, int count, off_t at, int flags) {
  return write_at(fd, {parts, parts + count}, at, [&] {
    return real<ssize_t(int, const iovec*, int, off_t, int)>("pwritev64v2")(fd, parts, count, at,
                                                                            flags);
  });
}

ssize_t pwritev64v2(int fd, const iovec* parts, int count, off64_t at, int flags) {
  return pwritev2(fd, parts, count, at, flags);
}

ssize_t write(int fd, const void* data, size_t size) {
  const off_t at = inode_of(fd) ? lseek(fd, 0, SEEK_CUR) : 0;
  return write_at(fd, {{const_cast<void*>(data), size}}, at,
                  [&] { return real<ssize_t(int, const void*, size_t)>("write")(fd, data, size); });
}

ssize_t writev(int fd, const iovec* parts, int count) {
  const off_t at = inode_of(fd) ? lseek(fd, 0, SEEK_CUR) : 0;
  return write_at(fd, {parts, parts + count}, at, [&] {
    return real<ssize_t(int, const iovec*, int)>("writev")(fd, parts, count);
  });
}

int fsync(int fd) {
  return noted(inode_of(fd), kSync, inode_of(fd), 0, {},
               [&] { return real<int(int)>("fsync")(fd); });
}

int fdatasync(int fd) {
  return noted(inode_of(fd), kSync, inode_of(fd), 0, {},
               [&] { return real<int(int)>("fdatasync")(fd); });
}

int mkdir(const char* path, mode_t mode) {
  const int result = real<int(const char*, mode_t)>("mkdir")(path, mode);
  struct stat found;
  if (!result && ours(path) && !stat(path, &found)) done(begin(kFolder, found.st_ino, 0, path), 0);
  return result;
}

int unlink(const char* path) {
  return noted(ours(path), kUnlink, 0, 0, path,
               [&] { return real<int(const char*)>("unlink")(path); });
}

int rename(const char* path, const char* to) {
  const std::string text = std::string(path) + '\0' + to;
  return noted(ours(path), kRename, 0, 0, text,
               [&] { return real<int(const char*, const char*)>("rename")(path, to); });
}
}
