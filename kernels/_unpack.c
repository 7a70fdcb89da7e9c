/* Lossless packing of weights: exponents entropy-coded, sign and mantissa as they are.
 *
 * The CPU path of `unpack.py`, whose docstring declares the format; no policy.  What is read from a
 * packed buffer is checked before it is used: a torn one raises, it never reads or writes outside.
 *
 * Invariants
 *  1. decode(encode(x)) == x for every x, and no block takes more bytes than its raw bytes.
 *  2. A stream's reader never goes past the buffer: the buffer ends with GUARD_BYTES, and each refill
 *     compares its place with the last one at which 8 bytes can be read.
 *  3. A look-up moves on in the stream even where its bits are no code, so each loop ends.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed weights are little-endian, as the machines are that have GPUs"
#endif

#define MAGIC 0x314b434150434f00ull
#define BLOCK_BYTES 65536u
#define STREAMS 128u
#define CODE_BITS_MAX 11
#define LOOKUPS (1u << CODE_BITS_MAX)
#define GROUP_BLOCKS 32u /* blocks that share tables: 2 MiB, of which building one is 1 % */
#define ALIGN 16u
#define GUARD_BYTES 16u
#define TABLES_MAX 65536u
#define WORTH 0.98 /* a block that saves less stays raw: it is decoded ten times as fast */

enum { RAW, HALF, FP32, ZEROS, KINDS };

typedef struct {
  uint64_t magic, nbytes, total;
  uint32_t blocks, tables;
  uint64_t reserved[4];
} Header;
typedef struct {
  uint32_t offset; /* of the block's bytes, from the start, in units of ALIGN */
  uint16_t table;
  uint8_t kind, reserved;
} Entry;
typedef struct {
  uint16_t counts[16]; /* codes of each length; [0] is unused */
  uint8_t symbols[256]; /* in the order of their codes */
} Table;
_Static_assert(sizeof(Header) == 64 && sizeof(Entry) == 8 && sizeof(Table) == 288, "layout");

/* Vectors of the machine at hand: 2 to 3 times as fast as those that every x86-64 has. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("avx2", "default"), optimize("O3")))
#else
#define CLONES
#endif

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
static unsigned width_of(unsigned kind) { return kind == FP32 ? 4 : 2; }
static size_t data_start(const Header *h) {
  return round_up(sizeof(Header) + h->blocks * sizeof(Entry) + h->tables * sizeof(Table), ALIGN);
}

/* --- planes ------------------------------------------------------------------------------------ */
CLONES static void split_half(const uint8_t *in, size_t n, uint8_t *symbols, uint8_t *rest) {
  for (size_t i = 0; i < n; i++) {
    uint16_t x;
    memcpy(&x, in + 2 * i, 2);
    symbols[i] = (uint8_t)(x >> 7);
    rest[i] = (uint8_t)((x >> 8 & 0x80) | (x & 0x7f));
  }
}
CLONES static void split_fp32(const uint8_t *in, size_t n, uint8_t *symbols, uint8_t *low,
                              uint8_t *high) {
  for (size_t i = 0; i < n; i++) {
    uint32_t x;
    memcpy(&x, in + 4 * i, 4);
    uint16_t bits = (uint16_t)x;
    symbols[i] = (uint8_t)(x >> 23);
    memcpy(low + 2 * i, &bits, 2);
    high[i] = (uint8_t)((x >> 24 & 0x80) | (x >> 16 & 0x7f));
  }
}
CLONES static void join_half(uint8_t *restrict out, size_t n, const uint8_t *restrict symbols,
                             const uint8_t *restrict rest) {
  for (size_t i = 0; i < n; i++) {
    uint16_t r = rest[i];
    uint16_t x = (uint16_t)((r & 0x80) << 8 | symbols[i] << 7 | (r & 0x7f));
    memcpy(out + 2 * i, &x, 2);
  }
}
CLONES static void join_fp32(uint8_t *restrict out, size_t n, const uint8_t *restrict symbols,
                             const uint8_t *restrict low, const uint8_t *restrict high) {
  for (size_t i = 0; i < n; i++) {
    uint16_t bits;
    memcpy(&bits, low + 2 * i, 2);
    uint32_t h = high[i];
    uint32_t x = (h & 0x80) << 24 | (uint32_t)symbols[i] << 23 | (h & 0x7f) << 16 | bits;
    memcpy(out + 4 * i, &x, 4);
  }
}

