/* The merge methods on a CPU: every piece is read once, merged in strips that stay in the nearest cache, and rounded
 * once.
 *
 * The same arithmetic, step by step, as the torch code in safemerge_recipes, which runs on every other device and
 * where this is not compiled: float32, with the fused multiply-adds spelled out and none left to the compiler
 * (-ffp-contract=off), sums over a tensor in float64. So the bytes are the same on every processor. Knows no files,
 * no names and no recipe; native.py calls it.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define STRIP 1024 /* elements of a strip: a few of them fill a part of the first-level cache */
#define ROWS 3     /* rows of a low-rank product that are computed together */
#define PANEL 32768 /* elements of a strip with a product, about: whole rows that share what is loaded for them */

enum { F32, F16, BF16 };

/* coefficient * data, one stored tensor's piece. */
typedef struct {
    const void *data;
    float coefficient;
    int32_t dtype;
} term;

/* The sum of the terms, plus left (rows, rank) @ right (rank, columns) where rank > 0; right in tiles, see add_product. */
typedef struct {
    const term *terms;
    int64_t count;
    const float *left, *right;
    int64_t rank, columns;
} weight;

/* What trimming keeps: all (0), nothing (1), or magnitudes above `threshold` and the next `ties` of those at it (2);
 * with ties < 0 all of those at it. */
typedef struct {
    int64_t ties;
    float threshold;
    int32_t kind;
} trim;

/* DARE's random choice: the two halves of the key, and how many of 65536 draws keep an element. */
typedef struct {
    uint32_t first, second, limit;
} draw;

/* TIES' election; `pair` takes the short way for two sides, whose weights sum to `total`. */
typedef struct {
    float total, scale;
    int32_t normalize, pair;
} consensus;

enum { SUM, BLEND, TIES, DARE_LINEAR, DARE_TIES };

/* One tensor's merge: origin + method(sides), stored as `dtype`. Arrays have an entry a side, draws one a pair. */
typedef struct {
    const weight *sides;
    int64_t count;
    weight origin;
    int32_t method, dtype;
    const float *shares; /* of a sum or an election */
    trim *trims;
    const draw *draws;
    const float *scales; /* DARE's rescaling */
    consensus elect;
} merge;

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float from_half(uint16_t h) {
    uint32_t size = (uint32_t)(h & 0x7fff) << 13;
    float value = from_bits(size) * 0x1p112f; /* moves the exponent's bias; exact for subnormals, too */
    uint32_t bits = to_bits(value) | (size >= 0x7c00u << 13 ? 0x7f800000u : 0);
    return from_bits(bits | ((uint32_t)(h & 0x8000) << 16));
}

static inline uint16_t to_half(float value) {
    uint32_t bits = to_bits(value), size = bits & 0x7fffffffu;
    uint32_t normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    uint32_t small = to_bits(from_bits(size) + 0.5f) - to_bits(0.5f); /* the addition rounds to multiples of 2^-24 */
    uint32_t huge = size > 0x7f800000u ? 0x7e00 : 0x7c00;
    uint32_t found = size < 0x38800000u ? small : size >= 0x47800000u ? huge : normal;
    return (uint16_t)(found | (bits >> 16 & 0x8000));
}

static inline float from_bfloat(uint16_t b) { return from_bits((uint32_t)b << 16); }

static inline uint16_t to_bfloat(float value) {
    uint32_t bits = to_bits(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : rounded);
}

/* out = coefficient * data for the first term, out = fma(coefficient, data, out) for the others. */
#define EACH(type, convert)                                                                                           \
    do {                                                                                                              \
        const type *data = (const type *)t->data + start;                                                             \
        if (first && c == 1)                                                                                          \
            for (int64_t i = 0; i < n; i++) out[i] = convert(data[i]);                                                \
        else if (first)                                                                                               \
            for (int64_t i = 0; i < n; i++) out[i] = c * convert(data[i]);                                            \
        else                                                                                                          \
            for (int64_t i = 0; i < n; i++) out[i] = fmaf(c, convert(data[i]), out[i]);                               \
    } while (0)

static void add_term(const term *t, int first, int64_t start, int64_t n, float *restrict out) {
    const float c = t->coefficient;
    if (t->dtype == F32)
        EACH(float, (float));
    else if (t->dtype == F16)
        EACH(uint16_t, from_half);
    else
        EACH(uint16_t, from_bfloat);
}

