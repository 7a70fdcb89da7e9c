/* What a front end counts for each version: the table behind `tallies.py`, which says what is counted.
 *
 * A row is two cache lines and lies where its slot says; a count of Python's integers would touch one
 * line for each number, and with hundreds of versions in turn none of them is in the cache.  Of batches
 * there is one entry for each version and size, in a chain that begins at the row.
 *
 * Invariants
 *  1. A row that is not listed is all zero; each listed row is listed once.
 *  2. Each entry in use is in the chain of one row; the others are in the chain of free ones.
 *
 * Called by one thread; holds the GIL.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

/* The word of `runtime/stages.py`. */
#define ROWS_BITS 13
#define REQUESTS_BITS 9
#define TIME_BITS 21
#define UNIT_NS 256
#define NUMBER_MAX ((int64_t)1 << 50) /* ns: 13 days; sums of thousands of these still fit */

enum { SUCCESS, FAILURE, QUEUE, COMPUTE, INPUT, OUTPUT, REQUEST, FAILED, INFERENCES, EXECUTIONS,
       BATCHES, NUMBERS };

typedef struct {
  uint64_t numbers[NUMBERS];
  uint32_t first;     /* entry + 1; 0: none */
  uint32_t is_listed;
} Row;

typedef struct {
  uint64_t executions, input_ns, infer_ns, output_ns;
  uint32_t rows, next; /* entry + 1; 0: the last */
} Entry;

typedef struct {
  PyObject_HEAD
  Row *rows;
  uint32_t *listed; /* slots, in the order in which they came; a ring of `slots` places */
  Entry *entries;
  uint32_t slots, first, count, entries_max, entries_used, free;
  uint64_t batch_unit;
} Counts;

static PyObject *counts_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  unsigned int slots;
  unsigned long long unit;
  (void)kwargs;
  if (!PyArg_ParseTuple(args, "IK", &slots, &unit)) return NULL;
  if (!slots || slots > INT32_MAX || !unit) {
    PyErr_SetString(PyExc_ValueError, "slots and the unit of a batch must be positive");
    return NULL;
  }
  Counts *self = (Counts *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->slots = slots;
  self->batch_unit = unit;
  /* Zero pages: only rows that are used take memory. */
  self->rows = PyMem_RawCalloc(slots, sizeof(Row));
  self->listed = PyMem_RawCalloc(slots, sizeof(uint32_t));
  if (!self->rows || !self->listed) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  return (PyObject *)self;
}

static void counts_dealloc(Counts *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyMem_RawFree(self->rows);
  PyMem_RawFree(self->listed);
  PyMem_RawFree(self->entries);
  type->tp_free(self);
  Py_DECREF(type);
}

/* Numbers come from a worker: what cannot be is cut to what can. */
static int to_numbers(PyObject *const *args, Py_ssize_t given, Py_ssize_t wanted, uint64_t *out) {
  if (given != wanted) {
    PyErr_Format(PyExc_TypeError, "%zd arguments, not %zd", wanted, given);
    return -1;
  }
  for (Py_ssize_t i = 0; i < given; i++) {
    int overflow;
    int64_t number = PyLong_AsLongLongAndOverflow(args[i], &overflow);
    if (number == -1 && PyErr_Occurred()) return -1;
    if (overflow > 0 || number > NUMBER_MAX) number = NUMBER_MAX;
    out[i] = number < 0 ? 0 : (uint64_t)number;
  }
  return 0;
}

