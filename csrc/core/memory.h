// Blocks of memory that outlive the tensors on them: a step asks for the same sizes as the one before, and fresh
// pages cost more than the kernels that fill them.
#pragma once
#include <cstdint>

namespace rfdarts {

// BranchOutputs: those of a cell, far larger than anything else.
enum class Lifetime { State, BranchOutputs };
void* pool_take(int64_t bytes, Lifetime lifetime = Lifetime::State);  // 64-byte aligned
void pool_give(void* p);
void pool_release();             // give what is cached back to the system
int64_t pool_cached();
void pool_poison(bool on);       // tests: fill blocks with NaN as they are taken

}  // namespace rfdarts
