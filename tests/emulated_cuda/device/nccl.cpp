// libnccl: ranks are processes of one machine, and a message is a file in the folder that they share.
//
// Every operation is a part that sends and a part that receives. A send never waits, so a group of operations sends
// all of its messages, and then receives. A rank that waits for a message looks whether its sender still lives.
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <time.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <vector>
#include "emulated.h"
#include "memory.h"

UNANSWERED("libnccl", ncclInvalidUsage)

struct ncclComm {
    std::string name;
    int rank, ranks, device;
    std::vector<int> processes;
    std::vector<uint64_t> sent, received;
    uint64_t splits = 0;
    std::atomic<bool> aborted{false};
    std::atomic<int> error{ncclSuccess};
};

namespace {
thread_local std::string last_error;
using Part = std::function<ncclResult_t()>;
thread_local int depth = 0;
thread_local std::vector<Part> to_send, to_receive;

ncclResult_t failed(ncclResult_t code, const std::string& why) {
    last_error = why;
    std::fprintf(stderr, "emulated NCCL: %s\n", why.c_str());
    return code;
}
std::string state() {
    const char* folder = std::getenv("EMULATED_CUDA_STATE");
    return folder ? folder : "/dev/shm";
}
std::string message(const ncclComm* comm, int from, int to, uint64_t number) {
    return state() + "/" + comm->name + "." + std::to_string(from) + "." + std::to_string(to) + "." +
           std::to_string(number);
}
ncclResult_t write_file(const std::string& path, const void* data, size_t bytes) {
    std::string unfinished = path + ".unfinished";
    FILE* file = std::fopen(unfinished.c_str(), "wb");
    bool whole = file && std::fwrite(data, 1, bytes, file) == bytes;
    if (file) whole = std::fclose(file) == 0 && whole;
    if (!whole || std::rename(unfinished.c_str(), path.c_str())) return failed(ncclSystemError, "cannot write " + path);
    return ncclSuccess;
}
// Wait for a file of another process, take its content, remove it.
ncclResult_t read_file(ncclComm* comm, const std::string& path, void* data, size_t bytes, int from) {
    for (int looks = 0;; looks++) {
        if (FILE* file = std::fopen(path.c_str(), "rb")) {
            size_t got = std::fread(data, 1, bytes, file);
            bool more = std::fgetc(file) != EOF;
            std::fclose(file);
            unlink(path.c_str());
            if (got == bytes && !more) return ncclSuccess;
            return failed(ncclInvalidUsage, "rank " + std::to_string(from) + " sent " + std::to_string(got) +
                          (more ? " bytes and more" : " bytes") + ", rank " + std::to_string(comm->rank) + " waited for " +
                          std::to_string(bytes));
        }
        if (comm->aborted) return failed(ncclInternalError, "the communicator was aborted");
        if (looks % 256 == 255 && !emulated::alive(comm->processes[from])) {
            if (access(path.c_str(), F_OK) == 0) continue;  // it sent, and then ended
            comm->error = ncclRemoteError;
            return failed(ncclRemoteError, "rank " + std::to_string(from) + " (process " +
                          std::to_string(comm->processes[from]) + ") ended while rank " + std::to_string(comm->rank) +
                          " waited for it");
        }
        timespec pause{0, std::min(looks, 20) * 20000};
        nanosleep(&pause, nullptr);
    }
}
ncclResult_t send_to(ncclComm* comm, int to, const void* data, size_t bytes) {
    return write_file(message(comm, comm->rank, to, comm->sent[to]++), data, bytes);
}
ncclResult_t receive_from(ncclComm* comm, int from, void* data, size_t bytes) {
    return read_file(comm, message(comm, from, comm->rank, comm->received[from]++), data, bytes, from);
}

ncclResult_t run(Part send, Part receive) {
    if (depth) {
        to_send.push_back(send);
        to_receive.push_back(receive);
        return ncclSuccess;
    }
    ncclResult_t sent = send();
    return sent == ncclSuccess ? receive() : sent;
}

size_t size_of(ncclDataType_t type) {
    switch (type) {
        case ncclInt8: case ncclUint8: case ncclFloat8e4m3: case ncclFloat8e5m2: return 1;
        case ncclFloat16: case ncclBfloat16: return 2;
        case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
        default: return 8;
    }
}
float from_bfloat16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, to even in the middle
}

