// Threads, and the choice of an instruction set.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/threads.h"
#include "cpu/dispatch.h"
#include "environment.h"
#include "harness.h"

using namespace kdfast;
using namespace kdfast::test;

namespace {

// Calls of each index in [0, count).
std::vector<int> visits(std::int64_t count, int threads) {
    std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
    parallel_for(count, threads, [&](std::int64_t i) { ++seen[static_cast<std::size_t>(i)]; });
    return {seen.begin(), seen.end()};
}

bool once_each(const std::vector<int>& seen) {
    for (int n : seen)
        if (n != 1) return false;
    return true;
}

// True where `task` returned true in a forked child within half a minute: what could hang is tried there.
template <class Task>
bool in_child(Task task) {
    const pid_t child = fork();
    if (child == 0) {
        alarm(30);
        _exit(task() ? 0 : 1);
    }
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

TEST(parallel_for_visits_each_index_once) {
    for (std::int64_t count : {0, 1, 2, 3, 7, 1000})
        for (int threads : {-1, 0, 1, 2, 3, 8, 64}) {
            const Scope scope(text(count, " tasks, ", threads, " threads"));
            CHECK(once_each(visits(count, threads)));
        }
}

TEST(parallel_for_rethrows_and_goes_on) {
    for (int threads : {1, 2, 8}) {
        const Scope scope(text(threads, " threads"));
        CHECK_THROWS(std::out_of_range, parallel_for(100, threads, [](std::int64_t i) {
                         if (i % 10 == 3) throw std::out_of_range("three");
                     }));
        CHECK_THROWS(std::domain_error,
                     parallel_for(100, threads, [](std::int64_t) { throw std::domain_error("every one"); }));
        CHECK(once_each(visits(100, threads)));
    }
}

TEST(parallel_for_serves_several_callers) {
    std::atomic<int> wrong = 0;
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 6; ++caller)
        callers.emplace_back([&wrong, caller] {
            for (int round = 0; round < 50; ++round)
                if (!once_each(visits(1 + (caller * 17 + round) % 40, 1 + (caller + round) % 5))) ++wrong;
        });
    for (std::thread& caller : callers) caller.join();
    CHECK_EQUAL(wrong.load(), 0);
}

TEST(parallel_for_publishes_what_tasks_wrote) {
    std::vector<std::int64_t> squares(5000);
    for (int round = 0; round < 20; ++round) {
        parallel_for(5000, 4, [&](std::int64_t i) { squares[static_cast<std::size_t>(i)] = i + round; });
        const std::int64_t sum = std::accumulate(squares.begin(), squares.end(), std::int64_t{0});
        CHECK_EQUAL(sum, 5000 * (4999 + 2 * round) / 2);
    }
}

// ThreadSanitizer does not follow threads that start in the child of a process that had threads.
#if !defined(__SANITIZE_THREAD__)

TEST(parallel_for_nests) {
    CHECK(in_child([] {
        std::atomic<int> calls = 0;
        parallel_for(8, 4, [&](std::int64_t) { parallel_for(8, 4, [&](std::int64_t) { ++calls; }); });
        return calls == 64;
    }));
}

TEST(parallel_for_works_after_a_fork) {
    CHECK(once_each(visits(100, 4)));  // the parent has threads, which the child will not have
    CHECK(in_child([] { return once_each(visits(100, 4)); }));
    // and in a child that is forked while another thread is inside a job
    std::atomic<bool> stop = false;
    std::thread busy([&] {
        while (!stop) visits(1000, 3);
    });
    for (int round = 0; round < 10; ++round) CHECK(in_child([] { return once_each(visits(100, 4)); }));
    stop = true;
    busy.join();
    CHECK(once_each(visits(100, 4)));
}

#endif

TEST(the_table_ends_with_what_every_machine_runs) {
    const auto table = cpu::isa_table();
    CHECK(!table.empty());
    CHECK_EQUAL(table.back().name, "generic");
    CHECK(table.back().supported());
    for (const cpu::Isa& isa : table) CHECK_EQUAL(isa.kernels->isa, isa.name);
}

TEST(force_isa_is_honoured) {
    for (const cpu::Isa& isa : cpu::isa_table()) {
        const Scope scope{std::string(isa.name)};
        const Environment forced("KDFAST_FORCE_ISA", std::string(isa.name).c_str());
        if (isa.supported()) {
            CHECK_EQUAL(cpu::kernels().isa, isa.name);
        } else {
            CHECK_THROWS(ArgumentError, cpu::kernels());
        }
    }
    for (const char* unknown : {"avx", "AVX2", "generic ", "sse"}) {
        const Environment forced("KDFAST_FORCE_ISA", unknown);
        CHECK_THROWS(ArgumentError, cpu::kernels());
    }
    for (const char* unset : {static_cast<const char*>(nullptr), ""}) {
        const Environment forced("KDFAST_FORCE_ISA", unset);
        for (const cpu::Isa& isa : cpu::isa_table())
            if (isa.supported()) {
                CHECK_EQUAL(cpu::kernels().isa, isa.name);  // the first that is supported
                break;
            }
    }
}
