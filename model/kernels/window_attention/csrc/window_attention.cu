// Window attention: a block attends within one window, with HEADS neighbouring heads; reference.py says what it computes.
//
// Keys (scaled to unit length) and values lie in shared memory; a warp takes 16 queries at a time, holds them and their
// 16 rows of the result in registers, and passes over the keys in groups of GROUP * 16. The products of queries and keys
// come out of the tensor cores spread over the warp as the products of weights and values need them, so logits never
// leave registers (Dao, "FlashAttention-2", 2023). All tiles are of 16, which divides 64, 144, 256 and 576 tokens.
//
// Softmax: subtracts the largest logit so far. Where that cannot underflow, the bound that cosine attention gives is
// subtracted instead, |<q, k>| <= 1 and 0 <= position bias <= 16, and no maximum is needed.
//
// Windows whose keys and values do not fit shared memory pass through it in chunks; a block then has a part of the
// queries (grid: windows x groups of heads x parts).

#include "geometry.h"
#include "warp.h"

struct Arguments {
    const void* qkv;
    const void* qkv_bias;
    const float* scale;
    const float* table;
    void* out;
    long long qkv_image_stride, out_image_stride;
    Map map;
    int num_heads;
};

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float SHIFT_PENALTY = -100.0f;
constexpr float LARGEST_POSITION_BIAS = 16.0f;
// exp(-80) is above the smallest normal float32, with 2 ** 10 to spare.
constexpr float BOUNDED_RANGE = 80.0f;
constexpr int ORIGIN_BIT = 16, NO_TOKEN = 1 << 20;

template <class Type_, int WINDOW_, int HEAD_DIM_, bool COSINE_, int HEADS_, int WARPS_, int GROUP_, int CHUNK_GROUPS_>
struct Config {
    using Type = Type_;
    using Element = typename Type::Element;
    static constexpr int WINDOW = WINDOW_, HEAD_DIM = HEAD_DIM_, HEADS = HEADS_, WARPS = WARPS_, GROUP = GROUP_;
    static constexpr bool COSINE = COSINE_;
    static constexpr int THREADS = 32 * WARPS;
    // One block computes while another waits for its keys: registers for two, where that costs no spills.
    static constexpr int BLOCKS_PER_SM = HEAD_DIM == 32 && sizeof(Element) == 2 ? 2 : 1;
    static constexpr int TOKENS = WINDOW * WINDOW, TILES = (TOKENS + 15) / 16;
    static constexpr int GROUPS = (TILES + GROUP - 1) / GROUP, CHUNK_GROUPS = CHUNK_GROUPS_;
    static constexpr int CHUNKS = (GROUPS + CHUNK_GROUPS - 1) / CHUNK_GROUPS, CHUNK_TOKENS = CHUNK_GROUPS * GROUP * 16;
    static constexpr bool HAS_TAIL = CHUNKS * CHUNK_TOKENS > TOKENS;
    // Tiles of 16 queries of one head, all heads. A block that sees the keys in chunks has as many as it has warps.
    static constexpr int ITEMS = HEADS * TILES;
    static constexpr int PARTS = CHUNKS == 1 ? 1 : (ITEMS + WARPS - 1) / WARPS;
    static constexpr int ROUNDS = CHUNKS == 1 ? (ITEMS + WARPS - 1) / WARPS : 1;
    static constexpr int ENTRIES = (2 * WINDOW - 1) * (2 * WINDOW - 1);
    // 16 bytes more than a row: eight rows then begin in different banks.
    static constexpr int STRIDE = HEAD_DIM + 16 / sizeof(Element);
    static constexpr int TABLE_BYTES = (HEADS * ENTRIES + 3) / 4 * 16, KEYS_BYTES = CHUNK_TOKENS * 4;
    static constexpr int ROWS_BYTES = HEADS * CHUNK_TOKENS * STRIDE * static_cast<int>(sizeof(Element));
    static constexpr int SHARED_BYTES = TABLE_BYTES + KEYS_BYTES + 2 * ROWS_BYTES;
};

