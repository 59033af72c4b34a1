// Inclusion probabilities from scores, in one grid whose blocks wait for each other four times.
//
//   scale   the largest known score, and how many are unknown
//   search  three rounds find alpha, a float32, by its bit pattern: each takes the interval that holds alpha, cuts it
//           into at most 2048 parts of equal length, and counts and sums the scores between neighbouring thresholds.
//           There is a threshold alpha for the upper clip and one floor * alpha for the lower.
//   apply   p of every score
//
// Bytes for N scores: 16 N + 4 N read (from the L2 cache where they fit: N = 1,281,167 takes 5 MB), 4 N written.
// A part's count and sum are integers, in units of the last place of its lower threshold, and the parts are added in a
// fixed order, so the result is the same in every run; it does not depend on the launch shape either.
#include <algorithm>

#include "device.cuh"
#include "sadp/inclusion.h"

namespace sadp::cuda {
namespace {

constexpr float kLargest = 4294967296.0f;     // what the largest known score is scaled to
constexpr float kSmallest = 0x1p-126f;        // the smallest normal float32: scaled scores below it count as this
constexpr uint32_t kFirstBits = 0x00800000u;  // the pattern of 2^-126, where the search for alpha starts
constexpr uint32_t kLastBits = 0x77000000u;   // that of 2^111, where it ends
constexpr int kRounds = 3;
constexpr int kParts = 2 * kThreads;
constexpr int kMostLevels = 2;                // thresholds alpha and, where there is a floor, floor * alpha
constexpr int kLowBits = 11;                  // of an offset within a part, summed apart from the high ones
constexpr int64_t kChunk = int64_t{1} << 20;  // scores of a block whose 32-bit sums cannot overflow
constexpr int kBlockScores = 4 * kThreads;

struct Histogram {
    uint64_t offset[kRounds][kMostLevels][kParts];
    uint32_t count[kRounds][kMostLevels][kParts];
};

struct Workspace {
    Histogram* histogram;
    float* largest;     // of each block
    uint32_t* unknown;  // of each block

    Workspace(void* base, int64_t blocks) {
        histogram = static_cast<Histogram*>(base);
        largest = reinterpret_cast<float*>(histogram + 1);
        unknown = reinterpret_cast<uint32_t*>(largest + blocks);
    }
};

// The shared memory of one block: the histogram of its scores, in pieces that 32-bit atomics can add.
struct Parts {
    uint32_t* count;  // [levels][kParts] each
    uint32_t* low;
    uint32_t* high;

    __device__ __forceinline__ void add(int slot, uint32_t offset) const {
        const uint32_t high_part = offset >> kLowBits, low_part = offset & ((1u << kLowBits) - 1);
        atomicAdd(count + slot, 1u);
        if (low_part != 0) atomicAdd(low + slot, low_part);
        if (high_part != 0) atomicAdd(high + slot, high_part);
    }
    // Adds one slot to the histogram of all blocks, and empties it.
    __device__ __forceinline__ void move(int slot, Histogram& histogram, int round, int level, int part) const {
        if (count[slot] == 0) return;
        const uint64_t offset = (uint64_t{high[slot]} << kLowBits) + low[slot];
        atomicAdd(&histogram.count[round][level][part], count[slot]);
        atomicAdd(reinterpret_cast<unsigned long long*>(&histogram.offset[round][level][part]),
                  static_cast<unsigned long long>(offset));
        count[slot] = low[slot] = high[slot] = 0;
    }
};

__device__ __forceinline__ bool is_known(float score) {
    return score >= 0.0f && score < INFINITY;
}

__device__ __forceinline__ float scaled(float score, float unit) {
    return fmaxf(__fdiv_rn(score, unit), kSmallest);
}

// The interval of alpha: candidates at bits + j << shift, j < parts; alpha is not below the first of them.
struct Interval {
    uint32_t bits;
    int shift, parts;

    __device__ float threshold(int j, float level) const {
        return fmaxf(__fmul_rn(level, __uint_as_float(bits + (static_cast<uint32_t>(j) << shift))), kSmallest);
    }
    // The last j whose threshold is not above s; -1 where there is none, and `parts` where s is not below the end.
    __device__ __forceinline__ int part_of(float s, float level) const {
        const uint32_t quotient = __float_as_uint(level == 1.0f ? s : __fdiv_rn(s, level));
        int j = quotient < bits ? -1 : static_cast<int>(min((quotient - bits) >> shift, static_cast<uint32_t>(parts)));
        if (level == 1.0f) return j;
        while (j >= 0 && threshold(j, level) > s) --j;  // the quotient was rounded
        while (j < parts && threshold(j + 1, level) <= s) ++j;
        return j;
    }
};

// The mantissa of a normal float as an integer, and the value of its last place.
__device__ __forceinline__ uint32_t mantissa(float x) {
    return (__float_as_uint(x) & 0x7FFFFFu) | 0x800000u;
}
__device__ __forceinline__ double last_place(float x) {
    return __longlong_as_double(static_cast<long long>((__float_as_uint(x) >> 23) + 1023 - 127 - 23) << 52);
}

// s - threshold in units of the threshold's last place; a part is shorter than an octave.
__device__ __forceinline__ uint32_t offset_in_part(float s, float threshold) {
    const uint32_t octaves = (__float_as_uint(s) >> 23) - (__float_as_uint(threshold) >> 23);
    return (mantissa(s) << octaves) - mantissa(threshold);
}

template <bool aligned, typename Visit>
__device__ __forceinline__ void for_each_four(const float* scores, uint32_t n, int64_t first, int64_t end,
                                              Visit visit) {
#pragma unroll 2
    for (int64_t item = first + 4 * threadIdx.x; item < end; item += kBlockScores) {
        visit(static_cast<uint32_t>(item), load<aligned>(scores, n, static_cast<uint32_t>(item)));
    }
}

// How many scores lie below a threshold, and their sum.
struct Below {
    double count, sum;
};

__device__ __forceinline__ Below operator+(Below a, Below b) {
    return {a.count + b.count, __dadd_rn(a.sum, b.sum)};
}

// Of `here` over the threads before this one. Every thread calls it; the order of additions is fixed.
__device__ Below exclusive_prefix(Below here) {
    __shared__ double shared_count[kWarps], shared_sum[kWarps];
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto inclusive = [lane](Below value) {
        for (unsigned distance = 1; distance < 32; distance *= 2) {
            const Below left{__shfl_up_sync(kAllLanes, value.count, distance),
                             __shfl_up_sync(kAllLanes, value.sum, distance)};
            if (lane >= distance) value = left + value;
        }
        return value;
    };
    const auto shifted = [lane](Below value) {
        const Below left{__shfl_up_sync(kAllLanes, value.count, 1), __shfl_up_sync(kAllLanes, value.sum, 1)};
        return lane == 0 ? Below{0.0, 0.0} : left;
    };
    const Below of_warp = inclusive(here);
    __syncthreads();
    if (lane == 31) {
        shared_count[warp] = of_warp.count;
        shared_sum[warp] = of_warp.sum;
    }
    __syncthreads();
    const Below warps = shifted(inclusive({shared_count[lane], shared_sum[lane]}));
    const Below before{__shfl_sync(kAllLanes, warps.count, warp), __shfl_sync(kAllLanes, warps.sum, warp)};
    return before + shifted(of_warp);
}

// The count and sum of one part, from the integers that all blocks have added up.
__device__ __forceinline__ Below part_total(const Histogram& histogram, int round, int level, int part,
                                            float threshold) {
    const uint64_t count = __ldcg(&histogram.count[round][level][part]);
    const uint64_t offset = __ldcg(&histogram.offset[round][level][part]);
    const uint64_t places = count * mantissa(threshold) + offset;  // below 2^56
    return {static_cast<double>(count), __dmul_rn(static_cast<double>(places), last_place(threshold))};
}

template <bool aligned, int levels>
__global__ void __launch_bounds__(kThreads, 1) inclusion_kernel(Inclusion problem, float* p, Workspace workspace) {
    extern __shared__ uint32_t shared[];
    __shared__ float shared_largest[kWarps];
    __shared__ uint32_t shared_unknown[kWarps];
    __shared__ double shared_count[levels], shared_sum[levels];
    const auto grid = cooperative_groups::this_grid();
    const unsigned thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* scores = problem.scores;
    const auto n = static_cast<uint32_t>(problem.n);
    const Parts parts{shared, shared + levels * kParts, shared + 2 * levels * kParts};
    // An even, contiguous share of the scores for each block, in whole fours.
    const int64_t fours = (problem.n + 3) / 4;
    const int64_t begin = fours * blockIdx.x / gridDim.x * 4;
    const int64_t end = min(fours * (blockIdx.x + 1) / gridDim.x * 4, problem.n);

    // --- scale
    float largest = -1.0f;
    uint32_t unknown = 0;
    for_each_four<aligned>(scores, n, begin, end, [&](uint32_t item, const Four<float>& four) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const bool known = is_known(four.value[j]);
            largest = known ? fmaxf(largest, four.value[j]) : largest;
            unknown += !known && item + j < end;
        }
    });
    const auto block_largest_and_unknown = [&] {
        for (int offset = 16; offset > 0; offset /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
        }
        unknown = warp_sum(unknown);
        if (lane == 0) {
            shared_largest[warp] = largest;
            shared_unknown[warp] = unknown;
        }
        __syncthreads();
        largest = shared_largest[lane];
        for (int offset = 16; offset > 0; offset /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
        }
        unknown = warp_sum(shared_unknown[lane]);
    };
    block_largest_and_unknown();
    if (thread == 0) {
        workspace.largest[blockIdx.x] = largest;
        workspace.unknown[blockIdx.x] = unknown;
    }
    auto* words = reinterpret_cast<uint32_t*>(workspace.histogram);
    for (unsigned i = blockIdx.x * kThreads + thread; i < sizeof(Histogram) / sizeof(uint32_t);
         i += gridDim.x * kThreads) {
        words[i] = 0;
    }
    for (int i = thread; i < 3 * levels * kParts; i += kThreads) shared[i] = 0;
    grid.sync();
    largest = -1.0f;
    unknown = 0;
    for (unsigned block = thread; block < gridDim.x; block += kThreads) {
        largest = fmaxf(largest, __ldcg(workspace.largest + block));
        unknown += __ldcg(workspace.unknown + block);
    }
    block_largest_and_unknown();
    const float unit = fmaxf(__fdiv_rn(largest, kLargest), kSmallest);
    const auto unknown_count = static_cast<double>(unknown);
    const double target = __dsub_rn(problem.keep, __dmul_rn(unknown_count, problem.unknown_cost));
    const double spare = __dsub_rn(static_cast<double>(n), target);
    const bool too_thin = unknown_count >= problem.too_many_unknown;

