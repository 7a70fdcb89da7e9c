/* Shared-memory mechanics: rings, doorbells, residency and lease words, fixed mappings.
 *
 * No policy.  Every shared word has exactly one writer; the comment at the word names it.
 *
 * Invariants
 *  1. A slot is visible to the consumer only after its bytes are complete: the producer fills it,
 *     then stores `tail` with release; the consumer loads `tail` with acquire, then reads the slot.
 *  2. A consumer that sleeps is woken: it stores `armed`, full fence, looks at every `tail`; the
 *     producer stores `tail`, full fence, looks at `armed`.  One of the two sees the other.
 *  3. A version is not evicted under a lease: the worker stores its lease, full fence, looks at the
 *     state; the supervisor stores EVICTING, full fence, looks at the leases.  One sees the other.
 *  4. What a peer wrote is copied before it is checked, and checked before it is used.
 *
 * Compiled with OVERCOMMIT_OMIT_FENCE (tests only) the full fences of 2 and 3 are left out, so that
 * the litmus tests can show that they would see the bug.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if !defined(__linux__)
#error "overcommit runs on Linux only: it needs memfd, eventfd, pidfd and SCM_RIGHTS"
#endif

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "_shm_fence.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

#define LINE 128 /* two 64-byte lines: x86 prefetches pairs, aarch64 servers have 64 or 128 */
#define PAGE 4096
#define RING_MAGIC 0x474e5243u
#define TABLE_MAGIC 0x53455243u
#define LAYOUT_VERSION 1
#define STATUS_BATCH_MAX 64
#define RESERVE_ALIGN ((size_t)2 << 20)

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* --- layouts ---------------------------------------------------------------------------------- */

typedef struct {
  _Alignas(LINE) uint32_t magic; /* supervisor, before the fd is sent; constant after */
  uint16_t version, slot_bytes;
  uint32_t slot_count, slot_kind;
  uint32_t producer_epoch, consumer_epoch;
  _Alignas(LINE) _Atomic uint64_t tail;  /* producer only: slots ever published (release) */
  _Alignas(LINE) _Atomic uint64_t head;  /* consumer only: slots ever consumed (release) */
  _Alignas(LINE) _Atomic uint32_t armed; /* consumer only: 1 = I sleep, ring my doorbell */
} ring_header;

typedef struct {
  uint64_t seq; /* position + 1: a check against bugs, never synchronisation */
  uint64_t request_id, deadline_ns, submitted_ns;
  uint64_t in_offset, out_offset;
  uint32_t in_length, out_capacity;
  uint16_t kind, model;
  uint32_t flags;
} submission;

typedef struct {
  uint64_t seq;
  uint64_t request_id, taken_ns, started_ns, finished_ns;
  uint32_t out_length;
  uint16_t status, batch_size;
  uint64_t detail, reserved;
} completion;

typedef struct { /* the worker alone writes it */
  _Alignas(LINE) _Atomic uint64_t heartbeat_ns;
  _Atomic uint64_t batch_started_ns; /* 0 = idle; stored last in begin (release) */
  _Atomic uint32_t phase, model, batch_count;
  _Alignas(LINE) _Atomic uint64_t batch_request_id[STATUS_BATCH_MAX];
} worker_status;

typedef struct {
  _Alignas(LINE) uint32_t magic; /* supervisor, at creation */
  uint32_t count;
  _Alignas(LINE) _Atomic uint32_t hungry; /* supervisor: somebody waits for room */
} table_header; /* followed by one _Atomic uint64_t per slot: generation << 8 | state; supervisor */

typedef struct { /* the worker alone writes it */
  _Atomic uint32_t lease, waiting;
  _Atomic uint64_t uses, last_used_ns;
  uint64_t reserved;
} lease_entry;

_Static_assert(sizeof(ring_header) == 4 * LINE, "one line per writer");
_Static_assert(offsetof(ring_header, tail) == LINE, "tail has its own line");
_Static_assert(offsetof(ring_header, head) == 2 * LINE, "head has its own line");
_Static_assert(offsetof(ring_header, armed) == 3 * LINE, "armed has its own line");
_Static_assert(sizeof(submission) == 64, "a submission is one cache line");
_Static_assert(sizeof(completion) == 64, "a completion is one cache line");
_Static_assert(sizeof(worker_status) == LINE + STATUS_BATCH_MAX * 8, "status layout");
_Static_assert(sizeof(worker_status) <= PAGE, "status fits a page");
_Static_assert(sizeof(table_header) == 2 * LINE, "hungry has its own line");
_Static_assert(sizeof(lease_entry) == 32, "four entries a line");
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "lock-free atomics");

enum { SUBMIT = 1, CANCEL = 2 };
enum { OK, MORE, EXPIRED, OVERLOADED, CANCELLED, TOO_LARGE, MODEL_ERROR, NOT_RESIDENT, BAD_REQUEST };
enum { ABSENT, LOADING, RESIDENT, EVICTING };
enum { PHASE_IDLE, PHASE_LOAD, PHASE_COPY_IN, PHASE_COMPUTE, PHASE_COPY_OUT };
enum { DOORBELL = 1, CONTROL = 2 };
enum { KIND_SUBMISSION = 1, KIND_COMPLETION = 2 };

static PyObject *RingCorrupt;

static size_t page_up(size_t n) { return (n + PAGE - 1) & ~(size_t)(PAGE - 1); }

/* Take the buffer and check that [offset, offset + need) lies in it, aligned for atomics. */
static void *hold(PyObject *buffer, Py_buffer *view, Py_ssize_t offset, size_t need, int writable) {
  if (PyObject_GetBuffer(buffer, view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) < 0) return NULL;
  if (offset < 0 || offset > view->len || need > (size_t)(view->len - offset)) {
    PyErr_Format(PyExc_ValueError, "needs %zu bytes at offset %zd, the buffer has %zd", need,
                 offset, view->len);
  } else if (((uintptr_t)view->buf + (size_t)offset) % LINE) {
    PyErr_Format(PyExc_ValueError, "offset %zd is not aligned to %d bytes", offset, LINE);
  } else {
    return (char *)view->buf + offset;
  }
  PyBuffer_Release(view);
  view->obj = NULL;
  return NULL;
}

static int as_u64(PyObject *value, uint64_t *out) {
  *out = PyLong_AsUnsignedLongLong(value);
  return *out == UINT64_MAX && PyErr_Occurred() ? -1 : 0;
}

static int as_bounded(PyObject *value, uint64_t limit, const char *name, uint64_t *out) {
  if (as_u64(value, out) < 0) return -1;
  if (*out > limit) {
    PyErr_Format(PyExc_OverflowError, "%s is over its field", name);
    return -1;
  }
  return 0;
}

/* --- rings ------------------------------------------------------------------------------------ */

typedef struct {
  PyObject_HEAD
  Py_buffer view;
  ring_header *ring;
  char *slots;
  uint64_t mask;
  uint64_t mine;   /* private copy of the counter that this side writes */
  uint64_t theirs; /* last seen value of the other one */
  int producer;
} Ring;

static PyTypeObject SubmissionRingType, CompletionRingType;

static size_t ring_size(uint64_t slots) { return page_up(sizeof(ring_header) + slots * 64); }

static int check_slots(unsigned long slots) {
  if (slots == 0 || slots > (1u << 20) || (slots & (slots - 1))) {
    PyErr_SetString(PyExc_ValueError, "slot_count must be a power of two up to 2**20");
    return -1;
  }
  return 0;
}

static PyObject *py_ring_bytes(PyObject *m, PyObject *arg) {
  (void)m;
  unsigned long slots = PyLong_AsUnsignedLong(arg);
  if (PyErr_Occurred() || check_slots(slots) < 0) return NULL;
  return PyLong_FromSize_t(ring_size(slots));
}

