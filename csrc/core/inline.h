// What the small functions that kernels are made of are declared as: inlined, whatever the compiler thinks of it. Under
// sanitizers they are calls, since the checks of all that is inlined into one function took minutes to compile.
#pragma once

#if defined(KDFAST_SANITIZED)
#define KDFAST_INLINE inline
#define KDFAST_INLINE_LAMBDA
#else
#define KDFAST_INLINE [[gnu::always_inline]] inline
#define KDFAST_INLINE_LAMBDA __attribute__((always_inline))
#endif
