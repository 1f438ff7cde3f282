// libcudart: device memory is host memory, everything is done when it is asked for, and a kernel is an error by name.
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <chrono>
#include <cstring>
#include <unordered_map>
#include "emulated.h"
#include "memory.h"

#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo
#define OK return cudaSuccess
UNANSWERED("libcudart", cudaErrorNotSupported)

namespace {
thread_local int device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string kernel_name;
std::mutex lock;
std::unordered_map<const void*, const char*>& kernels() {
    static auto* all = new std::unordered_map<const void*, const char*>;
    return *all;
}
std::map<char*, size_t>& pinned() {
    static auto* all = new std::map<char*, size_t>;
    return *all;
}
std::atomic<size_t> handles{0x1000};

cudaError_t failed(cudaError_t error) { return last_error = error; }
void* new_handle() { return reinterpret_cast<void*>(handles += 16); }

cudaError_t take(void** start, size_t bytes) {
    *start = bytes ? emulated::Memory::here().take(bytes, device) : nullptr;
    return bytes && !*start ? failed(cudaErrorMemoryAllocation) : cudaSuccess;
}
cudaError_t give(void* start) {
    if (!start) OK;
    return emulated::Memory::here().give(start) ? cudaSuccess : failed(cudaErrorInvalidValue);
}
cudaError_t launched(const void* function) {
    std::lock_guard<std::mutex> guard(lock);
    auto found = kernels().find(function);
    const char* name = found == kernels().end() ? "a kernel that nobody registered" : found->second;
    int status;
    char* readable = abi::__cxa_demangle(name, nullptr, nullptr, &status);
    kernel_name = std::string("kernel ") + (readable ? readable : name);
    std::free(readable);
    return failed(static_cast<cudaError_t>(
        emulated::unanswered("a library", kernel_name.c_str(), cudaErrorNotSupported)));
}
cudaError_t pin(void* start, size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    pinned()[static_cast<char*>(start)] = bytes;
    OK;
}
bool is_pinned(const void* address) {
    std::lock_guard<std::mutex> guard(lock);
    auto after = pinned().upper_bound(static_cast<char*>(const_cast<void*>(address)));
    return after != pinned().begin() && address < (--after)->first + after->second;
}
int attribute(int which) {
    switch (which) {
        case cudaDevAttrComputeCapabilityMajor: return 9;
        case cudaDevAttrMultiProcessorCount: return 132;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
        case cudaDevAttrMaxThreadsPerBlock: return 1024;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrL2CacheSize: return 52428800;
        case cudaDevAttrCooperativeLaunch:
        case cudaDevAttrUnifiedAddressing: return 1;
        default: return 0;
    }
}
}  // namespace

extern "C" {
// for tests: the most that this process held of a device, and a new beginning of that count
size_t emulated_peak_bytes(int of) { return emulated::account().peak[of]; }
size_t emulated_held_bytes(int of) { return emulated::account().held[of]; }
void emulated_reset_peak(int of) { emulated::account().peak[of] = size_t(emulated::account().held[of]); }

cudaError_t cudaGetDeviceCount(int* n) { *n = emulated::device_count(); OK; }
cudaError_t cudaGetDevice(int* d) { *d = device; OK; }
cudaError_t cudaSetDevice(int d) {
    if (d < 0 || d >= emulated::device_count()) return failed(cudaErrorInvalidDevice);
    device = d;
    OK;
}
cudaError_t cudaInitDevice(int d, unsigned, unsigned) { return cudaSetDevice(d); }
cudaError_t cudaSetDeviceFlags(unsigned) { OK; }
cudaError_t cudaGetDeviceFlags(unsigned* f) { *f = 0; OK; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int) {
    std::memset(p, 0, sizeof *p);
    std::strcpy(p->name, "Emulated H100");
    p->totalGlobalMem = emulated::device_bytes();
    p->major = 9;
    p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    p->unifiedAddressing = p->concurrentKernels = 1;
    p->asyncEngineCount = 3;
    p->memoryBusWidth = 5120;
    p->textureAlignment = 512;
    OK;
}
cudaError_t cudaDeviceGetAttribute(int* v, enum cudaDeviceAttr a, int) { *v = attribute(a); OK; }
cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) { std::snprintf(s, n, "0000:%02x:00.0", d); OK; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    OK;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 1; OK; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { OK; }
cudaError_t cudaDeviceSynchronize() { OK; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) { *p = static_cast<cudaMemPool_t>(new_handle()); OK; }
cudaError_t cudaRuntimeGetVersion(int* v) { *v = CUDART_VERSION; OK; }
cudaError_t cudaDriverGetVersion(int* v) { *v = CUDART_VERSION; OK; }

cudaError_t cudaMalloc(void** p, size_t n) { return take(p, n); }
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return take(p, n); }
cudaError_t cudaFree(void* p) { return give(p); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return give(p); }
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    *total = emulated::device_bytes();
    *free_bytes = *total - std::min(*total, emulated::held_by_all(device));
    OK;
}
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
    *p = n ? std::aligned_alloc(4096, (n + 4095) / 4096 * 4096) : nullptr;
    if (n && !*p) return failed(cudaErrorMemoryAllocation);
    return n ? pin(*p, n) : cudaSuccess;
}
cudaError_t cudaMallocHost(void** p, size_t n) { return cudaHostAlloc(p, n, 0); }
cudaError_t cudaHostRegister(void* p, size_t n, unsigned) { return pin(p, n); }
cudaError_t cudaHostUnregister(void* p) {
    std::lock_guard<std::mutex> guard(lock);
    return pinned().erase(static_cast<char*>(p)) ? cudaSuccess : failed(cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaFreeHost(void* p) {
    if (p) cudaHostUnregister(p);
    std::free(p);
    OK;
}
cudaError_t cudaHostGetDevicePointer(void** d, void* h, unsigned) { *d = h; OK; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) {
    std::memset(a, 0, sizeof *a);
    char* start;
    emulated::Block block;
    a->type = cudaMemoryTypeUnregistered;
    a->device = -2;
    if (emulated::Memory::here().find(p, &start, &block)) {
        a->type = cudaMemoryTypeDevice;
        a->device = block.device;
        a->devicePointer = const_cast<void*>(p);
    } else if (is_pinned(p)) {
        a->type = cudaMemoryTypeHost;
        a->device = device;
        a->devicePointer = a->hostPointer = const_cast<void*>(p);
    }
    OK;
}

cudaError_t cudaMemcpy(void* d, const void* s, size_t n, enum cudaMemcpyKind) { std::memmove(d, s, n); OK; }
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, enum cudaMemcpyKind, cudaStream_t) {
    std::memmove(d, s, n);
    OK;
}
cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t) { std::memmove(d, s, n); OK; }
cudaError_t cudaMemcpy2DAsync(void* d, size_t to_pitch, const void* s, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind, cudaStream_t) {
    for (size_t i = 0; i < height; i++)
        std::memmove(static_cast<char*>(d) + i * to_pitch, static_cast<const char*>(s) + i * from_pitch, width);
    OK;
}
cudaError_t cudaMemset(void* d, int v, size_t n) { std::memset(d, v, n); OK; }
cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t) { std::memset(d, v, n); OK; }

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* p) {
    std::memset(handle, 0, sizeof *handle);
    bool known = emulated::Memory::here().describe(p, reinterpret_cast<emulated::Handle*>(handle));
    return known ? cudaSuccess : failed(cudaErrorInvalidValue);
}
cudaError_t cudaIpcOpenMemHandle(void** p, cudaIpcMemHandle_t handle, unsigned) {
    *p = emulated::Memory::here().open_handle(*reinterpret_cast<emulated::Handle*>(&handle));
    return *p ? cudaSuccess : failed(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaIpcCloseMemHandle(void* p) { return give(p); }
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t) { std::memset(handle, 0, sizeof *handle); OK; }
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t) { return cudaEventCreate(event); }

