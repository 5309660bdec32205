// What every kernel builds on, without CUDA's headers: NVRTC compiles these files as they are.
#pragma once

#include "ptx.cuh"

constexpr u32 FULL_WARP = 0xffffffffu;
constexpr float HALF_MAX = 65504.f;

// ---- float16

DEVICE float2 half2_to_float2(u32 h) {
  return make_float2(half_to_float(u16(h)), half_to_float(u16(h >> 16)));
}

DEVICE float saturate_half(float f) { return fminf(fmaxf(f, -HALF_MAX), HALF_MAX); }

// Values beyond float16's range become its largest, never infinite.
DEVICE u16 float_to_half(float f) { return round_to_half(saturate_half(f)); }

DEVICE u32 pack_half2_saturated(float low, float high) {
  return pack_half2(saturate_half(low), saturate_half(high));
}

// ---- warps

DEVICE float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL_WARP, v, o);
  return v;
}

DEVICE float warp_max(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, o));
  return v;
}
