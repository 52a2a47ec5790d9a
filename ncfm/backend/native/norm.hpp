// Instance norm, ReLU and 2x2 average pooling.

#pragma once

#include <cmath>

#include "products.hpp"

namespace {

struct Norm {
    const float *scale, *shift;  // (channels)
    float epsilon;
};

// The mean of what a function gives of each pixel, row by row.
template <class Function>
Vector mean_of(Index height, Index width, Function of_pixel) {
    Vector total = {};
    for (Index i = 0; i < height; i++) {
        Vector even = {}, odd = {};
        Index j = 0;
        for (; j + 1 < width; j += 2) {
            even += of_pixel(i, j);
            odd += of_pixel(i, j + 1);
        }
        if (j < width) even += of_pixel(i, j);
        total += even + odd;
    }
    return total / static_cast<float>(height * width);
}

// pooled (height / 2, width / 2, 16) of a panel of maps, and its statistics (2, 16), mean and the
// inverse of the standard deviation, for the way back.
void activate(const float* maps, Index height, Index width, const Norm& norm, Index channel,
              float* pooled, float* statistics) {
    for (int c = 0; c < PANEL; c += WIDTH) {
        const auto pixel = [=](Index i, Index j) {
            return load(maps + (i * width + j) * PANEL + c);
        };
        const Vector mean = mean_of(height, width, pixel);
        Vector rate = mean_of(height, width, [=](Index i, Index j) {
            const Vector x = pixel(i, j) - mean;
            return x * x;
        });
        for (int lane = 0; lane < WIDTH; lane++)
            rate[lane] = 1 / std::sqrt(rate[lane] + norm.epsilon);
        store(statistics + c, mean);
        store(statistics + PANEL + c, rate);
        const Vector scale = rate * load(norm.scale + channel + c);
        const Vector shift = load(norm.shift + channel + c);
        const auto active = [=](Index i, Index j) {
            const Vector x = (pixel(i, j) - mean) * scale + shift;
            return x < 0 ? Vector{} : x;  // NaN stays
        };
        for (Index i = 0; i < height / 2; i++)
            for (Index j = 0; j < width / 2; j++)
                store(pooled + (i * (width / 2) + j) * PANEL + c,
                      (active(2 * i, 2 * j) + active(2 * i, 2 * j + 1) + active(2 * i + 1, 2 * j) +
                       active(2 * i + 1, 2 * j + 1)) / 4);
    }
}

// The gradients of a panel of maps, from those of what was pooled. Unless they are null, adds to
// of_scale and of_shift (16) those with respect to the norm's.
void activate_back(const float* pooled, const float* maps, const float* statistics, Index height,
                   Index width, const Norm& norm, Index channel, float* gradients, float* of_scale,
                   float* of_shift) {
    const float pixels = static_cast<float>(height * width);
    for (int c = 0; c < PANEL; c += WIDTH) {
        const Vector mean = load(statistics + c), rate = load(statistics + PANEL + c);
        const Vector scale = load(norm.scale + channel + c);
        const Vector shift = load(norm.shift + channel + c);
        const Vector factor = rate * scale;
        const auto centred = [=](Index i, Index j) {
            return load(maps + (i * width + j) * PANEL + c) - mean;
        };
        const auto gradient = [=](Index i, Index j, const Vector& x) {
            if (i / 2 >= height / 2 || j / 2 >= width / 2) return Vector{};  // an odd last one
            const Vector g = load(pooled + (i / 2 * (width / 2) + j / 2) * PANEL + c) / 4;
            return x * factor + shift <= 0 ? Vector{} : g;  // as `activate` rounds it
        };
        const Vector of_sum = mean_of(
            height, width, [=](Index i, Index j) { return gradient(i, j, centred(i, j)); });
        const Vector of_product = rate * mean_of(height, width, [=](Index i, Index j) {
            const Vector x = centred(i, j);
            return gradient(i, j, x) * x;
        });
        if (of_scale) {
            store(of_scale + c, load(of_scale + c) + of_product * pixels);
            store(of_shift + c, load(of_shift + c) + of_sum * pixels);
        }
        const Vector variance_term = rate * of_product;
        for (Index i = 0; i < height; i++)
            for (Index j = 0; j < width; j++) {
                const Vector x = centred(i, j);
                store(gradients + (i * width + j) * PANEL + c,
                      factor * (gradient(i, j, x) - of_sum - x * variance_term));
            }
    }
}

}  // namespace
