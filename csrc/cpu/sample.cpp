// The CPU path. Pass 1 decides 64 items at a time and keeps one bit for each; pass 2 walks over the set bits.
// Blocks have a fixed size and are joined by an exclusive sum of integer counts, so the number of threads changes
// nothing.
#include "sadp/sample.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "sadp/probability.h"

// One binary for every x86-64 machine: the loader picks the widest of these clones that the processor has.
#ifdef SADP_TARGET_CLONES
#define SADP_SIMD __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define SADP_SIMD
#endif

namespace sadp::cpu {
namespace {

constexpr int64_t kWordItems = 64;
constexpr int64_t kBlockItems = int64_t{1} << 15;
constexpr int64_t kBlockWords = kBlockItems / kWordItems;
constexpr int64_t kBlocksPerThread = 4;  // at least: starting a thread costs about as much as a block

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

struct WordResult {
    uint64_t drawn;  // bit i: item i of the word is drawn
    uint64_t threshold_sum;
    bool valid;
};

// 64 items, in loops that the compiler turns into vector code.
template <typename Real>
SADP_INLINE WordResult select_word(const Real* p, Stream stream, uint32_t first_block) {
    constexpr int kPhiloxBlocks = kWordItems / 4;
    uint32_t random[4][kPhiloxBlocks];
    for (int block = 0; block < kPhiloxBlocks; ++block) {
        uint32_t words[4];
        philox4x32(stream, first_block + static_cast<uint32_t>(block), words);
        for (int lane = 0; lane < 4; ++lane) random[lane][block] = words[lane];
    }
    uint64_t thresholds[kWordItems];
    int invalid = 0;
    for (int i = 0; i < kWordItems; ++i) {
        invalid |= !is_probability(p[i]);
        thresholds[i] = threshold(static_cast<double>(p[i]));
    }
    uint64_t sum = 0;
    for (int i = 0; i < kWordItems; ++i) sum += thresholds[i];
    uint64_t drawn = 0;
    for (int block = 0; block < kPhiloxBlocks; ++block) {
        for (int lane = 0; lane < 4; ++lane) {
            const int i = 4 * block + lane;
            drawn |= uint64_t{random[lane][block] < thresholds[i]} << i;
        }
    }
    return {drawn, sum, invalid == 0};
}

template <typename Real>
SADP_INLINE Selection select_block_of(const Real* p, int64_t n, int64_t block, Stream stream, uint64_t* drawn_words) {
    const int64_t begin = block * kBlockItems;
    const int64_t end = std::min(n, begin + kBlockItems);
    Selection result{0, 0, kNoInvalid};
    for (int64_t item = begin; item < end; item += kWordItems) {
        Real padded[kWordItems] = {};
        const Real* items = p + item;
        if (end - item < kWordItems) {
            std::copy(p + item, p + end, padded);
            items = padded;
        }
        const WordResult word = select_word(items, stream, static_cast<uint32_t>(item / 4));
        if (!word.valid && result.invalid == kNoInvalid) {
            for (int64_t i = item; i < end && result.invalid == kNoInvalid; ++i) {
                if (!is_probability(p[i])) result.invalid = i;
            }
        }
        drawn_words[item / kWordItems] = word.drawn;
        result.count += __builtin_popcountll(word.drawn);
        result.threshold_sum += word.threshold_sum;
    }
    return result;
}

SADP_SIMD Selection select_block(const float* p, int64_t n, int64_t block, Stream stream, uint64_t* drawn_words) {
    return select_block_of(p, n, block, stream, drawn_words);
}
SADP_SIMD Selection select_block(const double* p, int64_t n, int64_t block, Stream stream, uint64_t* drawn_words) {
    return select_block_of(p, n, block, stream, drawn_words);
}

// Writes the drawn items of one block, at most `room` of them.
template <typename Real>
SADP_INLINE void write_block_of(const Real* p, int64_t n, int64_t block, double scale, const uint64_t* drawn_words,
                                int64_t* indices, float* weights, int64_t room) {
    const int64_t begin_word = block * kBlockWords;
    const int64_t end_word = std::min(begin_word + kBlockWords, ceil_div(n, kWordItems));
    for (int64_t word = begin_word; word < end_word && room > 0; ++word) {
        int64_t items[kWordItems];
        double drawn_p[kWordItems];
        int count = 0;
        for (uint64_t bits = drawn_words[word]; bits != 0; bits &= bits - 1) {
            const int64_t item = word * kWordItems + __builtin_ctzll(bits);
            items[count] = item;
            drawn_p[count++] = static_cast<double>(p[item]);
        }
        count = static_cast<int>(std::min<int64_t>(count, room));
        for (int i = 0; i < count; ++i) indices[i] = items[i];
        for (int i = 0; i < count; ++i) weights[i] = weight(scale, threshold_as_double(drawn_p[i]));
        indices += count;
        weights += count;
        room -= count;
    }
}

SADP_SIMD void write_block(const float* p, int64_t n, int64_t block, double scale, const uint64_t* drawn_words,
                           int64_t* indices, float* weights, int64_t room) {
    write_block_of(p, n, block, scale, drawn_words, indices, weights, room);
}
SADP_SIMD void write_block(const double* p, int64_t n, int64_t block, double scale, const uint64_t* drawn_words,
                           int64_t* indices, float* weights, int64_t room) {
    write_block_of(p, n, block, scale, drawn_words, indices, weights, room);
}

// Calls run(block) once for every block. Threads live for one call, so a forked data-loading worker inherits none.
template <typename Run>
void for_each_block(int64_t blocks, int threads, const Run& run) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t block = next++; block < blocks; block = next++) run(block);
    };
    std::vector<std::thread> helpers;
    const int64_t wanted = std::min<int64_t>(threads, ceil_div(blocks, kBlocksPerThread)) - 1;
    if (wanted > 0) helpers.reserve(static_cast<size_t>(wanted));
    for (int64_t i = 0; i < wanted; ++i) {
        try {
            helpers.emplace_back(work);
        } catch (const std::system_error&) {
            break;  // no more threads to be had: the ones that run do the work
        }
    }
    work();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace

