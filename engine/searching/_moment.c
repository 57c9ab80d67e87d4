/* out_q += sum over rows i of weight_i (row_i . vector_q) row_i, of stored int8 rows: a step of the conjugate gradients of
 * conjugate.py. A row is read once from memory; both products are made while it is in the processor's cache. And sums of
 * rows alone, out += sum over rows i of factor_i row_i.
 *
 * A vector is step times (digit + digit / STEPS), digits of 16 bits, and so are the factors weight_i (row_i . vector_q) of
 * a run of rows: both products are sums of whole numbers, and what is rounded is below 2^-31 of the largest entry or
 * factor. Sums of float32 are not enough: where a moment is nearly singular, its inverse makes their errors many times
 * larger. Sums of double take twice as long.
 *
 * VPMADDWD multiplies 16 pairs of 16 bits and adds twos of products to 8 int32. Elsewhere than on x86-64 with AVX2 the
 * loops are plain, with many running sums side by side, for the compiler to turn into vector code by itself.
 *
 * The limited API of Python 3.11: one build serves every later Python.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 32
#define ROWS 4 /* added at once: the sums are then loaded and stored once for so many rows */
#define RUN 64 /* rows that stay in the second-level cache; their products fit int32: 64 * 128 * 32767 < 2^31 */
#define LARGEST 32767.0
#define STEPS 65534.0
#define MOST_TERMS 2048 /* products that a lane of int32 can surely add: 2048 / 8 lanes * 128 * 32767 < 2^31 */

/* Products of a row with both digits, [2]: digits [2][width]. later: a row to ask for ahead. */
typedef void (*product_t)(const int8_t *row, const int8_t *later, const int16_t *digits, Py_ssize_t width, int64_t *sums);
/* sums [2][width] += digit_r row_r, of ROWS rows with digits [2][ROWS]. */
typedef void (*add_t)(const int8_t *const *rows, const int16_t (*digits)[ROWS], int32_t *sums, Py_ssize_t width);

static void last_products(const int8_t *row, const int16_t *digits, Py_ssize_t i, Py_ssize_t width, int64_t *sums)
{
    for (; i < width; i++) {
        sums[0] += (int32_t)row[i] * digits[i];
        sums[1] += (int32_t)row[i] * digits[width + i];
    }
}

static void last_added(const int8_t *const *rows, const int16_t (*digits)[ROWS], int32_t *sums, Py_ssize_t start,
                       Py_ssize_t width)
{
    const int8_t *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
    for (int place = 0; place < 2; place++, sums += width) {
        const int32_t e = digits[place][0], f = digits[place][1], g = digits[place][2], h = digits[place][3];
        for (Py_ssize_t i = start; i < width; i++)
            sums[i] += (a[i] * e + b[i] * f) + (c[i] * g + d[i] * h);
    }
}

static void plain_product(const int8_t *row, const int8_t *later, const int16_t *digits, Py_ssize_t width, int64_t *sums)
{
    (void)later;
    sums[0] = sums[1] = 0;
    Py_ssize_t i = 0;
    while (i + LANES <= width) {
        int32_t first[LANES] = {0}, second[LANES] = {0};
        const Py_ssize_t stop = width - i < MOST_TERMS ? width : i + MOST_TERMS;
        for (; i + LANES <= stop; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                first[lane] += (int32_t)row[i + lane] * digits[i + lane];
                second[lane] += (int32_t)row[i + lane] * digits[width + i + lane];
            }
        for (int lane = 0; lane < LANES; lane++) {
            sums[0] += first[lane];
            sums[1] += second[lane];
        }
    }
    last_products(row, digits, i, width, sums);
}

static void plain_add(const int8_t *const *rows, const int16_t (*digits)[ROWS], int32_t *sums, Py_ssize_t width)
{
    last_added(rows, digits, sums, 0, width);
}

static product_t product = plain_product;
static add_t add = plain_add;

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))

