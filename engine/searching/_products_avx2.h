/* Sums of int8 products for processors with AVX2 alone; _products.c says what is multiplied, and with AVX512-VNNI does it
 * itself.
 *
 * There is no instruction for products of signed bytes. A digit gets the sign of the row's byte and is multiplied with
 * that byte's size: VPMADDUBSW adds two products, at most 2 * 128 * 127, which 16 bits hold. VPMADDWD adds two of these.
 * So sums need no start, and the digits lie in the narrow order: [columns][W filled up with zeros to a multiple of 64].
 *
 * Rows are read one after the other, as the processor foresees; the sums of four are added up together. With more
 * queries the same four rows come from the first-level cache. Rows that come later are asked for ahead, as with AVX512.
 */

#define AVX2 __attribute__((target("avx2")))
#define AVX2_LINE 32
#define FOUR_ROWS 4

/* Sums of a, b, c and d. */
AVX2 static inline __m128i four_sums(__m256i a, __m256i b, __m256i c, __m256i d)
{
    const __m256i both = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}

AVX2 static inline __m256i products(__m256i bytes, __m256i sizes, __m256i digits)
{
    return _mm256_madd_epi16(_mm256_maddubs_epi16(sizes, _mm256_sign_epi8(digits, bytes)), _mm256_set1_epi16(1));
}

/* The last bytes of a row, fewer than a register holds, and zeros. */
AVX2 static inline __m256i end_of(const int8_t *bytes, Py_ssize_t n)
{
    int8_t filled[AVX2_LINE] = {0};
    memcpy(filled, bytes, (size_t)n);
    return _mm256_loadu_si256((const __m256i *)filled);
}

/* A register of a row with every column. n_columns must be a constant. */
#define AVX2_LINES(LOAD, PLACE)                                                                                        \
    do {                                                                                                               \
        const __m256i bytes = LOAD, sizes = _mm256_abs_epi8(bytes);                                                    \
        EACH (int c = 0; c < n_columns; c++)                                                                            \
            total[c] = _mm256_add_epi32(                                                                               \
                total[c], products(bytes, sizes, _mm256_loadu_si256((const __m256i *)(digits + c * apart + (PLACE))))); \
    } while (0)

/* Sums of one row with the columns, in the lanes of total[column]. later: a row to ask for ahead, or NULL. */
AVX2 static inline __attribute__((always_inline)) void sum_lines(const int8_t *row, const int8_t *later, Py_ssize_t width,
                                                                 const int8_t *digits, Py_ssize_t apart, __m256i *total,
                                                                 const int n_columns)
{
    const Py_ssize_t whole = width / LINE * LINE;
    EACH (int c = 0; c < n_columns; c++)
        total[c] = _mm256_setzero_si256();
    Py_ssize_t k = 0;
    for (; k < whole; k += LINE) {
        if (later)
            _mm_prefetch((const char *)later + k, _MM_HINT_T0);
        AVX2_LINES(_mm256_loadu_si256((const __m256i *)(row + k)), k);
        AVX2_LINES(_mm256_loadu_si256((const __m256i *)(row + k + AVX2_LINE)), k + AVX2_LINE);
    }
    for (; k < width; k += AVX2_LINE)
        AVX2_LINES(end_of(row + k, width - k < AVX2_LINE ? width - k : AVX2_LINE), k);
}

/* sums[r] of four rows with one column. */
AVX2 static void one_column_avx2(const int8_t *const *rows, const int8_t *const *later, Py_ssize_t width,
                                 const int8_t *digits, int32_t start, int32_t *sums)
{
    __m256i total[FOUR_ROWS];
    (void)start;
    for (int r = 0; r < FOUR_ROWS; r++)
        sum_lines(rows[r], later ? later[r] : NULL, width, digits, 0, total + r, 1);
    _mm_storeu_si128((__m128i *)sums, four_sums(total[0], total[1], total[2], total[3]));
}

/* A row's sums with the three digits of one query. */
AVX2 static void three_digits_avx2(const int8_t *row, Py_ssize_t width, const int8_t *digits, const int32_t *starts,
                                   int32_t *sums)
{
    __m256i total[3];
    int32_t four[4];
    (void)starts;
    sum_lines(row, NULL, width, digits, (width + LINE - 1) / LINE * LINE, total, 3);
    _mm_storeu_si128((__m128i *)four, four_sums(total[0], total[1], total[2], total[2]));
    memcpy(sums, four, 3 * sizeof(*sums));
}

/* out[r] = scale[r] * (weights[0] sums[0][r] + ...) of up to four rows; the same order and width as `weigh`. */
AVX2 static inline void weigh_avx2(const int32_t *sums, int n_rows, const double *weights, Py_ssize_t weights_apart,
                                   const float *scale, float *out)
{
    float scales[FOUR_ROWS] = {0}, scores[FOUR_ROWS];
    memcpy(scales, scale, (size_t)n_rows * sizeof(float));
    __m256d total = _mm256_setzero_pd();
    for (int g = 0; g < 3; g++) {
        const __m256d numbers = _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)(sums + g * FOUR_ROWS)));
        total = _mm256_add_pd(total, _mm256_mul_pd(numbers, _mm256_set1_pd(weights[g * weights_apart])));
    }
    total = _mm256_mul_pd(total, _mm256_cvtps_pd(_mm_loadu_ps(scales)));
    _mm_storeu_ps(scores, _mm256_cvtpd_ps(total));
    memcpy(out, scores, (size_t)n_rows * sizeof(float));
}

/* Products of up to four rows with every query: digits [3][Q][W], weights [3][Q]. */
AVX2 static void score_four(const int8_t *const *rows, const int8_t *const *later, int n_rows, Py_ssize_t width,
                            const int8_t *digits, int n_queries, const double *weights, const float *scale, char *out,
                            Py_ssize_t stride)
{
    const Py_ssize_t padded = (width + LINE - 1) / LINE * LINE;
    for (int q = 0; q < n_queries; q++) {
        __m256i total[FOUR_ROWS][3];
        int32_t sums[3 * FOUR_ROWS];
        for (int r = 0; r < FOUR_ROWS; r++)
            sum_lines(rows[r], q ? NULL : later[r], width, digits + q * padded, n_queries * padded, total[r], 3);
        for (int g = 0; g < 3; g++)
            _mm_storeu_si128((__m128i *)(sums + g * FOUR_ROWS),
                             four_sums(total[0][g], total[1][g], total[2][g], total[3][g]));
        weigh_avx2(sums, n_rows, weights + q, n_queries, scale, (float *)(out + q * stride));
    }
}
