// Attention of a piece of a prompt, over all that its slot holds before it and over itself.
#include "attention.cuh"
#include "rows.cuh"

// A chunk's queries and keys are normalised and rotated, its keys and values go to the cache. Queries stay where the
// projection left them, multiplied by `scale`. A warp for each head of each token.
// Grid: (heads of all three kinds / warps, bucket).
template <int D, int HEADS, int KV_HEADS, bool INT8, bool NORM>
__global__ void rope_and_append(int max_seq, const Chunk* __restrict__ chunk, u16* qkv, const float* __restrict__ angles,
                                const float* __restrict__ q_gain, const float* __restrict__ k_gain, float epsilon,
                                float scale, u8* cache, u16* scales) {
  constexpr int ALL = HEADS + 2 * KV_HEADS;
  launch_dependents();
  const int lane = threadIdx.x & 31, which = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), token = blockIdx.y;
  const Chunk here = *chunk;
  const bool active = which < ALL && token < here.count;
  const bool is_query = which < HEADS, is_value = which >= HEADS + KV_HEADS;
  Pairs<D> turn, gain;
  if (active && !is_value) {
    load_pairs<D>(turn, lane, [&](int j) { return __ldg(angles + u64(here.past + token) * D + j); });
    if (NORM) load_pairs<D>(gain, lane, [&](int j) { return __ldg((is_query ? q_gain : k_gain) + j); });
  }
  wait_for_previous();
  if (!active) return;
  u16* const from = qkv + (u64(token) * ALL + which) * D;
  Pairs<D> x;
  load_pairs<D>(x, lane, [&](int j) { return half_to_float(load_l2(from + j)); });
  if (!is_value) {
    if (NORM) normalise<D>(x, gain, epsilon);
    rotate<D>(x, turn);
  }
  if (is_query) {
    store_halves<D>(from, x, lane, scale);
  } else if (here.slot >= 0) {
    const int head = (which - HEADS) % KV_HEADS;
    const u64 at = cache_place<KV_HEADS>(max_seq, here.slot, head, here.past + token, is_value);
    u8* const to = cache + at * CacheRow<D, INT8>::BYTES;
    if constexpr (INT8) {
      const u16 s = quantise<D>(x, lane, [&](int j, u8 code) { to[j] = code; });
      if (lane == 0) scales[at] = s;
    } else {
      store_halves<D>((u16*)to, x, lane);
    }
  }
}

