// One ISA's kernel table: CMake compiles this file once per ISA, FPTQ_NS naming it.
#include "attention.h"
#include "dispatch.h"
#include "gemm.h"
#include "norm.h"
#include "sample.h"

#define FPTQ_QUOTE(x) #x
#define FPTQ_STRING(x) FPTQ_QUOTE(x)

namespace fptq {
namespace FPTQ_NS {

extern const Kernels kernels;
const Kernels kernels = {
    FPTQ_STRING(FPTQ_NS), kGemmInt4Name,      kGemmInt8Name,    kGemmFloatName,     gemm_int4,
    gemm_int8,            gemm_float,         gemm_weight_only, multiply,           quantize_row,
    quantize_part,        widen_row,          norm_row,         activate_row,       add_row,
    scale_row,            softcap_row,        rope_and_cache_row, attention_tile,   merge_partials,
    scan_row,             weigh_block,        select_at_least,
};

}  // namespace FPTQ_NS
}  // namespace fptq
