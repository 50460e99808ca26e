/* A device with errors: preloaded, it lets one system call on one file fail with EIO.

   fail(call, path, after) arms it: of the calls named `call` on files whose path contains `path`,
   all from number `after` on fail; calls(), how many there were. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char armed_call[16], armed_path[4096];
static long armed_after, seen;

void fail(const char *call, const char *path, long after) {
    snprintf(armed_call, sizeof armed_call, "%s", call);
    snprintf(armed_path, sizeof armed_path, "%s", path);
    armed_after = after;
    seen = 0;
}

long calls(void) { return seen; }

static int fails(const char *call, int fd) {
    char link[64], path[4096];
    if (strcmp(call, armed_call) != 0)
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
    errno = EIO;
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