static PyObject *py_create_ring(PyObject *m, PyObject *args) {
  (void)m;
  PyObject *buffer;
  Py_ssize_t offset;
  unsigned int slots, kind, producer_epoch, consumer_epoch;
  if (!PyArg_ParseTuple(args, "OnIIII", &buffer, &offset, &slots, &kind, &producer_epoch,
                        &consumer_epoch) ||
      check_slots(slots) < 0)
    return NULL;
  if (kind != KIND_SUBMISSION && kind != KIND_COMPLETION) {
    PyErr_SetString(PyExc_ValueError, "slot_kind must be 1 (submission) or 2 (completion)");
    return NULL;
  }
  Py_buffer view;
  ring_header *ring = hold(buffer, &view, offset, ring_size(slots), 1);
  if (!ring) return NULL;
  memset(ring, 0, sizeof *ring);
  ring->version = LAYOUT_VERSION;
  ring->slot_bytes = 64;
  ring->slot_count = slots;
  ring->slot_kind = kind;
  ring->producer_epoch = producer_epoch;
  ring->consumer_epoch = consumer_epoch;
  ring->magic = RING_MAGIC;
  PyBuffer_Release(&view);
  Py_RETURN_NONE;
}

static int Ring_init(Ring *self, PyObject *args, PyObject *kw) {
  PyObject *buffer;
  Py_ssize_t offset;
  int producer;
  unsigned int producer_epoch, consumer_epoch;
  static char *names[] = {"buffer", "offset", "producer", "producer_epoch", "consumer_epoch", NULL};
  if (!PyArg_ParseTupleAndKeywords(args, kw, "OnpII", names, &buffer, &offset, &producer,
                                   &producer_epoch, &consumer_epoch))
    return -1;
  if (self->view.obj) {
    PyErr_SetString(PyExc_ValueError, "a ring is initialised once");
    return -1;
  }
  ring_header *ring = hold(buffer, &self->view, offset, sizeof *ring, 1);
  if (!ring) return -1;
  uint32_t kind = PyObject_TypeCheck(self, &SubmissionRingType) ? KIND_SUBMISSION : KIND_COMPLETION;
  ring_header seen = {.magic = ring->magic,
                      .version = ring->version,
                      .slot_bytes = ring->slot_bytes,
                      .slot_count = ring->slot_count,
                      .slot_kind = ring->slot_kind,
                      .producer_epoch = ring->producer_epoch,
                      .consumer_epoch = ring->consumer_epoch};
  if (seen.magic != RING_MAGIC || seen.version != LAYOUT_VERSION || seen.slot_bytes != 64 ||
      seen.slot_kind != kind) {
    PyErr_SetString(RingCorrupt, "not this kind of ring, or of another layout version");
  } else if (seen.producer_epoch != producer_epoch || seen.consumer_epoch != consumer_epoch) {
    PyErr_SetString(RingCorrupt, "the ring belongs to other incarnations");
  } else if (seen.slot_count == 0 || (seen.slot_count & (seen.slot_count - 1)) ||
             ring_size(seen.slot_count) > (size_t)(self->view.len - offset)) {
    PyErr_SetString(RingCorrupt, "the ring does not fit its memory");
  } else {
    self->ring = ring;
    self->slots = (char *)(ring + 1);
    self->mask = seen.slot_count - 1;
    self->producer = producer;
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_acquire);
    uint64_t head = atomic_load_explicit(&ring->head, memory_order_acquire);
    self->mine = producer ? tail : head;
    self->theirs = producer ? head : tail;
    return 0;
  }
  PyBuffer_Release(&self->view);
  self->view.obj = NULL;
  return -1;
}

static void Ring_dealloc(Ring *self) {
  if (self->view.obj) PyBuffer_Release(&self->view);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static int ring_side(Ring *self, int producer) {
  if (!self->ring || self->producer != producer) {
    PyErr_SetString(PyExc_ValueError, producer ? "only the producer may push" : "only the consumer may pop");
    return -1;
  }
  return 0;
}

/* The next free slot, or NULL when the ring is full. */
static void *ring_vacant(Ring *self) {
  if (self->mine - self->theirs > self->mask) {
    self->theirs = atomic_load_explicit(&self->ring->head, memory_order_acquire);
    if (self->mine - self->theirs > self->mask) return NULL;
  }
  return self->slots + (self->mine & self->mask) * 64;
}

static void ring_publish(Ring *self) {
  self->mine++;
  atomic_store_explicit(&self->ring->tail, self->mine, memory_order_release);
}

/* How many slots may be taken, at most `limit`; -1 with an exception when the counters lie. */
static Py_ssize_t ring_waiting(Ring *self, Py_ssize_t limit) {
  if (self->theirs - self->mine < (uint64_t)limit) /* the cached tail may be old: look again */
    self->theirs = atomic_load_explicit(&self->ring->tail, memory_order_acquire);
  uint64_t count = self->theirs - self->mine;
  if (count > self->mask + 1) {
    PyErr_SetString(RingCorrupt, "the tail is out of range");
    return -1;
  }
  return count > (uint64_t)limit ? limit : (Py_ssize_t)count;
}

static PyObject *Submission_push(Ring *self, PyObject *const *a, Py_ssize_t n) {
  if (n != 9) {
    PyErr_SetString(PyExc_TypeError, "push() takes 9 arguments");
    return NULL;
  }
  if (ring_side(self, 1) < 0) return NULL;
  uint64_t id, deadline, in, out, length, capacity, kind, model, flags;
  if (as_u64(a[0], &id) < 0 || as_u64(a[1], &deadline) < 0 || as_u64(a[2], &in) < 0 ||
      as_u64(a[3], &out) < 0 || as_bounded(a[4], UINT32_MAX, "in_length", &length) < 0 ||
      as_bounded(a[5], UINT32_MAX, "out_capacity", &capacity) < 0 ||
      as_bounded(a[6], UINT16_MAX, "kind", &kind) < 0 ||
      as_bounded(a[7], UINT16_MAX, "model", &model) < 0 ||
      as_bounded(a[8], UINT32_MAX, "flags", &flags) < 0)
    return NULL; /* nothing has been published */
  submission *slot = ring_vacant(self);
  if (!slot) Py_RETURN_FALSE;
  *slot = (submission){self->mine + 1, id,  deadline,         now_ns(),           in,
                       out,            (uint32_t)length, (uint32_t)capacity, (uint16_t)kind,
                       (uint16_t)model, (uint32_t)flags};
  ring_publish(self);
  Py_RETURN_TRUE;
}

static PyObject *Completion_push(Ring *self, PyObject *const *a, Py_ssize_t n) {
  if (n != 8) {
    PyErr_SetString(PyExc_TypeError, "push() takes 8 arguments");
    return NULL;
  }
  if (ring_side(self, 1) < 0) return NULL;
  uint64_t id, taken, started, finished, length, status, batch, detail;
  if (as_u64(a[0], &id) < 0 || as_u64(a[1], &taken) < 0 || as_u64(a[2], &started) < 0 ||
      as_u64(a[3], &finished) < 0 || as_bounded(a[4], UINT32_MAX, "out_length", &length) < 0 ||
      as_bounded(a[5], UINT16_MAX, "status", &status) < 0 ||
      as_bounded(a[6], UINT16_MAX, "batch_size", &batch) < 0 || as_u64(a[7], &detail) < 0)
    return NULL;
  completion *slot = ring_vacant(self);
  if (!slot) Py_RETURN_FALSE;
  *slot = (completion){self->mine + 1,   id,    taken, started, finished, (uint32_t)length,
                       (uint16_t)status, (uint16_t)batch, detail, 0};
  ring_publish(self);
  Py_RETURN_TRUE;
}

static PyObject *submission_tuple(const void *slot, uint64_t seq) {
  submission s;
  memcpy(&s, slot, sizeof s); /* copy before checking: the peer may still write */
  if (s.seq != seq) {
    PyErr_SetString(RingCorrupt, "a slot has the wrong sequence number");
    return NULL;
  }
  return Py_BuildValue("(KKKKKIIHHI)", s.request_id, s.deadline_ns, s.submitted_ns, s.in_offset,
                       s.out_offset, s.in_length, s.out_capacity, s.kind, s.model, s.flags);
}

static PyObject *completion_tuple(const void *slot, uint64_t seq) {
  completion c;
  memcpy(&c, slot, sizeof c);
  if (c.seq != seq) {
    PyErr_SetString(RingCorrupt, "a slot has the wrong sequence number");
    return NULL;
  }
  return Py_BuildValue("(KKKKIHHK)", c.request_id, c.taken_ns, c.started_ns, c.finished_ns,
                       c.out_length, c.status, c.batch_size, c.detail);
}

static PyObject *Ring_pop(Ring *self, PyObject *arg) {
  Py_ssize_t limit = PyLong_AsSsize_t(arg);
  if (limit < 0) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "limit must not be negative");
    return NULL;
  }
  if (ring_side(self, 0) < 0) return NULL;
  Py_ssize_t count = ring_waiting(self, limit);
  if (count < 0) return NULL;
  int submissions = Py_TYPE(self) == &SubmissionRingType;
  PyObject *out = PyList_New(count);
  if (!out) return NULL;
  for (Py_ssize_t i = 0; i < count; i++) {
    uint64_t position = self->mine + (uint64_t)i;
    const char *slot = self->slots + (position & self->mask) * 64;
    PyObject *item =
        submissions ? submission_tuple(slot, position + 1) : completion_tuple(slot, position + 1);
    if (!item) {
      Py_DECREF(out);
      return NULL;
    }
    PyList_SET_ITEM(out, i, item);
  }
  self->mine += (uint64_t)count;
  if (count) atomic_store_explicit(&self->ring->head, self->mine, memory_order_release);
  return out;
}

