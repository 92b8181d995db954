#include "core/dispatch.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fptq {

// The ISA paths, best first: one line here and one in CMakeLists.txt each, and for a new one what detect() asks the
// CPU.
#define FPTQ_PATHS(PATH) PATH(avx512vnni) PATH(avxvnni) PATH(avx2) PATH(generic)

#define DECLARE(name)           \
  namespace name {              \
  extern const Kernels kernels; \
  }
FPTQ_PATHS(DECLARE)

namespace {

struct Cpu {
  bool generic = true, avx2 = false, avxvnni = false, avx512vnni = false;
};

// A CPU's flag is worth nothing unless the operating system saves the registers: XCR0 says so.
Cpu detect() {
  Cpu cpu;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  const bool osxsave = c >> 27 & 1, avx = c >> 28 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !avx || !fma || !f16c) return cpu;
  unsigned xcr0, high;
  __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  const bool ymm = (xcr0 & 0x6) == 0x6, zmm = (xcr0 & 0xe6) == 0xe6;
  unsigned b7, c7, a71 = 0;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d)) return cpu;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  cpu.avx2 = ymm && (b7 >> 5 & 1);
  cpu.avxvnni = cpu.avx2 && (a71 >> 4 & 1);
  const bool f = b7 >> 16 & 1, dq = b7 >> 17 & 1, bw = b7 >> 30 & 1, vl = b7 >> 31 & 1, vnni = c7 >> 11 & 1;
  cpu.avx512vnni = cpu.avx2 && zmm && f && dq && bw && vl && vnni;
#endif
  return cpu;
}

// Found out once: under a hypervisor each cpuid takes microseconds.
const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> list = [] {
    const Cpu cpu = detect();
    std::vector<const Kernels*> list;
#define ADD(name)                                 \
  if constexpr (FPTQ_HAS_##name) {                \
    if (cpu.name) list.push_back(&name::kernels); \
  }
    FPTQ_PATHS(ADD)
    return list;
  }();
  return list;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->isa);
  return names;
}

const char* sources() { return FPTQ_SOURCES; }

const Kernels& kernels_for(const std::string& isa) {
  const auto& list = available();
  if (isa.empty()) return *list.front();
  std::string names;
  for (const Kernels* kernels : list) {
    if (isa == kernels->isa) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
#define SAME(name) || isa == #name
  const bool known = false FPTQ_PATHS(SAME);
  throw std::invalid_argument((known ? "this CPU or build has no ISA path '" : "unknown ISA path '") + isa +
                              "'; available here: " + names);
}

}  // namespace fptq
