// Packing into an ISA's layout. The returned weight owns its memory.
#pragma once

#include <cstdlib>
#include <memory>

#include "core/kernels.h"
#include "core/thread_pool.h"

namespace fptq {

// Asks for huge pages for what of the memory fills them, where the system leaves the choice: what streams from them
// reads up to a third faster.
void use_huge_pages(void* memory, size_t bytes);

// Uninitialized memory that starts on a cache line, to be freed with std::free; on huge pages as far as it fills them
// and the system grants them, which raises the rate at which weights stream from memory. Throws std::bad_alloc.
void* allocate_lines(size_t bytes);

// codes [N][K] within ±2^(bits-1), scale [N][ceil(K / group_size)]; bits 4 or 8; group_size a multiple of k_unit, or K
// for one scale per channel. Throws std::invalid_argument.
std::shared_ptr<const PackedWeight> pack_weight(const int8_t* codes, const float* scale, int n, int k, int group_size,
                                                int bits, const Layout& layout);

// The same from compressed-tensors' words [N][ceil(K · bits / 32)] of 32 bits: codes + 2^(bits-1), the least
// significant first. Panels are spread over the pool, where there is one.
std::shared_ptr<const PackedWeight> pack_weight(const void* words, const float* scale, int n, int k, int group_size,
                                                int bits, const Layout& layout, ThreadPool* pool);

// weight [N][K].
std::shared_ptr<const FloatWeight> pack_float(const void* weight, FloatType type, int n, int k, const Layout& layout,
                                              ThreadPool* pool);

}  // namespace fptq
