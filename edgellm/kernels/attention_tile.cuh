// A warp's part of decode attention: tiles of 16 tokens against the query heads of one KV head.
//
// Keys, then values, are the left operand of products whose eight columns are query heads: a group has eight of them,
// column 2t + c of group j is query head 8j + t + 4c. With four or fewer every second column is of nobody, and a lane
// has one query head's logits instead of two.
#pragma once

#include "attention.cuh"

// The query heads of a row, rotated, and ready to be multiplied by keys: their products are logits in base 2.
template <int D, int QUERIES, bool INT8>
struct Queries {
  u16 halves[QUERIES][D + 8];

  DEVICE void store(int which, const Pairs<D>& x, int lane, float scale) {
    store_halves<D>(halves[which], x, lane, scale);
  }
};

// A byte cache's keys are multiplied as bytes: x = scale · (256 · high + low).
template <int D, int QUERIES>
struct Queries<D, QUERIES, true> {
  static constexpr int WIDTH = (D + 31) / 32 * 32;  // zeros from D on
  u8 codes[QUERIES][2][WIDTH + 16];  // high, low
  float scales[QUERIES];

  DEVICE void store(int which, const Pairs<D>& x, int lane, float scale) {
    const float largest = largest_of<D>(x), inverse = largest > 0.f ? LARGEST_CODE / largest : 0.f;
    auto put = [&](int j, float v) {
      const int code = int(rintf(v * inverse)), high = (code + 128) >> 8;
      codes[which][0][j] = u8(high), codes[which][1][j] = u8(code);
    };
#pragma unroll
    for (int e = 0; e < Pairs<D>::EACH; e++)
      if (holds<D>(lane, e)) {
        put(lane + 32 * e, x.first[e]);
        put(lane + 32 * e + D / 2, x.second[e]);
      }
    if (lane < WIDTH - D) codes[which][0][D + lane] = codes[which][1][D + lane] = 0;
    if (lane == 0) scales[which] = largest * scale / LARGEST_CODE;
  }
};

// What a warp has of a row's query heads: for each the sum of its tiles' values, weighted by 2^(logit − reference), and
// the sum of these weights. The reference is the largest logit so far, or one that has been passed by little.
template <int D, int QUERIES, bool INT8>
class TileSums {
  using Cache = CacheRow<D, INT8>;
  static constexpr int GROUPS = (QUERIES + 7) / 8, COLUMNS = QUERIES > 4 ? 2 : 1, STEPS = D / 16;
  static constexpr int MATRIX = TILE * Cache::STRIDE;
  // A key's bytes are multiplied by two columns for each query head, high and low.
  static constexpr int KEY_PRODUCTS = INT8 ? GROUPS * COLUMNS : GROUPS, KEY_STEPS = INT8 ? (D + 31) / 32 : STEPS;
  // Of how many tiles the excess adds up before it is taken off: at 128 to an average of a few, float32 would not hold
  // thousands.
  static constexpr int MOST_EXCESS = 8;
  // Weights may pass 1 by this much before the reference moves: it seldom does after the first tile.
  static constexpr float PASSED = 256.f;
  static constexpr float LEAST_SCALE = 1.f / (1 << 24);  // below float16's smallest: of values that are all 0

  u32 q_[KEY_PRODUCTS][KEY_STEPS][2];
  int start_[KEY_PRODUCTS][2];             // the keys' excess of 128
  float q_scale_[KEY_PRODUCTS];
  float o_[GROUPS][STEPS][4] = {};         // [d of the step: rows g and g + 8] × [columns 2t and 2t + 1]
  float reference_[GROUPS][COLUMNS];
  float sum_[GROUPS][COLUMNS] = {};        // of the lane's tokens
  float weight_[GROUPS][4] = {};           // of bytes: what values have been multiplied by since excess was taken off
  int countdown_ = 0;
  int lane_, g_, t_;

