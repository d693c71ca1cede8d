/* Prints a digest of what every method of merge.c gives, so that processors and compilers can be compared: numbers of
 * every size, subnormals and zeros of both signs among them, stored in every dtype, with and without products. */

#include <stdio.h>
#include <stdlib.h>

#include "../../native/merge.c"

enum { N = 96 * 40, COLUMNS = 96, ROWS_OF_PRODUCT = 40, RANK = 5 };

static uint64_t state = 88172645463325252ull;

static uint32_t drawn(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32);
}

/* Finite, from subnormal to about 2^8 (of F16, 2^5). */
static float number(int32_t dtype) {
    uint32_t kind = drawn() % 16, bits = drawn();
    if (kind == 0) return from_bits(bits & 0x80000000u);
    if (kind == 1) return from_bits(bits & 0x807fffffu);
    uint32_t exponent = (dtype == F16 ? 127 - 26 : 127 - 60) + drawn() % (dtype == F16 ? 31 : 68);
    return from_bits((bits & 0x807fffffu) | exponent << 23);
}

static void *tensor(int32_t dtype) {
    void *data = malloc(N * 4);
    for (int i = 0; i < N; i++) {
        float value = number(dtype);
        if (dtype == F32) ((float *)data)[i] = value;
        else ((uint16_t *)data)[i] = dtype == F16 ? to_half(value) : to_bfloat(value);
    }
    return data;
}

static float *factor(int64_t count) {
    float *data = malloc(count * sizeof(float));
    for (int64_t i = 0; i < count; i++) data[i] = number(F16);
    return data;
}

static weight made(int32_t dtype, int product) {
    term *terms = malloc(2 * sizeof(term));
    terms[0] = (term){tensor(dtype), 1, dtype};
    terms[1] = (term){tensor(BF16), -0.7f, BF16};
    weight w = {terms, product == 2 ? 0 : 2, 0, 0, 0, 0};
    if (product) {
        w.left = factor(ROWS_OF_PRODUCT * RANK), w.right = factor((COLUMNS + TILE) * RANK);
        w.rank = RANK, w.columns = COLUMNS;
    }
    return w;
}

static uint64_t digest(const void *data, int64_t bytes) {
    uint64_t h = 14695981039346656037ull;
    for (int64_t i = 0; i < bytes; i++) h = (h ^ ((const uint8_t *)data)[i]) * 1099511628211ull;
    return h;
}

int main(void) {
    static uint16_t rounded[2];
    uint64_t conversions = 0;
    for (uint32_t h = 0; h < 65536; h++) {
        uint32_t half = to_bits(from_half((uint16_t)h)), bfloat = to_bits(from_bfloat((uint16_t)h));
        conversions = digest((uint64_t[]){conversions, half, bfloat}, 24);
    }
    for (int i = 0; i < 200000; i++) {
        float value = from_bits(drawn());
        rounded[0] = to_half(value), rounded[1] = to_bfloat(value);
        conversions = digest((uint64_t[]){conversions, rounded[0], rounded[1]}, 24);
    }
    printf("conversions %016llx\n", (unsigned long long)conversions);
    for (int method = SUM; method <= DARE_TIES; method++)
        for (int in = F32; in <= BF16; in++)
            for (int out = F32; out <= BF16; out++)
                for (int product = 0; product < 3; product++) {
                    const weight sides[2] = {made(in, product), made(BF16, product)};
                    const float shares[2] = {0.3f, 0.7f}, scales[2] = {1.6384f, 1.25f};
                    trim trims[2] = {{3, 0.01f, 2}, {-1, 0.001f, 2}};
                    const draw draws[1] = {{drawn(), drawn(), 40000}};
                    merge m = {sides, 2, made(in, 0), method, out, shares, trims, draws, scales, {1.0f, 1.1f, 0, 1}};
                    m.elect.normalize = drawn() % 2, m.elect.pair = drawn() % 2;
                    float *scratch = malloc(5 * sm_strip(&m) * sizeof(float) + 64), *found = malloc(N * sizeof(float));
                    void *result = calloc(N, 4);
                    int64_t bad[2] = {0}, counts[2];
                    double sums[7] = {0}; /* three, and two a side */
                    sm_dots(&m, N, sums, scratch);
                    sm_sizes(&m, 7, N, sums + 3, scratch);
                    sm_count(&m, 0, N, 0.001f, 0.1f, counts, found, scratch);
                    sm_merge(&m, 7, N, result, scratch, bad);
                    printf("%d %d %d %d %016llx %016llx %lld %lld %lld %lld\n", method, in, out, product,
                           (unsigned long long)digest(result, N * (out == F32 ? 4 : 2)),
                           (unsigned long long)digest(sums, sizeof sums), (long long)counts[0], (long long)counts[1],
                           (long long)bad[0], (long long)bad[1]);
                    free(scratch), free(found), free(result);
                }
    return 0;
}
