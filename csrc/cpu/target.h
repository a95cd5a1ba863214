// Opens a translation unit for one instruction set: FASTSR_TARGET names its features.
//
// GCC's intrinsics and templates take the target of the pragma in force where they are defined, so that it must come before
// every include; clang's declare their own target and only our text needs the attribute. The standard library stays out:
// the linker merges its inline functions, and might keep a copy that needs the newest processor for all.
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target(FASTSR_TARGET))), apply_to = function)
#else
#define FASTSR_PRAGMA_(text) _Pragma(#text)
#define FASTSR_PRAGMA(text) FASTSR_PRAGMA_(text)
FASTSR_PRAGMA(GCC target(FASTSR_TARGET))
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside GCC 12's own AVX-512 intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif
