// The warp of a GPU on one CPU thread, for sources that include warp.h: every thread of a block is a coroutine, and what a
// warp does together waits for all of its 32. Fragments lie as the PTX manual draws them for mma.m16n8k16 and ldmatrix.
#pragma once

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define DEVICE inline
#define UNROLL

namespace emulated {

constexpr size_t STACK = 128 << 10;

// All lanes leave their values here and read everyone's; two sets, because a fast lane may already leave its next.
struct Meeting {
    int size = 0, arrived = 0;
    unsigned turn = 0;
    std::vector<unsigned char> values[2];
};

struct Block {
    long long index = 0;
    int current = 0, alive = 0;
    std::vector<char> shared;
    std::vector<ucontext_t> contexts;
    std::vector<bool> is_done;
    std::vector<Meeting> warps;
    Meeting everyone;
    std::function<void()> body;
    ucontext_t outside;
};

inline Block* block;

inline void next() {
    const int from = block->current, count = static_cast<int>(block->contexts.size());
    int to = from;
    do to = (to + 1) % count;
    while (block->is_done[to] && to != from);
    if (to == from) {
        fputs("A thread waits for others that have ended.\n", stderr);
        abort();
    }
    block->current = to;
    swapcontext(&block->contexts[from], &block->contexts[to]);
}

constexpr size_t SLOT = 64;

// Leaves `value` and gives the values of all, SLOT bytes each, once everyone has.
inline const unsigned char* meet(Meeting& meeting, int place, const void* value, size_t bytes) {
    const unsigned turn = meeting.turn;
    auto& values = meeting.values[turn % 2];
    memcpy(&values[place * SLOT], value, bytes);
    if (++meeting.arrived == meeting.size) {
        meeting.arrived = 0;
        ++meeting.turn;
    } else {
        while (meeting.turn == turn) next();
    }
    return values.data();
}

template <class T>
T of_lane(const unsigned char* values, int lane) {
    T value;
    memcpy(&value, values + lane * SLOT, sizeof(T));
    return value;
}

template <class T>
const unsigned char* meet_warp(const T& value) {
    static_assert(sizeof(T) <= SLOT);
    const int thread = block->current;
    return meet(block->warps[thread / 32], thread % 32, &value, sizeof(T));
}

inline void start() {
    block->body();
    block->is_done[block->current] = true;
    if (--block->alive == 0) setcontext(&block->outside);
    next();
}

// Runs blocks of a grid, one after the other, from `first` on. Shared memory is filled with NaN before each.
inline void run(long long first, long long blocks, int threads, size_t shared_bytes, std::function<void()> body) {
    Block state;
    state.body = std::move(body);
    std::vector<std::unique_ptr<char[]>> stacks;
    for (int i = 0; i < threads; ++i) stacks.emplace_back(new char[STACK]);
    auto prepare = [](Meeting& meeting, int size) {
        meeting.size = size, meeting.arrived = 0;
        for (auto& values : meeting.values) values.assign(size * SLOT, 0);
    };
    for (long long index = first; index < first + blocks; ++index) {
        state.index = index, state.current = 0, state.alive = threads;
        state.shared.assign(shared_bytes + 16, static_cast<char>(0xff));
        state.contexts.assign(threads, {});
        state.is_done.assign(threads, false);
        state.warps.assign(threads / 32, {});
        for (auto& warp : state.warps) prepare(warp, 32);
        prepare(state.everyone, threads);
        block = &state;
        for (int i = 0; i < threads; ++i) {
            getcontext(&state.contexts[i]);
            state.contexts[i].uc_stack.ss_sp = stacks[i].get();
            state.contexts[i].uc_stack.ss_size = STACK;
            state.contexts[i].uc_link = nullptr;
            makecontext(&state.contexts[i], start, 0);
        }
        swapcontext(&state.outside, &state.contexts[0]);
    }
}

inline float half_of(unsigned short bits) {
    _Float16 value;
    memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}

struct Operands {
    unsigned a[4], b[2];
};

// Element (row, k) of a: lane 4 * (row % 8) + k % 8 / 2, register row / 8 + 2 * (k / 8), upper half if k is odd.
// Element (k, column) of b: lane 4 * column + k % 8 / 2, register k / 8.
template <class Convert>
void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], Convert convert) {
    const int lane = block->current % 32;
    const unsigned char* all = meet_warp(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const unsigned left = of_lane<Operands>(all, row % 8 * 4 + k % 8 / 2).a[row / 8 + 2 * (k / 8)];
            const unsigned right = of_lane<Operands>(all, column * 4 + k % 8 / 2).b[k / 8];
            c[i] += convert(left >> k % 2 * 16 & 0xffff) * convert(right >> k % 2 * 16 & 0xffff);
        }
    }
}

}  // namespace emulated

inline int thread_index() { return emulated::block->current; }
inline long long block_index() { return emulated::block->index; }
inline void synchronise_block() {
    const int thread = emulated::block->current;
    emulated::meet(emulated::block->everyone, thread, &thread, sizeof(thread));
}
inline char* shared_memory() {
    const auto address = reinterpret_cast<size_t>(emulated::block->shared.data());
    return reinterpret_cast<char*>((address + 15) / 16 * 16);
}
inline float shuffle(float value, int lane) { return emulated::of_lane<float>(emulated::meet_warp(value), lane); }
inline float shuffle_xor(float value, int mask) { return shuffle(value, thread_index() % 32 ^ mask); }
// As ex2.approx.ftz: what is smaller than the smallest normal number is zero.
inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : exp2f(x); }
inline float minus_infinity() { return -INFINITY; }
inline float float_of_bits(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned bits_of_float(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float root(float x) { return sqrtf(x); }
inline unsigned half_bits(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}
inline unsigned pack_half(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline float unpack_half(unsigned short bits) { return emulated::half_of(bits); }
// To the nearest, ties to even.
inline unsigned bfloat_bits(float value) {
    const unsigned bits = bits_of_float(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned pack_bfloat(float low, float high) { return bfloat_bits(low) | bfloat_bits(high) << 16; }
inline void multiply_half(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulated::multiply(c, a, b, [](unsigned bits) { return emulated::half_of(static_cast<unsigned short>(bits)); });
}
inline void multiply_bfloat(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    emulated::multiply(c, a, b, [](unsigned bits) { return float_of_bits(bits << 16); });
}
inline void load_transposed(unsigned (&matrices)[4], const void* row) {
    const int lane = thread_index() % 32;
    const unsigned char* rows = emulated::meet_warp(row);
    for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned short pair[2];
        for (int i = 0; i < 2; ++i) {
            const void* from = emulated::of_lane<const void*>(rows, matrix * 8 + lane % 4 * 2 + i);
            memcpy(&pair[i], static_cast<const char*>(from) + lane / 4 * 2, 2);
        }
        matrices[matrix] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
    }
}
