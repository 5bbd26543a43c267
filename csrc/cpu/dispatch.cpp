#include "cpu/dispatch.h"

#if defined(KDFAST_X86)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <string>

#include "core/error.h"

namespace kdfast::cpu {
namespace {

#if defined(KDFAST_X86)
// For which older compilers have no name. Asked once: on a virtual machine CPUID takes microseconds.
bool has_f16c() {
    static const bool found = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    }();
    return found;
}

// The builtins ask the operating system too: a register file that is not saved on a context switch is not supported.
bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() &&
           __builtin_cpu_supports("pclmul");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// With what came before it on all but Cooper Lake, which counts as avx512: the cache permutes bytes.
bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("vpclmulqdq");
}
#endif

const Isa table[] = {
#if defined(KDFAST_X86)
    {"avx512_bf16", has_avx512_bf16, &avx512_bf16_kernels},
    {"avx512", has_avx512, &avx512_kernels},
    {"avx2", has_avx2, &avx2_kernels},
#endif
    {"generic", [] { return true; }, &generic_kernels},
};

const Kernels& best() {
    static const Kernels& found = [&]() -> const Kernels& {
        for (const Isa& isa : table)
            if (isa.supported()) return *isa.kernels;
        return generic_kernels;
    }();
    return found;
}

}  // namespace

std::span<const Isa> isa_table() { return table; }

const Kernels& kernels() {
    const char* forced = std::getenv("KDFAST_FORCE_ISA");
    if (!forced || !*forced) return best();
    std::string known;
    for (const Isa& isa : table) {
        if (isa.name == forced) {
            if (isa.supported()) return *isa.kernels;
            throw ArgumentError("KDFAST_FORCE_ISA=" + std::string(forced) + ": this CPU does not support it");
        }
        known += (known.empty() ? "" : ", ") + std::string(isa.name);
    }
    throw ArgumentError("KDFAST_FORCE_ISA must be one of " + known + ", got " + forced);
}

}  // namespace kdfast::cpu
