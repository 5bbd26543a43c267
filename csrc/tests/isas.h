// Every instruction set that this machine has.
#pragma once

#include <string>

#include "cpu/dispatch.h"
#include "environment.h"
#include "harness.h"

namespace kdfast::test {

// body() with each of them in force, the oldest first.
template <class Body>
void for_each_isa(Body body) {
    for (const cpu::Isa& isa : cpu::isa_table()) {
        if (!isa.supported()) continue;
        const Scope scope{std::string(isa.name)};
        const Environment forced("KDFAST_FORCE_ISA", std::string(isa.name).c_str());
        body();
    }
}

}  // namespace kdfast::test
