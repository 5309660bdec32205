// Weights as edgellm/kernels/packing.py lays them out: from shared memory to operands of an mma.
#pragma once

#include "common.cuh"

enum Zero { NONE = 0, CENTRED = 1, ZERO_POINT = 2, OFFSET = 3 };

constexpr int ROW_BLOCK = 16;

template <int BITS, int GROUP, int ZERO> struct Panel {
  static constexpr int COLUMNS = BITS < 16 && GROUP == 128 ? 128 : 64;
  static constexpr int MMAS = COLUMNS / 16;
  static constexpr int GROUPS = BITS < 16 ? COLUMNS / GROUP : 1;
  static constexpr int MMAS_PER_GROUP = MMAS / GROUPS;
  static constexpr int NUMBER_BYTES = ROW_BLOCK * COLUMNS * BITS / 8;
  // float16 values that lane g has of a group: scales of rows g and g + 8, then what ZERO asks for.
  static constexpr int VALUES = ZERO == ZERO_POINT || ZERO == OFFSET ? 4 : 2;
  static constexpr int SCALE_BYTES = BITS < 16 ? GROUPS * VALUES * 2 * 8 : 0;
  static constexpr int BYTES = NUMBER_BYTES + SCALE_BYTES;
  // Operands are not the numbers themselves but float16s that hold them in their low bits: 1024 + q in rows g,
  // 64 + q in rows g + 8 of 4-bit weights; 1024 + 128 + q of 8-bit ones. Tensor cores sum them exactly enough,
  // and Σx times the excess, which does not depend on the row, is where an accumulator starts.
  static constexpr float EXCESS_LOW = BITS == 4 ? 1024.f + (ZERO == CENTRED ? 8.f : 0.f) : 1152.f;
  static constexpr float EXCESS_HIGH = BITS == 4 ? 64.f + (ZERO == CENTRED ? 8.f : 0.f) : 1152.f;
};

DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// Operand A of an mma from what a lane holds of it: one word of 4-bit, two of 8-bit, four of 16-bit numbers.
DEVICE void operand_4(u32 w, u32 (&a)[4]) {
  const u32 w8 = w >> 8;
  a[0] = and_or(w, 0x000f000fu, 0x64006400u);
  a[1] = and_or(w, 0x00f000f0u, 0x54005400u);
  a[2] = and_or(w8, 0x000f000fu, 0x64006400u);
  a[3] = and_or(w8, 0x00f000f0u, 0x54005400u);
}

DEVICE void operand_8(u32 low, u32 high, u32 (&a)[4]) {
  a[0] = permute_bytes(low, 0x64646464u, 0x4140);
  a[1] = permute_bytes(high, 0x64646464u, 0x4140);
  a[2] = permute_bytes(low, 0x64646464u, 0x4342);
  a[3] = permute_bytes(high, 0x64646464u, 0x4342);
}

// The operands of two neighbouring mma, PAIR of a panel.
template <int BITS> struct OperandPair;

template <> struct OperandPair<4> {
  DEVICE static void load(const u8* panel, int lane, int pair, u32 (&a)[2][4]) {
    const uint4 w = *(const uint4*)(panel + (pair / 2) * 512 + lane * 16);
    operand_4(pair % 2 ? w.z : w.x, a[0]);
    operand_4(pair % 2 ? w.w : w.y, a[1]);
  }
};

template <> struct OperandPair<8> {
  DEVICE static void load(const u8* panel, int lane, int pair, u32 (&a)[2][4]) {
    const uint4 w = *(const uint4*)(panel + pair * 512 + lane * 16);
    operand_8(w.x, w.z, a[0]);
    operand_8(w.y, w.w, a[1]);
  }
};

template <> struct OperandPair<16> {
  DEVICE static void load(const u8* panel, int lane, int pair, u32 (&a)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 w = *(const uint4*)(panel + (pair * 2 + i) * 512 + lane * 16);
      a[i][0] = w.x, a[i][2] = w.y, a[i][1] = w.z, a[i][3] = w.w;
    }
  }
};

// Scales and, by ZERO, offsets or zero points of one group, for rows g and g + 8.
struct GroupValues {
  float2 scale, zero;
};

template <class P, int ZERO> DEVICE GroupValues group_values(const u8* panel, int g, int group) {
  const u8* at = panel + P::NUMBER_BYTES + (g * P::GROUPS + group) * P::VALUES * 2;
  if constexpr (P::VALUES == 4) {
    const uint2 v = *(const uint2*)at;
    return {half2_to_float2(v.x), half2_to_float2(v.y)};
  } else {
    return {half2_to_float2(*(const u32*)at), make_float2(0.f, 0.f)};
  }
}

