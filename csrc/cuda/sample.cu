// The CUDA path: two kernels over the same partition of p.
//
//   select  reads p, decides every item (one bit each, kept in the workspace) and reduces to three numbers a block:
//           the items drawn, the sum of the thresholds, the first invalid index.
//   write   adds up the blocks' numbers (every block by itself: there are a few hundred), which gives it m and its
//           place in the output, compacts its part of p through shared memory, and fills the padding.
//
// Byte floor for N items of E bytes of which M are drawn: read p, write the result, E N + 12 M. Of N = 20,000,000 in
// float32 with half drawn that is 200 MB, 70 us at the 2870 GB/s that a copy reaches on an H100.
// Moved here: 2 E N + 12 M + N / 4, since no weight can be written before all of p has been summed. The second reading
// runs backwards and the stores are marked as streaming, so that what the first reading left in the L2 cache is used;
// where p fits there (N = 1,281,167: 5 MB), device memory sees the floor. Rejected: one selecting pass with decoupled
// look-back and one over the drawn (stores the drawn p_i to read them back: 8 bytes for a drawn item instead of 4 for
// any item); a cooperative launch (could hold part of p on the chip, but has to find all of the GPU free).
//
// Integer sums and a fixed order make every output independent of the launch shape.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "sadp/probability.h"
#include "sadp/sample.h"

namespace sadp::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSM = 2;
constexpr int kTileItems = 128;  // one warp, four consecutive items (one Philox block) for each lane
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("sadp_fast: ") + what + " failed: " + cudaGetErrorString(status));
    }
}

int64_t tiles_of(int64_t n) {
    return (n + kTileItems - 1) / kTileItems;
}

// The workspace: three rows of one 8-byte word per block, one count per warp, then one uint4 of bits per tile.
struct Workspace {
    int64_t* drawn;
    uint64_t* threshold_sum;
    int64_t* first_invalid;
    int32_t* drawn_by_warp;  // fits: the 2^31 items are shared by at least 16 warps
    uint4* bits;             // bit l of word j: item 4 l + j of the tile is drawn

    Workspace(void* base, int64_t blocks) {
        drawn = static_cast<int64_t*>(base);
        threshold_sum = reinterpret_cast<uint64_t*>(drawn + blocks);
        first_invalid = reinterpret_cast<int64_t*>(threshold_sum + blocks);
        drawn_by_warp = reinterpret_cast<int32_t*>(first_invalid + blocks);
        bits = reinterpret_cast<uint4*>(drawn + bits_offset(blocks));
    }
    static int64_t bits_offset(int64_t blocks) {  // in 8-byte words, even: a uint4 lies at a multiple of 16 bytes
        const int64_t words = 3 * blocks + blocks * kWarps / 2;
        return words + words % 2;
    }
};

// An even, contiguous share of the tiles for each warp: warp w begins at w * step, in units of 2^-32 tiles, rounded
// down. There are at most 2^24 tiles and an item is below 2^31, so 32 bits do for both.
struct Partition {
    uint64_t step;

    Partition(int64_t n, int64_t blocks) {
        const auto warps = static_cast<uint64_t>(blocks * kWarps);
        step = ((static_cast<uint64_t>(tiles_of(n)) << 32) + warps - 1) / warps;
    }
    __device__ int begin(unsigned warp) const { return static_cast<int>(warp * step >> 32); }
};

template <typename Real>
struct Four {
    Real value[4];
};

// Four consecutive items, by 16-byte loads where p is so aligned; beyond the end p = 0, which is never drawn.
template <bool aligned, typename Real>
__device__ __forceinline__ Four<Real> load(const Real* p, uint32_t n, uint32_t item) {
    Four<Real> four;
    if (aligned && item + 4 <= n) {
        if constexpr (sizeof(Real) == 4) {
            const float4 loaded = __ldg(reinterpret_cast<const float4*>(p + item));
            four = {loaded.x, loaded.y, loaded.z, loaded.w};
        } else {
            const double2 low = __ldg(reinterpret_cast<const double2*>(p + item));
            const double2 high = __ldg(reinterpret_cast<const double2*>(p + item) + 1);
            four = {low.x, low.y, high.x, high.y};
        }
    } else {
        for (int j = 0; j < 4; ++j) four.value[j] = item + j < n ? __ldg(p + item + j) : Real(0);
    }
    return four;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
    return value;
}

__device__ __forceinline__ int64_t warp_min(int64_t value) {
    for (int offset = 16; offset > 0; offset /= 2) {
        const int64_t other = __shfl_xor_sync(kAllLanes, value, offset);
        value = other < value ? other : value;
    }
    return value;
}

