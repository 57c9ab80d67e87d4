/* Products of stored int8 rows, and of one-bit rows as bytes, with the digits of queries, weighed into scores: products.py
 * says what the numbers mean. Rows are read once, a few at a time, and multiplied with every digit while in registers.
 *
 * VPDPBUSD multiplies 64 bytes, unsigned by signed, and adds fours of products to 16 int32. What is not unsigned is moved
 * up by 128, in flipping a bit, and what that adds is taken off. Two orders of the digits, with columns beside them that
 * nobody asks for:
 *
 *     wide    [W/4][columns][4], columns a multiple of 16: four bytes of a row go to all lanes, a lane is a column. The
 *             digits are moved, beforehand: 128 times the sum of the row is too much
 *     narrow  [columns][W], W a multiple of 64: lanes are places in the row, added up at its end; for a few columns,
 *             which would leave lanes of the wide order empty. The rows are moved: 128 times the sum of the digits is too
 *             much, which is known before, and sums start that much lower ("starts"; zeros in the wide order)
 *
 * Sums wrap around in int32 as whole numbers do; what comes out is right as long as it fits itself.
 * Lines of the rows to come are asked for ahead: the processor does not do so across the end of a page, and many rows
 * are a page.
 *
 * pick_int8 looks for rows that can be among a query's best: the first digits of all queries are multiplied with a row
 * together, and the others only where the score, by what they can change at most, could reach the least that matters.
 * Those rows are still in the cache. For a few queries the first digits are in the narrow order too.
 *
 * Processors with AVX2 alone have only the narrow order, and another way to multiply (_products_avx2.h).
 *
 * The limited API of Python 3.11: one build serves every later Python. Elsewhere than on x86-64 with AVX2 or AVX512-VNNI
 * registers() is 0 and products.py goes another way.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define LINE 64
#define MOST_COLUMNS 48
#define MOST_NARROW 6
#define WIDE_ROWS 6
#define NARROW_ROWS 4
#define AHEAD 8 /* rows, in the narrow order */
#define APART_AHEAD 4

/* Bits of the registers in use: 512, 256 or 0. */
static int registers;

/* Columns with those of zeros beside them. */
static Py_ssize_t padded_columns(Py_ssize_t n)
{
    return registers == 256 ? n : n <= 3 ? 3 : n <= MOST_NARROW ? MOST_NARROW : (n + LANES - 1) / LANES * LANES;
}

