// The CUDA path of a draw: one grid, two phases.
//
//   select  Each warp reads its run of p and decides every item. It keeps what it draws in shared memory until its part
//           of that is full, and goes on counting. Each block reduces to three numbers: the items drawn, the sum of
//           the thresholds, the first invalid index.
//   write   All blocks wait for each other. Each adds up the numbers of all (there is one block per multiprocessor),
//           which gives it m and its place in the output, writes what it kept, and then reads again and decides again
//           (ten rounds of Philox cost less than a bit kept) the rest of its run, from the end: that part of p was
//           read last and mostly lies in the L2 cache.
//
// Byte floor for N items of E bytes of which M are drawn: read p, write the result, E N + 12 M. Of N = 20,000,000 in
// float32 with half drawn that is 200 MB, 70 us at the 2850 GB/s that a copy reaches on an H100. No weight can be
// written before all of p has been summed, so p has to be kept: an H100 keeps 5,000,000 drawn items in shared memory (6
// bytes each: threshold and place) and the 40 MB that hold the others in a cache of 50 MB.
//
// Where the device cannot launch a grid that waits for itself, or the host sizes the output in between, the phases are
// two launches and nothing is kept. Integer sums and a fixed order make every output independent of the launch shape.
#include <algorithm>
#include <numeric>

#include "device.cuh"
#include "sadp/probability.h"
#include "sadp/sample.h"

namespace sadp::cuda {
namespace {

constexpr int kTileItems = 128;  // one warp, four consecutive items (one Philox block) for each lane
constexpr int kRunTiles = 512;   // so that an item's place in a run of tiles takes 16 bits
constexpr int kStagedBytes = sizeof(uint32_t) + sizeof(uint16_t);

int64_t tiles_of(int64_t n) {
    return (n + kTileItems - 1) / kTileItems;
}

// Three rows of one 8-byte word per block, then one count per warp.
struct Workspace {
    static constexpr int64_t kWordsPerBlock = 3 + kWarps / 2;
    int64_t* drawn;
    uint64_t* threshold_sum;
    int64_t* first_invalid;
    uint32_t* drawn_by_warp;

