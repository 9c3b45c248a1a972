// A float whose exponential and division are the hardware's, below 1e-6 absolute by their documented errors: for states stored in
// 16 bits, with far fewer instructions. cell.h does the rest of a step with it.
#pragma once
#include "device.cuh"

namespace stable_rnn {

#ifdef STABLE_RNN_EXECUTOR
inline float power_of_2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.f / x; }
#else
__device__ __forceinline__ float power_of_2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ __forceinline__ float reciprocal(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
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
__device__ __forceinline__ Approximate operator/(Approximate a, Approximate b) { return a.x * reciprocal(b.x); }
__device__ __forceinline__ Approximate fma(Approximate a, Approximate b, Approximate c) { return fma(a.x, b.x, c.x); }
__device__ __forceinline__ Approximate at_least(Approximate a, Approximate low) { return at_least(a.x, low.x); }
__device__ __forceinline__ Approximate at_most(Approximate a, Approximate high) { return at_most(a.x, high.x); }
__device__ __forceinline__ Approximate select_le(Approximate a, Approximate b, Approximate yes, Approximate no) {
  return a.x <= b.x ? yes : no;
}
constexpr float log2_e = 1.44269504f;
__device__ __forceinline__ Fraction<Approximate> sigmoid(Approximate z) {   // 1 / (1 + e^-z); 1 / infinity is 0
  return {1.f, 1.f + power_of_2(-log2_e * z.x)};
}
__device__ __forceinline__ Fraction<Approximate> hyperbolic_tangent(
    Approximate z) {   // from e^-2|z|, which does not overflow
  const float e = power_of_2(-2 * log2_e * std::fabs(z.x));
  return {std::copysign(1.f - e, z.x), 1.f + e};
}

}   // namespace stable_rnn
