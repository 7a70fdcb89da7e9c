/* A thread block on one core: every CUDA thread is a coroutine that runs from barrier to barrier.
 *
 * In one order, and in the opposite one: what a barrier is missing for comes out differently.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define KERNEL void
#define DEVICE static
#define SHARED static
#define BARRIER() swapcontext(&coroutines[threadIdx.x], &scheduler)
#define ATOMIC_ADD(at, n) (*(at) += (n))
#define THREADS_MAX 1024
#define STACK_BYTES 65536

static struct {
  unsigned x, y, z;
} threadIdx, blockIdx, gridDim;
static ucontext_t coroutines[THREADS_MAX], scheduler;
static unsigned char is_done[THREADS_MAX];

static unsigned f16_of_f32_hardware(unsigned x) {
  float from;
  unsigned short bits;
  memcpy(&from, &x, 4);
  _Float16 to = (_Float16)from;
  memcpy(&bits, &to, 2);
  return bits;
}
static unsigned f32_of_f16_hardware(unsigned x) {
  unsigned short bits = (unsigned short)x;
  _Float16 from;
  unsigned out;
  memcpy(&from, &bits, 2);
  float to = (float)from;
  memcpy(&out, &to, 4);
  return out;
}
static unsigned f32_of_u8(unsigned x) {
  float to = (float)x;
  unsigned out;
  memcpy(&out, &to, 4);
  return out;
}

static unsigned long long arguments[16];
static void call_kernel(void);
static void run_thread(void) {
  call_kernel();
  is_done[threadIdx.x] = 1;
}

void launch(unsigned grid_x, unsigned grid_y, unsigned threads, int is_backwards,
            const unsigned long long *given, int count) {
  char *stacks = malloc((size_t)threads * STACK_BYTES);
  memcpy(arguments, given, (size_t)count * sizeof *given);
  gridDim.x = grid_x, gridDim.y = grid_y;
  for (unsigned block = 0; block < grid_x * grid_y; block++) {
    blockIdx.x = block % grid_x, blockIdx.y = block / grid_x;
    memset(is_done, 0, sizeof is_done);
    for (unsigned t = 0; t < threads; t++) {
      getcontext(&coroutines[t]);
      coroutines[t].uc_stack.ss_sp = stacks + (size_t)t * STACK_BYTES;
      coroutines[t].uc_stack.ss_size = STACK_BYTES;
      coroutines[t].uc_link = &scheduler;
      makecontext(&coroutines[t], run_thread, 0);
    }
    for (unsigned left = threads; left;) {
      left = 0;
      for (unsigned k = 0; k < threads; k++) {
        unsigned t = is_backwards ? threads - 1 - k : k;
        if (is_done[t]) continue;
        threadIdx.x = t;
        swapcontext(&scheduler, &coroutines[t]);
        left += !is_done[t];
      }
    }
  }
  free(stacks);
}
