// The arithmetic that the CPU and the CUDA path share, so that both give the same bits.
//
//   threshold  T_i = ceil(p_i * 2^32), an integer in [0, 2^32]; item i is drawn where its random word is below T_i, so
//              p = 1 is always drawn, p = 0 never, and no p > 0 is rounded to 0. Its inclusion probability is exactly
//              T_i / 2^32, which exceeds p_i by less than 2^-32.
//   expected   m = sum_i T_i / 2^32. The sum is an integer below 2^64 for N <= 2^31, hence the same in any order.
//   weight     w_i = m / (N p_i), computed as  float32((float64(sum T) / float64(N)) / float64(T_i)),
//              every operation rounded to nearest. T_i / 2^32 in the place of p_i keeps the estimator exactly unbiased
//              and the weight finite however small p_i is.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "sadp/philox.h"

namespace sadp {

template <typename Real>
SADP_INLINE bool is_probability(Real p) {
    return (p >= Real(0)) & (p <= Real(1));  // false for NaN; no branch
}

// A threshold in [1, 2^32] from its low word (0: 2^32), by way of 2^52: an addition is faster than a conversion on a
// GPU.
SADP_INLINE double threshold_from_low_word(uint32_t low) {
    const uint64_t bits = 0x4330000000000000ull | (low - 1);
    double shifted;
    std::memcpy(&shifted, &bits, sizeof shifted);
    return shifted - 4503599627370495.0;
}

#ifdef __CUDA_ARCH__

// Scaling by 2^32 is exact, and the conversion rounds up: one instruction each.
__device__ __forceinline__ uint64_t threshold(float p) {
    return __float2ull_ru(__fmul_rn(p, 4294967296.0f));
}
__device__ __forceinline__ uint64_t threshold(double p) {
    return __double2ull_ru(__dmul_rn(p, 4294967296.0));
}

__device__ __forceinline__ double weight_scale(uint64_t threshold_sum, int64_t n) {
    return __ddiv_rn(__ull2double_rn(threshold_sum), __ll2double_rn(n));
}

// The quotient that __ddiv_rn returns, without its branch for operands out of range: scale is in [2^-31, 2^32],
// threshold an integer T in [1, 2^32]. Why its rounding is right (Markstein 1990, with the margin that an integer T
// leaves): a seed with an error below 2^-15 (the hardware's is about 2^-20) gives a reciprocal with one below 2^-44,
// and a quotient with one below 2^-43. The remainder is a multiple of the quotient's last place and below 2^43 of them,
// hence exact, and the corrected quotient has an error below 2^-87 before it is rounded, once. The exact quotient is no
// midpoint of two neighbouring doubles (T times an odd 54-bit number has more bits than `scale`), so it is 2^-54 / T,
// at least 2^-86, away from any, and both are rounded to the same double.
__device__ __forceinline__ float weight(double scale, double threshold) {
    double seed;
    asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(seed) : "d"(threshold));
    const double error = __fma_rn(-threshold, seed, 1.0);
    const double reciprocal = __fma_rn(seed, __fma_rn(error, error, error), seed);
    const double quotient = __dmul_rn(scale, reciprocal);
    return __double2float_rn(__fma_rn(__fma_rn(-threshold, quotient, scale), reciprocal, quotient));
}

#else

// ceil() and the conversion to an integer by way of 2^52, whose unit in the last place is 1: this vectorises
// everywhere.
SADP_INLINE double threshold_as_double(double p) {
    const double scaled = p * 4294967296.0;  // exact
    const double nearest = (scaled + 4503599627370496.0) - 4503599627370496.0;
    return nearest + (nearest < scaled ? 1.0 : 0.0);
}
SADP_INLINE uint64_t threshold(double p) {
    const double shifted = threshold_as_double(p) + 4503599627370496.0;
    uint64_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return bits & 0xFFFFFFFFFFFFFull;
}

SADP_INLINE double weight_scale(uint64_t threshold_sum, int64_t n) {
    return static_cast<double>(threshold_sum) / static_cast<double>(n);
}
SADP_INLINE float weight(double scale, double threshold) {
    return static_cast<float>(scale / threshold);
}

#endif

}  // namespace sadp
