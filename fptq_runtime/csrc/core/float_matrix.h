// Matrices of floats as Python gives them.
#pragma once

#include <nanobind/ndarray.h>

#include <climits>
#include <stdexcept>

#include "core/views.h"

namespace fptq {

// float32, float16, or the bits of bfloat16 as int16.
using FloatMatrix = nanobind::ndarray<nanobind::ro, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

// Throws std::invalid_argument where it is none of those, or larger than can be.
inline FloatType float_type(const FloatMatrix& matrix, const char* name) {
  namespace nb = nanobind;
  const nb::dlpack::dtype half{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
  if (matrix.shape(0) > INT_MAX || matrix.shape(1) > INT_MAX)
    throw std::invalid_argument(std::string(name) + " is too large");
  if (matrix.dtype() == nb::dtype<int16_t>()) return FloatType::kBfloat16;
  if (matrix.dtype() == half) return FloatType::kFloat16;
  if (matrix.dtype() == nb::dtype<float>()) return FloatType::kFloat32;
  throw std::invalid_argument(std::string(name) + " must be float32, float16 or int16");
}

}  // namespace fptq
