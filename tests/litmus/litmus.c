/* Litmus tests of the memory model, two processes on shared memory, with the extension's own fence.
 *
 *   store_load ROUNDS: each side stores its word, fences, and loads the other's.  This is the shape of
 *     push + must_wake against arm, and of take against try_evict.  FORBIDDEN: both loads miss, which
 *     is a lost wake-up, or an eviction under a lease.
 *   message ROUNDS: one side fills a slot and moves the tail, the other sees the tail and reads the
 *     slot.  FORBIDDEN: a byte of an older message.
 *
 * Prints the number of forbidden outcomes.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "_shm_fence.h"

#define LINE 128
#define SLOTS 64

typedef struct {
  _Alignas(LINE) _Atomic uint64_t word[2][LINE / 8];
  _Alignas(LINE) _Atomic uint64_t turn[2][LINE / 8];
  _Alignas(LINE) _Atomic uint64_t tail;
  _Alignas(LINE) _Atomic uint64_t head;
  _Alignas(LINE) uint64_t slot[SLOTS][8];
} shared;

static void wait_for(_Atomic uint64_t *turn, uint64_t round) {
  while (atomic_load(turn) < round) relax();
}

static uint64_t store_load(shared *s, uint64_t rounds) {
  char *missed = mmap(NULL, 2 * rounds, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (missed == MAP_FAILED) exit(2);
  memset(missed, 0, 2 * rounds);
  pid_t child = fork();
  int me = child == 0, other = !me;
  for (uint64_t i = 1; i < rounds; i++) {
    atomic_store(&s->turn[me][0], i);
    wait_for(&s->turn[other][0], i);
    atomic_store_explicit(&s->word[me][0], i, memory_order_release);
    full_fence();
    if (atomic_load_explicit(&s->word[other][0], memory_order_acquire) < i)
      missed[(uint64_t)me * rounds + i] = 1;
  }
  if (child == 0) _exit(0);
  waitpid(child, NULL, 0);
  uint64_t both = 0;
  for (uint64_t i = 1; i < rounds; i++) both += missed[i] && missed[rounds + i];
  return both;
}

static uint64_t message(shared *s, uint64_t rounds) {
  pid_t child = fork();
  if (child == 0) {
    for (uint64_t i = 0; i < rounds; i++) {
      while (i - atomic_load_explicit(&s->head, memory_order_acquire) >= SLOTS) relax();
      for (int k = 0; k < 8; k++) s->slot[i % SLOTS][k] = i * 8 + (uint64_t)k;
      atomic_store_explicit(&s->tail, i + 1, memory_order_release);
    }
    _exit(0);
  }
  uint64_t stale = 0;
  for (uint64_t i = 0; i < rounds; i++) {
    while (atomic_load_explicit(&s->tail, memory_order_acquire) <= i) relax();
    for (int k = 0; k < 8; k++) stale += s->slot[i % SLOTS][k] != i * 8 + (uint64_t)k;
    atomic_store_explicit(&s->head, i + 1, memory_order_release);
  }
  waitpid(child, NULL, 0);
  return stale;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  shared *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (s == MAP_FAILED) return 2;
  uint64_t rounds = strtoull(argv[2], NULL, 10);
  uint64_t bad = strcmp(argv[1], "message") ? store_load(s, rounds) : message(s, rounds);
  printf("%llu\n", (unsigned long long)bad);
  return 0;
}
