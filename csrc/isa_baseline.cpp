#define SNMF_LEVEL baseline
#define SNMF_VECTOR_BYTES 16
#include "isa.inc"
