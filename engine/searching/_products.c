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
 * The limited API of Python 3.11: one build serves every later Python. Elsewhere than on x86-64 with AVX512-VNNI
 * supported() is false and products.py goes another way.
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
#define PAIRS_AHEAD 2

/* Columns with those of zeros beside them. */
static Py_ssize_t padded_columns(Py_ssize_t n)
{
    return n <= 3 ? 3 : n <= MOST_NARROW ? MOST_NARROW : (n + LANES - 1) / LANES * LANES;
}

/* Bytes of the digits of so many columns. */
static Py_ssize_t digits_size(Py_ssize_t n_columns, Py_ssize_t width)
{
    const Py_ssize_t step = n_columns <= MOST_NARROW ? LINE : 4;
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
        EACH (int r = 0; r < n_rows; r++) {                                                                             \
            int32_t four = 0;                                                                                          \
            memcpy(&four, rows + r * width + (PLACE), (size_t)(BYTES));                                                \
            const __m512i all = _mm512_set1_epi32(four);                                                               \
            EACH (int c = 0; c < n_vectors; c++)                                                                        \
                total[r][c] = _mm512_dpbusd_epi32(total[r][c], column[c], all);                                        \
        }                                                                                                              \
    } while (0)

INLINE void wide(const int8_t *rows, Py_ssize_t width, const int8_t *digits, int32_t *sums, const int n_rows,
                 const int n_vectors)
{
    const Py_ssize_t whole = width / LINE * LINE;
    const __m512i ones = _mm512_set1_epi8(1);
    const char *next = (const char *)(rows + n_rows * width);
    __m512i total[WIDE_ROWS][3], own[WIDE_ROWS]; /* own: of the row's bytes alone */
    EACH (int r = 0; r < n_rows; r++) {
        own[r] = _mm512_setzero_si512();
        EACH (int c = 0; c < n_vectors; c++)
            total[r][c] = _mm512_setzero_si512();
    }
    for (Py_ssize_t k = 0; k < whole; k += LINE) {
        EACH (int r = 0; r < n_rows; r++, next += LINE) {
            _mm_prefetch(next, _MM_HINT_T0);
            own[r] = _mm512_dpbusd_epi32(own[r], ones, _mm512_loadu_si512(rows + r * width + k));
        }
        for (Py_ssize_t i = k; i < k + LINE; i += 4)
            FOUR(4, i);
    }
    if (whole < width)
        EACH (int r = 0; r < n_rows; r++)
            own[r] = _mm512_dpbusd_epi32(own[r], ones, last_bytes(rows + r * width + whole, width - whole));
    for (Py_ssize_t i = whole; i < width; i += 4)
        FOUR(i + 4 <= width ? 4 : width - i, i);
    EACH (int r = 0; r < n_rows; r++) {
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
            const int8_t *line = rows + r * width + (PLACE);                                                           \
            const __m512i bytes = moved(LOAD);                                                                         \
            EACH (int c = 0; c < n_columns; c++)                                                                        \
                total[r][c] = _mm512_dpbusd_epi32(total[r][c], bytes, column[c]);                                      \
        }                                                                                                              \
    } while (0)

/* later: where lines are asked for ahead */
INLINE void narrow(const int8_t *rows, Py_ssize_t width, const int8_t *digits, const int32_t *starts, int32_t *sums,
                   const int n_rows, const int n_columns, const int8_t *later)
{
    const Py_ssize_t whole = width / LINE * LINE, padded = (width + LINE - 1) / LINE * LINE;
    const char *next = (const char *)later;
    __m512i total[NARROW_ROWS][MOST_NARROW];
    EACH (int r = 0; r < n_rows; r++)
        EACH (int c = 0; c < n_columns; c++)
            total[r][c] = _mm512_setzero_si512();
    for (Py_ssize_t k = 0; k < whole; k += LINE) {
        EACH (int r = 0; r < n_rows; r++, next += LINE)
            _mm_prefetch(next, _MM_HINT_T1);
        A_LINE(_mm512_loadu_si512(line), k);
    }
    if (whole < width)
        A_LINE(last_bytes(line, width - whole), whole);
    EACH (int r = 0; r < n_rows; r++)
        EACH (int c = 0; c < n_columns; c++)
            sums[r * MOST_COLUMNS + c] =
                (int32_t)((uint32_t)starts[c] + (uint32_t)_mm512_reduce_add_epi32(total[r][c]));
}