template <typename T>
void combine(T& sum, T value, ncclRedOp_t op) {
    switch (op) {
        case ncclProd: sum *= value; break;
        case ncclMax: sum = std::max(sum, value); break;
        case ncclMin: sum = std::min(sum, value); break;
        default: sum += value;
    }
}
// In the order of the ranks; bf16 is added up in fp32 and rounded once, where NCCL rounds at every hop.
template <typename T, typename Wide, typename In, typename Out>
void reduce_as(const std::vector<const char*>& parts, void* out, size_t count, ncclRedOp_t op, In in, Out round) {
    for (size_t i = 0; i < count; i++) {
        Wide sum = in(reinterpret_cast<const T*>(parts[0])[i]);
        for (size_t r = 1; r < parts.size(); r++) combine<Wide>(sum, in(reinterpret_cast<const T*>(parts[r])[i]), op);
        if (op == ncclAvg) sum = sum / Wide(parts.size());
        static_cast<T*>(out)[i] = round(sum);
    }
}
template <typename T>
void reduce_plain(const std::vector<const char*>& parts, void* out, size_t count, ncclRedOp_t op) {
    auto same = [](T value) { return value; };
    reduce_as<T, T>(parts, out, count, op, same, same);
}
ncclResult_t reduce(const std::vector<const char*>& parts, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op) {
    if (op > ncclAvg) return failed(ncclInvalidUsage, "an operation of the user's (ncclRedOpCreate...) has no emulation");
    switch (type) {
        case ncclInt8: reduce_plain<int8_t>(parts, out, count, op); break;
        case ncclUint8: reduce_plain<uint8_t>(parts, out, count, op); break;
        case ncclInt32: reduce_plain<int32_t>(parts, out, count, op); break;
        case ncclUint32: reduce_plain<uint32_t>(parts, out, count, op); break;
        case ncclInt64: reduce_plain<int64_t>(parts, out, count, op); break;
        case ncclUint64: reduce_plain<uint64_t>(parts, out, count, op); break;
        case ncclFloat32: reduce_plain<float>(parts, out, count, op); break;
        case ncclFloat64: reduce_plain<double>(parts, out, count, op); break;
        case ncclFloat16: reduce_plain<_Float16>(parts, out, count, op); break;
        case ncclBfloat16: reduce_as<uint16_t, float>(parts, out, count, op, from_bfloat16, to_bfloat16); break;
        default: return failed(ncclInvalidUsage, "no emulation of a reduction of this data type");
    }
    return ncclSuccess;
}

ncclResult_t send_to_all(ncclComm* comm, const void* data, size_t bytes) {
    for (int to = 0; to < comm->ranks; to++)
        if (to != comm->rank)
            if (ncclResult_t code = send_to(comm, to, data, bytes)) return code;
    return ncclSuccess;
}
// `own` stands at this rank's place; the others' parts are received one behind the other.
ncclResult_t reduce_from_all(ncclComm* comm, const void* own, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op) {
    size_t bytes = count * size_of(type);
    std::vector<char> room(bytes * comm->ranks);
    std::vector<const char*> parts(comm->ranks);
    for (int from = 0; from < comm->ranks; from++) {
        parts[from] = room.data() + from * bytes;
        if (from == comm->rank) {
            std::memcpy(room.data() + from * bytes, own, bytes);
        } else if (ncclResult_t code = receive_from(comm, from, room.data() + from * bytes, bytes)) {
            return code;
        }
    }
    return reduce(parts, out, count, type, op);
}

ncclResult_t join(ncclComm_t* result, const std::string& name, int rank, int ranks) {
    auto* comm = new ncclComm;
    comm->name = name;
    comm->rank = rank;
    comm->ranks = ranks;
    cudaGetDevice(&comm->device);
    comm->sent.resize(ranks);
    comm->received.resize(ranks);
    comm->processes.assign(ranks, getpid());
    int own = getpid();
    for (int to = 0; to < ranks; to++)
        if (to != rank)
            if (ncclResult_t code = send_to(comm, to, &own, sizeof own)) return code;
    for (int from = 0; from < ranks; from++)  // who does not come is the caller's to notice, by a deadline of its own
        if (from != rank)
            if (ncclResult_t code = receive_from(comm, from, &comm->processes[from], sizeof own)) return code;
    *result = comm;
    return ncclSuccess;
}
}  // namespace

