// The CUDA path of a draw: one grid, two phases.
//
//   select  Each warp reads its run of p and decides every item. It keeps what it draws in shared memory until its part
//           of that is full, and goes on counting. Each block reduces to three numbers: the items drawn, the sum of
//           the thresholds, the first invalid index.
//   write   All blocks wait for each other. Each adds up the numbers of all (there is one block per multiprocessor),
//           which gives it m and its place in the output, writes what it kept, and then reads the rest of its run
//           again (a bit for each item says what was drawn), from the end: that part of p was read last and mostly lies
//           in the L2 cache.
//
// Byte floor for N items of E bytes of which M are drawn: read p, write the result, E N + 12 M. Of N = 20,000,000 in
// float32 with half drawn that is 200 MB, 70 us at the 2850 GB/s that a copy reaches on an H100. No weight can be
// written before all of p has been summed, so p has to be kept: an H100 keeps 5,000,000 drawn items in shared memory (6
// bytes each: threshold and place) and the 40 MB that hold the others in a cache of 50 MB.
//
// At that speed each scheduler of a multiprocessor has about 430 cycles for a tile of 128 items, so instructions count
// as bytes do (sm_90: select issues 164 for a tile that it keeps, 112 for another; write 22 for 32 items, 93 for a
// tile).
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

// Three rows of one 8-byte word per block, then one count per warp; after them, on a 16-byte boundary, the bits of the
// tiles that are not kept on the chip.
struct Workspace {
    static constexpr int64_t kWordsPerBlock = 4 + kWarps / 2;
    int64_t* drawn;
    uint64_t* threshold_sum;
    int64_t* first_invalid;
    uint32_t* drawn_by_warp;
    uint4* tile_bits;