template <bool aligned, typename Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    select_kernel(const Real* __restrict__ p, uint32_t n, Partition partition, Stream stream, const int64_t* epoch,
                  Workspace workspace) {
    __shared__ int32_t shared_drawn[kWarps];
    __shared__ uint64_t shared_sum[kWarps];
    __shared__ int64_t shared_invalid[kWarps];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const unsigned grid_warp = blockIdx.x * kWarps + warp;
    const int begin = partition.begin(grid_warp), end = partition.begin(grid_warp + 1);
    if (epoch != nullptr) stream.epoch = static_cast<uint64_t>(__ldg(epoch));

    int32_t drawn = 0;
    uint64_t sum = 0;
    int64_t invalid = kNoInvalid;
    Four<Real> next = begin < end ? load<aligned>(p, n, begin * kTileItems + 4 * lane) : Four<Real>{};
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
        const uint32_t item = tile * kTileItems + 4 * lane;
        const Four<Real> current = next;
        if (tile + 1 < end) next = load<aligned>(p, n, item + kTileItems);  // in flight during the arithmetic
        uint32_t random[4];
        philox4x32(stream, item / 4, random);
        uint32_t bits[4];
        bool valid = true;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const uint64_t limit = threshold(current.value[j]);
            const bool keep = random[j] < limit;
            valid &= is_probability(current.value[j]);
            sum += limit;
            drawn += keep;
            bits[j] = __ballot_sync(kAllLanes, keep);
        }
        if (!valid && invalid == kNoInvalid) {
            for (int j = 3; j >= 0; --j) {
                if (!is_probability(current.value[j])) invalid = item + j;
            }
        }
        if (lane == 0) workspace.bits[tile] = make_uint4(bits[0], bits[1], bits[2], bits[3]);
    }

    drawn = warp_sum(drawn);
    sum = warp_sum(sum);
    invalid = warp_min(invalid);
    if (lane == 0) {
        workspace.drawn_by_warp[grid_warp] = drawn;
        shared_drawn[warp] = drawn;
        shared_sum[warp] = sum;
        shared_invalid[warp] = invalid;
    }
    __syncthreads();
    if (warp == 0) {
        const int64_t block_drawn = warp_sum(int64_t{lane < kWarps ? shared_drawn[lane] : 0});
        const uint64_t block_sum = warp_sum(lane < kWarps ? shared_sum[lane] : uint64_t{0});
        const int64_t block_invalid = warp_min(lane < kWarps ? shared_invalid[lane] : kNoInvalid);
        if (lane == 0) {
            workspace.drawn[blockIdx.x] = block_drawn;
            workspace.threshold_sum[blockIdx.x] = block_sum;
            workspace.first_invalid[blockIdx.x] = block_invalid;
        }
    }
}

// The totals over all blocks, and how many items the blocks before this one draw.
struct Totals {
    int64_t before, drawn;
    uint64_t threshold_sum;
    bool invalid;
};

__device__ Totals add_up_blocks(const Workspace& workspace) {
    __shared__ int64_t shared_before[kWarps], shared_drawn[kWarps];
    __shared__ uint64_t shared_sum[kWarps];
    int64_t before = 0, drawn = 0;
    uint64_t sum = 0;
    bool invalid = false;
    for (int block = threadIdx.x; block < gridDim.x; block += kThreads) {
        const int64_t block_drawn = workspace.drawn[block];
        drawn += block_drawn;
        before += block < blockIdx.x ? block_drawn : 0;
        sum += workspace.threshold_sum[block];
        invalid = invalid || workspace.first_invalid[block] != kNoInvalid;
    }
    before = warp_sum(before);
    drawn = warp_sum(drawn);
    sum = warp_sum(sum);
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
        shared_before[warp] = before;
        shared_drawn[warp] = drawn;
        shared_sum[warp] = sum;
    }
    Totals totals{0, 0, 0, __syncthreads_or(invalid) != 0};
    for (int other = 0; other < kWarps; ++other) {
        totals.before += shared_before[other];
        totals.drawn += shared_drawn[other];
        totals.threshold_sum += shared_sum[other];
    }
    return totals;
}

// The drawn items of one tile, side by side.
template <typename Real>
struct Staged {
    Real p[kTileItems];
    uint8_t offset[kTileItems];
};