/* Which version the next submission is for, without taking it; -1: there is none, or it is no submission. */
static PyObject *Submission_peek(Ring *self, PyObject *unused) {
  (void)unused;
  if (ring_side(self, 0) < 0) return NULL;
  uint64_t tail = atomic_load_explicit(&self->ring->tail, memory_order_acquire);
  if (tail == self->mine) return PyLong_FromLong(-1);
  submission s;
  memcpy(&s, self->slots + (self->mine & self->mask) * 64, sizeof s);
  return PyLong_FromLong(s.seq == self->mine + 1 && s.kind == SUBMIT ? (long)s.model : -1);
}

static int ring_alive(Ring *self) {
  if (self->ring) return 0;
  PyErr_SetString(PyExc_ValueError, "the ring is not initialised");
  return -1;
}

static PyObject *Ring_must_wake(Ring *self, PyObject *unused) {
  (void)unused;
  if (ring_alive(self) < 0) return NULL;
  full_fence(); /* the tail store, then the armed load; pairs with the fence in arm() */
  return PyBool_FromLong(atomic_load_explicit(&self->ring->armed, memory_order_relaxed) != 0);
}

static PyObject *Ring_head(Ring *self, PyObject *unused) {
  (void)unused;
  if (ring_alive(self) < 0) return NULL;
  return PyLong_FromUnsignedLongLong(atomic_load_explicit(&self->ring->head, memory_order_acquire));
}

static PyObject *Ring_tail(Ring *self, PyObject *unused) {
  (void)unused;
  if (ring_alive(self) < 0) return NULL;
  return PyLong_FromUnsignedLongLong(atomic_load_explicit(&self->ring->tail, memory_order_acquire));
}

static PyObject *Ring_depth(Ring *self, PyObject *unused) {
  (void)unused;
  if (ring_alive(self) < 0) return NULL;
  /* head first: the other way round the difference could be negative */
  uint64_t head = atomic_load_explicit(&self->ring->head, memory_order_acquire);
  return PyLong_FromUnsignedLongLong(
      atomic_load_explicit(&self->ring->tail, memory_order_acquire) - head);
}

static PyObject *Ring_slot_count(Ring *self, PyObject *unused) {
  (void)unused;
  return PyLong_FromUnsignedLongLong(self->ring ? self->mask + 1 : 0);
}

#define RING_METHODS(push_function)                                                             \
  {"push", (PyCFunction)(void (*)(void))push_function, METH_FASTCALL, NULL},                     \
      {"pop", (PyCFunction)Ring_pop, METH_O, NULL},                                              \
      {"must_wake", (PyCFunction)Ring_must_wake, METH_NOARGS, NULL},                             \
      {"depth", (PyCFunction)Ring_depth, METH_NOARGS, NULL},                                     \
      {"head", (PyCFunction)Ring_head, METH_NOARGS, NULL},                                       \
      {"tail", (PyCFunction)Ring_tail, METH_NOARGS, NULL},                                       \
      {"slot_count", (PyCFunction)Ring_slot_count, METH_NOARGS, NULL}

static PyMethodDef submission_methods[] = {RING_METHODS(Submission_push),
                                           {"peek", (PyCFunction)Submission_peek, METH_NOARGS, NULL},
                                           {NULL, NULL, 0, NULL}};
static PyMethodDef completion_methods[] = {RING_METHODS(Completion_push), {NULL, NULL, 0, NULL}};

static PyTypeObject SubmissionRingType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "overcommit.runtime._shm.SubmissionRing",
    .tp_basicsize = sizeof(Ring),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)Ring_init,
    .tp_dealloc = (destructor)Ring_dealloc,
    .tp_methods = submission_methods};
static PyTypeObject CompletionRingType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "overcommit.runtime._shm.CompletionRing",
    .tp_basicsize = sizeof(Ring),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)Ring_init,
    .tp_dealloc = (destructor)Ring_dealloc,
    .tp_methods = completion_methods};

/* A sequence of rings as a tuple or list whose items are all live rings; new reference. */
static PyObject *rings_of(PyObject *sequence) {
  PyObject *fast = PySequence_Fast(sequence, "a sequence of rings is needed");
  if (!fast) return NULL;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast); i++) {
    PyObject *item = PySequence_Fast_GET_ITEM(fast, i);
    if ((Py_TYPE(item) != &SubmissionRingType && Py_TYPE(item) != &CompletionRingType) ||
        !((Ring *)item)->ring || ((Ring *)item)->producer) {
      PyErr_SetString(PyExc_TypeError, "arm, disarm and spin take consumer ends of rings");
      Py_DECREF(fast);
      return NULL;
    }
  }
  return fast;
}

static int ring_ready(const Ring *ring) {
  return atomic_load_explicit(&ring->ring->tail, memory_order_acquire) != ring->mine;
}

static void set_armed(PyObject *fast, uint32_t value) {
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast); i++) {
    Ring *ring = (Ring *)PySequence_Fast_GET_ITEM(fast, i);
    atomic_store_explicit(&ring->ring->armed, value, memory_order_relaxed);
  }
}

static int any_ready(PyObject *fast) {
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast); i++)
    if (ring_ready((Ring *)PySequence_Fast_GET_ITEM(fast, i))) return 1;
  return 0;
}

static PyObject *py_arm(PyObject *m, PyObject *rings) {
  (void)m;
  PyObject *fast = rings_of(rings);
  if (!fast) return NULL;
  set_armed(fast, 1);
  full_fence(); /* the armed stores, then the tail loads; pairs with the fence in must_wake() */
  int ready = any_ready(fast);
  if (ready) set_armed(fast, 0);
  Py_DECREF(fast);
  return PyBool_FromLong(!ready);
}

static PyObject *py_disarm(PyObject *m, PyObject *rings) {
  (void)m;
  PyObject *fast = rings_of(rings);
  if (!fast) return NULL;
  set_armed(fast, 0);
  Py_DECREF(fast);
  Py_RETURN_NONE;
}

static PyObject *py_spin(PyObject *m, PyObject *args) {
  (void)m;
  PyObject *rings;
  unsigned long long budget_ns;
  if (!PyArg_ParseTuple(args, "OK", &rings, &budget_ns)) return NULL;
  PyObject *fast = rings_of(rings);
  if (!fast) return NULL;
  int ready = 0;
  Py_BEGIN_ALLOW_THREADS
  uint64_t end = now_ns() + budget_ns;
  do {
    for (int i = 0; i < 64 && !ready; i++) {
      ready = any_ready(fast);
      relax();
    }
  } while (!ready && now_ns() < end);
  Py_END_ALLOW_THREADS
  Py_DECREF(fast);
  return PyBool_FromLong(ready);
}

static PyObject *py_default_spin_ns(PyObject *m, PyObject *unused) {
  (void)m, (void)unused;
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  int count = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
  /* With few cores a spinning process takes the core that its peer needs. */
  return PyLong_FromLong(count < 4 ? 0 : 20000);
}

static PyObject *py_wait(PyObject *m, PyObject *const *a, Py_ssize_t n) {
  (void)m;
  if (n != 3) {
    PyErr_SetString(PyExc_TypeError, "wait(doorbell_fd, control_fd, timeout_ns)");
    return NULL;
  }
  struct pollfd fds[2] = {{(int)PyLong_AsLong(a[0]), POLLIN, 0},
                          {(int)PyLong_AsLong(a[1]), POLLIN, 0}};
  long long timeout = PyLong_AsLongLong(a[2]);
  if (PyErr_Occurred()) return NULL;
  uint64_t end = timeout < 0 ? 0 : now_ns() + (uint64_t)timeout;
  for (;;) {
    int rc, error;
    struct timespec left = {0, 0};
    if (timeout >= 0) {
      uint64_t now = now_ns(), left_ns = end > now ? end - now : 0;
      left.tv_sec = (time_t)(left_ns / 1000000000u);
      left.tv_nsec = (long)(left_ns % 1000000000u);
    }
    Py_BEGIN_ALLOW_THREADS
    rc = ppoll(fds, 2, timeout < 0 ? NULL : &left, NULL);
    error = errno;
    if (rc > 0 && (fds[0].revents & POLLIN)) {
      uint64_t value;
      /* The eventfd is non-blocking; another reader may have been faster, which is fine. */
      if (read(fds[0].fd, &value, sizeof value) < 0) errno = 0;
    }
    Py_END_ALLOW_THREADS
    if (rc >= 0) break;
    if (error != EINTR) {
      errno = error;
      return PyErr_SetFromErrno(PyExc_OSError);
    }
    if (PyErr_CheckSignals() < 0) return NULL;
  }
  return PyLong_FromLong((fds[0].revents ? DOORBELL : 0) | (fds[1].revents ? CONTROL : 0));
}

/* --- status page ------------------------------------------------------------------------------ */

typedef struct {
  PyObject_HEAD
  Py_buffer view;
  worker_status *status;
  int writable;
} Status;

static int Status_init(Status *self, PyObject *args, PyObject *kw) {
  PyObject *buffer;
  Py_ssize_t offset;
  static char *names[] = {"buffer", "offset", "writable", NULL};
  if (!PyArg_ParseTupleAndKeywords(args, kw, "Onp", names, &buffer, &offset, &self->writable))
    return -1;
  if (self->view.obj) {
    PyErr_SetString(PyExc_ValueError, "initialised once");
    return -1;
  }
  self->status = hold(buffer, &self->view, offset, sizeof(worker_status), self->writable);
  return self->status ? 0 : -1;
}

