// Convolutions of images: products with the neighbourhoods of pixels.

#pragma once

#include "products.hpp"

namespace {

// The padded pixels of an image whose maps are (height, width).
struct Frame {
    Index channels, height, width, padding;
    Index row() const { return (width + 2) * channels; }
    Index size() const { return ((height + 2) * row() + PANEL - 1) / PANEL * PANEL; }
    Index image_rows() const { return height + 2 - 2 * padding; }
    Index image_row() const { return row() - 2 * padding * channels; }
    Index image() const { return image_rows() * image_row(); }
    Index at(Index i) const { return (i + padding) * row() + padding * channels; }

    void fill(float* frame, const float* image) const {
        std::fill_n(frame, size(), 0.0f);
        for (Index i = 0; i < image_rows(); i++)
            std::copy_n(image + i * image_row(), image_row(), frame + at(i));
    }
    void cut(const float* frame, float* image) const {
        for (Index i = 0; i < image_rows(); i++)
            std::copy_n(frame + at(i), image_row(), image + i * image_row());
    }
};

// Maps of some panels = the convolution with a matrix (9 channels, columns).
void convolve(const float* frame, const Frame& f, const float* panels, Index columns, float* maps) {
    for (Index i = 0; i < f.height; i++)
        product({frame + i * f.row(), f.channels, 3, 3 * f.channels, f.row()}, f.width, panels,
                columns, maps + i * f.width * PANEL, f.height * f.width * PANEL);
}

// sums (3, columns / 16, 3 channels, 16) += the gradients with respect to the weights of one panel,
// row by row of the kernels, from those of its maps (height, width, 16).
void convolve_weights(const float* frame, const Frame& f, const float* maps, float* sums,
                      Index apart) {
    for (Index k = 0; k < 3; k++)
        product({frame + k * f.row(), 1, f.height, f.width, f.row(), f.channels}, 3 * f.channels,
                maps, PANEL, sums + k * apart, 0, true);
}

// Backward: every pixel's share of the maps' gradients, (columns / 16, height, width, 16), of
// which the first 9 channels count, added to the pixels that the maps' pixel comes from.
void col2im(const float* shares, const Frame& f, float* frame) {
    const Index panel = f.height * f.width * PANEL;
    std::fill_n(frame, f.size(), 0.0f);
    for (Index i = 0; i < f.height; i++)
        for (Index j = 0; j < f.width; j++)
            for (Index k = 0, column = 0; k < 3; k++) {
                float* to = frame + (i + k) * f.row() + j * f.channels;
                const float* from = shares + (i * f.width + j) * PANEL;
                for (Index c = 0; c < 3 * f.channels; c++, column++)
                    to[c] += from[column / PANEL * panel + column % PANEL];
            }
}

}  // namespace