int64_t workspace_size(int64_t n) {
    return ceil_div(n, kWordItems) + ceil_div(n, kBlockItems);
}

Selection select(Probabilities p, Stream stream, int threads, uint64_t* workspace) {
    const int64_t blocks = ceil_div(p.n, kBlockItems);
    uint64_t* drawn_words = workspace;
    uint64_t* first_rank = workspace + ceil_div(p.n, kWordItems);
    std::vector<Selection> results(static_cast<size_t>(blocks));
    for_each_block(blocks, threads, [&](int64_t block) {
        results[static_cast<size_t>(block)] =
            p.is_double ? select_block(static_cast<const double*>(p.data), p.n, block, stream, drawn_words)
                        : select_block(static_cast<const float*>(p.data), p.n, block, stream, drawn_words);
    });
    Selection total{0, 0, kNoInvalid};
    for (int64_t block = 0; block < blocks; ++block) {
        const Selection& result = results[static_cast<size_t>(block)];
        first_rank[block] = static_cast<uint64_t>(total.count);
        total.count += result.count;
        total.threshold_sum += result.threshold_sum;
        total.invalid = std::min(total.invalid, result.invalid);
    }
    return total;
}

void write(Probabilities p, Selection selection, int threads, const uint64_t* workspace, Output output) {
    const double scale = weight_scale(selection.threshold_sum, p.n);
    const uint64_t* first_rank = workspace + ceil_div(p.n, kWordItems);
    for_each_block(ceil_div(p.n, kBlockItems), threads, [&](int64_t block) {
        const int64_t rank = static_cast<int64_t>(first_rank[block]);
        const int64_t room = output.capacity - rank;
        if (room <= 0) return;
        int64_t* indices = output.indices + rank;
        float* weights = output.weights + rank;
        if (p.is_double) {
            write_block(static_cast<const double*>(p.data), p.n, block, scale, workspace, indices, weights, room);
        } else {
            write_block(static_cast<const float*>(p.data), p.n, block, scale, workspace, indices, weights, room);
        }
    });
    const int64_t written = std::min(selection.count, output.capacity);
    std::fill(output.indices + written, output.indices + output.capacity, int64_t{-1});
    std::fill(output.weights + written, output.weights + output.capacity, 0.0f);
}

}  // namespace sadp::cpu
