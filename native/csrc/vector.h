// Vectors of CBAM_BYTES bytes: loads and stores of every type, whole or partial, and what the kernels need beyond the
// compiler's own operators. Everything is in an unnamed namespace: the units of different instruction sets must not
// share a function.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define FLAT __attribute__((always_inline))  // after the arguments of a lambda

// Before a loop with few iterations and a large body: do not unroll it.
#if defined(__clang__)
#define ROLLED _Pragma("nounroll")
#else
#define ROLLED _Pragma("GCC unroll 1")
#endif

namespace {

struct half {
  uint16_t bits;
};
struct bfloat {
  uint16_t bits;
};

constexpr int BYTES = CBAM_BYTES;

template <class A>
struct Of {
  using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  typedef A vector __attribute__((vector_size(BYTES)));
  typedef Index index __attribute__((vector_size(BYTES)));
  typedef uint16_t narrow __attribute__((vector_size(BYTES / 2)));
  typedef uint32_t wide __attribute__((vector_size(BYTES)));
  typedef A few __attribute__((vector_size(BYTES / 8 * sizeof(A))));
};
template <class A>
using Vec = typename Of<A>::vector;
template <class A>
using Int = typename Of<A>::index;  // as wide as A: masks and indices
template <class A>
using Index = typename Of<A>::Index;
template <class A>
constexpr int LANES = BYTES / sizeof(A);

// The type in which values of a stored type are computed.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};
}
template <class A>
INLINE Int<A> splat_index(int64_t value) {
  return Index<A>(value) - Int<A>{};
}
template <class A>
INLINE Int<A> iota() {
  Int<A> v;
  for (int i = 0; i < LANES<A>; i++) v[i] = i;
  return v;
}

// How many lanes of a vector hold data: all, or in the last vector of a row the first few.
struct Whole {};
struct Part {
  int lanes;
};

template <class A>
INLINE int lanes_of(Whole) {
  return LANES<A>;
}
template <class A>
INLINE int lanes_of(Part part) {
  return part.lanes;
}

template <class A>
INLINE Vec<A> keep(Vec<A> v, Whole, A) {
  return v;
}
template <class A>
INLINE Vec<A> keep(Vec<A> v, Part part, A other) {
  return iota<A>() < splat_index<A>(part.lanes) ? v : splat(other);
}

// Calls f(i, Whole) for each whole vector of [0, n), then f(i, Part) for the rest.
template <class A, class F>
INLINE void walk(int64_t n, F f) {
  int64_t i = 0;
  for (; i + LANES<A> <= n; i += LANES<A>) f(i, Whole{});
  if (i < n) f(i, Part{int(n - i)});
}

// Calls f(0), ..., f(N - 1) with constants, so that arrays indexed by them are in registers: with a loop, gcc keeps
// them in memory, and writes them there before and after.
template <class F, int... I>
INLINE void unroll(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
INLINE void unroll(F f) {
  unroll(f, std::make_integer_sequence<int, N>{});
}

// --- conversions of one value ---

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline float to_float(bfloat b) { return bits_to_float(uint32_t(b.bits) << 16); }
inline float to_float(half h) {
  uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) {  // zero and subnormals: an integer times 2^-24
    float f = float(rest) * 0x1p-24f;
    return sign ? -f : f;
  }
  return bits_to_float(sign | ((rest << 13) + (112u << 23)));
}
inline float to_float(float f) { return f; }
inline double to_float(double d) { return d; }

