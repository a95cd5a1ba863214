// A chain of convolutions that grows one buffer: each reads a prefix of the buffer's channels and writes the channels behind it.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/conv_driver.h"
#include "cpu/plane.h"

namespace fastsr::cpu {

struct Stage {
  PackedConv conv;
  int64_t inputs;        // channels of the buffer that are read
  Plane out;             // without data: the buffer, from channel `inputs` on
  Plane mask, skip2;
  Plane skip;
  bool skip_input = false;  // the skip is the buffer's first channels
  float slope = 1.f, scale = 1.f, scale2 = 1.f;
};

struct Chain {
  const Kernel& kernel;
  Element type;
  int64_t batch, height, width, channels;
  Plane buffer;   // holds the chain's input in its first channels. Without data, each thread keeps the rows that are still read,
  Plane input;    // and copies those of `input`
  std::vector<Stage> stages;
  int64_t size() const { return type == Element::f32 ? 4 : 2; }
};

// Run the chain over all images, on torch's threads.
void walk(const Chain& chain);

}  // namespace fastsr::cpu