static int to_word(PyObject *number, uint64_t *out) {
  *out = PyLong_AsUnsignedLongLong(number);
  return *out == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

/* The row of a slot, listed. */
static Row *row_of(Counts *self, uint64_t slot) {
  if (slot >= self->slots) {
    PyErr_Format(PyExc_IndexError, "slot %llu of %u", (unsigned long long)slot, self->slots);
    return NULL;
  }
  Row *row = &self->rows[slot];
  if (!row->is_listed) {
    row->is_listed = 1;
    self->listed[(self->first + self->count++) % self->slots] = (uint32_t)slot;
  }
  return row;
}

static int more_entries(Counts *self) {
  uint32_t grown = self->entries_max ? 2 * self->entries_max : 64;
  Entry *entries = PyMem_RawRealloc(self->entries, grown * sizeof(Entry));
  if (!entries) {
    PyErr_NoMemory();
    return -1;
  }
  self->entries = entries;
  self->entries_max = grown;
  return 0;
}

/* The entry of a size, first in the chain from now on. */
static Entry *entry_of(Counts *self, Row *row, uint32_t rows) {
  uint32_t *link = &row->first;
  while (*link) {
    Entry *entry = &self->entries[*link - 1];
    if (entry->rows == rows) {
      uint32_t found = *link;
      *link = entry->next;
      entry->next = row->first;
      row->first = found;
      return entry;
    }
    link = &entry->next;
  }
  uint32_t taken = self->free;
  if (taken) {
    self->free = self->entries[taken - 1].next;
  } else {
    if (self->entries_used == self->entries_max && more_entries(self) < 0) return NULL;
    taken = ++self->entries_used;
  }
  Entry *entry = &self->entries[taken - 1];
  *entry = (Entry){.rows = rows, .next = row->first};
  row->first = taken;
  return entry;
}

static int add_batch(Counts *self, Row *row, uint64_t compute_ns, uint64_t batch_size, uint64_t word) {
  uint32_t rows = word & ((1u << ROWS_BITS) - 1);
  uint64_t requests = word >> ROWS_BITS & ((1u << REQUESTS_BITS) - 1);
  uint64_t input_ns = (word >> (ROWS_BITS + REQUESTS_BITS) & ((1u << TIME_BITS) - 1)) * UNIT_NS;
  uint64_t output_ns = (word >> (ROWS_BITS + REQUESTS_BITS + TIME_BITS)) * UNIT_NS;
  Entry *entry = entry_of(self, row, rows);
  if (!entry) return -1;
  row->numbers[COMPUTE] += compute_ns * requests;
  row->numbers[INPUT] += input_ns * requests;
  row->numbers[OUTPUT] += output_ns * requests;
  row->numbers[INFERENCES] += rows;
  row->numbers[EXECUTIONS] += 1;
  row->numbers[BATCHES] += self->batch_unit * requests / (batch_size ? batch_size : 1);
  entry->executions += 1;
  entry->input_ns += input_ns;
  entry->output_ns += output_ns;
  if (compute_ns > input_ns + output_ns) entry->infer_ns += compute_ns - input_ns - output_ns;
  return 0;
}

static PyObject *counts_answer(Counts *self, PyObject *const *args, Py_ssize_t given) {
  uint64_t in[5], word; /* slot, request_ns, queue_ns, compute_ns, batch_size */
  if (to_numbers(args, given - 1, 5, in) < 0 || to_word(args[5], &word) < 0) return NULL;
  Row *row = row_of(self, in[0]);
  if (!row) return NULL;
  row->numbers[SUCCESS] += 1;
  row->numbers[REQUEST] += in[1];
  row->numbers[QUEUE] += in[2];
  if (word && add_batch(self, row, in[3], in[4], word) < 0) return NULL;
  Py_RETURN_NONE;
}

static PyObject *counts_batch(Counts *self, PyObject *const *args, Py_ssize_t given) {
  uint64_t in[3], word; /* slot, compute_ns, batch_size */
  if (to_numbers(args, given - 1, 3, in) < 0 || to_word(args[3], &word) < 0) return NULL;
  Row *row = row_of(self, in[0]);
  if (!row || add_batch(self, row, in[1], in[2], word) < 0) return NULL;
  Py_RETURN_NONE;
}

static PyObject *counts_failure(Counts *self, PyObject *const *args, Py_ssize_t given) {
  uint64_t in[2]; /* slot, request_ns */
  if (to_numbers(args, given, 2, in) < 0) return NULL;
  Row *row = row_of(self, in[0]);
  if (!row) return NULL;
  row->numbers[FAILURE] += 1;
  row->numbers[REQUEST] += in[1];
  row->numbers[FAILED] += in[1];
  Py_RETURN_NONE;
}

static PyObject *sizes_of(Counts *self, Row *row) {
  PyObject *sizes = PyList_New(0);
  if (!sizes) return NULL;
  for (uint32_t link = row->first; link; link = self->entries[link - 1].next) {
    Entry *entry = &self->entries[link - 1];
    PyObject *size = Py_BuildValue("(IKKKK)", entry->rows, entry->executions, entry->input_ns,
                                   entry->infer_ns, entry->output_ns);
    if (!size || PyList_Append(sizes, size) < 0) {
      Py_XDECREF(size);
      Py_DECREF(sizes);
      return NULL;
    }
    Py_DECREF(size);
  }
  return sizes;
}

static PyObject *counts_take(Counts *self, PyObject *none) {
  (void)none;
  if (!self->count) Py_RETURN_NONE;
  uint32_t slot = self->listed[self->first];
  Row *row = &self->rows[slot];
  PyObject *numbers = PyTuple_New(NUMBERS), *sizes = sizes_of(self, row);
  if (!numbers || !sizes) goto failed;
  for (int i = 0; i < NUMBERS; i++) {
    PyObject *number = PyLong_FromUnsignedLongLong(row->numbers[i]);
    if (!number) goto failed;
    PyTuple_SET_ITEM(numbers, i, number);
  }
  PyObject *taken = Py_BuildValue("(INN)", slot, numbers, sizes);
  if (!taken) return NULL;
  for (uint32_t link = row->first; link;) { /* the whole chain becomes free */
    uint32_t next = self->entries[link - 1].next;
    self->entries[link - 1].next = self->free;
    self->free = link;
    link = next;
  }
  memset(row, 0, sizeof *row);
  self->first = (self->first + 1) % self->slots;
  self->count -= 1;
  return taken;
failed:
  Py_XDECREF(numbers);
  Py_XDECREF(sizes);
  return NULL;
}

static Py_ssize_t counts_length(Counts *self) { return self->count; }

static PyMethodDef counts_methods[] = {
    {"answer", (PyCFunction)(void (*)(void))counts_answer, METH_FASTCALL, NULL},
    {"batch", (PyCFunction)(void (*)(void))counts_batch, METH_FASTCALL, NULL},
    {"failure", (PyCFunction)(void (*)(void))counts_failure, METH_FASTCALL, NULL},
    {"take", (PyCFunction)(void (*)(void))counts_take, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyType_Slot counts_slots[] = {{Py_tp_new, counts_new},
                                     {Py_tp_dealloc, counts_dealloc},
                                     {Py_tp_methods, counts_methods},
                                     {Py_sq_length, counts_length},
                                     {0, NULL}};
static PyType_Spec counts_spec = {.name = "overcommit.server._counts.Counts",
                                  .basicsize = sizeof(Counts),
                                  .flags = Py_TPFLAGS_DEFAULT,
                                  .slots = counts_slots};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "overcommit.server._counts",
                                    .m_size = -1};

PyMODINIT_FUNC PyInit__counts(void) {
  PyObject *made = PyModule_Create(&module), *type = made ? PyType_FromSpec(&counts_spec) : NULL;
  if (!type || PyModule_AddObject(made, "Counts", type) < 0) {
    Py_XDECREF(type);
    Py_XDECREF(made);
    return NULL;
  }
  return made;
}
