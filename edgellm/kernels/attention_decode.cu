// Attention of a decode step: one new token for each row, over all that its slot holds.
//
// A row's tokens are cut into pieces of 16 · WARPS, one tile of 16 for each warp. Laid end to end, the pieces of all
// rows, KV head after KV head, are dealt evenly to the grid's blocks: a row's pieces may lie in several blocks, which
// then leave partial sums, and a block's pieces in several rows. The grid does not depend on the lengths.
// `attention_decode.py` has the same arithmetic.
//
// With compute capability 9 each row and KV head has a cluster of CLUSTER blocks instead, among which its pieces are
// dealt; their sums meet in the first block's shared memory, which takes a fraction of the way through L2.
#include "attention.cuh"
#include "rows.cuh"

constexpr int TILE = 16;  // tokens

// D: head size. QUERIES: query heads of a KV head. CLUSTER: blocks of one, 1 where there are none.
template <int D, int QUERIES, int KV_HEADS, bool INT8, bool NORM, int WARPS, int STAGES, int CLUSTER>
DEVICE void attend(int row_count, int max_seq, const Row* __restrict__ rows, const u16* qkv,
                   const float* __restrict__ angles, const float* __restrict__ q_gain, const float* __restrict__ k_gain,
                   float epsilon, float scale, u8* keys, u8* values, u16* key_scales, u16* value_scales, u16* out,
                   float* partials, u32* counters) {
  using Cache = CacheRow<D, INT8>;
  constexpr int PIECE = TILE * WARPS, STEPS = D / 16, GROUPS = (QUERIES + 7) / 8;
  constexpr int HEADS = KV_HEADS * QUERIES, WIDTH = (HEADS + 2 * KV_HEADS) * D;
  constexpr int MATRIX = TILE * Cache::STRIDE, SCALES = INT8 ? 2 * TILE * 2 : 0, STAGE = 2 * MATRIX + SCALES;
  constexpr int GATHERED = QUERIES * D / 4 + QUERIES;
  constexpr int PARTIAL = (QUERIES * (D + 2) + 3) / 4 * 4;  // floats
  constexpr int ITEMS = (QUERIES + 2 + WARPS - 1) / WARPS;
  static_assert(D % 16 == 0 && D <= 128);

  DYNAMIC_SHARED(ring);
  __shared__ __align__(16) u16 query[QUERIES][D + 8];
  __shared__ __align__(16) u8 fresh[2][Cache::BYTES];  // the new token's key and value, as the cache holds them
  __shared__ u16 fresh_scale[2];
  __shared__ __align__(16) float sums[WARPS][QUERIES][D + 4];
  __shared__ float2 statistics[WARPS][QUERIES];  // largest logit, sum of 2^(logit − largest)
  __shared__ bool is_last;

  launch_dependents();
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  // Lane i knows row i. In a cluster there are no others.
  const bool concerned = CLUSTER > 1 ? lane == int(blockIdx.z) : lane < row_count;
  Row mine = concerned ? rows[lane] : Row{-1, 0, 0, 0};
  const int pieces = mine.slot < 0 ? 0 : mine.past / PIECE + 1;
  int ends = pieces;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    int before = __shfl_up_sync(FULL_WARP, ends, o);
    if (lane >= o) ends += before;
  }
  const int total = __shfl_sync(FULL_WARP, ends, 31), all = CLUSTER > 1 ? total : total * KV_HEADS;
  const int share = (all + int(gridDim.x) - 1) / int(gridDim.x);
  const int begin = int(blockIdx.x) * share, end = min(begin + share, all);
  if (CLUSTER > 1 && total > 0) cluster_arrive();  // this block's shared memory is there
  if (begin >= end) {
    wait_for_previous();
    if (CLUSTER > 1 && total > 0) {
      cluster_wait();
      cluster_arrive();
    }
    return;
  }
  auto row_of = [&](int piece) { return __ffs(__ballot_sync(FULL_WARP, ends > piece)) - 1; };

  // The tile of this warp in the block's piece `begin + i`. A tile is one stretch of the cache; the new token is not
  // there yet.
  u8* const my_ring = ring + warp * STAGES * STAGE;
  auto fetch = [&](int i) {
    if (begin + i < end) {
      const int head = CLUSTER > 1 ? int(blockIdx.y) : (begin + i) / total;
      const int piece = CLUSTER > 1 ? begin + i : begin + i - head * total;
      const int row = CLUSTER > 1 ? int(blockIdx.z) : row_of(piece);
      const int slot = __shfl_sync(FULL_WARP, mine.slot, row), past = __shfl_sync(FULL_WARP, mine.past, row);
      const int first = CLUSTER > 1 ? piece : piece - __shfl_sync(FULL_WARP, ends - pieces, row);
      const int token = first * PIECE + warp * TILE;
      if (token < past) {
        const u64 at = (u64(slot) * KV_HEADS + head) * max_seq + token;
        const u8* const key = keys + at * Cache::BYTES + lane * 16;
        const u8* const value = values + at * Cache::BYTES + lane * 16;
        u8* const stage = my_ring + (i % STAGES) * STAGE;
#pragma unroll
        for (int j = 0; j < (TILE * Cache::UNITS + 31) / 32; j++) {
          const int unit = j * 32 + lane, in_tile = unit / Cache::UNITS, part = unit % Cache::UNITS;
          if (TILE * Cache::UNITS % 32 == 0 || unit < TILE * Cache::UNITS) {
            u8* const to = stage + in_tile * Cache::STRIDE + part * 16;
            copy_async(to, key + j * 512, token + in_tile < past);
            copy_async(to + MATRIX, value + j * 512, token + in_tile < past);
          }
        }
        if (INT8 && lane < 4)
          copy_async(stage + 2 * MATRIX + lane * 16, (lane < 2 ? key_scales : value_scales) + at + (lane & 1) * 8);
      }
    }
    copy_async_commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES; i++) fetch(i);

  Pairs<D> q_gains, k_gains;
  if (NORM) {
    load_pairs<D>(q_gains, lane, [&](int j) { return __ldg(q_gain + j); });
    load_pairs<D>(k_gains, lane, [&](int j) { return __ldg(k_gain + j); });
  }

  bool waited = false;
  for (int i = 0; begin + i < end;) {
    const int head = CLUSTER > 1 ? int(blockIdx.y) : (begin + i) / total;
    const int before = CLUSTER > 1 ? 0 : head * total;  // pieces of the heads before
    const int row = row_of(begin + i - before);
    const int slot = __shfl_sync(FULL_WARP, mine.slot, row), past = __shfl_sync(FULL_WARP, mine.past, row);
    const int row_end = before + __shfl_sync(FULL_WARP, ends, row);
    const int row_begin = row_end - __shfl_sync(FULL_WARP, pieces, row);
    const int until = min(end, row_end) - begin;
    const bool whole = begin + i == row_begin && begin + until == row_end;
    const bool has_new = begin + until == row_end;
    Pairs<D> turn;
    load_pairs<D>(turn, lane, [&](int j) { return __ldg(angles + u64(past) * D + j); });
    if (!waited) wait_for_previous();
    waited = true;

    // Queries, the new key and the new value: a warp for each.
    Pairs<D> item[ITEMS];
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
      const int which = n * WARPS + warp;
      const int in_row = which < QUERIES ? head * QUERIES + which : HEADS + (which - QUERIES) * KV_HEADS + head;
      if (which < QUERIES + 2)
        load_pairs<D>(item[n], lane, [&](int j) {
          return half_to_float(load_l2(qkv + u64(row) * WIDTH + in_row * D + j));
        });
    }
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
      const int which = n * WARPS + warp;
      if (which < QUERIES) {
        if (NORM) normalise<D>(item[n], q_gains, epsilon);
        rotate<D>(item[n], turn);
        store_halves<D>(query[which], item[n], lane, scale);
      } else if (which < QUERIES + 2 && has_new) {
        const int kind = which - QUERIES;
        if (kind == 0) {
          if (NORM) normalise<D>(item[n], k_gains, epsilon);
          rotate<D>(item[n], turn);
        }
        const u64 at = (u64(slot) * KV_HEADS + head) * max_seq + past;
        u8* const to = (kind ? values : keys) + at * Cache::BYTES;
        if constexpr (INT8) {
          const u16 s = quantise<D>(item[n], lane, [&](int j, u8 code) { to[j] = fresh[kind][j] = code; });
          if (lane == 0) (kind ? value_scales : key_scales)[at] = fresh_scale[kind] = s;
        } else {
          store_halves<D>((u16*)to, item[n], lane);
          store_halves<D>((u16*)fresh[kind], item[n], lane);
        }
      }
    }
    __syncthreads();

    u32 q[GROUPS][STEPS][2];
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        const int which = group * 8 + g;
        // A byte cache's fragments have four neighbours where halves have two and two (see below).
        const int low = s * 16 + (INT8 ? 4 * t : 2 * t), high = low + (INT8 ? 2 : 8);
        q[group][s][0] = which < QUERIES ? *(const u32*)&query[which][low] : 0u;
        q[group][s][1] = which < QUERIES ? *(const u32*)&query[which][high] : 0u;
      }

    float o[GROUPS][STEPS][4] = {};  // [d of the step: g and g + 8] × [queries 2t, 2t + 1]
    float largest[GROUPS][2], sum[GROUPS][2] = {};
