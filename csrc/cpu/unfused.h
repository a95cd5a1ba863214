// Forbids the compiler to fuse products and sums into one rounding in the translation unit that includes this first: float64
// distances have the same bits on every processor. Fused multiply-adds that the text asks for by name stay.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif
