// Huge pages for large fresh outputs.
#pragma once

#include <cstddef>

namespace kdfast {

// Asks the kernel to back the whole 2 MiB pages inside [data, data + bytes) with huge pages. To be called before the
// memory is first touched: a fresh 262 MB gradient then costs 128 page faults and not 64,000, which took longer than
// its arithmetic. Advice only: where the system declines, nothing changes. Does nothing below 4 MiB.
void advise_huge_pages(void* data, std::size_t bytes);

}  // namespace kdfast
