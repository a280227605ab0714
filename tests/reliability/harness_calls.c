/* Stands between a test's process and libc: sees the calls that change files below one folder, writes them down where
 * another process can read them after this one is dead, and at a chosen call fails it or kills the process.
 *
 * Loaded with LD_PRELOAD by tests/reliability/harness.py, which also has the layout of `struct shared` (keep in step).
 * At this level it does not matter which part of the trainer, Python or torch makes a call.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum op { OPEN, CREATE, WRITE, FSYNC, CLOSE, RENAME, MKDIR, UNLINK, RMDIR, TRUNCATE, OPENDIR, STAT };
enum mode { WATCH, FAIL, FAIL_ON, KILL_BEFORE, KILL_WITHIN, KILL_AFTER };
enum phase { OTHER, WRITING, RENAMING, DELETING };
#define NAME 120
#define RECORDS 16384
#define DESCRIPTORS 4096
#define PENDING -1

struct record {
    int32_t op, phase, result, thread;
    char name[NAME], other[NAME];
};
struct shared {
    int32_t mode, error, phase, permille;
    int64_t target;
    _Atomic int64_t count, in_phase;
    _Atomic int32_t now;
    int32_t unused;
    char root[512];
    struct record records[RECORDS];
};

static struct shared *shared;
static char names[DESCRIPTORS][NAME];
static struct record scrap;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* Begin: `path` (an array of 512, "root\nfolder\n...") lies in the file; maps it. */
int calls_watch(const char *path) {
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR, 0);
    if (fd < 0) return errno;
    void *memory = mmap(0, sizeof(struct shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (memory == MAP_FAILED) return errno;
    memset(names, 0, sizeof names);
    shared = memory;
    return 0;
}

long calls_size(void) { return sizeof(struct shared); }

/* The part of a path below the root; 0 for all other paths. */
static const char *below(int folder, const char *path, char *buffer) {
    if (!shared || !path) return 0;
    size_t length = strlen(shared->root);
    if (path[0] != '/') {
        char link[64];
        ssize_t n;
        if (folder == AT_FDCWD)
            n = getcwd(buffer, PATH_MAX) ? (ssize_t)strlen(buffer) : -1;
        else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            n = readlink(link, buffer, PATH_MAX);
        }
        if (n < 0) return 0;
        snprintf(buffer + n, 2 * PATH_MAX - n, "/%s", path);
        path = buffer;
    }
    if (strncmp(path, shared->root, length)) return 0;
    if (path[length] == 0) return ".";
    return path[length] == '/' ? path + length + 1 : 0;
}

static int begins(const char *text, const char *start) { return !strncmp(text, start, strlen(start)); }

static void die(void) {
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;) pause();
}

/* Which part of the protocol a call belongs to; the last call of a part still does. */
static int phase_of(int op, const char *name, const char *other, int *next) {
    int now = *next = atomic_load(&shared->now);
    if (op == MKDIR && begins(name, ".tmp-step-") && !begins(name, ".tmp-step-0-")) now = *next = WRITING;
    if (op == RENAME && begins(name, ".tmp-step-") && begins(other, "step-")) now = *next = RENAMING;
    if (op == RENAME && begins(other, ".del-step-")) now = *next = DELETING;
    if (now == RENAMING && op == CLOSE) *next = OTHER; /* of the folder that holds them, which has been synced */
    if (op == RMDIR && (begins(name, ".del-step-") || begins(name, ".tmp-step-"))) *next = OTHER;
    return now;
}

struct call {
    struct record *record;
    int error, after, portion;
};

static int changes(int op) { return op != OPEN && op != CLOSE && op != OPENDIR && op != STAT && op != UNLINK && op != RMDIR; }

static struct call begin(int op, const char *name, const char *other) {
    struct call call = {&scrap, 0, 0, 1000};
    int next, phase = phase_of(op, name, other, &next);
    int64_t number = atomic_fetch_add(&shared->count, 1);
    atomic_store(&shared->now, next);
    if (number < RECORDS) {
        call.record = &shared->records[number];
        call.record->op = op;
        call.record->phase = phase;
        call.record->result = PENDING;
        call.record->thread = syscall(SYS_gettid);
        snprintf(call.record->name, NAME, "%s", name);
        snprintf(call.record->other, NAME, "%s", other);
    }
    int64_t place = shared->phase < 0 ? number : phase == shared->phase ? atomic_fetch_add(&shared->in_phase, 1) : -1;
    if (shared->mode == FAIL_ON && place >= shared->target && changes(op)) call.error = shared->error;
    if (place != shared->target) return call;
    if (shared->mode == FAIL) call.error = shared->error;
    if (shared->mode == KILL_BEFORE) die();
    if (shared->mode == KILL_WITHIN && op == WRITE) call.portion = shared->permille;
    if (shared->mode == KILL_WITHIN && op != WRITE) die();
    call.after = shared->mode == KILL_AFTER || shared->mode == KILL_WITHIN;
    return call;
}

static long end(struct call call, long result) {
    int error = errno;
    call.record->result = result < 0 ? error : 0;
    if (call.after) die();
    errno = error;
    return result;
}

/* Run `expression` as a call of kind `op`, unless it is to fail. */
#define GUARDED(op, name, other, expression) \
    do { \
        struct call call = begin(op, name, other); \
        if (call.error) { \
            errno = call.error; \
            return end(call, -1); \
        } \
        return end(call, expression); \
    } while (0)