extern "C" {
ncclResult_t ncclGetVersion(int* version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    std::memset(id, 0, sizeof *id);
    std::random_device random;
    std::snprintf(id->internal, sizeof id->internal, "nccl-%08x%08x", random(), random());
    return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
    return join(comm, id.internal, rank, ranks);
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank, ncclConfig_t*) {
    return join(comm, id.internal, rank, ranks);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t* comm, int ranks, int rank, int, ncclUniqueId* ids, ncclConfig_t*) {
    return join(comm, ids[0].internal, rank, ranks);
}
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* result, ncclConfig_t*) {
    struct Wish { int color, key; };
    std::vector<Wish> wishes(comm->ranks);
    wishes[comm->rank] = {color, key};
    ncclResult_t code = send_to_all(comm, &wishes[comm->rank], sizeof(Wish));
    for (int from = 0; from < comm->ranks && !code; from++)
        if (from != comm->rank) code = receive_from(comm, from, &wishes[from], sizeof(Wish));
    if (code) return code;
    uint64_t number = comm->splits++;
    *result = nullptr;
    if (color == NCCL_SPLIT_NOCOLOR) return ncclSuccess;
    int rank = 0, ranks = 0;
    for (int other = 0; other < comm->ranks; other++) {
        if (wishes[other].color != color) continue;
        ranks++;
        rank += std::make_pair(wishes[other].key, other) < std::make_pair(key, comm->rank);
    }
    return join(result, comm->name + "-" + std::to_string(number) + "-" + std::to_string(color), rank, ranks);
}
ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t) { return ncclSuccess; }  // kept: a watchdog may still ask it for errors
ncclResult_t ncclCommAbort(ncclComm_t comm) { comm->aborted = true; return ncclSuccess; }
ncclResult_t ncclCommRevoke(ncclComm_t comm, int) { comm->aborted = true; return ncclSuccess; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    *error = static_cast<ncclResult_t>(comm->error.load());
    return ncclSuccess;
}
ncclResult_t ncclCommCount(ncclComm_t comm, int* count) { *count = comm->ranks; return ncclSuccess; }
ncclResult_t ncclCommCuDevice(ncclComm_t comm, int* device) { *device = comm->device; return ncclSuccess; }
ncclResult_t ncclCommUserRank(ncclComm_t comm, int* rank) { *rank = comm->rank; return ncclSuccess; }
ncclResult_t ncclCommRegister(ncclComm_t, void*, size_t, void** handle) { *handle = nullptr; return ncclSuccess; }
ncclResult_t ncclCommDeregister(ncclComm_t, void*) { return ncclSuccess; }
ncclResult_t ncclMemAlloc(void** start, size_t bytes) { return cudaMalloc(start, bytes) ? ncclUnhandledCudaError : ncclSuccess; }
ncclResult_t ncclMemFree(void* start) { return cudaFree(start) ? ncclUnhandledCudaError : ncclSuccess; }
const char* ncclGetErrorString(ncclResult_t code) {
    switch (code) {
        case ncclSuccess: return "no error";
        case ncclSystemError: return "unhandled system error";
        case ncclInternalError: return "internal error";
        case ncclInvalidUsage: return "invalid usage";
        case ncclRemoteError: return "remote process exited or there was a network error";
        default: return "error";
    }
}
const char* ncclGetLastError(ncclComm_t) {
    return last_error.empty() && emulated::unanswered_name ? emulated::unanswered_name : last_error.c_str();
}

