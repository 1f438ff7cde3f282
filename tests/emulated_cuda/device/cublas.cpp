// libcublas: handles, no products. ATen's run on the CPU, Transformer Engine's have references.
#include <cstddef>
#include "emulated.h"
UNANSWERED("libcublas", 15)  // CUBLAS_STATUS_NOT_SUPPORTED

extern "C" {
int cublasCreate_v2(void** handle) { *handle = reinterpret_cast<void*>(0x10); return 0; }
int cublasDestroy_v2(void*) { return 0; }
int cublasGetVersion_v2(void*, int* version) { *version = 130100; return 0; }
int cublasSetStream_v2(void*, void*) { return 0; }
int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
int cublasSetMathMode(void*, int) { return 0; }
int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
int cublasGetStream_v2(void*, void** stream) { *stream = nullptr; return 0; }
int cublasGetProperty(int, int* value) { *value = 13; return 0; }
const char* cublasGetStatusString(int) { return emulated::unanswered_name ? emulated::unanswered_name : "emulated"; }
}
