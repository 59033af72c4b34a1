// Drawing a subset. A draw has two passes over a caller-owned workspace: `select` decides, counts and sums; `write`
// compacts into outputs that the caller has sized. Nothing here allocates device memory or waits.
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

// How a draw is launched; the result does not depend on it.
struct Shape {
    int64_t blocks;
    int room;          // drawn items that a warp keeps on the chip, even, at least 128
    bool cooperative;  // one launch, whose blocks wait for each other
};
Shape shape(int64_t n, int device);
// Size of the workspace in 8-byte words; the first 3 * blocks are what totals() reads.
int64_t workspace_size(int64_t n, int64_t blocks);

struct Draw {
    Probabilities p;
    Stream stream;
    const int64_t* epoch;  // on the device, in place of stream.epoch; or null
    int device;            // the current one
    void* workspace;       // on a 16-byte boundary
    void* stream_handle;
};

// All enqueue work on the stream. `count` (device) gets the number drawn, which may exceed the capacity, or -1 (and all
// is padding) where p has an entry that is no probability. draw() is select(), then write(), in one launch if possible.
void draw(const Draw& draw, const Shape& shape, Output output, int64_t* count);
void select(const Draw& draw, const Shape& shape);
void write(const Draw& draw, const Shape& shape, Output output, int64_t* count);

// What select() found, from a copy of the first 3 * blocks words of the workspace on the host.
struct Drawn {
    int64_t count;
    int64_t invalid;  // the first index whose p is no probability, or kNoInvalid
};
Drawn totals(const void* workspace, int64_t blocks);

}  // namespace cuda

}  // namespace sadp
