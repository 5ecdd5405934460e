# Zig has names of its own for the features of a processor.
if(HALFBYTE_ZIG)
  set(halfbyte_armv8_2 -mcpu=generic+v8_2a)
else()
  set(halfbyte_armv8_2 -march=armv8.2-a)
endif()

# Compiler flags by file suffix, and nowhere else. A file without a known suffix is built for the baseline.
function(halfbyte_isa_flags)
  foreach(source IN LISTS ARGN)
    if(source MATCHES "_x86_avx2\\.c$")
      set(flags -mavx2 -mfma -mf16c)
    elseif(source MATCHES "_x86_avxvnni\\.c$")
      set(flags -mavx2 -mfma -mf16c -mavxvnni)
    elseif(source MATCHES "_x86_avx512vlvnni\\.c$") # -D: 256-bit registers, though there are wider ones
      set(flags -mavx2 -mfma -mf16c -mavx512f -mavx512vl -mavx512vnni -DHB_AVX512VLVNNI)
    elseif(source MATCHES "_x86_avx512vnni\\.c$")
      set(flags -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni)
    elseif(source MATCHES "kv_put_arm_neon\\.c$")
      set(flags -Os -DHB_NEON) # not where time goes
    elseif(source MATCHES "_arm_neon\\.c$")
      set(flags -DHB_NEON) # of the baseline
    elseif(source MATCHES "_arm_dotprod\\.c$")
      set(flags ${halfbyte_armv8_2}+dotprod -DHB_NEON -DHB_DOTPROD)
    elseif(source MATCHES "_arm_i8mm\\.c$")
      set(flags ${halfbyte_armv8_2}+dotprod+i8mm -DHB_NEON -DHB_DOTPROD -DHB_I8MM)
    elseif(source MATCHES "attend_scalar\\.c$" AND CMAKE_SYSTEM_PROCESSOR MATCHES "^wasm")
      set(flags -Os) # half of a module's bytes otherwise
    elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^wasm" AND (source MATCHES "^src/" OR source MATCHES "(embed|gather|kv_put|rope)_scalar"))
      set(flags -Oz) # not where time goes
    elseif((halfbyte_arm OR HALFBYTE_ISA) AND source MATCHES "_scalar\\.c$" AND NOT source MATCHES "(embed|gather)_scalar")
      set(flags -Os -DHB_SMALL) # NEON is of the baseline: these are to compare with. Or the build is to be small
    elseif(source MATCHES "^src/" AND NOT source MATCHES "(exec|pool|sampler|sha256|normalise|tokeni[a-z_]*)\\.c$")
      set(flags -Os) # not where time goes
    elseif(source MATCHES "^src/")
      set(flags -O2)
    elseif(source MATCHES "_scalar\\.c$")
      set(flags -O2) # -O3 unrolls lane loops to five times the size
    else()
      continue()
    endif()
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${flags}")
  endforeach()
endfunction()

# Whether compiler and assembler know AVX-VNNI (GCC 11, Clang 12, binutils 2.36); its kernels are left out otherwise.
function(halfbyte_check_avxvnni result)
  include(CheckCSourceCompiles)
  set(CMAKE_REQUIRED_FLAGS "-mavx2 -mavxvnni")
  check_c_source_compiles("#include <immintrin.h>
    int main(void) {
      __m256i a = _mm256_setzero_si256();
      return _mm256_extract_epi32(_mm256_dpbusd_avx_epi32(a, a, a), 0);
    }" HALFBYTE_HAS_AVXVNNI)
  if(HALFBYTE_HAS_AVXVNNI)
    set(${result} 1 PARENT_SCOPE)
  else()
    set(${result} 0 PARENT_SCOPE)
  endif()
endfunction()
