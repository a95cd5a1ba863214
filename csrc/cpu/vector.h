// Vectors of floats for the kernel text: 16 lanes (AVX-512), 8 (AVX2, FMA, F16C) or 4 (any processor).
//
// Included inside the namespace of one instruction set, after its target pragma. Loads and stores of `count` < LANES
// values touch only those; the low precisions are widened on load and rounded to nearest even on store.
// `stream_as` writes LANES values around the cache, at an aligned address; after the last one comes `stream_end`.

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

#define FASTSR_INLINE static inline __attribute__((always_inline))

#if FASTSR_LANES == 16

constexpr int LANES = 16;
using Vector = __m512;

FASTSR_INLINE Vector set1(float v) { return _mm512_set1_ps(v); }
FASTSR_INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
FASTSR_INLINE void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
FASTSR_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
FASTSR_INLINE Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
FASTSR_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
FASTSR_INLINE Vector relu(Vector v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }  // a NaN in the second operand stays
FASTSR_INLINE Vector where_positive(Vector m, Vector yes, Vector no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(m, _mm512_setzero_ps(), _CMP_GT_OQ), no, yes);
}
FASTSR_INLINE Vector minimum(Vector a, Vector b) { return _mm512_min_ps(a, b); }
FASTSR_INLINE Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a, b); }
FASTSR_INLINE Vector where_less(Vector a, Vector b, Vector yes, Vector no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
FASTSR_INLINE uint32_t lanes_at_most(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }  // a bit per lane

FASTSR_INLINE __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
FASTSR_INLINE Vector load_as(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
FASTSR_INLINE Vector load_as(const BFloat16* p, int count) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p)), 16));
}
FASTSR_INLINE Vector load_as(const Half* p, int count) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p)); }
FASTSR_INLINE void store_as(float* p, Vector v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
FASTSR_INLINE __m256i narrow(const BFloat16*, Vector v) {
  // By integers, since vcvtneps2bf16 would flush denormals to zero, and with them the sign that a backward reads.
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  // The upper halves by one shuffle: GCC would join vpmovdw with the store, of which Zen 4 makes a slow microprogram.
  const __m512i upper =
      _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, rounded));
}
FASTSR_INLINE __m256i narrow(const Half*, Vector v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <class T>
FASTSR_INLINE void store_as(T* p, Vector v, int count) {
  count == LANES ? _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, v)) : _mm256_mask_storeu_epi16(p, first(count), narrow(p, v));
}
FASTSR_INLINE void stream_as(float* p, Vector v) { _mm512_stream_ps(p, v); }
template <class T>
FASTSR_INLINE void stream_as(T* p, Vector v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p, v)); }
FASTSR_INLINE void stream_end() { _mm_sfence(); }

// Transposes 16 x 16 values of 32 bits.
FASTSR_INLINE void transpose(__m512i* r) {
  __m512i a[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // r[4i + j] holds columns j, 4 + j, 8 + j, 12 + j of rows 4i..4i+3
    a[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), a[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    a[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), a[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(a[j], a[8 + j], 0x88), r[8 + j] = _mm512_shuffle_i32x4(a[j], a[8 + j], 0xdd);
    r[4 + j] = _mm512_shuffle_i32x4(a[4 + j], a[12 + j], 0x88), r[12 + j] = _mm512_shuffle_i32x4(a[4 + j], a[12 + j], 0xdd);
  }
}

#elif FASTSR_LANES == 8

constexpr int LANES = 8;
using Vector = __m256;

FASTSR_INLINE Vector set1(float v) { return _mm256_set1_ps(v); }
FASTSR_INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
FASTSR_INLINE void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
FASTSR_INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
FASTSR_INLINE Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
FASTSR_INLINE Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
FASTSR_INLINE Vector relu(Vector v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }  // a NaN in the second operand stays
FASTSR_INLINE Vector where_positive(Vector m, Vector yes, Vector no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(m, _mm256_setzero_ps(), _CMP_GT_OQ));
}
FASTSR_INLINE Vector minimum(Vector a, Vector b) { return _mm256_min_ps(a, b); }
FASTSR_INLINE Vector maximum(Vector a, Vector b) { return _mm256_max_ps(a, b); }
FASTSR_INLINE Vector where_less(Vector a, Vector b, Vector yes, Vector no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
FASTSR_INLINE uint32_t lanes_at_most(Vector a, Vector b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
}

FASTSR_INLINE __m256i first(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTSR_INLINE __m128i load_16bit(const uint16_t* p, int count) {
  if (count == LANES) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  alignas(16) uint16_t all[LANES] = {};
  for (int i = 0; i < count; ++i) all[i] = p[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(all));
}
FASTSR_INLINE void store_16bit(uint16_t* p, __m128i v, int count) {
  if (count == LANES) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v);
  alignas(16) uint16_t all[LANES];
  _mm_store_si128(reinterpret_cast<__m128i*>(all), v);
  for (int i = 0; i < count; ++i) p[i] = all[i];
}
FASTSR_INLINE Vector load_as(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
FASTSR_INLINE Vector load_as(const BFloat16* p, int count) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16bit(&p->bits, count)), 16));
}
FASTSR_INLINE Vector load_as(const Half* p, int count) { return _mm256_cvtph_ps(load_16bit(&p->bits, count)); }
FASTSR_INLINE void store_as(float* p, Vector v, int count) { _mm256_maskstore_ps(p, first(count), v); }
FASTSR_INLINE __m128i narrow(const BFloat16*, Vector v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08));
}
FASTSR_INLINE __m128i narrow(const Half*, Vector v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
template <class T>
FASTSR_INLINE void store_as(T* p, Vector v, int count) { store_16bit(&p->bits, narrow(p, v), count); }
FASTSR_INLINE void stream_as(float* p, Vector v) { _mm256_stream_ps(p, v); }
template <class T>
FASTSR_INLINE void stream_as(T* p, Vector v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(p, v)); }
FASTSR_INLINE void stream_end() { _mm_sfence(); }

