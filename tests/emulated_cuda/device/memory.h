// The device's memory is one sparse file per process, in the host's memory. An allocation is a shared mapping of a
// part of it, so that another process can map the same part: that is what an IPC handle describes.
#pragma once
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

namespace emulated {

constexpr size_t GRANULE = 4096;
constexpr int MOST_DEVICES = 8, MOST_PROCESSES = 64;
// offsets are given out once, so that a freed block's are nobody else's; the file is sparse
constexpr size_t FILE_BYTES = size_t(1) << 46;

inline size_t environment(const char* name, size_t otherwise) {
    const char* text = std::getenv(name);
    return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

inline int device_count() { return std::min<size_t>(environment("EMULATED_CUDA_DEVICES", 1), MOST_DEVICES); }
// 85,017,624,576 bytes are what cudaMemGetInfo calls the total of an H100 SXM with 80 GB
inline size_t device_bytes() { return environment("EMULATED_CUDA_BYTES", 85017624576ull); }

// What each process holds of each device, where all processes see it: cudaMemGetInfo tells what is free of the device.
struct Account {
    std::atomic<int> process;
    std::atomic<size_t> held[MOST_DEVICES];
    std::atomic<size_t> peak[MOST_DEVICES];
};

inline Account* accounts() {
    static Account* all = [] {
        const char* folder = std::getenv("EMULATED_CUDA_STATE");
        size_t bytes = sizeof(Account) * MOST_PROCESSES;
        int file = folder ? open((std::string(folder) + "/accounts").c_str(), O_RDWR | O_CREAT, 0600)
                          : memfd_create("emulated accounts", MFD_CLOEXEC);
        if (file < 0 || ftruncate(file, bytes)) std::perror("emulated CUDA: accounts"), std::abort();
        void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
        return static_cast<Account*>(mapped);
    }();
    return all;
}

// A killed process keeps its line, and holds nothing: the driver would have freed its memory.
inline bool alive(int process) {
    if (kill(process, 0) && errno == ESRCH) return false;
    char path[64], state = 0;
    std::snprintf(path, sizeof path, "/proc/%d/stat", process);
    if (FILE* file = std::fopen(path, "r")) {
        if (std::fscanf(file, "%*d (%*[^)]) %c", &state) != 1) state = 0;
        std::fclose(file);
    }
    return state && state != 'Z';
}

inline Account& account() {
    static thread_local int owner = 0;
    static thread_local Account* mine = nullptr;
    if (owner == getpid()) return *mine;
    owner = getpid();
    for (int again = 0; again < 2; again++)
        for (int i = 0; i < MOST_PROCESSES; i++) {
            Account& line = accounts()[i];
            int expected = line.process;
            if (expected == owner) return *(mine = &line);
            bool free = expected == 0 || (again && !alive(expected));
            if (free && line.process.compare_exchange_strong(expected, owner)) {
                for (int d = 0; d < MOST_DEVICES; d++) line.held[d] = 0, line.peak[d] = 0;
                return *(mine = &line);
            }
        }
    std::fprintf(stderr, "emulated CUDA: more than %d processes\n", MOST_PROCESSES);
    std::abort();
}

inline size_t held_by_all(int device) {
    size_t sum = 0;
    for (int i = 0; i < MOST_PROCESSES; i++)
        if (accounts()[i].process && alive(accounts()[i].process)) sum += accounts()[i].held[device];
    return sum;
}

struct Block {
    size_t bytes;
    int device;
    size_t offset;
    bool of_another_process;
};

// Where another process finds a block; fits into cudaIpcMemHandle_t's 64 bytes.
struct Handle {
    uint32_t magic;
    int process, file, device;
    size_t offset, bytes;
};
constexpr uint32_t MAGIC = 0x454d5531;

class Memory {
  public:
    static Memory& here() {
        static Memory* memory = new Memory;  // never destroyed: libraries free memory while the process ends
        return *memory;
    }

    // Null where the device has not as much left.
    void* take(size_t bytes, int device) {
        std::lock_guard<std::mutex> guard(lock_);
        if (owner_ != getpid()) begin_anew();
        size_t whole = rounded(bytes);
        if (held_by_all(device) + whole > device_bytes()) return nullptr;
        void* start = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_SHARED, file_, next_);
        if (start == MAP_FAILED) return nullptr;
        blocks_[static_cast<char*>(start)] = {whole, device, next_, false};
        next_ += whole;
        Account& own = account();
        own.held[device] += whole;
        own.peak[device] = std::max<size_t>(own.peak[device], own.held[device]);
        return start;
    }

    bool give(void* start) {
        std::lock_guard<std::mutex> guard(lock_);
        auto found = blocks_.find(static_cast<char*>(start));
        if (found == blocks_.end()) return false;
        const Block block = found->second;
        munmap(start, block.bytes);
        if (!block.of_another_process) {
            fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, block.offset, block.bytes);
            account().held[block.device] -= block.bytes;
        }
        blocks_.erase(found);
        return true;
    }

    // The block that an address lies in, and its start.
    bool find(const void* address, char** start, Block* block) {
        std::lock_guard<std::mutex> guard(lock_);
        auto after = blocks_.upper_bound(static_cast<char*>(const_cast<void*>(address)));
        if (after == blocks_.begin()) return false;
        --after;
        if (address >= after->first + after->second.bytes) return false;
        *start = after->first;
        *block = after->second;
        return true;
    }

    bool describe(const void* address, Handle* handle) {
        char* start;
        Block block;
        if (!find(address, &start, &block) || block.of_another_process) return false;
        *handle = {MAGIC, getpid(), file_, block.device, block.offset, block.bytes};
        return true;
    }

    // Null where the process that made the handle is gone.
    void* open_handle(const Handle& handle) {
        if (handle.magic != MAGIC || handle.process == getpid() || !alive(handle.process)) return nullptr;
        char path[64];
        std::snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.process, handle.file);
        int file = open(path, O_RDWR);
        if (file < 0) return nullptr;
        void* start = mmap(nullptr, handle.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, handle.offset);
        close(file);
        if (start == MAP_FAILED) return nullptr;
        std::lock_guard<std::mutex> guard(lock_);
        blocks_[static_cast<char*>(start)] = {handle.bytes, handle.device, handle.offset, true};
        return start;
    }

  private:
    Memory() { begin_anew(); }

    void begin_anew() {
        owner_ = getpid();
        file_ = memfd_create("emulated device", MFD_CLOEXEC);
        if (file_ < 0 || ftruncate(file_, FILE_BYTES)) std::perror("emulated CUDA: memory"), std::abort();
        next_ = 0;
        blocks_.clear();
    }

    static size_t rounded(size_t bytes) { return (bytes + GRANULE - 1) / GRANULE * GRANULE; }

    std::mutex lock_;
    std::map<char*, Block> blocks_;
    int owner_ = 0, file_ = -1;
    size_t next_ = 0;
};

}  // namespace emulated