/* --- encoding ---------------------------------------------------------------------------------- */
typedef struct {
  uint32_t of[KINDS][256];
} Histograms;

/* Four counters for each symbol: exponents repeat, and a counter that was just stored is slow. */
static void count_block(const uint8_t *in, size_t nbytes, Histograms *h) {
  uint32_t part[4][2][256];
  memset(part, 0, sizeof part);
  for (size_t i = 0; i + 8 <= nbytes; i += 8) {
    uint64_t x;
    memcpy(&x, in + i, 8);
    for (unsigned k = 0; k < 4; k++) part[k][0][x >> (16 * k + 7) & 255]++;
    part[i >> 3 & 1][1][x >> 23 & 255]++;
    part[2 + (i >> 3 & 1)][1][x >> 55 & 255]++;
  }
  memset(h, 0, sizeof *h);
  for (unsigned s = 0; s < 256; s++) {
    for (unsigned k = 0; k < 4; k++) {
      h->of[HALF][s] += part[k][0][s];
      h->of[FP32][s] += part[k][1][s];
    }
  }
  for (size_t i = nbytes / 8 * 8; i < nbytes; i += 2) { /* what is left: 2, 4 or 6 bytes */
    uint32_t x = 0;
    memcpy(&x, in + i, nbytes - i >= 4 ? 4 : 2);
    h->of[HALF][x >> 7 & 255]++;
    if (nbytes - i >= 4 && i % 4 == 0) h->of[FP32][x >> 23 & 255]++;
  }
}

static double coded_bytes(const uint32_t *histogram, size_t n) {
  double bits = 0;
  for (unsigned s = 0; s < 256; s++)
    if (histogram[s]) bits += histogram[s] * (double)log2f((float)n / (float)histogram[s]);
  return bits / 8 + STREAMS / 2.0 + STREAMS * 2;
}

static int is_zeros(const uint8_t *in, size_t nbytes) {
  return nbytes == 0 || (in[0] == 0 && memcmp(in, in + 1, nbytes - 1) == 0);
}

static unsigned choose_kind(const uint8_t *in, size_t nbytes, Histograms *h) {
  if (is_zeros(in, nbytes)) return ZEROS;
  if (nbytes % 2) return RAW;
  count_block(in, nbytes, h);
  unsigned best = RAW;
  double least = (double)nbytes * WORTH;
  for (unsigned kind = HALF; kind <= FP32; kind++) {
    unsigned width = width_of(kind);
    if (nbytes % width) continue;
    size_t n = nbytes / width;
    double bytes = (double)(n * (width - 1)) + coded_bytes(h->of[kind], n);
    if (bytes < least) least = bytes, best = kind;
  }
  return best;
}