DEVICE float sum_of_quad(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

DEVICE float max_of_quad(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

// The factor that makes a vector of this squared length one of length 1; zero stays zero.
DEVICE float unit_factor(float squares) {
    const float length = root(squares);
    return length > 0.0f ? 1.0f / fmaxf(length, 1e-12f) : 0.0f;
}

template <class C>
struct Shared {
    using Element = typename C::Element;
    float* table;
    int* keys;
    Element* k;
    Element* v;

    DEVICE explicit Shared(char* memory) {
        table = reinterpret_cast<float*>(memory);
        keys = reinterpret_cast<int*>(memory + C::TABLE_BYTES);
        k = reinterpret_cast<Element*>(memory + C::TABLE_BYTES + C::KEYS_BYTES);
        v = k + C::HEADS * C::CHUNK_TOKENS * C::STRIDE;
    }
};

// Fills shared memory with the keys and values of a chunk, and with where their position biases are.
template <class C>
DEVICE void load_chunk(const Shared<C>& shared, const Arguments& arguments, const typename C::Element* image,
                       int first_head, int window_row, int window_column, int chunk) {
    using Type = typename C::Type;
    using Element = typename C::Element;
    using Pair = typename Type::Pair;
    constexpr int PIECE = 16 / sizeof(Element), PIECES = C::HEAD_DIM / PIECE, PAIRS = PIECE / 2;
    const int channels = arguments.num_heads * C::HEAD_DIM;
    const Element* bias = static_cast<const Element*>(arguments.qkv_bias);

    for (int number = thread_index(); number < C::CHUNK_TOKENS; number += C::THREADS) {
        const int token = chunk * C::CHUNK_TOKENS + number;
        const int origin = find_token<C::WINDOW>(arguments.map, window_row, window_column, token).origin;
        shared.keys[number] =
            token < C::TOKENS ? key_entry<C::WINDOW>(token) | origin << ORIGIN_BIT : NO_TOKEN;
    }
    // Neighbouring threads have neighbouring pieces of a row, then neighbouring heads.
    for (int index = thread_index(); index < C::CHUNK_TOKENS * C::HEADS * PIECES; index += C::THREADS) {
        const int piece = index % PIECES, head = index / PIECES % C::HEADS, number = index / (PIECES * C::HEADS);
        const int token = chunk * C::CHUNK_TOKENS + number;
        const int channel = (first_head + head) * C::HEAD_DIM + piece * PIECE;
        Piece k = {}, v = {};
        if (token < C::TOKENS) {
            const Token found = find_token<C::WINDOW>(arguments.map, window_row, window_column, token);
            const Element* row =
                is_padding(arguments.map, found) ? bias : image + place_of(arguments.map, found) * (3 * channels);
            k = *reinterpret_cast<const Piece*>(row + channels + channel);
            v = *reinterpret_cast<const Piece*>(row + 2 * channels + channel);
        }
        if (C::COSINE) {
            Pair* pairs = reinterpret_cast<Pair*>(&k);
            float squares = 0.0f;
            UNROLL for (int i = 0; i < PAIRS; ++i) {
                const float low = Type::low(pairs[i]), high = Type::high(pairs[i]);
                squares += low * low + high * high;
            }
            UNROLL for (int mask = 1; mask < PIECES; mask *= 2) squares += shuffle_xor(squares, mask);
            const float factor = unit_factor(squares);
            UNROLL for (int i = 0; i < PAIRS; ++i)
                pairs[i] = Type::make(Type::low(pairs[i]) * factor, Type::high(pairs[i]) * factor);
        }
        const int offset = (head * C::CHUNK_TOKENS + number) * C::STRIDE + piece * PIECE;
        *reinterpret_cast<Piece*>(shared.k + offset) = k;
        *reinterpret_cast<Piece*>(shared.v + offset) = v;
    }
}

// Two fragments of 16 keys x 8 dims each, from `first` on.
template <class C>
DEVICE void load_values(typename C::Type::Pair (&b)[2][2], const typename C::Element* first) {
    const int lane = thread_index() % 32;
    if constexpr (sizeof(typename C::Element) == 2) {
        unsigned matrices[4];
        load_transposed(matrices, first + (lane / 8 % 2 * 8 + lane % 8) * C::STRIDE + lane / 16 * 8);
        b[0][0] = matrices[0], b[0][1] = matrices[1], b[1][0] = matrices[2], b[1][1] = matrices[3];
    } else {
        const typename C::Element* corner = first + lane % 4 * 2 * C::STRIDE + lane / 4;
        UNROLL for (int tile = 0; tile < 2; ++tile) {
            UNROLL for (int half = 0; half < 2; ++half) {
                const typename C::Element* element = corner + half * 8 * C::STRIDE + tile * 8;
                b[tile][half] = C::Type::make(element[0], element[C::STRIDE]);
            }
        }
    }
}

// 16 queries of a head, as a warp holds them: this lane has rows lane / 4 and lane / 4 + 8.
template <class C>
struct Queries {
    using Type = typename C::Type;
    using Pair = typename Type::Pair;
    static constexpr int STEPS = C::HEAD_DIM / 16;
    Pair q[STEPS][4];            // 16 queries x 16 dims a step, as operand A of the tensor cores.
    float mean[2 * STEPS][4];    // 16 queries x 8 dims each.
    float largest[2], total[2];  // Of the two rows; `total` only over the keys that this lane has seen.
    // As the entries of Shared::keys.
    int entry[2];

    DEVICE void load(const Arguments& arguments, const typename C::Element* image, int head, int window_row,
                     int window_column, int tile) {
        const int lane = thread_index() % 32, channels = arguments.num_heads * C::HEAD_DIM;
        UNROLL for (int half = 0; half < 2; ++half) {
            const int number = tile * 16 + lane / 4 + 8 * half;
            const int token = number < C::TOKENS ? number : C::TOKENS - 1;
            const Token found = find_token<C::WINDOW>(arguments.map, window_row, window_column, token);
            const bool is_wanted = number < C::TOKENS && !is_padding(arguments.map, found);
            entry[half] = query_entry<C::WINDOW>(token) | found.origin << ORIGIN_BIT;
            const typename C::Element* row =
                image + place_of(arguments.map, found) * (3 * channels) + head * C::HEAD_DIM + lane % 4 * 2;
            float squares = 0.0f;
            UNROLL for (int step = 0; step < 2 * STEPS; ++step) {
                Pair pair = {};
                if (is_wanted) pair = *reinterpret_cast<const Pair*>(row + 8 * step);
                squares += Type::low(pair) * Type::low(pair) + Type::high(pair) * Type::high(pair);
                q[step / 2][step % 2 * 2 + half] = pair;
            }
            if (C::COSINE) {
                const float factor = unit_factor(sum_of_quad(squares));
                UNROLL for (int step = 0; step < 2 * STEPS; ++step) {
                    Pair& pair = q[step / 2][step % 2 * 2 + half];
                    pair = Type::make(Type::low(pair) * factor, Type::high(pair) * factor);
                }
            }
            largest[half] = minus_infinity();
            total[half] = 0.0f;
        }
        UNROLL for (int tile = 0; tile < 2 * STEPS; ++tile) {
            UNROLL for (int i = 0; i < 4; ++i) mean[tile][i] = 0.0f;
        }
    }

    // Attends to the keys of a chunk. `factor` and `bound` are in units of log2.
    template <bool IS_BOUNDED>
    DEVICE void attend(const Shared<C>& shared, int head, float factor, float bound, bool is_masked, int groups) {
        const int lane = thread_index() % 32;
        const float* table = shared.table + head * C::ENTRIES;
        const typename C::Element* keys = shared.k + head * C::CHUNK_TOKENS * C::STRIDE;
        const typename C::Element* values = shared.v + head * C::CHUNK_TOKENS * C::STRIDE;
#pragma unroll 1
        for (int group = 0; group < groups; ++group) {
            const int first = group * C::GROUP * 16;  // In the chunk.
            float logits[2 * C::GROUP][4];  // 16 queries x 8 keys each.
            UNROLL for (int tile = 0; tile < 2 * C::GROUP; ++tile) {
                UNROLL for (int i = 0; i < 4; ++i) logits[tile][i] = 0.0f;
                const typename C::Element* row =
                    keys + (first + tile * 8 + lane / 4) * C::STRIDE + lane % 4 * 2;
                UNROLL for (int step = 0; step < STEPS; ++step) {
                    const Pair b[2] = {*reinterpret_cast<const Pair*>(row + step * 16),
                                       *reinterpret_cast<const Pair*>(row + step * 16 + 8)};
                    Type::multiply(logits[tile], q[step], b);
                }
            }
            UNROLL for (int tile = 0; tile < 2 * C::GROUP; ++tile) {
                UNROLL for (int i = 0; i < 4; ++i) {
                    // Elements 0 and 1 are of the first row, 2 and 3 of the second.
                    const int key = shared.keys[first + tile * 8 + lane % 4 * 2 + i % 2], half = i / 2;
                    float& logit = logits[tile][i];
                    if (C::HAS_TAIL && key == NO_TOKEN) {
                        logit = minus_infinity();
                        continue;
                    }
                    constexpr int ENTRY = (1 << ORIGIN_BIT) - 1;
                    logit = logit * factor + table[(entry[half] & ENTRY) - (key & ENTRY)];
                    if (IS_BOUNDED) logit -= bound;
                    // The shift brought them together from different sides of a border.
                    if (is_masked && (key ^ entry[half]) >> ORIGIN_BIT) logit += SHIFT_PENALTY * LOG2_E;
                }
            }
            if (!IS_BOUNDED) {
                UNROLL for (int half = 0; half < 2; ++half) {
                    float now = largest[half];
                    UNROLL for (int tile = 0; tile < 2 * C::GROUP; ++tile)
                        now = fmaxf(now, fmaxf(logits[tile][2 * half], logits[tile][2 * half + 1]));
                    now = max_of_quad(now);  // The four lanes that share a row of queries.
                    const float shrink = exp2_fast(largest[half] - now);
                    largest[half] = now;
                    total[half] *= shrink;
                    UNROLL for (int tile = 0; tile < 2 * STEPS; ++tile)
                        mean[tile][2 * half] *= shrink, mean[tile][2 * half + 1] *= shrink;
                }
            }
            UNROLL for (int tile = 0; tile < 2 * C::GROUP; ++tile) {
                UNROLL for (int i = 0; i < 4; ++i) {
                    logits[tile][i] = exp2_fast(IS_BOUNDED ? logits[tile][i] : logits[tile][i] - largest[i / 2]);
                    total[i / 2] += logits[tile][i];
                }
            }
            UNROLL for (int pair = 0; pair < C::GROUP; ++pair) {
                // 16 queries x 16 keys: the two results side by side are laid out as the next product's operand A.
                const float(&left)[4] = logits[2 * pair], (&right)[4] = logits[2 * pair + 1];
                const Pair a[4] = {Type::make(left[0], left[1]), Type::make(left[2], left[3]),
                                   Type::make(right[0], right[1]), Type::make(right[2], right[3])};
                UNROLL for (int step = 0; step < STEPS; ++step) {
                    Pair b[2][2];
                    load_values<C>(b, values + (first + pair * 16) * C::STRIDE + step * 16);
                    Type::multiply(mean[2 * step], a, b[0]);
                    Type::multiply(mean[2 * step + 1], a, b[1]);
                }
            }
        }
    }

    // Finds the places once more: until now they would have taken up registers.
    DEVICE void store(const Arguments& arguments, typename C::Element* image, int head, int window_row,
                      int window_column, int tile) {
        const int lane = thread_index() % 32, channels = arguments.num_heads * C::HEAD_DIM;
        UNROLL for (int half = 0; half < 2; ++half) {
            const float factor = 1.0f / sum_of_quad(total[half]);
            const int number = tile * 16 + lane / 4 + 8 * half;
            const Token found = find_token<C::WINDOW>(arguments.map, window_row, window_column, number);
            if (number >= C::TOKENS || is_padding(arguments.map, found)) continue;
            typename C::Element* row =
                image + place_of(arguments.map, found) * channels + head * C::HEAD_DIM + lane % 4 * 2;
            UNROLL for (int tile = 0; tile < 2 * STEPS; ++tile)
                *reinterpret_cast<Pair*>(row + 8 * tile) =
                    Type::make(mean[tile][2 * half] * factor, mean[tile][2 * half + 1] * factor);
        }
    }
};

template <class C>
DEVICE void window_attention(const Arguments& arguments) {
    using Element = typename C::Element;
    const Map& map = arguments.map;
    const int head_groups = arguments.num_heads / C::HEADS;
    const long long block = block_index(), place = block / (head_groups * C::PARTS);
    const int part = static_cast<int>(block / head_groups % C::PARTS);
    const int first_head = static_cast<int>(block % head_groups) * C::HEADS;
    const int window_column = static_cast<int>(place % map.across);
    const int window_row = static_cast<int>(place / map.across % map.down);
    const long long image = place / (static_cast<long long>(map.across) * map.down);
    const Element* qkv = static_cast<const Element*>(arguments.qkv) + image * arguments.qkv_image_stride;
    Element* out = static_cast<Element*>(arguments.out) + image * arguments.out_image_stride;
    const bool is_masked = map.shift && (window_row == map.down - 1 || window_column == map.across - 1);
    const Shared<C> shared(shared_memory());
    const int warp = thread_index() / 32;

    const float* table = arguments.table + static_cast<long long>(first_head) * C::ENTRIES;
    for (int index = thread_index(); index < C::HEADS * C::ENTRIES; index += C::THREADS)
        shared.table[index] = table[index] * LOG2_E;

#pragma unroll 1
    for (int round = 0; round < C::ROUNDS; ++round) {
        const int item = (part * C::ROUNDS + round) * C::WARPS + warp;
        const bool is_active = item < C::ITEMS;
        const int head = is_active ? item / C::TILES : 0;
        const float scale = arguments.scale[first_head + head];
        const bool is_bounded =
            C::COSINE && C::Type::HAS_BOUND && 2.0f * scale + LARGEST_POSITION_BIAS < BOUNDED_RANGE;
        const float bound = (scale + LARGEST_POSITION_BIAS) * LOG2_E;
        Queries<C> queries;
        if (is_active) queries.load(arguments, qkv, first_head + head, window_row, window_column, item % C::TILES);
#pragma unroll 1
        for (int chunk = 0; chunk < C::CHUNKS; ++chunk) {
            if (C::CHUNKS > 1 || round == 0) {
                if (chunk) synchronise_block();  // No warp still reads the chunk before.
                load_chunk<C>(shared, arguments, qkv, first_head, window_row, window_column, chunk);
                synchronise_block();
            }
            if (!is_active) continue;  // Only now: every warp loads, and waits for the others.
            const int left = C::GROUPS - chunk * C::CHUNK_GROUPS;
            const int groups = left < C::CHUNK_GROUPS ? left : C::CHUNK_GROUPS;
            if (is_bounded)
                queries.template attend<true>(shared, head, scale * LOG2_E, bound, is_masked, groups);
            else
                queries.template attend<false>(shared, head, scale * LOG2_E, bound, is_masked, groups);
        }
        if (is_active) queries.store(arguments, out, first_head + head, window_row, window_column, item % C::TILES);
    }
}

#ifdef CONFIG
extern "C" __global__ void __launch_bounds__(CONFIG::THREADS, CONFIG::BLOCKS_PER_SM)
    window_attention_fwd_kernel(const Arguments arguments) {
    window_attention<CONFIG>(arguments);
}
#endif