 public:
  DEVICE TileSums(const Queries<D, QUERIES, INT8>& queries, int lane) : lane_(lane), g_(lane >> 2), t_(lane & 3) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int column = 0; column < COLUMNS; column++) reference_[group][column] = NOTHING;
    if constexpr (INT8) {
#pragma unroll
      for (int product = 0; product < KEY_PRODUCTS; product++) {
        // Columns 2t and 2t + 1 are high and low of one query head.
        const int which = product * 4 + (g_ >> 1), mine = product * 4 + t_;
        q_scale_[product] = mine < QUERIES ? queries.scales[mine] : 0.f;
        int sums[4] = {};
#pragma unroll
        for (int s = 0; s < KEY_STEPS; s++) {
          const u8* const codes = queries.codes[which < QUERIES ? which : 0][g_ & 1] + s * 32 + 4 * t_;
          q_[product][s][0] = which < QUERIES ? *(const u32*)codes : 0u;
          q_[product][s][1] = which < QUERIES ? *(const u32*)(codes + 16) : 0u;
          mma_bytes(sums, 0x80808080u, 0x80808080u, 0x80808080u, 0x80808080u, q_[product][s][0], q_[product][s][1]);
        }
        start_[product][0] = -sums[0], start_[product][1] = -sums[1];
      }
    } else {
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
          const int which = group * 8 + (g_ >> 1) + 4 * (g_ & 1);
          const u16* const halves = queries.halves[which < QUERIES ? which : 0] + s * 16 + 2 * t_;
          q_[group][s][0] = which < QUERIES ? *(const u32*)halves : 0u;
          q_[group][s][1] = which < QUERIES ? *(const u32*)(halves + 8) : 0u;
        }
    }
  }

  // `stage`: TILE keys, as many values, and of bytes as many scales of each. `there`: how many of them, 1 or more; the
  // rest may be anything, values finite.
  DEVICE void take(const u8* stage, int there) {
    const bool here[2] = {g_ < there, g_ + 8 < there};
    float logit[GROUPS][COLUMNS][2];  // tokens g and g + 8
    multiply_keys(stage, logit);
    float scale[2] = {1.f, 1.f};  // of the values
    if constexpr (INT8) {
      const u16* const of = (const u16*)(stage + 2 * MATRIX) + TILE + g_;
#pragma unroll
      for (int half = 0; half < 2; half++)
        scale[half] = here[half] ? fmaxf(half_to_float(of[8 * half]), LEAST_SCALE) : 0.f;
    }

    float e[GROUPS][COLUMNS][2];
    auto weigh = [&] {
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int column = 0; column < COLUMNS; column++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float power = exp2_fast(logit[group][column][half] - reference_[group][column]);
            e[group][column][half] = here[half] ? power : 0.f;
          }
    };
    weigh();
    float most = 0.f;
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int column = 0; column < COLUMNS; column++)
        most = fmaxf(most, fmaxf(e[group][column][0] * scale[0], e[group][column][1] * scale[1]));
    if (countdown_ == 0 || __any_sync(FULL_WARP, most > PASSED)) {
      move_reference(logit, scale, here);
      weigh();
      countdown_ = INT8 ? MOST_EXCESS : 1 << 30;
    }
    countdown_--;

    u32 p[GROUPS][2];
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
#pragma unroll
      for (int column = 0; column < COLUMNS; column++) sum_[group][column] += e[group][column][0] + e[group][column][1];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float odd = COLUMNS == 2 ? e[group][COLUMNS - 1][half] * scale[half] : 0.f;
        p[group][half] = transpose_matrix(pack_half2(e[group][0][half] * scale[half], odd));
      }
    }
    multiply_values(stage + MATRIX, p);
  }

  // To shared memory: of each query head the sums [D], and {reference, sum of weights}. A warp that took no tile leaves
  // zeros and a reference that has no weight.
  template <int STRIDE>
  DEVICE void leave(float (*sums)[STRIDE], float2* statistics) {
    if constexpr (INT8) shrink_all(1.f);
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int column = 0; column < COLUMNS; column++) {
        float total = sum_[group][column];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes <<= 1) total += __shfl_xor_sync(FULL_WARP, total, lanes);
        const int which = group * 8 + t_ + 4 * column;
        if (which < QUERIES) {
          if (g_ == 0) statistics[which] = make_float2(reference_[group][column], total);
#pragma unroll
          for (int s = 0; s < STEPS; s++) {
            const float a = o_[group][s][column], b = o_[group][s][column + 2];
            float* const to = sums[which] + s * 16;
            if constexpr (INT8) {
              *(float2*)(to + 2 * g_) = make_float2(a * (1.f / BYTE), b * (1.f / BYTE));
            } else {
              to[g_] = a, to[g_ + 8] = b;
            }
          }
        }
      }
  }

 private:
  // Two sums for each logit, so that half as many products wait for each other.
  DEVICE void multiply_keys(const u8* stage, float (&logit)[GROUPS][COLUMNS][2]) {
    const u8* const at = stage + ((lane_ >> 3 & 1) * 8 + (lane_ & 7)) * Cache::STRIDE + (lane_ >> 4) * 16;
    if constexpr (INT8) {
      int even[KEY_PRODUCTS][4], odd[KEY_PRODUCTS][4] = {};
#pragma unroll
      for (int product = 0; product < KEY_PRODUCTS; product++)
#pragma unroll
        for (int i = 0; i < 4; i++) even[product][i] = start_[product][i & 1];
#pragma unroll
      for (int s = 0; s < KEY_STEPS; s++) {
        u32 a[4];
        load_matrices(a, at + s * 32);
#pragma unroll
        for (int product = 0; product < KEY_PRODUCTS; product++)
          mma_bytes(s & 1 ? odd[product] : even[product], a[0], a[1], a[2], a[3], q_[product][s][0],
                    q_[product][s][1]);
      }
      const u16* const of = (const u16*)(stage + 2 * MATRIX) + g_;
      const float scale[2] = {half_to_float(of[0]), half_to_float(of[8])};
#pragma unroll
      for (int product = 0; product < KEY_PRODUCTS; product++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int high = even[product][2 * half] + odd[product][2 * half];
          const int low = even[product][2 * half + 1] + odd[product][2 * half + 1];
          logit[product / COLUMNS][product % COLUMNS][half] =
              float(high * 256 + low) * (scale[half] * q_scale_[product]);
        }
    } else {
      float even[GROUPS][4] = {}, odd[GROUPS][4] = {};
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        u32 a[4];
        load_matrices(a, at + s * 32);
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
          mma(s & 1 ? odd[group] : even[group], a[0], a[1], a[2], a[3], q_[group][s][0], q_[group][s][1]);
      }
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int column = 0; column < COLUMNS; column++)
#pragma unroll
          for (int half = 0; half < 2; half++)
            logit[group][column][half] = even[group][2 * half + column] + odd[group][2 * half + column];
    }
  }

  // To the largest of logit + log2(scale): no weight of a value is above 1 then, whatever its scale.
  DEVICE void move_reference(const float (&logit)[GROUPS][COLUMNS][2], const float (&scale)[2], const bool (&here)[2]) {
    float lift[2];
#pragma unroll
    for (int half = 0; half < 2; half++) lift[half] = INT8 && here[half] ? log2_fast(scale[half]) : 0.f;
    float shrink[GROUPS][COLUMNS];
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int column = 0; column < COLUMNS; column++) {
        float m = reference_[group][column];
#pragma unroll
        for (int half = 0; half < 2; half++)
          if (here[half]) m = fmaxf(m, logit[group][column][half] + lift[half]);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes <<= 1) m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, lanes));
        shrink[group][column] = exp2_fast(reference_[group][column] - m);
        reference_[group][column] = m;
        sum_[group][column] *= shrink[group][column];
      }
    shrink_all(shrink);
  }

  DEVICE void shrink_all(float factor) {
    float shrink[GROUPS][COLUMNS];
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int column = 0; column < COLUMNS; column++) shrink[group][column] = factor;
    shrink_all(shrink);
  }

  // Bytes' excess goes on the way.
  DEVICE void shrink_all(const float (&shrink)[GROUPS][COLUMNS]) {
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int column = 0; column < COLUMNS; column++) {
        const float f = shrink[group][column], excess = INT8 ? CODE_EXCESS * weight_[group][column] * f : 0.f;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
          o_[group][s][column] = o_[group][s][column] * f - excess;
          o_[group][s][column + 2] = o_[group][s][column + 2] * f - excess;
        }
        weight_[group][column] = 0.f;
      }
  }

  DEVICE void multiply_values(const u8* values, const u32 (&p)[GROUPS][2]) {
    if constexpr (INT8) {
      // A 16-bit element is two neighbours of d: rows g of a product take the even ones, rows g + 8 the odd.
      const u8* const at = values + ((lane_ >> 3 & 1) * 8 + (lane_ & 7)) * Cache::STRIDE + (lane_ >> 4) * 16;
#pragma unroll
      for (int group = 0; group < GROUPS; group++)
        mma(weight_[group], HALF2_ONES, HALF2_ONES, HALF2_ONES, HALF2_ONES, p[group][0], p[group][1]);
#pragma unroll
      for (int s = 0; s < STEPS; s += 2) {
        u32 w[4];
        load_matrices_transposed(w, at + s * 16);
#pragma unroll
        for (int half = 0; half < 2 && s + half < STEPS; half++) {
          const u32 low = w[2 * half], high = w[2 * half + 1];
          const u32 a0 = codes_to_half2<0x4240>(low), a1 = codes_to_half2<0x4341>(low);
          const u32 a2 = codes_to_half2<0x4240>(high), a3 = codes_to_half2<0x4341>(high);
#pragma unroll
          for (int group = 0; group < GROUPS; group++)
            mma(o_[group][s + half], a0, a1, a2, a3, p[group][0], p[group][1]);
        }
      }
    } else {
      const u8* const at = values + ((lane_ >> 4) * 8 + (lane_ & 7)) * Cache::STRIDE + (lane_ >> 3 & 1) * 16;
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        u32 a[4];
        load_matrices_transposed(a, at + s * 32);
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
          mma(o_[group][s], a[0], a[1], a[2], a[3], p[group][0], p[group][1]);
      }
    }
  }
};
