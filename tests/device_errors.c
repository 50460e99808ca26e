/* A device with errors: preloaded, it lets system calls on some files fail.

   fail(calls, path, after, error) arms it: of the calls whose names stand in `calls`, on files whose
   path contains `path`, all from number `after` on fail with `error`; calls(), how many there were. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char armed_calls[64], armed_path[4096];
static long armed_after, seen;
static int armed_error;

void fail(const char *calls, const char *path, long after, int error) {
    snprintf(armed_calls, sizeof armed_calls, " %s ", calls);
    snprintf(armed_path, sizeof armed_path, "%s", path);
    armed_after = after;
    armed_error = error;
    seen = 0;
}

long calls(void) { return seen; }

static int fails(const char *call, int fd) {
    char word[32], link[64], path[4096];
    snprintf(word, sizeof word, " %s ", call);
    if (strstr(armed_calls, word) == NULL)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    if (strstr(path, armed_path) == NULL)
        return 0;
    if (__sync_add_and_fetch(&seen, 1) < armed_after)
        return 0;
    errno = armed_error;
    return 1;
}

#define INTERPOSE(name, kind, result, parameters, arguments)                                       \
    result name parameters {                                                                       \
        static result(*original) parameters;                                                       \
        if (original == NULL)                                                                      \
            original = (result(*) parameters)dlsym(RTLD_NEXT, #name);                              \
        return fails(kind, fd) ? -1 : original arguments;                                          \
    }

INTERPOSE(read, "read", ssize_t, (int fd, void *to, size_t count), (fd, to, count))
INTERPOSE(pread, "pread", ssize_t, (int fd, void *to, size_t count, off_t at), (fd, to, count, at))
INTERPOSE(pread64, "pread", ssize_t, (int fd, void *to, size_t count, off64_t at),
          (fd, to, count, at))
INTERPOSE(write, "write", ssize_t, (int fd, const void *from, size_t count), (fd, from, count))
INTERPOSE(pwrite, "pwrite", ssize_t, (int fd, const void *from, size_t count, off_t at),
          (fd, from, count, at))
INTERPOSE(pwrite64, "pwrite", ssize_t, (int fd, const void *from, size_t count, off64_t at),
          (fd, from, count, at))
INTERPOSE(fsync, "fsync", int, (int fd), (fd))
INTERPOSE(writev, "write", ssize_t, (int fd, const struct iovec *from, int count),
          (fd, from, count))
INTERPOSE(sendfile, "write", ssize_t, (int fd, int from, off_t *at, size_t count),
          (fd, from, at, count))
INTERPOSE(sendfile64, "write", ssize_t, (int fd, int from, off64_t *at, size_t count),
          (fd, from, at, count))
INTERPOSE(fallocate, "fallocate", int, (int fd, int mode, off_t at, off_t size),
          (fd, mode, at, size))
INTERPOSE(fallocate64, "fallocate", int, (int fd, int mode, off64_t at, off64_t size),
          (fd, mode, at, size))

/* These return the error. */
int posix_fallocate(int fd, off_t at, off_t size) {
    return fallocate(fd, 0, at, size) ? errno : 0;
}

int posix_fallocate64(int fd, off64_t at, off64_t size) {
    return fallocate64(fd, 0, at, size) ? errno : 0;
}
