// Scores to inclusion probabilities on CUDA: what sadp_fast/selection.py computes in torch, in one launch.
#pragma once

#include <cstdint>

namespace sadp::cuda {

// p = clip(s / alpha, lowest, 1), with s the scores scaled to a maximum of 2^32 and alpha such that the sum of
// clip(s / alpha, floor, 1) is the target; then p = p * optimum_share + added if it mixes. Examples never scored get 1.
struct Inclusion {
    const float* scores;  // [n]; NaN, infinite or negative: never scored
    int64_t n;
    double keep, unknown_cost;  // target = keep - unknown_cost * (number never scored)
    double too_many_unknown;    // from so many on, p = uniform for all
    float uniform, floor, lowest;
    bool mixes;
    float optimum_share, added;
};

// 0 where the device cannot launch blocks that wait for each other.
int64_t inclusion_blocks(int64_t n, int device);
// Size of the workspace in 8-byte words.
int64_t inclusion_workspace_size(int64_t blocks);
// Enqueues one cooperative launch on `device`, the current one; p: float32 [n], aligned as torch aligns what it
// allocates.
void inclusion(const Inclusion& problem, float* p, int device, int64_t blocks, void* workspace, void* stream_handle);

}  // namespace sadp::cuda