#pragma unroll
    for (int group = 0; group < GROUPS; group++) largest[group][0] = largest[group][1] = NOTHING;

#pragma unroll 1
    for (; i < until; i++) {
      copy_async_wait<STAGES - 1>();
      __syncwarp();
      u8* const stage = my_ring + (i % STAGES) * STAGE;
      const int token = (begin + i - row_begin) * PIECE + warp * TILE;
      if (token <= past) {
        if (past < token + TILE) {
          if (past == token) {  // nothing was fetched; what is multiplied by 0 must be finite
            for (int unit = lane; unit < 2 * MATRIX / 16; unit += 32)
              *(uint4*)(stage + unit * 16) = make_uint4(0u, 0u, 0u, 0u);
            __syncwarp();
          }
          u8* const to = stage + (past - token) * Cache::STRIDE;
          if (lane < 2 * Cache::UNITS) {
            const int kind = lane / Cache::UNITS, part = lane % Cache::UNITS;
            *(uint4*)(to + kind * MATRIX + part * 16) = *(const uint4*)(fresh[kind] + part * 16);
          }
          if (INT8 && lane < 2) *(u16*)(stage + 2 * MATRIX + (lane * TILE + past - token) * 2) = fresh_scale[lane];
          __syncwarp();
        }

        // Logits: tokens g and g + 8 × queries 2t and 2t + 1.
        // Two sums for each, so that half as many products wait for each other.
        float c[GROUPS][4] = {}, odd[GROUPS][4] = {};
        if constexpr (INT8) {
          const u8* const at = stage + ((lane >> 3 & 1) * 8 + (lane & 7)) * Cache::STRIDE + (lane >> 4) * 16;
#pragma unroll
          for (int s = 0; s < STEPS; s += 2) {
            u32 w[4];
            load_matrices(w, at + s * 16);
#pragma unroll
            for (int half = 0; half < 2 && s + half < STEPS; half++) {
              const u32 a0 = codes_to_half2<0x4140>(w[2 * half]), a1 = codes_to_half2<0x4140>(w[2 * half + 1]);
              const u32 a2 = codes_to_half2<0x4342>(w[2 * half]), a3 = codes_to_half2<0x4342>(w[2 * half + 1]);
#pragma unroll
              for (int group = 0; group < GROUPS; group++)
                mma(half ? odd[group] : c[group], a0, a1, a2, a3, q[group][s + half][0], q[group][s + half][1]);
            }
          }
        } else {
          const u8* const at = stage + ((lane >> 3 & 1) * 8 + (lane & 7)) * Cache::STRIDE + (lane >> 4) * 16;
#pragma unroll
          for (int s = 0; s < STEPS; s++) {
            u32 a[4];
            load_matrices(a, at + s * 32);
#pragma unroll
            for (int group = 0; group < GROUPS; group++)
              mma(s & 1 ? odd[group] : c[group], a[0], a[1], a[2], a[3], q[group][s][0], q[group][s][1]);
          }
        }
        float low_scale = 1.f, high_scale = 1.f;
        if (INT8) {
          const u16* const of = (const u16*)(stage + 2 * MATRIX);
          low_scale = half_to_float(of[g]), high_scale = half_to_float(of[g + 8]);
        }
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
          for (int e = 0; e < 4; e++) c[group][e] = (c[group][e] + odd[group][e]) * (e < 2 ? low_scale : high_scale);

        const bool low_there = token + g <= past, high_there = token + g + 8 <= past;
        float low_factor = 1.f, high_factor = 1.f;
        if (INT8) {
          const u16* const of = (const u16*)(stage + 2 * MATRIX) + TILE;
          low_factor = low_there ? half_to_float(of[g]) * VALUE_SCALE_FACTOR : 0.f;
          high_factor = high_there ? half_to_float(of[g + 8]) * VALUE_SCALE_FACTOR : 0.f;
        }
        u32 p[GROUPS][2];
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
          float e[4], shrink[2];
#pragma unroll
          for (int column = 0; column < 2; column++) {
            const float a = low_there ? c[group][column] : NOTHING, b = high_there ? c[group][column + 2] : NOTHING;
            float m = fmaxf(a, b);
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes <<= 1) m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, lanes));
            m = fmaxf(m, largest[group][column]);
            shrink[column] = exp2_fast(largest[group][column] - m);
            largest[group][column] = m;
            e[column] = exp2_fast(a - m);
            e[column + 2] = exp2_fast(b - m);
            sum[group][column] = sum[group][column] * shrink[column] + e[column] + e[column + 2];
          }
          if (__any_sync(FULL_WARP, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
              o[group][s][0] *= shrink[0], o[group][s][1] *= shrink[1];
              o[group][s][2] *= shrink[0], o[group][s][3] *= shrink[1];
            }
          }
          p[group][0] = transpose_matrix(pack_half2(e[0] * low_factor, e[1] * low_factor));
          p[group][1] = transpose_matrix(pack_half2(e[2] * high_factor, e[3] * high_factor));
        }

        if constexpr (INT8) {
          // A 16-bit element is two neighbours of d: rows g of a fragment take the even ones, rows g + 8 the odd.
          const u8* const at =
              stage + MATRIX + ((lane >> 3 & 1) * 8 + (lane & 7)) * Cache::STRIDE + (lane >> 4) * 16;
#pragma unroll
          for (int s = 0; s < STEPS; s += 2) {
            u32 w[4];
            load_matrices_transposed(w, at + s * 16);
#pragma unroll
            for (int half = 0; half < 2 && s + half < STEPS; half++) {
              const u32 a0 = codes_to_half2<0x4240>(w[2 * half]), a1 = codes_to_half2<0x4341>(w[2 * half]);
              const u32 a2 = codes_to_half2<0x4240>(w[2 * half + 1]), a3 = codes_to_half2<0x4341>(w[2 * half + 1]);
#pragma unroll
              for (int group = 0; group < GROUPS; group++)
                mma(o[group][s + half], a0, a1, a2, a3, p[group][0], p[group][1]);
            }
          }
        } else {
          const u8* const at =
              stage + MATRIX + ((lane >> 4) * 8 + (lane & 7)) * Cache::STRIDE + (lane >> 3 & 1) * 16;
#pragma unroll
          for (int s = 0; s < STEPS; s++) {
            u32 a[4];
            load_matrices_transposed(a, at + s * 32);
#pragma unroll
            for (int group = 0; group < GROUPS; group++)
              mma(o[group][s], a[0], a[1], a[2], a[3], p[group][0], p[group][1]);
          }
        }
      }
      __syncwarp();
      fetch(i + STAGES);
    }

    // The warps' sums become one.
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
      for (int column = 0; column < 2; column++) {
        float total_sum = sum[group][column];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes <<= 1) total_sum += __shfl_xor_sync(FULL_WARP, total_sum, lanes);
        const int which = group * 8 + 2 * t + column;
        if (which < QUERIES) {
          if (g == 0) statistics[warp][which] = make_float2(largest[group][column], total_sum);
#pragma unroll
          for (int s = 0; s < STEPS; s++) {
            const int low = s * 16 + (INT8 ? 2 * g : g), high = low + (INT8 ? 1 : 8);
            sums[warp][which][low] = o[group][s][column] * (INT8 ? 1.f / VALUE_SCALE_FACTOR : 1.f);
            sums[warp][which][high] = o[group][s][column + 2] * (INT8 ? 1.f / VALUE_SCALE_FACTOR : 1.f);
          }
        }
      }
    __syncthreads();

    // Blocks with pieces of this row, and the place of this block's partial sums: a block has at most two rows that
    // are not whole, its first and its last.
    const int first_block = row_begin / share, last_block = (row_end - 1) / share;
    auto place = [&](int block) {
      const int second = block == first_block && row_begin != block * share;
      return partials + u64(block * 2 + second) * PARTIAL;
    };
    u16* const to = out + u64(row) * HEADS * D + head * QUERIES * D;
    auto finish = [&](int unit, float4 v, float total_sum) {
      const float r = 1.f / total_sum;
      ((uint2*)to)[unit] = make_uint2(pack_half2(v.x * r, v.y * r), pack_half2(v.z * r, v.w * r));
    };
    float4* const gathered = (float4*)(ring + WARPS * STAGES * STAGE);  // of each block its sums, then the statistics
    if (CLUSTER > 1) cluster_wait();
    for (int unit = threadIdx.x; unit < QUERIES * D / 4; unit += WARPS * 32) {
      const int which = unit / (D / 4), d = unit % (D / 4) * 4;
      float m = NOTHING, total_sum = 0.f;
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < WARPS; w++) m = fmaxf(m, statistics[w][which].x);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float f = exp2_fast(statistics[w][which].x - m);
        const float4 a = *(const float4*)&sums[w][which][d];
        total_sum += f * statistics[w][which].y;
        v.x += f * a.x, v.y += f * a.y, v.z += f * a.z, v.w += f * a.w;
      }
      if constexpr (CLUSTER > 1) {
        float4* const place = gathered + blockIdx.x * GATHERED;
        store_cluster(cluster_address(shared_address(place + unit), 0), v);
        if (d == 0)
          store_cluster(cluster_address(shared_address(place + QUERIES * D / 4 + which), 0),
                        make_float4(m, total_sum, 0.f, 0.f));
      } else if (whole) {
        finish(unit, v, total_sum);
      } else {
        float* const p = place(blockIdx.x);
        ((float4*)p)[unit] = v;
        if (d == 0) ((float2*)(p + QUERIES * D))[which] = make_float2(m, total_sum);
      }
    }
    if constexpr (CLUSTER > 1) {
      cluster_arrive();
      if (blockIdx.x != 0) return;
      cluster_wait();
      for (int unit = threadIdx.x; unit < QUERIES * D / 4; unit += WARPS * 32) {
        const int which = unit / (D / 4);
        float m = NOTHING, total_sum = 0.f;
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int block = 0; block < CLUSTER; block++)
          if (block <= last_block) m = fmaxf(m, gathered[block * GATHERED + QUERIES * D / 4 + which].x);
#pragma unroll
        for (int block = 0; block < CLUSTER; block++)
          if (block <= last_block) {
            const float4 s = gathered[block * GATHERED + QUERIES * D / 4 + which];
            const float4 a = gathered[block * GATHERED + unit];
            const float f = exp2_fast(s.x - m);
            total_sum += f * s.y;
            v.x += f * a.x, v.y += f * a.y, v.z += f * a.z, v.w += f * a.w;
          }
        finish(unit, v, total_sum);
      }
      return;
    }
    if (whole) continue;

    // Whoever comes last adds up; the counter goes back to 0.
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      is_last = atomicInc(counters + row * KV_HEADS + head, last_block - first_block) == last_block - first_block;
      __threadfence();
    }
    __syncthreads();
    if (!is_last) continue;
    for (int unit = threadIdx.x; unit < QUERIES * D / 4; unit += WARPS * 32) {
      const int which = unit / (D / 4);
      float m = NOTHING, total_sum = 0.f;
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
      for (int block = first_block; block <= last_block; block++) {
        const float* const p = place(block);
        const float2 s = load_l2((const float2*)(p + QUERIES * D) + which);
        const float4 a = load_l2((const float4*)p + unit);
        const float next = fmaxf(m, s.x), f = exp2_fast(m - next), h = exp2_fast(s.x - next);
        m = next;
        total_sum = total_sum * f + s.y * h;
        v.x = v.x * f + a.x * h, v.y = v.y * f + a.y * h, v.z = v.z * f + a.z * h, v.w = v.w * f + a.w * h;
      }
      finish(unit, v, total_sum);
    }
  }
}