enum { E4M3, INT8, E2M1, TABLE8, TABLE4 };

/* Rows of codes, and a scale for each block of them; `scales` begins with the matrix's first. */
typedef struct {
    const uint8_t *codes;
    const float *scales, *table;
    int64_t row_bytes, scale_columns, block_rows, block_columns;
    int32_t kind;
} coded;

/* Below the smallest exponent codes are multiples of one step; no subnormal is computed with, which would be slow. */
static inline float from_e4m3(uint8_t c) {
    const int32_t size = c & 0x7f;
    uint32_t normal = ((uint32_t)size << 20) + (120u << 23);
    uint32_t found = size < 8 ? to_bits((float)size * 0x1p-9f) : normal;
    return from_bits((size == 0x7f ? 0x7fc00000u : found) | (uint32_t)(c & 0x80) << 24);
}

static inline float from_e2m1(uint32_t c) {
    const int32_t size = c & 7;
    uint32_t normal = ((uint32_t)size << 22) + (126u << 23);
    return from_bits((size < 2 ? to_bits((float)size * 0.5f) : normal) | (c & 8) << 28);
}

#define HALVES(convert)                                                                                               \
    do {                                                                                                              \
        int64_t i = 0;                                                                                                \
        if (start & 1) out[i++] = scale * convert(codes[start >> 1] >> 4);                                            \
        const uint8_t *pairs = codes + ((start + i) >> 1);                                                            \
        const int64_t whole = (n - i) / 2;                                                                            \
        for (int64_t j = 0; j < whole; j++) {                                                                         \
            out[i + 2 * j] = scale * convert(pairs[j] & 15);                                                          \
            out[i + 2 * j + 1] = scale * convert(pairs[j] >> 4);                                                      \
        }                                                                                                             \
        if (i + 2 * whole < n) out[n - 1] = scale * convert(pairs[whole] & 15);                                       \
    } while (0)

/* Codes [start, start + n) of a row, which share a scale. */
static void decode(int32_t kind, const uint8_t *codes, const float *table, float scale, int64_t start, int64_t n,
                   float *restrict out) {
    const uint8_t *from = codes + start;
#define BY_TABLE(c) table[c]
    if (kind == E4M3)
        for (int64_t i = 0; i < n; i++) out[i] = scale * from_e4m3(from[i]);
    else if (kind == INT8)
        for (int64_t i = 0; i < n; i++) out[i] = scale * (float)(int8_t)from[i];
    else if (kind == TABLE8)
        for (int64_t i = 0; i < n; i++) out[i] = scale * table[from[i]];
    else if (kind == E2M1)
        HALVES(from_e2m1);
    else
        HALVES(BY_TABLE);
}

/* out (rows, columns) = the numbers of rows and columns of a quantised matrix; `codes` begins with row `row`. */
void sm_dequantise(const coded *m, int64_t row, int64_t rows, int64_t column, int64_t columns, float *out) {
    for (int64_t r = 0; r < rows; r++, out += columns) {
        const float *scales = m->scales + (row + r) / m->block_rows * m->scale_columns;
        for (int64_t c = 0; c < columns;) {
            const int64_t block = (column + c) / m->block_columns, end = (block + 1) * m->block_columns - column;
            const int64_t n = (end < columns ? end : columns) - c;
            decode(m->kind, m->codes + r * m->row_bytes, m->table, scales[block], column + c, n, out + c);
            c += n;
        }
    }
}

/* FP8 (e4m3) of value / scale, to the nearest, ties to even; what is too large becomes the largest, 448. */
static inline uint8_t to_e4m3(float value) {
    uint32_t bits = to_bits(value), size = bits & 0x7fffffffu;
    uint32_t normal = (size - (120u << 23) + 0x7ffff + (size >> 20 & 1)) >> 20;
    uint32_t small = to_bits(from_bits(size) + 0x1p14f) - to_bits(0x1p14f); /* rounds to multiples of 2^-9 */
    uint32_t found = size < 0x3c800000u ? small : normal;
    found = size > 0x7f800000u ? 0x7f : size >= 0x43e00000u ? 0x7e : found;
    return (uint8_t)(found | (bits >> 24 & 0x80));
}

