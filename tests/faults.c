/* Fail or kill a process at the n-th call that writes below a folder; preloaded by tests/faults.py.

   Counted are calls that create, write, cut, rename, remove or sync a file, in the order in which they come; locks are
   counted apart. Nothing is counted, and nothing fails, before faults_arm. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TORN, FAIL, FULL, LOCKED }; /* as in tests/faults.py */

static char folder[4096];
static int how = -1, code;
static long wanted, writes, locks;

void faults_arm(const char *below, int kind, int error, long at) {
    snprintf(folder, sizeof folder, "%s", below);
    how = kind;
    code = error;
    wanted = at;
    writes = locks = 0;
}

long faults_writes(void) { return writes; }
long faults_locks(void) { return locks; }

static int below(const char *path) {
    size_t length = strlen(folder);
    return how >= 0 && path && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int below_fd(int fd) {
    char link[32], path[4096];
    if (how < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static void die(void) {
    raise(SIGKILL);
}

/* Whether this call is to fail. A disk that is full stays full for what grows. */
static int fails(int grows) {
    long now = __atomic_add_fetch(&writes, 1, __ATOMIC_SEQ_CST);
    if (now == wanted && how == KILL) die();
    if ((now == wanted && (how == FAIL || how == FULL)) || (now > wanted && how == FULL && grows)) {
        errno = code;
        return 1;
    }
    return 0;
}

static int torn(void) { return how == TORN && writes == wanted; }

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

#define CALL(type, name, parameters, arguments, counted, grows)  \
    type name parameters {                                       \
        REAL(name);                                              \
        if (!(counted)) return real arguments;                   \
        if (fails(grows)) return -1;                             \
        type result = real arguments;                            \
        if (torn()) die();                                       \
        return result;                                           \
    }

/* Of a write, half is done before the kill. */
#define WRITE(type, name, parameters, arguments, half)           \
    type name parameters {                                       \
        REAL(name);                                              \
        if (!below_fd(fd)) return real arguments;                \
        if (fails(1)) return -1;                                 \
        if (torn()) {                                            \
            real half;                                           \
            die();                                               \
        }                                                        \
        return real arguments;                                   \
    }

WRITE(ssize_t, write, (int fd, const void *bytes, size_t size), (fd, bytes, size), (fd, bytes, size / 2))
WRITE(ssize_t, pwrite, (int fd, const void *bytes, size_t size, off_t at), (fd, bytes, size, at), (fd, bytes, size / 2, at))
WRITE(ssize_t, pwrite64, (int fd, const void *bytes, size_t size, off64_t at), (fd, bytes, size, at),
      (fd, bytes, size / 2, at))
WRITE(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count), (fd, parts, count / 2))

CALL(int, ftruncate, (int fd, off_t size), (fd, size), below_fd(fd), 1)
CALL(int, ftruncate64, (int fd, off64_t size), (fd, size), below_fd(fd), 1)
CALL(int, fsync, (int fd), (fd), below_fd(fd), 0)
CALL(int, fdatasync, (int fd), (fd), below_fd(fd), 0)
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), below(path), 1)
CALL(int, rmdir, (const char *path), (path), below(path), 0)
CALL(int, unlink, (const char *path), (path), below(path), 0)
CALL(int, unlinkat, (int at, const char *path, int flags), (at, path, flags), below(path), 0)
CALL(int, rename, (const char *from, const char *to), (from, to), below(to), 0)
CALL(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), below(to), 0)
CALL(int, link, (const char *from, const char *to), (from, to), below(to), 1)
CALL(int, symlink, (const char *to, const char *path), (to, path), below(path), 1)

#define OPEN(name, parameters, path, flags, before)                                                            \
    int name parameters {                                                                                      \
        REAL(name);                                                                                            \
        va_list more;                                                                                          \
        va_start(more, flags);                                                                                 \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                \
        va_end(more);                                                                                          \
        int counted = flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR) && below(path);                          \
        if (counted && fails(flags & O_CREAT)) return -1;                                                      \
        int fd = real before;                                                                                  \
        if (counted && torn()) die();                                                                          \
        return fd;                                                                                             \
    }

OPEN(open, (const char *path, int flags, ...), path, flags, (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), path, flags, (path, flags, mode))
OPEN(openat, (int at, const char *path, int flags, ...), path, flags, (at, path, flags, mode))
OPEN(openat64, (int at, const char *path, int flags, ...), path, flags, (at, path, flags, mode))

/* Another process keeps the lock from now on. */
#define LOCK(name)                                                                                             \
    int name(int fd, int command, ...) {                                                                       \
        REAL(name);                                                                                            \
        va_list more;                                                                                          \
        va_start(more, command);                                                                               \
        void *argument = va_arg(more, void *);                                                                 \
        va_end(more);                                                                                          \
        if (command == F_SETLK && ((struct flock *)argument)->l_type == F_WRLCK && below_fd(fd)) {             \
            if (__atomic_add_fetch(&locks, 1, __ATOMIC_SEQ_CST) >= wanted && how == LOCKED) {                  \
                errno = EAGAIN;                                                                                \
                return -1;                                                                                     \
            }                                                                                                  \
        }                                                                                                      \
        return real(fd, command, argument);                                                                    \
    }

LOCK(fcntl)
LOCK(fcntl64)
