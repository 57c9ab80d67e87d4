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

/* Codes of row * factor; the squared length of row * factor, and that of the codes. */
FOR_EVERY_PROCESSOR
static void codes_of(const float *row, Py_ssize_t dim, float factor, int8_t *codes, double *squared, double *of_codes)
{
    double total = 0, total_codes = 0;
    Py_ssize_t i = 0;
    while (i + LANES <= dim) {
        /* short runs, so that the first sum loses no digits and the second is exact */
        Py_ssize_t stop = dim - i > 1024 ? i + 1024 : i + (dim - i) / LANES * LANES;
        float sums[LANES] = {0}, code_sums[LANES] = {0};
        for (; i < stop; i += LANES) {
            for (int lane = 0; lane < LANES; lane++) {
                float value = row[i + lane] * factor;
                sums[lane] += value * value;
                float code = rintf(value);
                codes[i + lane] = (int8_t)(int32_t)code;
                code_sums[lane] += code * code;
            }
        }
        for (int lane = 0; lane < LANES; lane++) {
            total += sums[lane];
            total_codes += code_sums[lane];
        }
    }
    for (; i < dim; i++) {
        float value = row[i] * factor;
        float code = rintf(value);
        codes[i] = (int8_t)code;
        total += (double)value * value;
        total_codes += (double)code * code;
    }
    *squared = total;
    *of_codes = total_codes;
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