/* Sums [n_rows][MOST_COLUMNS] of the largest group of rows there is a loop for; how many rows that were. */
PROCESSOR static int multiply(const int8_t *rows, Py_ssize_t n_rows, Py_ssize_t width, const int8_t *digits,
                              const int32_t *starts, int n_columns, int32_t *sums)
{
    if (n_columns <= MOST_NARROW) {
        const int at_once = n_columns <= 3 ? NARROW_ROWS : NARROW_ROWS / 2;
        const int8_t *later = rows + AHEAD * width;
        if (n_rows < at_once) {
            n_columns <= 3 ? narrow(rows, width, digits, starts, sums, 1, 3, later)
                           : narrow(rows, width, digits, starts, sums, 1, 6, later);
            return 1;
        }
        n_columns <= 3 ? narrow(rows, width, digits, starts, sums, NARROW_ROWS, 3, later)
                       : narrow(rows, width, digits, starts, sums, NARROW_ROWS / 2, 6, later);
        return at_once;
    }
    const int n_vectors = (n_columns + LANES - 1) / LANES;
    if (n_rows < WIDE_ROWS) {
        n_vectors == 1   ? wide(rows, width, digits, sums, 1, 1)
        : n_vectors == 2 ? wide(rows, width, digits, sums, 1, 2)
                         : wide(rows, width, digits, sums, 1, 3);
        return 1;
    }
    n_vectors == 1   ? wide(rows, width, digits, sums, WIDE_ROWS, 1)
    : n_vectors == 2 ? wide(rows, width, digits, sums, WIDE_ROWS, 2)
                     : wide(rows, width, digits, sums, WIDE_ROWS, 3);
    return WIDE_ROWS;
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

static int supported(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vnni");
}

static void score(const int8_t *rows, Py_ssize_t n_rows, Py_ssize_t width, const int8_t *digits, const int32_t *starts,
                  int n_queries, int n_digits, const double *weights, const float *scale, char *out, Py_ssize_t stride)
{
    int32_t sums[WIDE_ROWS * MOST_COLUMNS];
    for (Py_ssize_t r = 0; r < n_rows;) {
        int done = multiply(rows + r * width, n_rows - r, width, digits, starts, n_queries * n_digits, sums);
        weigh(sums, done, n_queries, n_digits, weights, scale + r, out + r * (Py_ssize_t)sizeof(float), stride);
        r += done;
    }
}

PROCESSOR static void score_each(const int8_t *rows, const int64_t *places, const int64_t *queries, Py_ssize_t n,
                                 Py_ssize_t width, const int8_t *digits, const int32_t *starts, const double *weights,
                                 const float *scale, float *out)
{
    int32_t sums[MOST_COLUMNS];
    for (Py_ssize_t i = 0; i < n; i++) {
        const int8_t *later = rows + places[i + PAIRS_AHEAD < n ? i + PAIRS_AHEAD : n - 1] * width;
        narrow(rows + places[i] * width, width, digits + queries[i] * digits_size(3, width),
               starts + 3 * queries[i], sums, 1, 3, later);
        weigh(sums, 1, 1, 3, weights + 3 * queries[i], scale + i, (char *)(out + i), 0);
    }
}
#else
static int supported(void) { return 0; }
#define score(...) ((void)0)
#define score_each(...) ((void)0)
#endif

static PyObject *is_supported(PyObject *self, PyObject *arguments)
{
    (void)self, (void)arguments;
    return PyBool_FromLong(supported());
}

static PyObject *answer(int fits)
{
    if (fits)
        Py_RETURN_NONE;
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "the buffers' sizes do not agree, or the processor has no AVX512-VNNI");
    return NULL;
}

