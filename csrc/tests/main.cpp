// Usage: kdfast_tests [--seed N] [name...]     the seed may also come from KDFAST_TEST_SEED
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "harness.h"

namespace kdfast::test {
namespace {

struct Test {
    std::string name;
    void (*run)(Random&);
};

// Functions, not objects: registrations run before main, in no defined order.
std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}
std::vector<std::string>& scopes() {
    static std::vector<std::string> all;
    return all;
}

int failures = 0;                   // of the test that runs
constexpr int printed_at_most = 5;  // a wrong formula fails in every column

}  // namespace

Registration::Registration(const char* name, void (*run)(Random&)) { tests().push_back({name, run}); }
Scope::Scope(std::string words) { scopes().push_back(std::move(words)); }
Scope::~Scope() { scopes().pop_back(); }

void fail(const char* file, int line, const std::string& what) {
    if (++failures > printed_at_most) return;
    std::string where;
    for (const std::string& scope : scopes()) where += " [" + scope + "]";
    std::printf("%s:%d:%s %s\n", file, line, where.c_str(), what.c_str());
}

}  // namespace kdfast::test

int main(int count, char** arguments) {
    using namespace kdfast::test;
    std::vector<std::string> chosen(arguments + 1, arguments + count);
    std::uint64_t seed = std::random_device{}();
    if (const char* given = std::getenv("KDFAST_TEST_SEED")) seed = std::strtoull(given, nullptr, 10);
    if (chosen.size() >= 2 && chosen[0] == "--seed") {
        seed = std::strtoull(chosen[1].c_str(), nullptr, 10);
        chosen.erase(chosen.begin(), chosen.begin() + 2);
    }
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed));

    int passed = 0, failed = 0;
    for (const Test& test : tests()) {
        bool wanted = chosen.empty();
        for (const std::string& name : chosen) wanted = wanted || name == test.name;
        if (!wanted) continue;
        failures = 0;
        // Of its own, so that a test draws the same numbers when it is run alone.
        Random random(seed ^ std::hash<std::string>{}(test.name));
        try {
            test.run(random);
        } catch (const std::exception& e) {
            fail(__FILE__, __LINE__, text("uncaught exception: ", e.what()));
        }
        std::printf("%s %s\n", failures == 0 ? "ok    " : "FAILED", test.name.c_str());
        ++(failures == 0 ? passed : failed);
    }
    if (passed + failed == 0) std::printf("no test of that name\n");
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? 0 : 1;
}
