// What a warp does together, and the three element types. The only file with instructions of a GPU: a build that defines
// EMULATED_WARP gets the same names from a header that computes them on a CPU.
#pragma once

#ifdef EMULATED_WARP
#include "emulated_warp.h"
#else
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

DEVICE int thread_index() { return threadIdx.x; }
DEVICE long long block_index() { return blockIdx.x; }
DEVICE void synchronise_block() { __syncthreads(); }
DEVICE char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}
DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float minus_infinity() { return __int_as_float(0xff800000); }
DEVICE float float_of_bits(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned bits_of_float(float value) { return __float_as_uint(value); }
DEVICE float root(float x) { return __fsqrt_rn(x); }

DEVICE unsigned pack_half(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
DEVICE float unpack_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
DEVICE unsigned pack_bfloat(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// c (16 x 8) += a (16 x 16) * b (16 x 8), each spread over the warp as the PTX manual has it for mma.m16n8k16.
DEVICE void multiply_half(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void multiply_bfloat(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane i gives the address of row i % 8 of matrix i / 8. Each
// comes transposed: of matrix m this lane gets column lane / 4 of rows 2 * (lane % 4) and the next.
DEVICE void load_transposed(unsigned (&matrices)[4], const void* row) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address)
                 : "memory");
}
#endif

// 16 bytes, moved at once.
struct alignas(16) Piece {
    unsigned words[4];
};

// An element type: how two neighbours (a Pair) are read, written and multiplied. HAS_BOUND: whether the softmax may
// subtract a bound instead of the largest logit, for which weights of 2 ** -120 must not round to zero.

struct Float16 {
    using Element = unsigned short;
    using Pair = unsigned;
    static constexpr bool HAS_BOUND = false;
    static DEVICE float low(Pair pair) { return unpack_half(pair & 0xffff); }
    static DEVICE float high(Pair pair) { return unpack_half(pair >> 16); }
    static DEVICE Pair make(float low, float high) { return pack_half(low, high); }
    static DEVICE void multiply(float (&c)[4], const Pair (&a)[4], const Pair (&b)[2]) { multiply_half(c, a, b); }
};

struct BFloat16 {
    using Element = unsigned short;
    using Pair = unsigned;
    static constexpr bool HAS_BOUND = true;
    static DEVICE float low(Pair pair) { return float_of_bits(pair << 16); }
    static DEVICE float high(Pair pair) { return float_of_bits(pair & 0xffff0000); }
    static DEVICE Pair make(float low, float high) { return pack_bfloat(low, high); }
    static DEVICE void multiply(float (&c)[4], const Pair (&a)[4], const Pair (&b)[2]) { multiply_bfloat(c, a, b); }
};

// Without tensor cores, which would round to 10 bits: operands lie as for m16n8k16 and are passed around the warp.
struct Float32 {
    using Element = float;
    struct alignas(8) Pair {
        float first, second;
    };
    // It could, but its products without tensor cores are long, and twice as much code takes long to compile.
    static constexpr bool HAS_BOUND = false;
    static DEVICE float low(Pair pair) { return pair.first; }
    static DEVICE float high(Pair pair) { return pair.second; }
    static DEVICE Pair make(float low, float high) { return {low, high}; }
    static DEVICE void multiply(float (&c)[4], const Pair (&a)[4], const Pair (&b)[2]) {
        const int lane = thread_index() % 32, row = lane / 4, column = lane % 4 * 2;
        UNROLL for (int half = 0; half < 2; ++half) {
            UNROLL for (int step = 0; step < 8; ++step) {
                const bool first = step % 2 == 0;
                const Pair &above = a[2 * half], &below = a[2 * half + 1], &other = b[half];
                // Element (row, k) of a lies in lane 4 * row + k / 2, element (k, column) of b in 4 * column + k / 2.
                const int holder = step / 2;
                const float a0 = shuffle(first ? above.first : above.second, 4 * row + holder);
                const float a1 = shuffle(first ? below.first : below.second, 4 * row + holder);
                const float mine = first ? other.first : other.second;
                const float b0 = shuffle(mine, 4 * column + holder), b1 = shuffle(mine, 4 * column + 4 + holder);
                c[0] += a0 * b0, c[1] += a0 * b1, c[2] += a1 * b0, c[3] += a1 * b1;
            }
        }
    }
};