// Queries [16 · WARPS] × keys in tiles of KEYS, the probabilities never leaving registers (Dao 2023,
// FlashAttention-2). A block takes the rows (token, query head of one KV head) in this order, QUERIES for a token, so
// that a tile of the cache serves all of them. Shared memory, dynamic: STAGES tiles of keys and values.
// Grid: (KV_HEADS, bucket · QUERIES / (16 · WARPS), parts); the last rows, which have most to do, come first.
//
// PARTED: the keys of a row are shared out among `parts` blocks, LEAST_TILES tiles each or more, so that a few tokens
// behind many fill the device; fewer than LEAST_PARTED tiles are not. Sums of more than one block meet in `partials`, where whoever comes last adds them up in
// order; `attention_prefill.py` has the same arithmetic.
template <int D, int QUERIES, int KV_HEADS, bool INT8, int WARPS, int KEYS, int STAGES, bool PARTED>
__global__ void __launch_bounds__(WARPS * 32, 2)
    attention_prefill(int max_seq, const Chunk* __restrict__ chunk, const u16* qkv, const u8* cache,
                      const u16* scales, u16* out, float* partials, u32* counters) {
  using Cache = CacheRow<D, INT8>;
  constexpr int STEPS = D / 16, TILES = KEYS / 8, HEADS = KV_HEADS * QUERIES, WIDTH = (HEADS + 2 * KV_HEADS) * D;
  constexpr int MATRIX = KEYS * Cache::STRIDE, SCALES = INT8 ? 2 * KEYS * 2 : 0, STAGE = 2 * MATRIX + SCALES;
  constexpr int ROWS = 16 * WARPS, THREADS = WARPS * 32;
  constexpr int LEAST_TILES = 256 / KEYS, LEAST_PARTED = 768 / KEYS;
  constexpr int PARTIAL = ROWS * (D + 2);  // floats: of each row {largest logit, sum of weights}, then its sums
  DYNAMIC_SHARED(ring);
  __shared__ int part_count;
  __shared__ bool is_last;

  launch_dependents();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int head = blockIdx.x, first_row = (int(gridDim.y) - 1 - int(blockIdx.y)) * ROWS;
  const Chunk here = *chunk;
  wait_for_previous();
  const int row_count = here.count * QUERIES;
  if (here.slot < 0 || first_row >= row_count) return;

  const int last_token = min(first_row + ROWS, row_count) - 1;
  const int length = here.past + last_token / QUERIES + 1;  // keys that the block's last row sees
  const int all_tiles = (length + KEYS - 1) / KEYS;
  const int share = PARTED && all_tiles >= LEAST_PARTED
                        ? max((all_tiles + int(gridDim.z) - 1) / int(gridDim.z), LEAST_TILES)
                        : all_tiles;
  const int begin = PARTED ? int(blockIdx.z) * share : 0, tiles = min(begin + share, all_tiles);
  if (PARTED && begin >= tiles) return;
  // Not in a register until it is needed: the loop over tiles has none to spare.
  if (PARTED && threadIdx.x == 0) part_count = (all_tiles + share - 1) / share;
  const u64 base = cache_tile<KV_HEADS>(max_seq, here.slot, head, 0);

  auto fetch = [&](int tile) {
    if (tile < tiles) {
      u8* const stage = ring + (tile % STAGES) * STAGE;
      const u64 first = base + u64(tile) * (KEYS / TILE * KV_HEADS);
#pragma unroll
      for (int j = 0; j < (KEYS * Cache::UNITS + THREADS - 1) / THREADS; j++) {
        const int unit = j * THREADS + threadIdx.x, in_tile = unit / Cache::UNITS, part = unit % Cache::UNITS;
        if (KEYS * Cache::UNITS % THREADS == 0 || unit < KEYS * Cache::UNITS) {
          const bool wanted = tile * KEYS + in_tile < length;
          const u8* const from = cache + first * (2 * Cache::VALUES) +
                                 (in_tile / TILE * KV_HEADS * 2 * TILE + in_tile % TILE) * Cache::BYTES + part * 16;
          u8* const to = stage + in_tile * Cache::STRIDE + part * 16;
          copy_async(to, from, wanted);
          copy_async(to + MATRIX, from + Cache::VALUES, wanted);
        }
      }
      if (INT8 && threadIdx.x < 2 * KEYS / 8) {
        const bool is_value = threadIdx.x >= KEYS / 8;
        const int in_tile = int(threadIdx.x) % (KEYS / 8) * 8;
        const u16* const from = scales + (first + in_tile / TILE * KV_HEADS) * (2 * TILE) + is_value * TILE + in_tile % TILE;
        copy_async(stage + 2 * MATRIX + threadIdx.x * 16, from, tile * KEYS + in_tile < length);
      }
    }
    copy_async_commit();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) fetch(begin + s);

  // Rows g and g + 8 of the warp's 16.
  int row[2], limit[2];  // the last key that a row sees
  // Of float16s their fragments. A byte cache's keys are multiplied as bytes: q = q_scale · (256 · high + low), both
  // signed bytes, whose fragments are these; q_start takes off what keys have too much, 128.
  constexpr int BYTE_STEPS = (D + 31) / 32;
  u32 q[INT8 ? 2 * BYTE_STEPS : STEPS][4];
  float q_scale[2] = {1.f, 1.f};
  int q_start[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    row[half] = first_row + warp * 16 + g + 8 * half;
    const int token = row[half] / QUERIES;
    const bool there = row[half] < row_count;
    limit[half] = there ? here.past + token : -1;
    const u16* const from = qkv + u64(there ? token : 0) * WIDTH + (head * QUERIES + row[half] % QUERIES) * D;
    if constexpr (INT8) {
      float x[BYTE_STEPS][2][4], most = 0.f;
#pragma unroll
      for (int s = 0; s < BYTE_STEPS; s++)
#pragma unroll
        for (int side = 0; side < 2; side++) {
          const int at = s * 32 + side * 16 + 4 * t;
          const uint2 w = there && at < D ? load_l2((const uint2*)(from + at)) : make_uint2(0u, 0u);
          const float2 a = half2_to_float2(w.x), b = half2_to_float2(w.y);
          float(&v)[4] = x[s][side];
          v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
          most = fmaxf(most, fmaxf(fmaxf(fabsf(a.x), fabsf(a.y)), fmaxf(fabsf(b.x), fabsf(b.y))));
        }
      most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
      most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
      const float inverse = most > 0.f ? LARGEST_CODE / most : 0.f;
      q_scale[half] = fmaxf(most / LARGEST_CODE, 1e-20f);  // above 0, so that NOTHING stays what it is
      int sum = 0;
#pragma unroll
      for (int s = 0; s < BYTE_STEPS; s++)
#pragma unroll
        for (int side = 0; side < 2; side++) {
          u32 high = 0, low = 0;
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int code = int(rintf(x[s][side][i] * inverse));
            sum += code;
            high |= u32((code + 128) >> 8 & 255) << 8 * i, low |= u32(code & 255) << 8 * i;
          }
          q[s][half + 2 * side] = high, q[BYTE_STEPS + s][half + 2 * side] = low;
        }
      sum += __shfl_xor_sync(FULL_WARP, sum, 1);
      sum += __shfl_xor_sync(FULL_WARP, sum, 2);
      q_start[half] = -128 * sum;
    } else {
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        q[s][half] = there ? load_l2((const u32*)(from + s * 16 + 2 * t)) : 0u;
        q[s][half + 2] = there ? load_l2((const u32*)(from + s * 16 + 2 * t + 8)) : 0u;
      }
    }
  }
  // Warps wholly before a tile skip it; a tile wholly before the warp's first row needs no mask.
  const int warp_first = here.past + (first_row + warp * 16) / QUERIES;
  const int warp_last = here.past + min(first_row + warp * 16 + 15, row_count - 1) / QUERIES;
  const bool warp_there = first_row + warp * 16 < row_count;

  float o[2 * STEPS][4] = {};
  float largest[2] = {NOTHING, NOTHING}, sum[2] = {};
  float weight[4] = {};  // of bytes: what the last tile's values have been multiplied by, of rows g and g + 8 twice