static void Status_dealloc(Status *self) {
  if (self->view.obj) PyBuffer_Release(&self->view);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static int may_write(int writable) {
  if (writable) return 0;
  PyErr_SetString(PyExc_ValueError, "this view is read-only");
  return -1;
}

static PyObject *Status_begin(Status *self, PyObject *args) {
  unsigned int model, phase;
  unsigned long long started;
  PyObject *ids;
  if (!PyArg_ParseTuple(args, "IIKO", &model, &phase, &started, &ids) ||
      may_write(self->writable) < 0)
    return NULL;
  PyObject *fast = PySequence_Fast(ids, "request_ids must be a sequence");
  if (!fast) return NULL;
  worker_status *s = self->status;
  Py_ssize_t count = PySequence_Fast_GET_SIZE(fast);
  uint64_t values[STATUS_BATCH_MAX];
  for (Py_ssize_t i = 0; i < count && i < STATUS_BATCH_MAX; i++)
    if (as_u64(PySequence_Fast_GET_ITEM(fast, i), &values[i]) < 0) {
      Py_DECREF(fast);
      return NULL;
    }
  Py_DECREF(fast);
  for (Py_ssize_t i = 0; i < count && i < STATUS_BATCH_MAX; i++)
    atomic_store_explicit(&s->batch_request_id[i], values[i], memory_order_relaxed);
  /* The full count, also over STATUS_BATCH_MAX: a reader then knows that the list is cut. */
  atomic_store_explicit(&s->batch_count, (uint32_t)count, memory_order_relaxed);
  atomic_store_explicit(&s->model, model, memory_order_relaxed);
  atomic_store_explicit(&s->phase, phase, memory_order_relaxed);
  atomic_store_explicit(&s->batch_started_ns, started, memory_order_release);
  Py_RETURN_NONE;
}

static PyObject *Status_phase(Status *self, PyObject *arg) {
  uint64_t phase;
  if (may_write(self->writable) < 0 || as_bounded(arg, UINT32_MAX, "phase", &phase) < 0) return NULL;
  atomic_store_explicit(&self->status->phase, (uint32_t)phase, memory_order_relaxed);
  Py_RETURN_NONE;
}

static PyObject *Status_end(Status *self, PyObject *unused) {
  (void)unused;
  if (may_write(self->writable) < 0) return NULL;
  atomic_store_explicit(&self->status->batch_started_ns, 0, memory_order_release);
  atomic_store_explicit(&self->status->phase, PHASE_IDLE, memory_order_relaxed);
  Py_RETURN_NONE;
}

static PyObject *Status_heartbeat(Status *self, PyObject *arg) {
  uint64_t now;
  if (may_write(self->writable) < 0 || as_u64(arg, &now) < 0) return NULL;
  atomic_store_explicit(&self->status->heartbeat_ns, now, memory_order_relaxed);
  Py_RETURN_NONE;
}

static PyObject *Status_read(Status *self, PyObject *unused) {
  (void)unused;
  worker_status *s = self->status;
  uint64_t started = atomic_load_explicit(&s->batch_started_ns, memory_order_acquire);
  uint32_t count = started ? atomic_load_explicit(&s->batch_count, memory_order_relaxed) : 0;
  Py_ssize_t known = count < STATUS_BATCH_MAX ? (Py_ssize_t)count : STATUS_BATCH_MAX;
  PyObject *ids = PyList_New(known);
  if (!ids) return NULL;
  for (Py_ssize_t i = 0; i < known; i++) {
    PyObject *id = PyLong_FromUnsignedLongLong(
        atomic_load_explicit(&s->batch_request_id[i], memory_order_relaxed));
    if (!id) {
      Py_DECREF(ids);
      return NULL;
    }
    PyList_SET_ITEM(ids, i, id);
  }
  return Py_BuildValue("(KKIIN)", atomic_load_explicit(&s->heartbeat_ns, memory_order_relaxed),
                       started, atomic_load_explicit(&s->phase, memory_order_relaxed),
                       atomic_load_explicit(&s->model, memory_order_relaxed), ids);
}

static PyMethodDef status_methods[] = {
    {"begin", (PyCFunction)Status_begin, METH_VARARGS, NULL},
    {"phase", (PyCFunction)Status_phase, METH_O, NULL},
    {"end", (PyCFunction)Status_end, METH_NOARGS, NULL},
    {"heartbeat", (PyCFunction)Status_heartbeat, METH_O, NULL},
    {"read", (PyCFunction)Status_read, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyTypeObject StatusType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "overcommit.runtime._shm.StatusPage",
    .tp_basicsize = sizeof(Status),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)Status_init,
    .tp_dealloc = (destructor)Status_dealloc,
    .tp_methods = status_methods};

/* --- residency table and lease pages ----------------------------------------------------------- */

typedef struct {
  PyObject_HEAD
  Py_buffer view;
  table_header *header;
  _Atomic uint64_t *words;
  uint32_t count;
  int writable;
} Table;

typedef struct {
  PyObject_HEAD
  Py_buffer view;
  lease_entry *entries;
  uint32_t count;
  int writable;
} Leases;

static PyTypeObject TableType, LeasesType;

static int slot_of(PyObject *arg, uint32_t count, uint64_t *slot) {
  if (as_u64(arg, slot) < 0) return -1;
  if (*slot >= count) {
    PyErr_Format(PyExc_IndexError, "slot %llu of %u", (unsigned long long)*slot, count);
    return -1;
  }
  return 0;
}

static PyObject *py_table_bytes(PyObject *m, PyObject *arg) {
  (void)m;
  uint64_t count;
  if (as_bounded(arg, UINT32_MAX, "count", &count) < 0) return NULL;
  return PyLong_FromSize_t(page_up(sizeof(table_header) + count * 8));
}

static PyObject *py_lease_page_bytes(PyObject *m, PyObject *arg) {
  (void)m;
  uint64_t count;
  if (as_bounded(arg, UINT32_MAX, "count", &count) < 0) return NULL;
  return PyLong_FromSize_t(page_up(count * sizeof(lease_entry)));
}

static int Table_init(Table *self, PyObject *args, PyObject *kw) {
  PyObject *buffer;
  Py_ssize_t offset;
  static char *names[] = {"buffer", "offset", "count", "writable", NULL};
  if (!PyArg_ParseTupleAndKeywords(args, kw, "OnIp", names, &buffer, &offset, &self->count,
                                   &self->writable))
    return -1;
  if (self->view.obj) {
    PyErr_SetString(PyExc_ValueError, "initialised once");
    return -1;
  }
  self->header = hold(buffer, &self->view, offset,
                      sizeof(table_header) + (size_t)self->count * 8, self->writable);
  if (!self->header) return -1;
  self->words = (_Atomic uint64_t *)(self->header + 1);
  if (self->writable && self->header->magic == 0) {
    self->header->count = self->count;
    self->header->magic = TABLE_MAGIC;
  }
  if (self->header->magic != TABLE_MAGIC || self->header->count != self->count) {
    PyErr_SetString(RingCorrupt, "not a residency table of this size");
    PyBuffer_Release(&self->view);
    self->view.obj = NULL;
    return -1;
  }
  return 0;
}

static void Table_dealloc(Table *self) {
  if (self->view.obj) PyBuffer_Release(&self->view);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *Table_get(Table *self, PyObject *arg) {
  uint64_t slot;
  if (slot_of(arg, self->count, &slot) < 0) return NULL;
  uint64_t word = atomic_load_explicit(&self->words[slot], memory_order_acquire);
  return Py_BuildValue("(IK)", (unsigned int)(word & 0xff), word >> 8);
}

static PyObject *Table_set(Table *self, PyObject *const *a, Py_ssize_t n) {
  uint64_t slot, state, generation;
  if (n != 3) {
    PyErr_SetString(PyExc_TypeError, "set(slot, state, generation)");
    return NULL;
  }
  if (may_write(self->writable) < 0 || slot_of(a[0], self->count, &slot) < 0 ||
      as_bounded(a[1], EVICTING, "state", &state) < 0 ||
      as_bounded(a[2], UINT64_MAX >> 8, "generation", &generation) < 0)
    return NULL;
  /* Release: whoever sees RESIDENT also sees the weights that were written before. */
  atomic_store_explicit(&self->words[slot], generation << 8 | state, memory_order_release);
  Py_RETURN_NONE;
}

static PyObject *Table_set_hungry(Table *self, PyObject *arg) {
  int hungry = PyObject_IsTrue(arg);
  if (hungry < 0 || may_write(self->writable) < 0) return NULL;
  atomic_store_explicit(&self->header->hungry, (uint32_t)hungry, memory_order_relaxed);
  full_fence(); /* the hungry store, then the lease loads; pairs with the fence in hungry() */
  Py_RETURN_NONE;
}

static PyObject *Table_hungry(Table *self, PyObject *unused) {
  (void)unused;
  full_fence(); /* the lease drop, then the hungry load; pairs with the fence in set_hungry() */
  return PyBool_FromLong(atomic_load_explicit(&self->header->hungry, memory_order_relaxed) != 0);
}

static PyMethodDef table_methods[] = {
    {"get", (PyCFunction)Table_get, METH_O, NULL},
    {"set", (PyCFunction)(void (*)(void))Table_set, METH_FASTCALL, NULL},
    {"set_hungry", (PyCFunction)Table_set_hungry, METH_O, NULL},
    {"hungry", (PyCFunction)Table_hungry, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyTypeObject TableType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "overcommit.runtime._shm.ResidencyTable",
    .tp_basicsize = sizeof(Table),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)Table_init,
    .tp_dealloc = (destructor)Table_dealloc,
    .tp_methods = table_methods};

static int Leases_init(Leases *self, PyObject *args, PyObject *kw) {
  PyObject *buffer;
  Py_ssize_t offset;
  static char *names[] = {"buffer", "offset", "count", "writable", NULL};
  if (!PyArg_ParseTupleAndKeywords(args, kw, "OnIp", names, &buffer, &offset, &self->count,
                                   &self->writable))
    return -1;
  if (self->view.obj) {
    PyErr_SetString(PyExc_ValueError, "initialised once");
    return -1;
  }
  self->entries = hold(buffer, &self->view, offset, (size_t)self->count * sizeof(lease_entry),
                       self->writable);
  return self->entries ? 0 : -1;
}

static void Leases_dealloc(Leases *self) {
  if (self->view.obj) PyBuffer_Release(&self->view);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *Leases_take(Leases *self, PyObject *const *a, Py_ssize_t n) {
  uint64_t slot, generation;
  if (n != 3 || Py_TYPE(a[0]) != &TableType) {
    PyErr_SetString(PyExc_TypeError, "take(table, slot, generation)");
    return NULL;
  }
  Table *table = (Table *)a[0];
  uint32_t count = table->count < self->count ? table->count : self->count;
  if (may_write(self->writable) < 0 || slot_of(a[1], count, &slot) < 0 ||
      as_u64(a[2], &generation) < 0)
    return NULL;
  _Atomic uint32_t *lease = &self->entries[slot].lease;
  atomic_store_explicit(lease, 1, memory_order_relaxed);
  full_fence(); /* the lease store, then the state load; pairs with the fence in try_evict() */
  uint64_t word = atomic_load_explicit(&table->words[slot], memory_order_acquire);
  if (word == (generation << 8 | RESIDENT)) Py_RETURN_TRUE;
  atomic_store_explicit(lease, 0, memory_order_release);
  Py_RETURN_FALSE;
}

/* One fence for all: every lease is stored before any state is loaded. */
static PyObject *Leases_take_all(Leases *self, PyObject *const *a, Py_ssize_t n) {
  if (n != 3 || Py_TYPE(a[0]) != &TableType || !PyList_CheckExact(a[1]) ||
      !PyList_CheckExact(a[2]) || PyList_GET_SIZE(a[1]) != PyList_GET_SIZE(a[2]) ||
      PyList_GET_SIZE(a[1]) > STATUS_BATCH_MAX) {
    PyErr_SetString(PyExc_TypeError, "take_all(table, slots, generations): two short lists");
    return NULL;
  }
  Table *table = (Table *)a[0];
  uint32_t limit = table->count < self->count ? table->count : self->count;
  Py_ssize_t count = PyList_GET_SIZE(a[1]);
  uint64_t slots[STATUS_BATCH_MAX], generations[STATUS_BATCH_MAX];
  if (may_write(self->writable) < 0) return NULL;
  for (Py_ssize_t i = 0; i < count; i++)
    if (slot_of(PyList_GET_ITEM(a[1], i), limit, &slots[i]) < 0 ||
        as_u64(PyList_GET_ITEM(a[2], i), &generations[i]) < 0)
      return NULL;
  PyObject *lost = PyList_New(0);
  if (!lost) return NULL;
  for (Py_ssize_t i = 0; i < count; i++)
    atomic_store_explicit(&self->entries[slots[i]].lease, 1, memory_order_relaxed);
  full_fence(); /* as in take() */
  for (Py_ssize_t i = 0; i < count; i++) {
    uint64_t word = atomic_load_explicit(&table->words[slots[i]], memory_order_acquire);
    if (word == (generations[i] << 8 | RESIDENT)) continue;
    atomic_store_explicit(&self->entries[slots[i]].lease, 0, memory_order_release);
    PyObject *index = PyLong_FromSsize_t(i);
    if (!index || PyList_Append(lost, index) < 0) {
      Py_XDECREF(index);
      Py_DECREF(lost);
      for (Py_ssize_t k = 0; k < count; k++)
        atomic_store_explicit(&self->entries[slots[k]].lease, 0, memory_order_release);
      return NULL;
    }
    Py_DECREF(index);
  }
  return lost;
}

static PyObject *Leases_drop_all(Leases *self, PyObject *slots) {
  uint64_t slot;
  if (!PyList_CheckExact(slots)) {
    PyErr_SetString(PyExc_TypeError, "drop_all(slots): a list");
    return NULL;
  }
  if (may_write(self->writable) < 0) return NULL;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(slots); i++) {
    if (slot_of(PyList_GET_ITEM(slots, i), self->count, &slot) < 0) return NULL;
    atomic_store_explicit(&self->entries[slot].lease, 0, memory_order_release); /* as in drop() */
  }
  Py_RETURN_NONE;
}

static PyObject *Leases_drop(Leases *self, PyObject *arg) {
  uint64_t slot;
  if (may_write(self->writable) < 0 || slot_of(arg, self->count, &slot) < 0) return NULL;
  /* Release: every read of the weights happened before anyone sees the lease gone. */
  atomic_store_explicit(&self->entries[slot].lease, 0, memory_order_release);
  Py_RETURN_NONE;
}

static PyObject *Leases_set_waiting(Leases *self, PyObject *const *a, Py_ssize_t n) {
  uint64_t slot, requests;
  if (n != 2) {
    PyErr_SetString(PyExc_TypeError, "set_waiting(slot, requests)");
    return NULL;
  }
  if (may_write(self->writable) < 0 || slot_of(a[0], self->count, &slot) < 0 ||
      as_bounded(a[1], UINT32_MAX, "requests", &requests) < 0)
    return NULL;
  atomic_store_explicit(&self->entries[slot].waiting, (uint32_t)requests, memory_order_relaxed);
  Py_RETURN_NONE;
}

static void note_uses(lease_entry *entry, uint64_t requests, uint64_t now) {
  /* One writer: load and store, no fetch-add. */
  uint64_t uses = atomic_load_explicit(&entry->uses, memory_order_relaxed);
  atomic_store_explicit(&entry->uses, uses + requests, memory_order_relaxed);
  atomic_store_explicit(&entry->last_used_ns, now, memory_order_relaxed);
}

static PyObject *Leases_add_uses(Leases *self, PyObject *const *a, Py_ssize_t n) {
  uint64_t slot, requests, now;
  if (n != 3) {
    PyErr_SetString(PyExc_TypeError, "add_uses(slot, requests, now_ns)");
    return NULL;
  }
  if (may_write(self->writable) < 0 || slot_of(a[0], self->count, &slot) < 0 ||
      as_u64(a[1], &requests) < 0 || as_u64(a[2], &now) < 0)
    return NULL;
  note_uses(&self->entries[slot], requests, now);
  Py_RETURN_NONE;
}

/* `add_uses` for each version of a batch. */
static PyObject *Leases_add_all_uses(Leases *self, PyObject *const *a, Py_ssize_t n) {
  uint64_t slot, requests, now;
  if (n != 3 || !PyList_CheckExact(a[0]) || !PyList_CheckExact(a[1]) ||
      PyList_GET_SIZE(a[0]) != PyList_GET_SIZE(a[1])) {
    PyErr_SetString(PyExc_TypeError, "add_all_uses(slots, requests, now_ns): two lists");
    return NULL;
  }
  if (may_write(self->writable) < 0 || as_u64(a[2], &now) < 0) return NULL;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(a[0]); i++) {
    if (slot_of(PyList_GET_ITEM(a[0], i), self->count, &slot) < 0 ||
        as_u64(PyList_GET_ITEM(a[1], i), &requests) < 0)
      return NULL;
    note_uses(&self->entries[slot], requests, now);
  }
  Py_RETURN_NONE;
}

static PyObject *Leases_read(Leases *self, PyObject *arg) {
  uint64_t slot;
  if (slot_of(arg, self->count, &slot) < 0) return NULL;
  lease_entry *entry = &self->entries[slot];
  return Py_BuildValue("(IIKK)", atomic_load_explicit(&entry->lease, memory_order_acquire),
                       atomic_load_explicit(&entry->waiting, memory_order_relaxed),
                       atomic_load_explicit(&entry->uses, memory_order_relaxed),
                       atomic_load_explicit(&entry->last_used_ns, memory_order_relaxed));
}

static PyMethodDef lease_methods[] = {
    {"take", (PyCFunction)(void (*)(void))Leases_take, METH_FASTCALL, NULL},
    {"take_all", (PyCFunction)(void (*)(void))Leases_take_all, METH_FASTCALL, NULL},
    {"drop", (PyCFunction)Leases_drop, METH_O, NULL},
    {"drop_all", (PyCFunction)Leases_drop_all, METH_O, NULL},
    {"set_waiting", (PyCFunction)(void (*)(void))Leases_set_waiting, METH_FASTCALL, NULL},
    {"add_uses", (PyCFunction)(void (*)(void))Leases_add_uses, METH_FASTCALL, NULL},
    {"add_all_uses", (PyCFunction)(void (*)(void))Leases_add_all_uses, METH_FASTCALL, NULL},
    {"read", (PyCFunction)Leases_read, METH_O, NULL},
    {NULL, NULL, 0, NULL}};

static PyTypeObject LeasesType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "overcommit.runtime._shm.LeasePage",
    .tp_basicsize = sizeof(Leases),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)Leases_init,
    .tp_dealloc = (destructor)Leases_dealloc,
    .tp_methods = lease_methods};

