// A slot's sampling state on the device; edgellm/kernels/sample.py writes the same layout.
#pragma once

#include "common.cuh"

struct Sampling {
  double top_p;
  double min_p;
  float inverse_temperature;
  int top_k;
  u32 seed_low, seed_high;
  u32 index;  // of the slot's next token; the kernel counts
  u32 flags;
  u32 unused[2];
};

constexpr u32 GREEDY = 1;
constexpr u32 LOGPROB = 2;
constexpr u32 ON_HOST = 4;  // the host chooses: nothing of the slot's state changes
constexpr u32 ADJUSTED = 8;  // something is changed of the logits first

// A row's result.
struct Sampled {
  int token;      // −1 where none was chosen
  int status;
  float logprob;  // NaN where it is not asked for
  u32 index;      // which of the slot's tokens it is
};

enum Status { NONE = 0, CHOSEN = 1, NOT_FINITE = 2, FOR_HOST = 3, NOTHING_LEFT = 4 };

// Philox4x32-10 and the 53-bit fraction made of it: see edgellm/executor/philox.py.
DEVICE double philox_uniform(u32 seed_low, u32 seed_high, u32 index) {
  u32 c0 = index, c1 = 0, c2 = 0, c3 = 0, k0 = seed_low, k1 = seed_high;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return (double(c0 >> 5) * 67108864. + double(c1 >> 6)) * (1. / 9007199254740992.);
}
