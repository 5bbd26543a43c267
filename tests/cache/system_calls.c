// Stands between a process and the system, for tests of what a crash leaves: counts the calls that change files under
// one directory, records them, and kills or fails at the one that is asked for. Used with LD_PRELOAD.
//
//     SYSTEM_CALLS_UNDER=DIR      which files count
//     SYSTEM_CALLS_TRACE=FILE     record there; absent: do not record
// and, called by the process itself: arm(n, mode), calls(), mark(text).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum mode { NOTHING, KILL_BEFORE, KILL_AFTER, KILL_HALFWAY, FAIL_ENOSPC, FAIL_EIO, SHORT };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long count, at = -1;
static enum mode mode;
static int trace = -1;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void arm(long n, int how) {
    count = 0;
    at = n;
    mode = (enum mode)how;
}
long calls(void) { return count; }

static const char *under(void) { return getenv("SYSTEM_CALLS_UNDER"); }

// The name within the directory, or NULL for what lies elsewhere.
static const char *inside(const char *path) {
    const char *root = under();
    if (!root || !path) return NULL;
    size_t n = strlen(root);
    if (strncmp(path, root, n) != 0 || (path[n] != '/' && path[n] != 0)) return NULL;
    return path[n] ? path + n + 1 : ".";
}

static const char *inside_fd(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, buffer, PATH_MAX);
    if (n < 0) return NULL;
    buffer[n] = 0;
    return inside(buffer);
}

static unsigned long inode(int fd) {
    struct stat s;
    return fstat(fd, &s) == 0 ? (unsigned long)s.st_ino : 0;
}

static void record(const void *data, size_t size, const char *format, ...) {
    const char *path = getenv("SYSTEM_CALLS_TRACE");
    if (!path) return;
    if (trace < 0) trace = REAL(open)(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    char line[2 * PATH_MAX + 64];
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    ssize_t done = REAL(write)(trace, line, (size_t)n);
    if (size) done = REAL(write)(trace, data, size);
    if (done < 0) abort();
}

void mark(const char *text) {
    pthread_mutex_lock(&lock);
    record(NULL, 0, "mark %s\n", text);
    pthread_mutex_unlock(&lock);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

// Whether this is the call that was asked for; the lock is held from here to finish().
static int begin(void) {
    pthread_mutex_lock(&lock);
    int now = count++ == at;
    if (now && mode == KILL_BEFORE) die();
    return now;
}
static void finish(int now) {
    if (now && (mode == KILL_AFTER || mode == KILL_HALFWAY)) die();
    pthread_mutex_unlock(&lock);
}
static int fails(int now) {
    if (!now || (mode != FAIL_ENOSPC && mode != FAIL_EIO)) return 0;
    pthread_mutex_unlock(&lock);
    errno = mode == FAIL_EIO ? EIO : ENOSPC;
    return 1;
}

ssize_t write(int fd, const void *data, size_t size) {
    char buffer[PATH_MAX + 1];
    if (!inside_fd(fd, buffer)) return REAL(write)(fd, data, size);
    int now = begin();
    if (fails(now)) return -1;
    if (now && (mode == KILL_HALFWAY || mode == SHORT) && size > 1) size /= 2;
    struct stat s;
    long offset = fstat(fd, &s) == 0 ? (long)s.st_size : 0;
    ssize_t n = REAL(write)(fd, data, size);
    if (n > 0) record(data, (size_t)n, "write %lu %ld %zd\n", inode(fd), offset, n);
    finish(now);
    return n;
}

static int sync_with(int (*real)(int), int fd) {
    char buffer[PATH_MAX + 1];
    const char *name = inside_fd(fd, buffer);
    if (!name) return real(fd);
    int now = begin();
    if (fails(now)) return -1;
    int result = real(fd);
    if (strcmp(name, ".") == 0) {
        record(NULL, 0, "syncdir\n");
    } else {
        record(NULL, 0, "sync %lu\n", inode(fd));
    }
    finish(now);
    return result;
}
int fsync(int fd) { return sync_with(REAL(fsync), fd); }
int fdatasync(int fd) { return sync_with(REAL(fdatasync), fd); }

int ftruncate(int fd, off_t length) {
    char buffer[PATH_MAX + 1];
    if (!inside_fd(fd, buffer)) return REAL(ftruncate)(fd, length);
    int now = begin();
    if (fails(now)) return -1;
    int result = REAL(ftruncate)(fd, length);
    if (result == 0) record(NULL, 0, "truncate %lu %ld\n", inode(fd), (long)length);
    finish(now);
    return result;
}
int ftruncate64(int fd, off_t length) { return ftruncate(fd, length); }

int rename(const char *from, const char *to) {
    if (!inside(from)) return REAL(rename)(from, to);
    int now = begin();
    if (fails(now)) return -1;
    int result = REAL(rename)(from, to);
    if (result == 0) record(NULL, 0, "rename %s %s\n", inside(from), inside(to));
    finish(now);
    return result;
}

int link(const char *from, const char *to) {
    if (!inside(from)) return REAL(link)(from, to);
    int now = begin();
    if (fails(now)) return -1;
    int result = REAL(link)(from, to);
    if (result == 0) record(NULL, 0, "link %s %s\n", inside(from), inside(to));
    finish(now);
    return result;
}

int unlink(const char *path) {
    if (!inside(path)) return REAL(unlink)(path);
    int now = begin();
    if (fails(now)) return -1;
    int result = REAL(unlink)(path);
    if (result == 0) record(NULL, 0, "unlink %s\n", inside(path));
    finish(now);
    return result;
}

static int open_with(int (*real)(const char *, int, ...), const char *path, int flags, mode_t permissions) {
    if (!(flags & O_CREAT) || !inside(path)) return real(path, flags, permissions);
    int now = begin();
    if (fails(now)) return -1;
    int fd = real(path, flags, permissions);
    if (fd >= 0) record(NULL, 0, "create %lu %s\n", inode(fd), inside(path));
    finish(now);
    return fd;
}
int open(const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    mode_t permissions = flags & O_CREAT ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    return open_with(REAL(open), path, flags, permissions);
}
int open64(const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    mode_t permissions = flags & O_CREAT ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    return open_with(REAL(open64), path, flags, permissions);
}
