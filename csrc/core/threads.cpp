#include "core/threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace kdfast {
namespace {

// Whether this thread is in a task: a job that it starts then runs in place, as the pool waits for the job it is part
// of.
thread_local bool inside = false;

// Workers sleep between jobs: torch's own pool computes in the same process, and two pools that spin would take the
// cores from each other.
class Pool {
  public:
    void run(std::int64_t count, int threads, const std::function<void(std::int64_t)>& task) {
        std::lock_guard caller(callers_);  // one job at a time; a second caller waits for the first
        const int helpers = static_cast<int>(std::min<std::int64_t>(threads, count)) - 1;
        {
            std::lock_guard lock(mutex_);
            while (static_cast<int>(workers_.size()) < helpers) {
                const int id = static_cast<int>(workers_.size());
                workers_.emplace_back([this, id] { work(id); }).detach();
            }
            task_ = &task;
            count_ = count;
            next_.store(0, std::memory_order_relaxed);
            helpers_ = helpers;
            busy_ = helpers;
            error_ = nullptr;
            ++job_;
        }
        wake_.notify_all();
        drain();
        std::unique_lock lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
        if (error_) std::rethrow_exception(error_);
    }

  private:
    void work(int id) {
        std::uint64_t seen = 0;
        for (;;) {
            {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return job_ != seen && id < helpers_; });
                seen = job_;
            }
            drain();
            std::lock_guard lock(mutex_);
            if (--busy_ == 0) done_.notify_one();
        }
    }

    void drain() {
        inside = true;
        try {
            for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*task_)(i);
        } catch (...) {
            next_.store(count_, std::memory_order_relaxed);
            std::lock_guard lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
        inside = false;
    }

    std::mutex callers_;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    const std::function<void(std::int64_t)>* task_ = nullptr;
    std::int64_t count_ = 0;
    std::atomic<std::int64_t> next_{0};
    int helpers_ = 0;
    int busy_ = 0;
    std::uint64_t job_ = 0;
    std::exception_ptr error_;
};

// Never destroyed: its threads may outlive static destructors. A forked child has none of the threads, and perhaps a
// locked mutex, so it starts over with a new pool and leaves the old one where it is.
std::atomic<Pool*> pool{nullptr};

Pool& instance() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    static_cast<void>(registered);
    Pool* current = pool.load(std::memory_order_acquire);
    if (!current) {
        auto* fresh = new Pool;
        if (pool.compare_exchange_strong(current, fresh)) return *fresh;
        delete fresh;
    }
    return *current;
}

}  // namespace

void parallel_for(std::int64_t count, int threads, const std::function<void(std::int64_t)>& task) {
    if (threads <= 1 || count <= 1 || inside) {
        for (std::int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    instance().run(count, threads, task);
}

}  // namespace kdfast
