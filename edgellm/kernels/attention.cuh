// What decode and prefill attention share: a head in a warp's registers, and what a KV cache holds.
#pragma once

#include "common.cuh"

// ---- a head across a warp: lane i has elements i, i + 32, … below D / 2, and with each the one D / 2 further,
// with which it is rotated

template <int D>
struct Pairs {
  static constexpr int EACH = (D / 2 + 31) / 32;
  float first[EACH], second[EACH];
};

template <int D>
DEVICE bool holds(int lane, int e) {
  return D / 2 % 32 == 0 || lane + 32 * e < D / 2;
}

template <int D, class Load>
DEVICE void load_pairs(Pairs<D>& p, int lane, Load load) {
#pragma unroll
  for (int e = 0; e < Pairs<D>::EACH; e++) {
    int j = lane + 32 * e;
    p.first[e] = holds<D>(lane, e) ? load(j) : 0.f;
    p.second[e] = holds<D>(lane, e) ? load(j + D / 2) : 0.f;
  }
}

// RMSNorm over the head.
template <int D>
DEVICE void normalise(Pairs<D>& x, const Pairs<D>& gain, float epsilon) {
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < Pairs<D>::EACH; e++) sum += x.first[e] * x.first[e] + x.second[e] * x.second[e];
  float r = rsqrtf(warp_sum(sum) * (1.f / D) + epsilon);
#pragma unroll
  for (int e = 0; e < Pairs<D>::EACH; e++) {
    x.first[e] *= r * gain.first[e];
    x.second[e] *= r * gain.second[e];
  }
}

// `angles` has cosines first and sines second: a row of the table float32 [max_seq, 2, D / 2].
template <int D>
DEVICE void rotate(Pairs<D>& x, const Pairs<D>& angles) {
#pragma unroll
  for (int e = 0; e < Pairs<D>::EACH; e++) {
    float a = x.first[e], b = x.second[e], c = angles.first[e], s = angles.second[e];
    x.first[e] = a * c - b * s;
    x.second[e] = b * c + a * s;
  }
}

template <int D>
DEVICE void store_halves(u16* to, const Pairs<D>& x, int lane, float factor = 1.f) {
#pragma unroll
  for (int e = 0; e < Pairs<D>::EACH; e++)
    if (holds<D>(lane, e)) {
      to[lane + 32 * e] = float_to_half(x.first[e] * factor);
      to[lane + 32 * e + D / 2] = float_to_half(x.second[e] * factor);
    }
}

// The largest magnitude, in every lane.
template <int D>
DEVICE float largest_of(const Pairs<D>& x) {
  float largest = 0.f;
#pragma unroll
  for (int e = 0; e < Pairs<D>::EACH; e++) largest = fmaxf(largest, fmaxf(fabsf(x.first[e]), fabsf(x.second[e])));
  return warp_max(largest);
}

// ---- an int8 cache: x = scale · (stored − 128), one float16 scale for a token's head, the largest |x| at ±127

// Gives the scale; stores the D bytes.
template <int D, class Store>
DEVICE u16 quantise(const Pairs<D>& x, int lane, Store store) {
  u16 scale = float_to_half(largest_of<D>(x) * (1.f / 127.f));
  float stored = half_to_float(scale);
  float inverse = stored > 0.f ? 1.f / stored : 0.f;
  auto code = [&](float v) { return u8(int(fminf(fmaxf(rintf(v * inverse), -127.f), 127.f)) + 128); };
#pragma unroll
  for (int e = 0; e < Pairs<D>::EACH; e++)
    if (holds<D>(lane, e)) {
      store(lane + 32 * e, code(x.first[e]));
      store(lane + 32 * e + D / 2, code(x.second[e]));
    }
  return scale;
}

// A query beside such keys: 256 · high + low, both of them signed bytes, the largest at ±this. These 16 bits round it less
// than float16 does, and its products with keys are exact.
constexpr float LARGEST_CODE = 127 * 256 + 127;

// A value's code is taken for a float16 as it is, a subnormal: BYTE · code, which has CODE_EXCESS too much. These are two
// of a word's four: SELECT 0x4240 takes bytes 0 and 2, 0x4341 1 and 3.
constexpr float BYTE = 1.f / (1 << 24), CODE_EXCESS = 128 * BYTE;
constexpr u32 HALF2_ONES = 0x3c003c00u;

template <u32 SELECT>
DEVICE u32 codes_to_half2(u32 word) {
  return __byte_perm(word, 0u, SELECT);
}

// Probabilities are multiplied by their token's value scale before they become float16. This factor keeps small
// scales clear of subnormals, and the largest (65504 / 127) below float16's end.
constexpr float VALUE_SCALE_FACTOR = 64.f;

// ---- where it lies: a cache is [slots, max_seq / 16, KV_HEADS, keys and values, 16, D], and scales the same without D.
// So what a step reads of a row lies together, of all heads, and in few of the pages that addresses are looked up by.

constexpr int TILE = 16;  // tokens

// Bytes of a head's row of D, and of the same row in shared memory: an odd number of 16-byte units, so that the eight rows
// of a matrix that is loaded lie in different banks.
template <int D, bool INT8>
struct CacheRow {
  static constexpr int BYTES = INT8 ? D : 2 * D;
  static constexpr int UNITS = BYTES / 16;
  static constexpr int STRIDE = (UNITS | 1) * 16;
  static constexpr int VALUES = TILE * BYTES;  // of a tile's keys, behind which its values lie
};

// A head's tile of a slot, counted from the first slot's; the next tile of the head is KV_HEADS further.
template <int KV_HEADS>
DEVICE u64 cache_tile(int max_seq, int slot, int head, int token) {
  return (u64(slot) * (max_seq / TILE) + token / TILE) * KV_HEADS + head;
}

// A token's key or value in it, counted from the first: times a row's bytes in the cache, as it is in scales.
template <int KV_HEADS>
DEVICE u64 cache_place(int max_seq, int slot, int head, int token, bool is_value) {
  return (cache_tile<KV_HEADS>(max_seq, slot, head, token) * 2 + is_value) * TILE + token % TILE;
}

constexpr float NOTHING = -1e30f;  // a logit of what is not there; finite, so that differences of it are