/* total += 16 codes times 16 digits */
AVX2 static inline __m256i with_digits(__m256i total, __m256i codes, const int16_t *digits)
{
    return _mm256_add_epi32(total, _mm256_madd_epi16(codes, _mm256_loadu_si256((const __m256i *)digits)));
}

/* The sum of 8 int32, which itself may need more bits. */
AVX2 static inline int64_t sum_of(__m256i eight)
{
    const __m256i four = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(eight)),
                                          _mm256_cvtepi32_epi64(_mm256_extracti128_si256(eight, 1)));
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
    return _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
}

AVX2 static void avx2_product(const int8_t *row, const int8_t *later, const int16_t *digits, Py_ssize_t width,
                              int64_t *sums)
{
    sums[0] = sums[1] = 0;
    Py_ssize_t i = 0;
    while (i + LANES <= width) {
        const Py_ssize_t stop = width - i < MOST_TERMS ? width : i + MOST_TERMS;
        __m256i first[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, second[2] = {first[0], first[0]};
        for (; i + LANES <= stop; i += LANES) {
            _mm_prefetch((const char *)later + i, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const Py_ssize_t k = i + 16 * half;
                const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(row + k)));
                first[half] = with_digits(first[half], codes, digits + k);
                second[half] = with_digits(second[half], codes, digits + width + k);
            }
        }
        sums[0] += sum_of(_mm256_add_epi32(first[0], first[1]));
        sums[1] += sum_of(_mm256_add_epi32(second[0], second[1]));
    }
    last_products(row, digits, i, width, sums);
}

AVX2 static void avx2_add(const int8_t *const *rows, const int16_t (*digits)[ROWS], int32_t *sums, Py_ssize_t width)
{
    const int8_t *const row[ROWS] = {rows[0], rows[1], rows[2], rows[3]};
    __m256i pair[2][2]; /* [place][rows 0 and 1, 2 and 3] */
    Py_ssize_t i = 0;
    for (int k = 0; k < 4; k++) {
        int32_t both;
        memcpy(&both, digits[k / 2] + k % 2 * 2, sizeof both);
        pair[k / 2][k % 2] = _mm256_set1_epi32(both);
    }
    for (; i + 16 <= width; i += 16) {
        __m256i codes[2][2]; /* [rows 0 and 1, 2 and 3][columns up to 7, from 8 on], two rows side by side */
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            const __m128i a = _mm_loadu_si128((const __m128i *)(row[2 * k] + i));
            const __m128i b = _mm_loadu_si128((const __m128i *)(row[2 * k + 1] + i));
            codes[k][0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b));
            codes[k][1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b));
        }
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            __m256i *eight = (__m256i *)(sums + k / 2 * width + i + k % 2 * 8);
            const __m256i two = _mm256_add_epi32(_mm256_madd_epi16(codes[0][k % 2], pair[k / 2][0]),
                                                 _mm256_madd_epi16(codes[1][k % 2], pair[k / 2][1]));
            _mm256_storeu_si256(eight, _mm256_add_epi32(_mm256_loadu_si256(eight), two));
        }
    }
    last_added(rows, digits, sums, i, width);
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
#else
#define avx2_product plain_product
#define avx2_add plain_add
static int has_avx2(void) { return 0; }
#endif

/* Factors as step * (digit + digit / STEPS), in groups [RUN / ROWS][2][ROWS]; the step. */
static double digits_of(const double *factors, Py_ssize_t n, int16_t (*digits)[2][ROWS])
{
    double largest = 0;
    for (Py_ssize_t i = 0; i < n; i++)
        largest = fabs(factors[i]) > largest ? fabs(factors[i]) : largest;
    const double step = largest / LARGEST;
    for (Py_ssize_t i = 0; i < (n + ROWS - 1) / ROWS * ROWS; i++) {
        const double scaled = i < n && step > 0 ? factors[i] / step : 0, first = rint(scaled);
        digits[i / ROWS][0][i % ROWS] = (int16_t)first;
        digits[i / ROWS][1][i % ROWS] = (int16_t)rint((scaled - first) * STEPS);
    }
    return step;
}

