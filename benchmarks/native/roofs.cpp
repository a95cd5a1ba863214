// The roofs of a CPU: how many fused multiply-adds and how many copied bytes per second its cores can do.
//
//   arithmetic   independent chains of FMAs in registers, long enough to hide their latency; no memory access
//   bf16         dpbf16 chains in registers, and AMX tile products (2 x 2 accumulator tiles) where the kernel grants them
//   copy         each thread copies its own half-buffer to the other, by memcpy, by plain or by non-temporal stores;
//                bytes read and bytes written both count; both halves together fit L2, or exceed every cache
//
// Threads are std::thread, started before the clock and released together. A figure is the work of all threads over the
// time from their release to the last one's end. It is a pybind11 module without torch, so that nothing else is measured.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#define X86 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define X86 0
#endif

namespace {

using Clock = std::chrono::steady_clock;
constexpr int kChains = 12;     // 2 units x 4-5 cycles of latency, and still within 16 registers
constexpr int64_t kSteps = 4096;  // chain links between two looks at the clock
volatile float sink;            // makes the sums observable

// ---- one burst: kSteps links of every chain; returns its floating-point operations ----

int64_t burst_portable() {
  constexpr int kLanes = 64;
  float c[kLanes];
  for (int i = 0; i < kLanes; ++i) c[i] = 1e-3f * static_cast<float>(i);
  volatile float va = 0.999f, vb = 1e-3f;
  const float a = va, b = vb;
  for (int64_t s = 0; s < kSteps; ++s)
    for (int i = 0; i < kLanes; ++i) c[i] = c[i] * a + b;
  float sum = 0;
  for (float x : c) sum += x;
  sink = sum;
  return kSteps * kLanes * 2;
}

#if X86

__attribute__((target("avx2,fma"))) int64_t burst_avx2() {
  __m256 c[kChains];
  volatile float va = 0.999f, vb = 1e-3f;
  const __m256 a = _mm256_set1_ps(va), b = _mm256_set1_ps(vb);
  for (int i = 0; i < kChains; ++i) c[i] = _mm256_set1_ps(1e-3f * static_cast<float>(i));
  for (int64_t s = 0; s < kSteps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) c[i] = _mm256_fmadd_ps(c[i], a, b);
  }
  for (int i = 1; i < kChains; ++i) c[0] = _mm256_add_ps(c[0], c[i]);
  sink = _mm256_cvtss_f32(c[0]);
  return kSteps * kChains * 8 * 2;
}

__attribute__((target("avx512f"))) int64_t burst_avx512() {
  __m512 c[kChains];
  volatile float va = 0.999f, vb = 1e-3f;
  const __m512 a = _mm512_set1_ps(va), b = _mm512_set1_ps(vb);
  for (int i = 0; i < kChains; ++i) c[i] = _mm512_set1_ps(1e-3f * static_cast<float>(i));
  for (int64_t s = 0; s < kSteps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) c[i] = _mm512_fmadd_ps(c[i], a, b);
  }
  for (int i = 1; i < kChains; ++i) c[0] = _mm512_add_ps(c[0], c[i]);
  sink = _mm512_cvtss_f32(c[0]);
  return kSteps * kChains * 16 * 2;
}

__attribute__((target("avx512f,avx512bf16"))) int64_t burst_avx512_bf16() {
  __m512 c[kChains];
  volatile int va = 0x3f803f80, vb = 0x2f802f80;  // pairs of bf16: 1 and 2^-32
  const __m512bh a = (__m512bh)_mm512_set1_epi32(va), b = (__m512bh)_mm512_set1_epi32(vb);
  for (int i = 0; i < kChains; ++i) c[i] = _mm512_set1_ps(1e-3f * static_cast<float>(i));
  for (int64_t s = 0; s < kSteps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) c[i] = _mm512_dpbf16_ps(c[i], a, b);
  }
  for (int i = 1; i < kChains; ++i) c[0] = _mm512_add_ps(c[0], c[i]);
  sink = _mm512_cvtss_f32(c[0]);
  return kSteps * kChains * 16 * 4;
}

