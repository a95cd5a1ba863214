// The convolutions and the packing of their weights that conv3x3.cu compiles, for the operators made of them.
#pragma once

#include <vector>

#include "cuda/conv3x3.cuh"
#include "cuda/launch.cuh"

namespace fastsr::cuda {

extern template void pack_weights(const Launcher&, const std::vector<PackPart<float>>&, float*);
extern template void pack_weights(const Launcher&, const std::vector<PackPart<__half>>&, __half*);
extern template void pack_weights(const Launcher&, const std::vector<PackPart<__nv_bfloat16>>&, __nv_bfloat16*);
extern template void convolve<FusedMultiplyAdds>(const Launcher&, const Conv3x3Call<float>&);
extern template void convolve<TensorCores>(const Launcher&, const Conv3x3Call<float>&);
extern template void convolve<TensorCores>(const Launcher&, const Conv3x3Call<__half>&);
extern template void convolve<TensorCores>(const Launcher&, const Conv3x3Call<__nv_bfloat16>&);

}  // namespace fastsr::cuda
