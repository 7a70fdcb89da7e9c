/* The store-load fence of the wake-up and lease protocols, shared with the litmus test.
 *
 * With OVERCOMMIT_OMIT_FENCE (the litmus test alone) only the compiler is held back, not the CPU.
 */
#ifndef OVERCOMMIT_SHM_FENCE_H
#define OVERCOMMIT_SHM_FENCE_H

#include <stdatomic.h>

static inline void full_fence(void) {
#ifndef OVERCOMMIT_OMIT_FENCE
  atomic_thread_fence(memory_order_seq_cst);
#else
  atomic_signal_fence(memory_order_seq_cst);
#endif
}

static inline void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("isb" ::: "memory");
#endif
}

#endif
