/* Float32 rows to int8 codes in one trip through memory: gradstore/quantise.py says what the numbers mean.
 *
 * Each row is read twice, the second time from the processor's cache: once for its peak, once for its codes, its length
 * and theirs. Loops are written so that a compiler turns them into vector code by itself: many running sums side by
 * side, and the peak taken over bit patterns (for floats without their sign the order of the bits is the order of the
 * numbers, and everything from 0x7f800000 on is infinite or not a number).
 *
 * The limited API of Python 3.11: one build serves every later Python.
 */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__) && !defined(__clang__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

#define LANES 64
#define RUN 1024
#define LARGEST 127.0f
#define NOT_FINITE 0x7f800000u
#define TINY 1e-30f /* LARGEST over a peak above this is finite */

FOR_EVERY_PROCESSOR
static float peak_of(const float *row, Py_ssize_t dim)
{
    uint32_t largest[LANES] = {0}, bits;
    Py_ssize_t i = 0;
    for (; i + LANES <= dim; i += LANES) {
        uint32_t block[LANES];
        memcpy(block, row + i, sizeof block);
        for (int lane = 0; lane < LANES; lane++) {
            uint32_t value = block[lane] & 0x7fffffffu;
            largest[lane] = value > largest[lane] ? value : largest[lane];
        }
    }
    for (; i < dim; i++) {
        memcpy(&bits, row + i, sizeof bits);
        bits &= 0x7fffffffu;
        largest[0] = bits > largest[0] ? bits : largest[0];
    }
    for (int lane = 1; lane < LANES; lane++)
        largest[0] = largest[lane] > largest[0] ? largest[lane] : largest[0];
    float peak;
    memcpy(&peak, largest, sizeof peak);
    return peak;
}

/* Codes of so many values of a row * factor, a multiple of LANES and at most RUN, so that the first sum loses no digits
 * and the second is exact; adds the squared length of row * factor, and that of the codes. */
FOR_EVERY_PROCESSOR
static void run_of_codes(const float *row, Py_ssize_t n, float factor, int8_t *codes, double *squared, double *of_codes)
{
    float sums[LANES] = {0}, code_sums[LANES] = {0};
    for (Py_ssize_t i = 0; i < n; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) {
            float value = row[i + lane] * factor;
            sums[lane] += value * value;
            float code = rintf(value);
            codes[i + lane] = (int8_t)(int32_t)code;
            code_sums[lane] += code * code;
        }
    }
    for (int lane = 0; lane < LANES; lane++) {
        *squared += sums[lane];
        *of_codes += code_sums[lane];
    }
}

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* The same where compilers round and narrow in half as many steps only when told how. */
__attribute__((target("avx512f"))) static void run_of_codes_avx512(const float *row, Py_ssize_t n, float factor,
                                                                   int8_t *codes, double *squared, double *of_codes)
{
    __m512 sums[LANES / 16], code_sums[LANES / 16];
    for (int v = 0; v < LANES / 16; v++)
        sums[v] = code_sums[v] = _mm512_setzero_ps();
    for (Py_ssize_t i = 0; i < n; i += LANES)
        _Pragma("GCC unroll 8") for (int v = 0; v < LANES / 16; v++) {
            const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(row + i + 16 * v), _mm512_set1_ps(factor));
            const __m512i code = _mm512_cvtps_epi32(value); /* to the nearest, of two to the even one, as rintf */
            const __m512 as_float = _mm512_cvtepi32_ps(code);
            sums[v] = _mm512_fmadd_ps(value, value, sums[v]);
            code_sums[v] = _mm512_fmadd_ps(as_float, as_float, code_sums[v]);
            _mm_storeu_si128((__m128i *)(codes + i + 16 * v), _mm512_cvtepi32_epi8(code));
        }
    for (int v = 0; v < LANES / 16; v++) {
        *squared += _mm512_reduce_add_ps(sums[v]);
        *of_codes += _mm512_reduce_add_ps(code_sums[v]);
    }
}
#define HAS_AVX512 __builtin_cpu_supports("avx512f")
#else
#define HAS_AVX512 0
#define run_of_codes_avx512 run_of_codes
#endif

static void codes_of(const float *row, Py_ssize_t dim, float factor, int8_t *codes, double *squared, double *of_codes)
{
    Py_ssize_t i = 0;
    for (Py_ssize_t n; (n = (dim - i < RUN ? dim - i : RUN) / LANES * LANES) > 0; i += n)
        (HAS_AVX512 ? run_of_codes_avx512 : run_of_codes)(row + i, n, factor, codes + i, squared, of_codes);
    for (; i < dim; i++) {
        float value = row[i] * factor;
        float code = rintf(value);
        codes[i] = (int8_t)code;
        *squared += (double)value * value;
        *of_codes += (double)code * code;
    }
}

static void encode_row(const float *row, Py_ssize_t dim, int8_t *codes, float *scale, double *norm, float *peak)
{
    double squared = 0, of_codes = 0;
    *peak = peak_of(row, dim);
    *scale = 0;
    *norm = 0;
    if (!(*peak > 0) || !isfinite(*peak)) {
        memset(codes, 0, (size_t)dim);
        return;
    }
    if (*peak > TINY) {
        codes_of(row, dim, LARGEST / *peak, codes, &squared, &of_codes);
    } else {
        for (Py_ssize_t i = 0; i < dim; i++) {
            double value = (double)row[i] / *peak * LARGEST;
            double code = rint(value);
            codes[i] = (int8_t)code;
            squared += value * value;
            of_codes += code * code;
        }
    }
    *norm = (double)*peak / LARGEST * sqrt(squared);
    *scale = (float)(1 / sqrt(of_codes));
}

static PyObject *encode_int8(PyObject *self, PyObject *arguments)
{
    Py_buffer rows, codes, scale, norm, peak;
    Py_ssize_t dim;
    (void)self;
    if (!PyArg_ParseTuple(arguments, "y*w*w*w*w*n", &rows, &codes, &scale, &norm, &peak, &dim))
        return NULL;
    Py_ssize_t n_rows = scale.len / (Py_ssize_t)sizeof(float);
    int fits = dim > 0 && rows.len == n_rows * dim * (Py_ssize_t)sizeof(float) && codes.len == n_rows * dim &&
               norm.len == n_rows * (Py_ssize_t)sizeof(double) && peak.len == scale.len;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t p = 0; p < n_rows; p++)
            encode_row((const float *)rows.buf + p * dim, dim, (int8_t *)codes.buf + p * dim, (float *)scale.buf + p,
                       (double *)norm.buf + p, (float *)peak.buf + p);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&rows);
    PyBuffer_Release(&codes);
    PyBuffer_Release(&scale);
    PyBuffer_Release(&norm);
    PyBuffer_Release(&peak);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the buffers' sizes do not agree");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"encode_int8", encode_int8, METH_VARARGS,
     "encode_int8(rows, codes, scale, norm, peak, dim): contiguous float32 [P, D] rows into int8 [P, D] codes, float32\n"
     "[P] scale, float64 [P] norm and float32 [P] peak. Other threads run meanwhile."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_encode", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__encode(void) { return PyModule_Create(&module); }
