// The kernel table of every ISA that shares the layout of panels.h: CMake compiles this file once for each, FPTQ_NS
// naming it.
#include "arch/generic/attention.h"
#include "arch/generic/gemm.h"
#include "arch/generic/low_rank.h"
#include "arch/generic/norm.h"
#include "arch/generic/panels.h"
#include "arch/generic/recurrent.h"
#include "arch/generic/sample.h"
#include "core/dispatch.h"

#define FPTQ_QUOTE(x) #x
#define FPTQ_STRING(x) FPTQ_QUOTE(x)

namespace fptq {
namespace FPTQ_NS {

extern const Kernels kernels;
const Kernels kernels = {
    .isa = FPTQ_STRING(FPTQ_NS),
    .layout = &panels,
    .gemm_int4_name = kGemmInt4Name,
    .gemm_int8_name = kGemmInt8Name,
    .gemm_float_name = kGemmFloatName,
    .gemm_int4 = gemm_int4,
    .gemm_int8 = gemm_int8,
    .gemm_float = gemm_float,
    .gemm_weight_only = gemm_weight_only,
    .multiply = multiply,
    .quantize_row = quantize_row,
    .quantize_part = quantize_part,
    .widen_row = widen_row,
    .norm_row = norm_row,
    .activate_row = activate_row,
    .add_row = add_row,
    .scale_row = scale_row,
    .accumulate_row = accumulate_row,
    .gate_row = gate_row,
    .softcap_row = softcap_row,
    .widen_codes = widen_codes,
    .low_rank_rows = low_rank_rows,
    .rope_and_cache_row = rope_and_cache_row,
    .attention_tile = attention_tile,
    .merge_partials = merge_partials,
    .short_conv = short_conv,
    .gated_delta = gated_delta,
    .state_space = state_space,
    .mask_row = mask_row,
    .scan_row = scan_row,
    .weigh_block = weigh_block,
    .select_at_least = select_at_least,
};

}  // namespace FPTQ_NS
}  // namespace fptq
