#define SNMF_LEVEL v2
#define SNMF_VECTOR_BYTES 16
#include "isa.inc"