inline void from_float(float f, float* p) { *p = f; }
inline void from_float(double d, double* p) { *p = d; }
inline void from_float(float f, bfloat* p) {
  uint32_t bits = float_to_bits(f);
  p->bits = f != f ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float f, half* p) {
  uint32_t bits = float_to_bits(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff, value;
  if (rest > 0x7f800000) value = 0x7e00;
  else if (rest >= 0x477ff000) value = 0x7c00;  // 65520 and above round to infinity
  else if (rest < 0x38800000) value = float_to_bits(std::fabs(f) + 0.5f) - 0x3f000000;  // subnormal
  else value = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
  p->bits = uint16_t(sign | value);
}

// --- loads and stores ---

template <class V, class T>
INLINE V read(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

INLINE Vec<float> load(const float* p, Whole = {}) { return read<Vec<float>>(p); }
INLINE Vec<double> load(const double* p, Whole = {}) { return read<Vec<double>>(p); }
INLINE Vec<float> load(const bfloat* p, Whole = {}) {
  auto raw = read<Of<float>::narrow>(p);
  return (Vec<float>)(__builtin_convertvector(raw, Of<float>::wide) << 16);
}
INLINE void store(float* p, Vec<float> v, Whole = {}) { std::memcpy(p, &v, sizeof v); }
INLINE void store(double* p, Vec<double> v, Whole = {}) { std::memcpy(p, &v, sizeof v); }
INLINE void store(bfloat* p, Vec<float> v, Whole = {}) {
  auto bits = (Of<float>::wide)v;
  auto rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  auto result = __builtin_convertvector(v == v ? (Int<float>)rounded : splat_index<float>(0x7fc0), Of<float>::narrow);
  std::memcpy(p, &result, sizeof result);
}
#if defined(__AVX512F__)
INLINE Vec<float> load(const half* p, Whole = {}) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
INLINE void store(half* p, Vec<float> v, Whole = {}) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
INLINE Vec<float> load(const half* p, Whole = {}) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
INLINE void store(half* p, Vec<float> v, Whole = {}) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
INLINE Vec<float> load(const half* p, Whole = {}) {
  Vec<float> v;
  for (int i = 0; i < LANES<float>; i++) v[i] = to_float(p[i]);
  return v;
}
INLINE void store(half* p, Vec<float> v, Whole = {}) {
  for (int i = 0; i < LANES<float>; i++) from_float(v[i], p + i);
}
#endif

// Lanes beyond a part are loaded as zero, and their memory is not accessed.
template <class T>
INLINE Vec<Acc<T>> load(const T* p, Part part) {
  T whole[LANES<Acc<T>>] = {};
  std::memcpy(whole, p, part.lanes * sizeof(T));
  return load(whole);
}
template <class T>
INLINE void store(T* p, Vec<Acc<T>> v, Part part) {
  T whole[LANES<Acc<T>>];
  store(whole, v);
  std::memcpy(p, whole, part.lanes * sizeof(T));
}
#if defined(__AVX512F__)
INLINE Vec<float> load(const float* p, Part part) {
  return (Vec<float>)_mm512_maskz_loadu_ps((1u << part.lanes) - 1, p);
}
INLINE Vec<double> load(const double* p, Part part) {
  return (Vec<double>)_mm512_maskz_loadu_pd((1u << part.lanes) - 1, p);
}
INLINE void store(float* p, Vec<float> v, Part part) {
  _mm512_mask_storeu_ps(p, (1u << part.lanes) - 1, (__m512)v);
}
INLINE void store(double* p, Vec<double> v, Part part) {
  _mm512_mask_storeu_pd(p, (1u << part.lanes) - 1, (__m512d)v);
}
INLINE Vec<float> load(const bfloat* p, Part part) {
  __m256i raw = _mm256_maskz_loadu_epi16((1u << part.lanes) - 1, p);
  return (Vec<float>)(__builtin_convertvector((Of<float>::narrow)raw, Of<float>::wide) << 16);
}
INLINE Vec<float> load(const half* p, Part part) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((1u << part.lanes) - 1, p));
}
INLINE void store(half* p, Vec<float> v, Part part) {
  __m256i raw = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(p, (1u << part.lanes) - 1, raw);
}
#elif defined(__AVX2__)
INLINE Vec<float> load(const float* p, Part part) {
  return (Vec<float>)_mm256_maskload_ps(p, (__m256i)(iota<float>() < splat_index<float>(part.lanes)));
}
INLINE Vec<double> load(const double* p, Part part) {
  return (Vec<double>)_mm256_maskload_pd(p, (__m256i)(iota<double>() < splat_index<double>(part.lanes)));
}
INLINE void store(float* p, Vec<float> v, Part part) {
  _mm256_maskstore_ps(p, (__m256i)(iota<float>() < splat_index<float>(part.lanes)), (__m256)v);
}
INLINE void store(double* p, Vec<double> v, Part part) {
  _mm256_maskstore_pd(p, (__m256i)(iota<double>() < splat_index<double>(part.lanes)), (__m256d)v);
}
#endif

// Indices are kept as integers as wide as A.
template <class A, class P>
INLINE Int<A> load_index(const Index<A>* p, P part) {
  return (Int<A>)load((const A*)p, part);
}
template <class A, class P>
INLINE void store_index(Index<A>* p, Int<A> v, P part) {
  store((A*)p, (Vec<A>)v, part);
}
// From the saved 32-bit indices.
template <class A, class P>
INLINE Int<A> load_saved(const int32_t* p, P part) {
  if constexpr (sizeof(A) == 4) {
    return (Int<A>)load((const float*)p, part);
  } else {
    Int<A> v{};
    for (int i = 0; i < lanes_of<A>(part); i++) v[i] = p[i];
    return v;
  }
}

template <class A, class P>
INLINE void store_saved(int32_t* p, Int<A> v, P part) {
  if constexpr (sizeof(A) == 4) {
    store((float*)p, (Vec<float>)v, part);
  } else {
    for (int i = 0; i < lanes_of<A>(part); i++) p[i] = int32_t(v[i]);
  }
}

// As many values as a vector has doubles: to doubles, from doubles, and to memory.
template <class A>
using Few = typename Of<A>::few;

