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

#include <algorithm>
#include <cmath>
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

// ---------------------------------------------------------------- products

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

// ---------------------------------------------------------------- convolutions of maps

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

// ---------------------------------------------------------------- convolutions of images

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

// ---------------------------------------------------------------- norm, ReLU, pooling

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
    const float *kernels, *flipped;           // for the two ways
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
