// The three sums of tiles.h with channels in the lanes: maps whose channels are adjacent are read and written in place.
#pragma once

#include <array>
#include <map>

#include "planar.h"

namespace carafepp {

// What one output, or one source gradient, sums: a pixel each, under one weight for each of its sub-pixels.
template <class S, class T> struct Terms {
    std::vector<const S*> pixels;
    std::vector<T> weights;  // [pixel][sub]
};

// output[s][c] = sum over terms of weight[term][s] * pixel[term][c], for B vectors of channels from c.
template <int N, int B, class S, class T> inline void sum_terms(const Terms<S, T>& terms, Index c, S* const* outputs) {
    Vector<T> total[N][B] = {};
    const T* w = terms.weights.data();
    for (const S* pixel : terms.pixels) {
        Vector<T> v[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) v[b] = load(pixel + c + b * LANES<T>);
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s, ++w)
#pragma GCC unroll 8
            for (int b = 0; b < B; ++b) total[s][b] += *w * v[b];
    }
#pragma GCC unroll 8
    for (int s = 0; s < N; ++s)
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) store(outputs[s] + c + b * LANES<T>, total[s][b]);
}

// The same for the channels in [c, end); the last vector may repeat channels of the one before it.
template <int N, int B, class S, class T> inline void sum_range(const Terms<S, T>& terms, Index c, Index end, S* const* outputs) {
    for (; c + B * LANES<T> <= end; c += B * LANES<T>) sum_terms<N, B>(terms, c, outputs);
    for (; c + LANES<T> <= end; c += LANES<T>) sum_terms<N, 1>(terms, c, outputs);
    if (c < end) sum_terms<N, 1>(terms, end - LANES<T>, outputs);
}

// Sums of the lanes of LANES vectors, one each lane, by halving: neighbours are added and packed, log2(LANES) times.
template <class T, std::size_t... I> inline Vector<T> add_neighbours(Vector<T> a, Vector<T> b, std::index_sequence<I...>) {
    return shuffle<T, int(2 * I)...>(a, b) + shuffle<T, int(2 * I + 1)...>(a, b);
}
template <class T> inline Vector<T> lane_sums(Vector<T>* v) {
#pragma GCC unroll 4
    for (int count = LANES<T>; count > 1; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count / 2; ++i) v[i] = add_neighbours<T>(v[2 * i], v[2 * i + 1], std::make_index_sequence<LANES<T>>{});
    return v[0];
}

// total[k][s] = lanes of the sum over channels of doutput[s][c] * source[k][c].
template <int N, int K, class S, class T> inline void multiply_channels(const S* const* dy, const S* const* x, Index channels, Vector<T>* result) {
    Vector<T> total[K][N] = {};
    auto add = [&](Index c, auto keep) {
        Vector<T> d[N];
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s) d[s] = keep(load(dy[s] + c));
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            const Vector<T> v = load(x[k] + c);
#pragma GCC unroll 8
            for (int s = 0; s < N; ++s) total[k][s] += d[s] * v;
        }
    };
    Index c = 0;
    for (; c + LANES<T> <= channels; c += LANES<T>) add(c, [](Vector<T> v) { return v; });
    if (c < channels) {
        // the last vector begins with channels that are counted already
        T counted[LANES<T>];
        const Index begin = channels - LANES<T>;
        for (Index i = 0; i < LANES<T>; ++i) counted[i] = T(begin + i < c);
        const Vector<T> done = load(counted);
        add(begin, [done](Vector<T> v) { return done > T(0) ? Vector<T>{} : v; });
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
        for (int s = 0; s < N; ++s) result[k * N + s] = total[k][s];
}

// A map of which every cell owns factor * factor pixels, with channels in the lanes.
template <class S> struct Map {
    S* data;
    Index stride_y, stride_x, height, width, factor;

    Map(const Tensor& t, Index n, Index channel, Index rows, Index columns, Index pixels)
        : data(at<S>(t, n, channel)), stride_y(t.stride[2]), stride_x(t.stride[3]), height(rows), width(columns), factor(pixels) {}
    S* pixel(Index row, Index column) const {
        return row < 0 || column < 0 || row >= height || column >= width ? nullptr : data + row * stride_y + column * stride_x;
    }
    // whether the cells within `halo` of (y, x) own no pixel outside the map
    bool inside(Index y, Index x, Index halo) const {
        return y >= halo && x >= halo && (y + halo + 1) * factor <= height && (x + halo + 1) * factor <= width;
    }
};

// From the first pixel of a cell to one that it sums, and the plane of its weight.
struct Step {
    Index y, x, offset, weight;
};

template <class S> Step make_step(const Map<S>& map, Index y, Index x, Index weight) {
    return {y, x, y * map.stride_y + x * map.stride_x, weight};
}

// Pixels of cell (y, x); `zeros` stands for those outside.
template <class S>
inline void find_pixels(const std::vector<Step>& steps, const Map<S>& map, Index y, Index x, bool inside, const S* zeros, const S** pixels) {
    const Index row = y * map.factor, column = x * map.factor;
    if (inside) {
        const S* first = map.data + row * map.stride_y + column * map.stride_x;
        for (const Step& step : steps) *pixels++ = first + step.offset;
        return;
    }
    for (const Step& step : steps) {
        const S* pixel = map.pixel(row + step.y, column + step.x);
        *pixels++ = pixel ? pixel : zeros;
    }
}

// For every run, the source pixels of its taps.
template <class S> std::vector<std::vector<Step>> source_steps(const Problem& p, const Grid& g, const Map<S>& map) {
    std::vector<std::vector<Step>> steps(g.runs.size());
    for (std::size_t r = 0; r < g.runs.size(); ++r)
        for (Index tap = 0; tap < p.taps(); ++tap) {
            const Entry& e = g.entries[g.runs[r].sub * p.taps() + tap];
            steps[r].push_back(make_step(map, e.move_y * p.down + e.phase / p.down, e.move_x * p.down + e.phase % p.down,
                                         (tap * p.subs() + e.sub) * g.weight_plane));
        }
    return steps;
}

template <class S, class T>
void channels_last_forward(const Problem& p, const Grid& g, const Tile& t, const Tensor& x, const Tensor& y, Index n, Index group,
                           const T* weights) {
    const Index channels = p.group_channels();
    const Map<S> source(x, n, group * channels, p.height, p.width, p.down), output(y, n, group * channels, p.output_y(), p.output_x(), p.up);
    const auto steps = source_steps(p, g, source);
    const std::vector<S> zeros(channels);
    std::vector<S> unused(channels);
    Terms<S, T> terms;
    terms.pixels.resize(p.taps());
    for (Index i = 0; i < t.rows; ++i)
        for (Index j = 0; j < t.columns; ++j)
            for (std::size_t r = 0; r < g.runs.size(); ++r) {
                const Run& run = g.runs[r];
                find_pixels(steps[r], source, t.y + i, t.x + j, source.inside(t.y + i, t.x + j, g.halo), zeros.data(), terms.pixels.data());
                S* outputs[SUBS];
                for (Index s = 0; s < run.count; ++s) {
                    const Index sub = run.sub + s;
                    outputs[s] = output.pixel((t.y + i) * p.up + sub / p.up, (t.x + j) * p.up + sub % p.up);
                    // a rational scale may cut the cell
                    if (!outputs[s]) outputs[s] = unused.data();
                }
                with_count(run.count, [&](auto subs) {
                    constexpr int N = decltype(subs)::value;
                    terms.weights.resize(p.taps() * N);
                    T* to = terms.weights.data();
                    for (const Step& step : steps[r])
                        for (int s = 0; s < N; ++s) *to++ = weights[step.weight + s * g.weight_plane + i * g.pitch + j];
                    sum_range<N, 4, S, T>(terms, 0, channels, outputs);
                });
            }
}

// One output that NEIGHBOURS consecutive cells read for dx, and the planes of their weights, ABSENT for those whose window it is not in.
constexpr int NEIGHBOURS = SUBS;
constexpr Index ABSENT = std::numeric_limits<Index>::min();
using Shared = std::map<std::pair<Index, Index>, std::array<Index, NEIGHBOURS>>;