/* codes (rows, columns) of values, from row `row` of the matrix on, whole rows. */
void sm_to_e4m3(const coded *m, int64_t row, int64_t rows, int64_t columns, const float *values, uint8_t *codes) {
    for (int64_t r = 0; r < rows; r++, values += columns, codes += columns) {
        const float *scales = m->scales + (row + r) / m->block_rows * m->scale_columns;
        for (int64_t c = 0; c < columns;) {
            const int64_t block = c / m->block_columns, end = (block + 1) * m->block_columns;
            const int64_t last = end < columns ? end : columns;
            for (; c < last; c++) codes[c] = to_e4m3(values[c] / scales[block]);
        }
    }
}

#define TILE 32 /* columns of a tile: its sums stay in registers, its part of the right factor in the nearest cache */

/* out (rows, columns) += left (rows, rank) @ right, each product summed over rank in order. `right` comes in tiles
 * (rank, TILE), one behind the other, the last one padded. */
static void add_product(const float *left, const float *right, int64_t rows, int64_t rank, int64_t columns,
                        float *restrict out) {
    for (int64_t c = 0; c < columns; c += TILE, right += rank * TILE) {
        const int64_t width = columns - c < TILE ? columns - c : TILE;
        for (int64_t r = 0; r < rows; r += ROWS) {
            const int64_t height = rows - r < ROWS ? rows - r : ROWS;
            const float *row[ROWS];
            for (int i = 0; i < ROWS; i++) row[i] = left + (r + (i < height ? i : 0)) * rank;
            float sums[ROWS][TILE] = {{0}};
            for (int64_t k = 0; k < rank; k++)
                for (int i = 0; i < ROWS; i++)
                    for (int j = 0; j < TILE; j++) sums[i][j] = fmaf(row[i][k], right[k * TILE + j], sums[i][j]);
            for (int i = 0; i < height; i++)
                for (int j = 0; j < width; j++) out[(r + i) * columns + c + j] += sums[i][j];
        }
    }
}

/* Elements [start, start + n) of a weight, whole rows where it has a product. */
static void evaluate(const weight *w, int64_t start, int64_t n, float *restrict out) {
    for (int64_t t = 0; t < w->count; t++) add_term(w->terms + t, t == 0, start, n, out);
    if (!w->count) memset(out, 0, n * sizeof(float));
    if (w->rank)
        add_product(w->left + start / w->columns * w->rank, w->right, n / w->columns, w->rank, w->columns, out);
}

/* Elements of a strip of this merge: whole rows where a weight has a product. */
int64_t sm_strip(const merge *m) {
    for (int64_t i = 0; i <= m->count; i++) {
        const weight *w = i < m->count ? m->sides + i : &m->origin;
        if (w->rank) return (1 + PANEL / (ROWS * w->columns)) * ROWS * w->columns;
    }
    return STRIP;
}

/* The first n elements of a weight; for measuring. */
void sm_evaluate(const weight *w, int64_t n, float *out) {
    if (w->rank) {
        evaluate(w, 0, n, out);
        return;
    }
    for (int64_t at = 0; at < n; at += STRIP) evaluate(w, at, n - at < STRIP ? n - at : STRIP, out + at);
}

static void trim_strip(trim *t, int64_t n, float *restrict x) {
    const float threshold = t->threshold;
    if (t->kind == 0) return;
    if (t->kind == 1) {
        memset(x, 0, n * sizeof(float));
        return;
    }
    int64_t ties = t->ties;
    if (ties > 0) {
        int32_t equal = 0;
        for (int64_t i = 0; i < n; i++) equal += fabsf(x[i]) == threshold;
        if (equal <= ties) {
            t->ties -= equal;
            ties = -1;
        } else {
            t->ties = 0;
            for (int64_t i = 0; i < n; i++) {
                float size = fabsf(x[i]);
                int keep = !(size <= threshold) || (size == threshold && ties-- > 0);
                x[i] = keep ? x[i] : 0;
            }
            return;
        }
    }
    if (ties < 0) /* what is not a number stays, for the caller to refuse */
        for (int64_t i = 0; i < n; i++) x[i] = fabsf(x[i]) < threshold ? 0 : x[i];
    else
        for (int64_t i = 0; i < n; i++) x[i] = fabsf(x[i]) <= threshold ? 0 : x[i];
}

