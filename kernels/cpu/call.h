// One call, as Python passes it: sizes and options, tensors, threads. The structures and numbers must match backend.py.
#pragma once

#include <cstdint>

#include "index.h"

namespace carafepp {

enum Dtype : std::int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum Border : std::int64_t { ZERO, RENORMALIZE, REPLICATE, SHIFT };
enum Normalizer : std::int64_t { SOFTMAX, SIGMOID, SIGMOID_NORMALIZED, NONE };

struct Problem {
    Dtype dtype;
    Normalizer normalizer;
    Border border;
    std::int64_t batch, channels, height, width, output_rows, output_columns, kernel, up, down, groups;

    Index taps() const { return kernel * kernel; }
    Index subs() const { return up * up; }
    Index phases() const { return down * down; }
    Index windows() const { return taps() * subs(); }  // weights of a cell
    Index cell_rows() const { return ceil_div(height, down); }
    Index cell_columns() const { return ceil_div(width, down); }
    Index group_channels() const { return channels / groups; }
    // whether the weights of a window are divided by their sum; one NaN then makes all of them NaN, and none is infinite
    bool divides_by_sum() const { return normalizer == SOFTMAX || normalizer == SIGMOID_NORMALIZED; }
};

struct Tensor {
    void* data;
    std::int64_t strides[6];  // in elements

    template <class S> S* at(Index a, Index b, Index c = 0, Index d = 0) const {
        return static_cast<S*>(data) + a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3];
    }
    explicit operator bool() const { return data; }
};

// The signature of GOMP_parallel: runs function(data) on a team of threads of the OpenMP runtime that PyTorch itself uses.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// A tensor that is not needed has no data. The forward pass writes y and, if it is needed, lse, the backward pass dx and dlogits.
struct Call {
    Problem problem;
    std::int64_t threads;  // upper limit
    Parallel parallel;     // null: the kernel starts its own threads
    Tensor x;              // [N, C, H, W]
    Tensor logits;         // [N, G * K * K, up, up, Hq, Wq]
    Tensor lse;            // [N, G, up, up, Hq, Wq], the log-sum-exp of every window; not needed by normalizers without one
    Tensor y;              // [N, C, Ho, Wo]
    Tensor dy, dx, dlogits;
};

}  // namespace carafepp
