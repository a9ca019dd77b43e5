// Vectors of floats in the width of the machine, as GCC and Clang write them; for the C++ operators.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float UnalignedFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const UnalignedFloats*>(from); }
inline void store(float* to, Floats value) { *reinterpret_cast<UnalignedFloats*>(to) = value; }
inline Floats broadcast(float value) { return Floats{} + value; }
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

inline float sum_of_lanes(Floats value) {
  float lanes[LANES];
  store(lanes, value);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

inline float maximum_of_lanes(Floats value) {
  float lanes[LANES];
  store(lanes, value);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] = lanes[lane] > lanes[lane + width] ? lanes[lane] : lanes[lane + width];
  return lanes[0];
}

// 2**x for x <= 0, to 1e-7; exactly 1 at 0, and exactly 0 below 2**-126 and at -infinity.
inline Floats exp2_of_negative(Floats x) {
  const Floats to_integer = broadcast(12582912.0f);  // 1.5 * 2**23: adding it rounds to the nearest integer
  const Floats whole = (x + to_integer) - to_integer;
  const Floats part = x - whole;
  Floats power = broadcast(0.00015353362f);
  power = power * part + 0.0013398875f;
  power = power * part + 0.0096184369f;
  power = power * part + 0.0555033237f;
  power = power * part + 0.2402264774f;
  power = power * part + 0.6931471825f;
  power = power * part + 1.0f;
  const Ints exponent = (__builtin_convertvector(whole, Ints) + 127) << 23;
  const Floats result = power * reinterpret_cast<Floats>(exponent);
  return x < -126.0f ? Floats{} : result;
}

// To 1e-7 of its value: by a polynomial in x * x near 0, where 1 - 2 / (1 + e**2x) would cancel.
inline Floats tanh_of(Floats x) {
  const Floats magnitude = x < 0.0f ? -x : x, square = x * x;
  Floats bend = broadcast(-0.0055286343f);
  bend = bend * square + 0.0204833168f;
  bend = bend * square - 0.0536929683f;
  bend = bend * square + 0.1333089977f;
  bend = bend * square - 0.3333326288f;
  const Floats decay = exp2_of_negative(magnitude * (-2 * 1.44269504088896340736f));
  const Floats far = 1.0f - 2.0f * decay / (1.0f + decay);
  return magnitude < 0.65f ? x + x * square * bend : x < 0.0f ? -far : far;
}

// x * sigmoid(x), with the exponential taken of -|x| so that it cannot overflow.
inline Floats silu(Floats x) {
  const Floats decay = exp2_of_negative((x < 0.0f ? x : -x) * 1.44269504088896340736f);
  return x * (x < 0.0f ? decay : broadcast(1.0f)) / (1.0f + decay);
}

// bfloat16 is the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

// To the nearest, ties to even; a NaN stays one. Where the CPU does it, what is below 2**-126 becomes zero.
inline Halves to_halves(Floats value) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(value)));
#else
  const Words words = reinterpret_cast<Words>(value);
  const Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
  return __builtin_convertvector(value == value ? rounded : Words{} + 0x7fc0, Halves);
#endif
}

inline Floats from_halves(Halves halves) {
#if defined(__AVX512F__)  // in one instruction, for which GCC takes three
  return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves)), 16));
#else
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
#endif
}

inline Floats load(const BFloat16* from) { return from_halves(*reinterpret_cast<const Halves*>(from)); }
inline void store(BFloat16* to, Floats value) { *reinterpret_cast<Halves*>(to) = to_halves(value); }

// As a tensor of T keeps it: between operators that are one here torch rounds.
template <typename T>
inline Floats rounded(Floats value) {
  if constexpr (sizeof(T) == sizeof(float))
    return value;
  else
    return from_halves(to_halves(value));
}

// The first `count` lanes; the others are zero, or left as they are in memory.
template <typename T>
inline Floats load(const T* from, int64_t count) {
  if (count >= LANES) return load(from);
  T lanes[LANES] = {};
  for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = from[lane];
  return load(lanes);
}

template <typename T>
inline void store(T* to, Floats value, int64_t count) {
  if (count >= LANES) return store(to, value);
  T lanes[LANES];
  store(lanes, value);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = lanes[lane];
}
