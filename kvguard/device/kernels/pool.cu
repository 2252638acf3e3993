// Gather and scatter between a KV pool and canonical bytes, and a 64-bit word written when all before it is done.
//
// Knows: strides, runs, slots. Must not know: layouts (plan.py makes runs of them), sequences, who waits.
// Invariants: of a slot below zero, or beyond the pool, nothing is read and nothing is written; every access is as wide as TYPE, and plan.py vouches that all
// strides, offsets and pointers are multiples of it. twin.py says the same arithmetic in Python; tests/device compares the two over random layouts.
// No include and no feature beyond C++11: NVRTC, nvcc and, with a few macros, an ordinary C++ compiler take it.

typedef long long kvg_i64;
typedef unsigned long long kvg_u64;

// One item is one run of one token: `lanes` threads copy its units side by side.
template <typename TYPE, bool GATHER>
__device__ inline void kvg_copy_item(
    unsigned char *pool, unsigned char *flat, const kvg_i64 *slots, const kvg_i64 *places, const kvg_i64 *runs, kvg_i64 blocks, kvg_i64 block_tokens,
    kvg_i64 block_stride, kvg_i64 slot_stride, kvg_i64 unit_bytes, unsigned first_run, unsigned run_count, unsigned run_units, unsigned item, unsigned lane,
    unsigned lanes)
{
    const unsigned token = item / run_count;
    const unsigned run = first_run + (item - token * run_count);
    const kvg_i64 slot = slots[token];
    if (slot < 0) {
        return;
    }
    const kvg_i64 block = slot / block_tokens;
    if (block >= blocks) {
        return;
    }
    const kvg_i64 place = places ? places[token] : (kvg_i64)token * unit_bytes;
    TYPE *in_pool = (TYPE *)(pool + runs[2 * run] + block * block_stride + (slot - block * block_tokens) * slot_stride);
    TYPE *in_flat = (TYPE *)(flat + place + runs[2 * run + 1]);
    for (unsigned unit = lane; unit < run_units; unit += lanes) {
        if (GATHER) {
            in_flat[unit] = in_pool[unit];
        } else {
            in_pool[unit] = in_flat[unit];
        }
    }
}

#define KVG_KERNEL(NAME, TYPE, GATHER)                                                                                                                         \
    extern "C" __global__ void NAME(                                                                                                                           \
        unsigned char *pool, unsigned char *flat, const kvg_i64 *slots, const kvg_i64 *places, const kvg_i64 *runs, kvg_i64 blocks, kvg_i64 block_tokens,      \
        kvg_i64 block_stride, kvg_i64 slot_stride, kvg_i64 unit_bytes, unsigned first_run, unsigned run_count, unsigned run_units, unsigned items,             \
        unsigned lane_bits)                                                                                                                                    \
    {                                                                                                                                                          \
        const unsigned lanes = 1u << lane_bits;                                                                                                                \
        const unsigned at_once = blockDim.x >> lane_bits;                                                                                                      \
        const unsigned lane = threadIdx.x & (lanes - 1u);                                                                                                      \
        for (unsigned item = blockIdx.x * at_once + (threadIdx.x >> lane_bits); item < items; item += gridDim.x * at_once) {                                   \
            kvg_copy_item<TYPE, GATHER>(                                                                                                                       \
                pool, flat, slots, places, runs, blocks, block_tokens, block_stride, slot_stride, unit_bytes, first_run, run_count, run_units, item, lane,     \
                lanes);                                                                                                                                        \
        }                                                                                                                                                      \
    }

KVG_KERNEL(kvg_gather_16, uint4, true)
KVG_KERNEL(kvg_gather_8, kvg_u64, true)
KVG_KERNEL(kvg_gather_4, unsigned, true)
KVG_KERNEL(kvg_gather_2, unsigned short, true)
KVG_KERNEL(kvg_gather_1, unsigned char, true)
KVG_KERNEL(kvg_scatter_16, uint4, false)
KVG_KERNEL(kvg_scatter_8, kvg_u64, false)
KVG_KERNEL(kvg_scatter_4, unsigned, false)
KVG_KERNEL(kvg_scatter_2, unsigned short, false)
KVG_KERNEL(kvg_scatter_1, unsigned char, false)

// Where cuStreamWriteValue64 isn't to be had: one thread, everything before it on the stream is done, and visible to the host before the word is.
extern "C" __global__ void kvg_publish(kvg_u64 *word, kvg_u64 value)
{
    __threadfence_system();
    *(volatile kvg_u64 *)word = value;
}