static int opened(const char *name, int fd) {
    if (fd >= 0 && fd < DESCRIPTORS) snprintf(names[fd], NAME, "%s", name);
    return fd;
}

static const char *held(int fd) { return shared && fd >= 0 && fd < DESCRIPTORS && names[fd][0] ? names[fd] : 0; }

static int open_below(int folder, const char *path, int flags, mode_t mode) {
    char buffer[2 * PATH_MAX];
    const char *name = below(folder, path, buffer);
    if (!name) return syscall(SYS_openat, folder, path, flags, mode);
    int op = flags & (O_CREAT | O_TRUNC) ? CREATE : flags & O_DIRECTORY ? OPENDIR : OPEN;
    GUARDED(op, name, "", opened(name, syscall(SYS_openat, folder, path, flags, mode)));
}

#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }
int open(const char *path, int flags, ...) { MODE return open_below(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return open_below(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return open_below(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return open_below(folder, path, flags, mode); }

#define WRITTEN(whole, part) \
    const char *name = held(fd); \
    if (!name) return whole; \
    struct call call = begin(WRITE, name, ""); \
    if (call.error) { \
        errno = call.error; \
        return end(call, -1); \
    } \
    return end(call, call.portion < 1000 ? part : whole);

ssize_t write(int fd, const void *data, size_t size) {
    WRITTEN(syscall(SYS_write, fd, data, size), syscall(SYS_write, fd, data, size * call.portion / 1000))
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    WRITTEN(syscall(SYS_pwrite64, fd, data, size, at), syscall(SYS_pwrite64, fd, data, size * call.portion / 1000, at))
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { return pwrite(fd, data, size, at); }
ssize_t writev(int fd, const struct iovec *parts, int count) {
    WRITTEN(syscall(SYS_writev, fd, parts, count), syscall(SYS_writev, fd, parts, count / 2))
}

#define DESCRIPTOR(op, expression) \
    const char *name = held(fd); \
    if (!name) return expression; \
    GUARDED(op, name, "", expression);

int fsync(int fd) { DESCRIPTOR(FSYNC, syscall(SYS_fsync, fd)) }
int fdatasync(int fd) { DESCRIPTOR(FSYNC, syscall(SYS_fdatasync, fd)) }
int ftruncate(int fd, off_t size) { DESCRIPTOR(TRUNCATE, syscall(SYS_ftruncate, fd, size)) }
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }

/* A close that fails has closed all the same, as on Linux. */
int close(int fd) {
    if (!held(fd)) return syscall(SYS_close, fd);
    char name[NAME];
    snprintf(name, NAME, "%s", names[fd]);
    struct call call = begin(CLOSE, name, "");
    names[fd][0] = 0;
    long result = syscall(SYS_close, fd);
    if (call.error) {
        errno = call.error;
        return end(call, -1);
    }
    return end(call, result);
}

#define PATH(op, folder, path, expression) \
    char buffer[2 * PATH_MAX]; \
    const char *name = below(folder, path, buffer); \
    if (!name) return expression; \
    GUARDED(op, name, "", expression);

int mkdir(const char *path, mode_t mode) { PATH(MKDIR, AT_FDCWD, path, syscall(SYS_mkdirat, AT_FDCWD, path, mode)) }
int mkdirat(int folder, const char *path, mode_t mode) { PATH(MKDIR, folder, path, syscall(SYS_mkdirat, folder, path, mode)) }
int unlink(const char *path) { PATH(UNLINK, AT_FDCWD, path, syscall(SYS_unlinkat, AT_FDCWD, path, 0)) }
int rmdir(const char *path) { PATH(RMDIR, AT_FDCWD, path, syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR)) }
int unlinkat(int folder, const char *path, int flags) {
    PATH(flags & AT_REMOVEDIR ? RMDIR : UNLINK, folder, path, syscall(SYS_unlinkat, folder, path, flags))
}

static int renamed(int from, const char *old, int to, const char *new, unsigned flags) {
    char first[2 * PATH_MAX], second[2 * PATH_MAX];
    const char *name = below(from, old, first), *other = below(to, new, second);
    if (!name && !other) return syscall(SYS_renameat2, from, old, to, new, flags);
    GUARDED(RENAME, name ? name : "", other ? other : "", syscall(SYS_renameat2, from, old, to, new, flags));
}
int rename(const char *old, const char *new) { return renamed(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renamed(from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) { return renamed(from, old, to, new, flags); }

DIR *opendir(const char *path) {
    REAL(opendir);
    char buffer[2 * PATH_MAX];
    const char *name = below(AT_FDCWD, path, buffer);
    if (!name) return real(path);
    struct call call = begin(OPENDIR, name, "");
    if (call.error) {
        errno = call.error;
        end(call, -1);
        return 0;
    }
    DIR *found = real(path);
    end(call, found ? 0 : -1);
    return found;
}

#define STATUS(function, type) \
    int function(const char *path, struct type *status) { \
        REAL(function); \
        PATH(STAT, AT_FDCWD, path, real(path, status)) \
    }
STATUS(stat, stat)
STATUS(lstat, stat)
STATUS(stat64, stat64)
STATUS(lstat64, stat64)
int fstatat64(int folder, const char *path, struct stat64 *status, int flags) {
    REAL(fstatat64);
    PATH(STAT, folder, path, real(folder, path, status, flags))
}
