// The entry points of the native library. A draw has two passes over a caller-owned workspace: `select` decides, counts
// and sums; `write` compacts into outputs that the caller has sized. Nothing here allocates device memory or waits.
#pragma once

#include <cstdint>

#include "sadp/philox.h"

namespace sadp {

constexpr int64_t kMaxItems = int64_t{1} << 31;
constexpr int64_t kNoInvalid = INT64_MAX;  // "first invalid index" where every p is a probability

struct Probabilities {
    const void* data;  // contiguous float32 or float64, n of them
    bool is_double;
    int64_t n;
};

struct Output {
    int64_t* indices;  // [capacity], ascending; -1 beyond the drawn ones
    float* weights;    // [capacity]; 0 beyond the drawn ones
    int64_t capacity;
};

namespace cpu {

struct Selection {
    int64_t count;           // items drawn
    uint64_t threshold_sum;  // sum of all thresholds, m * 2^32
    int64_t invalid;         // the first index whose p is no probability, or kNoInvalid
};

// Size of the workspace in 8-byte words.
int64_t workspace_size(int64_t n);
Selection select(Probabilities p, Stream stream, int threads, uint64_t* workspace);
void write(Probabilities p, Selection selection, int threads, const uint64_t* workspace, Output output);

}  // namespace cpu

namespace cuda {

// The launch shape for n items on the current device; the workspace begins with three rows of `blocks` int64: items
// drawn, sum of thresholds, first invalid index (kNoInvalid where there is none) of each block.
struct Plan {
    int64_t workspace;  // in 8-byte words
    int64_t blocks;
};
Plan plan(int64_t n);

// `epoch` is a device pointer that replaces stream.epoch, or null. Both enqueue one kernel on `stream_handle`.
void select(Probabilities p, Stream stream, const int64_t* epoch, void* workspace, int64_t blocks, void* stream_handle);
// `count` (device) gets the number drawn, which may exceed the capacity, or -1 (and all is padding) for an invalid p.
void write(Probabilities p, const void* workspace, int64_t blocks, Output output, int64_t* count, void* stream_handle);

}  // namespace cuda

}  // namespace sadp
