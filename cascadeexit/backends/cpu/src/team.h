// A team of threads that share the work of one call: static parts, dynamic parts and a barrier.
#pragma once

#include <atomic>
#include <cstdint>
#include <omp.h>
#include <sched.h>
#include <vector>

namespace {

// What other threads write for one thread. On cache lines of its own: a line that several threads write travels between
// cores, which may be on different L3 caches.
struct Signals {
    alignas(64) std::atomic<int> arrived[16]{};     // for each step of a barrier: the last barrier that was signalled
    alignas(64) std::atomic<int> claimed[2]{};      // items claimed of this thread's part, in this loop and the next
};

// One thread's view of its team.
struct Team {
    int rank, size;
    Signals* signals;                               // (size)
    int barriers = 0, loops = 0;

    // Static partition: thread `rank` works on items begin(items) .. end(items) - 1.
    int begin(int items, int of_rank) const { return int(int64_t(items) * of_rank / size); }
    int begin(int items) const { return begin(items, rank); }
    int end(int items) const { return begin(items, rank + 1); }

    // Wait until all threads are here. Dissemination barrier (Hensgen, Finkel and Manber 1988): in step k a thread
    // signals the one 2^k further on and waits for the same signal. Threads arrive within microseconds of each other,
    // so they spin; when another program holds a core, they yield to it.
    void barrier() {
        barriers++;
        for (int step = 0, distance = 1; distance < size; step++, distance *= 2) {
            signals[(rank + distance) % size].arrived[step].store(barriers, std::memory_order_release);
            for (int spins = 0; signals[rank].arrived[step].load(std::memory_order_acquire) < barriers; spins++) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
                if (spins > 500) sched_yield();
            }
        }
    }

    // Dynamic partition: work(i) for i = 0..items-1, each by any thread. A thread starts with its own part and then
    // helps the others, because memory does not serve all cores alike. Needs a barrier before the next such loop.
    template <class Work>
    void share(int items, Work work) {
        const int now = loops++ % 2;
        signals[rank].claimed[1 - now].store(0, std::memory_order_relaxed);
        for (int k = 0; k < size; k++) {
            const int owner = (rank + k) % size, first = begin(items, owner), count = begin(items, owner + 1) - first;
            std::atomic<int>& claimed = signals[owner].claimed[now];
            if (k && claimed.load(std::memory_order_relaxed) >= count) continue;    // a load is cheaper than an add
            for (int i; (i = claimed.fetch_add(1, std::memory_order_relaxed)) < count;) work(first + i);
        }
    }
};

// Call work(team) on each of so many threads.
template <class Work>
inline void run_team(int threads, Work work) {
    std::vector<Signals> signals(threads);
#pragma omp parallel num_threads(threads)
    {
        Team team{omp_get_thread_num(), omp_get_num_threads(), signals.data()};
        work(team);
    }
}

}  // namespace