#if __GNUC__ >= 11 || defined(__clang__)
#define AMX 1
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

__attribute__((target("amx-tile,amx-bf16"))) int64_t burst_amx() {
  static thread_local TileConfig config = [] {
    TileConfig t;
    for (int i = 0; i < 8; ++i) t.bytes_per_row[i] = 64, t.rows[i] = 16;
    return t;
  }();
  alignas(64) static thread_local uint16_t ones[16 * 32];
  std::fill(ones, ones + 16 * 32, uint16_t{0x2f80});
  alignas(64) float out[16 * 16];
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  for (int64_t s = 0; s < kSteps / 4; ++s) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 64);
  _tile_release();
  sink = out[0];
  return kSteps * 16 * 16 * 32 * 2;
}
#else
#define AMX 0
#endif

bool bit(uint32_t leaf, uint32_t subleaf, int reg, int n) {
  uint32_t r[4] = {};
  return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> n & 1);
}

// The kernel saves tile registers only for processes that ask (arch_prctl: ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool amx_granted() {
#if AMX && defined(SYS_arch_prctl)
  if (!bit(7, 0, 3, 22) || !bit(7, 0, 3, 24)) return false;
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

// Four vectors of 32 or 64 bytes a turn; bytes is a multiple of 4096.
#define COPY(NAME, ISA, V, LOAD, STORE, BYTES, END)                                                  \
  __attribute__((target(ISA))) void NAME(char* to, const char* from, size_t bytes) {                 \
    for (size_t i = 0; i < bytes; i += 4 * BYTES) {                                                  \
      const V a = LOAD(reinterpret_cast<const V*>(from + i));                                        \
      const V b = LOAD(reinterpret_cast<const V*>(from + i + BYTES));                                \
      const V c = LOAD(reinterpret_cast<const V*>(from + i + 2 * BYTES));                            \
      const V d = LOAD(reinterpret_cast<const V*>(from + i + 3 * BYTES));                            \
      STORE(reinterpret_cast<V*>(to + i), a);                                                        \
      STORE(reinterpret_cast<V*>(to + i + BYTES), b);                                                \
      STORE(reinterpret_cast<V*>(to + i + 2 * BYTES), c);                                            \
      STORE(reinterpret_cast<V*>(to + i + 3 * BYTES), d);                                            \
    }                                                                                                \
    END;                                                                                             \
  }
COPY(copy_streaming, "avx2", __m256i, _mm256_load_si256, _mm256_stream_si256, 32, _mm_sfence())
COPY(copy_avx2, "avx2", __m256i, _mm256_load_si256, _mm256_store_si256, 32, )
COPY(copy_avx512, "avx512f", __m512i, _mm512_load_si512, _mm512_store_si512, 64, )
#undef COPY
#endif

void copy_memcpy(char* to, const char* from, size_t bytes) { std::memcpy(to, from, bytes); }

// ---- what there is here ----

using Burst = int64_t (*)();