/* Bytes of the digits of so many columns. */
static Py_ssize_t digits_size(Py_ssize_t n_columns, Py_ssize_t width)
{
    const Py_ssize_t step = n_columns <= MOST_NARROW || registers == 256 ? LINE : 4;
    return padded_columns(n_columns) * ((width + step - 1) / step * step);
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define PROCESSOR __attribute__((target("avx512f,avx512bw,avx512vnni")))
#define EACH _Pragma("GCC unroll 8") for /* sums stay in registers only where these loops are gone */
#define INLINE static inline __attribute__((always_inline)) PROCESSOR

INLINE __m512i last_bytes(const int8_t *row, Py_ssize_t n)
{
    return _mm512_maskz_loadu_epi8(~0ULL >> (LINE - n), row);
}

INLINE __m512i moved(__m512i bytes)
{
    return _mm512_xor_si512(bytes, _mm512_set1_epi8((char)128));
}

/* Four places of every row with every column. */
#define FOUR(BYTES, PLACE)                                                                                             \
    do {                                                                                                               \
        __m512i column[3];                                                                                             \
        EACH (int c = 0; c < n_vectors; c++)                                                                            \
            column[c] = _mm512_loadu_si512(digits + c * LINE);                                                         \
        digits += n_vectors * LINE;                                                                                    \
        EACH (int r = 0; r < WIDE_ROWS; r++) {                                                                          \
            int32_t four = 0;                                                                                          \
            memcpy(&four, rows[r] + (PLACE), (size_t)(BYTES));                                                         \
            const __m512i all = _mm512_set1_epi32(four);                                                               \
            EACH (int c = 0; c < n_vectors; c++)                                                                        \
                total[r][c] = _mm512_dpbusd_epi32(total[r][c], column[c], all);                                        \
        }                                                                                                              \
    } while (0)

/* Sums [WIDE_ROWS][MOST_COLUMNS]. rows: so many, and as many that come next. */
INLINE void wide(const int8_t *const *rows, Py_ssize_t width, const int8_t *digits, int32_t *sums, const int n_vectors)
{
    const Py_ssize_t whole = width / LINE * LINE;
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i total[WIDE_ROWS][3], own[WIDE_ROWS]; /* own: of the row's bytes alone */
    EACH (int r = 0; r < WIDE_ROWS; r++) {
        own[r] = _mm512_setzero_si512();
        EACH (int c = 0; c < n_vectors; c++)
            total[r][c] = _mm512_setzero_si512();
    }
    for (Py_ssize_t k = 0; k < whole; k += LINE) {
        EACH (int r = 0; r < WIDE_ROWS; r++) {
            _mm_prefetch((const char *)rows[WIDE_ROWS + r] + k, _MM_HINT_T1);
            own[r] = _mm512_dpbusd_epi32(own[r], ones, _mm512_loadu_si512(rows[r] + k));
        }
        for (Py_ssize_t i = k; i < k + LINE; i += 4)
            FOUR(4, i);
    }
    if (whole < width)
        EACH (int r = 0; r < WIDE_ROWS; r++)
            own[r] = _mm512_dpbusd_epi32(own[r], ones, last_bytes(rows[r] + whole, width - whole));
    for (Py_ssize_t i = whole; i < width; i += 4)
        FOUR(i + 4 <= width ? 4 : width - i, i);
    EACH (int r = 0; r < WIDE_ROWS; r++) {
        const __m512i more = _mm512_set1_epi32((int32_t)(128u * (uint32_t)_mm512_reduce_add_epi32(own[r])));
        EACH (int c = 0; c < n_vectors; c++)
            _mm512_storeu_si512(sums + r * MOST_COLUMNS + c * LANES, _mm512_sub_epi32(total[r][c], more));
    }
}

/* A line of every row with every column. */
#define A_LINE(LOAD, PLACE)                                                                                            \
    do {                                                                                                               \
        __m512i column[MOST_NARROW];                                                                                   \
        EACH (int c = 0; c < n_columns; c++)                                                                            \
            column[c] = _mm512_loadu_si512(digits + c * padded + (PLACE));                                             \
        EACH (int r = 0; r < n_rows; r++) {                                                                             \
            const int8_t *line = rows[r] + (PLACE);                                                                    \
            const __m512i bytes = moved(LOAD);                                                                         \
            EACH (int c = 0; c < n_columns; c++)                                                                        \
                total[r][c] = _mm512_dpbusd_epi32(total[r][c], bytes, column[c]);                                      \
        }                                                                                                              \
    } while (0)

/* later: rows of which lines are asked for ahead */
INLINE void narrow(const int8_t *const *rows, Py_ssize_t width, const int8_t *digits, const int32_t *starts, int32_t *sums,
                   const int n_rows, const int n_columns, const int8_t *const *later)
{
    const Py_ssize_t whole = width / LINE * LINE, padded = (width + LINE - 1) / LINE * LINE;
    __m512i total[NARROW_ROWS][MOST_NARROW];
    EACH (int r = 0; r < n_rows; r++)
        EACH (int c = 0; c < n_columns; c++)
            total[r][c] = _mm512_setzero_si512();
    for (Py_ssize_t k = 0; k < whole; k += LINE) {
        EACH (int r = 0; r < n_rows; r++)
            _mm_prefetch((const char *)later[r] + k, _MM_HINT_T1);
        A_LINE(_mm512_loadu_si512(line), k);
    }
    if (whole < width)
        A_LINE(last_bytes(line, width - whole), whole);
    EACH (int r = 0; r < n_rows; r++)
        EACH (int c = 0; c < n_columns; c++)
            sums[r * MOST_COLUMNS + c] =
                (int32_t)((uint32_t)starts[c] + (uint32_t)_mm512_reduce_add_epi32(total[r][c]));
}

PROCESSOR static void multiply_wide(const int8_t *const *rows, Py_ssize_t width, const int8_t *digits, int n_columns,
                                    int32_t *sums)
{
    n_columns <= LANES       ? wide(rows, width, digits, sums, 1)
    : n_columns <= 2 * LANES ? wide(rows, width, digits, sums, 2)
                             : wide(rows, width, digits, sums, 3);
}

/* How many of the rows there is a loop for. */
PROCESSOR static int multiply_narrow(const int8_t *rows, Py_ssize_t n_rows, Py_ssize_t width, const int8_t *digits,
                                     const int32_t *starts, int n_columns, int32_t *sums)
{
    const int at_once = n_columns <= 3 ? NARROW_ROWS : NARROW_ROWS / 2;
    const int8_t *group[AHEAD + NARROW_ROWS];
    for (Py_ssize_t r = 0; r < AHEAD + NARROW_ROWS; r++)
        group[r] = rows + r * width;
    if (n_rows < at_once) {
        n_columns <= 3 ? narrow(group, width, digits, starts, sums, 1, 3, group + AHEAD)
                       : narrow(group, width, digits, starts, sums, 1, 6, group + AHEAD);
        return 1;
    }
    n_columns <= 3 ? narrow(group, width, digits, starts, sums, NARROW_ROWS, 3, group + AHEAD)
                   : narrow(group, width, digits, starts, sums, NARROW_ROWS / 2, 6, group + AHEAD);
    return at_once;
}

/* out[q][r] = scale[r] * (weights[0][q] sums[r][0][q] + weights[1][q] sums[r][1][q] + ...), in this order, in double */
PROCESSOR static void weigh(const int32_t *sums, int n_rows, int n_queries, int n_digits, const double *weights,
                            const float *scale, char *out, Py_ssize_t stride)
{
    float scores[MOST_COLUMNS][WIDE_ROWS + 2];
    for (int first = 0; first < n_queries; first += 8) {
        const int n = n_queries - first < 8 ? n_queries - first : 8;
        const __mmask8 there = (__mmask8)(0xff >> (8 - n));
        for (int r = 0; r < n_rows; r++) {
            const int32_t *sum = sums + r * MOST_COLUMNS + first;
            __m512d total = _mm512_setzero_pd();
            for (int g = 0; g < n_digits; g++) {
                const __m512i numbers = _mm512_maskz_loadu_epi32(there, sum + g * n_queries);
                const __m512d weight = _mm512_maskz_loadu_pd(there, weights + g * n_queries + first);
                const __m512d term = _mm512_mul_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(numbers)), weight);
                total = _mm512_add_pd(total, term);
            }
            float eight[8];
            _mm256_storeu_ps(eight, _mm512_cvtpd_ps(_mm512_mul_pd(total, _mm512_set1_pd(scale[r]))));
            for (int q = 0; q < n; q++)
                scores[first + q][r] = eight[q];
        }
    }
    for (int q = 0; q < n_queries; q++)
        memcpy(out + q * stride, scores[q], (size_t)n_rows * sizeof(float));
}