/* The weighted sum where the signs agree, else the side that has the sign of the sum; into x. */
static void elect_pair(const merge *m, int64_t n, float *restrict x, const float *restrict y) {
    const consensus *c = &m->elect;
    const float alpha = m->shares[0], beta = m->shares[1], scale = c->scale, whole = c->total;
    if (c->normalize && (alpha == 0 || beta == 0)) { /* a side without weight neither votes nor counts */
        const float *one = alpha == 0 ? y : x;
        for (int64_t i = 0; i < n; i++) x[i] = one[i] * scale;
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        float u = x[i], v = y[i], total;
        if (c->normalize) {
            total = fmaf(v, beta, u * alpha);
            total = whole == 1 ? total : total / whole;
        } else {
            u *= alpha;
            v *= beta;
            total = u + v;
        }
        float high = u > v || u != u ? u : v, low = u < v || u != u ? u : v; /* NaN stays NaN */
        high += 0.0f;                                                       /* -0 becomes 0 */
        low += 0.0f;
        float one = (int32_t)to_bits(total) < 0 ? low : high;
        x[i] = ((low > 0 || high < 0) ? total : one) * scale;
    }
}

#define CANCELLED 1e-8f /* weights that sum to less divide nothing */

/* The sum of share*x over what has the sign of the whole sum (0 counts as +), divided by those shares unless they
 * cancel; into x, the strips of all sides one behind the other, with three more behind them. */
static void elect_any(const merge *m, int64_t strip, int64_t n, float *x) {
    const consensus *c = &m->elect;
    const float scale = c->scale;
    float *restrict total = x + m->count * strip, *restrict merged = total + strip, *restrict divisor = merged + strip;
    for (int64_t k = 0; k < m->count; k++) {
        const float share = m->shares[k];
        float *restrict side = x + k * strip;
        for (int64_t i = 0; i < n; i++) side[i] *= share;
        if (k == 0)
            for (int64_t i = 0; i < n; i++) total[i] = side[i];
        else
            for (int64_t i = 0; i < n; i++) total[i] += side[i];
    }
    for (int64_t i = 0; i < n; i++) merged[i] = divisor[i] = 0;
    for (int64_t k = 0; k < m->count; k++) {
        const float share = m->shares[k];
        const float *restrict side = x + k * strip;
        for (int64_t i = 0; i < n; i++) { /* what is not a number stays, for the caller to refuse */
            const int agrees = total[i] < 0 ? !(side[i] >= 0) : !(side[i] <= 0);
            merged[i] += agrees ? side[i] : 0;
            divisor[i] += agrees ? share : 0;
        }
    }
    if (c->normalize)
        for (int64_t i = 0; i < n; i++) merged[i] /= fabsf(divisor[i]) < CANCELLED ? 1 : divisor[i];
    for (int64_t i = 0; i < n; i++) x[i] = merged[i] * scale;
}

/* Wellons' lowbias32 of an element's counter, keyed. */
static inline uint32_t hash(const draw *d, uint32_t element) {
    uint32_t h = element * 0x9E3779B9u + d->first;
    h = (h ^ h >> 16) * 0x7FEB352Du + d->second;
    h = (h ^ h >> 15) * 0x846CA68Bu + d->second;
    return h ^ h >> 16;
}

/* The upper half of an element's hash decides for the first of a pair, the lower half for the second; limit 65536 keeps
 * all. */
static inline float kept_x(const draw *d, uint32_t h) { return h >> 16 < d->limit ? 1.0f : 0.0f; }
static inline float kept_y(const draw *d, uint32_t h) { return (h & 0xffff) < d->limit ? 1.0f : 0.0f; }

static void drop_pair(const draw *d, uint32_t element, int64_t n, float *restrict x, float *restrict y) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t h = hash(d, element + (uint32_t)i);
        x[i] *= kept_x(d, h); /* a dropped infinity becomes NaN, for the caller to refuse */
        y[i] *= kept_y(d, h);
    }
}

/* Drops elements of every side, whose strips lie one behind the other. */
static void drop_strip(const merge *m, int64_t strip, uint32_t element, int64_t n, float *x) {
    for (int64_t k = 0; k + 1 < m->count; k += 2)
        drop_pair(m->draws + k / 2, element, n, x + k * strip, x + (k + 1) * strip);
    if (m->count % 2) {
        const draw *d = m->draws + m->count / 2;
        float *restrict last = x + (m->count - 1) * strip;
        for (int64_t i = 0; i < n; i++) last[i] *= kept_x(d, hash(d, element + (uint32_t)i));
    }
}

/* Rounds to the output's dtype; counts results that are not finite, and those among them that were finite before. */
static void round_strip(int32_t dtype, int64_t n, const float *restrict x, void *out, int64_t bad[2]) {
    int32_t infinite = 0, before = 0;
    if (dtype == F32) {
        memcpy(out, x, n * sizeof(float));
        for (int64_t i = 0; i < n; i++) infinite += (to_bits(x[i]) & 0x7f800000u) == 0x7f800000u;
        before = infinite;
    } else {
        uint16_t *restrict to = out;
        const uint32_t exponent = dtype == F16 ? 0x7c00 : 0x7f80;
        if (dtype == F16)
            for (int64_t i = 0; i < n; i++) to[i] = to_half(x[i]);
        else
            for (int64_t i = 0; i < n; i++) to[i] = to_bfloat(x[i]);
        for (int64_t i = 0; i < n; i++) infinite += (to[i] & exponent) == exponent;
        if (infinite)
            for (int64_t i = 0; i < n; i++) before += (to_bits(x[i]) & 0x7f800000u) == 0x7f800000u;
    }
    bad[0] += infinite;
    bad[1] += infinite - before;
}

/* Merges a piece of n elements, the tensor's `first` being its first. `scratch` holds a strip a side, and three. */
void sm_merge(merge *m, int64_t first, int64_t n, void *out, float *scratch, int64_t bad[2]) {
    const int64_t strip = sm_strip(m), width = m->dtype == F32 ? 4 : 2, sides = m->count;
    float *x = scratch, *origin = scratch + sides * strip;
    for (int64_t at = 0; at < n; at += strip) {
        const int64_t count = n - at < strip ? n - at : strip;
        for (int64_t k = 0; k < sides; k++) evaluate(m->sides + k, at, count, x + k * strip);
        if (m->method == TIES)
            for (int64_t k = 0; k < sides; k++) trim_strip(m->trims + k, count, x + k * strip);
        else if (m->method == DARE_LINEAR || m->method == DARE_TIES)
            drop_strip(m, strip, (uint32_t)(first + at), count, x);
        if (m->method == DARE_TIES)
            for (int64_t k = 0; k < sides; k++) {
                float *restrict side = x + k * strip;
                const float scale = m->scales[k];
                for (int64_t i = 0; i < count; i++) side[i] *= scale;
            }
        if (m->method == TIES || m->method == DARE_TIES) {
            if (m->elect.pair)
                elect_pair(m, count, x, x + strip);
            else
                elect_any(m, strip, count, x);
        } else if (m->method != SUM) {
            const float share = m->shares[0];
            for (int64_t i = 0; i < count; i++) x[i] *= share;
            for (int64_t k = 1; k < sides; k++) {
                const float *restrict side = x + k * strip;
                const float next = m->shares[k];
                for (int64_t i = 0; i < count; i++) x[i] = fmaf(next, side[i], x[i]);
            }
        }
        if (m->origin.count || m->origin.rank) {
            evaluate(&m->origin, at, count, origin);
            for (int64_t i = 0; i < count; i++) x[i] += origin[i];
        }
        round_strip(m->dtype, count, x, (char *)out + at * width, bad);
    }
}

#define LANES 16 /* partial sums of a sum over a strip, so that it may run side by side in any processor's registers */

static double total_of(const double *lanes) {
    double total = 0;
    for (int j = 0; j < LANES; j++) total += lanes[j];
    return total;
}

static double dot_strip(int64_t n, const float *x, const float *y) {
    double lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] += (double)x[i + j] * (double)y[i + j];
    for (; i < n; i++) lanes[0] += (double)x[i] * (double)y[i];
    return total_of(lanes);
}

