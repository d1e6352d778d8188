#define SNMF_LEVEL v4
#define SNMF_VECTOR_BYTES 64
#include "isa.inc"
