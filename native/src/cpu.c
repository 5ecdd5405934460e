#include "cpu.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

#if HB_AVXVNNI
#include <cpuid.h>
#endif
#if HB_ARM && defined(__linux__)
#include <sys/auxv.h>
#elif HB_ARM && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "halfbyte_program.h"

#if HB_ARM
#if defined(__linux__) /* Android too; bits of the kernel's interface, which old headers lack */
static bool has_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; }        /* HWCAP_ASIMDDP */
static bool has_i8mm(void) { return getauxval(26 /* AT_HWCAP2 */) >> 13 & 1; } /* HWCAP2_I8MM */
#elif defined(__APPLE__)
static bool has(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(name, &value, &size, NULL, 0) && value;
}
static bool has_dotprod(void) { return has("hw.optional.arm.FEAT_DotProd"); }
static bool has_i8mm(void) { return has("hw.optional.arm.FEAT_I8MM"); }
#else
static bool has_dotprod(void) { return false; }
static bool has_i8mm(void) { return false; }
#endif
#endif

#if HB_AVXVNNI
static bool has_avxvnni(void) { /* compilers that know the flag need not know the name of a builtin */
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}
#endif

bool hb_cpu_supports(int isa) {
    switch (isa) {
        case HB_ISA_SCALAR:
            return true;
#if HB_X86 /* the builtins ask the operating system too: registers that it does not save do not count */
        case HB_ISA_AVX2:
            __builtin_cpu_init();
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if HB_AVXVNNI
        case HB_ISA_AVXVNNI: /* of the registers of AVX2 */
            return hb_cpu_supports(HB_ISA_AVX2) && has_avxvnni();
#endif
#if HB_X86_AVX512
        case HB_ISA_AVX512VLVNNI:
            __builtin_cpu_init();
            return hb_cpu_supports(HB_ISA_AVX2) && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
        case HB_ISA_AVX512VNNI:
            __builtin_cpu_init();
            return hb_cpu_supports(HB_ISA_AVX2) && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
#endif
#elif HB_ARM
        case HB_ISA_NEON:
            return true; /* part of AArch64 */
        case HB_ISA_DOTPROD:
            return has_dotprod();
        case HB_ISA_I8MM:
            return has_dotprod() && has_i8mm();
#endif
        default:
            return false;
    }
}

/* Every instruction set, those of one architecture from worst to best. */
static const int ranks[HB_ISA_COUNT] = {
    HB_ISA_SCALAR,     HB_ISA_AVX2, HB_ISA_AVXVNNI, HB_ISA_AVX512VLVNNI,
    HB_ISA_AVX512VNNI, HB_ISA_NEON, HB_ISA_DOTPROD, HB_ISA_I8MM,
};

int hb_cpu_rank(int isa) {
    int rank = HB_ISA_COUNT - 1;
    while (rank >= 0 && ranks[rank] != isa) rank--;
    return rank;
}

int hb_cpu_best(void) {
    int rank = HB_ISA_COUNT - 1;
    while (!hb_cpu_supports(ranks[rank])) rank--; /* SCALAR is everywhere */
    return ranks[rank];
}

int hb_cpu_count(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
#if defined(_WIN32)
    DWORD_PTR own, all; /* a bit for each processor of the process's group */
    if (!GetProcessAffinityMask(GetCurrentProcess(), &own, &all) || !own) return 1;
    return __builtin_popcountll(own);
#elif defined(__wasm__)
    return 1;
#else
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (int)n : 1;
#endif
}
