# Zig's C compiler (PyPI: ziglang), which carries the C libraries of many systems:
# HALFBYTE_ZIG is the program, HALFBYTE_TARGET what it compiles for, such as aarch64-linux-musl.
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES HALFBYTE_ZIG HALFBYTE_TARGET)
string(REPLACE "-" ";" halfbyte_triple "${HALFBYTE_TARGET}")
list(GET halfbyte_triple 0 CMAKE_SYSTEM_PROCESSOR)
list(GET halfbyte_triple 1 halfbyte_system)
set(CMAKE_SYSTEM_NAME Linux)
if(halfbyte_system STREQUAL "macos")
  set(CMAKE_SYSTEM_NAME Darwin)
elseif(halfbyte_system STREQUAL "windows")
  set(CMAKE_SYSTEM_NAME Windows)
elseif(halfbyte_system STREQUAL "wasi")
  set(CMAKE_SYSTEM_NAME Generic)
  set(CMAKE_EXECUTABLE_SUFFIX_C .wasm)
endif()
set(CMAKE_C_COMPILER "${HALFBYTE_ZIG}" cc -target ${HALFBYTE_TARGET})
# A check that links would build the target's C library, once for every set of flags. Glibc is only stubs, and its
# check finds out about libpthread.
if(NOT HALFBYTE_TARGET MATCHES "gnu\\.")
  set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
endif()
# Zig adds debug information and checks unless told otherwise.
set(CMAKE_C_FLAGS_INIT "-g0 -fno-sanitize=undefined")
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-Wl,-s")
if(halfbyte_system STREQUAL "wasi") # 128-bit vectors, which every engine has had since 2021
  string(APPEND CMAKE_C_FLAGS_INIT " -msimd128")
  set(CMAKE_EXE_LINKER_FLAGS_INIT "-s")
endif()

# Android without its NDK: the headers are musl's, which declare what bionic has, and the libraries to link
# with are made from the list of the names that bionic exports, so that any other is an error of the linker.
if(HALFBYTE_TARGET MATCHES "android")
  string(APPEND CMAKE_C_FLAGS_INIT " -D__errno_location=__errno")
  get_filename_component(zig_headers "${HALFBYTE_ZIG}" DIRECTORY)
  string(APPEND zig_headers "/lib/libc/include")
  foreach(folder ${CMAKE_SYSTEM_PROCESSOR}-linux-musl generic-musl ${CMAKE_SYSTEM_PROCESSOR}-linux-any any-linux-any)
    if(folder MATCHES "^x86_64-linux-any$")
      set(folder x86-linux-any) # one folder for both widths
    endif()
    string(APPEND CMAKE_C_FLAGS_INIT " -isystem \"${zig_headers}/${folder}\"")
  endforeach()
  set(stubs "${CMAKE_BINARY_DIR}/bionic")
  if(NOT EXISTS "${stubs}/builtins.so" AND NOT CMAKE_BINARY_DIR MATCHES "CMakeFiles")
    foreach(library libc libm builtins)
      file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/bionic.txt" lines REGEX "^${library}: ")
      string(REPLACE "${library}: " "" names "${lines}")
      string(REGEX REPLACE "([A-Za-z_0-9]+)[ ;]*" "void \\1(void) {}\n" source "${names}")
      file(WRITE "${stubs}/${library}.c" "${source}")
      execute_process(
        COMMAND ${CMAKE_C_COMPILER} -g0 -w -fno-builtin -shared -nostdlib -Wl,-soname,${library}.so
                "${stubs}/${library}.c" -o "${stubs}/${library}.so"
        RESULT_VARIABLE failed)
      if(failed)
        message(FATAL_ERROR "cannot make the stub of ${library}.so")
      endif()
    endforeach()
  endif()
  string(APPEND CMAKE_SHARED_LINKER_FLAGS_INIT " -nostdlib -Wl,-z,defs")
  set(CMAKE_C_STANDARD_LIBRARIES "\"${stubs}/libc.so\"")
  set(HALFBYTE_LIBM "${stubs}/libm.so" "${stubs}/builtins.so") # Zig takes -lm to mean a libm of its own
endif()
