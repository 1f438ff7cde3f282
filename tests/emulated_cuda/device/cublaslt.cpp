// libcublasLt: handles and versions, no products.
#include <cstddef>
#include "emulated.h"
UNANSWERED("libcublasLt", 15)  // CUBLAS_STATUS_NOT_SUPPORTED

extern "C" {
int cublasLtCreate(void** handle) { *handle = reinterpret_cast<void*>(0x20); return 0; }
int cublasLtDestroy(void*) { return 0; }
size_t cublasLtGetVersion() { return 130100; }
size_t cublasLtGetCudartVersion() { return 13000; }
int cublasLtGetProperty(int, int* value) { *value = 13; return 0; }
const char* cublasLtGetStatusString(int) { return emulated::unanswered_name ? emulated::unanswered_name : "emulated"; }
const char* cublasLtGetStatusName(int) { return "emulated"; }
}