#define DIGITS 3

/* A query's digits, `apart` bytes from each other, and their steps; products.py has the same in numpy. */
PROCESSOR static void digits_of(const float *query, Py_ssize_t width, int8_t *digits, Py_ssize_t apart,
                                double steps[DIGITS])
{
    __m512 peak = _mm512_setzero_ps();
    for (Py_ssize_t k = 0; k < width; k += LANES) {
        const __mmask16 there = (__mmask16)(0xffff >> (width - k < LANES ? LANES - (width - k) : 0));
        peak = _mm512_max_ps(peak, _mm512_abs_ps(_mm512_maskz_loadu_ps(there, query + k)));
    }
    steps[0] = (double)_mm512_reduce_max_ps(peak) / 127;
    for (int g = 1; g < DIGITS; g++)
        steps[g] = steps[g - 1] / 254;
    for (Py_ssize_t k = 0; k < width; k += LANES) {
        const __mmask16 there = (__mmask16)(0xffff >> (width - k < LANES ? LANES - (width - k) : 0));
        __m256i eight[DIGITS][2];
        for (int half = 0; half < 2; half++) {
            const __mmask8 here = (__mmask8)(there >> 8 * half);
            const float *own = query + k + 8 * half;
            __m512d rest = _mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_maskz_loadu_ps(here, own)));
            for (int g = 0; g < DIGITS; g++) {
                const __m512d step = _mm512_set1_pd(steps[g]);
                const __m512d digit =
                    _mm512_roundscale_pd(_mm512_div_pd(rest, step), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
                rest = _mm512_sub_pd(rest, _mm512_mul_pd(digit, step));
                eight[g][half] = steps[0] > 0 ? _mm512_cvtpd_epi32(digit) : _mm256_setzero_si256();
            }
        }
        for (int g = 0; g < DIGITS; g++)
            _mm512_mask_cvtepi32_storeu_epi8(
                digits + g * apart + k, there,
                _mm512_inserti64x4(_mm512_castsi256_si512(eight[g][0]), eight[g][1], 1));
    }
}

static int most_registers(void)
{
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
        return 512;
    return __builtin_cpu_supports("avx2") ? 256 : 0;
}

#include "_products_avx2.h"

/* Rows i to i + FOUR_ROWS of n, the last one repeated, and those that come `ahead` rows later. */
static void four_of(const int8_t *const *rows, Py_ssize_t i, Py_ssize_t n, Py_ssize_t ahead, const int8_t **group)
{
    for (Py_ssize_t r = 0; r < FOUR_ROWS; r++) {
        group[r] = rows[i + r < n ? i + r : n - 1];
        group[FOUR_ROWS + r] = rows[i + r + ahead < n ? i + r + ahead : n - 1];
    }
}

static void score_avx2(const int8_t *rows, Py_ssize_t n_rows, Py_ssize_t width, const int8_t *digits, int n_queries,
                       const double *weights, const float *scale, char *out, Py_ssize_t stride)
{
    for (Py_ssize_t i = 0; i < n_rows; i += FOUR_ROWS) {
        const int8_t *group[2 * FOUR_ROWS];
        for (Py_ssize_t r = 0; r < FOUR_ROWS; r++) {
            group[r] = rows + (i + r < n_rows ? i + r : n_rows - 1) * width;
            group[FOUR_ROWS + r] = rows + (i + r + AHEAD < n_rows ? i + r + AHEAD : n_rows - 1) * width;
        }
        score_four(group, group + FOUR_ROWS, n_rows - i < FOUR_ROWS ? (int)(n_rows - i) : FOUR_ROWS, width, digits,
                   n_queries, weights, scale + i, out + i * (Py_ssize_t)sizeof(float), stride);
    }
}

static void score_apart_avx2(const int8_t *const *rows, Py_ssize_t n_rows, Py_ssize_t width, const int8_t *digits,
                             int n_queries, const double *weights, const float *scale, char *out, Py_ssize_t stride)
{
    for (Py_ssize_t i = 0; i < n_rows; i += FOUR_ROWS) {
        const int8_t *group[2 * FOUR_ROWS];
        four_of(rows, i, n_rows, APART_AHEAD, group);
        score_four(group, group + FOUR_ROWS, n_rows - i < FOUR_ROWS ? (int)(n_rows - i) : FOUR_ROWS, width, digits,
                   n_queries, weights, scale + i, out + i * (Py_ssize_t)sizeof(float), stride);
    }
}

PROCESSOR static void score(const int8_t *rows, Py_ssize_t n_rows, Py_ssize_t width, const int8_t *digits, const int32_t *starts,
                  int n_queries, int n_digits, const double *weights, const float *scale, char *out, Py_ssize_t stride)
{
    int32_t sums[WIDE_ROWS * MOST_COLUMNS];
    const int n_columns = n_queries * n_digits;
    for (Py_ssize_t r = 0, done; r < n_rows; r += done) {
        if (n_columns <= MOST_NARROW) {
            done = multiply_narrow(rows + r * width, n_rows - r, width, digits, starts, n_columns, sums);
        } else {
            const int8_t *group[2 * WIDE_ROWS];
            for (Py_ssize_t i = 0; i < 2 * WIDE_ROWS; i++)
                group[i] = rows + (r + i < n_rows ? r + i : n_rows - 1) * width;
            multiply_wide(group, width, digits, n_columns, sums);
            done = n_rows - r < WIDE_ROWS ? n_rows - r : WIDE_ROWS;
        }
        weigh(sums, (int)done, n_queries, n_digits, weights, scale + r, out + r * (Py_ssize_t)sizeof(float), stride);
    }
}