    Workspace(void* base, int64_t blocks) {
        drawn = static_cast<int64_t*>(base);
        threshold_sum = reinterpret_cast<uint64_t*>(drawn + blocks);
        first_invalid = reinterpret_cast<int64_t*>(threshold_sum + blocks);
        drawn_by_warp = reinterpret_cast<uint32_t*>(first_invalid + blocks);
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

// The drawn items of a run of tiles of one warp, side by side.
struct Staged {
    uint32_t* threshold_less_1;  // a drawn item's threshold is in [1, 2^32]
    uint16_t* place;             // of the item in the run
    unsigned room;
};

struct Decision {
    uint32_t bits[4];  // bit l of word j: item 4 l + j of the tile is drawn
    uint64_t threshold[4];
};

template <typename Real>
__device__ __forceinline__ Decision decide(const Four<Real>& p, Stream stream, uint32_t item) {
    uint32_t random[4];
    philox4x32(stream, item / 4, random);
    Decision decision;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        decision.threshold[j] = threshold(p.value[j]);
        decision.bits[j] = __ballot_sync(kAllLanes, random[j] < decision.threshold[j]);
    }
    return decision;
}

// Puts a tile's drawn items behind the `count` that are there; returns how many there are now.
__device__ __forceinline__ unsigned append(const Staged& staged, unsigned count, const Decision& decision,
                                           unsigned tile_of_run) {
    const unsigned lane = threadIdx.x % 32;
    const uint32_t this_lane = 1u << lane;
    unsigned slot = count;
#pragma unroll
    for (int j = 0; j < 4; ++j) slot += __popc(decision.bits[j] & (this_lane - 1));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (decision.bits[j] & this_lane) {
            staged.threshold_less_1[slot] = static_cast<uint32_t>(decision.threshold[j] - 1);
            staged.place[slot] = static_cast<uint16_t>(tile_of_run * kTileItems + 4 * lane + j);
            ++slot;
        }
    }
    return __shfl_sync(kAllLanes, slot, 31);
}

// Writes the staged items of the run that begins at `item`, the first of them with rank `rank`.
__device__ __forceinline__ void write_staged(const Staged& staged, unsigned count, uint32_t item, uint32_t rank,
                                             uint32_t end_rank, double scale, const Output& output) {
    __syncwarp();
    const uint32_t end = min(rank + count, end_rank);
    // Whole groups of 32 ranks, so that a warp's stores fill whole lines.
#pragma unroll 2
    for (uint32_t at = rank / 32 * 32 + threadIdx.x % 32; at < end; at += 32) {
        if (at >= rank) {
            const uint64_t limit = uint64_t{staged.threshold_less_1[at - rank]} + 1;
            __stcs(output.indices + at, static_cast<int64_t>(item + staged.place[at - rank]));
            __stcs(output.weights + at, weight(scale, limit));
        }
    }
    __syncwarp();
}

// Calls visit(tile, its four items of this lane) for tiles [first, end), two tiles ahead with the loads.
template <bool aligned, typename Real, typename Last, typename Visit>
__device__ __forceinline__ void for_each_tile(const Real* p, uint32_t n, int first, int end, Last last, Visit visit) {
    const auto fetch = [&](int tile) {
        return tile < end ? load<aligned>(p, n, tile * kTileItems + 4 * (threadIdx.x % 32), last()) : Four<Real>{};
    };
    Four<Real> next = fetch(first), second_next = fetch(first + 1);
#pragma unroll 1
    for (int tile = first; tile < end; ++tile) {
        const Four<Real> current = next;
        next = second_next;
        second_next = fetch(tile + 2);
        visit(tile, current);
    }
}

// The totals over all blocks, and the rank of this warp's first drawn item.
struct Totals {
    int64_t drawn;
    uint64_t threshold_sum;
    int64_t first_invalid;
    uint32_t rank;
};

__device__ Totals add_up(const Workspace& workspace) {
    __shared__ int64_t shared_before[kWarps], shared_drawn[kWarps], shared_invalid[kWarps];
    __shared__ uint64_t shared_sum[kWarps];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t drawn_by_warp = lane < warp ? __ldcg(workspace.drawn_by_warp + blockIdx.x * kWarps + lane) : 0;
    int64_t before = 0, drawn = 0, invalid = kNoInvalid;
    uint64_t sum = 0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) {
        const int64_t block_drawn = __ldcg(workspace.drawn + block);
        drawn += block_drawn;
        before += block < blockIdx.x ? block_drawn : 0;
        sum += __ldcg(workspace.threshold_sum + block);
        invalid = min(invalid, __ldcg(workspace.first_invalid + block));
    }
    before = warp_sum(before);
    drawn = warp_sum(drawn);
    sum = warp_sum(sum);
    invalid = warp_min(invalid);
    if (lane == 0) {
        shared_before[warp] = before;
        shared_drawn[warp] = drawn;
        shared_sum[warp] = sum;
        shared_invalid[warp] = invalid;
    }
    __syncthreads();
    // Ranks are at most n <= 2^31, so 32 bits do.
    return {warp_sum(shared_drawn[lane]), warp_sum(shared_sum[lane]), warp_min(shared_invalid[lane]),
            static_cast<uint32_t>(warp_sum(shared_before[lane])) + warp_sum(drawn_by_warp)};
}

enum class Phases { both, select, write };

template <Phases phases, bool aligned, typename Real>
__global__ void __launch_bounds__(kThreads, 1)
    draw_kernel(const Real* p, uint32_t n, Partition partition, Stream stream, const int64_t* epoch,
                Workspace workspace, unsigned room, Output output, int64_t* count) {
    extern __shared__ uint32_t shared[];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned grid_warp = blockIdx.x * kWarps + warp;
    const int begin = partition.begin(grid_warp), end = partition.begin(grid_warp + 1);
    const Staged staged{shared + warp * room, reinterpret_cast<uint16_t*>(shared + kWarps * room) + warp * room, room};
    if (epoch != nullptr) stream.epoch = static_cast<uint64_t>(__ldg(epoch));

    int staged_end = begin;  // tiles before it are staged
    unsigned staged_count = 0;
    if constexpr (phases != Phases::write) {
        __shared__ int64_t shared_drawn[kWarps], shared_invalid[kWarps];
        __shared__ uint64_t shared_sum[kWarps];
        uint32_t drawn = 0;
        uint64_t sum = 0;
        int64_t invalid = kNoInvalid;
        bool staging = phases == Phases::both;
        for_each_tile<aligned>(
            p, n, begin, end, [&] { return staging; },
            [&](int tile, const Four<Real>& current) {
                const uint32_t item = tile * kTileItems + 4 * lane;
                const Decision decision = decide(current, stream, item);
                bool valid = true;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    valid &= is_probability(current.value[j]);
                    sum += decision.threshold[j];
                    drawn += decision.bits[j] >> lane & 1;
                }
                if (!valid && invalid == kNoInvalid) {
                    for (int j = 3; j >= 0; --j) {
                        if (!is_probability(current.value[j])) invalid = item + j;
                    }
                }
                staging = staging && staged_count + kTileItems <= room && tile - begin < kRunTiles;
                if (staging) {
                    staged_count = append(staged, staged_count, decision, tile - begin);
                    staged_end = tile + 1;
                }
            });
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
            const int64_t block_drawn = warp_sum(shared_drawn[lane]);
            const uint64_t block_sum = warp_sum(shared_sum[lane]);
            const int64_t block_invalid = warp_min(shared_invalid[lane]);
            if (lane == 0) {
                workspace.drawn[blockIdx.x] = block_drawn;
                workspace.threshold_sum[blockIdx.x] = block_sum;
                workspace.first_invalid[blockIdx.x] = block_invalid;
            }
        }
    }
    if constexpr (phases == Phases::both) cooperative_groups::this_grid().sync();
    if constexpr (phases != Phases::select) {
        const Totals totals = add_up(workspace);
        const bool valid = totals.first_invalid == kNoInvalid;
        const int64_t written = valid ? min(totals.drawn, output.capacity) : 0;
        const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
        const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
        if (thread == 0) *count = valid ? totals.drawn : -1;
        for (int64_t rank = written + thread; rank < output.capacity; rank += threads) {
            output.indices[rank] = -1;
            output.weights[rank] = 0.0f;
        }
        if (!valid) return;

        const auto end_rank = static_cast<uint32_t>(written);
        const double scale = weight_scale(totals.threshold_sum, n);
        write_staged(staged, staged_count, begin * kTileItems, totals.rank, end_rank, scale, output);
        // The rest from its end, run by run. A run's first rank is known when it has been staged.
        const int run_tiles = min(static_cast<int>(room) / kTileItems, kRunTiles);
        uint32_t rank = totals.rank + __ldcg(workspace.drawn_by_warp + grid_warp);
        for (int run_end = end; run_end > staged_end;) {
            const int run = max(staged_end, run_end - run_tiles);
            unsigned run_count = 0;
            for_each_tile<aligned>(
                p, n, run, run_end, [] { return true; },
                [&](int tile, const Four<Real>& current) {
                    const Decision decision = decide(current, stream, tile * kTileItems + 4 * lane);
                    run_count = append(staged, run_count, decision, tile - run);
                });
            rank -= run_count;
            write_staged(staged, run_count, run * kTileItems, rank, end_rank, scale, output);
            run_end = run;
        }
    }
}

