// Threads that share the tasks of a call, each with its own memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "call.h"
#include "index.h"
#include "vectors.h"

namespace carafepp {

// Number of threads that are worth starting for `passes` passes of multiplications.
inline Index useful_threads(const Call& call, Index passes) {
    constexpr Index worthwhile = 500000;  // multiplications per thread
    const Problem& problem = call.problem;
    const Index multiplications = passes * problem.windows() * problem.batch * problem.channels * problem.cell_rows() * problem.cell_columns();
    return std::min<Index>(call.threads, multiplications / worthwhile + 1);
}

// Calls work(task, memory) for every task. Each thread takes the next task when it is free, and has memory for `values` of T, aligned to
// cache lines. Throws std::bad_alloc if memory runs out.
template <class T, class F> void run_tasks(Index tasks, Index threads, Index values, Parallel parallel, F&& work) {
    constexpr Index line = 64;
    threads = std::max<Index>(1, std::min(threads, tasks));
    // the last vector of the last plane may reach beyond it
    const Index bytes = ceil_div((values + LANES<T>) * Index(sizeof(T)), line) * line;
    const std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(line, threads * bytes), &std::free);
    if (!memory) throw std::bad_alloc();
    std::atomic<Index> next_task{0}, next_thread{0};
    std::atomic<bool> exhausted{false};
    auto worker = [&] {
        T* own = reinterpret_cast<T*>(static_cast<char*>(memory.get()) + next_thread++ * bytes);
        // an exception must not leave a thread
        try {
            for (Index task; (task = next_task++) < tasks;) work(task, own);
        } catch (const std::bad_alloc&) {
            exhausted = true;
        }
    };
    if (threads == 1) {
        worker();
    } else if (parallel) {
        parallel([](void* data) { (*static_cast<decltype(worker)*>(data))(); }, &worker, unsigned(threads), 0);
    } else {
        std::vector<std::thread> team;
        team.reserve(threads - 1);
        // if the system refuses a thread, the others take its tasks
        try {
            while (Index(team.size()) < threads - 1) team.emplace_back(worker);
        } catch (const std::system_error&) {
        }
        worker();
        for (std::thread& thread : team) thread.join();
    }
    if (exhausted) throw std::bad_alloc();
}

}  // namespace carafepp