    // --- search: sum clip(s / alpha, floor, 1) = n - sum max(1 - s / alpha, 0) + sum max(floor - s / alpha, 0) >=
    // target
    const auto level_of = [&](int level) { return level == 0 ? 1.0f : problem.floor; };
    Below below[levels] = {};  // the first candidate's thresholds
    uint32_t alpha_bits = kFirstBits;
#pragma unroll 1
    for (int round = 0; round < kRounds && !too_thin; ++round) {
        const int shift = round == 0 ? 20 : round == 1 ? 9 : 0;
        const int count = round == 0 ? static_cast<int>((kLastBits - kFirstBits) >> 20) : round == 1 ? 1 << 11 : 1 << 9;
        const Interval interval{alpha_bits, shift, count};
        for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
            const int64_t chunk_end = min(chunk + kChunk, end);
            for_each_four<aligned>(scores, n, chunk, chunk_end, [&](uint32_t item, const Four<float>& four) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (!is_known(four.value[j]) || item + j >= chunk_end) continue;
                    const float s = scaled(four.value[j], unit);
#pragma unroll
                    for (int level = 0; level < levels; ++level) {
                        const int part = interval.part_of(s, level_of(level));
                        if (part < 0 || part >= interval.parts) continue;
                        parts.add(level * kParts + part, offset_in_part(s, interval.threshold(part, level_of(level))));
                    }
                }
            });
            __syncthreads();
            for (int slot = thread; slot < levels * kParts; slot += kThreads) {
                parts.move(slot, *workspace.histogram, round, slot / kParts, slot % kParts);
            }
            __syncthreads();
        }
        grid.sync();

        // Two neighbouring parts, so two candidates, for each thread; the first candidate of all is known to do.
        Below candidate[levels][2];
        double lacking[2] = {0.0, 0.0};
