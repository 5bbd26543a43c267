# Fails where an object built for an instruction set has a weak function outside that set's namespace: the linker keeps one copy
# of an inline function, from whichever object it meets first, and a copy of std::string made of AVX-512 would then run, and
# stop with an illegal instruction, on a processor that chose another set.
#
#   cmake -D NM=nm -D ISA=avx512 -D OBJECTS=dense_kernel.cpp.o -P symbols.cmake
execute_process(COMMAND ${NM} ${OBJECTS} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(LENGTH ${ISA} length)
string(REGEX MATCHALL "[^\n]+ W [^\n]+" weak "${symbols}")
list(FILTER weak EXCLUDE REGEX "6kdfast3cpu${length}${ISA}")
if(weak)
  list(JOIN weak "\n" lines)
  message(FATAL_ERROR "weak functions in ${ISA}'s object (c++filt names them):\n${lines}")
endif()
