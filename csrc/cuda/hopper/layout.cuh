// Where wgmma and TMA find what, as plain arithmetic that host and device share: swizzles, matrix descriptors, accumulators.
//
// An operand of wgmma is a tile whose K values lie side by side (K-major). In a swizzled tile a row is SPAN bytes of K long, eight rows
// are a block of 8 * SPAN bytes, which begins at a multiple of its size, and the 16-byte units of a row are exchanged:
//
//     Swizzle::span128        unit   0 1 2 3 4 5 6 7          unit u of row r lies at u ^ r % 8
//                     row 0          0 1 2 3 4 5 6 7          span64: two rows fill 128 bytes, u ^ r / 2 % 4
//                     row 1          1 0 3 2 5 4 7 6          span32: four rows, u ^ r / 4 % 2
//                     row 2          2 3 0 1 6 7 4 5          none: blocks of 8 rows of one unit, nothing is exchanged
//
// so that eight rows of one unit, which tensor cores read at once, lie in different banks. PTX ISA 8.7, 9.7.15.5.1.2.
#pragma once

#include <cstdint>

namespace fastsr::cuda::hopper {

// The bytes of K within which units are exchanged.
enum class Swizzle : uint32_t { none = 16, span32 = 32, span64 = 64, span128 = 128 };

constexpr uint32_t span_of(Swizzle swizzle) { return static_cast<uint32_t>(swizzle); }

// What tiles begin at a multiple of, so that addresses and places within the tile are exchanged alike.
constexpr uint32_t block_bytes(Swizzle swizzle) { return 8 * span_of(swizzle); }

// The address in shared memory at which the byte of an unswizzled tile's `address` lies. TMA and wgmma both apply it.
constexpr uint32_t swizzled(Swizzle swizzle, uint32_t address) { return address ^ (address >> 7 & (span_of(swizzle) / 16 - 1)) << 4; }

// Byte `k` of row `row`, from the start of a tile whose rows are one span long.
constexpr uint32_t tile_place(Swizzle swizzle, uint32_t row, uint32_t k) { return swizzled(swizzle, row * span_of(swizzle) + k); }

// The matrix descriptor (9.7.15.5.1.2.2) of a K-major operand at `address`, in bytes that are multiples of 16. `rows` is the distance of
// blocks of eight rows. `units` is, without a swizzle, that of blocks of one unit of K, and else not read. A step along K within a
// span adds its bytes to the address.
constexpr uint64_t matrix_descriptor(Swizzle swizzle, uint32_t address, uint32_t rows, uint32_t units = 16) {
  constexpr auto field = [](uint32_t bytes) { return static_cast<uint64_t>(bytes >> 4 & 0x3fff); };
  const uint64_t mode = swizzle == Swizzle::span128 ? 1 : swizzle == Swizzle::span64 ? 2 : swizzle == Swizzle::span32 ? 3 : 0;
  return field(address) | field(units) << 16 | field(rows) << 32 | mode << 62;
}

// The descriptor of a tile whose rows are one span long and whose blocks follow each other, `k` bytes along K.
constexpr uint64_t tile_descriptor(Swizzle swizzle, uint32_t address, uint32_t k = 0) {
  return matrix_descriptor(swizzle, address + k, block_bytes(swizzle));
}

// Accumulator `i` of a warpgroup's thread 0 .. 127 in the 64 x N result (9.7.15.5.1.1, matrix D): as mma.sync's, four warps of 16 rows.
constexpr int fragment_row(int thread, int i) { return thread / 32 * 16 + i % 4 / 2 * 8 + thread % 32 / 4; }
constexpr int fragment_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

}  // namespace fastsr::cuda::hopper