/* Rows that lie apart. */
PROCESSOR static void score_apart(const int8_t *const *rows, Py_ssize_t n_rows, Py_ssize_t width, const int8_t *digits,
                                  const int32_t *starts, int n_queries, int n_digits, const double *weights,
                                  const float *scale, char *out, Py_ssize_t stride)
{
    int32_t sums[WIDE_ROWS * MOST_COLUMNS];
    const int n_columns = n_queries * n_digits, at_once = n_columns <= MOST_NARROW ? 1 : WIDE_ROWS;
    for (Py_ssize_t r = 0; r < n_rows; r += at_once) {
        const int8_t *group[2 * WIDE_ROWS];
        for (Py_ssize_t i = 0; i < 2 * WIDE_ROWS; i++)
            group[i] = rows[r + i < n_rows ? r + i : n_rows - 1];
        if (n_columns <= 3)
            narrow(group, width, digits, starts, sums, 1, 3, group + APART_AHEAD);
        else if (n_columns <= MOST_NARROW)
            narrow(group, width, digits, starts, sums, 1, 6, group + APART_AHEAD);
        else
            multiply_wide(group, width, digits, n_columns, sums);
        weigh(sums, n_rows - r < at_once ? (int)(n_rows - r) : at_once, n_queries, n_digits, weights, scale + r,
              out + r * (Py_ssize_t)sizeof(float), stride);
    }
}

/* A row's sums with the second and third digit of one query; two lines at a time, as a sum waits for the one before. */
INLINE void rest_of(const int8_t *row, Py_ssize_t width, const int8_t *digits, const int32_t *starts, int32_t *sums)
{
    const Py_ssize_t padded = (width + LINE - 1) / LINE * LINE;
    __m512i total[2][2];
    EACH (int i = 0; i < 4; i++)
        total[i / 2][i % 2] = _mm512_setzero_si512();
    Py_ssize_t k = 0;
    for (; k + 2 * LINE <= width; k += 2 * LINE)
        EACH (int i = 0; i < 4; i++)
            total[i / 2][i % 2] = _mm512_dpbusd_epi32(total[i / 2][i % 2],
                                                      moved(_mm512_loadu_si512(row + k + i % 2 * LINE)),
                                                      _mm512_loadu_si512(digits + i / 2 * padded + k + i % 2 * LINE));
    for (; k < width; k += LINE)
        EACH (int c = 0; c < 2; c++)
            total[c][0] = _mm512_dpbusd_epi32(total[c][0], moved(last_bytes(row + k, width - k < LINE ? width - k : LINE)),
                                              _mm512_loadu_si512(digits + c * padded + k));
    EACH (int c = 0; c < 2; c++)
        sums[c] = (int32_t)((uint32_t)starts[c] +
                            (uint32_t)_mm512_reduce_add_epi32(_mm512_add_epi32(total[c][0], total[c][1])));
}

/* What pick_int8 asks with: the first digits in the wide order; per query all three in the narrow one and where their
 * sums start, the digits' weights [Q][3], how far the first may be from the score, and the least score that matters. */
struct asked {
    int n_queries;
    const int8_t *first, *digits;
    const int32_t *starts;
    const double *weights;
    const float *left, *least;
};

/* places: NULL where all rows are asked for. */
static inline Py_ssize_t place_of(const int64_t *places, Py_ssize_t i) { return places ? (Py_ssize_t)places[i] : i; }

/* Pairs of a query and a row's number, and the score: of every row whose score is at least the query's least. */
struct found {
    uint8_t *queries;
    int32_t *numbers;
    float *scores;
    Py_ssize_t n;
};

PROCESSOR static void pick_from(const int8_t *row, const int32_t *sums, Py_ssize_t width, const struct asked *asked,
                                const float *step, float scale, double weight, int32_t number, struct found *found)
{
    const Py_ssize_t padded = (width + LINE - 1) / LINE * LINE;
    for (int first = 0; first < asked->n_queries; first += LANES) {
        const int n = asked->n_queries - first < LANES ? asked->n_queries - first : LANES;
        const __mmask16 there = (__mmask16)(0xffff >> (LANES - n));
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + first));
        const __m512 step_here = _mm512_mul_ps(_mm512_loadu_ps(step + first), _mm512_set1_ps(scale));
        const __m512 most = _mm512_add_ps(_mm512_mul_ps(sum, step_here), _mm512_maskz_loadu_ps(there, asked->left + first));
        __mmask16 near = _mm512_mask_cmp_ps_mask(there, _mm512_mul_ps(most, _mm512_set1_ps((float)weight)),
                                                 _mm512_maskz_loadu_ps(there, asked->least + first), _CMP_GE_OQ);
        for (; near; near &= (__mmask16)(near - 1)) {
            const int q = first + __builtin_ctz(near);
            int32_t digits[3] = {sums[q]};
            float score;
            rest_of(row, width, asked->digits + (3 * q + 1) * padded, asked->starts + 3 * q + 1, digits + 1);
            weigh(digits, 1, 1, 3, asked->weights + 3 * q, &scale, (char *)&score, 0);
            score = (float)(score * weight);
            if (!(score >= asked->least[q]))
                continue;
            found->queries[found->n] = (uint8_t)q;
            found->numbers[found->n] = number;
            found->scores[found->n++] = score;
        }
    }
}

