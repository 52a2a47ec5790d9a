// Convolutions of maps: Winograd's F(4x4, 3x3), forward and backward.

#pragma once

#include "products.hpp"

namespace {

struct Maps {
    Index images, channels, height, width;
    Index panel() const { return height * width * PANEL; }
    Index image() const { return channels / PANEL * panel(); }
};

// The transform of inputs, of one row or column of six.
inline void input_transform(const Vector* x, Vector* y, int step) {
    const Vector a = x[4 * step] - 4 * x[2 * step], b = x[3 * step] - 4 * x[step];
    const Vector c = x[4 * step] - x[2 * step], d = 2 * (x[3 * step] - x[step]);
    y[0] = 4 * x[0] - 5 * x[2 * step] + x[4 * step];
    y[step] = a + b;
    y[2 * step] = a - b;
    y[3 * step] = c + d;
    y[4 * step] = c - d;
    y[5 * step] = 4 * x[step] - 5 * x[3 * step] + x[5 * step];
}

// The transform of outputs, of six products to four.
inline void output_transform(const Vector* x, Vector* y, int step) {
    const Vector a = x[step] + x[2 * step], b = x[step] - x[2 * step];
    const Vector c = x[3 * step] + x[4 * step], d = x[3 * step] - x[4 * step];
    y[0] = x[0] + a + c;
    y[step] = b + 2 * d;
    y[2 * step] = a + 4 * c;
    y[3 * step] = b + 8 * d + x[5 * step];
}

// The transpose of `output_transform`, of the gradients of four outputs to those of six products.
inline void output_transform_transposed(const Vector* x, Vector* y, int step) {
    const Vector even = x[0] + x[2 * step], odd = x[step] + x[3 * step];
    const Vector far_even = x[0] + 4 * x[2 * step], far_odd = 2 * x[step] + 8 * x[3 * step];
    y[0] = x[0];
    y[step] = even + odd;
    y[2 * step] = even - odd;
    y[3 * step] = far_even + far_odd;
    y[4 * step] = far_even - far_odd;
    y[5 * step] = x[3 * step];
}

// The transform of a kernel, of three weights to six.
inline void kernel_transform(const Vector* x, Vector* y, int from, int to) {
    const Vector a = x[0] + x[2 * from], b = x[0] + 4 * x[2 * from], c = 2 * x[from];
    y[0] = x[0] / 4;
    y[to] = (a + x[from]) / -6;
    y[2 * to] = (a - x[from]) / -6;
    y[3 * to] = (b + c) / 24;
    y[4 * to] = (b - c) / 24;
    y[5 * to] = x[2 * from];
}

// Its transpose, of six gradients to three.
inline void kernel_transform_transposed(const Vector* x, Vector* y, int from, int to) {
    const Vector a = (x[from] + x[2 * from]) / 6, b = (x[3 * from] + x[4 * from]) / 24;
    y[0] = x[0] / 4 - a + b;
    y[to] = (x[2 * from] - x[from]) / 6 + (x[3 * from] - x[4 * from]) / 12;
    y[2 * to] = x[5 * from] - a + 4 * b;
}

// The 4x4 tiles of maps, counted through the images of a batch.
struct Tiles {
    explicit Tiles(const Maps& maps)
        : maps(maps), down((maps.height + 3) / 4), across((maps.width + 3) / 4) {}
    Index all() const { return maps.images * down * across; }
    Index image(Index tile) const { return tile / (down * across); }
    Index top(Index tile) const { return tile / across % down * 4; }
    Index left(Index tile) const { return tile % across * 4; }
    Maps maps;
    Index down, across;
};

// inputs (36, count, channels) = the transforms of the tiles' inputs, 6x6 pixels of x each.
void transform_inputs(const float* x, const Tiles& tiles, Index first, Index count, float* inputs) {
    const Maps& in = tiles.maps;
    for (Index t = 0; t < count; t++) {
        const Index top = tiles.top(first + t) - 1, left = tiles.left(first + t) - 1;
        for (Index c = 0; c < in.channels; c += WIDTH) {
            const float* from =
                x + tiles.image(first + t) * in.image() + c / PANEL * in.panel() + c % PANEL;
            Vector v[36], w[36];
            for (Index i = 0; i < 6; i++)
                for (Index j = 0; j < 6; j++) {
                    const Index row = top + i, column = left + j;
                    const bool inside =
                        row >= 0 && row < in.height && column >= 0 && column < in.width;
                    v[6 * i + j] =
                        inside ? load(from + (row * in.width + column) * PANEL) : Vector{};
                }
            for (int j = 0; j < 6; j++) input_transform(v + j, w + j, 6);
            for (int i = 0; i < 6; i++) input_transform(w + 6 * i, v + 6 * i, 1);
            for (Index p = 0; p < 36; p++) store(inputs + (p * count + t) * in.channels + c, v[p]);
        }
    }
}

// products (36, channels / 16, count, 16) = the transforms of the gradients of the tiles' outputs,
// 4x4 pixels of y each.
void transform_gradients(const float* y, const Tiles& tiles, Index first, Index count,
                         float* products) {
    const Maps& out = tiles.maps;
    for (Index t = 0; t < count; t++) {
        const Index top = tiles.top(first + t), left = tiles.left(first + t);
        for (Index c = 0; c < out.channels; c += WIDTH) {
            const float* from =
                y + tiles.image(first + t) * out.image() + c / PANEL * out.panel() + c % PANEL;
            Vector v[36], w[36];
            for (Index i = 0; i < 4; i++)
                for (Index j = 0; j < 4; j++) {
                    const bool inside = top + i < out.height && left + j < out.width;
                    v[6 * i + j] =
                        inside ? load(from + ((top + i) * out.width + left + j) * PANEL) : Vector{};
                }
            for (int j = 0; j < 4; j++) output_transform_transposed(v + j, w + j, 6);
            for (int i = 0; i < 6; i++) output_transform_transposed(w + 6 * i, v + 6 * i, 1);
            float* to = products + (c / PANEL * count + t) * PANEL + c % PANEL;
            for (Index p = 0; p < 36; p++) store(to + p * count * out.channels, v[p]);
        }
    }
}

Index winograd_space(Index inputs, Index outputs) { return 36 * TILES * (inputs + outputs); }

// y, of so many channels = the convolution, padded by 1, of x with kernels: 36 matrices of panels.
void winograd(const float* x, const Maps& in, const float* kernels, float* y, Index outputs,
              float* space) {
    const Maps out{in.images, outputs, in.height, in.width};
    const Tiles tiles(in);
    float *inputs = space, *products = space + 36 * TILES * in.channels;
    for (Index first = 0; first < tiles.all(); first += TILES) {
        const Index count = std::min(TILES, tiles.all() - first);
        transform_inputs(x, tiles, first, count, inputs);
        for (Index p = 0; p < 36; p++)
            product({inputs + p * count * in.channels, in.channels, 1, in.channels, 0}, count,
                    kernels + p * in.channels * outputs, outputs, products + p * count * outputs,
                    count * PANEL);
        for (Index t = 0; t < count; t++) {
            const Index image = tiles.image(first + t);
            const Index top = tiles.top(first + t), left = tiles.left(first + t);
            const Index rows = std::min<Index>(4, in.height - top);
            const Index columns = std::min<Index>(4, in.width - left);
            for (Index c = 0; c < outputs; c += WIDTH) {
                const float* from = products + (c / PANEL * count + t) * PANEL + c % PANEL;
                float* to = y + image * out.image() + c / PANEL * out.panel() + c % PANEL;
                Vector v[36], w[36];
                for (Index p = 0; p < 36; p++) v[p] = load(from + p * count * outputs);
                for (int j = 0; j < 6; j++) output_transform(v + j, w + j, 6);
                for (int i = 0; i < 4; i++) output_transform(w + 6 * i, v + 6 * i, 1);
                for (Index i = 0; i < rows; i++)
                    for (Index j = 0; j < columns; j++)
                        store(to + ((top + i) * in.width + left + j) * PANEL, v[6 * i + j]);
            }
        }
    }
}

// sums (36, outputs / 16, channels, 16) += the gradients with respect to the transformed kernels,
// from those of y, of so many channels, and x.
void winograd_weights(const float* x, const Maps& in, const float* y, Index outputs, float* sums,
                      float* space) {
    const Tiles tiles(in), of_outputs({in.images, outputs, in.height, in.width});
    float *inputs = space, *products = space + 36 * TILES * in.channels;
    for (Index first = 0; first < tiles.all(); first += TILES) {
        const Index count = std::min(TILES, tiles.all() - first);
        transform_inputs(x, tiles, first, count, inputs);
        transform_gradients(y, of_outputs, first, count, products);
        for (Index p = 0; p < 36; p++)
            product({inputs + p * count * in.channels, 1, 1, count, 0, in.channels}, in.channels,
                    products + p * count * outputs, outputs, sums + p * in.channels * outputs,
                    in.channels * PANEL, true);
    }
}

}  // namespace
