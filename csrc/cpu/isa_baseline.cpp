#include "cpu/includes.h"
// float64 checks gradients; one build of it is enough
#define RFDARTS_WITH_DOUBLE
#define RFDARTS_ISA baseline
#define RFDARTS_VECTOR_BYTES 16
#include "cpu/table.h"