// Shared memory, dynamic: a ring of STAGES tiles for each warp. Grid: blocks. At most 32 rows.
template <int D, int QUERIES, int KV_HEADS, bool INT8, bool NORM, int WARPS, int STAGES>
__global__ void __launch_bounds__(WARPS * 32, 1)
    attention_decode(int row_count, int max_seq, const Row* __restrict__ rows, const u16* qkv,
                     const float* __restrict__ angles, const float* __restrict__ q_gain, const float* __restrict__ k_gain,
                     float epsilon, float scale, u8* keys, u8* values, u16* key_scales, u16* value_scales, u16* out,
                     float* partials, u32* counters) {
  attend<D, QUERIES, KV_HEADS, INT8, NORM, WARPS, STAGES, 1>(row_count, max_seq, rows, qkv, angles, q_gain, k_gain,
                                                             epsilon, scale, keys, values, key_scales, value_scales,
                                                             out, partials, counters);
}

// The ring, then room for every block's sums. Grid: (CLUSTER, KV_HEADS, rows).
#if __CUDA_ARCH__ >= 900
template <int D, int QUERIES, int KV_HEADS, bool INT8, bool NORM, int WARPS, int STAGES, int CLUSTER>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(WARPS * 32, 1)
    attention_decode_cluster(int max_seq, const Row* __restrict__ rows, const u16* qkv, const float* __restrict__ angles,
                             const float* __restrict__ q_gain, const float* __restrict__ k_gain, float epsilon,
                             float scale, u8* keys, u8* values, u16* key_scales, u16* value_scales, u16* out) {
  attend<D, QUERIES, KV_HEADS, INT8, NORM, WARPS, STAGES, CLUSTER>(int(gridDim.z), max_seq, rows, qkv, angles, q_gain,
                                                                   k_gain, epsilon, scale, keys, values, key_scales,
                                                                   value_scales, out, nullptr, nullptr);
}
#endif
