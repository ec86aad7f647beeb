/* What this processor can do at most: the step of the sum on registers alone, and reading. Compiled for this processor. */
#include <stdint.h>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
enum { LANES = 16, ROWS = 6, VECTORS = 4 };
#define DOT(s, c, q) (words)_mm512_dpbusd_epi32((__m512i)(s), (__m512i)(c), (__m512i)(q))
#elif defined(__AVXVNNI__)
#include <immintrin.h>
enum { LANES = 8, ROWS = 4, VECTORS = 2 };
#define DOT(s, c, q) (words)_mm256_dpbusd_avx_epi32((__m256i)(s), (__m256i)(c), (__m256i)(q))
#elif defined(__AVX2__)
#include <immintrin.h>
enum { LANES = 8, ROWS = 4, VECTORS = 2 };
#define DOT(s, c, q) (s) + (words)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)(c), (__m256i)(q)), _mm256_set1_epi16(1))
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
enum { LANES = 4, ROWS = 4, VECTORS = 4 };
#define DOT(s, c, q) (words)vdotq_s32((int32x4_t)(s), (int8x16_t)(c), (int8x16_t)(q))
#else
enum { LANES = 4, ROWS = 4, VECTORS = 2 };
typedef int16_t halves __attribute__((vector_size(16)));
#define DOT(s, c, q) (s) + (words)((halves)(c) * (halves)(q))
#endif
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
#define UNROLL _Pragma("unroll")

/* As many sums as a tile has, and nothing to load or to take apart. Returns how many multiply-adds that were. */
int64_t only_dot(int64_t repeats, uint32_t *result)
{
    words sums[ROWS * VECTORS] = {0}, codes = {0}, q = {0};
    codes += 0x01020001u, q += 0x7F81057Fu;
    for (int64_t i = 0; i < repeats; i++) {
        UNROLL for (int s = 0; s < ROWS * VECTORS; s++)
            sums[s] = DOT(sums[s], codes, q);
        codes ^= (words){0} + ((uint32_t)i & 0x01010101u); /* changes, or the compiler would multiply only once */
    }
    for (int s = 0; s < ROWS * VECTORS; s++)
        *result += sums[s][0];
    return repeats * ROWS * VECTORS * LANES * 4;
}

/* Load blocks of 256 bytes, fetched ahead as the kernel does, and add them up. */
void only_load(const uint8_t *data, int64_t bytes, uint32_t *result)
{
    words sums[256 / (4 * LANES)] = {0};
    for (int64_t i = 0; i < bytes; i += 256) {
        UNROLL for (int line = 0; line < 256; line += 64)
            __builtin_prefetch(data + i + 8192 + line, 0, 3);
        UNROLL for (int v = 0; v < 256 / (4 * LANES); v++)
            sums[v] += *(const words *)(data + i + 4 * LANES * v);
    }
    for (int v = 0; v < 256 / (4 * LANES); v++)
        *result += sums[v][0];
}