PROCESSOR static void pick_many(const int8_t *rows, const int64_t *places, Py_ssize_t n, Py_ssize_t width,
                           const struct asked *asked, const float *scale, const float *weights, struct found *found)
{
    int32_t sums[WIDE_ROWS * MOST_COLUMNS];
    float step[MOST_COLUMNS] = {0};
    for (int q = 0; q < asked->n_queries; q++)
        step[q] = (float)asked->weights[3 * q];
    for (Py_ssize_t i = 0; i < n; i += WIDE_ROWS) {
        const int8_t *group[2 * WIDE_ROWS];
        for (Py_ssize_t r = 0; r < 2 * WIDE_ROWS; r++)
            group[r] = rows + place_of(places, i + r < n ? i + r : n - 1) * width;
        multiply_wide(group, width, asked->first, asked->n_queries, sums);
        for (Py_ssize_t r = 0; r < WIDE_ROWS && i + r < n; r++)
            pick_from(group[r], sums + r * MOST_COLUMNS, width, asked, step, scale[i + r], weights ? weights[i + r] : 1,
                      (int32_t)(i + r), found);
    }
}

PROCESSOR static void one_column_avx512(const int8_t *const *rows, const int8_t *const *later, Py_ssize_t width,
                                        const int8_t *digits, int32_t start, int32_t *sums)
{
    int32_t each[FOUR_ROWS * MOST_COLUMNS];
    narrow(rows, width, digits, &start, each, FOUR_ROWS, 1, later ? later : rows);
    for (int r = 0; r < FOUR_ROWS; r++)
        sums[r] = each[r * MOST_COLUMNS];
}

PROCESSOR static void three_digits_avx512(const int8_t *row, Py_ssize_t width, const int8_t *digits,
                                          const int32_t *starts, int32_t *sums)
{
    narrow(&row, width, digits, starts, sums, 1, 3, &row);
}

/* Sums in the narrow order, by the registers in use: of four rows with one digit, and of one row with a query's three. */
struct narrow_sums {
    void (*one_column)(const int8_t *const *, const int8_t *const *, Py_ssize_t, const int8_t *, int32_t, int32_t *);
    void (*three_digits)(const int8_t *, Py_ssize_t, const int8_t *, const int32_t *, int32_t *);
};

static struct narrow_sums narrow_sums(void)
{
    return registers == 512 ? (struct narrow_sums){one_column_avx512, three_digits_avx512}
                            : (struct narrow_sums){one_column_avx2, three_digits_avx2};
}

/* One score from three sums: as `weigh`. */
static float weighed(const int32_t *sums, const double *weights, float scale)
{
    double total = 0;
    for (int g = 0; g < DIGITS; g++)
        total += sums[g] * weights[g];
    return (float)(total * scale);
}

/* pick_many for a few queries: the first digits are in the narrow order, and each is multiplied alone. */
static void pick_few(const int8_t *rows, const int64_t *places, Py_ssize_t n, Py_ssize_t width, const struct asked *asked,
                     const float *scale, const float *weights, struct found *found)
{
    const Py_ssize_t padded = (width + LINE - 1) / LINE * LINE;
    const struct narrow_sums with = narrow_sums();
    for (Py_ssize_t i = 0; i < n; i += FOUR_ROWS) {
        const int8_t *group[FOUR_ROWS], *later[FOUR_ROWS];
        const int here = n - i < FOUR_ROWS ? (int)(n - i) : FOUR_ROWS;
        unsigned char near[MOST_COLUMNS][FOUR_ROWS];
        int32_t sums[FOUR_ROWS];
        unsigned any = 0;
        for (Py_ssize_t r = 0; r < FOUR_ROWS; r++) {
            group[r] = rows + place_of(places, i + r < n ? i + r : n - 1) * width;
            later[r] = rows + place_of(places, i + r + AHEAD < n ? i + r + AHEAD : n - 1) * width;
        }
        for (int q = 0; q < asked->n_queries; q++) {
            with.one_column(group, q ? NULL : later, width, asked->digits + 3 * q * padded, asked->starts[3 * q], sums);
            for (int r = 0; r < here; r++) {
                const float most = (float)sums[r] * ((float)asked->weights[3 * q] * scale[i + r]) + asked->left[q];
                near[q][r] = most * (weights ? weights[i + r] : 1) >= asked->least[q];
                any |= near[q][r];
            }
        }
        for (int r = 0; any && r < here; r++)
            for (int q = 0; q < asked->n_queries; q++)
                if (near[q][r]) {
                    int32_t digits[DIGITS];
                    with.three_digits(group[r], width, asked->digits + 3 * q * padded, asked->starts + 3 * q, digits);
                    float score = weighed(digits, asked->weights + 3 * q, scale[i + r]);
                    score = weights ? (float)((double)score * weights[i + r]) : score;
                    if (!(score >= asked->least[q]))
                        continue;
                    found->queries[found->n] = (uint8_t)q;
                    found->numbers[found->n] = (int32_t)(i + r);
                    found->scores[found->n++] = score;
                }
    }
}

