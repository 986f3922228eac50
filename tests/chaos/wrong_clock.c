/* Preloaded, it makes a process believe that it is WRONG_BY seconds later. Other clocks stay right. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *time) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, time);
    const char *wrong_by = getenv("WRONG_BY");
    if (clock == CLOCK_REALTIME && wrong_by) time->tv_sec += atol(wrong_by);
    return result;
}
