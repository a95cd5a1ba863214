// The memory pages of large outputs. A page that was never written costs a trip into the kernel at its first write, which for a
// fresh output of many megabytes takes longer than computing it; asking for some at once halves the number of trips' cost.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fastsr::cpu {

// False if the pages of this memory were (as a sample tells) never written.
bool pages_present(const void* data, int64_t bytes);

constexpr int64_t kHugePage = 2 << 20;

// Asks for huge pages where whole ones fit into this memory: one trip into the kernel instead of 512, and one entry of the TLB.
void prefer_huge_pages(void* data, int64_t bytes);

// The same for an output of some megabytes whose pages were never written.
void prefer_huge_output(const torch::stable::Tensor& out);

// Makes the pages of this memory present; their contents stay, or are zero.
void provide_pages(void* data, int64_t bytes);

}  // namespace fastsr::cpu