/* Adds |x|^2, |y|^2 and x.y of a piece to `sums`, for two sides. */
void sm_dots(const merge *m, int64_t n, double sums[3], float *scratch) {
    const int64_t strip = sm_strip(m);
    float *x = scratch, *y = x + strip;
    for (int64_t at = 0; at < n; at += strip) {
        const int64_t count = n - at < strip ? n - at : strip;
        evaluate(m->sides, at, count, x);
        evaluate(m->sides + 1, at, count, y);
        sums[0] += dot_strip(count, x, x);
        sums[1] += dot_strip(count, y, y);
        sums[2] += dot_strip(count, x, y);
    }
}

static double size_strip(int64_t n, const float *x) {
    double lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] += (double)fabsf(x[i + j]);
    for (; i < n; i++) lanes[0] += (double)fabsf(x[i]);
    return total_of(lanes);
}

/* Adds the magnitudes of a piece to `sums`: of each side, and of what is kept of it. */
void sm_sizes(const merge *m, int64_t first, int64_t n, double *sums, float *scratch) {
    const int64_t strip = sm_strip(m);
    for (int64_t at = 0; at < n; at += strip) {
        const int64_t count = n - at < strip ? n - at : strip;
        for (int64_t k = 0; k < m->count; k++) {
            evaluate(m->sides + k, at, count, scratch + k * strip);
            sums[2 * k] += size_strip(count, scratch + k * strip);
        }
        drop_strip(m, strip, (uint32_t)(first + at), count, scratch);
        for (int64_t k = 0; k < m->count; k++) sums[2 * k + 1] += size_strip(count, scratch + k * strip);
    }
}

/* Every stride-th magnitude of a piece of one side; returns their number. */
int64_t sm_look(const merge *m, int side, int64_t n, int64_t stride, float *found, float *scratch) {
    const int64_t strip = sm_strip(m);
    int64_t number = 0, next = 0;
    for (int64_t at = 0; at < n; at += strip) {
        const int64_t count = n - at < strip ? n - at : strip;
        if (next >= at + count) continue;
        evaluate(m->sides + side, at, count, scratch);
        for (; next < at + count; next += stride) found[number++] = fabsf(scratch[next - at]);
    }
    return number;
}

#define GROUP 32 /* elements that are collected only if one of them is wanted: a few in a hundred are */

/* Of one side's piece: how many magnitudes lie above `high` (counts[0]) and how many in [low, high] (counts[1]), which
 * are collected in `found` unless low = high. */
void sm_count(const merge *m, int side, int64_t n, float low, float high, int64_t counts[2], float *found,
              float *scratch) {
    const int64_t strip = sm_strip(m);
    int64_t above = 0, inside = 0;
    for (int64_t at = 0; at < n; at += strip) {
        const int64_t count = n - at < strip ? n - at : strip;
        evaluate(m->sides + side, at, count, scratch);
        for (int64_t i = 0; i < count; i++) scratch[i] = fabsf(scratch[i]);
        int32_t more = 0, within = 0;
        for (int64_t i = 0; i < count; i++) {
            more += scratch[i] > high;
            within += scratch[i] >= low && scratch[i] <= high;
        }
        above += more;
        if (low == high || !within) {
            inside += within;
            continue;
        }
        for (int64_t i = 0; i < count; i += GROUP) {
            const int64_t end = i + GROUP < count ? i + GROUP : count;
            int32_t some = i + GROUP > count;
            if (!some)
                for (int j = 0; j < GROUP; j++) some |= scratch[i + j] >= low && scratch[i + j] <= high;
            if (some)
                for (int64_t j = i; j < end; j++) {
                    found[inside] = scratch[j]; /* what is not inside is overwritten by the next */
                    inside += scratch[j] >= low && scratch[j] <= high;
                }
        }
    }
    counts[0] = above;
    counts[1] = inside;
}

/* For checking that the caller's structures are laid out alike. */
int64_t sm_size(void) { return sizeof(merge) + sizeof(coded); }

/* Changes whenever a structure or a signature does: an old library is not called by new code. */
int32_t sm_version(void) { return 6; }

/* What serves this machine best: 0 this library, 1 the one compiled with -march=x86-64-v3, 2 neither, as without such
 * instructions torch is faster. */
int32_t sm_best(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") ? 1 : 2;
#else
    return 0;
#endif
}
