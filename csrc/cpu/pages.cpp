// Asks the operating system about pages, where it is Linux; elsewhere they are taken as present.
#include "cpu/pages.h"

#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#if !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23  // since Linux 5.14; older ones refuse, and the pages come one by one as ever
#endif
#endif

namespace fastsr::cpu {

#if defined(__linux__)
namespace {

uintptr_t page_bytes() {
  static const uintptr_t bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

void* page_of(uintptr_t address) { return reinterpret_cast<void*>(address / page_bytes() * page_bytes()); }

}  // namespace

bool pages_present(const void* data, int64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  for (const int64_t offset : {int64_t{0}, bytes / 2, bytes - 1}) {
    unsigned char present = 1;
    if (mincore(page_of(begin + offset), 1, &present) == 0 && !(present & 1)) return false;
  }
  return true;
}

void provide_pages(void* data, int64_t bytes) {
  char* first = static_cast<char*>(page_of(reinterpret_cast<uintptr_t>(data)));
  madvise(first, static_cast<char*>(data) + bytes - first, MADV_POPULATE_WRITE);
}

void prefer_huge_pages(void* data, int64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), unit = kHugePage;
  const uintptr_t first = (begin + unit - 1) / unit * unit, last = (begin + bytes) / unit * unit;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}
#else
bool pages_present(const void*, int64_t) { return true; }
void provide_pages(void*, int64_t) {}
void prefer_huge_pages(void*, int64_t) {}
#endif

void prefer_huge_output(const torch::stable::Tensor& out) {
  int64_t last = 0;
  for (int64_t d = 0; d < out.dim(); ++d) last += (out.size(d) - 1) * out.stride(d);
  const int64_t bytes = (last + 1) * out.element_size();
  if (bytes >= 2 * kHugePage && !pages_present(out.const_data_ptr(), bytes)) prefer_huge_pages(out.mutable_data_ptr(), bytes);
}

}  // namespace fastsr::cpu
