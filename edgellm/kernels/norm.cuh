// RMSNorm in front of a decode step's linear, in two halves, so that no product waits for a norm: norm.py says why the
// numbers stay within float16.
//
//   who writes the residual x leaves   h = x · gain · scale[row], with the scale that the row's norm before suggests,
//                                      and sums of squares of 16 neighbours
//   who multiplies h                   multiplies its result by 1 / (scale[row] · rms(x)), and leaves the next scale
#pragma once

#include "common.cuh"

constexpr int SQUARES = 16;  // neighbours whose squares are summed
constexpr float ROOM = 16.f;  // a residual as large as at the norm before has an rms of 1 / ROOM before its gain

DEVICE float scale_of(float inverse_rms) { return inverse_rms * (1.f / ROOM); }

// h of four neighbours.
DEVICE uint2 scaled_four(float4 x, float4 gain, float scale) {
  return make_uint2(pack_half2_saturated(x.x * gain.x * scale, x.y * gain.y * scale),
                    pack_half2_saturated(x.z * gain.z * scale, x.w * gain.w * scale));
}

// Of a block of THREADS, the sum of everybody's value.
template <int THREADS> DEVICE float block_sum(float v) {
  __shared__ float sums[THREADS / 32];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; warp++) v += sums[warp];
  return v;
}
