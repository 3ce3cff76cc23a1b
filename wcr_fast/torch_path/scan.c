/* One pass over keys, in pieces that stay in L1: the compiled twin of scan.py, with the same answers.

   Per segment it counts the keys that reach either bound of each window, the zeros and NaN. The keys inside of
   wanted windows are copied to out, an array per window, in their order. Patterns are keys where the mask clears the
   sign. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define FOR_EACH_MACHINE __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_MACHINE
#endif

enum { CHUNK = 1024 }; /* keys and their levels fit into L1, counts into 16 bits */

/* Eight flags as eight bits, the first one lowest. */
static inline uint64_t bits_of(const uint8_t *flags) {
    uint64_t eight;
    memcpy(&eight, flags, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    eight = __builtin_bswap64(eight);
#endif
    return (eight * 0x0102040810204080) >> 56;
}

#define DEFINE(NAME, KEY)                                                                                              \
    FOR_EACH_MACHINE void NAME(const KEY *patterns, int64_t segments, const int64_t *ends, int64_t windows,            \
                               const KEY *bounds, const uint8_t *wanted, const KEY *limits, int64_t *counts,           \
                               KEY **out) {                                                                            \
        const KEY mask = limits[0], top = limits[1];                                                                   \
        KEY key[CHUNK], level[CHUNK]; /* how many bounds a key reaches: an odd number inside of a window */            \
        uint8_t inside[CHUNK + 64];                                                                                    \
        int64_t at = 0;                                                                                                \
        for (int64_t s = 0; s < segments; s++, counts += 2 * windows + 2) {                                            \
            for (int64_t size; at < ends[s]; at += size, patterns += size) {                                           \
                size = ends[s] - at < CHUNK ? ends[s] - at : CHUNK;                                                    \
                KEY zeros = 0, nan = 0;                                                                                \
                for (int64_t i = 0; i < size; i++) {                                                                   \
                    key[i] = patterns[i] & mask;                                                                       \
                    zeros += key[i] == 0;                                                                              \
                    nan += key[i] >= top;                                                                              \
                    level[i] = 0;                                                                                      \
                }                                                                                                      \
                counts[2 * windows] += zeros;                                                                          \
                counts[2 * windows + 1] += nan;                                                                        \
                int64_t any = 0;                                                                                       \
                for (int64_t w = 0; w < windows; w++) {                                                                \
                    const KEY lo = bounds[2 * w], hi = bounds[2 * w + 1];                                              \
                    KEY reach_lo = 0, reach_hi = 0;                                                                    \
                    for (int64_t i = 0; i < size; i++) {                                                               \
                        const KEY at_lo = key[i] >= lo, at_hi = key[i] >= hi;                                          \
                        reach_lo += at_lo;                                                                             \
                        reach_hi += at_hi;                                                                             \
                        level[i] += at_lo + at_hi;                                                                     \
                    }                                                                                                  \
                    counts[2 * w] += reach_lo;                                                                         \
                    counts[2 * w + 1] += reach_hi;                                                                     \
                    any |= reach_lo ^ reach_hi;                                                                        \
                }                                                                                                      \
                if (!any) continue;                                                                                    \
                for (int64_t i = 0; i < size; i++) inside[i] = level[i] & 1;                                           \
                memset(inside + size, 0, 64);                                                                          \
                for (int64_t i = 0; i < size; i += 64) {                                                               \
                    uint64_t some = 0; /* a bit for each of 64 keys */                                                 \
                    for (int64_t j = 0; j < 64; j += 8) some |= bits_of(inside + i + j) << j;                          \
                    for (; some; some &= some - 1) {                                                                   \
                        const int64_t place = i + __builtin_ctzll(some), w = level[place] >> 1;                        \
                        if (wanted[w]) *out[w]++ = key[place];                                                         \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE(scan16, int16_t)
DEFINE(scan32, int32_t)
DEFINE(scan64, int64_t)
