// Loaded before the C library (LD_PRELOAD): makes the n-th call fail that writes to, makes, renames or syncs something
// under a folder, by whichever library it comes. fault_arm sets folder, n (0: never, count alone) and errno; once the
// n-th call has failed all later ones do too where `for_good` says so, as on a disk that stays full.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static long at;
static int number, for_good;
static atomic_long calls;

void fault_arm(const char* under, long nth, int error, int stays) {
  snprintf(folder, sizeof folder, "%s", under);
  at = nth, number = error, for_good = stays;
  calls = 0;
}
long fault_calls(void) { return calls; }

static int fails(const char* path) {
  if (!folder[0] || !path || strncmp(path, folder, strlen(folder))) return 0;
  const long call = ++calls;
  return at && (call == at || (for_good && call > at));
}
static int fails_at(int directory, const char* path) {
  char whole[8192];
  if (path[0] == '/' || directory == AT_FDCWD) return fails(path);
  char link[64], base[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  const ssize_t length = readlink(link, base, sizeof base - 1);
  if (length < 0) return 0;
  base[length] = 0;
  snprintf(whole, sizeof whole, "%s/%s", base, path);
  return fails(whole);
}
static int fails_of(int descriptor) {
  if (!folder[0]) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(path);
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define REFUSE(condition) \
  if (condition) { \
    errno = number; \
    return -1; \
  }

ssize_t write(int fd, const void* data, size_t size) {
  REAL(write);
  REFUSE(fails_of(fd));
  return real(fd, data, size);
}
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t offset) {
  REAL(pwrite64);
  REFUSE(fails_of(fd));
  return real(fd, data, size, offset);
}
ssize_t writev(int fd, const struct iovec* parts, int count) {
  REAL(writev);
  REFUSE(fails_of(fd));
  return real(fd, parts, count);
}
int fsync(int fd) {
  REAL(fsync);
  REFUSE(fails_of(fd));
  return real(fd);
}
int rename(const char* from, const char* to) {
  REAL(rename);
  REFUSE(fails(to));
  return real(from, to);
}
int mkdir(const char* path, mode_t mode) {
  REAL(mkdir);
  REFUSE(fails(path));
  return real(path, mode);
}
#define OPEN(name) \
  int name(const char* path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    const mode_t mode = va_arg(rest, mode_t); \
    va_end(rest); \
    REFUSE((flags & (O_WRONLY | O_RDWR)) && fails(path)); \
    return real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
  int name(int directory, const char* path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    const mode_t mode = va_arg(rest, mode_t); \
    va_end(rest); \
    REFUSE((flags & (O_WRONLY | O_RDWR)) && fails_at(directory, path)); \
    return real(directory, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)
