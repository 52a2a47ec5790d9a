// Vectors, buffers, and matrix products in panels of 16 columns.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>

namespace {

using Index = std::int64_t;

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 8, PANELS = 2;  // of 32 registers, 16 hold sums
#elif defined(__AVX__)
constexpr int WIDTH = 8, ROWS = 6, PANELS = 1;  // 12 of 16
#else
constexpr int WIDTH = 4, ROWS = 6, PANELS = 1;  // 24 of NEON's 32
#endif
constexpr int PANEL = 16, PIECES = PANEL / WIDTH;
constexpr Index TILES = 48;      // transformed together
constexpr Index TOGETHER = 128;  // features of whose samples a core keeps its share in its cache

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector v) { *reinterpret_cast<Vector*>(to) = v; }

struct Array {
    explicit Array(Index size)
        : data(static_cast<float*>(std::aligned_alloc(64, (size * 4 + 63) / 64 * 64)), std::free) {
        if (data || !size) return;
        std::fprintf(stderr, "ncfm: no memory for %lld MiB\n", (long long)(size >> 18));
        std::abort();
    }
    operator float*() const { return data.get(); }
    std::unique_ptr<float, decltype(&std::free)> data;
};

// A matrix on the left: rows `stride` apart, each of `parts` parts, `apart` apart, of `length`
// numbers, `step` apart.
struct Left {
    const float* data;
    Index stride, parts, length, apart, step = 1;
};

// c, panels `apart` apart, = or += `R` rows times `P` panels. Sums stay in registers, each from the
// first of its terms to the last, so that no number depends on what is computed beside it.
template <int R, int P>
void multiply(const Left& a, const float* panels, float* c, Index apart, bool add) {
    constexpr int COLUMNS = P * PIECES;
    const Index depth = a.parts * a.length;
    Vector sums[R][COLUMNS] = {};
    if (add)
        for (int r = 0; r < R; r++)
            for (int v = 0; v < COLUMNS; v++)
                sums[r][v] = load(c + v / PIECES * apart + r * PANEL + v % PIECES * WIDTH);
    for (Index part = 0; part < a.parts; part++)
        for (Index k = 0; k < a.length; k++) {
            const float* column = a.data + part * a.apart + k * a.step;
            const float* row = panels + (part * a.length + k) * PANEL;
            Vector right[COLUMNS];
#pragma GCC unroll 4
            for (int v = 0; v < COLUMNS; v++)
                right[v] = load(row + v / PIECES * depth * PANEL + v % PIECES * WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                for (int v = 0; v < COLUMNS; v++) sums[r][v] += column[r * a.stride] * right[v];
        }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < COLUMNS; v++)
            store(c + v / PIECES * apart + r * PANEL + v % PIECES * WIDTH, sums[r][v]);
}

template <int R, int P>
void multiply_rows(Left a, Index rows, const float* panels, float* c, Index apart, bool add) {
    for (; rows >= R; rows -= R, a.data += R * a.stride, c += R * PANEL)
        multiply<R, P>(a, panels, c, apart, add);
    if constexpr (R > 1)
        if (rows) multiply_rows<R == 6 ? 4 : R / 2, P>(a, rows, panels, c, apart, add);
}

// c (columns / 16, `apart` / 16, 16), of which it fills the first rows, = or += a times a matrix.
void product(const Left& a, Index rows, const float* panels, Index columns, float* c, Index apart,
             bool add = false) {
    const Index step = a.parts * a.length * PANEL;
    Index left = columns / PANEL;
    for (; left >= PANELS; left -= PANELS, panels += PANELS * step, c += PANELS * apart)
        multiply_rows<ROWS, PANELS>(a, rows, panels, c, apart, add);
    for (; left; left--, panels += step, c += apart)
        multiply_rows<ROWS, 1>(a, rows, panels, c, apart, add);
}

}  // namespace
