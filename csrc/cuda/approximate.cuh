// A float whose exponential and division are the hardware's, good to about 1e-6 absolute: the gate arithmetic where states are stored in
// 16 bits, at a third of the instructions. cell.h does the rest of a step with it.
#pragma once
#include "device.cuh"

namespace stable_rnn {

#ifdef STABLE_RNN_EXECUTOR
inline float fast_exponential(float x) { return std::exp(x); }
inline float fast_quotient(float a, float b) { return a / b; }
inline float with_sign(float magnitude, float sign) { return std::copysign(magnitude, sign); }
#else
__device__ __forceinline__ float fast_exponential(float x) { return __expf(x); }
__device__ __forceinline__ float fast_quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ float with_sign(float magnitude, float sign) { return copysignf(magnitude, sign); }
#endif

struct Approximate {
  float x;
  Approximate() = default;
  __device__ __forceinline__ Approximate(float x) : x(x) {}
};

__device__ __forceinline__ float number(Approximate a) { return a.x; }
__device__ __forceinline__ float number(float a) { return a; }
__device__ __forceinline__ Approximate operator+(Approximate a, Approximate b) { return a.x + b.x; }
__device__ __forceinline__ Approximate operator-(Approximate a, Approximate b) { return a.x - b.x; }
__device__ __forceinline__ Approximate operator*(Approximate a, Approximate b) { return a.x * b.x; }
__device__ __forceinline__ Approximate operator/(Approximate a, Approximate b) { return fast_quotient(a.x, b.x); }
__device__ __forceinline__ Approximate fma(Approximate a, Approximate b, Approximate c) { return fma(a.x, b.x, c.x); }
__device__ __forceinline__ Approximate at_least(Approximate a, Approximate low) { return at_least(a.x, low.x); }
__device__ __forceinline__ Approximate at_most(Approximate a, Approximate high) { return at_most(a.x, high.x); }
__device__ __forceinline__ Approximate select_le(Approximate a, Approximate b, Approximate yes, Approximate no) {
  return a.x <= b.x ? yes : no;
}
__device__ __forceinline__ Fraction<Approximate> sigmoid(Approximate z) {              // 1 / (1 + e^-z); 1 / infinity is 0
  return {1.f, 1.f + fast_exponential(-z.x)};
}
__device__ __forceinline__ Fraction<Approximate> hyperbolic_tangent(Approximate z) {   // from e^-2|z|, which does not overflow
  const float e = fast_exponential(-2.f * std::fabs(z.x));
  return {with_sign(1.f - e, z.x), 1.f + e};
}

}  // namespace stable_rnn
