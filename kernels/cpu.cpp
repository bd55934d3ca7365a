// The operator on CPU, compiled at first use (cpu.py): plain C entry points, which take pointers and strides and know nothing of PyTorch.
// A tile of cells and one group of channels is one task. Threads take tasks as they come; each value is computed by one thread, in an
// order that does not depend on the tiling, so that results are bit-identical for any number of threads.

#include <atomic>
#include <cstdlib>
#include <thread>

#include "cpu_channels_last.h"
#include "cpu_weights.h"

namespace carafepp {

// The signature of GOMP_parallel: runs function(data) on a team of threads of the OpenMP runtime that PyTorch itself uses.
using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

// Bytes of weights that a tile may hold, for tiles to stay near the processor and the scratch of all threads a few per cent of the
// tensors, but for small ones. Backward gains from larger tiles, for it restores the weights around a tile as well.
constexpr Index LEAST_BUDGET = 128 << 10, FORWARD_BUDGET = 256 << 10, BACKWARD_BUDGET = 1024 << 10;
template <class S> Index budget(const Problem& p, Index most, Index share) {
    const Index inputs = p.channels * p.height * p.width + p.groups * p.taps() * p.subs() * p.cells_y() * p.cells_x();
    const Index bytes = p.batch * (inputs + p.channels * p.output_y() * p.output_x()) * Index(sizeof(S));
    return std::min(most, std::max(LEAST_BUDGET, bytes / (share * p.threads)));
}

// work(task, scratch) for every task, on as many threads as pay, each with its own scratch; false if there is no memory.
template <class T, class F> bool run(Index tasks, Index operations, Index threads, Index scratch, Parallel parallel, F&& work) {
    threads = std::max<Index>(1, std::min({threads, tasks, operations / 500000 + 1}));
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

template <class S> bool forward(const Problem& p, const Tensor& x, const Tensor& logits, const Tensor& y, const Tensor& lse, Parallel parallel) {
    using T = Compute<S>;
    const Grid g = Grid::make<T>(p, false, budget<S>(p, FORWARD_BUDGET, 40));
    const PlanarTables tables(p, g);
    const bool last = is_channels_last<S>(p, {&x, &y});
    const Index channels = std::min(CHUNK, p.group_channels()), windows = p.taps() * p.subs();
    const Index scratch = g.inner * (windows + p.subs()) + (last ? 0 : channels * (p.phases() * g.plane + p.subs() * g.inner));
    const Index operations = windows * p.batch * p.channels * p.cells_y() * p.cells_x();
    return run<T>(p.batch * p.groups * g.tiles(), operations, p.threads, scratch, parallel, [&](Index task, T* memory) {
        const Index n = task / g.tiles() / p.groups, group = task / g.tiles() % p.groups;
        const Tile t(p, g, task % g.tiles());
        T* weights = memory;
        T* sums = weights + windows * g.inner;
        T* output = sums + p.subs() * g.inner;
        T* source = output + channels * p.subs() * g.inner + g.origin;
        read_logits<S>(p, g, t, logits, n, group, 0, false, weights);
        normalize(p, g, t, weights, sums);
        if (has_lse(p))
            for (Index sub = 0; sub < p.subs(); ++sub)
                write_planes(sums + sub * g.inner, g.inner, g, t, logits_plane<T>(p, lse, n, group, sub));
        if (last) channels_last_forward<S>(p, g, t, x, y, n, group, weights);
        else planar_forward<S>(p, g, tables, t, x, y, n, group, weights, source, output);
    });
}

template <class S>
bool backward(const Problem& p, const Tensor& dy, const Tensor& x, const Tensor& logits, const Tensor& lse, const Tensor& dx, const Tensor& dlogits,
              Parallel parallel) {
    using T = Compute<S>;
    const Index windows = p.taps() * p.subs();
    const Grid g = Grid::make<T>(p, dx.data != nullptr, budget<S>(p, BACKWARD_BUDGET, 18));
    const PlanarTables tables(p, g);
    const bool last = is_channels_last<S>(p, {&dy, &x, &dx});
    const Index channels = std::min(CHUNK, p.group_channels()), halo = dx.data ? g.halo : 0;
    const Index restored = g.weight_plane * (windows + p.subs()), gradient = dlogits.data ? g.inner * (windows + 1) : 0;
    const Index chunk = last ? 0 : channels * (p.phases() * (g.plane + g.inner) + p.subs() * g.weight_plane);
    const Index scratch = restored + gradient + chunk;
    const Index operations = 2 * windows * p.batch * p.channels * p.cells_y() * p.cells_x();
    return run<T>(p.batch * p.groups * g.tiles(), operations, p.threads, scratch, parallel, [&](Index task, T* memory) {
        const Index n = task / g.tiles() / p.groups, group = task / g.tiles() % p.groups;
        const Tile t(p, g, task % g.tiles());
        T* weights = memory + g.weight_origin;
        T* sums = weights + windows * g.weight_plane;
        T* gradients = dlogits.data ? memory + restored : nullptr;
        T* spare = gradients + windows * g.inner;
        T* doutput = memory + restored + gradient + g.weight_origin;
        T* dsource = memory + restored + gradient + channels * p.subs() * g.weight_plane;
        T* source = dsource + channels * p.phases() * g.inner + g.origin;
        read_logits<S>(p, g, t, logits, n, group, halo, true, weights);
        if (has_lse(p))
            for (Index sub = 0; sub < p.subs(); ++sub)
                read_planes(logits_plane<const T>(p, lse, n, group, sub), g, t, halo, T(0), sums + sub * g.weight_plane, g.weight_plane);
        restore(p, g, t, halo, weights, sums);
        if (gradients) std::fill(gradients, gradients + windows * g.inner, T(0));
        if (last) {
            if (gradients) channels_last_gradients<S>(p, g, t, dy, x, n, group, gradients);
            if (dx.data) channels_last_dx<S>(p, g, t, dy, dx, n, group, weights);
        } else {
            planar_backward<S>(p, g, tables, t, dy, x, dx, n, group, weights, gradients, source, doutput, dsource);
        }
        if (!gradients) return;
        normalize_backward<S>(p, g, t, logits, n, group, weights, gradients, spare);
        for (Index e = 0; e < windows; ++e)
            write_planes(gradients + e * g.inner, g.inner, g, t, logits_plane<S>(p, dlogits, n, group * p.taps(), e));
    });
}

// Calls f with a value of the storage type that `dtype` numbers (cpu.py has the same order).
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