template <class A, class P>
INLINE Vec<double> widened(const A* p, P part) {
  Few<A> values{};
  std::memcpy(&values, p, lanes_of<double>(part) * sizeof(A));
  return __builtin_convertvector(values, Vec<double>);
}
template <class A>
INLINE Few<A> narrowed(Vec<double> v) {
  return __builtin_convertvector(v, Few<A>);
}
template <class A, class P>
INLINE void store_few(A* p, Few<A> v, P part) {
  std::memcpy(p, &v, lanes_of<double>(part) * sizeof(A));
}

// --- arithmetic ---

// `v`, loaded unconditionally. Otherwise a load and the select after it are merged into a masked load, which waits for
// the mask.
template <class V>
INLINE V loaded(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
}

// NaN in `candidate` is ignored.
template <class V>
INLINE V larger(V best, V candidate) {
  return candidate > best ? candidate : best;
}
// max(v, 0) by a select, so that NaN and the sign of zero are kept, as in torch.
template <class A>
INLINE Vec<A> rectify(Vec<A> v) {
  return v < Vec<A>{} ? Vec<A>{} : v;
}

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int<A>{__VA_ARGS__})
#endif

// v rotated by WIDTH lanes, lane WIDTH first.
template <class A, int WIDTH, class V, int... LANE>
INLINE V rotated(V v, std::integer_sequence<int, LANE...>) {
  return SHUFFLE(v, v, ((LANE + WIDTH) % LANES<A>)...);
}
template <class A, int WIDTH = LANES<A> / 2, class Combine>
INLINE A across(Vec<A> v, Combine combine) {
  if constexpr (WIDTH == 0) {
    return v[0];
  } else {
    return across<A, WIDTH / 2>(combine(v, rotated<A, WIDTH>(v, std::make_integer_sequence<int, LANES<A>>{})), combine);
  }
}
template <class A>
INLINE A total(Vec<A> v) {
  return across<A>(v, [](Vec<A> a, Vec<A> b) { return a + b; });
}
template <class A>
INLINE A largest(Vec<A> v) {
  return across<A>(v, [](Vec<A> a, Vec<A> b) { return larger(a, b); });
}
template <class A>
INLINE bool any(Int<A> mask) {
  uint64_t part[BYTES / 8], bits = 0;
  std::memcpy(part, &mask, sizeof mask);
  for (uint64_t p : part) bits |= p;
  return bits;
}

// The first half of each block of lanes of a and b, or with HALF the second half; a's before b's.
template <class A, int BLOCK, int HALF, class V, int... LANE>
INLINE V interleave(V a, V b, std::integer_sequence<int, LANE...>) {
  return SHUFFLE(a, b, (LANE % BLOCK < BLOCK / 2 ? LANE + HALF : LANES<A> + LANE - BLOCK / 2 + HALF)...);
}

// Reduces each of LANES vectors to one lane: lane i of the result is v[i] reduced. `combine(V, V)` is applied to halves
// in order, so the result for a vector does not depend on the other vectors.
template <class A, int BLOCK = LANES<A>, class V, class Combine>
INLINE V fold(V* v, Combine combine) {
  if constexpr (BLOCK == 1) {
    return v[0];
  } else {
    using All = std::make_integer_sequence<int, LANES<A>>;
    for (int i = 0; i < BLOCK / 2; i++) {
      V a = v[i], b = v[i + BLOCK / 2];
      v[i] = combine(interleave<A, BLOCK, 0>(a, b, All{}), interleave<A, BLOCK, BLOCK / 2>(a, b, All{}));
    }
    return fold<A, BLOCK / 2>(v, combine);
  }
}
template <class A>
INLINE Vec<A> fold_sum(Vec<A>* v) {
  return fold<A>(v, [](Vec<A> a, Vec<A> b) { return a + b; });
}
template <class A>
INLINE Vec<A> fold_max(Vec<A>* v) {
  return fold<A>(v, [](Vec<A> a, Vec<A> b) { return larger(a, b); });
}

// e^x to about one ulp; exactly 1 at 0, infinity from 88.8 on, NaN stays NaN.
INLINE Vec<float> exponential(Vec<float> x) {
  using V = Vec<float>;
  V low = splat(-104.0f), high = splat(89.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  V t = x * 1.44269504088896341f, shift = splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer
  V n = (t + shift) - shift;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Int<float> e = __builtin_convertvector(n == n ? n : V{}, Int<float>), half_e = e >> 1;
  V first = (V)((half_e + 127) << 23), second = (V)((e - half_e + 127) << 23);  // 2^e in two steps
  return p * first * second;
}
INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < LANES<double>; i++) x[i] = std::exp(x[i]);
  return x;
}
// gain * sigmoid(x); exactly gain / 2 at 0.
template <class A>
INLINE Vec<A> gate_of(Vec<A> x, A gain) {
  return gain / (A(1) + exponential(-x));
}

}  // namespace