/* Huffman's lengths; where one is too long, frequencies are flattened and it begins again, as in bzip2. */
static void code_lengths(const uint32_t *histogram, uint8_t *lengths) {
  uint64_t weight[512];
  uint32_t frequency[256];
  int parent[512];
  memcpy(frequency, histogram, sizeof frequency);
  for (;;) {
    int live[256], alive = 0, nodes = 256, longest = 0;
    for (int s = 0; s < 256; s++) {
      weight[s] = frequency[s];
      if (frequency[s]) live[alive++] = s;
    }
    memset(lengths, 0, 256);
    if (alive == 1) {
      lengths[live[0]] = 1;
      return;
    }
    memset(parent, -1, sizeof parent);
    while (alive > 1) {
      int a = 0, b = 1; /* places of the lightest and the next */
      if (weight[live[b]] < weight[live[a]]) a = 1, b = 0;
      for (int i = 2; i < alive; i++) {
        if (weight[live[i]] < weight[live[a]]) b = a, a = i;
        else if (weight[live[i]] < weight[live[b]]) b = i;
      }
      weight[nodes] = weight[live[a]] + weight[live[b]];
      parent[live[a]] = parent[live[b]] = nodes;
      live[a] = nodes++;
      live[b] = live[--alive];
    }
    for (int s = 0; s < 256; s++) {
      if (!frequency[s]) continue;
      int length = 0;
      for (int i = s; parent[i] >= 0; i = parent[i]) length++;
      lengths[s] = (uint8_t)length;
      if (length > longest) longest = length;
    }
    if (longest <= CODE_BITS_MAX) return;
    for (int s = 0; s < 256; s++)
      if (frequency[s]) frequency[s] = frequency[s] / 2 + 1;
  }
}

static uint16_t reverse(unsigned code, int length) {
  unsigned out = 0;
  for (int i = 0; i < length; i++) out |= (code >> i & 1) << (length - 1 - i);
  return (uint16_t)out;
}

static void make_table(const uint32_t *histogram, Table *table) {
  uint8_t lengths[256];
  unsigned at = 0;
  code_lengths(histogram, lengths);
  memset(table, 0, sizeof *table);
  for (int length = 1; length <= CODE_BITS_MAX; length++)
    for (int s = 0; s < 256; s++)
      if (lengths[s] == length) table->symbols[at++] = (uint8_t)s, table->counts[length]++;
}

typedef struct {
  uint16_t code[256];
  uint8_t length[256];
} Codes;

static void make_codes(const Table *table, Codes *codes) {
  unsigned code = 0, at = 0;
  memset(codes, 0, sizeof *codes);
  for (int length = 1; length <= CODE_BITS_MAX; length++, code <<= 1)
    for (unsigned i = 0; i < table->counts[length]; i++, code++, at++) {
      codes->code[table->symbols[at]] = reverse(code, length);
      codes->length[table->symbols[at]] = (uint8_t)length;
    }
}

/* Return the bytes written to `out`, which has room for 2 * BLOCK_BYTES. */
static size_t encode_block(unsigned kind, const uint8_t *in, size_t nbytes, const Codes *codes,
                           uint8_t *out) {
  uint8_t symbols[BLOCK_BYTES / 2];
  size_t n = nbytes / width_of(kind), segment = (n + STREAMS - 1) / STREAMS;
  size_t planes = n * (width_of(kind) - 1);
  if (kind == HALF) split_half(in, n, symbols, out);
  else split_fp32(in, n, symbols, out, out + 2 * n);
  planes = round_up(planes, 2);
  uint8_t *offsets = out + planes, *start = offsets + 2 * STREAMS, *at = start;
  for (size_t stream = 0; stream < STREAMS; stream++) {
    size_t i = stream * segment, end = i + segment;
    if (i > n) i = n;
    if (end > n) end = n;
    uint16_t offset = (uint16_t)(at - start);
    memcpy(offsets + 2 * stream, &offset, 2);
    uint64_t bits = 0;
    unsigned count = 0;
    for (; i < end; i++) {
      bits |= (uint64_t)codes->code[symbols[i]] << count;
      count += codes->length[symbols[i]];
      if (count >= 32) { /* 32 + 11 fit; 4 bytes at once */
        memcpy(at, &bits, 4);
        at += 4, bits >>= 32, count -= 32;
      }
    }
    memcpy(at, &bits, 8);
    at += (count + 7) / 8;
  }
  return (size_t)(at - out);
}

