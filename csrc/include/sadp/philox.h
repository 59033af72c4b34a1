// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
//
// How the 128-bit counter and the 64-bit key are filled here [ours]:
//   key     = (low word of the seed, high word of the seed)
//   counter = (index / 4, 0, low word of the epoch, high word of the epoch);  item `index` takes output word index % 4
// A different seed is a different key; under one key Philox is a bijection of the counter, so two epochs never share an
// output block. Indices reach 2^34. With epoch 0 the block of counter i equals Triton's `tl.randint4x(seed, i)`.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SADP_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SADP_INLINE inline __attribute__((always_inline))
#else
#define SADP_INLINE inline
#endif

namespace sadp {

struct Stream {
    uint64_t seed;
    uint64_t epoch;
};

SADP_INLINE uint32_t multiply_high(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    return __umulhi(a, b);
#else
    return static_cast<uint32_t>(uint64_t{a} * b >> 32);
#endif
}

constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

SADP_INLINE void philox_round(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
    const uint32_t low0 = 0xD2511F53u * c[0], high0 = multiply_high(0xD2511F53u, c[0]);
    const uint32_t low1 = 0xCD9E8D57u * c[2], high1 = multiply_high(0xCD9E8D57u, c[2]);
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
}

// Recursion rather than a loop: straight-line code is what the compilers vectorise on the CPU.
template <int rounds>
SADP_INLINE void philox_rounds(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
    if constexpr (rounds > 0) {
        philox_round(c, key0, key1);
        philox_rounds<rounds - 1>(c, key0 + kPhiloxKeyStep0, key1 + kPhiloxKeyStep1);
    }
}

SADP_INLINE void philox_counter(uint64_t epoch, uint32_t block, uint32_t (&words)[4]) {
    words[0] = block;
    words[1] = 0;
    words[2] = static_cast<uint32_t>(epoch);
    words[3] = static_cast<uint32_t>(epoch >> 32);
}

// The four random words of items 4 * block .. 4 * block + 3.
SADP_INLINE void philox4x32(Stream stream, uint32_t block, uint32_t (&words)[4]) {
    philox_counter(stream.epoch, block, words);
    philox_rounds<10>(words, static_cast<uint32_t>(stream.seed), static_cast<uint32_t>(stream.seed >> 32));
}

// The keys of all rounds. As a kernel's argument they are operands in constant memory, and cost no instruction.
struct PhiloxKeys {
    uint32_t key[10][2];

    explicit PhiloxKeys(uint64_t seed) {
        for (uint32_t round = 0; round < 10; ++round) {
            key[round][0] = static_cast<uint32_t>(seed) + round * kPhiloxKeyStep0;
            key[round][1] = static_cast<uint32_t>(seed >> 32) + round * kPhiloxKeyStep1;
        }
    }
};

SADP_INLINE void philox4x32(const PhiloxKeys& keys, uint64_t epoch, uint32_t block, uint32_t (&words)[4]) {
    philox_counter(epoch, block, words);
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) philox_round(words, keys.key[round][0], keys.key[round][1]);
}

}  // namespace sadp
