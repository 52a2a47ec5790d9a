// Float32 CPU kernels: blocks of a ConvNet, forward and backward, and psi's gradient.
//
// A block is a 3x3 convolution, instance norm, ReLU and 2x2 average pooling. Backward, it gives the
// gradient with respect to its input, and in training also to the weights of the convolution and of
// the norm. What a block computes on the way stays in a core's cache, and an image's numbers depend
// on it alone, not on the others or on the threads. Convolutions of maps are Winograd's
// F(4x4, 3x3) (Lavin and Gray, CVPR 2016, eq. 8 and section 4.3): a tile of 4x4 outputs comes from
// one of 6x6 inputs, transformed, by 36 products over the channels where the definition has 144.
// Gradients with respect to their weights are products of transformed tiles, too: the transposes of
// the transforms take output gradients to the products, and sums of products to the weights. The
// convolutions of images are products with the neighbourhoods of pixels. Convolutions need no bias:
// the norm subtracts it.
//
// The gradient of psi's objective is a product of which only sums over draws are written.
//
// Matrices and maps are in panels of 16 columns. Maps: (channels / 16, height, width, 16) for each
// image. A matrix on the right of a product: (columns / 16, rows, 16). Images are channels-last.

#include <cmath>

#include "image_convolution.hpp"
#include "norm.hpp"
#include "products.hpp"
#include "winograd.hpp"

namespace {

// Images that a thread takes together: enough tiles for quick products, and work for all threads.
Index together(const Maps& maps, Index threads) {
    const Index tiles = (maps.height + 3) / 4 * ((maps.width + 3) / 4);
    const Index share = (maps.images + threads - 1) / threads;
    return std::max<Index>(1, std::min(TILES / tiles, share));
}

}  // namespace

