// What the emulated libraries share: the error of a call that none of them answers.
#pragma once
#include <cstdio>
#include <cstdlib>

namespace emulated {

// Of this thread: the name in the last error, for the library's own text of an error.
inline thread_local const char* unanswered_name = nullptr;

// Says the name of a call without emulation. Returns the code that the library has for "not supported".
inline int unanswered(const char* library, const char* name, int code) {
    unanswered_name = name;
    std::fprintf(stderr, "emulated CUDA: %s of %s was called, and has no emulation\n", name, library);
    if (std::getenv("EMULATED_CUDA_ABORT")) std::abort();  // a debugger then shows who called
    return code;
}

}  // namespace emulated

// All symbols of the real library that the emulated one does not define come here (build.py writes the jumps).
#define UNANSWERED(library, code) \
    extern "C" __attribute__((visibility("hidden"))) long emulated_unanswered(const char* name) { \
        return emulated::unanswered(library, name, code); \
    }
