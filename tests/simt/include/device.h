// CUDA's device language as far as the kernels use it: qualifiers, built-in variables, barriers, shuffles, votes, atomics.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local
#define threadIdx (simt::running->self().index)
#define blockIdx (simt::running->index)
#define blockDim (simt::running->size)
#define gridDim (simt::running->grid)

template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }

inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcs(const T* p) { return *p; }
template <class T>
void __stcs(T* p, const T& v) { *p = v; }

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads() { simt::running->barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::running->meet("__syncwarp", mask, nullptr, [](const auto&) {}); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace simt {

// source(lane) names the lane whose value `lane` gets; a lane that is outside its segment keeps its own.
template <class T, class Source>
T shuffle(const char* name, unsigned mask, T value, int width, Source source) {
  if (width < 1 || width > kWarp || (width & (width - 1))) fail(name, ": width is ", width, "; expected a power of two up to 32");
  struct Slot {
    T in, out;
    int from;
  } slot{value, value, 0};
  const int lane = running->self().lane, segment = lane & ~(width - 1), from = source(lane - segment);
  slot.from = from < 0 || from >= width ? lane : segment + from;
  running->meet(name, mask, &slot, [&](const auto& slots) {
    for (int i = 0; i < kWarp; ++i) {
      if (slots[i] == nullptr) continue;
      Slot& mine = *static_cast<Slot*>(slots[i]);
      if (slots[mine.from] == nullptr) fail(name, ": lane ", i, " reads lane ", mine.from, ", which is not in the mask");
      mine.out = static_cast<Slot*>(slots[mine.from])->in;
    }
  });
  return slot.out;
}

inline unsigned vote(const char* name, unsigned mask, bool yes) {
  struct Slot {
    bool yes;
    unsigned ballot;
  } slot{yes, 0};
  running->meet(name, mask, &slot, [](const auto& slots) {
    unsigned ballot = 0;
    for (int i = 0; i < kWarp; ++i) {
      if (slots[i] && static_cast<Slot*>(slots[i])->yes) ballot |= 1u << i;
    }
    for (void* other : slots) {
      if (other) static_cast<Slot*>(other)->ballot = ballot;
    }
  });
  return slot.ballot;
}

template <class T>
unsigned match(const char* name, unsigned mask, T value) {
  struct Slot {
    T value;
    unsigned equal;
  } slot{value, 0};
  running->meet(name, mask, &slot, [](const auto& slots) {
    for (void* mine : slots) {
      for (int i = 0; mine && i < kWarp; ++i) {
        const bool equal = slots[i] && static_cast<Slot*>(slots[i])->value == static_cast<Slot*>(mine)->value;
        static_cast<Slot*>(mine)->equal |= unsigned{equal} << i;
      }
    }
  });
  return slot.equal;
}

// Others may run between any two atomics.
template <class T, class Update>
T atomic(T* address, Update update) {
  running->give_way();
  const T before = *address;
  *address = update(before);
  return before;
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::shuffle("__shfl_sync", mask, value, width, [=](int) { return source & (width - 1); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle("__shfl_up_sync", mask, value, width, [=](int lane) { return lane - static_cast<int>(delta); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle("__shfl_down_sync", mask, value, width, [=](int lane) { return lane + static_cast<int>(delta); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return simt::shuffle("__shfl_xor_sync", mask, value, width, [=](int lane) { return lane ^ lane_mask; });
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) { return simt::match("__match_any_sync", mask, value); }

inline unsigned __ballot_sync(unsigned mask, int predicate) { return simt::vote("__ballot_sync", mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return simt::vote("__any_sync", mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return simt::vote("__all_sync", mask, predicate == 0) == 0; }

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) { return simt::atomic(p, [=](T old) { return static_cast<T>(old + v); }); }
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) { return simt::atomic(p, [=](T old) { return std::min(old, v); }); }
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) { return simt::atomic(p, [=](T old) { return std::max(old, v); }); }
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) { return simt::atomic(p, [=](T) { return v; }); }
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return simt::atomic(p, [=](T old) { return old == expected ? v : old; });
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> v) { return simt::atomic(p, [=](T old) { return static_cast<T>(old & v); }); }
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) { return simt::atomic(p, [=](T old) { return static_cast<T>(old | v); }); }

// Never contracted with their surroundings into fused multiply-adds.
__attribute__((noinline)) inline double __dmul_rn(double a, double b) { return a * b; }
__attribute__((noinline)) inline double __dadd_rn(double a, double b) { return a + b; }
inline long long __double_as_longlong(double v) { return std::bit_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return std::bit_cast<double>(v); }
