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

// The norm in front: a row for each warp, whose squares are loaded first and added once x is on its way.
template <int K, int ROWS, int WARPS> struct RowNorms {
  static constexpr int FOURS = K / SQUARES / 4, LOADS = (FOURS + 31) / 32, EACH = (ROWS + WARPS - 1) / WARPS;
  static constexpr int ROOM = EACH < 8 ? 8 / EACH : 1, KEPT = LOADS < ROOM ? LOADS : ROOM;
  float4 squares[EACH][KEPT];
  float scale[EACH];

  DEVICE void load(const float* from, const float* scales) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int row = e * WARPS + warp;
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (row < ROWS && i * 32 + lane < FOURS) v = load_l2((const float4*)(from + (u64)row * (K / SQUARES)) + i * 32 + lane);
        float4& to = squares[e][i % KEPT];
        to = i < KEPT ? v : make_float4(to.x + v.x, to.y + v.y, to.z + v.z, to.w + v.w);
      }
      scale[e] = row < ROWS ? load_l2(scales + row) : 1.f;
    }
  }

  // `factors`: what a row's results are multiplied by; `next`: the scales for the norm behind, or null.
  DEVICE void finish(float epsilon, float* factors, float* next) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      const int row = e * WARPS + warp;
      if (row >= ROWS) break;
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < KEPT; i++) {
        const float4 v = squares[e][i];
        sum += (v.x + v.y) + (v.z + v.w);
      }
      const float inverse_rms = rsqrtf(warp_sum(sum) * (1.f / K) + epsilon);
      if (lane == 0) {
        factors[row] = inverse_rms / scale[e];
        if (next) next[row] = scale_of(inverse_rms);
      }
    }
  }
};