/* Each row with a query of its own. */
static void score_pairs(const int8_t *const *rows, const int64_t *query_of, Py_ssize_t n_rows, Py_ssize_t width,
                        const int8_t *digits, const int32_t *starts, const double *weights, const float *scale, float *out)
{
    const Py_ssize_t padded = (width + LINE - 1) / LINE * LINE;
    const struct narrow_sums with = narrow_sums();
    for (Py_ssize_t i = 0; i < n_rows; i++) {
        const int64_t q = query_of[i];
        int32_t sums[DIGITS];
        for (Py_ssize_t k = 0; i + APART_AHEAD < n_rows && k < width; k += LINE)
            _mm_prefetch((const char *)rows[i + APART_AHEAD] + k, _MM_HINT_T0);
        with.three_digits(rows[i], width, digits + 3 * q * padded, starts + 3 * q, sums);
        out[i] = weighed(sums, weights + 3 * q, scale[i]);
    }
}
#else
static int most_registers(void) { return 0; }
#define score(...) ((void)0)
#define score_avx2(...) ((void)0)
#define score_apart(...) ((void)0)
#define score_apart_avx2(...) ((void)0)
#define score_pairs(...) ((void)0)
#define digits_of(...) ((void)0)
#define pick_many(...) ((void)0)
#define pick_few(...) ((void)0)
#endif

static PyObject *use_registers(PyObject *self, PyObject *arguments)
{
    int most = -1;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "|i", &most))
        return NULL;
    if (most >= 0) {
        registers = most_registers();
        if (registers > most)
            registers = most < 256 ? 0 : 256;
    }
    return PyLong_FromLong(registers);
}

static PyObject *answer(int fits)
{
    if (fits)
        Py_RETURN_NONE;
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "the buffers' sizes do not agree, or the processor has no such registers");
    return NULL;
}

/* How scores are asked for, whether the rows lie together or apart. */
struct scoring {
    Py_buffer digits, starts, weights, scale, out;
    Py_ssize_t width, n_rows, n_queries, n_columns;
};

/* Whether the sizes agree; the buffers are to be released either way, `out` only if this is not negative. */
static int fits_scoring(struct scoring *a, PyObject *out)
{
    if (PyObject_GetBuffer(out, &a->out, PyBUF_STRIDES | PyBUF_WRITABLE) < 0)
        return -1;
    a->n_rows = a->scale.len / (Py_ssize_t)sizeof(float);
    a->n_queries = a->out.ndim == 2 ? a->out.shape[0] : 0;
    a->n_columns = a->weights.len / (Py_ssize_t)sizeof(double);
    return registers && a->width > 0 && a->n_queries > 0 && a->n_columns % a->n_queries == 0 &&
           (registers == 512 || a->n_columns == DIGITS * a->n_queries) && a->n_columns <= MOST_COLUMNS && a->digits.len == digits_size(a->n_columns, a->width) &&
           a->starts.len == padded_columns(a->n_columns) * (Py_ssize_t)sizeof(int32_t) && a->out.shape[1] == a->n_rows &&
           a->out.itemsize == sizeof(float) && (a->n_rows < 2 || a->out.strides[1] == sizeof(float));
}

static PyObject *scored(struct scoring *a, int fits)
{
    if (fits >= 0)
        PyBuffer_Release(&a->out);
    PyBuffer_Release(&a->digits);
    PyBuffer_Release(&a->starts);
    PyBuffer_Release(&a->weights);
    PyBuffer_Release(&a->scale);
    return answer(fits > 0);
}

static PyObject *score_int8(PyObject *self, PyObject *arguments)
{
    struct scoring a;
    Py_buffer rows;
    PyObject *out;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "y*ny*y*y*y*O", &rows, &a.width, &a.digits, &a.starts, &a.weights, &a.scale, &out))
        return NULL;
    int fits = fits_scoring(&a, out);
    if (fits > 0 && (fits = rows.len == a.n_rows * a.width)) {
        Py_BEGIN_ALLOW_THREADS
        if (registers == 512)
            score(rows.buf, a.n_rows, a.width, a.digits.buf, a.starts.buf, (int)a.n_queries,
                  (int)(a.n_columns / a.n_queries), a.weights.buf, a.scale.buf, a.out.buf, a.out.strides[0]);
        else
            score_avx2(rows.buf, a.n_rows, a.width, a.digits.buf, (int)a.n_queries, a.weights.buf, a.scale.buf, a.out.buf,
                       a.out.strides[0]);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&rows);
    return scored(&a, fits);
}

static PyObject *digits_int8(PyObject *self, PyObject *arguments)
{
    Py_buffer queries, digits, steps;
    Py_ssize_t width;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "ny*w*w*", &width, &queries, &digits, &steps))
        return NULL;
    const Py_ssize_t n = width > 0 ? queries.len / (4 * width) : 0;
    const int fits = registers == 512 && queries.len == 4 * n * width && digits.len == DIGITS * n * width &&
                     steps.len == DIGITS * n * (Py_ssize_t)sizeof(double);
    for (Py_ssize_t q = 0; fits && q < n; q++) {
        double own[DIGITS];
        digits_of((const float *)queries.buf + q * width, width, (int8_t *)digits.buf + q * width, n * width, own);
        for (int g = 0; g < DIGITS; g++)
            ((double *)steps.buf)[g * n + q] = own[g];
    }
    PyBuffer_Release(&queries);
    PyBuffer_Release(&digits);
    PyBuffer_Release(&steps);
    return answer(fits);
}

