// libcuda, the driver: what the runtime's users ask of it directly.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <cstring>
#include "emulated.h"

UNANSWERED("libcuda", CUDA_ERROR_NOT_SUPPORTED)
#define OK return CUDA_SUCCESS

namespace {
int current() {
    int device = 0;
    cudaGetDevice(&device);
    return device;
}
CUresult translated(cudaError_t error) { return static_cast<CUresult>(error); }
}  // namespace

#undef cuDeviceTotalMem
#undef cuCtxGetCurrent
#undef cuGetProcAddress
#undef cuMemGetAddressRange
extern "C" {
CUresult cuInit(unsigned) { OK; }
CUresult cuLogsRegisterCallback(CUlogsCallback, void*, CUlogsCallbackHandle* handle) { *handle = nullptr; OK; }
CUresult cuLogsUnregisterCallback(CUlogsCallbackHandle) { OK; }
CUresult cuDriverGetVersion(int* v) { *v = CUDA_VERSION; OK; }
CUresult cuDeviceGetCount(int* n) { return translated(cudaGetDeviceCount(n)); }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { *device = ordinal; OK; }
CUresult cuDeviceGetName(char* name, int n, CUdevice) { std::snprintf(name, n, "Emulated H100"); OK; }
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute which, CUdevice device) {
    return translated(cudaDeviceGetAttribute(v, static_cast<cudaDeviceAttr>(which), device));
}
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
    size_t free_bytes;
    return translated(cudaMemGetInfo(&free_bytes, bytes));
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) { *flags = 0; *active = 1; OK; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice device) { *c = reinterpret_cast<CUcontext>(0x100 + 16l * device); OK; }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { OK; }
CUresult cuCtxGetCurrent(CUcontext* c) { return cuDevicePrimaryCtxRetain(c, current()); }
CUresult cuCtxSetCurrent(CUcontext) { OK; }
CUresult cuCtxGetDevice(CUdevice* device) { *device = current(); OK; }
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute which, CUdeviceptr pointer) {
    cudaPointerAttributes of;
    cudaPointerGetAttributes(&of, reinterpret_cast<void*>(pointer));
    switch (which) {
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *static_cast<int*>(data) = of.device; OK;
        case CU_POINTER_ATTRIBUTE_CONTEXT: return cuDevicePrimaryCtxRetain(static_cast<CUcontext*>(data), of.device);
        default: return static_cast<CUresult>(
            emulated::unanswered("libcuda", "cuPointerGetAttribute of another attribute", CUDA_ERROR_NOT_SUPPORTED));
    }
}
CUresult cuGetErrorName(CUresult error, const char** s) { *s = cudaGetErrorName(static_cast<cudaError_t>(error)); OK; }
CUresult cuGetErrorString(CUresult error, const char** s) {
    static thread_local char text[300];
    std::snprintf(text, sizeof text, "%s %s", error == CUDA_ERROR_NOT_SUPPORTED ? "no emulation of" : "emulated error",
                  emulated::unanswered_name ? emulated::unanswered_name : "");
    *s = text;
    OK;
}
CUresult cuGetProcAddress_v2(const char* name, void** p, int, cuuint64_t, CUdriverProcAddressQueryResult* found) {
    static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *p = driver ? dlsym(driver, name) : nullptr;
    if (found) *found = *p ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *p ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
}
