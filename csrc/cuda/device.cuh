// What the CUDA kernels share: what is known of the device, launches, loads and warp reductions.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

namespace sadp::cuda {

constexpr int kThreads = 1024;  // one block fills a multiprocessor's shared memory
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("sadp_fast: ") + what + " failed: " + cudaGetErrorString(status));
    }
}

struct Device {
    int multiprocessors;
    int shared_bytes;  // the most that one block may have
    bool cooperative;  // can launch a grid whose blocks wait for each other
};

inline const Device& device_properties(int device) {
    constexpr int kMostDevices = 64;  // also the bits of allow_shared's mask
    static std::array<Device, kMostDevices> devices;
    static std::array<std::once_flag, kMostDevices> known;
    if (device < 0 || device >= kMostDevices) throw std::runtime_error("sadp_fast: no such CUDA device");
    std::call_once(known[device], [device] {
        const auto attribute = [device](cudaDeviceAttr name) {
            int value = 0;
            check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
            return value;
        };
        devices[device] = {attribute(cudaDevAttrMultiProcessorCount),
                           attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                           attribute(cudaDevAttrCooperativeLaunch) != 0};
    });
    return devices[device];
}

// Shared memory that a kernel declares itself, at most; what it asks for at the launch comes on top.
constexpr int kStaticSharedBytes = 2048;

template <auto kernel>
struct Launch;

// Launches on `device`, which is the current one. A cooperative grid starts when all of it fits on the device.
template <typename... Parameters, void (*kernel)(Parameters...)>
struct Launch<kernel> {
    static void on(int device, bool cooperative, int64_t blocks, int shared_bytes, void* stream,
                   Parameters... parameters) {
        static std::atomic<uint64_t> allowed{0};  // one bit for each device
        const uint64_t bit = uint64_t{1} << device;
        if ((allowed.load(std::memory_order_relaxed) & bit) == 0) {
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       device_properties(device).shared_bytes - kStaticSharedBytes),
                  "cudaFuncSetAttribute");
            allowed.fetch_or(bit, std::memory_order_relaxed);
        }
        void* pointers[] = {&parameters...};
        const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
        const auto handle = static_cast<cudaStream_t>(stream);
        const auto shared = static_cast<size_t>(shared_bytes);
        check(cooperative ? cudaLaunchCooperativeKernel(kernel, grid, block, pointers, shared, handle)
                          : cudaLaunchKernel(kernel, grid, block, pointers, shared, handle),
              "launching a kernel");
    }
};

template <typename Real>
struct Four {
    Real value[4];
};

// Four consecutive items, by 16-byte loads where the pointer is so aligned; 0 beyond the end. `last`: nobody will read
// them again soon, so they need not stay in the L2 cache.
template <bool aligned, typename Real>
__device__ __forceinline__ Four<Real> load(const Real* data, uint32_t n, uint32_t item, bool last = false) {
    Four<Real> four;
    if (aligned && item + 4 <= n) {
        if constexpr (sizeof(Real) == 4) {
            const float4* address = reinterpret_cast<const float4*>(data + item);
            const float4 loaded = last ? __ldcs(address) : __ldg(address);
            four = {loaded.x, loaded.y, loaded.z, loaded.w};
        } else {
            const double2* address = reinterpret_cast<const double2*>(data + item);
            const double2 low = last ? __ldcs(address) : __ldg(address);
            const double2 high = last ? __ldcs(address + 1) : __ldg(address + 1);
            four = {low.x, low.y, high.x, high.y};
        }
    } else {
        for (int j = 0; j < 4; ++j) four.value[j] = item + j < n ? __ldg(data + item + j) : Real(0);
    }
    return four;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    return value;
}

template <typename T>
__device__ __forceinline__ T warp_min(T value) {
    for (int offset = 16; offset > 0; offset /= 2) {
        const T other = __shfl_xor_sync(kAllLanes, value, offset);
        value = other < value ? other : value;
    }
    return value;
}

}  // namespace sadp::cuda