static size_t length_of(uint64_t nbytes, size_t block) {
  uint64_t left = nbytes - (uint64_t)block * BLOCK_BYTES;
  return left < BLOCK_BYTES ? (size_t)left : BLOCK_BYTES;
}

/* Choose each block's kind and each group's tables; return how many tables. */
static unsigned plan(const uint8_t *in, uint64_t nbytes, size_t blocks, Entry *entries,
                     Table *tables) {
  unsigned made = 0;
  for (size_t first = 0; first < blocks; first += GROUP_BLOCKS) {
    Histograms sum, one;
    uint16_t table_of[KINDS];
    size_t end = first + GROUP_BLOCKS < blocks ? first + GROUP_BLOCKS : blocks;
    unsigned seen = 0;
    memset(&sum, 0, sizeof sum);
    for (size_t b = first; b < end; b++) {
      unsigned kind = choose_kind(in + b * BLOCK_BYTES, length_of(nbytes, b), &one);
      entries[b] = (Entry){.kind = (uint8_t)kind};
      if (kind == RAW || kind == ZEROS) continue;
      seen |= 1u << kind;
      for (unsigned s = 0; s < 256; s++) sum.of[kind][s] += one.of[kind][s];
    }
    for (unsigned kind = HALF; kind <= FP32; kind++)
      if (seen >> kind & 1) {
        if (made == TABLES_MAX) seen &= ~(1u << kind); /* 64 GiB on: those blocks stay raw */
        else table_of[kind] = (uint16_t)made, make_table(sum.of[kind], &tables[made++]);
      }
    for (size_t b = first; b < end; b++) {
      unsigned kind = entries[b].kind;
      if (kind == RAW || kind == ZEROS) continue;
      if (seen >> kind & 1) entries[b].table = table_of[kind];
      else entries[b].kind = RAW;
    }
  }
  return made;
}

/* Write everything behind the plan; return the total. */
static size_t write_packed(const uint8_t *in, Header *header, Entry *entries, const Table *tables,
                           uint8_t *out, uint8_t *scratch) {
  size_t at = data_start(header);
  int current = -1;
  Codes codes;
  for (size_t b = 0; b < header->blocks; b++) {
    size_t nbytes = length_of(header->nbytes, b), size;
    const uint8_t *from = in + b * BLOCK_BYTES;
    Entry *entry = &entries[b];
    entry->offset = (uint32_t)(at / ALIGN);
    if (entry->kind == ZEROS) continue;
    if (entry->kind != RAW) {
      if (current != entry->table) make_codes(&tables[entry->table], &codes), current = entry->table;
      size = encode_block(entry->kind, from, nbytes, &codes, scratch);
      if (size < nbytes) from = scratch;
      else entry->kind = RAW; /* a block unlike the others of its group */
    }
    if (entry->kind == RAW) size = nbytes, entry->table = 0;
    memcpy(out + at, from, size);
    memset(out + at + size, 0, round_up(size, ALIGN) - size);
    at += round_up(size, ALIGN);
  }
  memset(out + at, 0, GUARD_BYTES);
  header->total = at + GUARD_BYTES;
  memcpy(out, header, sizeof *header);
  memcpy(out + sizeof *header, entries, header->blocks * sizeof *entries);
  memcpy(out + sizeof *header + header->blocks * sizeof *entries, tables,
         header->tables * sizeof *tables);
  return header->total;
}

