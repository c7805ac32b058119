// Errors of a CUDA device, and whether it can run the kernels. No torch and no CUDA header here.
#pragma once
#include <new>
#include <string>
#include <utility>

#include "core/cell.h"
#include "core/data.h"

namespace rfdarts::cuda {

// What Python sees as a MemoryError; torch's own type does not pass its stable ABI.
struct OutOfMemory : std::bad_alloc {
  std::string text;
  explicit OutOfMemory(std::string text) : text("CUDA out of memory: " + std::move(text)) {}
  const char* what() const noexcept override { return text.c_str(); }
};

// Both "" or the reason why not; a device has a number. `archs`: what the kernels were built for.
std::string missing(int device, const std::string& archs);
// whether its blocks have room for the cell's kernels, forward and backward
std::string cell_misfit(Storage storage, const Cell& cell, int device);
// "free of total bytes" of the current device; "" where it does not even answer
std::string free_memory();

}  // namespace rfdarts::cuda