static PyObject *py_try_evict(PyObject *m, PyObject *args) {
  (void)m;
  Table *table;
  PyObject *pages;
  unsigned long long slot, generation;
  if (!PyArg_ParseTuple(args, "O!OKK", &TableType, &table, &pages, &slot, &generation) ||
      may_write(table->writable) < 0)
    return NULL;
  PyObject *fast = PySequence_Fast(pages, "pages must be a sequence");
  if (!fast) return NULL;
  Py_ssize_t count = PySequence_Fast_GET_SIZE(fast);
  int wrong = slot >= table->count;
  for (Py_ssize_t i = 0; i < count && !wrong; i++) {
    PyObject *page = PySequence_Fast_GET_ITEM(fast, i);
    wrong = Py_TYPE(page) != &LeasesType || ((Leases *)page)->count <= slot;
  }
  if (wrong) {
    Py_DECREF(fast);
    PyErr_SetString(PyExc_ValueError, "the slot or a page does not belong to this table");
    return NULL;
  }
  uint64_t resident = generation << 8 | RESIDENT;
  if (atomic_load_explicit(&table->words[slot], memory_order_relaxed) != resident) {
    Py_DECREF(fast);
    PyErr_SetString(PyExc_ValueError, "only a RESIDENT version of this generation can be evicted");
    return NULL;
  }
  atomic_store_explicit(&table->words[slot], generation << 8 | EVICTING, memory_order_relaxed);
  full_fence(); /* the state store, then the lease loads; pairs with the fence in take() */
  int held = 0;
  for (Py_ssize_t i = 0; i < count && !held; i++) {
    Leases *page = (Leases *)PySequence_Fast_GET_ITEM(fast, i);
    held = atomic_load_explicit(&page->entries[slot].lease, memory_order_acquire) != 0;
  }
  if (held) atomic_store_explicit(&table->words[slot], resident, memory_order_release);
  Py_DECREF(fast);
  return PyBool_FromLong(!held);
}

/* --- memory ------------------------------------------------------------------------------------ */