Burst burst_of(const std::string& isa) {
  if (isa == "portable") return burst_portable;
#if X86
  __builtin_cpu_init();
  if (isa == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return burst_avx2;
  if (isa == "avx512" && __builtin_cpu_supports("avx512f")) return burst_avx512;
  if (isa == "avx512_bf16" && __builtin_cpu_supports("avx512f") && bit(7, 1, 0, 5)) return burst_avx512_bf16;
#if AMX
  if (isa == "amx_bf16" && amx_granted()) return burst_amx;
#endif
#endif
  return nullptr;
}

using Copy = void (*)(char*, const char*, size_t);

Copy copy_of(const std::string& how) {
  if (how == "memcpy") return copy_memcpy;
#if X86
  __builtin_cpu_init();
  if (how == "non-temporal stores" && __builtin_cpu_supports("avx2")) return copy_streaming;
  if (how == "avx2" && __builtin_cpu_supports("avx2")) return copy_avx2;
  if (how == "avx512" && __builtin_cpu_supports("avx512f")) return copy_avx512;
#endif
  return nullptr;
}

std::vector<std::string> ways_to_copy() {
  std::vector<std::string> found;
  for (const std::string how : {"memcpy", "non-temporal stores", "avx2", "avx512"})
    if (copy_of(how)) found.push_back(how);
  return found;
}

std::vector<std::string> instruction_sets(const std::string& dtype) {
  std::vector<std::string> found;
  const std::vector<std::string> known = dtype == "float32"    ? std::vector<std::string>{"avx512", "avx2", "portable"}
                                         : dtype == "bfloat16" ? std::vector<std::string>{"amx_bf16", "avx512_bf16"}
                                                               : std::vector<std::string>{};
  for (const auto& isa : known)
    if (burst_of(isa)) found.push_back(isa);
  return found;
}

// Runs `work(thread, until)` on every thread from one common start; total work over the time to the last end.
template <class Work>
double rate(int threads, double seconds, Work work) {
  if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + "; expected at least 1");
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<int64_t> done(threads);
  std::vector<Clock::time_point> end(threads);
  Clock::time_point start;
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      auto step = work(t);
      step();
      ++ready;
      while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
      const auto until = start + std::chrono::duration<double>(seconds);
      do done[t] += step();
      while (Clock::now() < until);
      end[t] = Clock::now();
    });
  }
  while (ready < threads) std::this_thread::yield();
  start = Clock::now();
  go.store(true, std::memory_order_release);
  for (auto& thread : pool) thread.join();
  int64_t total = 0;
  for (auto d : done) total += d;
  return static_cast<double>(total) / std::chrono::duration<double>(*std::max_element(end.begin(), end.end()) - start).count() / 1e9;
}

double arithmetic(const std::string& isa, int threads, double seconds) {
  const Burst burst = burst_of(isa);
  if (!burst) throw std::invalid_argument("this processor or build has no " + isa);
  pybind11::gil_scoped_release release;
  return rate(threads, seconds, [burst](int) { return burst; });
}

// Each thread owns its two buffers and touches them first, so that their pages lie near it.
double copy(int threads, size_t bytes_per_thread, const std::string& how, double seconds) {
  const Copy run = copy_of(how);
  if (!run) throw std::invalid_argument("this processor or build cannot copy by " + how);
  const size_t bytes = std::max<size_t>(bytes_per_thread / 4096 * 4096, 4096);
  pybind11::gil_scoped_release release;
  return rate(threads, seconds, [=](int) {
    struct Buffers {
      char *from, *to;
      explicit Buffers(size_t n) : from(static_cast<char*>(std::aligned_alloc(4096, n))), to(static_cast<char*>(std::aligned_alloc(4096, n))) {
        if (!from || !to) throw std::bad_alloc();
        std::memset(from, 1, n);
        std::memset(to, 2, n);
      }
      ~Buffers() { std::free(from), std::free(to); }
    };
    auto own = std::make_shared<Buffers>(bytes);
    return [own, bytes, run]() -> int64_t {
      run(own->to, own->from, bytes);
      sink = own->to[bytes / 2];
      return static_cast<int64_t>(2 * bytes);
    };
  });
}

}  // namespace

PYBIND11_MODULE(fastsr_roofs, m) {
  namespace py = pybind11;
  m.doc() = "Arithmetic and copy roofs of this CPU";
  m.def("instruction_sets", &instruction_sets, py::arg("dtype"), "Instruction sets that can be measured here, best first");
  m.def("ways_to_copy", &ways_to_copy, "What copy() can do here");
  m.def("arithmetic", &arithmetic, py::arg("isa"), py::arg("threads"), py::arg("seconds"), "GFLOP/s");
  m.def("copy", &copy, py::arg("threads"), py::arg("bytes_per_thread"), py::arg("how"), py::arg("seconds"),
        "GB/s, bytes read and written");
}