template <bool aligned, typename Real>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    write_kernel(const Real* __restrict__ p, uint32_t n, Partition partition, Workspace workspace, Output output,
                 int64_t* count) {
    __shared__ Staged<Real> staged_by_warp[kWarps];
    const unsigned lane = threadIdx.x % 32;
    const unsigned warp = threadIdx.x / 32;
    const unsigned grid_warp = blockIdx.x * kWarps + warp;
    const int begin = partition.begin(grid_warp), end = partition.begin(grid_warp + 1);
    // The first loads do not depend on the totals: they are in flight while those are added up.
    Four<Real> next{};
    uint4 next_bits{};
    if (begin < end) {
        next = load<aligned>(p, n, (end - 1) * kTileItems + 4 * lane);
        next_bits = workspace.bits[end - 1];
    }
    const int32_t drawn_so_far = lane <= warp ? workspace.drawn_by_warp[blockIdx.x * kWarps + lane] : 0;

    const Totals totals = add_up_blocks(workspace);
    const int64_t written = totals.invalid ? 0 : min(totals.drawn, output.capacity);
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (thread == 0) *count = totals.invalid ? -1 : totals.drawn;
    for (int64_t rank = written + thread; rank < output.capacity; rank += threads) {
        output.indices[rank] = -1;
        output.weights[rank] = 0.0f;
    }
    if (totals.invalid) return;

    // Ranks are at most n <= 2^31, so 32 bits do.
    uint32_t end_rank = static_cast<uint32_t>(totals.before) + warp_sum(static_cast<uint32_t>(drawn_so_far));
    const auto written_ranks = static_cast<uint32_t>(written);
    const double scale = weight_scale(totals.threshold_sum, n);
    const uint32_t this_lane = 1u << lane;
    Staged<Real>& staged = staged_by_warp[warp];
#pragma unroll 1
    for (int tile = end - 1; tile >= begin; --tile) {  // backwards: the L2 cache has the end of p
        const uint32_t tile_item = tile * kTileItems;
        const Four<Real> current = next;
        const uint32_t bits[4] = {next_bits.x, next_bits.y, next_bits.z, next_bits.w};
        if (tile > begin) {
            next = load<aligned>(p, n, tile_item - kTileItems + 4 * lane);
            next_bits = workspace.bits[tile - 1];
        }
        unsigned slot = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) slot += __popc(bits[j] & (this_lane - 1));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (bits[j] & this_lane) {
                staged.p[slot] = current.value[j];
                staged.offset[slot] = static_cast<uint8_t>(4 * lane + j);
                ++slot;
            }
        }
        const unsigned tile_drawn = __shfl_sync(kAllLanes, slot, 31);
        __syncwarp();
        end_rank -= tile_drawn;
        const unsigned tile_written = end_rank < written_ranks ? min(tile_drawn, written_ranks - end_rank) : 0;
#pragma unroll 1
        for (unsigned i = lane; i < tile_written; i += 32) {
            __stcs(output.indices + (end_rank + i), static_cast<int64_t>(tile_item + staged.offset[i]));
            __stcs(output.weights + (end_rank + i), weight(scale, threshold(staged.p[i])));
        }
        __syncwarp();
    }
}

// Runs `call(p of its type, whether 16-byte loads are allowed)`.
template <typename Call>
void dispatch(Probabilities p, const Call& call) {
    const auto run = [&](auto* data) {
        if (reinterpret_cast<uintptr_t>(data) % 16 == 0) {
            call(data, std::true_type{});
        } else {
            call(data, std::false_type{});
        }
    };
    if (p.is_double) {
        run(static_cast<const double*>(p.data));
    } else {
        run(static_cast<const float*>(p.data));
    }
}

}  // namespace

Plan plan(int64_t n) {
    int device = 0;
    int multiprocessors = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    const int64_t most = int64_t{multiprocessors} * kBlocksPerSM;
    const int64_t tiles = tiles_of(n);
    const int64_t blocks = std::clamp<int64_t>((tiles + kWarps - 1) / kWarps, 1, most);
    return {Workspace::bits_offset(blocks) + 2 * tiles, blocks};
}

void select(Probabilities p, Stream stream, const int64_t* epoch, void* workspace, int64_t blocks,
            void* stream_handle) {
    dispatch(p, [&](auto* data, auto aligned) {
        select_kernel<decltype(aligned)::value>
            <<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream_handle)>>>(
                data, static_cast<uint32_t>(p.n), Partition(p.n, blocks), stream, epoch, Workspace(workspace, blocks));
    });
    check(cudaGetLastError(), "launching the select kernel");
}

void write(Probabilities p, const void* workspace, int64_t blocks, Output output, int64_t* count, void* stream_handle) {
    dispatch(p, [&](auto* data, auto aligned) {
        write_kernel<decltype(aligned)::value>
            <<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream_handle)>>>(
                data, static_cast<uint32_t>(p.n), Partition(p.n, blocks),
                Workspace(const_cast<void*>(workspace), blocks), output, count);
    });
    check(cudaGetLastError(), "launching the write kernel");
}

}  // namespace sadp::cuda