ncclResult_t ncclGroupStart() { depth++; return ncclSuccess; }
ncclResult_t ncclGroupEnd() {
    if (--depth) return ncclSuccess;
    std::vector<Part> parts;
    parts.swap(to_send);
    parts.insert(parts.end(), to_receive.begin(), to_receive.end());
    to_receive.clear();
    for (Part& part : parts)
        if (ncclResult_t code = part()) return code;
    return ncclSuccess;
}

ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t) {
    return run([=] { return send_to(comm, peer, data, count * size_of(type)); }, [] { return ncclSuccess; });
}
ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t) {
    return run([] { return ncclSuccess; }, [=] { return receive_from(comm, peer, data, count * size_of(type)); });
}
ncclResult_t ncclAllReduce(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                           cudaStream_t) {
    return run([=] { return send_to_all(comm, in, count * size_of(type)); },
               [=] { return reduce_from_all(comm, in, out, count, type, op); });
}
ncclResult_t ncclReduce(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op, int root,
                        ncclComm_t comm, cudaStream_t) {
    bool is_root = comm->rank == root;
    return run([=] { return is_root ? ncclSuccess : send_to(comm, root, in, count * size_of(type)); },
               [=] { return is_root ? reduce_from_all(comm, in, out, count, type, op) : ncclSuccess; });
}
ncclResult_t ncclBroadcast(const void* in, void* out, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t) {
    size_t bytes = count * size_of(type);
    bool is_root = comm->rank == root;
    return run([=] { return is_root ? send_to_all(comm, in, bytes) : ncclSuccess; },
               [=] {
                   if (!is_root) return receive_from(comm, root, out, bytes);
                   if (in != out) std::memmove(out, in, bytes);
                   return ncclSuccess;
               });
}
ncclResult_t ncclBcast(void* data, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
    return ncclBroadcast(data, data, count, type, root, comm, stream);
}
// From each rank the same number of bytes, to the place of that rank.
static ncclResult_t gather_into(ncclComm* comm, const char* own, char* out, size_t bytes) {
    for (int from = 0; from < comm->ranks; from++) {
        if (from == comm->rank) {
            std::memmove(out + from * bytes, own, bytes);
        } else if (ncclResult_t code = receive_from(comm, from, out + from * bytes, bytes)) {
            return code;
        }
    }
    return ncclSuccess;
}
static ncclResult_t scatter_from(ncclComm* comm, const char* in, size_t bytes) {
    for (int to = 0; to < comm->ranks; to++)
        if (to != comm->rank)
            if (ncclResult_t code = send_to(comm, to, in + to * bytes, bytes)) return code;
    return ncclSuccess;
}
ncclResult_t ncclAllGather(const void* in, void* out, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t) {
    size_t bytes = count * size_of(type);
    return run([=] { return send_to_all(comm, in, bytes); },
               [=] { return gather_into(comm, static_cast<const char*>(in), static_cast<char*>(out), bytes); });
}
ncclResult_t ncclReduceScatter(const void* in, void* out, size_t count, ncclDataType_t type, ncclRedOp_t op,
                               ncclComm_t comm, cudaStream_t) {
    size_t bytes = count * size_of(type);
    const char* data = static_cast<const char*>(in);
    return run([=] { return scatter_from(comm, data, bytes); },
               [=] { return reduce_from_all(comm, data + comm->rank * bytes, out, count, type, op); });
}
ncclResult_t ncclAlltoAll(const void* in, void* out, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t) {
    size_t bytes = count * size_of(type);
    const char* data = static_cast<const char*>(in);
    return run([=] { return scatter_from(comm, data, bytes); },
               [=] { return gather_into(comm, data + comm->rank * bytes, static_cast<char*>(out), bytes); });
}
ncclResult_t ncclGather(const void* in, void* out, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                        cudaStream_t) {
    size_t bytes = count * size_of(type);
    bool is_root = comm->rank == root;
    return run([=] { return is_root ? ncclSuccess : send_to(comm, root, in, bytes); },
               [=] {
                   return is_root ? gather_into(comm, static_cast<const char*>(in), static_cast<char*>(out), bytes)
                                  : ncclSuccess;
               });
}
ncclResult_t ncclScatter(const void* in, void* out, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                         cudaStream_t) {
    size_t bytes = count * size_of(type);
    bool is_root = comm->rank == root;
    const char* data = static_cast<const char*>(in);
    return run([=] { return is_root ? scatter_from(comm, data, bytes) : ncclSuccess; },
               [=] {
                   if (!is_root) return receive_from(comm, root, out, bytes);
                   std::memmove(out, data + root * bytes, bytes);
                   return ncclSuccess;
               });
}
}