/* out += factor_i row_i, of one run of at most RUN rows. sums: room for int32 [2][width]. */
static void add_run(const int8_t *const *rows, Py_ssize_t n, Py_ssize_t width, const double *factors, int32_t *sums,
                    double *out)
{
    int16_t digits[RUN / ROWS][2][ROWS];
    const double step = digits_of(factors, n, digits);
    memset(sums, 0, (size_t)(2 * width) * sizeof(*sums));
    for (Py_ssize_t i = 0; i < n; i += ROWS)
        add(rows + i, (const int16_t(*)[ROWS])digits[i / ROWS], sums, width);
    for (Py_ssize_t i = 0; i < width; i++)
        out[i] += step * (sums[i] + sums[width + i] / STEPS);
}

/* The rows of the run that begins at `start`, and those that come next, to ask for ahead. */
static void rows_of_run(const int8_t *codes, const int64_t *places, Py_ssize_t start, Py_ssize_t n, Py_ssize_t width,
                        const int8_t **rows)
{
    for (Py_ssize_t i = 0; i < RUN + ROWS; i++) {
        const Py_ssize_t here = start + i < n ? start + i : n - 1;
        rows[i] = codes + (places ? (Py_ssize_t)places[here] : here) * width;
    }
}

static void multiply_runs(const int8_t *codes, const int64_t *places, Py_ssize_t n, Py_ssize_t width, const double *weights,
                          const int16_t *digits, const double *steps, Py_ssize_t n_vectors, int32_t *sums, double *out)
{
    for (Py_ssize_t start = 0; start < n; start += RUN) {
        const int8_t *rows[RUN + ROWS];
        const Py_ssize_t here = n - start < RUN ? n - start : RUN;
        rows_of_run(codes, places, start, n, width, rows);
        for (Py_ssize_t q = 0; q < n_vectors; q++) {
            double factors[RUN];
            for (Py_ssize_t i = 0; i < here; i++) {
                int64_t own[2];
                product(rows[i], rows[i + ROWS], digits + 2 * q * width, width, own);
                factors[i] = weights[start + i] * steps[q] * ((double)own[0] + (double)own[1] / STEPS);
            }
            add_run(rows, here, width, factors, sums, out + q * width);
        }
    }
}

static void add_runs(const int8_t *codes, const int64_t *places, Py_ssize_t n, Py_ssize_t width, const double *factors,
                     int32_t *sums, double *out)
{
    for (Py_ssize_t start = 0; start < n; start += RUN) {
        const int8_t *rows[RUN + ROWS];
        rows_of_run(codes, places, start, n, width, rows);
        add_run(rows, n - start < RUN ? n - start : RUN, width, factors + start, sums, out);
    }
}

static int places_fit(const Py_buffer *places, Py_ssize_t n, Py_ssize_t n_rows)
{
    const int64_t *place = places->buf;
    if (!places->len)
        return n == n_rows;
    int fits = places->len == 8 * n;
    for (Py_ssize_t i = 0; fits && i < n; i++)
        fits = place[i] >= 0 && place[i] < n_rows;
    return fits;
}

/* The end of a function of this module: `sums` was there and was used, or not. */
static PyObject *answer(Py_buffer *buffers, int n_buffers, int fits, int32_t *sums)
{
    for (int i = 0; i < n_buffers; i++)
        PyBuffer_Release(&buffers[i]);
    PyMem_Free(sums);
    if (fits && sums)
        Py_RETURN_NONE;
    if (fits)
        return PyErr_NoMemory();
    PyErr_SetString(PyExc_ValueError, "the buffers' sizes do not agree");
    return NULL;
}