cudaError_t cudaStreamCreate(cudaStream_t* s) { *s = static_cast<cudaStream_t>(new_handle()); OK; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreate(s); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
cudaError_t cudaStreamDestroy(cudaStream_t) { OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) { *p = 0; OK; }
cudaError_t cudaStreamQuery(cudaStream_t) { OK; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { OK; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { OK; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, enum cudaStreamCaptureStatus* s) { *s = cudaStreamCaptureStatusNone; OK; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, enum cudaStreamCaptureStatus* s, unsigned long long* id, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t* n) {
    *s = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (n) *n = 0;
    OK;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* data, unsigned) {
    f(s, cudaSuccess, data);
    OK;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* data) { f(data); OK; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode*) { OK; }

// an event is the moment at which it was recorded
cudaError_t cudaEventCreate(cudaEvent_t* e) { *e = reinterpret_cast<cudaEvent_t>(new double(0)); OK; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { delete reinterpret_cast<double*>(e); OK; }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    *reinterpret_cast<double*>(e) = std::chrono::duration<double, std::milli>(now).count();
    OK;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
cudaError_t cudaEventQuery(cudaEvent_t) { OK; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { OK; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = *reinterpret_cast<double*>(to) - *reinterpret_cast<double*>(from);
    OK;
}

void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(new_handle()); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
    std::lock_guard<std::mutex> guard(lock);
    kernels()[function] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = *block = dim3(1, 1, 1);
    *shared = 0;
    *static_cast<cudaStream_t*>(stream) = nullptr;
    OK;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
    OK;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) { return launched(kernel); }
cudaError_t cudaLaunchKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t) { return launched(f); }
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t) { return launched(f); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* f, void**) { return launched(f); }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void*) {
    std::memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->binaryVersion = a->ptxVersion = 90;
    OK;
}
cudaError_t cudaFuncSetAttribute(const void*, enum cudaFuncAttribute, int) { OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) { *n = 2; OK; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) { *n = 2; OK; }

cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
        case cudaErrorNotSupported: return "cudaErrorNotSupported";
        default: return "cudaErrorUnknown";
    }
}
const char* cudaGetErrorString(cudaError_t error) {
    static thread_local std::string text;
    if (error == cudaErrorMemoryAllocation) return "out of memory";
    if (error == cudaErrorInvalidResourceHandle) return "invalid resource handle";
    if (error != cudaErrorNotSupported || !emulated::unanswered_name) return cudaGetErrorName(error);
    text = std::string("no emulation of ") + emulated::unanswered_name;
    return text.c_str();
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** p, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    *p = driver ? dlsym(driver, name) : nullptr;
    if (found) *found = *p ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    OK;
}
cudaError_t cudaProfilerStart() { OK; }
cudaError_t cudaProfilerStop() { OK; }
}
