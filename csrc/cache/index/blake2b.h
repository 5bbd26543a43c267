// BLAKE2b (RFC 7693) without a key, of one message in a word, or of several in a vector of words.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kdfast::cache::blake2b {

inline constexpr std::size_t block_bytes = 128;

// The initial values (2.6) and the schedule of a block's words (2.7).
inline constexpr std::uint64_t initial[8] = {0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B,
                                             0xA54FF53A5F1D36F1, 0x510E527FADE682D1, 0x9B05688C2B3E6C1F,
                                             0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179};
inline constexpr std::uint8_t schedule[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

// What a digest of 16 bytes begins with: no key, one node.
inline constexpr std::uint64_t parameters = 0x01010000 ^ 16;

template <class Word>
[[gnu::always_inline]] inline void mix(Word& a, Word& b, Word& c, Word& d, const Word& x, const Word& y) {
    const auto turn = [](Word& word, int bits) [[gnu::always_inline]] { word = word >> bits | word << (64 - bits); };
    a += b + x;
    d ^= a;
    turn(d, 32);
    c += d;
    b ^= c;
    turn(b, 24);
    a += b + y;
    d ^= a;
    turn(d, 16);
    c += d;
    b ^= c;
    turn(b, 63);
}

// `total`: bytes up to the end of this block; `last`: all ones for the last block, else 0.
template <class Word>
[[gnu::always_inline]] inline void compress(Word (&state)[8], const Word (&m)[16], const Word& total,
                                            const Word& last) {
    Word v[16];
    for (int i = 0; i < 8; ++i) {
        v[i] = state[i];
        v[i + 8] = Word{} + initial[i];
    }
    v[12] ^= total;
    v[14] ^= last;
#pragma GCC unroll 12
    for (int round = 0; round < 12; ++round) {
        const std::uint8_t* s = schedule[round % 10];
        mix(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]]);
        mix(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]]);
        mix(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]]);
        mix(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]]);
        mix(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]]);
        mix(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]]);
        mix(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]]);
        mix(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]]);
    }
    for (int i = 0; i < 8; ++i) state[i] ^= v[i] ^ v[i + 8];
}

}  // namespace kdfast::cache::blake2b
