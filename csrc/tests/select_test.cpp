// Selection of sparse targets, by every instruction set.
#include "harness.h"