    Workspace(void* base, int64_t blocks) {
        drawn = static_cast<int64_t*>(base);
        threshold_sum = reinterpret_cast<uint64_t*>(drawn + blocks);
        first_invalid = reinterpret_cast<int64_t*>(threshold_sum + blocks);
        drawn_by_warp = reinterpret_cast<uint32_t*>(first_invalid + blocks);
        tile_bits = reinterpret_cast<uint4*>(drawn + blocks * kWordsPerBlock);
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

// The drawn items of a run of tiles of one warp, side by side, in shared memory.
struct Staged {
    uint32_t* threshold;  // low words: a drawn item's threshold is in [1, 2^32], so that 0 stands for 2^32
    uint16_t* place;      // of the item in the run
    unsigned first;       // slot of this warp
};

// Puts a tile's drawn items into the slots from `end` on; returns the new end. Bit l of bits[j]: item 4 l + j of the
// tile is drawn.
__device__ __forceinline__ unsigned append(const Staged& staged, unsigned end, const uint32_t (&bits)[4],
                                           const uint32_t (&threshold)[4], unsigned tile_of_run) {
    const unsigned lane = threadIdx.x % 32;
    const uint32_t this_lane = 1u << lane;
    unsigned slot = end;
#pragma unroll
    for (int j = 0; j < 4; ++j) slot += __popc(bits[j] & (this_lane - 1));
    const unsigned place = tile_of_run * kTileItems + 4 * lane;
    // What is not drawn goes to the last slot of a full tile, which is used only if all are drawn: no branches.
    const unsigned nowhere = end + kTileItems - 1;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const bool drawn = bits[j] & this_lane;
        const unsigned to = drawn ? slot : nowhere;
        staged.threshold[to] = threshold[j];
        staged.place[to] = static_cast<uint16_t>(place + j);
        slot += drawn;
    }
    return __shfl_sync(kAllLanes, slot, 31);
}

// Writes the staged items, up to slot `staged_end`, of the run that begins at `item`; the first one has rank `rank`.
__device__ __forceinline__ void write_staged(const Staged& staged, unsigned staged_end, uint32_t item, uint32_t rank,
                                             uint32_t end_rank, double scale, const Output& output) {
    __syncwarp();
    const int end = rank < end_rank ? static_cast<int>(min(staged_end - staged.first, end_rank - rank)) : 0;
    // From here on: what this lane writes, counted from the first, and where.
    int at = static_cast<int>(threadIdx.x % 32) - static_cast<int>(rank % 32);
    const uint32_t* threshold = staged.threshold + staged.first + at;
    const uint16_t* place = staged.place + staged.first + at;
    int64_t* index_at = output.indices + rank + at;
    float* weight_at = output.weights + rank + at;
    const auto write = [&](int k) {
        __stcs(index_at + k, static_cast<int64_t>(item + place[k]));
        __stcs(weight_at + k, weight(scale, threshold_from_low_word(threshold[k])));
    };
    const auto advance = [&](int by) {
        at += by;
        threshold += by;
        place += by;
        index_at += by;
        weight_at += by;
    };
    // Whole groups of 32 ranks, so that a warp's stores fill whole lines; four groups at a time hide the latencies.
    constexpr int kGroups = 4;
    if (at >= 0 && at < end) write(0);
    advance(32);
#pragma unroll 1
    for (; __all_sync(kAllLanes, at + 32 * (kGroups - 1) < end); advance(32 * kGroups)) {
#pragma unroll
        for (int k = 0; k < kGroups; ++k) write(32 * k);
    }
#pragma unroll 1
    for (; at < end; advance(32)) write(0);
    __syncwarp();
}

// Calls visit(tile, fetch(tile)) for tiles [first, end) while more(), two tiles ahead with the loads; returns the first
// tile not visited.
template <typename More, typename Fetch, typename Visit>
__device__ __forceinline__ int for_each_tile(int first, int end, More more, Fetch fetch, Visit visit) {
    decltype(fetch(first)) next{}, second_next{};
    if (first < end) next = fetch(first);
    if (first + 1 < end) second_next = fetch(first + 1);
    int tile = first;
#pragma unroll 1
    for (; tile < end && more(); ++tile) {
        const auto current = next;
        next = second_next;
        if (tile + 2 < end) second_next = fetch(tile + 2);
        visit(tile, current);
    }
    return tile;
}

// True wherever one of the four is no probability; for -0.0 too.
__device__ __forceinline__ bool suspicious(const Four<float>& p) {
    const auto bits = [&](int j) { return __float_as_uint(p.value[j]); };
    return max(max(bits(0), bits(1)), max(bits(2), bits(3))) > 0x3F800000;  // 1.0f
}
__device__ __forceinline__ bool suspicious(const Four<double>& p) {
    return !(is_probability(p.value[0]) & is_probability(p.value[1]) & is_probability(p.value[2]) &
             is_probability(p.value[3]));
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
    draw_kernel(const Real* p, uint32_t n, Partition partition, PhiloxKeys keys, uint64_t epoch_value,
                const int64_t* epoch, Workspace workspace, unsigned room, Output output, int64_t* count) {
    extern __shared__ uint32_t shared[];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned grid_warp = blockIdx.x * kWarps + warp;
    const int begin = partition.begin(grid_warp), end = partition.begin(grid_warp + 1);
    const Staged staged{shared, reinterpret_cast<uint16_t*>(shared + kWarps * room), warp * room};

    int first_not_staged = begin;
    unsigned staged_end = staged.first;
    if constexpr (phases != Phases::write) {
        __shared__ int64_t shared_drawn[kWarps], shared_invalid[kWarps];
        __shared__ uint64_t shared_sum[kWarps];
        constexpr uint32_t kNone = UINT32_MAX;
        uint32_t not_staged_count = 0, first_invalid = kNone;
        uint64_t sum = 0;
        if (epoch != nullptr) epoch_value = static_cast<uint64_t>(__ldg(epoch));
        const auto decide = [&](int tile, const Four<Real>& four, uint32_t (&bits)[4], uint32_t (&low)[4]) {
            const uint32_t block = tile * (kTileItems / 4) + lane;
            uint32_t random[4];
            philox4x32(keys, epoch_value, block, random);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const uint64_t limit = threshold(four.value[j]);
                bits[j] = __ballot_sync(kAllLanes, random[j] < limit);
                low[j] = static_cast<uint32_t>(limit);
                sum += limit;
            }
            if (suspicious(four) && first_invalid == kNone) {
                for (int j = 3; j >= 0; --j) {
                    if (!is_probability(four.value[j])) first_invalid = 4 * block + j;
                }
            }
        };
        if constexpr (phases == Phases::both) {
            const unsigned last_start = staged.first + room - kTileItems;  // where there is still room for a full tile
            first_not_staged = for_each_tile(
                begin, min(end, begin + kRunTiles), [&] { return staged_end <= last_start; },
                [&](int tile) { return load<aligned>(p, n, tile * kTileItems + 4 * lane, true); },
                [&](int tile, const Four<Real>& four) {
                    uint32_t bits[4], low[4];
                    decide(tile, four, bits, low);
                    staged_end = append(staged, staged_end, bits, low, tile - begin);
                });
        }
        for_each_tile(
            first_not_staged, end, [] { return true; },
            [&](int tile) { return load<aligned>(p, n, tile * kTileItems + 4 * lane); },
            [&](int tile, const Four<Real>& four) {
                uint32_t bits[4], low[4];
                decide(tile, four, bits, low);
                if (lane == 0) {
                    for (int j = 0; j < 4; ++j) not_staged_count += __popc(bits[j]);
                    workspace.tile_bits[tile] = {bits[0], bits[1], bits[2], bits[3]};
                }
            });
        const uint32_t drawn = staged_end - staged.first + warp_sum(not_staged_count);
        sum = warp_sum(sum);
        first_invalid = warp_min(first_invalid);
        if (lane == 0) {
            workspace.drawn_by_warp[grid_warp] = drawn;
            shared_drawn[warp] = drawn;
            shared_sum[warp] = sum;
            shared_invalid[warp] = first_invalid == kNone ? kNoInvalid : first_invalid;
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
        write_staged(staged, staged_end, begin * kTileItems, totals.rank, end_rank, scale, output);
        // The rest from its end, run by run. A run's first rank is known when it has been staged.
        const int run_tiles = min(static_cast<int>(room) / kTileItems, kRunTiles);
        uint32_t rank = totals.rank + __ldcg(workspace.drawn_by_warp + grid_warp);
        for (int run_end = end; run_end > first_not_staged;) {
            const int run = max(first_not_staged, run_end - run_tiles);
            staged_end = staged.first;
            struct Decided {
                Four<Real> p;
                uint4 bits;
            };
            for_each_tile(
                run, run_end, [] { return true; },
                [&](int tile) {
                    return Decided{load<aligned>(p, n, tile * kTileItems + 4 * lane, true),
                                   __ldcg(workspace.tile_bits + tile)};
                },
                [&](int tile, const Decided& current) {
                    const uint32_t bits[4] = {current.bits.x, current.bits.y, current.bits.z, current.bits.w};
                    uint32_t low[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) low[j] = static_cast<uint32_t>(threshold(current.p.value[j]));
                    staged_end = append(staged, staged_end, bits, low, tile - run);
                });
            rank -= staged_end - staged.first;
            write_staged(staged, staged_end, run * kTileItems, rank, end_rank, scale, output);
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
            static_cast<uint32_t>(draw.p.n), Partition(draw.p.n, shape.blocks), PhiloxKeys(draw.stream.seed),
            draw.stream.epoch, draw.epoch, Workspace(draw.workspace, shape.blocks), static_cast<unsigned>(shape.room),
            output, count);
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

int64_t workspace_size(int64_t n, int64_t blocks) {
    return blocks * Workspace::kWordsPerBlock + tiles_of(n) * (kTileItems / 64);
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