static PyObject *encode(PyObject *self, PyObject *argument) {
  (void)self;
  Py_buffer in;
  PyObject *out = NULL;
  if (PyObject_GetBuffer(argument, &in, PyBUF_C_CONTIGUOUS) < 0) return NULL;
  size_t blocks = ((size_t)in.len + BLOCK_BYTES - 1) / BLOCK_BYTES;
  size_t groups = (blocks + GROUP_BLOCKS - 1) / GROUP_BLOCKS;
  size_t tables_max = groups * 2 < TABLES_MAX ? groups * 2 : TABLES_MAX;
  Entry *entries = PyMem_RawCalloc(blocks + 1, sizeof *entries);
  Table *tables = PyMem_RawCalloc(tables_max + 1, sizeof *tables);
  uint8_t *scratch = PyMem_RawMalloc(2 * BLOCK_BYTES);
  Header header = {.magic = MAGIC, .nbytes = (uint64_t)in.len, .blocks = (uint32_t)blocks};
  if (!entries || !tables || !scratch) {
    PyErr_NoMemory();
    goto end;
  }
  if (blocks >= UINT32_MAX / 4096) { /* offsets count ALIGN bytes in 32 bits */
    PyErr_SetString(PyExc_ValueError, "more than 64 GiB cannot be packed at once; pack in parts");
    goto end;
  }
  Py_BEGIN_ALLOW_THREADS;
  header.tables = plan(in.buf, header.nbytes, blocks, entries, tables);
  Py_END_ALLOW_THREADS;
  size_t most = data_start(&header) + blocks * (BLOCK_BYTES + ALIGN) + GUARD_BYTES, total;
  if (!(out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)most))) goto end;
  uint8_t *to = (uint8_t *)PyBytes_AS_STRING(out);
  Py_BEGIN_ALLOW_THREADS;
  total = write_packed(in.buf, &header, entries, tables, to, scratch);
  Py_END_ALLOW_THREADS;
  _PyBytes_Resize(&out, (Py_ssize_t)total);
end:
  PyMem_RawFree(entries);
  PyMem_RawFree(tables);
  PyMem_RawFree(scratch);
  PyBuffer_Release(&in);
  return out;
}

/* --- decoding ---------------------------------------------------------------------------------- */
/* A look-up yields up to four symbols: bits 0..7 how many stream bits, 8..15 how many symbols,
 * 32..63 the symbols.  Codes are 2 to 3 bits long on average, so it is nearly always three or four. */
static int make_lookups(const Table *table, uint64_t *lookups) {
  uint16_t single[LOOKUPS]; /* symbol << 8 | length; 0 is no code */
  unsigned code = 0, at = 0;
  memset(single, 0, sizeof single);
  for (int length = 1; length <= CODE_BITS_MAX; length++, code <<= 1)
    for (unsigned i = 0; i < table->counts[length]; i++, code++, at++) {
      if (at >= 256 || code >> length) return -1;
      for (unsigned k = reverse(code, length); k < LOOKUPS; k += 1u << length)
        single[k] = (uint16_t)(table->symbols[at] << 8 | length);
    }
  for (unsigned k = 0; k < LOOKUPS; k++) {
    uint64_t symbols = 0, count = 0;
    unsigned bits = 0;
    while (count < 4) {
      unsigned one = single[k >> bits], length = one & 255;
      if (!length || bits + length > CODE_BITS_MAX) break;
      symbols |= (uint64_t)(one >> 8) << (8 * count++);
      bits += length;
    }
    if (!count) bits = CODE_BITS_MAX;
    lookups[k] = symbols << 32 | count << 8 | bits;
  }
  return 0;
}

typedef struct {
  uint64_t at;    /* bits from the start of the streams */
  uint8_t *out, *end;
} Stream;