#pragma unroll 1
  for (int tile = begin; tile < tiles; tile++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    fetch(tile + STAGES - 1);
    const int key0 = tile * KEYS;
    if (!warp_there || key0 > warp_last) continue;
    const u8* const stage = ring + (tile % STAGES) * STAGE;

    float c[TILES][4];  // of bytes in units of q_scale
    if constexpr (INT8) {
      const u8* const at = stage + ((lane >> 4) * 8 + (lane & 7)) * Cache::STRIDE + (lane >> 3 & 1) * 16;
#pragma unroll
      for (int n = 0; n < TILES; n += 2) {
        u32 w[BYTE_STEPS][4];  // keys n: 16 and 16 bytes; keys n + 1: the same
#pragma unroll
        for (int s = 0; s < BYTE_STEPS; s++) load_matrices(w[s], at + n * 8 * Cache::STRIDE + s * 32);
        int sums[2][4] = {};
#pragma unroll
        for (int part = 0; part < 2; part++) {
#pragma unroll
          for (int s = 0; s < BYTE_STEPS; s++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
              const u32(&a)[4] = q[part * BYTE_STEPS + s];
              mma_signed_bytes(sums[i], a[0], a[1], a[2], a[3], w[s][2 * i], w[s][2 * i + 1]);
            }
          if (part == 0)
#pragma unroll
            for (int e = 0; e < 8; e++) sums[e / 4][e % 4] = sums[e / 4][e % 4] * 256 + q_start[e % 4 / 2];
        }
#pragma unroll
        for (int e = 0; e < 8; e++) c[n + e / 4][e % 4] = float(sums[e / 4][e % 4]);
      }
      const u16* const of = (const u16*)(stage + 2 * MATRIX);
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        const float2 f = half2_to_float2(*(const u32*)(of + n * 8 + 2 * t));
        c[n][0] *= f.x, c[n][1] *= f.y, c[n][2] *= f.x, c[n][3] *= f.y;
      }
    } else {
      const u8* const at = stage + ((lane >> 4) * 8 + (lane & 7)) * Cache::STRIDE + (lane >> 3 & 1) * 16;
#pragma unroll
      for (int n = 0; n < TILES; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.f;
#pragma unroll
      for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int n = 0; n < TILES; n += 2) {
          u32 b[4];
          load_matrices(b, at + n * 8 * Cache::STRIDE + s * 32);
          mma(c[n], q[s][0], q[s][1], q[s][2], q[s][3], b[0], b[1]);
          mma(c[n + 1], q[s][0], q[s][1], q[s][2], q[s][3], b[2], b[3]);
        }
    }

    if (key0 + KEYS - 1 > warp_first) {
#pragma unroll
      for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (key0 + n * 8 + 2 * t + (e & 1) > limit[e >> 1]) c[n][e] = NOTHING;
    }

    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float m = largest[half];