/* Where each row is, or NULL: of several arrays, and rows of them by number. The arrays are held in `held`. */
static const int8_t **find_rows(PyObject *arrays, Py_buffer *held, Py_ssize_t *n_held, Py_ssize_t n_arrays,
                                const Py_buffer *array_of, const Py_buffer *within_of, Py_ssize_t n_rows,
                                Py_ssize_t width)
{
    for (; *n_held < n_arrays; ++*n_held) {
        PyObject *array = PySequence_GetItem(arrays, *n_held);
        const int got = array ? PyObject_GetBuffer(array, &held[*n_held], PyBUF_SIMPLE) : -1;
        Py_XDECREF(array);
        if (got < 0)
            return NULL;
    }
    if (array_of->len != n_rows * 8 || within_of->len != n_rows * 8)
        return NULL;
    const int8_t **rows = PyMem_Malloc((size_t)(n_rows + 1) * sizeof(*rows));
    const int64_t *array = array_of->buf, *within = within_of->buf;
    for (Py_ssize_t i = 0; rows && i < n_rows; i++) {
        if (array[i] < 0 || array[i] >= n_arrays || within[i] < 0 || within[i] >= held[array[i]].len / width) {
            PyMem_Free(rows);
            return NULL;
        }
        rows[i] = (const int8_t *)held[array[i]].buf + within[i] * width;
    }
    return rows;
}

static PyObject *score_apart_int8(PyObject *self, PyObject *arguments)
{
    struct scoring a;
    Py_buffer array_of, within_of;
    PyObject *arrays, *out;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "Oy*y*ny*y*y*y*O", &arrays, &array_of, &within_of, &a.width, &a.digits, &a.starts,
                          &a.weights, &a.scale, &out))
        return NULL;
    int fits = fits_scoring(&a, out);
    const Py_ssize_t n_arrays = PySequence_Size(arrays);
    Py_ssize_t n_held = 0;
    Py_buffer *held = n_arrays < 0 ? NULL : PyMem_Calloc((size_t)n_arrays + 1, sizeof(*held));
    if (fits > 0) {
        const int8_t **rows =
            held ? find_rows(arrays, held, &n_held, n_arrays, &array_of, &within_of, a.n_rows, a.width) : NULL;
        if ((fits = rows != NULL)) {
            Py_BEGIN_ALLOW_THREADS
            if (registers == 512)
                score_apart(rows, a.n_rows, a.width, a.digits.buf, a.starts.buf, (int)a.n_queries,
                            (int)(a.n_columns / a.n_queries), a.weights.buf, a.scale.buf, a.out.buf, a.out.strides[0]);
            else
                score_apart_avx2(rows, a.n_rows, a.width, a.digits.buf, (int)a.n_queries, a.weights.buf, a.scale.buf,
                                 a.out.buf, a.out.strides[0]);
            Py_END_ALLOW_THREADS
            PyMem_Free(rows);
        }
    }
    while (n_held)
        PyBuffer_Release(&held[--n_held]);
    PyMem_Free(held);
    PyBuffer_Release(&array_of);
    PyBuffer_Release(&within_of);
    return scored(&a, fits);
}

static PyObject *score_pairs_int8(PyObject *self, PyObject *arguments)
{
    enum { ARRAY_OF, WITHIN, QUERY_OF, DIGITS_OF, STARTS, STEPS, SCALE, OUT, N_BUFFERS };
    Py_buffer buffer[N_BUFFERS];
    PyObject *arrays;
    Py_ssize_t width, n_held = 0;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "Oy*y*y*ny*y*y*y*w*", &arrays, &buffer[ARRAY_OF], &buffer[WITHIN], &buffer[QUERY_OF],
                          &width, &buffer[DIGITS_OF], &buffer[STARTS], &buffer[STEPS], &buffer[SCALE], &buffer[OUT]))
        return NULL;
    const Py_ssize_t n = buffer[SCALE].len / 4, n_queries = buffer[STEPS].len / (8 * DIGITS);
    const int64_t *query_of = buffer[QUERY_OF].buf;
    int fits = registers && width > 0 && buffer[STEPS].len == 8 * DIGITS * n_queries && buffer[QUERY_OF].len == 8 * n &&
               buffer[DIGITS_OF].len == DIGITS * n_queries * ((width + LINE - 1) / LINE * LINE) &&
               buffer[STARTS].len == 4 * DIGITS * n_queries && buffer[SCALE].len == 4 * n && buffer[OUT].len == 4 * n;
    for (Py_ssize_t i = 0; fits && i < n; i++)
        fits = query_of[i] >= 0 && query_of[i] < n_queries;
    const Py_ssize_t n_arrays = fits ? PySequence_Size(arrays) : 0;
    Py_buffer *held = n_arrays < 0 ? NULL : PyMem_Calloc((size_t)n_arrays + 1, sizeof(*held));
    if (fits) {
        const int8_t **rows =
            held ? find_rows(arrays, held, &n_held, n_arrays, &buffer[ARRAY_OF], &buffer[WITHIN], n, width) : NULL;
        if ((fits = rows != NULL)) {
            Py_BEGIN_ALLOW_THREADS
            score_pairs(rows, query_of, n, width, buffer[DIGITS_OF].buf, buffer[STARTS].buf, buffer[STEPS].buf,
                        buffer[SCALE].buf, buffer[OUT].buf);
            Py_END_ALLOW_THREADS
            PyMem_Free(rows);
        }
    }
    while (n_held)
        PyBuffer_Release(&held[--n_held]);
    PyMem_Free(held);
    for (int i = 0; i < N_BUFFERS; i++)
        PyBuffer_Release(&buffer[i]);
    return answer(fits);
}

