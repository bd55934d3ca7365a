// The operator on CPU, compiled at first use (backend.py): plain C entry points, which take pointers and strides and know nothing of PyTorch.
// A tile of cells and one group of channels is one task. Threads take tasks as they come; each value is computed by one thread, in an
// order that does not depend on the tiling, so that results are bit-identical for any number of threads.

#include <atomic>
#include <cstdlib>
#include <thread>

#include "channels_last.h"
#include "weights.h"

namespace carafepp {

// The signature of GOMP_parallel: runs function(data) on a team of threads of the OpenMP runtime that PyTorch itself uses.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// Bytes that the planes of a tile may take: near the processor, and for all threads together a few per cent of the tensors.
constexpr Index LEAST_BUDGET = 48 << 10, FORWARD_BUDGET = 640 << 10, BACKWARD_BUDGET = 2048 << 10;
constexpr Index FORWARD_SHARE = 18, BACKWARD_SHARE = 15;
template <class S> Index budget(const Problem& p, Index most, Index share, Index inputs, Index outputs) {
    const Index input = p.channels * p.height * p.width + p.groups * p.taps() * p.subs() * p.cells_y() * p.cells_x();
    const Index bytes = p.batch * (inputs * input + outputs * p.channels * p.output_y() * p.output_x()) * Index(sizeof(S));
    return std::min(most, std::max(LEAST_BUDGET, bytes / (share * p.threads)));
}

// Threads that pay for so many multiplications.
inline Index useful_threads(const Problem& p, Index passes) {
    return std::min<Index>(p.threads, passes * p.taps() * p.subs() * p.batch * p.channels * p.cells_y() * p.cells_x() / 500000 + 1);
}

// work(task, scratch) for every task, each thread with its own scratch; false if there is no memory.
template <class T, class F> bool run(Index tasks, Index threads, Index scratch, Parallel parallel, F&& work) {
    threads = std::max<Index>(1, std::min(threads, tasks));
    scratch = ceil_div(scratch + LANES<T>, 64 / sizeof(T)) * (64 / sizeof(T));
    void* memory = std::malloc(threads * scratch * sizeof(T) + 64);
    if (!memory) return false;
    T* aligned = reinterpret_cast<T*>(ceil_div(reinterpret_cast<Index>(memory), 64) * 64);
    std::atomic<Index> next_task{0}, next_thread{0};
    auto worker = [&] {
        T* mine = aligned + next_thread++ * scratch;
        for (Index task; (task = next_task++) < tasks;) work(task, mine);
    };
    if (threads == 1) worker();
    else if (parallel) parallel([](void* data) { (*static_cast<decltype(worker)*>(data))(); }, &worker, unsigned(threads), 0);
    else {
        std::vector<std::thread> team;
        for (Index i = 1; i < threads; ++i) team.emplace_back(worker);
        worker();
        for (std::thread& thread : team) thread.join();
    }
    std::free(memory);
    return true;
}

template <class S> bool is_channels_last(const Problem& p, std::initializer_list<const Tensor*> maps) {
    for (const Tensor* map : maps)
        if (map->data && map->stride[1] != 1) return false;
    return p.group_channels() >= LANES<Compute<S>>;
}

inline bool has_lse(const Problem& p) { return p.normalizer == SOFTMAX || p.normalizer == SIGMOID_NORMALIZED; }

template <class S> bool forward(Problem p, const Tensor& x, const Tensor& logits, const Tensor& y, const Tensor& lse, Parallel parallel) {
    using T = Compute<S>;
    p.threads = useful_threads(p, 1);
    const bool last = is_channels_last<S>(p, {&x, &y});
    const Index chunk = last ? 0 : std::min(CHUNK, p.group_channels()), windows = p.taps() * p.subs();
    const Index bare = windows + p.subs() + chunk * p.subs(), haloed = chunk * p.phases();
    const Grid g = Grid::make<T>(p, false, bare, haloed, budget<S>(p, FORWARD_BUDGET, FORWARD_SHARE, 1, 1));
    const PlanarTables tables(p, g);
    return run<T>(p.batch * p.groups * g.tiles(), p.threads, bare * g.inner + haloed * g.plane, parallel, [&](Index task, T* memory) {
        const Index n = task / g.tiles() / p.groups, group = task / g.tiles() % p.groups;
        const Tile t(p, g, task % g.tiles());
        T* weights = memory;
        T* sums = weights + windows * g.inner;
        T* output = sums + p.subs() * g.inner;
        T* source = output + chunk * p.subs() * g.inner + g.origin;
        read_logits<S>(p, g, t, logits, n, group, false, weights);
        normalize(p, g, t, weights, sums);
        if (has_lse(p))
            each_plane(p, 1, [&](Index sub, Index, Index y, Index x) {
                write_planes(sums + sub * g.inner, g.inner, g, t, logits_plane<T>(p, lse, n, group, y, x));
            });
        if (last) channels_last_forward<S>(p, g, t, x, y, n, group, weights);
        else planar_forward<S>(p, g, tables, t, x, y, n, group, weights, source, output);
    });
}

template <class S>
bool backward(Problem p, const Tensor& dy, const Tensor& x, const Tensor& logits, const Tensor& lse, const Tensor& dx, const Tensor& dlogits,
              Parallel parallel) {
    using T = Compute<S>;
    p.threads = useful_threads(p, 2);
    const bool last = is_channels_last<S>(p, {&dy, &x, &dx});
    const Index windows = p.taps() * p.subs(), chunk = last ? 0 : std::min(CHUNK, p.group_channels());
    // weights and the output gradients are read around the tile for dx
    const Index weight_planes = windows + p.subs() + chunk * p.subs(), haloed = chunk * p.phases() + (dx.data ? weight_planes : 0);
    const Index gradient_planes = dlogits.data ? windows + 1 : 0, bare = gradient_planes + chunk * p.phases() + (dx.data ? 0 : weight_planes);
    const Grid g = Grid::make<T>(p, dx.data != nullptr, bare, haloed, budget<S>(p, BACKWARD_BUDGET, BACKWARD_SHARE, 2, 1));
    const PlanarTables tables(p, g);
    const Reach reach = dx.data ? g.around() : Reach{};
    return run<T>(p.batch * p.groups * g.tiles(), p.threads, bare * g.inner + haloed * g.plane, parallel, [&](Index task, T* memory) {
        const Index n = task / g.tiles() / p.groups, group = task / g.tiles() % p.groups;
        const Tile t(p, g, task % g.tiles());
        T* weights = memory + g.weight_origin;
        T* sums = weights + windows * g.weight_plane;
        T* doutput = sums + p.subs() * g.weight_plane;
        T* gradients = dlogits.data ? memory + weight_planes * g.weight_plane : nullptr;
        T* spare = gradients + windows * g.inner;
        T* dsource = memory + weight_planes * g.weight_plane + gradient_planes * g.inner;
        T* source = dsource + chunk * p.phases() * g.inner + g.origin;
        read_logits<S>(p, g, t, logits, n, group, true, weights);
        if (has_lse(p))
            each_plane(p, 1, [&](Index sub, Index, Index y, Index x) {
                read_planes(logits_plane<const T>(p, lse, n, group, y, x), g, t, reach, T(0), sums + sub * g.weight_plane, g.weight_plane);
            });
        restore(p, g, t, weights, sums);
        if (gradients) std::fill(gradients, gradients + windows * g.inner, T(0));
        if (last) {
            if (gradients) channels_last_gradients<S>(p, g, t, dy, x, n, group, gradients);
            if (dx.data) channels_last_dx<S>(p, g, t, dy, dx, n, group, weights);
        } else {
            planar_backward<S>(p, g, tables, t, dy, x, dx, n, group, weights, gradients, source, doutput, dsource);
        }
        if (!gradients) return;
        normalize_backward<S>(p, g, t, logits, n, group, weights, gradients, spare);
        each_plane(p, p.taps(), [&](Index e, Index tap, Index y, Index x) {
            write_planes(gradients + e * g.inner, g.inner, g, t, logits_plane<S>(p, dlogits, n, group * p.taps() + tap, y, x));
        });
    });
}

// Calls f with a value of the storage type that `dtype` numbers (backend.py has the same order).
template <class F> int with_dtype(std::int64_t dtype, F&& f) {
    switch (dtype) {
        case 0: return !f(float{});
        case 1: return !f(double{});
        case 2: return !f(BFloat16{});
        default: return !f(Float16{});
    }
}

}  // namespace carafepp

#define EXPORT extern "C" __attribute__((visibility("default")))

// Both return 0, or 1 where memory ran out. A tensor that is not asked for has no data.
EXPORT int carafepp_forward(const carafepp::Problem* p, const carafepp::Tensor* tensors, carafepp::Parallel parallel) {
    return carafepp::with_dtype(p->dtype, [&](auto storage) {
        return carafepp::forward<decltype(storage)>(*p, tensors[0], tensors[1], tensors[2], tensors[3], parallel);
    });
}

EXPORT int carafepp_backward(const carafepp::Problem* p, const carafepp::Tensor* tensors, carafepp::Parallel parallel) {
    return carafepp::with_dtype(p->dtype, [&](auto storage) {
        return carafepp::backward<decltype(storage)>(*p, tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5], parallel);
    });
}