#pragma unroll
      for (int n = 0; n < TILES; n++) m = fmaxf(m, fmaxf(c[n][2 * half], c[n][2 * half + 1]));
      m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, 1));
      m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, 2));
      shrink[half] = exp2_fast((largest[half] - m) * q_scale[half]);
      largest[half] = m;
      // The first part's first tile has a key for every row; another part may have none, and no weight then.
      const float reference = (PARTED && m == NOTHING ? 0.f : m) * q_scale[half];
      float s = 0.f;
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        c[n][2 * half] = exp2_fast(c[n][2 * half] * q_scale[half] - reference);
        c[n][2 * half + 1] = exp2_fast(c[n][2 * half + 1] * q_scale[half] - reference);
        s += c[n][2 * half] + c[n][2 * half + 1];
      }
      sum[half] = sum[half] * shrink[half] + s;
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float f = shrink[e >> 1], excess = INT8 ? CODE_EXCESS * weight[e] * f : 0.f;
#pragma unroll
      for (int n = 0; n < 2 * STEPS; n++) o[n][e] = o[n][e] * f - excess;
      weight[e] = 0.f;
    }

    if (INT8) {
      const u16* const of = (const u16*)(stage + 2 * MATRIX) + KEYS;
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        // What is not there has probability 0, and perhaps no finite scale.
        const float2 f = half2_to_float2(*(const u32*)(of + n * 8 + 2 * t));
        const float a = f.x * VALUE_SCALE_FACTOR, b = f.y * VALUE_SCALE_FACTOR;
        c[n][0] = c[n][0] > 0.f ? c[n][0] * a : 0.f, c[n][1] = c[n][1] > 0.f ? c[n][1] * b : 0.f;
        c[n][2] = c[n][2] > 0.f ? c[n][2] * a : 0.f, c[n][3] = c[n][3] > 0.f ? c[n][3] * b : 0.f;
      }
    }
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
      const u32 a0 = pack_half2(c[2 * k][0], c[2 * k][1]), a1 = pack_half2(c[2 * k][2], c[2 * k][3]);
      const u32 a2 = pack_half2(c[2 * k + 1][0], c[2 * k + 1][1]), a3 = pack_half2(c[2 * k + 1][2], c[2 * k + 1][3]);
      const u8* const at =
          stage + MATRIX + (k * 16 + (lane >> 3 & 1) * 8 + (lane & 7)) * Cache::STRIDE + (lane >> 4) * 16;
      if constexpr (INT8) {
        mma(weight, a0, a1, a2, a3, HALF2_ONES, HALF2_ONES);
        // A 16-bit element is two neighbours of d: one product takes the even ones, one the odd.
#pragma unroll
        for (int s = 0; s < STEPS; s += 2) {
          u32 w[4];  // d of step s: keys 0–7, 8–15; of step s + 1: the same
          load_matrices_transposed(w, at + s * 16);
#pragma unroll
          for (int half = 0; half < 2 && s + half < STEPS; half++) {
            const u32 low = w[2 * half], high = w[2 * half + 1];
            mma(o[2 * (s + half)], a0, a1, a2, a3, codes_to_half2<0x4240>(low), codes_to_half2<0x4240>(high));
            mma(o[2 * (s + half) + 1], a0, a1, a2, a3, codes_to_half2<0x4341>(low), codes_to_half2<0x4341>(high));
          }
        }
      } else {
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
          u32 b[4];
          load_matrices_transposed(b, at + s * 32);
          mma(o[2 * s], a0, a1, a2, a3, b[0], b[1]);
          mma(o[2 * s + 1], a0, a1, a2, a3, b[2], b[3]);
        }
      }
    }
  }

  constexpr float UNIT = INT8 ? 1.f / (VALUE_SCALE_FACTOR * BYTE) : 1.f;  // of o
  if constexpr (INT8) {
#pragma unroll
    for (int n = 0; n < 2 * STEPS; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) o[n][e] -= CODE_EXCESS * weight[e];
  }
  const int parts = PARTED ? part_count : 1;
  auto place_of = [&](int row) {
    return out + u64(row / QUERIES) * HEADS * D + (head * QUERIES + row % QUERIES) * D;
  };
  float* const sums_of_rows = partials + u64(blockIdx.y * KV_HEADS + head) * gridDim.z * PARTIAL;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float s = sum[half];
    s += __shfl_xor_sync(FULL_WARP, s, 1);
    s += __shfl_xor_sync(FULL_WARP, s, 2);
    if (row[half] >= row_count) continue;
    const float r = UNIT / s;
    u16* const to = place_of(row[half]);
    const int in_block = row[half] - first_row;
    float* const part = sums_of_rows + blockIdx.z * PARTIAL;
    float* const sums = part + ROWS * 2 + in_block * D;
    if (PARTED && parts > 1 && t == 0) ((float2*)part)[in_block] = make_float2(largest[half] * q_scale[half], s);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const float a0 = o[2 * step][2 * half], a1 = o[2 * step][2 * half + 1];
      const float b0 = o[2 * step + 1][2 * half], b1 = o[2 * step + 1][2 * half + 1];
      // Of bytes columns 2t and 2t + 1 of the even product are d = 4t and 4t + 2, of the odd one 4t + 1 and 4t + 3.
      if (PARTED && parts > 1) {
        if constexpr (INT8) {
          *(float4*)(sums + step * 16 + 4 * t) = make_float4(a0, b0, a1, b1);
        } else {
          *(float2*)(sums + step * 16 + 2 * t) = make_float2(a0, a1);
          *(float2*)(sums + step * 16 + 8 + 2 * t) = make_float2(b0, b1);
        }
      } else if constexpr (INT8) {
        *(uint2*)(to + step * 16 + 4 * t) = make_uint2(pack_half2(a0 * r, b0 * r), pack_half2(a1 * r, b1 * r));
      } else {
        *(u32*)(to + step * 16 + 2 * t) = pack_half2(a0 * r, a1 * r);
        *(u32*)(to + step * 16 + 8 + 2 * t) = pack_half2(b0 * r, b1 * r);
      }
    }
  }
  if constexpr (PARTED) {
    if (parts == 1) return;
    __syncthreads();
    if (threadIdx.x == 0) is_last = count_arrival(counters + blockIdx.y * KV_HEADS + head, parts - 1) == parts - 1;
    __syncthreads();
    if (!is_last) return;
    // A warp for its rows, ABREAST at a time so that their loads are under way together; a lane has four neighbours of
    // d, and what it knows of part `lane`.
    constexpr int ABREAST = 4;
#pragma unroll 1
    for (int n = 0; n < 16; n += ABREAST) {
      const int in_block = warp * 16 + n;
      if (first_row + in_block >= row_count) break;
      float weight[ABREAST], total[ABREAST];
      float4 v[ABREAST];
#pragma unroll
      for (int i = 0; i < ABREAST; i++) {
        const bool there = lane < parts && first_row + in_block + i < row_count;
        const float2 s = there ? load_l2((const float2*)(sums_of_rows + lane * PARTIAL) + in_block + i)
                               : make_float2(NOTHING, 0.f);
        weight[i] = exp2_fast(s.x - warp_max(s.x));
        total[i] = warp_sum(weight[i] * s.y);
        v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      }
#pragma unroll 4
      for (int part = 0; part < parts; part++)
#pragma unroll
        for (int i = 0; i < ABREAST; i++) {
          const float f = __shfl_sync(FULL_WARP, weight[i], part);
          if (lane >= D / 4 || first_row + in_block + i >= row_count) continue;
          const float* const sums = sums_of_rows + part * PARTIAL + ROWS * 2 + (in_block + i) * D;
          const float4 a = load_l2((const float4*)sums + lane);
          v[i].x += f * a.x, v[i].y += f * a.y, v[i].z += f * a.z, v[i].w += f * a.w;
        }
#pragma unroll
      for (int i = 0; i < ABREAST; i++) {
        const int row = first_row + in_block + i;
        if (lane >= D / 4 || row >= row_count) continue;
        const float r = UNIT / total[i];
        ((uint2*)place_of(row))[lane] =
            make_uint2(pack_half2(v[i].x * r, v[i].y * r), pack_half2(v[i].z * r, v[i].w * r));
      }
    }
  }
}