template <class S, class T>
void channels_last_dx(const Problem& p, const Grid& g, const Tile& t, const Tensor& dy, const Tensor& dx, Index n, Index group,
                      const T* weights) {
    const Index channels = p.group_channels();
    const Map<S> output(dy, n, group * channels, p.output_y(), p.output_x(), p.up), source(dx, n, group * channels, p.height, p.width, p.down);
    std::vector<Shared> shared(p.phases());
    for (const Entry& e : g.entries)
        for (int i = 0; i < NEIGHBOURS; ++i) {
            std::array<Index, NEIGHBOURS> absent;
            absent.fill(ABSENT);
            const std::pair<Index, Index> place(e.sub_y - e.move_y * p.up, e.sub_x - (e.move_x - i) * p.up);
            shared[e.phase].try_emplace(place, absent).first->second[i] = (e.tap * p.subs() + e.sub) * g.weight_plane - g.shift(e) + i;
        }
    const std::vector<S> zeros(channels);
    std::vector<S> unused(channels);
    std::vector<Step> steps;
    Terms<S, T> terms;
    for (Index phase = 0; phase < p.phases(); ++phase) {
        steps.clear();
        for (const auto& [place, planes] : shared[phase]) steps.push_back(make_step(output, place.first, place.second, 0));
        terms.pixels.resize(steps.size()), terms.weights.resize(steps.size() * NEIGHBOURS);
        for (Index i = 0; i < t.rows; ++i)
            for (Index j = 0; j < t.columns; j += NEIGHBOURS) {
                const bool inside = output.inside(t.y + i, t.x + j, g.halo) && output.inside(t.y + i, t.x + j + NEIGHBOURS - 1, g.halo);
                find_pixels(steps, output, t.y + i, t.x + j, inside, zeros.data(), terms.pixels.data());
                T* to = terms.weights.data();
                for (const auto& [place, planes] : shared[phase])
                    for (Index plane : planes) *to++ = plane == ABSENT ? T(0) : weights[plane + i * g.pitch + j];
                S* pixels[NEIGHBOURS];
                for (int k = 0; k < NEIGHBOURS; ++k) {
                    pixels[k] = source.pixel((t.y + i) * p.down + phase / p.down, (t.x + j + k) * p.down + phase % p.down);
                    if (!pixels[k] || j + k >= t.columns) pixels[k] = unused.data();
                }
                sum_range<NEIGHBOURS, 4, S, T>(terms, 0, channels, pixels);
            }
    }
}

template <class S, class T>
void channels_last_gradients(const Problem& p, const Grid& g, const Tile& t, const Tensor& dy, const Tensor& x, Index n, Index group,
                             T* gradients) {
    const Index channels = p.group_channels(), taps = p.taps();
    const Map<S> source(x, n, group * channels, p.height, p.width, p.down), output(dy, n, group * channels, p.output_y(), p.output_x(), p.up);
    const auto steps = source_steps(p, g, source);
    const std::vector<S> zeros(channels);
    std::vector<const S*> pixels(taps);
    std::vector<Vector<T>> sums(taps * SUBS + LANES<T>);
    for (Index i = 0; i < t.rows; ++i)
        for (Index j = 0; j < t.columns; ++j)
            for (std::size_t r = 0; r < g.runs.size(); ++r) {
                const Run& run = g.runs[r];
                find_pixels(steps[r], source, t.y + i, t.x + j, source.inside(t.y + i, t.x + j, g.halo), zeros.data(), pixels.data());
                const S* outputs[SUBS];
                for (Index s = 0; s < run.count; ++s) {
                    const Index sub = run.sub + s;
                    outputs[s] = output.pixel((t.y + i) * p.up + sub / p.up, (t.x + j) * p.up + sub % p.up);
                    if (!outputs[s]) outputs[s] = zeros.data();
                }
                with_count(run.count, [&](auto subs) {
                    constexpr int N = decltype(subs)::value;
                    Index tap = 0;
                    for (; tap + BACKWARD_TAPS <= taps; tap += BACKWARD_TAPS)
                        multiply_channels<N, BACKWARD_TAPS, S, T>(outputs, &pixels[tap], channels, &sums[tap * N]);
                    for (; tap < taps; ++tap) multiply_channels<N, 1, S, T>(outputs, &pixels[tap], channels, &sums[tap * N]);
                    for (Index first = 0; first < taps * N; first += LANES<T>) {
                        T lanes[LANES<T>];
                        store(lanes, lane_sums<T>(&sums[first]));
                        for (Index k = first; k < std::min<Index>(first + LANES<T>, taps * N); ++k)
                            gradients[(k / N * p.subs() + run.sub + k % N) * g.inner + i * g.pitch + j] = lanes[k - first];
                    }
                });
            }
}

}  // namespace carafepp