#define STEP(k)                                   \
  do {                                            \
    uint64_t e##k = lookups[w##k & (LOOKUPS - 1)]; \
    uint32_t s##k = (uint32_t)(e##k >> 32);       \
    memcpy(o##k, &s##k, 4);                       \
    o##k += (uint8_t)(e##k >> 8);                 \
    w##k >>= e##k & 63;                           \
    a##k += e##k & 63;                            \
  } while (0)
#define REFILL(k)                     \
  do {                                \
    memcpy(&w##k, in + (a##k >> 3), 8); \
    w##k >>= a##k & 7;                \
  } while (0)
#define EACH(x) x(0); x(1); x(2); x(3)
#define OPEN(k)                      \
  uint64_t a##k = s[k].at, w##k;     \
  uint8_t *o##k = s[k].out
#define CLOSE(k) s[k].at = a##k, s[k].out = o##k
#define ROOM(k) s[k].end - o##k >= 20 && a##k >> 3 <= last

/* Four streams at a time: one alone waits for each look-up before it knows where the next is. */
static int decode_streams(const uint8_t *in, uint64_t last, const uint64_t *lookups, Stream s[4]) {
  OPEN(0);
  OPEN(1);
  OPEN(2);
  OPEN(3);
  while (ROOM(0) && ROOM(1) && ROOM(2) && ROOM(3)) {
    EACH(REFILL); /* 57 bits or more: five look-ups of 11 */
    EACH(STEP);
    EACH(STEP);
    EACH(STEP);
    EACH(STEP);
    EACH(STEP);
  }
  CLOSE(0);
  CLOSE(1);
  CLOSE(2);
  CLOSE(3);
  for (int k = 0; k < 4; k++) {
    uint64_t a0 = s[k].at, w0;
    uint8_t *o0 = s[k].out;
    while (o0 < s[k].end) {
      if (a0 >> 3 > last) return -1;
      REFILL(0);
      STEP(0); /* writes up to three bytes past the end: there is room behind each segment */
      if (o0 < s[k].end) STEP(0);
      if (o0 < s[k].end) STEP(0);
    }
  }
  return 0;
}

static int decode_block(unsigned kind, const uint8_t *in, size_t left, const uint64_t *lookups,
                        uint8_t *out, size_t nbytes) {
  unsigned width = width_of(kind);
  size_t n = nbytes / width, segment = (n + STREAMS - 1) / STREAMS;
  size_t planes = round_up(n * (width - 1), 2), head = planes + 2 * STREAMS;
  uint8_t scratch[4][BLOCK_BYTES / 2 / STREAMS + 32];
  if (nbytes % width || left < head + 8) return -1;
  const uint8_t *streams = in + head;
  uint64_t last = left - head - 8;
  for (size_t first = 0; first < STREAMS && first * segment < n; first += 4) {
    Stream s[4];
    for (unsigned k = 0; k < 4; k++) {
      uint16_t offset;
      memcpy(&offset, in + planes + 2 * (first + k), 2);
      size_t start = (first + k) * segment, end = start + segment;
      if (start > n) start = n;
      if (end > n) end = n;
      s[k] = (Stream){(uint64_t)offset * 8, scratch[k], scratch[k] + (end - start)};
    }
    if (decode_streams(streams, last, lookups, s) < 0) return -1;
    for (unsigned k = 0; k < 4; k++) {
      size_t start = (first + k) * segment;
      size_t many = (size_t)(s[k].end - scratch[k]);
      if (!many) break;
      if (kind == HALF) join_half(out + 2 * start, many, scratch[k], in + start);
      else join_fp32(out + 4 * start, many, scratch[k], in + 2 * start, in + 2 * n + start);
    }
  }
  return 0;
}

/* Return 0, or the number of the block that is damaged, plus 1. */
static size_t decode_blocks(const uint8_t *in, const Header *header, size_t first, size_t count,
                            uint8_t *out) {
  uint64_t lookups[LOOKUPS];
  int current = -1;
  const uint8_t *index = in + sizeof *header, *tables = index + header->blocks * sizeof(Entry);
  for (size_t b = first; b < first + count; b++) {
    Entry entry;
    size_t nbytes = length_of(header->nbytes, b);
    memcpy(&entry, index + b * sizeof entry, sizeof entry);
    uint64_t offset = (uint64_t)entry.offset * ALIGN;
    if (offset > header->total) return b + 1;
    size_t left = header->total - offset;
    if (entry.kind == ZEROS) {
      memset(out, 0, nbytes);
    } else if (entry.kind == RAW) {
      if (left < nbytes) return b + 1;
      memcpy(out, in + offset, nbytes);
    } else {
      if (entry.kind >= KINDS || entry.table >= header->tables) return b + 1;
      if (current != entry.table) {
        Table table;
        memcpy(&table, tables + entry.table * sizeof table, sizeof table);
        if (make_lookups(&table, lookups) < 0) return b + 1;
        current = entry.table;
      }
      if (decode_block(entry.kind, in + offset, left, lookups, out, nbytes) < 0) return b + 1;
    }
    out += nbytes;
  }
  return 0;
}

static PyObject *decode(PyObject *self, PyObject *args) {
  (void)self;
  Py_buffer in, out;
  Py_ssize_t first, count;
  PyObject *result = NULL;
  Header header;
  if (!PyArg_ParseTuple(args, "y*w*nn", &in, &out, &first, &count)) return NULL;
  if ((size_t)in.len < sizeof header) {
    PyErr_SetString(PyExc_ValueError, "this is no packed buffer: it is too short");
    goto end;
  }
  memcpy(&header, in.buf, sizeof header);
  uint64_t blocks = header.nbytes / BLOCK_BYTES + (header.nbytes % BLOCK_BYTES != 0);
  if (header.magic != MAGIC || header.total > (uint64_t)in.len || header.blocks != blocks ||
      header.tables > TABLES_MAX || header.total < data_start(&header) + GUARD_BYTES) {
    PyErr_SetString(PyExc_ValueError, "this is no packed buffer, or only a part of one");
    goto end;
  }
  if (first < 0 || count < 0 || (uint64_t)first > blocks || (uint64_t)count > blocks - (uint64_t)first) {
    PyErr_Format(PyExc_ValueError, "there are %llu blocks; %zd from %zd are not among them",
                 (unsigned long long)blocks, count, first);
    goto end;
  }
  uint64_t start = (uint64_t)first * BLOCK_BYTES, end_at = start + (uint64_t)count * BLOCK_BYTES;
  if (end_at > header.nbytes) end_at = header.nbytes;
  if (start > end_at) start = end_at;
  if ((uint64_t)out.len != end_at - start) {
    PyErr_Format(PyExc_ValueError, "these blocks are %llu bytes, the destination has %zd",
                 (unsigned long long)(end_at - start), out.len);
    goto end;
  }
  size_t damaged;
  Py_BEGIN_ALLOW_THREADS;
  damaged = decode_blocks(in.buf, &header, (size_t)first, (size_t)count, out.buf);
  Py_END_ALLOW_THREADS;
  if (damaged) {
    PyErr_Format(PyExc_ValueError, "block %zu is damaged; pack the weights again", damaged - 1);
    goto end;
  }
  result = Py_NewRef(Py_None);
end:
  PyBuffer_Release(&in);
  PyBuffer_Release(&out);
  return result;
}

static PyMethodDef functions[] = {{"encode", encode, METH_O, NULL},
                                  {"decode", decode, METH_VARARGS, NULL},
                                  {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "overcommit.kernels._unpack",
                                    .m_size = -1, .m_methods = functions};

PyMODINIT_FUNC PyInit__unpack(void) {
  PyObject *m = PyModule_Create(&module);
  static const struct {
    const char *name;
    long value;
  } constants[] = {{"BLOCK_BYTES", BLOCK_BYTES}, {"STREAMS", STREAMS}, {"CODE_BITS_MAX", CODE_BITS_MAX},
                   {"GROUP_BLOCKS", GROUP_BLOCKS}, {"ALIGN", ALIGN}, {"GUARD_BYTES", GUARD_BYTES},
                   {"RAW", RAW}, {"HALF", HALF}, {"FP32", FP32}, {"ZEROS", ZEROS}};
  for (size_t i = 0; m && i < sizeof constants / sizeof *constants; i++)
    if (PyModule_AddIntConstant(m, constants[i].name, constants[i].value) < 0) Py_CLEAR(m);
  return m;
}
