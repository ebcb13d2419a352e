// Window attention's CUDA source on a CPU, as a library: its arithmetic of places, and whole blocks on an emulated warp.
// BUILDS lists the kernels, as X(name, Config<...>).
#include "window_attention.cu"

// What the host has to know to launch one.
struct Launch {
    int threads, parts, shared_bytes;
};

#define X(NAME, ...)                                                                                       \
    extern "C" Launch describe_##NAME() {                                                                  \
        using C = __VA_ARGS__;                                                                             \
        return {C::THREADS, C::PARTS, C::SHARED_BYTES};                                                    \
    }                                                                                                      \
    extern "C" void run_##NAME(const Arguments* arguments, long long first, long long blocks) {            \
        using C = __VA_ARGS__;                                                                             \
        emulated::run(first, blocks, C::THREADS, C::SHARED_BYTES, [=] { window_attention<C>(*arguments); }); \
    }
BUILDS
#undef X

struct Place {
    long long place;
    int y, x, origin, is_padding, query_entry, key_entry;
};

template <int WINDOW>
void find_places(const Map& map, Place* places) {
    for (int window_row = 0; window_row < map.down; ++window_row)
        for (int window_column = 0; window_column < map.across; ++window_column)
            for (int number = 0; number < WINDOW * WINDOW; ++number) {
                const Token token = find_token<WINDOW>(map, window_row, window_column, number);
                *places++ = {place_of(map, token),     token.y,
                             token.x,                  token.origin,
                             is_padding(map, token),   query_entry<WINDOW>(number),
                             key_entry<WINDOW>(number)};
            }
}

extern "C" int find_places(int window, const Map* map, Place* places) {
    switch (window) {
        case 3: return find_places<3>(*map, places), 1;
        case 7: return find_places<7>(*map, places), 1;
        case 8: return find_places<8>(*map, places), 1;
        case 12: return find_places<12>(*map, places), 1;
        case 16: return find_places<16>(*map, places), 1;
        case 24: return find_places<24>(*map, places), 1;
        case 56: return find_places<56>(*map, places), 1;
    }
    return 0;
}

extern "C" long long place_in_map(int width, int y, int x) { return place_of(Map{y + 1, width, 0, 0, 0}, Token{y, x, 0}); }
