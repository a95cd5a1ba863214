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
#else
bool pages_present(const void*, int64_t) { return true; }
void provide_pages(void*, int64_t) {}
#endif

}  // namespace fastsr::cpu
