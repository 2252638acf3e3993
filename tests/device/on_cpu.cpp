// pool.cu as ordinary C++: the kernels' own source, launched by a loop. Only what the launch of a GPU adds is not proved by it.
#include <atomic>

struct Dim { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
static thread_local Dim blockIdx, threadIdx, blockDim, gridDim;
#define __global__
#define __device__
static inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }

#include "pool.cu"

#define LAUNCHED(NAME)                                                                                                                                         \
    extern "C" void launch_##NAME(                                                                                                                             \
        unsigned grid, unsigned threads, unsigned char *pool, unsigned char *flat, const kvg_i64 *slots, const kvg_i64 *places, const kvg_i64 *runs,           \
        kvg_i64 blocks, kvg_i64 block_tokens, kvg_i64 block_stride, kvg_i64 slot_stride, kvg_i64 unit_bytes, unsigned first_run, unsigned run_count,           \
        unsigned run_units, unsigned items, unsigned lane_bits)                                                                                                \
    {                                                                                                                                                          \
        gridDim = {grid, 1, 1};                                                                                                                                \
        blockDim = {threads, 1, 1};                                                                                                                            \
        for (unsigned block = 0; block < grid; ++block)                                                                                                        \
            for (unsigned thread = 0; thread < threads; ++thread) {                                                                                            \
                blockIdx = {block, 0, 0};                                                                                                                      \
                threadIdx = {thread, 0, 0};                                                                                                                    \
                NAME(pool, flat, slots, places, runs, blocks, block_tokens, block_stride, slot_stride, unit_bytes, first_run, run_count, run_units, items,     \
                     lane_bits);                                                                                                                               \
            }                                                                                                                                                  \
    }

LAUNCHED(kvg_gather_16)
LAUNCHED(kvg_gather_8)
LAUNCHED(kvg_gather_4)
LAUNCHED(kvg_gather_2)
LAUNCHED(kvg_gather_1)
LAUNCHED(kvg_scatter_16)
LAUNCHED(kvg_scatter_8)
LAUNCHED(kvg_scatter_4)
LAUNCHED(kvg_scatter_2)
LAUNCHED(kvg_scatter_1)

extern "C" void launch_publish(kvg_u64 *word, kvg_u64 value) { kvg_publish(word, value); }
