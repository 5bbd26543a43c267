// A test framework in one page: registration, checks that print values, and random inputs that can be drawn again.
#pragma once

#include <cmath>
#include <random>
#include <sstream>
#include <string>
#include <utility>

namespace kdfast::test {

using Random = std::mt19937_64;

struct Registration {
    Registration(const char* name, void (*run)(Random&));
};

// What is being looked at, printed with every failure while this lives. For the thread that runs the tests only.
class Scope {
  public:
    explicit Scope(std::string words);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
};

void fail(const char* file, int line, const std::string& what);

template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    out.precision(9);
    static_cast<void>((out << ... << parts));
    return out.str();
}

template <class A, class B>
void check_equal(const char* file, int line, const char* words, const A& got, const B& expected) {
    if (!(got == expected)) fail(file, line, text(words, ": got ", got, ", expected ", expected));
}

// Infinities and NaN are near only themselves.
inline void check_near(const char* file, int line, const char* words, double got, double expected, double tolerance) {
    const bool same = got == expected || (std::isnan(got) && std::isnan(expected));
    if (!same && !(std::abs(got - expected) <= tolerance))
        fail(file, line, text(words, ": got ", got, ", expected ", expected, " within ", tolerance));
}

template <class Error, class Call>
void check_throws(const char* file, int line, const char* words, Call call) {
    try {
        call();
    } catch (const Error&) {
        return;
    } catch (const std::exception& e) {
        return fail(file, line, text(words, ": threw another type: ", e.what()));
    }
    fail(file, line, text(words, ": did not throw"));
}

}  // namespace kdfast::test

#define TEST(name)                                                           \
    static void name(kdfast::test::Random&);                                 \
    static const kdfast::test::Registration name##_registered(#name, &name); \
    static void name([[maybe_unused]] kdfast::test::Random& random)

#define CHECK(condition) \
    if (!(condition)) kdfast::test::fail(__FILE__, __LINE__, #condition)
#define CHECK_EQUAL(got, expected) \
    kdfast::test::check_equal(__FILE__, __LINE__, #got " == " #expected, (got), (expected))
#define CHECK_NEAR(got, expected, tolerance) \
    kdfast::test::check_near(__FILE__, __LINE__, #got " ~ " #expected, (got), (expected), (tolerance))
#define CHECK_THROWS(error, expression) \
    kdfast::test::check_throws<error>(__FILE__, __LINE__, #expression, [&] { static_cast<void>(expression); })
