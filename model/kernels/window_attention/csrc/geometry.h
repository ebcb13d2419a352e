// Where the tokens of a window come from, and which position bias a pair of them has. Plain arithmetic, the same on a
// GPU and on a CPU; the reference in reference.py says the same with whole tensors.
#pragma once

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

// The windows of a map (B, H, W): `down` x `across` of an image, after padding at the bottom and the right.
struct Map {
    int height, width, down, across, shift;
};

struct Token {
    // Place in the padded map, before it was rolled.
    int y, x;
    // Which borders of the map lie between it and the window's first token: 2 for the lower, 1 for the right one.
    int origin;
};

// Token `number` (row by row) of the window in row `window_row` and column `window_column`. Rolling by the shift moves
// the map up and to the left, so a window finds its tokens further down, and those beyond the border at the other side.
template <int WINDOW>
HOST_DEVICE Token find_token(const Map& map, int window_row, int window_column, int number) {
    int y = window_row * WINDOW + number / WINDOW + map.shift;
    int x = window_column * WINDOW + number % WINDOW + map.shift;
    const int height = map.down * WINDOW, width = map.across * WINDOW;
    const bool is_below = y >= height, is_beyond = x >= width;
    y -= is_below ? height : 0;
    x -= is_beyond ? width : 0;
    return {y, x, 2 * is_below + is_beyond};
}

HOST_DEVICE bool is_padding(const Map& map, const Token& token) {
    return token.y >= map.height || token.x >= map.width;
}

// Which token of its image, row by row. 64 bits: an offset in a batch of large maps does not fit 32.
HOST_DEVICE long long place_of(const Map& map, const Token& token) {
    return static_cast<long long>(token.y) * map.width + token.x;
}

// The entry of the (2 * WINDOW - 1) ** 2 position biases for a query and a key is the difference of these two.
template <int WINDOW>
HOST_DEVICE int query_entry(int number) {
    return (number / WINDOW + WINDOW - 1) * (2 * WINDOW - 1) + number % WINDOW + WINDOW - 1;
}

template <int WINDOW>
HOST_DEVICE int key_entry(int number) {
    return number / WINDOW * (2 * WINDOW - 1) + number % WINDOW;
}