// An operand's numbers become weights: without their excess, exactly, then scaled, rounded once. `values` is where
// the lane has its group's scale and, by ZERO, offset or zero point.
template <int BITS, int ZERO> DEVICE void scale_operand(u32 (&a)[4], const u8* values) {
  // What the numbers exceed q by (see Panel::EXCESS_LOW), twice in a word: 1024, 64, 1152, and 8 more.
  u32 excess_low = BITS == 4 ? (ZERO == CENTRED ? 0x64086408u : 0x64006400u) : 0x64806480u;
  u32 excess_high = BITS == 4 ? (ZERO == CENTRED ? 0x54805480u : 0x54005400u) : 0x64806480u;
  const uint2 v = ZERO == ZERO_POINT || ZERO == OFFSET ? *(const uint2*)values : make_uint2(*(const u32*)values, 0);
  const u32 scale_low = permute_bytes(v.x, 0, 0x1010), scale_high = permute_bytes(v.x, 0, 0x3232);
  const u32 zero_low = permute_bytes(v.y, 0, 0x1010), zero_high = permute_bytes(v.y, 0, 0x3232);
  if constexpr (ZERO == ZERO_POINT) {
    excess_low = half2_add(excess_low, zero_low);
    excess_high = half2_add(excess_high, zero_high);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 q = half2_subtract(a[i], i % 2 ? excess_high : excess_low);
    const u32 scale = i % 2 ? scale_high : scale_low;
    if constexpr (ZERO == OFFSET) {
      a[i] = half2_multiply_add(q, scale, i % 2 ? zero_high : zero_low);
    } else {
      a[i] = half2_multiply(q, scale);
    }
  }
}

// Operands B of a panel's products as lane 4g + t has them: x float16, ROWS rows in tiles of eight. `pair` is of mma
// 2p and 2p + 1 of the panel, the first one's registers first; `sum` is Σx over a group, of columns 2t and 2t + 1.

// x and sums in shared memory: `x` points at the lane's first column of the panel in row g of the first tile, `stride`
// elements before that of the second; `sums` at those of column 2t of the first tile, group by group SUMS_STRIDE apart,
// tiles 8 apart.
template <int BITS, int GROUP, int SUMS_STRIDE> struct SharedX {
  const u16* x;
  int stride;
  const float* sums;

  // Columns from the panel's first to a lane's first.
  DEVICE static int column(int t) { return BITS < 16 && GROUP == 16 ? 4 * t : 8 * t; }

  DEVICE uint4 pair(int tile, int p) const {
    const u16* const at = x + tile * stride + p * 32;
    if constexpr (BITS < 16 && GROUP == 16) {
      const uint2 low = *(const uint2*)at, high = *(const uint2*)(at + 16);
      return make_uint4(low.x, low.y, high.x, high.y);
    } else {
      return *(const uint4*)at;
    }
  }
  DEVICE float2 sum(int tile, int group) const { return *(const float2*)(sums + group * SUMS_STRIDE + tile * 8); }
};

// x in registers, loaded as it is found in global memory: `x` points at the panel's first column in the lane's row. Sums
// of one tile are there, too; of two they would be too many and lie where SharedX has them.
template <int BITS, int GROUP, int ROWS, int SUMS_STRIDE> struct HeldX {
  using P = Panel<BITS, GROUP, NONE>;
  static constexpr int TILES = (ROWS + 7) / 8;
  uint4 pairs[TILES][P::MMAS / 2];
  float2 held[P::GROUPS];
  const float* shared;

  DEVICE static uint4 load(const u16* x, int t, int p) {
    if constexpr (BITS < 16 && GROUP == 16) {
      const uint2 low = load_l2((const uint2*)(x + p * 32 + t * 4)), high = load_l2((const uint2*)(x + p * 32 + 16 + t * 4));
      return make_uint4(low.x, low.y, high.x, high.y);
    } else {
      return load_l2((const uint4*)(x + p * 32 + t * 8));
    }
  }
  DEVICE uint4 pair(int tile, int p) const { return pairs[tile][p]; }
  DEVICE float2 sum(int tile, int group) const {
    return TILES == 1 ? held[group] : *(const float2*)(shared + group * SUMS_STRIDE + tile * 8);
  }
};

// Σx over a group of a panel, of columns 2t and 2t + 1 of a tile: the product with a matrix of ones, in at most MOST_CHAINS
// chains of dependent mma.
template <int BITS, int GROUP, int MOST_CHAINS, class X> DEVICE float2 sum_group(const X& x, int tile, int group) {
  using P = Panel<BITS, GROUP, NONE>;
  constexpr u32 ONES = 0x3c003c00u;
  constexpr int CHAINS = P::MMAS_PER_GROUP < MOST_CHAINS ? P::MMAS_PER_GROUP : MOST_CHAINS;
  float c[CHAINS][4] = {};
#pragma unroll
  for (int i = 0; i < P::MMAS_PER_GROUP; i++) {
    const int number = group * P::MMAS_PER_GROUP + i;
    const uint4 b = x.pair(tile, number / 2);
    mma(c[i % CHAINS], ONES, ONES, ONES, ONES, number % 2 ? b.z : b.x, number % 2 ? b.w : b.y);
  }
  float2 sum = make_float2(c[0][0], c[0][1]);
#pragma unroll
  for (int i = 1; i < CHAINS; i++) sum.x += c[i][0], sum.y += c[i][1];
  return sum;
}

