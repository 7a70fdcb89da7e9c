/* The CPU path of `digest.py`, whose docstring defines the digest.  Reads the buffer, nothing else. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "digests are of little-endian words"
#endif

#define GOLDEN 0x9E3779B97F4A7C15ull
#define TAIL 0xC2B2AE3D27D4EB4Full
#define MIX 0xD6E8FEB86659FD93ull

static inline uint64_t term(uint64_t word, uint64_t key) {
  uint64_t x = word ^ key;
  x = (x ^ x >> 32) * MIX;
  return x ^ x >> 29;
}

/* Scalar on purpose: one multiplication a word is as fast as memory, and needs no vector unit. */
static uint64_t sum(const uint8_t *data, size_t nbytes, uint64_t first) {
  uint64_t a = 0, b = 0, c = 0, d = 0, key = (first + 1) * GOLDEN;
  size_t i = 0;
  for (; i + 32 <= nbytes; i += 32, key += 4 * GOLDEN) {
    uint64_t w[4];
    memcpy(w, data + i, 32);
    a += term(w[0], key);
    b += term(w[1], key + GOLDEN);
    c += term(w[2], key + 2 * GOLDEN);
    d += term(w[3], key + 3 * GOLDEN);
  }
  for (; i < nbytes; i += 8, key += GOLDEN) {
    uint64_t word = 0, left = nbytes - i;
    memcpy(&word, data + i, left < 8 ? left : 8);
    a += term(left < 8 ? word ^ left * TAIL : word, key);
  }
  return a + b + c + d;
}

static PyObject *digest(PyObject *self, PyObject *args) {
  (void)self;
  Py_buffer data;
  unsigned long long first, found;
  if (!PyArg_ParseTuple(args, "y*K", &data, &first)) return NULL;
  Py_BEGIN_ALLOW_THREADS;
  found = sum(data.buf, (size_t)data.len, first);
  Py_END_ALLOW_THREADS;
  PyBuffer_Release(&data);
  return PyLong_FromUnsignedLongLong(found);
}

static PyMethodDef functions[] = {{"digest", digest, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "overcommit.kernels._digest",
                                    .m_size = -1, .m_methods = functions};

PyMODINIT_FUNC PyInit__digest(void) { return PyModule_Create(&module); }