static PyObject *py_reserve(PyObject *m, PyObject *arg) {
  (void)m;
  size_t nbytes = PyLong_AsSize_t(arg);
  if (nbytes == (size_t)-1 && PyErr_Occurred()) return NULL;
  if (nbytes == 0 || nbytes % PAGE || nbytes > ((size_t)1 << 46)) {
    PyErr_SetString(PyExc_ValueError, "the size must be a positive multiple of 4096");
    return NULL;
  }
  /* Over-reserve, then give back both ends, so that the range starts at a 2 MiB boundary. */
  size_t slack = nbytes + RESERVE_ALIGN;
  char *raw = mmap(NULL, slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return PyErr_SetFromErrno(PyExc_OSError);
  char *start = (char *)(((uintptr_t)raw + RESERVE_ALIGN - 1) & ~(uintptr_t)(RESERVE_ALIGN - 1));
  if (start > raw) munmap(raw, (size_t)(start - raw));
  size_t after = slack - (size_t)(start - raw) - nbytes;
  if (after) munmap(start + nbytes, after);
  return PyLong_FromVoidPtr(start);
}

static int check_range(unsigned long long address, Py_ssize_t nbytes) {
  if (address == 0 || nbytes <= 0 || address % PAGE || nbytes % PAGE) {
    PyErr_SetString(PyExc_ValueError, "address and size must be positive multiples of 4096");
    return -1;
  }
  return 0;
}

static PyObject *py_map_fixed(PyObject *m, PyObject *args) {
  (void)m;
  unsigned long long address;
  int fd, writable, fill;
  long long offset;
  Py_ssize_t nbytes;
  if (!PyArg_ParseTuple(args, "KiLnpp", &address, &fd, &offset, &nbytes, &writable, &fill) ||
      check_range(address, nbytes) < 0)
    return NULL;
  void *mapped;
  Py_BEGIN_ALLOW_THREADS
  mapped = mmap((void *)(uintptr_t)address, (size_t)nbytes, PROT_READ | (writable ? PROT_WRITE : 0),
                MAP_SHARED | MAP_FIXED | (fill ? MAP_POPULATE : 0), fd, (off_t)offset);
  Py_END_ALLOW_THREADS
  if (mapped == MAP_FAILED) return PyErr_SetFromErrno(PyExc_OSError);
  Py_RETURN_NONE;
}

static PyObject *py_unmap_fixed(PyObject *m, PyObject *args) {
  (void)m;
  unsigned long long address;
  Py_ssize_t nbytes;
  if (!PyArg_ParseTuple(args, "Kn", &address, &nbytes) || check_range(address, nbytes) < 0)
    return NULL;
  if (mmap((void *)(uintptr_t)address, (size_t)nbytes, PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED)
    return PyErr_SetFromErrno(PyExc_OSError);
  Py_RETURN_NONE;
}

/* copy_pieces(into, stride, nbytes, addresses): `nbytes` from each address, `stride` apart. */
static PyObject *py_copy_pieces(PyObject *m, PyObject *args) {
  (void)m;
  Py_buffer into;
  Py_ssize_t stride, nbytes;
  PyObject *addresses;
  if (!PyArg_ParseTuple(args, "w*nnO", &into, &stride, &nbytes, &addresses)) return NULL;
  PyObject *items = PySequence_Fast(addresses, "addresses must be a sequence");
  PyObject *result = NULL;
  if (!items) goto done;
  Py_ssize_t count = PySequence_Fast_GET_SIZE(items);
  if (nbytes < 0 || stride < nbytes || (count && stride > into.len / count)) {
    PyErr_SetString(PyExc_ValueError, "the pieces do not fit");
    goto done;
  }
  char *to = into.buf;
  /* Each lies on a page of its own that nobody has looked at lately: ask for all at once. */
  for (Py_ssize_t i = 0; i < count; i++) {
    unsigned long long from = PyLong_AsUnsignedLongLong(PySequence_Fast_GET_ITEM(items, i));
    if (from == (unsigned long long)-1 && PyErr_Occurred()) goto done;
    __builtin_prefetch((const void *)(uintptr_t)from);
  }
  for (Py_ssize_t i = 0; i < count; i++, to += stride) {
    unsigned long long from = PyLong_AsUnsignedLongLong(PySequence_Fast_GET_ITEM(items, i));
    if (from == (unsigned long long)-1 && PyErr_Occurred()) goto done;
    memcpy(to, (const void *)(uintptr_t)from, (size_t)nbytes);
  }
  result = Py_NewRef(Py_None);
done:
  Py_XDECREF(items);
  PyBuffer_Release(&into);
  return result;
}

/* prefetch(rows, column, lists): have what the lists hold at the index in this column of each row, and
 * what that refers to, on its way into the cache; for all rows at once, so that they are waited for
 * together.  What an object refers to is taken from its words, whatever they are: a prefetch of an
 * address that is none does nothing. */
enum { PREFETCH_MAX = 128, PREFETCH_WORDS_MAX = 24 };

static PyObject *py_prefetch(PyObject *m, PyObject *args) {
  (void)m;
  PyObject *rows, *lists;
  Py_ssize_t column, found = 0, before = -1;
  if (!PyArg_ParseTuple(args, "O!nO!", &PyList_Type, &rows, &column, &PyTuple_Type, &lists)) return NULL;
  PyObject **places[PREFETCH_MAX];
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(rows); i++) {
    PyObject *row = PyList_GET_ITEM(rows, i);
    if (!PyTuple_Check(row) || column < 0 || column >= PyTuple_GET_SIZE(row)) {
      PyErr_SetString(PyExc_TypeError, "rows are tuples with such a column");
      return NULL;
    }
    Py_ssize_t at = PyLong_AsSsize_t(PyTuple_GET_ITEM(row, column));
    if (at < 0) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "an index is negative");
      return NULL;
    }
    if (at == before) continue; /* somebody asks the same again and again */
    before = at;
    for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(lists) && found < PREFETCH_MAX; j++) {
      PyObject *list = PyTuple_GET_ITEM(lists, j);
      if (!PyList_Check(list)) {
        PyErr_SetString(PyExc_TypeError, "lists are wanted");
        return NULL;
      }
      if (at >= PyList_GET_SIZE(list)) continue;
      places[found] = &((PyListObject *)list)->ob_item[at];
      __builtin_prefetch(places[found++]);
    }
  }
  for (Py_ssize_t i = 0; i < found; i++) {
    const char *object = (const char *)*places[i];
    __builtin_prefetch(object - 16); /* what the garbage collector has before it */
    __builtin_prefetch(object + 48);
    __builtin_prefetch(object + 112);
  }
  for (Py_ssize_t i = 0; i < found; i++) {
    PyObject *object = *places[i];
    Py_ssize_t words = Py_TYPE(object)->tp_basicsize / (Py_ssize_t)sizeof(void *);
    if (words > PREFETCH_WORDS_MAX) words = PREFETCH_WORDS_MAX;
    for (Py_ssize_t w = sizeof(PyObject) / sizeof(void *); w < words; w++) {
      const char *referred = ((const char *const *)object)[w];
      __builtin_prefetch(referred);
      __builtin_prefetch(referred + 64);
    }
  }
  Py_RETURN_NONE;
}

static PyObject *py_move_fixed(PyObject *m, PyObject *args) {
  (void)m;
  unsigned long long source, destination;
  Py_ssize_t nbytes;
  if (!PyArg_ParseTuple(args, "KKn", &source, &destination, &nbytes) ||
      check_range(source, nbytes) < 0 || check_range(destination, nbytes) < 0)
    return NULL;
  /* The source must not become a hole, which another thread's mmap could take. */
  void *to = (void *)(uintptr_t)destination, *from = (void *)(uintptr_t)source;
  void *moved = mremap(from, (size_t)nbytes, (size_t)nbytes,
                       MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to);
  if (moved == MAP_FAILED ||
      mmap(from, (size_t)nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
           -1, 0) == MAP_FAILED)
    return PyErr_SetFromErrno(PyExc_OSError);
  Py_RETURN_NONE;
}

static PyObject *py_release(PyObject *m, PyObject *args) {
  (void)m;
  unsigned long long address;
  Py_ssize_t nbytes;
  if (!PyArg_ParseTuple(args, "Kn", &address, &nbytes) || check_range(address, nbytes) < 0)
    return NULL;
  if (munmap((void *)(uintptr_t)address, (size_t)nbytes) < 0)
    return PyErr_SetFromErrno(PyExc_OSError);
  Py_RETURN_NONE;
}

