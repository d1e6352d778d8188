#define SNMF_LEVEL v3
#define SNMF_VECTOR_BYTES 32
#include "isa.inc"
