// Memory for weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fptq {

// `bytes` on a 64-byte line of their own, to be given to std::free. Huge pages where the system lends them on request:
// streaming from 4 KiB pages reads up to a third slower, for the walks and because prefetchers stop at a page's end.
// Throws std::bad_alloc.
inline void* allocate_lines(size_t bytes) {
  constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;
  void* memory = std::aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine);
  if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  // Whole huge pages only, so that no memory is taken that was not asked for.
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage, end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace fptq
