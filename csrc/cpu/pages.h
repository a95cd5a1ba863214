// The memory pages of large outputs. A page that was never written costs a trip into the kernel at its first write, which for a
// fresh output of many megabytes takes longer than computing it; asking for some at once halves the number of trips' cost.
#pragma once
#include <cstdint>

namespace fastsr::cpu {

// False if the pages of this memory were (as a sample tells) never written.
bool pages_present(const void* data, int64_t bytes);

// Makes the pages of this memory present; their contents stay, or are zero.
void provide_pages(void* data, int64_t bytes);

}  // namespace fastsr::cpu