static PyObject *py_populate(PyObject *m, PyObject *args) {
  (void)m;
  unsigned long long address;
  Py_ssize_t nbytes;
  int writable, rc;
  if (!PyArg_ParseTuple(args, "Knp", &address, &nbytes, &writable) ||
      check_range(address, nbytes) < 0)
    return NULL;
  do {
    Py_BEGIN_ALLOW_THREADS
    rc = madvise((void *)(uintptr_t)address, (size_t)nbytes,
                 writable ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
    Py_END_ALLOW_THREADS
    if (rc < 0 && errno == EINTR && PyErr_CheckSignals() < 0) return NULL;
  } while (rc < 0 && errno == EINTR);
  /* EINVAL: a kernel older than 5.14.  Pages are then touched on first use, only later. */
  if (rc < 0 && errno != EINVAL) return PyErr_SetFromErrno(PyExc_OSError);
  Py_RETURN_NONE;
}

static PyObject *py_view(PyObject *m, PyObject *args) {
  (void)m;
  unsigned long long address;
  Py_ssize_t nbytes;
  int writable;
  if (!PyArg_ParseTuple(args, "Knp", &address, &nbytes, &writable)) return NULL;
  if (address == 0 || nbytes < 0) {
    PyErr_SetString(PyExc_ValueError, "a view needs an address and a size");
    return NULL;
  }
  return PyMemoryView_FromMemory((char *)(uintptr_t)address, nbytes,
                                 writable ? PyBUF_WRITE : PyBUF_READ);
}

/* Long copies go past the cache: what is copied is weights, larger than it, and a store that need not
 * read its line first takes 0.6 to 0.8 of memcpy's time (bench/LOG.md). */
#define STREAM_MIN ((size_t)1 << 20)

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void copy_streaming(char *to, const char *from, size_t nbytes) {
  size_t head = (size_t)(-(uintptr_t)to & 31);
  memcpy(to, from, head);
  to += head, from += head, nbytes -= head;
  size_t whole = nbytes & ~(size_t)127;
  for (size_t at = 0; at < whole; at += 128) {
    _mm_prefetch(from + at + 1024, _MM_HINT_NTA);
    _mm_prefetch(from + at + 1088, _MM_HINT_NTA);
    __m256i a = _mm256_loadu_si256((const __m256i *)(from + at));
    __m256i b = _mm256_loadu_si256((const __m256i *)(from + at + 32));
    __m256i c = _mm256_loadu_si256((const __m256i *)(from + at + 64));
    __m256i d = _mm256_loadu_si256((const __m256i *)(from + at + 96));
    _mm256_stream_si256((__m256i *)(to + at), a);
    _mm256_stream_si256((__m256i *)(to + at + 32), b);
    _mm256_stream_si256((__m256i *)(to + at + 64), c);
    _mm256_stream_si256((__m256i *)(to + at + 96), d);
  }
  _mm_sfence(); /* streamed stores are weakly ordered: all of them before who is told of them */
  memcpy(to + whole, from + whole, nbytes - whole);
}

static void copy_bytes(char *to, const char *from, size_t nbytes) {
  if (nbytes >= STREAM_MIN && __builtin_cpu_supports("avx2"))
    copy_streaming(to, from, nbytes);
  else
    memcpy(to, from, nbytes);
}
#else
static void copy_bytes(char *to, const char *from, size_t nbytes) { memcpy(to, from, nbytes); }
#endif

static PyObject *py_copy(PyObject *m, PyObject *args) {
  (void)m;
  unsigned long long destination, source;
  Py_ssize_t nbytes;
  if (!PyArg_ParseTuple(args, "KKn", &destination, &source, &nbytes)) return NULL;
  if (!destination || !source || nbytes < 0) {
    PyErr_SetString(PyExc_ValueError, "copy needs two addresses and a size");
    return NULL;
  }
  Py_BEGIN_ALLOW_THREADS
  copy_bytes((char *)(uintptr_t)destination, (const char *)(uintptr_t)source, (size_t)nbytes);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static PyObject *py_set_parent_death_signal(PyObject *m, PyObject *arg) {
  (void)m;
  long number = PyLong_AsLong(arg);
  if (number == -1 && PyErr_Occurred()) return NULL;
  if (prctl(PR_SET_PDEATHSIG, (unsigned long)number, 0, 0, 0) < 0)
    return PyErr_SetFromErrno(PyExc_OSError);
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"ring_bytes", py_ring_bytes, METH_O, NULL},
    {"create_ring", py_create_ring, METH_VARARGS, NULL},
    {"arm", py_arm, METH_O, NULL},
    {"disarm", py_disarm, METH_O, NULL},
    {"spin", py_spin, METH_VARARGS, NULL},
    {"default_spin_ns", py_default_spin_ns, METH_NOARGS, NULL},
    {"wait", (PyCFunction)(void (*)(void))py_wait, METH_FASTCALL, NULL},
    {"table_bytes", py_table_bytes, METH_O, NULL},
    {"lease_page_bytes", py_lease_page_bytes, METH_O, NULL},
    {"try_evict", py_try_evict, METH_VARARGS, NULL},
    {"reserve", py_reserve, METH_O, NULL},
    {"map_fixed", py_map_fixed, METH_VARARGS, NULL},
    {"unmap_fixed", py_unmap_fixed, METH_VARARGS, NULL},
    {"copy_pieces", py_copy_pieces, METH_VARARGS, NULL},
    {"prefetch", py_prefetch, METH_VARARGS, NULL},
    {"move_fixed", py_move_fixed, METH_VARARGS, NULL},
    {"release", py_release, METH_VARARGS, NULL},
    {"populate", py_populate, METH_VARARGS, NULL},
    {"view", py_view, METH_VARARGS, NULL},
    {"copy", py_copy, METH_VARARGS, NULL},
    {"set_parent_death_signal", py_set_parent_death_signal, METH_O, NULL},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "overcommit.runtime._shm",
                                    .m_size = -1, .m_methods = functions};

PyMODINIT_FUNC PyInit__shm(void) {
  PyObject *m = PyModule_Create(&module);
  if (!m) return NULL;
  RingCorrupt = PyErr_NewException("overcommit.runtime._shm.RingCorrupt", PyExc_RuntimeError, NULL);
  if (!RingCorrupt || PyModule_AddObjectRef(m, "RingCorrupt", RingCorrupt) < 0 ||
      PyModule_AddType(m, &SubmissionRingType) < 0 || PyModule_AddType(m, &CompletionRingType) < 0 ||
      PyModule_AddType(m, &StatusType) < 0 || PyModule_AddType(m, &TableType) < 0 ||
      PyModule_AddType(m, &LeasesType) < 0)
    return NULL;
  static const struct {
    const char *name;
    long value;
  } constants[] = {{"LINE", LINE},
                   {"RING_HEADER_BYTES", sizeof(ring_header)},
                   {"SLOT_BYTES", 64},
                   {"STATUS_BYTES", PAGE},
                   {"STATUS_BATCH_MAX", STATUS_BATCH_MAX},
                   {"TABLE_HEADER_BYTES", sizeof(table_header)},
                   {"TABLE_ENTRY_BYTES", 8},
                   {"LEASE_ENTRY_BYTES", sizeof(lease_entry)},
                   {"SUBMIT", SUBMIT},
                   {"CANCEL", CANCEL},
                   {"OK", OK},
                   {"MORE", MORE},
                   {"EXPIRED", EXPIRED},
                   {"OVERLOADED", OVERLOADED},
                   {"CANCELLED", CANCELLED},
                   {"TOO_LARGE", TOO_LARGE},
                   {"MODEL_ERROR", MODEL_ERROR},
                   {"NOT_RESIDENT", NOT_RESIDENT},
                   {"BAD_REQUEST", BAD_REQUEST},
                   {"ABSENT", ABSENT},
                   {"LOADING", LOADING},
                   {"RESIDENT", RESIDENT},
                   {"EVICTING", EVICTING},
                   {"PHASE_IDLE", PHASE_IDLE},
                   {"PHASE_LOAD", PHASE_LOAD},
                   {"PHASE_COPY_IN", PHASE_COPY_IN},
                   {"PHASE_COMPUTE", PHASE_COMPUTE},
                   {"PHASE_COPY_OUT", PHASE_COPY_OUT},
                   {"DOORBELL", DOORBELL},
                   {"CONTROL", CONTROL}};
  for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
    if (PyModule_AddIntConstant(m, constants[i].name, constants[i].value) < 0) return NULL;
  return m;
}