extern "C" {

struct Block {
    Index of_images, padding;  // whether it is one of images, and how they are padded
    Index channels, outputs, height, width;  // height and width of the maps
    const float *kernels, *flipped;          // for the two ways
    const float *scale, *shift;              // of the norm, (outputs)
    float epsilon;
};

// x -> pooled, maps (outputs / 16, height / 2, width / 2, 16) of each image. For the way back,
// unless they are null: maps, of the convolution, and statistics (outputs / 16, 2, 16) of each
// image.
void block_forward(const Block* block, Index images, const float* x, float* pooled, float* maps,
                   float* statistics, Index threads) {
    const Block& b = *block;
    const Norm norm{b.scale, b.shift, b.epsilon};
    const Maps in{images, b.channels, b.height, b.width}, out{images, b.outputs, b.height, b.width};
    const Frame frame{b.channels, b.height, b.width, b.padding};
    const Index half = b.height / 2 * (b.width / 2) * PANEL, all_panels = b.outputs / PANEL;
    const Index count = b.of_images ? 1 : together(in, threads);
#pragma omp parallel num_threads(threads)
    {
        const Array space(b.of_images ? frame.size() : winograd_space(b.channels, b.outputs));
        const Array own(maps ? 0 : b.of_images ? PANELS * out.panel() : count * out.image());
        const Array unkept(2 * PANEL);
        const auto finish = [&](const float* made, Index image, Index panel) {
            const Index at = image * all_panels + panel;
            activate(made, b.height, b.width, norm, panel * PANEL, pooled + at * half,
                     statistics ? statistics + at * 2 * PANEL : unkept);
        };
#pragma omp for schedule(dynamic)
        for (Index first = 0; first < images; first += count) {
            const Index some = std::min(count, images - first);
            if (b.of_images) {
                frame.fill(space, x + first * frame.image());
                for (Index panel = 0; panel < all_panels; panel += PANELS) {
                    const Index columns = std::min<Index>(PANELS, all_panels - panel);
                    float* made = maps ? maps + first * out.image() + panel * out.panel() : own;
                    convolve(space, frame, b.kernels + panel * PANEL * 9 * b.channels,
                             columns * PANEL, made);
                    for (Index k = 0; k < columns; k++)
                        finish(made + k * out.panel(), first, panel + k);
                }
            } else {
                float* made = maps ? maps + first * out.image() : own;
                winograd(x + first * in.image(), {some, b.channels, b.height, b.width}, b.kernels,
                         made, b.outputs, space);
                for (Index k = 0; k < some * all_panels; k++)
                    finish(made + k * out.panel(), first + k / all_panels, k % all_panels);
            }
        }
    }
}

// Gradients with respect to the pooled maps -> those with respect to x.
void block_backward(const Block* block, Index images, const float* pooled, const float* maps,
                    const float* statistics, float* x, Index threads) {
    const Block& b = *block;
    const Norm norm{b.scale, b.shift, b.epsilon};
    const Maps in{images, b.channels, b.height, b.width}, out{images, b.outputs, b.height, b.width};
    const Frame frame{b.channels, b.height, b.width, b.padding};
    const Index half = b.height / 2 * (b.width / 2) * PANEL, all_panels = b.outputs / PANEL;
    const Index count = b.of_images ? 1 : together(in, threads);
    const Index columns = (9 * b.channels + PANEL - 1) / PANEL * PANEL;
#pragma omp parallel num_threads(threads)
    {
        const Array space(b.of_images ? frame.size() : winograd_space(b.outputs, b.channels));
        const Array gradients(b.of_images ? out.panel() : count * out.image());
        const Array shares(b.of_images ? b.height * b.width * columns : 0);
        const auto begin = [&](Index image, Index panel, float* to) {
            const Index at = image * all_panels + panel;
            activate_back(pooled + at * half, maps + at * out.panel(), statistics + at * 2 * PANEL,
                          b.height, b.width, norm, panel * PANEL, to, nullptr, nullptr);
        };
#pragma omp for schedule(dynamic)
        for (Index first = 0; first < images; first += count) {
            const Index some = std::min(count, images - first);
            if (b.of_images) {
                for (Index panel = 0; panel < all_panels; panel++) {
                    begin(first, panel, gradients);
                    product({gradients, PANEL, 1, PANEL, 0}, b.height * b.width,
                            b.flipped + panel * PANEL * columns, columns, shares, out.panel(),
                            panel > 0);
                }
                col2im(shares, frame, space);
                frame.cut(space, x + first * frame.image());
            } else {
                for (Index k = 0; k < some * all_panels; k++)
                    begin(first + k / all_panels, k % all_panels, gradients + k * out.panel());
                winograd(gradients, {some, b.outputs, b.height, b.width}, b.flipped,
                         x + first * in.image(), b.channels, space);
            }
        }
    }
}

// Gradients of what was pooled -> those with respect to the weights (outputs, channels, 3, 3), to
// the norm's scale and shift (outputs), and, unless it is null or the block is one of images, to x.
// On one thread: they are sums over the images, in their order.
void block_backward_weights(const Block* block, Index images, const float* pooled, const float* x,
                            const float* maps, const float* statistics, float* of_weights,
                            float* of_scale, float* of_shift, float* of_x) {
    const Block& b = *block;
    const Norm norm{b.scale, b.shift, b.epsilon};
    const Maps in{images, b.channels, b.height, b.width}, out{images, b.outputs, b.height, b.width};
    const Frame frame{b.channels, b.height, b.width, b.padding};
    const Index half = b.height / 2 * (b.width / 2) * PANEL, all_panels = b.outputs / PANEL;
    const Index count = b.of_images ? 1 : together(in, 1);
    const Index size = (b.of_images ? 9 : 36) * b.channels * b.outputs;
    const Array space(b.of_images ? frame.size() : winograd_space(b.outputs, b.channels));
    const Array gradients(b.of_images ? out.panel() : count * out.image()), sums(size);
    std::fill_n(static_cast<float*>(sums), size, 0.0f);
    std::fill_n(of_scale, b.outputs, 0.0f);
    std::fill_n(of_shift, b.outputs, 0.0f);
    for (Index first = 0; first < images; first += count) {
        const Index some = std::min(count, images - first);
        if (b.of_images) frame.fill(space, x + first * frame.image());
        for (Index k = 0; k < some * all_panels; k++) {
            const Index at = first * all_panels + k, panel = k % all_panels;
            float* to = gradients + (b.of_images ? 0 : k * out.panel());
            activate_back(pooled + at * half, maps + at * out.panel(), statistics + at * 2 * PANEL,
                          b.height, b.width, norm, panel * PANEL, to, of_scale + panel * PANEL,
                          of_shift + panel * PANEL);
            if (b.of_images)
                convolve_weights(space, frame, to, sums + panel * 3 * b.channels * PANEL,
                                 3 * b.channels * b.outputs);
        }
        if (b.of_images) continue;
        const Maps part{some, b.channels, b.height, b.width};
        winograd_weights(x + first * in.image(), part, gradients, b.outputs, sums, space);
        if (of_x)
            winograd(gradients, {some, b.outputs, b.height, b.width}, b.flipped,
                     of_x + first * in.image(), b.channels, space);
    }
    for (Index o = 0; o < b.outputs; o += WIDTH)
        for (Index c = 0; c < b.channels; c++) {
            Vector v[36], w[36];
            if (b.of_images) {
                for (Index k = 0; k < 9; k++)
                    w[k] = load(sums + k / 3 * 3 * b.channels * b.outputs +
                                (o / PANEL * 3 * b.channels + k % 3 * b.channels + c) * PANEL +
                                o % PANEL);
            } else {
                for (Index p = 0; p < 36; p++)
                    v[p] = load(sums + p * b.channels * b.outputs +
                                (o / PANEL * b.channels + c) * PANEL + o % PANEL);
                for (int j = 0; j < 6; j++) kernel_transform_transposed(v + j, w + j, 6, 6);
                for (int i = 0; i < 3; i++) kernel_transform_transposed(w + 6 * i, v + 3 * i, 1, 1);
                std::copy_n(v, 9, w);
            }
            for (Index lane = 0; lane < WIDTH; lane++)
                for (Index k = 0; k < 9; k++)
                    of_weights[((o + lane) * b.channels + c) * 9 + k] = w[k][lane];
        }
}

// kernels (36, outputs / 16, channels, 16) = the transforms of weights (outputs, channels, 3, 3);
// flipped (36, channels / 16, outputs, 16), those of the convolution that goes back.
void transform_kernels(const float* weights, Index channels, Index outputs, float* kernels,
                       float* flipped) {
    const Index size = channels * outputs;
    const auto transform = [&](Index columns, Index rows, Index of_column, Index of_row, bool flip,
                               float* to) {
        for (Index n = 0; n < columns; n += WIDTH)
            for (Index row = 0; row < rows; row++) {
                Vector v[36], w[36];
                for (Index lane = 0; lane < WIDTH; lane++)
                    for (Index k = 0; k < 9; k++)
                        w[k][lane] =
                            weights[(n + lane) * of_column + row * of_row + (flip ? 8 - k : k)];
                for (int j = 0; j < 3; j++) kernel_transform(w + j, v + j, 3, 3);
                for (int i = 0; i < 6; i++) kernel_transform(v + 3 * i, w + 6 * i, 1, 1);
                for (Index p = 0; p < 36; p++)
                    store(to + p * size + (n / PANEL * rows + row) * PANEL + n % PANEL, w[p]);
            }
    };
    transform(outputs, channels, channels * 9, 9, false, kernels);
    transform(channels, outputs, 9, channels * 9, true, flipped);
}

// Samples (samples, features), their cosines and sines (samples, components draws), and the
// gradients with respect to the sums of both, cosines first.
struct Side {
    const float *cosines, *sines, *gradients, *samples;
    Index count;
};

// total (components, features) += in whole units, rounded, the sums, over the draws of a component,
// of the frequencies t (components draws, features) times the gradients with respect to t.
void add_scale_gradient(const Side* sides, Index number, const float* t, Index components,
                        Index draws, Index features, double* total, float unit, Index threads) {
    const Index all = components * draws;
    Index samples = 0;
    for (Index s = 0; s < number; s++) samples += sides[s].count;
    const Array angles(all * samples);  // (components, samples, draws), their gradients
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (Index m = 0; m < components; m++) {
            float* to = angles + m * samples * draws;
            for (Index s = 0; s < number; s++)
                for (Index n = 0; n < sides[s].count; n++, to += draws) {
                    const float* gradients = sides[s].gradients + m * draws;
                    const float* cosines = sides[s].cosines + n * all + m * draws;
                    const float* sines = sides[s].sines + n * all + m * draws;
                    for (Index k = 0; k < draws; k++)
                        to[k] = cosines[k] * gradients[all + k] - sines[k] * gradients[k];
                }
        }
        const Array panels(samples * TOGETHER), made(draws * TOGETHER), sums(TOGETHER);
#pragma omp for schedule(dynamic)
        for (Index first = 0; first < features; first += TOGETHER) {
            const Index columns = std::min(TOGETHER, features - first);
            for (Index c = 0, row = 0; c < columns; c += PANEL)
                for (Index s = 0; s < number; s++)
                    for (Index n = 0; n < sides[s].count; n++, row++)
                        std::copy_n(sides[s].samples + n * features + first + c, PANEL,
                                    panels + row * PANEL);
            for (Index m = 0; m < components; m++) {
                const float* frequencies = t + m * draws * features + first;
                for (Index k = 0; k < draws; k++)  // a cache line is a panel's row
                    for (Index c = 0; c < columns; c += PANEL)  // the first cache has no room
                        __builtin_prefetch(frequencies + k * features + c, 0, 2);
                product({angles + m * samples * draws, 1, 1, samples, 0, draws}, draws, panels,
                        columns, made, draws * PANEL);
                for (Index c = 0; c < columns; c += WIDTH) {
                    Vector sum = {};
                    for (Index k = 0; k < draws; k++)
                        sum += load(made + (c / PANEL * draws + k) * PANEL + c % PANEL) *
                               load(frequencies + k * features + c);
                    store(sums + c, sum);
                }
                double* to = total + m * features + first;
                for (Index c = 0; c < columns; c++) to[c] += std::rint(sums[c] / unit);
            }
        }
    }
}

}  // extern "C"