// Calls launch(p of its type, whether 16-byte loads are allowed).
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

template <Phases phases>
void run(const Draw& draw, const Shape& shape, Output output, int64_t* count) {
    const int shared_bytes = phases == Phases::select ? 0 : kWarps * kStagedBytes * shape.room;
    dispatch(draw.p, [&](auto* data, auto aligned) {
        using Real = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
        Launch<draw_kernel<phases, decltype(aligned)::value, Real>>::on(
            draw.device, phases == Phases::both, shape.blocks, shared_bytes, draw.stream_handle, data,
            static_cast<uint32_t>(draw.p.n), Partition(draw.p.n, shape.blocks), draw.stream, draw.epoch,
            Workspace(draw.workspace, shape.blocks), static_cast<unsigned>(shape.room), output, count);
    });
}

}  // namespace

Shape shape(int64_t n, int device) {
    const Device& properties = device_properties(device);
    const int64_t tiles = tiles_of(n);
    const int64_t blocks = std::clamp<int64_t>((tiles + kWarps - 1) / kWarps, 1, properties.multiprocessors);
    // As much as the warps can use, in whole tiles: less shared memory leaves more L1 cache.
    const int64_t wanted = (tiles + blocks * kWarps - 1) / (blocks * kWarps) * kTileItems;
    const int64_t most = (properties.shared_bytes - kStaticSharedBytes) / (kWarps * kStagedBytes);
    const auto room = static_cast<int>(std::clamp<int64_t>(wanted, kTileItems, most));
    return {blocks, room / 2 * 2, properties.cooperative};
}

int64_t workspace_size(int64_t blocks) {
    return blocks * Workspace::kWordsPerBlock;
}

void draw(const Draw& draw, const Shape& shape, Output output, int64_t* count) {
    if (shape.cooperative) {
        run<Phases::both>(draw, shape, output, count);
    } else {
        select(draw, shape);
        write(draw, shape, output, count);
    }
}

void select(const Draw& draw, const Shape& shape) {
    run<Phases::select>(draw, shape, {nullptr, nullptr, 0}, nullptr);
}

void write(const Draw& draw, const Shape& shape, Output output, int64_t* count) {
    run<Phases::write>(draw, shape, output, count);
}

Drawn totals(const void* workspace, int64_t blocks) {
    const Workspace rows(const_cast<void*>(workspace), blocks);
    return {std::accumulate(rows.drawn, rows.drawn + blocks, int64_t{0}),
            *std::min_element(rows.first_invalid, rows.first_invalid + blocks)};
}

}  // namespace sadp::cuda
