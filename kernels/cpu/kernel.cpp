// The operator on CPU, compiled at first use (build.py). The entry points are plain C functions of pointers and strides, independent of
// PyTorch. A task is a tile of cells and one group of channels, and a free thread takes the next task. One thread computes each value, in
// an order that does not depend on the tiling, so that results are bit-identical for any number of threads.

#include <algorithm>
#include <initializer_list>
#include <new>

#include "borders.h"
#include "call.h"
#include "cell_weights.h"
#include "channels_last.h"
#include "index.h"
#include "layout.h"
#include "normalizers.h"
#include "parallel.h"
#include "planar.h"
#include "scratch.h"
#include "storage.h"
#include "tiling.h"
#include "vectors.h"
#include "windows.h"

namespace carafepp {

// Bytes that the planes of a tile may take, so that they stay in the caches and are, for all threads together, a few per cent of the
// tensors.
constexpr Index LEAST_BYTES = 48 << 10, FORWARD_BYTES = 640 << 10, BACKWARD_BYTES = 2048 << 10;
// Bytes that the weights of a tile may take where no other planes are needed.
constexpr Index WEIGHT_BYTES = 96 << 10;
constexpr Index FORWARD_SHARE = 18, BACKWARD_SHARE = 15;

// Returns the bytes of the planes of a tile: at most `most`, and for all threads together 1 / `share` of x and logits (`inputs` times) and
// y.
template <class S> Index tile_bytes(const Problem& problem, Index threads, Index most, Index share, Index inputs) {
    const Index logits = problem.groups * problem.windows() * problem.cell_rows() * problem.cell_columns();
    const Index input = problem.channels * problem.height * problem.width + logits;
    const Index output = problem.channels * problem.output_rows * problem.output_columns;
    const Index bytes = problem.batch * (inputs * input + output) * Index(sizeof(S));
    // windows that move read so far around a tile that a small one would hold little else
    const Index least = problem.border == SHIFT ? most : LEAST_BYTES;
    return std::min(most, std::max(least, bytes / (share * threads)));
}

// Whether channels are adjacent in all maps that are given and fill at least one vector.
template <class S> bool is_channels_last(const Problem& problem, std::initializer_list<Tensor> maps) {
    for (const Tensor& map : maps)
        if (map && map.strides[1] != 1) return false;
    return problem.group_channels() >= LANES<Compute<S>>;
}

// Number of channels whose planes a task holds at a time.
inline Index held_channels(const Problem& problem, bool channels_last) {
    return channels_last ? 0 : std::min(CHUNK, problem.group_channels());
}

template <class S> void forward(const Call& call) {
    using T = Compute<S>;
    const Problem& problem = call.problem;
    const Index threads = useful_threads(call, 1);
    const bool channels_last = is_channels_last<S>(problem, {call.x, call.y});
    const Layout layout = Layout::forward(call, held_channels(problem, channels_last));
    const Windows windows(problem, false);
    const Index most = channels_last ? WEIGHT_BYTES : FORWARD_BYTES;
    const Grid grid = Grid::make<T>(problem, windows, layout, threads, tile_bytes<S>(problem, threads, most, FORWARD_SHARE, 1));
    const PlanarTables tables = channels_last ? PlanarTables{} : PlanarTables(problem, windows, layout, grid);
    run_tasks<T>(Task::count(problem, grid), threads, Scratch<T>::size(layout, grid), call.parallel, [&](Index number, T* memory) {
        const Task task(call, windows, layout, grid, number);
        if (channels_last && fills_lanes<T>(problem, call.logits)) return channels_last_forward<S>(task, CellWeights<S, T>(task));
        const Scratch<T> scratch(layout, grid, memory);
        read_logits<S>(task, scratch.weights, false);
        arrange_windows(task, scratch.weights);
        normalize(task, scratch);
        if (layout.lse.sets) write_lse(task, scratch.lse);
        if (channels_last) channels_last_forward<S>(task, PlaneWeights<T>(task, scratch));
        else planar_forward<S>(task, tables, scratch);
    });
}

template <class S> void backward(const Call& call) {
    using T = Compute<S>;
    const Problem& problem = call.problem;
    const Index threads = useful_threads(call, 2);
    const bool channels_last = is_channels_last<S>(problem, {call.dy, call.x, call.dx});
    const Layout layout = Layout::backward(call, held_channels(problem, channels_last));
    const Windows windows(problem, bool(call.dx));
    const Grid grid = Grid::make<T>(problem, windows, layout, threads, tile_bytes<S>(problem, threads, BACKWARD_BYTES, BACKWARD_SHARE, 2));
    const PlanarTables tables = channels_last ? PlanarTables{} : PlanarTables(problem, windows, layout, grid);
    run_tasks<T>(Task::count(problem, grid), threads, Scratch<T>::size(layout, grid), call.parallel, [&](Index number, T* memory) {
        const Task task(call, windows, layout, grid, number);
        const Scratch<T> scratch(layout, grid, memory);
        read_logits<S>(task, scratch.weights, true);
        arrange_windows(task, scratch.weights);
        if (layout.lse.sets) read_lse(task, scratch.lse);
        restore_weights(task, scratch);
        if (call.dlogits) std::fill_n(scratch.dweights.data, problem.taps() * scratch.dweights.set, T(0));
        if (!channels_last) planar_backward<S>(task, tables, scratch);
        if (channels_last && call.dlogits) channels_last_dweights<S>(task, scratch);
        if (channels_last && call.dx) channels_last_dx<S>(task, scratch);
        if (!call.dlogits) return;
        restore_windows(task, scratch.weights);
        restore_windows(task, scratch.dweights);
        normalize_backward<S>(task, scratch);
        write_dlogits<S>(task, scratch.dweights);
    });
}

// Calls f with a value of the storage type; returns 0, or 1 if memory runs out.
template <class F> int with_dtype(Dtype dtype, F&& f) {
    try {
        switch (dtype) {
            case FLOAT32: f(float{}); break;
            case FLOAT64: f(double{}); break;
            case BFLOAT16: f(BFloat16{}); break;
            case FLOAT16: f(Float16{}); break;
        }
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace carafepp

#define EXPORT extern "C" __attribute__((visibility("default")))

// Both take a call without its data, which come in the order of its tensors. They return 0, or 1 if memory runs out.
EXPORT int carafepp_forward(const carafepp::Call* layouts, void* x, void* logits, void* lse, void* y) {
    carafepp::Call call = *layouts;
    call.x.data = x, call.logits.data = logits, call.lse.data = lse, call.y.data = y;
    return carafepp::with_dtype(call.problem.dtype, [&](auto storage) { carafepp::forward<decltype(storage)>(call); });
}

EXPORT int carafepp_backward(const carafepp::Call* layouts, void* x, void* logits, void* lse, void* dy, void* dx, void* dlogits) {
    carafepp::Call call = *layouts;
    call.x.data = x, call.logits.data = logits, call.lse.data = lse, call.dy.data = dy, call.dx.data = dx, call.dlogits.data = dlogits;
    return carafepp::with_dtype(call.problem.dtype, [&](auto storage) { carafepp::backward<decltype(storage)>(call); });
}