#else

constexpr int LANES = 4;
typedef float Vector __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));

FASTSR_INLINE Vector set1(float v) { return Vector{v, v, v, v}; }
FASTSR_INLINE Vector load(const float* p) { Vector v; __builtin_memcpy(&v, p, sizeof v); return v; }
FASTSR_INLINE void store(float* p, Vector v) { __builtin_memcpy(p, &v, sizeof v); }
FASTSR_INLINE Vector add(Vector a, Vector b) { return a + b; }
FASTSR_INLINE Vector mul(Vector a, Vector b) { return a * b; }
FASTSR_INLINE Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
FASTSR_INLINE Vector where(Integers mask, Vector yes, Vector no) { return (Vector)((mask & (Integers)yes) | (~mask & (Integers)no)); }
FASTSR_INLINE Vector relu(Vector v) { return where((Integers)(v < set1(0.f)), set1(0.f), v); }
FASTSR_INLINE Vector where_positive(Vector m, Vector yes, Vector no) { return where((Integers)(m > set1(0.f)), yes, no); }
FASTSR_INLINE Vector where_less(Vector a, Vector b, Vector yes, Vector no) { return where((Integers)(a < b), yes, no); }
FASTSR_INLINE Vector minimum(Vector a, Vector b) { return where_less(a, b, a, b); }
FASTSR_INLINE Vector maximum(Vector a, Vector b) { return where_less(b, a, a, b); }
FASTSR_INLINE uint32_t lanes_at_most(Vector a, Vector b) {
  const Integers m = (Integers)(a <= b);
  return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
}

FASTSR_INLINE float from_bits(uint32_t bits) { float v; __builtin_memcpy(&v, &bits, sizeof v); return v; }
FASTSR_INLINE uint32_t to_bits(float v) { uint32_t bits; __builtin_memcpy(&bits, &v, sizeof v); return bits; }
FASTSR_INLINE float widen(float v) { return v; }
FASTSR_INLINE float widen(BFloat16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }
FASTSR_INLINE float widen(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  const uint32_t finite = to_bits(from_bits(rest << 13) * 0x1p112f);  // the exponents' biases differ by 112
  return from_bits(sign | (rest >= 0x7c00 ? rest << 13 | 0x7f800000 : finite));
}
FASTSR_INLINE void narrow(float v, float* to) { *to = v; }
FASTSR_INLINE void narrow(float v, BFloat16* to) {
  const uint32_t bits = to_bits(v);
  to->bits = v != v ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
FASTSR_INLINE void narrow(float v, Half* to) {
  const uint32_t bits = to_bits(v), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t half;
  if (rest >= 0x47800000) {
    half = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (rest < 0x38800000) {  // denormal: adding 1/2 lets the hardware round at the last place
    half = to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f);
  } else {
    half = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}
template <class T>
FASTSR_INLINE Vector load_as(const T* p, int count) {
  Vector v = set1(0.f);
  for (int i = 0; i < count; ++i) v[i] = widen(p[i]);
  return v;
}
template <class T>
FASTSR_INLINE void store_as(T* p, Vector v, int count) {
  for (int i = 0; i < count; ++i) narrow(v[i], p + i);
}
template <class T>
FASTSR_INLINE void stream_as(T* p, Vector v) { store_as(p, v, LANES); }
FASTSR_INLINE void stream_end() {}

#endif