static PyObject *moment_int8(PyObject *self, PyObject *arguments)
{
    enum { ROW_CODES, PLACES, WEIGHTS, DIGITS, STEPS_OF, OUT, N_BUFFERS };
    Py_buffer buffer[N_BUFFERS];
    Py_ssize_t width;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "ny*y*y*y*y*w*", &width, &buffer[ROW_CODES], &buffer[PLACES], &buffer[WEIGHTS],
                          &buffer[DIGITS], &buffer[STEPS_OF], &buffer[OUT]))
        return NULL;
    const Py_ssize_t n = buffer[WEIGHTS].len / 8, n_rows = width > 0 ? buffer[ROW_CODES].len / width : 0;
    const Py_ssize_t n_vectors = buffer[STEPS_OF].len / 8;
    const int fits = width > 0 && buffer[ROW_CODES].len == n_rows * width && buffer[WEIGHTS].len == 8 * n &&
                     buffer[STEPS_OF].len == 8 * n_vectors && buffer[OUT].len == 8 * n_vectors * width &&
                     buffer[DIGITS].len == 4 * n_vectors * width && places_fit(&buffer[PLACES], n, n_rows);
    int32_t *sums = fits ? PyMem_Malloc((size_t)(2 * width) * sizeof(*sums)) : NULL;
    if (sums) {
        Py_BEGIN_ALLOW_THREADS
        multiply_runs(buffer[ROW_CODES].buf, buffer[PLACES].len ? buffer[PLACES].buf : NULL, n, width,
                      buffer[WEIGHTS].buf, buffer[DIGITS].buf, buffer[STEPS_OF].buf, n_vectors, sums, buffer[OUT].buf);
        Py_END_ALLOW_THREADS
    }
    return answer(buffer, N_BUFFERS, fits, sums);
}

static PyObject *sum_int8(PyObject *self, PyObject *arguments)
{
    enum { ROW_CODES, PLACES, FACTORS, OUT, N_BUFFERS };
    Py_buffer buffer[N_BUFFERS];
    Py_ssize_t width;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "ny*y*y*w*", &width, &buffer[ROW_CODES], &buffer[PLACES], &buffer[FACTORS],
                          &buffer[OUT]))
        return NULL;
    const Py_ssize_t n = buffer[FACTORS].len / 8, n_rows = width > 0 ? buffer[ROW_CODES].len / width : 0;
    const int fits = width > 0 && buffer[ROW_CODES].len == n_rows * width && buffer[FACTORS].len == 8 * n &&
                     buffer[OUT].len == 8 * width && places_fit(&buffer[PLACES], n, n_rows);
    int32_t *sums = fits ? PyMem_Malloc((size_t)(2 * width) * sizeof(*sums)) : NULL;
    if (sums) {
        Py_BEGIN_ALLOW_THREADS
        add_runs(buffer[ROW_CODES].buf, buffer[PLACES].len ? buffer[PLACES].buf : NULL, n, width, buffer[FACTORS].buf,
                 sums, buffer[OUT].buf);
        Py_END_ALLOW_THREADS
    }
    return answer(buffer, N_BUFFERS, fits, sums);
}

static PyObject *use_avx2(PyObject *self, PyObject *arguments)
{
    int wanted = -1;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "|p", &wanted))
        return NULL;
    if (wanted >= 0) {
        product = wanted && has_avx2() ? avx2_product : plain_product;
        add = wanted && has_avx2() ? avx2_add : plain_add;
    }
    return PyBool_FromLong(product != plain_product);
}

static PyMethodDef methods[] = {
    {"moment_int8", moment_int8, METH_VARARGS,
     "moment_int8(width, rows, places, weights, digits, steps, out): of int8 rows [M, width] those at int64 places [N]\n"
     "(empty: all), with float64 weights [N]; vectors as int16 digits [Q, 2, width], of at most 32767, and float64 steps\n"
     "[Q]; adds to float64 out [Q, width]. Other threads run meanwhile."},
    {"sum_int8", sum_int8, METH_VARARGS,
     "sum_int8(width, rows, places, factors, out): the same rows with float64 factors [N]; adds to float64 out [width]."},
    {"avx2", use_avx2, METH_VARARGS,
     "avx2() -> whether AVX2 is in use. avx2(wanted): from now on only if wanted, for tests."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_moment", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__moment(void)
{
    if (has_avx2()) {
        product = avx2_product;
        add = avx2_add;
    }
    return PyModule_Create(&module);
}