static PyObject *score_int8(PyObject *self, PyObject *arguments)
{
    Py_buffer rows, digits, starts, weights, scale, out;
    PyObject *out_object;
    Py_ssize_t width;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "y*ny*y*y*y*O", &rows, &width, &digits, &starts, &weights, &scale, &out_object))
        return NULL;
    int fits = PyObject_GetBuffer(out_object, &out, PyBUF_STRIDES | PyBUF_WRITABLE) == 0;
    if (fits) {
        const Py_ssize_t n_rows = scale.len / (Py_ssize_t)sizeof(float), n_queries = out.ndim == 2 ? out.shape[0] : 0;
        const Py_ssize_t n_columns = weights.len / (Py_ssize_t)sizeof(double);
        fits = supported() && width > 0 && rows.len == n_rows * width && n_queries > 0 && n_columns % n_queries == 0 &&
               n_columns <= MOST_COLUMNS && digits.len == digits_size(n_columns, width) &&
               starts.len == padded_columns(n_columns) * (Py_ssize_t)sizeof(int32_t) && out.shape[1] == n_rows &&
               out.itemsize == sizeof(float) && (n_rows < 2 || out.strides[1] == sizeof(float));
        if (fits) {
            Py_BEGIN_ALLOW_THREADS
            score(rows.buf, n_rows, width, digits.buf, starts.buf, (int)n_queries, (int)(n_columns / n_queries),
                  weights.buf, scale.buf, out.buf, out.strides[0]);
            Py_END_ALLOW_THREADS
        }
        PyBuffer_Release(&out);
    }
    PyBuffer_Release(&rows);
    PyBuffer_Release(&digits);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&weights);
    PyBuffer_Release(&scale);
    return answer(fits);
}

static PyObject *score_pairs(PyObject *self, PyObject *arguments)
{
    Py_buffer rows, places, queries, digits, starts, weights, scale, out;
    Py_ssize_t width;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "y*ny*y*y*y*y*y*w*", &rows, &width, &places, &queries, &digits, &starts, &weights,
                          &scale, &out))
        return NULL;
    const Py_ssize_t n = out.len / (Py_ssize_t)sizeof(float), n_rows = width > 0 ? rows.len / width : 0;
    const Py_ssize_t n_queries = weights.len / (3 * (Py_ssize_t)sizeof(double));
    const int64_t *place = places.buf, *query = queries.buf;
    int fits = supported() && width > 0 && places.len == n * (Py_ssize_t)sizeof(int64_t) &&
               queries.len == places.len && scale.len == out.len && digits.len == n_queries * digits_size(3, width) &&
               starts.len == 3 * n_queries * (Py_ssize_t)sizeof(int32_t);
    for (Py_ssize_t i = 0; fits && i < n; i++)
        fits = place[i] >= 0 && place[i] < n_rows && query[i] >= 0 && query[i] < n_queries;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        score_each(rows.buf, place, query, n, width, digits.buf, starts.buf, weights.buf, scale.buf, out.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&rows);
    PyBuffer_Release(&places);
    PyBuffer_Release(&queries);
    PyBuffer_Release(&digits);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&weights);
    PyBuffer_Release(&scale);
    PyBuffer_Release(&out);
    return answer(fits);
}

static PyMethodDef methods[] = {
    {"supported", is_supported, METH_NOARGS, "supported() -> bool: this processor has what score_int8 is written for."},
    {"score_int8", score_int8, METH_VARARGS,
     "score_int8(rows, width, digits, starts, weights, scale, out): contiguous int8 [N, width], int8 digits in the order\n"
     "of their number of columns, int32 starts, float64 weights [G, Q], float32 scale [N] into float32 out [Q, N], rows of which may lie\n"
     "apart. Other threads run meanwhile."},
    {"score_pairs", score_pairs, METH_VARARGS,
     "score_pairs(rows, width, places, queries, digits, starts, weights, scale, out): of int8 [M, width] the rows at int64\n"
     "places [N], each with one of the queries, int64 [N]; each query's three digits in the narrow order, float64\n"
     "weights [Q, 3], float32 scale [N] into float32 out [N]. Other threads run meanwhile."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_products", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__products(void) { return PyModule_Create(&module); }
