// A clock that a test moves and breaks: loaded into the server before libc (LD_PRELOAD).
//
// The file named by CLOCK_CONTROL is shared with the test. Times of files come from the kernel and
// stay as they are.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static struct control {
    _Atomic int64_t ahead_s;   // of the clock on the wall
    _Atomic int64_t fails_at;  // which look of the engine's thread at the time, from 1; 0 for none
} *control;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("CLOCK_CONTROL");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *shared = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared != MAP_FAILED) control = shared;
    close(file);
}

static int fails(void) {
    char name[16] = "";
    if (!control || !control->fails_at) return 0;
    prctl(PR_GET_NAME, name);
    if (strcmp(name, "hearth-engine") || atomic_fetch_sub(&control->fails_at, 1) != 1) return 0;
    usleep(20 * 1000);  // threads that compute for this one have finished by then
    return 1;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    if (clock == CLOCK_MONOTONIC && fails()) {
        errno = EINVAL;
        return -1;
    }
    int done = syscall(SYS_clock_gettime, clock, now);
    if (!done && clock == CLOCK_REALTIME && control) now->tv_sec += control->ahead_s;
    return done;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec t;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &t)) return -1;
    now->tv_sec = t.tv_sec;
    now->tv_usec = t.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec t;
    if (clock_gettime(CLOCK_REALTIME, &t)) return -1;
    if (out) *out = t.tv_sec;
    return t.tv_sec;
}