#pragma unroll
        for (int level = 0; level < levels; ++level) {
            Below total[2];
            float threshold[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int part = 2 * thread + k;
                threshold[k] = interval.threshold(min(part, count - 1), level_of(level));
                total[k] = part < count ? part_total(*workspace.histogram, round, level, part, threshold[k]) : Below{};
            }
            candidate[level][0] = below[level] + exclusive_prefix(total[0] + total[1]);
            candidate[level][1] = candidate[level][0] + total[0];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const Below& under = candidate[level][k];
                const double share = __ddiv_rn(under.sum, static_cast<double>(threshold[k]));
                const double lacks = __dmul_rn(__dsub_rn(under.count, share), static_cast<double>(level_of(level)));
                lacking[k] = level == 0 ? lacks : __dsub_rn(lacking[k], lacks);
            }
        }
        const int part = 2 * thread;
        const int chosen = __syncthreads_count(part > 0 && part < count && lacking[0] <= spare) +
                           __syncthreads_count(part + 1 < count && lacking[1] <= spare);
        if (part == chosen / 2 * 2) {
#pragma unroll
            for (int level = 0; level < levels; ++level) {
                const Below& under = chosen % 2 == 0 ? candidate[level][0] : candidate[level][1];
                shared_count[level] = under.count;
                shared_sum[level] = under.sum;
            }
        }
        __syncthreads();
#pragma unroll
        for (int level = 0; level < levels; ++level) below[level] = {shared_count[level], shared_sum[level]};
        alpha_bits += static_cast<uint32_t>(chosen) << shift;
    }

    // --- apply
    const float alpha = __uint_as_float(alpha_bits);
    for_each_four<aligned>(scores, n, begin, end, [&](uint32_t item, Four<float> four) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const bool known = is_known(four.value[j]);
            float q = fminf(fmaxf(__fdiv_rn(scaled(four.value[j], unit), alpha), problem.lowest), 1.0f);
            if (problem.mixes) q = __fadd_rn(__fmul_rn(q, problem.optimum_share), problem.added);
            four.value[j] = too_thin ? problem.uniform : known ? q : 1.0f;
        }
        if (item + 4 <= n) {
            *reinterpret_cast<float4*>(p + item) = {four.value[0], four.value[1], four.value[2], four.value[3]};
        } else {
            for (int j = 0; item + j < n; ++j) p[item + j] = four.value[j];
        }
    });
}

}  // namespace

int64_t inclusion_blocks(int64_t n, int device) {
    const Device& properties = device_properties(device);
    if (!properties.cooperative) return 0;
    return std::clamp<int64_t>((n + kBlockScores - 1) / kBlockScores, 1, properties.multiprocessors);
}

int64_t inclusion_workspace_size(int64_t blocks) {
    return static_cast<int64_t>(sizeof(Histogram) / 8) + blocks;
}

void inclusion(const Inclusion& problem, float* p, int device, int64_t blocks, void* workspace, void* stream_handle) {
    const auto run = [&](auto aligned, auto levels) {
        constexpr int shared_bytes = 3 * decltype(levels)::value * kParts * static_cast<int>(sizeof(uint32_t));
        Launch<inclusion_kernel<decltype(aligned)::value, decltype(levels)::value>>::on(
            device, true, blocks, shared_bytes, stream_handle, problem, p, Workspace(workspace, blocks));
    };
    const auto run_levels = [&](auto aligned) {
        if (problem.floor > 0.0f) {
            run(aligned, std::integral_constant<int, 2>{});
        } else {
            run(aligned, std::integral_constant<int, 1>{});
        }
    };
    if (reinterpret_cast<uintptr_t>(problem.scores) % 16 == 0) {
        run_levels(std::true_type{});
    } else {
        run_levels(std::false_type{});
    }
}

}  // namespace sadp::cuda
