// Included once by each test module: the sanitizer's hook, and the flag that tells the tests that it is on.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "simt.h"

namespace py = pybind11;

// Called by the undefined-behaviour sanitizer at each report; the launcher turns them into an error.
extern "C" __attribute__((visibility("default"), used)) void __ubsan_on_report() { ++simt::undefined_reports; }

// wgmma_calls(): how often a thread has asked for a product by wgmma since the last time.
inline void define_wgmma_calls(py::module_& m) {
  m.def("wgmma_calls", [] { return simt::wgmma_calls.exchange(0); });
}

// Device pointers arrive as integers (tensor.data_ptr()), 0 for none.
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A buffer of exactly this size, filled with poison.
template <class T>
struct Scratch {
  explicit Scratch(size_t count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, std::max<size_t>(1, count * sizeof(T))) != 0) simt::fail("out of memory");
    std::memset(memory, simt::kPoison, count * sizeof(T));
    data.reset(static_cast<T*>(memory));
  }
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data;
};

// Poisoned memory until the end of the call.
struct Allocate {
  mutable std::vector<Scratch<char>> kept;
  mutable int64_t total = 0;  // bytes
  void* operator()(int64_t bytes) const {
    total += bytes;
    return kept.emplace_back(static_cast<size_t>(bytes)).data.get();
  }
};