// acc[r][16 × 8·TILES] += panel r · x for ABREAST panels of the same columns, `stride` bytes apart. Columns of the
// product beyond ROWS are anything.
template <int BITS, int GROUP, int ZERO, int ROWS, int ABREAST, class X>
DEVICE void multiply_panels(const u8* panels, int stride, int lane, const X& x, float (&acc)[ABREAST][(ROWS + 7) / 8][4]) {
  using P = Panel<BITS, GROUP, ZERO>;
  constexpr int TILES = (ROWS + 7) / 8;
  const int g = lane >> 2;
  // Two chains hide the latency of dependent mma where there would be one.
  constexpr int CHAINS = TILES == 1 && ABREAST == 1 && P::MMAS_PER_GROUP >= 4 ? 2 : 1;
  // What operands exceed numbers by is taken off at the start, for all panels abreast at once, or afterwards, together
  // with offsets and zero points and with fewer registers meanwhile.
  constexpr bool STARTED = BITS < 16 && TILES == 1 && (ZERO == NONE || ZERO == CENTRED);
#pragma unroll
  for (int group = 0; group < P::GROUPS; group++) {
    float c[ABREAST][CHAINS][TILES][4];
    float start[TILES][4] = {};
    GroupValues v[ABREAST];
    if constexpr (BITS < 16) {
#pragma unroll
      for (int r = 0; r < ABREAST; r++) v[r] = group_values<P, ZERO>(panels + r * stride, g, group);
    }
    if constexpr (STARTED) {
      const float2 sum = x.sum(0, group);
      start[0][0] = -P::EXCESS_LOW * sum.x, start[0][1] = -P::EXCESS_LOW * sum.y;
      start[0][2] = -P::EXCESS_HIGH * sum.x, start[0][3] = -P::EXCESS_HIGH * sum.y;
    }
    const float none[4] = {0.f, 0.f, 0.f, 0.f};
    if constexpr (GROUP == 16 && BITS < 16) {
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const uint4 b = x.pair(tile, group / 2);
#pragma unroll
        for (int r = 0; r < ABREAST; r++) {
          u32 a[2][4];
          OperandPair<BITS>::load(panels + r * stride, lane, group / 2, a);
          mma(c[r][0][tile], a[group % 2][0], a[group % 2][1], a[group % 2][2], a[group % 2][3],
              group % 2 ? b.z : b.x, group % 2 ? b.w : b.y, start[tile]);
        }
      }
    } else {
#pragma unroll
      for (int p = 0; p < P::MMAS_PER_GROUP / 2; p++) {
        const int pair = group * (P::MMAS_PER_GROUP / 2) + p;
        uint4 b[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) b[tile] = x.pair(tile, pair);
#pragma unroll
        for (int r = 0; r < ABREAST; r++) {
          u32 a[2][4];
          OperandPair<BITS>::load(panels + r * stride, lane, pair, a);
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            if (p == 0) {
              mma(c[r][0][tile], a[0][0], a[0][1], a[0][2], a[0][3], b[tile].x, b[tile].y, start[tile]);
            } else {
              mma(c[r][0][tile], a[0][0], a[0][1], a[0][2], a[0][3], b[tile].x, b[tile].y);
            }
            if (p == 0 && CHAINS == 2) {
              mma(c[r][CHAINS - 1][tile], a[1][0], a[1][1], a[1][2], a[1][3], b[tile].z, b[tile].w, none);
            } else {
              mma(c[r][CHAINS - 1][tile], a[1][0], a[1][1], a[1][2], a[1][3], b[tile].z, b[tile].w);
            }
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      float2 sum = make_float2(0.f, 0.f);
      if constexpr (BITS < 16 && !STARTED) sum = x.sum(tile, group);
#pragma unroll
      for (int r = 0; r < ABREAST; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float& y = acc[r][tile][i];
          const float product = CHAINS == 2 ? c[r][0][tile][i] + c[r][CHAINS - 1][tile][i] : c[r][0][tile][i];
          if constexpr (BITS == 16) {
            y += product;
          } else {
            const float s = i % 2 ? sum.y : sum.x, excess = i < 2 ? P::EXCESS_LOW : P::EXCESS_HIGH;
            const float scale = i < 2 ? v[r].scale.x : v[r].scale.y, zero = i < 2 ? v[r].zero.x : v[r].zero.y;
            if constexpr (STARTED) {
              y += scale * product;
            } else if constexpr (ZERO == OFFSET) {
              y += scale * product;
              y += (zero - excess * scale) * s;
            } else if constexpr (ZERO == ZERO_POINT) {
              y += scale * (product - (excess + zero) * s);
            } else {
              y += scale * (product - excess * s);
            }
          }
        }
    }
  }
}

// One panel alone.
template <int BITS, int GROUP, int ZERO, int ROWS, class X>
DEVICE void multiply_panel(const u8* panel, int lane, const X& x, float (&acc)[(ROWS + 7) / 8][4]) {
  multiply_panels<BITS, GROUP, ZERO, ROWS, 1>(panel, 0, lane, x, reinterpret_cast<float(&)[1][(ROWS + 7) / 8][4]>(acc));
}
