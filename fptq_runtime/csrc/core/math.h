// exp and log as fixed sequences of correctly rounded operations: the C library's differ from one CPU to another, and
// from one library to another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fptq {

constexpr double kLog2E = 1.4426950408889634, kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b39p-41;

// 0 below -700, where a float is 0 too; the greatest there is above 700.
inline double own_exp(double x) {
  if (x < -700) return 0;
  if (x > 700) x = 700;
  constexpr double kRound = 0x1.8p52 + 1023;  // the sum's low bits are n and the exponent's bias
  const double biased = x * kLog2E + kRound, n = biased - kRound, r = x - n * kLn2High - n * kLn2Low;
  constexpr double kFactorials[] = {
      1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0, 1 / 5040.0, 1 / 720.0,
      1 / 120.0,       1 / 24.0,       1 / 6.0,       0.5,          1,           1};
  double p = 1 / 6227020800.0;
  for (double c : kFactorials) p = p * r + c;
  uint64_t power;
  std::memcpy(&power, &biased, sizeof power);
  power <<= 52;
  double scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

// Of a positive number.
inline double own_log(double x) {
  int exponent;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752) m *= 2, --exponent;
  const double s = (m - 1) / (m + 1), square = s * s;
  double series = 0;
  for (int i = 23; i > 0; i -= 2) series = series * square + 1.0 / i;
  return 2 * s * series + exponent * kLn2Low + exponent * kLn2High;
}

inline float sigmoid(float x) { return static_cast<float>(1 / (1 + own_exp(-static_cast<double>(x)))); }

}  // namespace fptq
