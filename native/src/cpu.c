#include "cpu.h"

#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include "halfbyte.h"

bool hb_cpu_supports(int isa) {
    switch (isa) {
        case HB_ISA_SCALAR:
            return true;
#if HB_X86 /* the builtins ask the operating system too: registers that it does not save do not count */
        case HB_ISA_AVX2:
            __builtin_cpu_init();
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case HB_ISA_AVX512VNNI:
            __builtin_cpu_init();
            return hb_cpu_supports(HB_ISA_AVX2) && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#endif
        default:
            return false;
    }
}

int hb_cpu_best(void) {
    int best = HB_ISA_SCALAR;
    for (int isa = 0; isa < HB_ISA_COUNT; isa++)
        if (hb_cpu_supports(isa)) best = isa;
    return best;
}

int hb_cpu_count(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
}