static PyObject *pick_int8(PyObject *self, PyObject *arguments)
{
    enum { ROWS, PLACES, SCALE, WEIGHTS, FIRST, DIGITS_OF, STARTS, STEPS, LEFT, LEAST, QUERIES, NUMBERS, SCORES, N_BUFFERS };
    Py_buffer buffer[N_BUFFERS];
    Py_ssize_t width;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "ny*y*y*y*y*y*y*y*y*y*w*w*w*", &width, &buffer[ROWS], &buffer[PLACES], &buffer[SCALE],
                          &buffer[WEIGHTS], &buffer[FIRST], &buffer[DIGITS_OF], &buffer[STARTS], &buffer[STEPS],
                          &buffer[LEFT], &buffer[LEAST], &buffer[QUERIES], &buffer[NUMBERS], &buffer[SCORES]))
        return NULL;
    const Py_ssize_t n = buffer[SCALE].len / 4, n_queries = buffer[LEFT].len / 4;
    const Py_ssize_t n_rows = width > 0 ? buffer[ROWS].len / width : 0;
    const int64_t *place = buffer[PLACES].buf;
    const int few = buffer[FIRST].len == 0;
    const Py_ssize_t expected[N_BUFFERS] = {
        n_rows * width,
        buffer[PLACES].len ? 8 * n : 0,
        4 * n,
        buffer[WEIGHTS].len ? 4 * n : 0,
        few ? 0 : (n_queries + LANES - 1) / LANES * LANES * ((width + 3) / 4 * 4),
        n_queries * DIGITS * ((width + LINE - 1) / LINE * LINE),
        4 * DIGITS * n_queries,
        8 * 3 * n_queries,
        4 * n_queries,
        4 * n_queries,
        n_queries * n,
        4 * n_queries * n,
        4 * n_queries * n,
    };
    int fits = (few ? registers != 0 : registers == 512) && width > 0 && n_queries > 0 && n_queries <= MOST_COLUMNS && n <= INT32_MAX;
    for (int i = 0; i < N_BUFFERS; i++)
        fits = fits && buffer[i].len == expected[i];
    if (!buffer[PLACES].len)
        fits = fits && n == n_rows, place = NULL;
    for (Py_ssize_t i = 0; place && fits && i < n; i++)
        fits = place[i] >= 0 && place[i] < n_rows;
    struct found found = {buffer[QUERIES].buf, buffer[NUMBERS].buf, buffer[SCORES].buf, 0};
    if (fits) {
        const struct asked asked = {(int)n_queries,       buffer[FIRST].buf, buffer[DIGITS_OF].buf, buffer[STARTS].buf,
                                    buffer[STEPS].buf, buffer[LEFT].buf,  buffer[LEAST].buf};
        Py_BEGIN_ALLOW_THREADS
        const float *weights = buffer[WEIGHTS].len ? buffer[WEIGHTS].buf : NULL;
        if (few)
            pick_few(buffer[ROWS].buf, place, n, width, &asked, buffer[SCALE].buf, weights, &found);
        else
            pick_many(buffer[ROWS].buf, place, n, width, &asked, buffer[SCALE].buf, weights, &found);
        Py_END_ALLOW_THREADS
    }
    for (int i = 0; i < N_BUFFERS; i++)
        PyBuffer_Release(&buffer[i]);
    return fits ? PyLong_FromSsize_t(found.n) : answer(fits);
}

static PyMethodDef methods[] = {
    {"registers", use_registers, METH_VARARGS,
     "registers() -> bits of the vector registers in use: 512 (AVX512-VNNI), 256 (AVX2), or 0 on other processors.\n"
     "registers(most): from now on at most so many, for tests."},
    {"digits_int8", digits_int8, METH_VARARGS,
     "digits_int8(width, queries, digits, steps): float32 [Q, width], finite, into int8 [3, Q, width] and float64 [3, Q]."},
    {"score_int8", score_int8, METH_VARARGS,
     "score_int8(rows, width, digits, starts, weights, scale, out): contiguous int8 [N, width], int8 digits in the order\n"
     "of their number of columns, int32 starts, float64 weights [G, Q], float32 scale [N] into float32 out [Q, N], rows of which may lie\n"
     "apart. Other threads run meanwhile."},
    {"score_apart_int8", score_apart_int8, METH_VARARGS,
     "score_apart_int8(arrays, array_of, within, width, digits, starts, weights, scale, out): score_int8 of rows that lie\n"
     "apart: a sequence of contiguous int8 [M, width], and int64 [N] in which of them and where in it each row is."},
    {"score_pairs_int8", score_pairs_int8, METH_VARARGS,
     "score_pairs_int8(arrays, array_of, within, query_of, width, digits, starts, steps, scale, out): rows that lie apart,\n"
     "each with the query of its int64 number [N]; digits and so on of Q queries as for pick_int8, float32 out [N]."},
    {"pick_int8", pick_int8, METH_VARARGS,
     "pick_int8(width, rows, places, scale, weights, first, digits, starts, steps, left, least, queries, numbers, scores)\n"
     "-> how many pairs it found. Of int8 rows [M, width] those at int64 places [N] (empty: all), with float32 scale\n"
     "and weights [N] (empty: 1), times each of Q queries: first digits in the wide order (empty: few queries), all three in the\n"
     "narrow one [Q, 3] with int32 starts [Q, 3], float64 steps [Q, 3]; float32 [Q] what the first digit leaves out at most, and the least score\n"
     "wanted. Pairs go to uint8 queries, int32 numbers among the places and float32 scores, each of size Q * N. Other\n"
     "threads run meanwhile."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_products", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__products(void)
{
    registers = most_registers();
    return PyModule_Create(&module);
}
